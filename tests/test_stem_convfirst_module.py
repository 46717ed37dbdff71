"""The operator and the module of a stem and the block after it; on CPUs they compute the reference."""

import pytest
import torch

from fusion import reference
from fusion.edge_modules import FusedStem
from fusion.edge_weights import StemWeights
from fusion.fused_file import load, save
from fusion.fused_module import FusedModule
from fusion.modules import FusedConvFirst
from fusion.planner.plan import PlanError
from fusion.planner.stem_convfirst_hopper_tile import StemConvFirstHopperTile
from fusion.stem_convfirst_module import FusedStemConvFirst, join_stem
from fusion.stem_convfirst_op import stem_convfirst_hopper

TILE = StemConvFirstHopperTile(16, 2, 32)
SIZES = {"stem_channels": 24, "hidden_channels": 48, "out_channels": 24, "residual": True}


@pytest.fixture
def twins(random_weights):
    """`(channels=24, in_channels=3, activation="relu", group_width=8) -> FusedStem, FusedConvFirst`"""

    def make(channels=24, in_channels=3, activation="relu", group_width=8):
        generator = torch.Generator().manual_seed(channels)
        conv = torch.randn(channels, in_channels, 3, 3, generator=generator, dtype=torch.float64) / 5
        stem = StemWeights(conv, torch.randn(channels, generator=generator, dtype=torch.float64))
        block = random_weights(channels, 2 * channels, group_width=group_width)
        return (
            FusedStem(stem, activation=activation),
            FusedConvFirst(block, activation="relu", residual=True),
        )

    return make


@pytest.mark.parametrize("size", [(12, 20), (2, 4), (6, 256)], ids=str)
def test_both_compute_what_stem_and_block_do(size, twins):
    stem, block = twins()
    both = join_stem(stem, block)
    x = torch.randn(2, 3, *size)
    out = both(x)
    torch.testing.assert_close(out, block(stem(x)), rtol=1e-4, atol=1e-4)
    assert out.is_contiguous(memory_format=torch.channels_last) and out.shape == (2, 24, size[0] // 2, size[1] // 2)
    packed = both.weights.pack(TILE, x.dtype, "cpu").tensors()
    torch.testing.assert_close(stem_convfirst_hopper(x, *packed, **SIZES, tile=TILE.to_ints()), out)
    assert stem_convfirst_hopper(x[:0], *packed, **SIZES, tile=TILE.to_ints()).shape == (0, *out.shape[1:])
    assert "24, hidden_channels=48" in repr(both) and "stem_channels=24" in repr(both)
    assert both.plan(x).kernel == "stem_convfirst_hopper"


def test_the_fake_operator_knows_shape_and_layout(twins):
    x = torch.randn(2, 3, 8, 12)
    packed = join_stem(*twins()).weights.pack(TILE, x.dtype, "cpu").tensors()
    torch.library.opcheck(
        stem_convfirst_hopper,
        (x, *packed, *SIZES.values(), TILE.to_ints()),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_a_saved_twin_is_the_same(twins, tmp_path):
    both = join_stem(*twins())
    x = torch.randn(1, 3, 8, 12)
    expected = both(x)
    save(FusedModule(both), tmp_path / "both.pt")
    again = load(tmp_path / "both.pt")
    assert torch.equal(again(x), expected)


def test_what_is_not_joined(twins):
    stem, block = twins()
    assert isinstance(join_stem(stem, block), FusedStemConvFirst)
    assert join_stem(block, block) is None and join_stem(stem, stem) is None
    assert join_stem(twins(16)[0], block) is None, "other channels"
    assert join_stem(*twins(in_channels=4)) is None
    assert join_stem(*twins(activation="silu")) is None
    assert join_stem(*twins(channels=40)) is None
    assert join_stem(*twins(group_width=4)) is None
    strided = FusedConvFirst(block.weights, activation="relu", residual=False, stride=2)
    assert join_stem(stem, strided) is None


def test_errors_of_the_operator(twins):
    x = torch.randn(1, 3, 8, 12)
    packed = join_stem(*twins()).weights.pack(TILE, x.dtype, "cpu").tensors()

    def run(x=x, packed=packed, **changes):
        return stem_convfirst_hopper(x, *packed, **(SIZES | {"tile": TILE.to_ints()} | changes))

    for arguments, message in (
        ({"x": torch.randn(1, 4, 8, 12)}, "images of 4 channels are not supported, only of 3; run the stem and"),
        ({"x": torch.randn(1, 3, 8, 10)}, "images of 8x10 pixels are not supported, only of an even height"),
        ({"x": torch.randn(1, 3, 7, 12)}, "images of 7x12 pixels are not supported"),
        ({"stem_channels": 20}, "20 stem channels are not supported, use a multiple of 8"),
        ({"out_channels": 20}, "20 output channels are not supported, use a multiple of 8"),
        ({"out_channels": 32}, "a residual of 24 input channels cannot be added to 32 output channels"),
        ({"tile": [16, 2]}, "tile must be the 3 integers of StemConvFirstHopperTile.to_ints"),
        ({"tile": [16, 2, 16]}, "slab=16 is less than the 24 channels of the stem"),
        (
            {"hidden_channels": 80},
            r"weights must be a contiguous \[9856\] for 24 stem, 80 hidden and 24 output channels",
        ),
        ({"packed": (packed[0][:2], *packed[1:])}, r"stem must be a contiguous \[3, 16, 64\]"),
    ):
        with pytest.raises(ValueError, match=message):
            run(**arguments)
    with pytest.raises(RuntimeError, match="grad"):
        run(x=x.clone().requires_grad_())


def test_sizes_without_a_plan_are_errors(twins):
    both = join_stem(*twins())
    with pytest.raises(PlanError, match="images of 8x260 pixels are not supported"):
        both(torch.randn(1, 3, 8, 260))


def test_the_reference_is_that_of_both(twins):
    stem, block = twins()
    weights, x = join_stem(stem, block).weights, torch.randn(1, 3, 6, 8, dtype=torch.float64)
    y = reference.stem(x, stem.weights.conv, stem.weights.bias, "relu")
    expected = reference.convfirst(y, *vars(block.weights).values(), "relu", True)
    assert torch.equal(reference.stem_convfirst(x, *vars(weights).values(), "relu", True), expected)

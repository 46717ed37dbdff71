from dataclasses import dataclass

import pytest
import torch

from fusion import edge_ops, reference
from fusion.edge_weights import StemWeights
from fusion.planner.blocks import conv as conv_graph
from fusion.planner.families import STEM
from fusion.planner.match import match_stem
from fusion.planner.processor import PROCESSORS
from fusion.planner.stem_tile import StemTile, why_invalid

HAS_GPU = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA GPU: too large for the interpreter")
DTYPES = [
    torch.float16,
    pytest.param(
        torch.bfloat16,
        marks=pytest.mark.skipif(not HAS_GPU, reason="Triton's interpreter multiplies bfloat16 matrices wrongly"),
    ),
]
SMALL, WIDE_GROUPS = StemTile(2, 32, 2, 2), StemTile(2, 64, 4, 2)
SAMPLED = 5
"""Every how many candidates a GPU runs one, from the best prediction to the worst."""


@dataclass(frozen=True)
class Case:
    channels: int = 3
    out_channels: int = 16
    size: tuple[int, int] = (6, 20)
    batch: int = 1
    activation: str = "relu"
    planar: bool = False
    tile: StemTile = SMALL

    def __str__(self):
        image = "x".join(map(str, (self.batch, *self.size)))
        layout = "planar" if self.planar else "interleaved"
        tile = ",".join(map(str, self.tile.to_ints()))
        return f"{self.channels}-{self.out_channels}-{image}-{self.activation}-{layout}-{tile}"

    def graph(self, dtype="float16"):
        activation = None if self.activation == "none" else self.activation
        sizes = self.batch, *self.size, self.channels, self.out_channels
        return conv_graph(*sizes, stride=2, activation=activation, dtype=dtype)

    def weights(self):
        generator = torch.Generator().manual_seed(self.channels + self.out_channels)

        def normal(*size):
            return torch.randn(*size, generator=generator, dtype=torch.float64)

        scale = (9 * self.channels) ** -0.5
        return StemWeights(normal(self.out_channels, self.channels, 3, 3) * scale, normal(self.out_channels))

    def input(self, device, dtype):
        torch.manual_seed(sum(self.size))
        x = torch.randn(self.batch, self.channels, *self.size).to(device, dtype)
        return x.contiguous(memory_format=torch.contiguous_format if self.planar else torch.channels_last)


BOTH_FORMATS = [(planar, tile) for planar in (False, True) for tile in (SMALL, WIDE_GROUPS)]
CASES = [
    *(Case(out_channels=out, planar=planar, tile=tile) for out in (16, 24, 32) for planar, tile in BOTH_FORMATS),
    # Rows whose elements are multiples of 8, 4, 2 and of nothing, odd heights, several tiles, one pixel.
    *(Case(size=(5, width), planar=planar, tile=tile) for width in (16, 12, 18, 13) for planar, tile in BOTH_FORMATS),
    *(Case(size=size, planar=planar) for size in ((1, 1), (2, 2), (1, 9), (9, 1), (3, 70)) for planar in (False, True)),
    Case(size=(9, 133), batch=3, out_channels=24, planar=True),
    Case(size=(9, 133), batch=3, out_channels=24),
    Case(size=(9, 136), batch=2, out_channels=24, tile=WIDE_GROUPS),
    *(Case(activation=activation, planar=planar) for activation in ("silu", "none") for planar in (False, True)),
    *(Case(activation=activation) for activation in ("relu6", "gelu", "hardswish")),
    # Other channels than three: windows with padding at their end.
    *(Case(channels=channels, planar=planar, tile=tile) for channels in (1, 2, 4) for planar, tile in BOTH_FORMATS),
    # Output channels of a group that are no power of two, and the most and the fewest.
    Case(out_channels=8),
    Case(out_channels=64),
    Case(out_channels=40),
    # Tiles.
    *(
        Case(size=(9, 36), tile=StemTile(*tile))
        for tile in ((1, 32, 2, 1), (8, 16, 2, 4), (4, 16, 2, 1), (1, 128, 4, 2))
    ),
]


def run_stem(x, weights, tile, activation):
    """The kernel on `x`, into a tensor full of NaN. On a GPU the operator runs as well and must agree to the bit."""
    from fusion.triton_kernels.stem import launch

    packed = weights.pack(tile, x.dtype, x.device).tensors()
    batch, _, height, width = x.shape
    out = torch.full((batch, weights.out_channels, -(-height // 2), -(-width // 2)), float("nan"))
    out = out.to(x.device, x.dtype).contiguous(memory_format=torch.channels_last)
    launch(x, *packed, out, activation=activation, tile=tile)
    if HAS_GPU:
        from_op = edge_ops.stem(x, *packed, weights.out_channels, activation, tile.to_ints())
        torch.testing.assert_close(from_op, out, rtol=0, atol=0, equal_nan=True)
    return out


def check(case, dtype, device, assert_within_rule, tile=None):
    weights, x = case.weights(), case.input(device, dtype)
    out = run_stem(x, weights, tile or case.tile, case.activation)
    conv, bias = weights.conv.to(device), weights.bias.to(device)
    eager = reference.stem(x, conv, bias, case.activation)
    assert_within_rule(out, eager, reference.stem(x.double(), conv, bias, case.activation))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_reference(case, dtype, device, assert_within_rule):
    assert why_invalid(case.tile, match_stem(case.graph()), PROCESSORS["h200"]) is None
    check(case, dtype, device, assert_within_rule)


@pytest.mark.parametrize("planar", [False, True], ids=["interleaved", "planar"])
def test_reads_and_writes_its_own_images_only(planar, device):
    """What lies before and after the images in memory is neither read nor written, however windows reach past them."""
    from fusion.triton_kernels.stem import launch

    case = Case(size=(5, 12), batch=2, planar=planar)
    x = torch.full((4, 3, 5, 12), float("nan"), dtype=torch.float16, device=device)
    x = x.contiguous(memory_format=torch.contiguous_format if planar else torch.channels_last)
    x[1:3] = case.input(device, torch.float16)
    out = torch.full((4, 16, 3, 6), float("nan"), dtype=torch.float16, device=device)
    out = out.contiguous(memory_format=torch.channels_last)
    packed = case.weights().pack(SMALL, x.dtype, device).tensors()
    launch(x[1:3], *packed, out[1:3], activation="relu", tile=SMALL)
    assert out[1:3].isfinite().all()
    assert out[[0, 3]].isnan().all()


def test_sums_are_fp32(device):
    """Sums leave the range of fp16 over the first channels and come back into it."""
    weights = Case().weights()
    weights.conv.fill_(16.0)
    weights.conv[:, 2] = -32.0
    x = torch.full((1, 3, 6, 20), 512.0, dtype=torch.float16, device=device)
    assert torch.finfo(torch.float16).max < 2 * 9 * 16 * 512, "two channels of nine taps"
    out = run_stem(x.contiguous(memory_format=torch.channels_last), weights, SMALL, "none")
    expected = weights.bias.to(device, torch.float16)[:, None, None].expand(16, 3, 10)
    assert torch.equal(out[0], expected)


def test_the_bias_has_more_than_16_bits(device):
    weights = StemWeights(torch.zeros(16, 3, 3, 3, dtype=torch.float64), torch.full((16,), 1000.3, dtype=torch.float64))
    weights.conv[:, 1, 1, 1] = -1.0
    x = torch.full((1, 3, 6, 20), 1000.0, dtype=torch.float16, device=device)
    out = run_stem(x.contiguous(memory_format=torch.channels_last), weights, SMALL, "relu")
    torch.testing.assert_close(out, torch.full_like(out, 0.3), rtol=0, atol=1e-3)


GPU_CASES = [
    *(
        Case(out_channels=out, size=(256, 256), batch=4, planar=planar)
        for out in (16, 24, 32)
        for planar in (False, True)
    ),
    Case(out_channels=32, size=(225, 251), batch=4, activation="silu"),
    Case(out_channels=24, size=(226, 250), batch=4, planar=True),
]


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_candidate_tiles_on_the_gpu(case, dtype, device, assert_within_rule):
    from fusion.probe import processor_of

    shape = match_stem(case.graph(str(dtype).removeprefix("torch.")))
    wrong = []
    for tile in STEM.ranked_tiles(shape, processor_of())[::SAMPLED]:
        try:
            check(case, dtype, device, assert_within_rule, tile)
        except AssertionError as error:
            wrong.append(f"{tile!r}: {error}")
    assert not wrong, "\n".join(wrong)

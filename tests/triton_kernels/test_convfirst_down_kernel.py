from dataclasses import dataclass

import pytest
import torch

from fusion.convfirst_down_weights import pack_convfirst_down
from fusion.planner.blocks import convfirst as convfirst_graph
from fusion.planner.convfirst_down_tile import ConvFirstDownTile, why_invalid
from fusion.planner.families import CONVFIRST_DOWN
from fusion.planner.match import match_convfirst_down
from fusion.planner.processor import PROCESSORS
from fusion.reference import convfirst_down

HAS_GPU = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA GPU: too large for the interpreter")
DTYPES = [
    torch.float16,
    pytest.param(
        torch.bfloat16,
        marks=pytest.mark.skipif(not HAS_GPU, reason="Triton's interpreter multiplies bfloat16 matrices wrongly"),
    ),
]
SMALL = ConvFirstDownTile(32, 32, 32, 2)
SAMPLED = 50
"""Every how many candidates a GPU runs one, from the best prediction to the worst."""


@dataclass(frozen=True)
class Case:
    channels: int
    hidden: int
    out_channels: int
    group_width: int = 8
    size: tuple[int, int] = (6, 6)
    batch: int = 1
    activation: str = "relu"
    tile: ConvFirstDownTile = SMALL

    def __str__(self):
        channels = f"{self.channels}-{self.hidden}-{self.out_channels}"
        image = "x".join(map(str, (self.batch, *self.size)))
        tile = ",".join(map(str, self.tile.to_ints()))
        return f"{channels}g{self.group_width}-{image}-{self.activation}-{tile}"

    def graph(self, dtype="float16"):
        return convfirst_graph(
            self.batch,
            *self.size,
            self.channels,
            hidden_channels=self.hidden,
            out_channels=self.out_channels,
            stride=2,
            group_width=self.group_width,
            activation=self.activation,
            dtype=dtype,
        )


CASES = [
    # Channels that fill their slabs and channels that do not, and other output channels, more than the widest slab too.
    *(Case(c, 2 * c, 2 * c) for c in (8, 16, 24, 48)),
    Case(72, 144, 72, size=(4, 6)),
    Case(144, 32, 8, size=(2, 4)),
    Case(8, 32, 136),
    # Both activations, with every kind of border.
    Case(16, 32, 24, size=(5, 7), batch=2),
    Case(24, 48, 16, size=(5, 7), batch=2, activation="silu"),
    # The others, on hidden channels that are padded.
    *(Case(16, 40, 16, size=(3, 4), activation=activation) for activation in ("relu6", "gelu", "hardswish")),
    # Images of one output pixel, of edges only, even and odd, and long.
    *(Case(16, 32, 16, size=size) for size in ((2, 2), (2, 3), (3, 2), (3, 3), (3, 4), (4, 5), (2, 19), (13, 2))),
    # Output pixels of several images in a program, and of several programs in an image.
    Case(16, 32, 16, size=(4, 4), batch=7, tile=ConvFirstDownTile(16, 32, 16, 2)),
    Case(16, 32, 16, size=(11, 12), tile=ConvFirstDownTile(16, 32, 16, 2)),
    # Groups from depth-wise to one that is a whole slab.
    *(Case(32, 32, 16, group_width=width) for width in (1, 4, 16, 32)),
    Case(64, 64, 16, group_width=64, size=(4, 4), tile=ConvFirstDownTile(16, 32, 64, 2)),
    # Hidden channels that do not fill the last step, or the only one.
    Case(16, 40, 16, activation="silu"),
    Case(16, 24, 16, tile=ConvFirstDownTile(16, 128, 16, 2)),
    # Tiles.
    Case(72, 72, 40, size=(4, 4), tile=ConvFirstDownTile(64, 64, 16, 4, 2, 2, 8)),
    Case(72, 72, 40, size=(4, 4), tile=ConvFirstDownTile(16, 16, 64, 1, 5, 4)),
    Case(40, 72, 40, size=(8, 8), tile=ConvFirstDownTile(128, 32, 32, 8, 3, 3, 8)),
]


def random_input(*size, device, dtype):
    torch.manual_seed(sum(size))
    return torch.randn(*size, dtype=torch.float32).to(device, dtype)


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


def nan_like_output(x, out_channels):
    size = (len(x), out_channels, (x.shape[2] + 1) // 2, (x.shape[3] + 1) // 2)
    return channels_last(torch.full(size, float("nan"), dtype=x.dtype, device=x.device))


@pytest.fixture
def run_kernel(device):
    """`(x, weights, tile, activation="relu") -> [N, K, H / 2, W / 2]`, the kernel on `x`.

    The output is full of NaN before. On a GPU the operator runs as well and must agree to the bit.
    """
    from fusion import convfirst_down_ops
    from fusion.triton_kernels.convfirst_down import launch

    def run(x, weights, tile, activation="relu"):
        x = channels_last(x)
        packed = pack_convfirst_down(weights, tile, x.dtype, x.device).tensors()
        out = nan_like_output(x, weights.out_channels)
        launch(x, *packed, out, activation=activation, tile=tile)
        if device == "cuda":
            sizes = weights.hidden_channels, weights.out_channels, weights.group_width
            from_op = convfirst_down_ops.convfirst_down(x, *packed, *sizes, activation, tile.to_ints())
            torch.testing.assert_close(from_op, out, rtol=0, atol=0, equal_nan=True)
        return out

    return run


def apply_reference(x, weights, activation="relu"):
    """The block in the dtype of `x`."""
    return convfirst_down(x, *(w.to(x.device) for w in vars(weights).values()), activation)


def check(case, dtype, device, random_weights, run_kernel, assert_within_rule, tile=None):
    weights = random_weights(case.channels, case.hidden, case.out_channels, case.group_width, stride=2)
    x = random_input(case.batch, case.channels, *case.size, device=device, dtype=dtype)
    out = run_kernel(x, weights, tile or case.tile, case.activation)
    eager, exact = (apply_reference(y, weights, case.activation) for y in (x, x.double()))
    assert_within_rule(out, eager, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_reference(case, dtype, device, random_weights, run_kernel, assert_within_rule):
    assert why_invalid(case.tile, match_convfirst_down(case.graph()), PROCESSORS["rtx4090"]) is None
    check(case, dtype, device, random_weights, run_kernel, assert_within_rule)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("out_channels, activation", [(24, torch.nn.ReLU), (48, torch.nn.SiLU)])
def test_against_the_block_with_its_batch_norms(
    out_channels, activation, dtype, device, random_block, fold, run_kernel, assert_within_rule
):
    block = random_block(24, out_channels, expansion=3, stride=2, activation=activation)
    x = random_input(2, 24, 5, 6, device=device, dtype=dtype)
    name = {torch.nn.ReLU: "relu", torch.nn.SiLU: "silu"}[activation]
    out = run_kernel(x, fold(block), SMALL, name)
    exact = block.to(device, torch.float64)(x.double())
    assert_within_rule(out, block.to(dtype)(x), exact)


def test_sums_are_fp32(device, random_weights, run_kernel):
    """In all three products the first steps of a sum leave the range of fp16 and later ones come back into it."""
    size, largest = 8192.0, torch.finfo(torch.float16).max
    weights = random_weights(32, 64, 32, stride=2)
    weights.conv.zero_()
    weights.conv[:, :, 0], weights.conv[:, :, 2], weights.conv[:, :, 1, 1] = 0.51, -0.51, 0.12
    row = 3 * 8 * 0.51 * size
    assert 0.75 * row > largest > 0.5 * row, "the first two of the five rows of taps, and all of them at an edge"
    weights.expand[:, 32:48] = 0.125
    weights.expand[:, 48:] = -0.125
    weights.expand[:, 32] += 0.125
    weights.expand[:, :32] = 0
    weights.project[:, :32] = 1
    weights.project[:, 32:] = -1
    weights.project[:, 0] += 1
    x = torch.full((1, 32, 5, 7), size, dtype=torch.float16, device=device)
    exact = apply_reference(x.double(), weights)
    out = run_kernel(x, weights, ConvFirstDownTile(32, 32, 16, 2))
    assert ((out.double() - exact).norm() / exact.norm()).item() < 2e-3


@pytest.mark.parametrize("size", [(5, 6), (4, 7)])
def test_reads_and_writes_its_own_images_only(size, device, random_weights):
    """What lies before and after the images in memory is neither read nor written."""
    from fusion.triton_kernels.convfirst_down import launch

    weights = random_weights(24, 48, 24, stride=2)
    x = channels_last(torch.full((4, 24, *size), float("nan"), dtype=torch.float16, device=device))
    x[1] = random_input(24, *size, device=device, dtype=torch.float16)
    out = nan_like_output(x, 24)
    packed = pack_convfirst_down(weights, SMALL, x.dtype, device).tensors()
    launch(x[1:3], *packed, out[1:3], activation="relu", tile=SMALL)
    assert out[1].isfinite().all()
    assert out[[0, 3]].isnan().all()


GPU_CASES = [
    Case(32, 192, 64, size=(56, 56), batch=8),
    Case(24, 144, 48, size=(33, 47), batch=8),
    Case(48, 288, 72, size=(33, 46), batch=8, activation="silu"),
    Case(64, 384, 96, size=(34, 47), batch=8),
    Case(16, 96, 32, size=(56, 56), batch=8),
    Case(144, 288, 96, size=(14, 14), batch=8),
]


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_candidate_tiles_on_the_gpu(case, dtype, device, random_weights, run_kernel, assert_within_rule):
    """A compiler may break one tile and spare all others, so candidates are sampled over their whole range."""
    from fusion.probe import processor_of

    shape = match_convfirst_down(case.graph(str(dtype).removeprefix("torch.")))
    wrong = []
    for tile in CONVFIRST_DOWN.ranked_tiles(shape, processor_of())[::SAMPLED]:
        try:
            check(case, dtype, device, random_weights, run_kernel, assert_within_rule, tile)
        except AssertionError as error:
            wrong.append(f"{tile!r}: {error}")
    assert not wrong, "\n".join(wrong)

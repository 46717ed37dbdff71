from dataclasses import dataclass

import pytest
import torch

from fusion.planner.blocks import convfirst as convfirst_graph
from fusion.planner.families import PORTABLE
from fusion.planner.match import match_convfirst
from fusion.planner.processor import PROCESSORS
from fusion.planner.tile import ConvFirstTile, why_invalid
from fusion.reference import convfirst

HAS_GPU = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA GPU: too large for the interpreter")
DTYPES = [
    torch.float16,
    pytest.param(
        torch.bfloat16,
        marks=pytest.mark.skipif(not HAS_GPU, reason="Triton's interpreter multiplies bfloat16 matrices wrongly"),
    ),
]
SMALL = ConvFirstTile(4, 8, 32, 32, 2)
SAMPLED = 50
"""Every how many candidates a GPU runs one, from the best prediction to the worst."""


@dataclass(frozen=True)
class Case:
    channels: int
    hidden: int
    out_channels: int | None = None
    group_width: int = 8
    size: tuple[int, int] = (5, 7)
    batch: int = 1
    activation: str = "relu"
    residual: bool = False
    stride: int = 1
    tile: ConvFirstTile = SMALL

    def __str__(self):
        channels = f"{self.channels}-{self.hidden}-{self.out_channels or self.channels}"
        image = "x".join(map(str, (self.batch, *self.size)))
        tile = ",".join(map(str, self.tile.to_ints()))
        flags = "+x" * self.residual + "-stride2" * (self.stride == 2)
        return f"{channels}g{self.group_width}-{image}-{self.activation}{flags}-{tile}"

    def graph(self, dtype="float16"):
        return convfirst_graph(
            self.batch,
            *self.size,
            self.channels,
            hidden_channels=self.hidden,
            out_channels=self.out_channels,
            stride=self.stride,
            group_width=self.group_width,
            activation=self.activation,
            residual=self.residual,
            dtype=dtype,
            blur=False,
        )


CASES = [
    # Channels that fill their slabs and channels that do not, more than the widest slab included.
    *(Case(c, 2 * c, residual=True) for c in (8, 16, 24, 32, 40, 48, 64, 72, 96)),
    Case(144, 64, residual=True),
    Case(112, 32, tile=ConvFirstTile(4, 8, 32, 64, 2)),
    # Other output than input channels.
    Case(16, 48, out_channels=24),
    Case(24, 48, out_channels=16, activation="silu"),
    Case(8, 32, out_channels=136),
    # Both activations with and without the residual.
    Case(16, 48, batch=2),
    Case(16, 48, batch=2, activation="silu"),
    Case(16, 48, batch=2, activation="silu", residual=True),
    # The others, on hidden channels that are padded.
    *(Case(16, 40, activation=activation) for activation in ("relu6", "gelu", "hardswish")),
    # A convolution of stride 2: outputs of one pixel, smaller than a tile, equal to it, one pixel larger, and long, of
    # an odd and an even number of rows and columns.
    *(Case(16, 32, size=size, stride=2) for size in ((1, 1), (2, 3), (7, 16), (8, 15), (9, 17), (1, 35), (26, 2))),
    Case(72, 48, out_channels=40, size=(9, 11), batch=3, stride=2, activation="silu"),
    Case(32, 64, size=(6, 7), group_width=32, stride=2, activation="gelu"),
    # Images of one pixel, smaller than a tile, equal to it, one pixel larger, and long.
    *(Case(16, 32, size=size, residual=True) for size in ((1, 1), (3, 2), (4, 8), (5, 9), (1, 19), (13, 1))),
    Case(24, 48, size=(9, 11), batch=3, residual=True),
    # Groups from depth-wise to one that is a whole slab.
    *(Case(32, 64, group_width=width, residual=True) for width in (1, 2, 8, 16, 32)),
    Case(96, 96, group_width=32),
    Case(64, 64, group_width=64, tile=ConvFirstTile(4, 8, 32, 64, 2)),
    # Hidden channels that do not fill the last step, or the only one.
    Case(16, 40, tile=ConvFirstTile(4, 8, 32, 16, 2)),
    Case(16, 24, tile=ConvFirstTile(4, 8, 128, 16, 2)),
    Case(16, 56, tile=ConvFirstTile(4, 8, 16, 16, 2), activation="silu"),
    # Tiles.
    Case(72, 72, tile=ConvFirstTile(4, 8, 64, 16, 2), residual=True),
    Case(72, 72, tile=ConvFirstTile(8, 8, 16, 32, 4, 2, 2), residual=True),
    Case(72, 72, tile=ConvFirstTile(4, 4, 32, 64, 1, 5, 3), residual=True),
    Case(72, 72, tile=ConvFirstTile(8, 16, 128, 64, 8, 2, 2), residual=True),
    Case(40, 72, tile=ConvFirstTile(1, 16, 64, 32, 1, 4, 2), residual=True),
    Case(40, 72, tile=ConvFirstTile(16, 1, 64, 32, 2), residual=True),
]


def random_input(*size, device, dtype):
    torch.manual_seed(sum(size))
    return torch.randn(*size, dtype=torch.float32).to(device, dtype)


def apply_reference(x, weights, case):
    """The block in the dtype of `x`."""
    tensors = (weights.conv, weights.expand, weights.expand_bias, weights.project, weights.project_bias)
    return convfirst(x, *(w.to(x.device) for w in tensors), case.activation, case.residual, case.stride)


def check(case, dtype, device, random_weights, run_kernel, assert_within_rule, tile=None):
    weights = random_weights(case.channels, case.hidden, case.out_channels, case.group_width)
    x = random_input(case.batch, case.channels, *case.size, device=device, dtype=dtype)
    out = run_kernel(x, weights, tile or case.tile, case.activation, case.residual, case.stride)
    assert_within_rule(out, apply_reference(x, weights, case), apply_reference(x.double(), weights, case))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_reference(case, dtype, device, random_weights, run_kernel, assert_within_rule):
    assert why_invalid(case.tile, match_convfirst(case.graph()), PROCESSORS["rtx4090"]) is None
    check(case, dtype, device, random_weights, run_kernel, assert_within_rule)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("out_channels, activation", [(24, torch.nn.ReLU), (32, torch.nn.SiLU)])
def test_against_the_block_with_its_batch_norms(
    out_channels, activation, dtype, device, random_block, fold, run_kernel, assert_within_rule
):
    block = random_block(24, out_channels, expansion=3, activation=activation)
    x = random_input(2, 24, 5, 7, device=device, dtype=dtype)
    name = {torch.nn.ReLU: "relu", torch.nn.SiLU: "silu"}[activation]
    out = run_kernel(x, fold(block), SMALL, name, block.has_residual)
    exact = block.to(device, torch.float64)(x.double())
    assert_within_rule(out, block.to(dtype)(x), exact)


def test_sums_are_fp32(device, random_weights, run_kernel):
    """In all three products the first steps of a sum leave the range of fp16 and later ones come back into it."""
    size = 4096.0
    weights = random_weights(32, 64)
    weights.conv.fill_(0.52)
    weights.conv[:, :, 1, 1] *= -5.5
    assert 4 * 8 * 0.52 * size > torch.finfo(torch.float16).max, "four taps of eight channels"
    weights.expand[:, :16] = 0.125
    weights.expand[:, 16:] = -0.125
    weights.expand[:, 0] += 0.125
    weights.project[:, :32] = 1
    weights.project[:, 32:] = -1
    weights.project[:, 0] += 1
    case = Case(32, 64, tile=ConvFirstTile(4, 8, 32, 16, 2), residual=True)
    x = torch.full((1, 32, 5, 7), size, dtype=torch.float16, device=device)
    exact = apply_reference(x.double(), weights, case)
    out = run_kernel(x, weights, case.tile, residual=True)
    assert ((out.double() - exact).norm() / exact.norm()).item() < 2e-3


@pytest.mark.parametrize("stride", [1, 2])
def test_reads_and_writes_its_own_images_only(stride, device, random_weights):
    """What lies before and after the images in memory is neither read nor written."""
    from fusion.triton_kernels.convfirst import launch

    weights = random_weights(24, 48)
    x, out = (
        torch.full((4, 24, *size), float("nan"), dtype=torch.float16, device=device).contiguous(
            memory_format=torch.channels_last
        )
        for size in ((5, 7), (-(-5 // stride), -(-7 // stride)))
    )
    x[1] = random_input(24, 5, 7, device=device, dtype=torch.float16)
    packed = weights.pack(SMALL, x.dtype, device).tensors()
    options = {"activation": "relu", "residual": stride == 1, "stride": stride}
    launch(x[1:3], *packed, out[1:3], **options, tile=SMALL)
    assert out[1].isfinite().all()
    assert out[[0, 3]].isnan().all()


GPU_CASES = [
    Case(64, 384, size=(56, 56), batch=8, residual=True),
    Case(64, 384, size=(33, 47), batch=8, activation="silu", residual=True),
    Case(48, 288, size=(33, 47), batch=8, residual=True),
    Case(96, 576, size=(33, 47), batch=8, residual=True),
    Case(32, 96, size=(56, 56), batch=8, residual=True),
    Case(16, 48, size=(33, 47), batch=8, residual=True),
    Case(24, 72, out_channels=40, size=(33, 47), batch=8),
    Case(144, 288, size=(14, 14), batch=8, residual=True),
    Case(48, 192, size=(33, 47), batch=8, activation="gelu", residual=True),
    Case(64, 256, out_channels=128, size=(55, 56), batch=8, activation="hardswish", stride=2),
]


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_candidate_tiles_on_the_gpu(case, dtype, device, random_weights, run_kernel, assert_within_rule):
    """A compiler may break one tile and spare all others, so candidates are sampled over their whole range."""
    from fusion.probe import processor_of

    shape = match_convfirst(case.graph(str(dtype).removeprefix("torch.")))
    wrong = []
    for tile in PORTABLE.ranked_tiles(shape, processor_of())[::SAMPLED]:
        try:
            check(case, dtype, device, random_weights, run_kernel, assert_within_rule, tile)
        except AssertionError as error:
            wrong.append(f"{tile!r}: {error}")
    assert not wrong, "\n".join(wrong)

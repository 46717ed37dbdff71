from dataclasses import dataclass

import pytest
import torch

from fusion import edge_ops, reference
from fusion.edge_weights import HeadWeights
from fusion.planner.blocks import head as head_graph
from fusion.planner.families import HEAD
from fusion.planner.head_tile import HeadTile, why_invalid
from fusion.planner.match import match_head
from fusion.planner.processor import PROCESSORS

HAS_GPU = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA GPU: too large for the interpreter")
DTYPES = [
    torch.float16,
    pytest.param(
        torch.bfloat16,
        marks=pytest.mark.skipif(not HAS_GPU, reason="Triton's interpreter multiplies bfloat16 matrices wrongly"),
    ),
]
SMALL = HeadTile(16, 32, 2, 2, 2)
SAMPLED = 25
"""Every how many candidates a GPU runs one, from the best prediction to the worst."""


@dataclass(frozen=True)
class Case:
    channels: int
    out_channels: int
    size: tuple[int, int] = (5, 7)
    batch: int = 1
    activation: str = "silu"
    tile: HeadTile = SMALL

    def __str__(self):
        image = "x".join(map(str, (self.batch, *self.size)))
        tile = ",".join(map(str, self.tile.to_ints()))
        return f"{self.channels}-{self.out_channels}-{image}-{self.activation}-{tile}"

    def graph(self, dtype="float16"):
        activation = None if self.activation == "none" else self.activation
        return head_graph(self.batch, *self.size, self.channels, self.out_channels, activation, dtype)

    def weights(self):
        generator = torch.Generator().manual_seed(self.channels + self.out_channels)

        def normal(*size):
            return torch.randn(*size, generator=generator, dtype=torch.float64)

        scale = (2 / self.channels) ** 0.5
        return HeadWeights(normal(self.out_channels, self.channels) * scale, normal(self.out_channels))

    def input(self, device, dtype):
        torch.manual_seed(sum(self.size) + self.channels)
        x = torch.randn(self.batch, self.channels, *self.size).to(device, dtype)
        return x.contiguous(memory_format=torch.channels_last)


CASES = [
    # Channels that fill their slabs and channels that do not; several slabs.
    *(Case(channels, 32) for channels in (8, 16, 24, 72, 144, 160, 264)),
    # Output channels that do not fill the last block.
    *(Case(16, out_channels) for out_channels in (8, 24, 40, 64)),
    # Images of one pixel, as many as a tile, one more, several tiles.
    *(Case(16, 32, size=size, batch=3) for size in ((1, 1), (4, 4), (1, 17), (8, 8), (9, 11))),
    # Images that fill the last program, and images that do not.
    *(Case(24, 40, size=(4, 4), batch=batch, tile=HeadTile(16, 16, 3, 1, 3)) for batch in (1, 2, 3, 4, 7)),
    *(Case(24, 40, batch=2, activation=activation) for activation in ("relu", "none", "relu6", "gelu", "hardswish")),
    *(
        Case(24, 40, batch=2, tile=HeadTile(*tile))
        for tile in ((64, 64, 1, 4, 2), (32, 16, 5, 1, 4), (16, 128, 1, 8, 2))
    ),
]


def run_head(x, weights, tile, activation):
    """The kernel on `x`, into a tensor full of NaN. On a GPU the operator runs as well and must agree to the bit."""
    from fusion.triton_kernels.head import launch

    packed = weights.pack(tile, x.dtype, x.device).tensors()
    out = torch.full((len(x), weights.out_channels), float("nan"), dtype=x.dtype, device=x.device)
    launch(x, *packed, out, activation=activation, tile=tile)
    if HAS_GPU:
        from_op = edge_ops.head(x, *packed, weights.out_channels, activation, tile.to_ints())
        torch.testing.assert_close(from_op, out, rtol=0, atol=0, equal_nan=True)
    return out


def check(case, dtype, device, assert_within_rule, tile=None):
    weights, x = case.weights(), case.input(device, dtype)
    out = run_head(x, weights, tile or case.tile, case.activation)
    conv, bias = weights.conv.to(device), weights.bias.to(device)
    eager = reference.head(x, conv, bias, case.activation)
    assert_within_rule(out, eager, reference.head(x.double(), conv, bias, case.activation))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_reference(case, dtype, device, assert_within_rule):
    assert why_invalid(case.tile, match_head(case.graph()), PROCESSORS["h200"]) is None
    check(case, dtype, device, assert_within_rule)


def test_reads_and_writes_its_own_images_only(device):
    """What lies before and after the images in memory is neither read nor written."""
    from fusion.triton_kernels.head import launch

    case = Case(24, 40, batch=2)
    x = torch.full((4, 24, 5, 7), float("nan"), dtype=torch.float16, device=device)
    x = x.contiguous(memory_format=torch.channels_last)
    x[1:3] = case.input(device, torch.float16)
    out = torch.full((4, 40), float("nan"), dtype=torch.float16, device=device)
    launch(x[1:3], *case.weights().pack(SMALL, x.dtype, device).tensors(), out[1:3], activation="silu", tile=SMALL)
    assert out[1:3].isfinite().all()
    assert out[[0, 3]].isnan().all()


def test_sums_over_pixels_and_channels_are_fp32(device):
    """Both leave the range of fp16 on the way to a result that is in it."""
    weights = HeadWeights(torch.ones(8, 32, dtype=torch.float64), torch.zeros(8, dtype=torch.float64))
    weights.conv[:, 16:] = -1.0
    weights.conv[:, 0] = 2.0
    x = torch.full((1, 32, 9, 11), 8192.0, dtype=torch.float16, device=device)
    x = x.contiguous(memory_format=torch.channels_last)
    assert 17 * 8192 > torch.finfo(torch.float16).max < 99 * 8192
    out = run_head(x, weights, SMALL, "relu")
    assert torch.equal(out, torch.full_like(out, 8192.0))


GPU_CASES = [
    *(Case(channels, 1280, size=(8, 8), batch=16) for channels in (128, 160, 192, 256)),
    Case(128, 1280, size=(16, 16), batch=8),
    Case(192, 1000, size=(7, 9), batch=5, activation="relu"),
    Case(256, 1280, size=(8, 8)),
]


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_candidate_tiles_on_the_gpu(case, dtype, device, assert_within_rule):
    from fusion.probe import processor_of

    shape = match_head(case.graph(str(dtype).removeprefix("torch.")))
    wrong = []
    for tile in HEAD.ranked_tiles(shape, processor_of())[::SAMPLED]:
        try:
            check(case, dtype, device, assert_within_rule, tile)
        except AssertionError as error:
            wrong.append(f"{tile!r}: {error}")
    assert not wrong, "\n".join(wrong)

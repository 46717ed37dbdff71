"""The Hopper kernel on a GPU of compute capability 9.0: Triton's interpreter does not know Gluon."""

from dataclasses import dataclass, replace
from itertools import product

import pytest
import torch

from fusion import kernels, ops
from fusion.planner.hopper_tile import HopperTile, why_invalid
from fusion.planner.hopper_time import candidate_tiles
from fusion.planner.match import ConvFirstShape
from fusion.planner.processor import PROCESSORS
from fusion.reference import convfirst
from fusion.triton_kernels import convfirst_hopper

IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = pytest.mark.skipif(not IS_HOPPER, reason="needs a GPU of compute capability 9.0")

SMALL = HopperTile(pixels=64, hidden=16, stages=3, partitions=1, programs=1, slab=16, weight_chunks=0)
STREAMED = HopperTile(pixels=64, hidden=32, stages=2, partitions=2, programs=1, slab=16, weight_chunks=3)
FEW_PROCESSORS = 2
"""With so few, a program has more rows than its ring holds, even of small images."""
SAMPLED = 12
"""How many candidates of a block run."""
CHAIN = 8


@dataclass(frozen=True)
class Case:
    channels: int
    hidden: int
    out_channels: int | None = None
    size: tuple[int, int] = (9, 13)
    batch: int = 3
    residual: bool = True
    tile: HopperTile = SMALL
    dtype: torch.dtype = torch.float16

    def __str__(self):
        channels = f"{self.channels}-{self.hidden}-{self.out_channels or self.channels}"
        image = "x".join(map(str, (self.batch, *self.size)))
        tile = ",".join(map(str, self.tile.to_ints()))
        return f"{channels}-{image}{'+x' * self.residual}-{tile}-{self.dtype_name}"

    @property
    def dtype_name(self):
        return str(self.dtype).removeprefix("torch.")

    def shape(self):
        out_channels = self.out_channels or self.channels
        sizes = self.batch, *self.size, self.channels, self.hidden, out_channels
        return ConvFirstShape(*sizes, 8, "relu", self.residual, self.dtype_name)

    def input(self):
        torch.manual_seed(sum(self.size))
        x = torch.randn(self.batch, self.channels, *self.size).to("cuda", self.dtype)
        return x.contiguous(memory_format=torch.channels_last)


def tile(**changes):
    return replace(SMALL, **changes)


WIDTHS = (1, 5, 8, 9, 16, 17, 20, 33, 37, 64, 65, 100, 128, 130, 150, 300)
HEIGHTS = (1, 2, 5, 7, 33, 100, 130)
BATCHES = (1, 2, 3, 7, 9)
CHANNELS = (8, 16, 24, 32, 40, 48, 64, 72, 96)
CASES = [
    # Channels that fill their slabs and channels that do not, in slabs of the ring of every width.
    *(Case(channels, 2 * channels) for channels in CHANNELS),
    *(Case(channels, 2 * channels, tile=tile(slab=32)) for channels in (16, 40, 72, 96)),
    *(Case(channels, 2 * channels, tile=tile(slab=64)) for channels in (8, 24, 48, 64, 72)),
    # Other output than input channels, and no residual.
    Case(16, 48, out_channels=24, residual=False),
    Case(72, 48, out_channels=16, residual=False),
    Case(8, 40, out_channels=96, residual=False, tile=tile(slab=64)),
    Case(96, 40, out_channels=40, residual=False, tile=tile(slab=32)),
    Case(128, 64, out_channels=32, residual=False, tile=tile(stages=2)),
    Case(144, 64, out_channels=16, residual=False, tile=tile(stages=2)),
    Case(24, 48, residual=False),
    # Widths: streams side by side, exactly one, strips; heights: programs begin and end anywhere in an image.
    *(Case(16, 32, size=(5, width)) for width in WIDTHS),
    *(Case(16, 32, size=(5, width), tile=tile(pixels=128)) for width in WIDTHS),
    *(Case(24, 32, size=(7, width), tile=tile(pixels=128, partitions=2, slab=32)) for width in (5, 8, 17, 33, 100)),
    *(Case(72, 32, size=(7, width), tile=tile(pixels=128)) for width in (7, 8, 33)),
    *(Case(16, 32, size=(height, 13), batch=1) for height in HEIGHTS),
    *(Case(16, 32, size=(height, 9), tile=tile(partitions=2)) for height in HEIGHTS),
    Case(16, 32, size=(1, 1), batch=1),
    # Batches that streams divide and batches that they do not.
    *(Case(16, 32, size=(5, width), batch=batch) for batch, width in product(BATCHES, (8, 16, 32))),
    *(Case(24, 32, size=(6, 8), batch=batch, tile=tile(pixels=128, slab=32)) for batch in BATCHES),
    *(Case(24, 64, size=(6, 16), batch=batch, tile=replace(STREAMED, weight_chunks=2)) for batch in BATCHES),
    # Hidden channels that do not fill the last step, or the only one.
    Case(24, 40, tile=tile(hidden=32)),
    Case(24, 40, tile=tile(hidden=64)),
    Case(24, 100, tile=tile(hidden=64, slab=32)),
    # Stages, partitions, programs.
    *(Case(32, 64, size=(17, 33), tile=tile(hidden=32, stages=stages)) for stages in (2, 3, 4)),
    *(Case(48, 96, size=(17, 100), tile=tile(partitions=2, stages=stages)) for stages in (2, 3, 4)),
    *(Case(24, 48, size=(17, 33), tile=tile(programs=programs)) for programs in (2, 3, 4)),
    Case(64, 384, size=(17, 33), tile=HopperTile(64, 64, 2, 2, 1, 64, 0)),
    Case(72, 432, size=(32, 32), tile=HopperTile(64, 32, 2, 1, 1, 16, 0)),
    # Streamed weights: chunks that divide the steps and chunks that do not, all of them, odd numbers of steps.
    *(Case(48, 288, size=(9, 33), tile=replace(STREAMED, weight_chunks=chunks)) for chunks in (2, 3, 4, 5, 8, 9)),
    *(Case(40, 300, size=(9, 20), tile=replace(STREAMED, hidden=64, weight_chunks=chunks)) for chunks in (2, 3, 4, 5)),
    *(Case(channels, 160, size=(11, 37), tile=replace(STREAMED, slab=32)) for channels in (8, 16, 24, 32, 64, 72, 96)),
    Case(96, 576, size=(32, 32), batch=8, tile=HopperTile(64, 32, 2, 2, 1, 32, 6)),
    Case(72, 432, size=(32, 32), batch=8, tile=HopperTile(64, 32, 2, 2, 1, 64, 3)),
    Case(96, 192, out_channels=24, size=(7, 150), residual=False, tile=STREAMED),
    # The other dtype.
    *(
        replace(case, dtype=torch.bfloat16)
        for case in (
            Case(24, 40),
            Case(72, 144),
            Case(64, 128, size=(17, 33), tile=tile(hidden=64, partitions=2, stages=2, slab=64)),
            Case(16, 48, size=(5, 130), tile=tile(pixels=128)),
            Case(48, 100, size=(17, 33), tile=tile(hidden=32, stages=2, programs=2)),
            Case(40, 96, out_channels=64, size=(6, 8), batch=7, residual=False, tile=tile(slab=64)),
            Case(96, 576, size=(9, 16), batch=9, tile=HopperTile(64, 32, 2, 2, 1, 32, 6)),
        )
    ),
]
SLOW_CASES = [
    Case(128, 64, tile=tile(stages=2)),
    Case(144, 64, tile=tile(stages=2, slab=32)),
    Case(32, 192, size=(17, 33), tile=tile(hidden=64, programs=3)),
]
"""Refused for their registers alone."""


@pytest.fixture
def few_processors(monkeypatch):
    """`() -> None` leaves the kernel `FEW_PROCESSORS` of the GPU's processors."""
    return lambda: monkeypatch.setattr(convfirst_hopper, "processor_count", lambda device: FEW_PROCESSORS)


def empty_output(x, channels):
    """Full of NaN."""
    out = torch.full((x.shape[0], channels, *x.shape[2:]), float("nan"), dtype=x.dtype, device=x.device)
    return out.contiguous(memory_format=torch.channels_last)


def run_kernel(x, weights, case, packed=None, out=None):
    packed = packed or weights.pack_hopper(case.tile, x.dtype, x.device)
    out = empty_output(x, weights.out_channels) if out is None else out
    kernels.launch(x, packed, out, case.tile, weights, activation="relu", residual=case.residual)
    return out


def apply_reference(x, weights, case):
    """The block in the dtype of `x`."""
    tensors = (weights.conv, weights.expand, weights.expand_bias, weights.project, weights.project_bias)
    return convfirst(x, *(w.to(x.device) for w in tensors), "relu", case.residual)


def check(case, random_weights, assert_within_rule):
    weights, x = random_weights(case.channels, case.hidden, case.out_channels), case.input()
    out, again = run_kernel(x, weights, case), run_kernel(x, weights, case)
    assert_within_rule(out, apply_reference(x, weights, case), apply_reference(x.double(), weights, case))
    assert torch.equal(out, again)
    return x, weights, out


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_reference(case, random_weights, assert_within_rule, few_processors):
    """Neither who computes a row nor how often changes a bit; the operator launches the same."""
    assert why_invalid(case.tile, case.shape(), PROCESSORS["h200"]) is None
    x, weights, out = check(case, random_weights, assert_within_rule)
    packed = weights.pack_hopper(case.tile, x.dtype, x.device).tensors()
    sizes = weights.hidden_channels, weights.out_channels
    assert torch.equal(ops.convfirst_hopper(x, *packed, *sizes, case.residual, case.tile.to_ints()), out)
    few_processors()
    assert torch.equal(run_kernel(x, weights, case), out)


@pytest.mark.parametrize("case", SLOW_CASES, ids=str)
def test_tiles_with_too_few_registers_compute_right(case, random_weights, assert_within_rule):
    """What an estimate is wrong about may be slow, not wrong."""
    assert "registers a thread would spill" in why_invalid(case.tile, case.shape(), PROCESSORS["h200"])
    check(case, random_weights, assert_within_rule)


GPU_CASES = [
    Case(64, 384, size=(64, 64), batch=16),
    Case(48, 288, size=(33, 47), batch=16),
    Case(32, 96, size=(56, 56), batch=16),
    Case(24, 72, size=(33, 128), batch=16),
    Case(16, 48, size=(100, 130), batch=16),
    Case(96, 576, size=(32, 32), batch=16),
    Case(72, 432, size=(20, 37), batch=15),
    Case(64, 256, size=(7, 7), batch=100),
]


@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_candidate_tiles(case, random_weights, assert_within_rule):
    """A compiler may break one tile and spare all others, so candidates are sampled over their whole range."""
    from fusion.probe import processor_of

    tiles = list(candidate_tiles(case.shape(), processor_of()))
    wrong = []
    for candidate in tiles[:: max(1, len(tiles) // SAMPLED)]:
        try:
            check(replace(case, tile=candidate), random_weights, assert_within_rule)
        except AssertionError as error:
            wrong.append(f"{candidate!r}: {error}")
    assert tiles and not wrong, "\n".join(wrong)


@pytest.mark.parametrize("tile", [SMALL, replace(STREAMED, weight_chunks=2)], ids=str)
def test_sums_are_fp32(tile, random_weights):
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
    case = Case(32, 64, size=(5, 7), batch=1, tile=tile)
    x = torch.full_like(case.input(), size)
    exact = apply_reference(x.double(), weights, case)
    out = run_kernel(x, weights, case)
    assert ((out.double() - exact).norm() / exact.norm()).item() < 2e-3


TILES = [SMALL, tile(pixels=128, stages=2, slab=32), STREAMED]


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_reads_and_writes_its_own_images_only(tile, random_weights):
    """What lies before and after the images in memory is neither read nor written."""
    case = Case(24, 96, size=(5, 7), batch=4, tile=tile)
    weights, x = random_weights(24, 96), case.input()
    x[[0, 3]] = float("nan")
    out = empty_output(x, 24)
    run_kernel(x[1:3], weights, case, out=out[1:3])
    assert out[1:3].isfinite().all()
    assert out[[0, 3]].isnan().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("image", [0, 1, 3, 6])
@pytest.mark.parametrize("width", [8, 16, 32, 100])
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_what_is_not_finite_stays_in_its_image(tile, width, image, value, random_weights, few_processors):
    """Whatever is before, after or beside it in the batch, in a stream or in the ring."""
    few_processors()
    case = Case(24, 96, size=(9, width), batch=7, tile=tile)
    weights, x = random_weights(24, 96), case.input()
    expected = run_kernel(x, weights, case)
    x[image] = value
    out = run_kernel(x, weights, case)
    others = [other for other in range(7) if other != image]
    assert torch.equal(out[others], expected[others])
    assert out[image].isnan().all(), "zero weights, or sums of both signs"


@pytest.mark.parametrize("row, column", [(0, 0), (0, 6), (3, 6), (4, -1), (7, -1), (8, 0), (8, 6)])
@pytest.mark.parametrize("width", [8, 13, 33, 100])
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_what_is_not_finite_reaches_as_far_as_a_convolution(tile, width, row, column, random_weights):
    """Pixels that share a product, a ring or a row with it must not see it."""
    case = Case(24, 96, size=(9, width), tile=tile)
    weights, x = random_weights(24, 96), case.input()
    expected = run_kernel(x, weights, case)
    x[1, :, row, column] = float("nan")
    out = run_kernel(x, weights, case)
    column %= width
    touched = torch.zeros_like(x, dtype=torch.bool)
    touched[1, :, max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2] = True
    assert torch.equal(out[~touched], expected[~touched])
    assert out[touched].isnan().all()


CHAIN_CASES = [
    Case(64, 384, size=(32, 32), batch=32, tile=HopperTile(64, 64, 2, 2, 1, 64, 0)),
    Case(16, 48, size=(100, 130), batch=8, tile=HopperTile(128, 16, 3, 1, 3, 16, 0)),
    Case(48, 288, size=(32, 32), batch=32, tile=HopperTile(64, 32, 2, 1, 2, 16, 0)),
    Case(96, 576, size=(32, 32), batch=16, tile=HopperTile(64, 32, 2, 2, 1, 32, 6)),
    Case(24, 72, size=(7, 7), batch=3, tile=tile(stages=4)),
]


@pytest.mark.parametrize("case", CHAIN_CASES, ids=str)
@pytest.mark.parametrize("between", ["nothing", "another kernel"])
def test_kernels_overlap_without_races(between, case, random_weights):
    """A kernel may start before the one ahead has finished: blocks back to back are as right as one at a time."""
    weights, x = random_weights(case.channels, case.hidden), case.input()
    packed = weights.pack_hopper(case.tile, x.dtype, x.device)
    buffers = [empty_output(x, case.channels) for _ in range(2)]

    def chain(synchronize):
        out = x
        for index in range(CHAIN):
            out = run_kernel(out, weights, case, packed, buffers[index % 2])
            if between == "another kernel":
                out.mul_(0.25)  # reads what was just written, and writes what is read next
            if synchronize:
                torch.cuda.synchronize()
        return out.clone()

    expected = chain(synchronize=True)
    assert expected.isfinite().all()
    for _ in range(3):
        for buffer in buffers:
            buffer.fill_(float("nan"))
        assert torch.equal(chain(synchronize=False), expected)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain(synchronize=False)
    for _ in range(3):
        graph.replay()
        assert torch.equal(captured, expected)


def test_too_many_rows_are_refused(monkeypatch, random_weights):
    monkeypatch.setattr(convfirst_hopper, "MAX_ROWS", 10)  # virtual rows of a stream of one image
    case = Case(24, 48, size=(9, 13), batch=4)
    with pytest.raises(ValueError, match=r"4 images of 9x13 pixels are too many rows for one launch, split the batch"):
        run_kernel(case.input(), random_weights(24, 48), case)

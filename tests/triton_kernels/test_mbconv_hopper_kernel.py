"""The MBConv kernel on a GPU of compute capability 9.0: Triton's interpreter does not know Gluon."""

import time
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from random import Random

import pytest
import torch

from fusion import kernels, mbconv_ops
from fusion.mbconv_hopper_weights import stack_mbconv_hopper
from fusion.mbconv_weights import MBConvWeights
from fusion.planner.blocks import mbconv as mbconv_graph
from fusion.planner.match import match_mbconv, options_of
from fusion.planner.mbconv_hopper_tile import MBConvHopperTile, candidate_tiles, why_invalid
from fusion.planner.plan import plan_block
from fusion.planner.processor import PROCESSORS
from fusion.reference import mbconv
from fusion.relaunch import scratch
from fusion.triton_kernels import mbconv_hopper_launch
from models import MBConv

IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = pytest.mark.skipif(not IS_HOPPER, reason="needs a GPU of compute capability 9.0")

FEW_PROCESSORS = 2
"""With so few, a batch takes several launches."""
CHAIN = 8
STACK = 3
"""Blocks in one launch."""
LAUNCHES = 200
HANG_SECONDS = 60


@dataclass(frozen=True)
class Case:
    channels: int
    hidden: int
    tile: tuple[int, int, int, int]
    out_channels: int | None = None
    squeeze: int = 6
    size: tuple[int, int] = (8, 8)
    batch: int = 3
    activation: str = "silu"
    dtype: torch.dtype = torch.float16
    squeeze_activation: str = "relu"

    def __str__(self):
        channels = f"{self.channels}-{self.hidden}-{self.out_channels or self.channels}s{self.squeeze}"
        image = "x".join(map(str, (self.batch, *self.size)))
        activations = f"{self.activation}-{self.squeeze_activation}"
        return f"{channels}-{image}-{activations}-{','.join(map(str, self.tile))}-{self.dtype_name}"

    @property
    def dtype_name(self):
        return str(self.dtype).removeprefix("torch.")

    @property
    def residual(self):
        return self.out_channels in (None, self.channels)

    @property
    def planned(self):
        return MBConvHopperTile(*self.tile)

    @property
    def resident(self):
        """Whether all hidden channels stay in shared memory."""
        out_channels = self.out_channels or self.channels
        return self.planned.is_resident(self.size[1], self.channels, self.hidden, out_channels, self.squeeze)

    def workspaces(self, processors):
        """Elements of the workspace of a call, if it has one."""
        programs = min(self.batch, processors)
        return [] if self.resident else [programs * self.planned.workspace_elements(self.size[1], self.hidden)]

    def shape(self):
        graph = mbconv_graph(
            self.batch,
            *self.size,
            self.channels,
            hidden_channels=self.hidden,
            out_channels=self.out_channels,
            squeeze_channels=self.squeeze,
            activation=self.activation,
            squeeze_activation=self.squeeze_activation,
            dtype=self.dtype_name,
        )
        return match_mbconv(graph)

    def input(self):
        torch.manual_seed(sum(self.size) + self.channels)
        x = torch.randn(self.batch, self.channels, *self.size).to("cuda", self.dtype)
        return x.contiguous(memory_format=torch.channels_last)

    def weights(self, random_mbconv_weights):
        return random_mbconv_weights(self.channels, self.hidden, self.out_channels, self.squeeze)


CASES = [
    # Channels that fill their slabs and that do not; hidden channels of one sweep, of an odd number, and of many, that
    # fill the last one and do not; squeeze vectors that fill their padding and do not; more stages than steps. Images
    # that fill rows and columns of their tiles and that do not.
    Case(8, 8, (4, 1, 32, 2), squeeze=3, size=(4, 4), batch=5),
    Case(24, 72, (2, 4, 64, 3), size=(5, 5)),
    Case(24, 128, (1, 1, 32, 8), size=(5, 5), batch=5),
    Case(40, 160, (2, 4, 32, 4), squeeze=3, size=(7, 7), batch=5),
    Case(64, 128, (1, 1, 64, 2), squeeze=16, size=(9, 13)),
    Case(24, 104, (1, 2, 32, 3), squeeze=18, size=(10, 10)),
    Case(144, 576, (2, 4, 64, 2), squeeze=36, batch=5),
    Case(144, 576, (1, 4, 32, 2), squeeze=36),
    Case(72, 256, (1, 1, 32, 5), squeeze=18, size=(9, 13)),
    # Hidden channels that do not stay in shared memory.
    Case(72, 288, (1, 2, 64, 2), squeeze=18, size=(14, 14)),
    Case(40, 360, (1, 1, 64, 4), squeeze=18, size=(15, 13)),
    Case(128, 512, (1, 4, 64, 3), squeeze=32, size=(12, 12)),
    Case(144, 576, (1, 4, 32, 4), squeeze=33, size=(16, 16)),
    Case(192, 384, (1, 2, 32, 4), squeeze=48, size=(14, 14)),
    Case(24, 2048, (2, 4, 32, 4), size=(7, 7), batch=5),
    Case(24, 2048, (1, 2, 32, 4), size=(4, 4), batch=5),
    # Many channels, with hidden channels that stay and that do not.
    Case(256, 512, (2, 4, 64, 3), squeeze=64),
    Case(256, 512, (2, 4, 32, 8), squeeze=64),
    Case(256, 1000, (1, 2, 32, 3), squeeze=64, batch=5),
    Case(384, 512, (1, 1, 32, 3), squeeze=96),
    # Two passes, with hidden channels that do not stay and that do, with as many output channels and with more.
    Case(256, 1024, (1, 4, 32, 3), squeeze=64, size=(16, 16)),
    Case(256, 1000, (1, 1, 32, 2), squeeze=64, size=(15, 13)),
    Case(64, 360, (1, 2, 32, 2), out_channels=256, squeeze=64, size=(14, 14)),
    Case(8, 128, (1, 4, 32, 2), out_channels=200, size=(16, 16)),
    # Other output than input channels: in the same slabs as the input, in more, in fewer.
    Case(24, 72, (2, 4, 64, 4), out_channels=32, size=(7, 7), batch=5),
    Case(40, 160, (1, 4, 32, 4), out_channels=112, squeeze=3, size=(12, 12)),
    Case(128, 512, (1, 4, 32, 2), out_channels=256, squeeze=32),
    Case(72, 200, (1, 1, 64, 2), out_channels=24, squeeze=33, size=(9, 13)),
    Case(144, 576, (1, 4, 64, 2), out_channels=40, squeeze=36, size=(16, 16)),
    # Images of a pixel, of a row and two, wider than high and higher than wide, one image.
    Case(16, 64, (8, 1, 32, 2), size=(1, 1), batch=5),
    Case(16, 64, (1, 1, 64, 2), size=(1, 1), batch=1),
    Case(16, 72, (8, 4, 32, 3), size=(2, 32)),
    Case(16, 72, (8, 4, 64, 2), size=(1, 29)),
    Case(16, 72, (8, 2, 32, 2), size=(2, 9)),
    Case(16, 72, (1, 4, 32, 2), size=(1, 16)),
    Case(16, 136, (4, 4, 64, 4), size=(3, 16)),
    Case(16, 136, (4, 4, 32, 5), size=(4, 13)),
    Case(16, 72, (1, 1, 32, 4), size=(16, 3)),
    Case(16, 72, (4, 1, 64, 4), size=(4, 4), batch=1),
    Case(24, 96, (1, 4, 64, 3), size=(12, 12), batch=1),
    # More images than processors.
    Case(24, 96, (2, 4, 32, 8), batch=300),
    Case(128, 512, (1, 4, 64, 3), squeeze=32, size=(16, 16), batch=140),
    # The other activation and the other dtype.
    Case(40, 160, (2, 4, 32, 2), squeeze=3, activation="relu"),
    Case(72, 288, (1, 2, 32, 6), squeeze=18, size=(14, 14), activation="relu"),
    Case(24, 72, (1, 1, 32, 3), size=(5, 5), dtype=torch.bfloat16),
    Case(144, 576, (1, 4, 64, 2), squeeze=33, size=(16, 16), dtype=torch.bfloat16),
    Case(40, 160, (1, 1, 32, 4), out_channels=64, squeeze=18, size=(9, 13), activation="relu", dtype=torch.bfloat16),
    Case(256, 768, (1, 1, 32, 3), squeeze=64, size=(16, 16), activation="relu", dtype=torch.bfloat16),
    # The other activation inside of squeeze-and-excitation: squeeze vectors that fill their padding and that do not,
    # hidden channels that stay and that do not, a last sweep that is split.
    Case(40, 160, (2, 4, 32, 4), squeeze=3, size=(7, 7), batch=5, squeeze_activation="silu"),
    Case(128, 512, (1, 4, 64, 3), squeeze=32, size=(12, 12), activation="relu", squeeze_activation="silu"),
    Case(72, 288, (1, 4, 32, 4), squeeze=100, size=(16, 16), dtype=torch.bfloat16, squeeze_activation="silu"),
    Case(48, 192, (1, 4, 64, 3), squeeze=18, size=(16, 16), squeeze_activation="silu"),
    # A last sweep of up to 64 hidden channels, whose columns the warpgroups divide: after others and alone, that has
    # all of these channels and that does not, with images that fill their rows and that do not.
    Case(48, 192, (1, 4, 64, 3), squeeze=3, size=(16, 16)),
    Case(16, 64, (1, 4, 32, 8), squeeze=48, size=(13, 16), activation="relu", dtype=torch.bfloat16),
    Case(144, 552, (1, 4, 32, 4), out_channels=48, squeeze=36, size=(13, 16), activation="relu"),
    # With two passes; with the least room for what a warpgroup tells the other; with as many steps in both passes as
    # there are in the weights of a whole sweep.
    Case(208, 832, (1, 4, 32, 7), squeeze=52, size=(16, 16), dtype=torch.bfloat16),
    Case(48, 192, (1, 4, 32, 2), out_channels=240, squeeze=100, size=(13, 16)),
    Case(24, 64, (1, 4, 32, 4), out_channels=208, size=(16, 16)),
    # Two passes with whole sweeps only.
    Case(192, 768, (1, 4, 64, 2), squeeze=48, size=(16, 16)),
    # Sweeps in pairs and one by one, all tiles of each at once; several products of different widths.
    Case(128, 512, (2, 4, 32, 4), squeeze=32),
    Case(128, 512, (2, 4, 64, 4), out_channels=208, squeeze=100, activation="relu"),
    Case(144, 576, (2, 4, 32, 6), out_channels=240, squeeze=36, dtype=torch.bfloat16),
    # Hidden channels that do not stay, and room for no more than two steps of them on their way back.
    Case(168, 672, (2, 4, 64, 8), squeeze=42),
    Case(216, 864, (1, 4, 32, 6), squeeze=54, size=(16, 16)),
]
STREAMED_CASES = [case for case in CASES if not case.resident]


def empty_output(x, channels):
    """Full of NaN."""
    out = torch.full((x.shape[0], channels, *x.shape[2:]), float("nan"), dtype=x.dtype, device=x.device)
    return out.contiguous(memory_format=torch.channels_last)


def run_kernel(x, weights, case, packed=None, out=None):
    packed = packed or kernels.pack(weights, case.planned, x.dtype, x.device)
    out = empty_output(x, weights.out_channels) if out is None else out
    kernels.launch(x, packed, out, case.planned, weights, **options_of(case.shape()))
    return out


def run_op(x, weights, case, packed=None):
    packed = (packed or kernels.pack(weights, case.planned, x.dtype, x.device)).tensors()
    sizes = case.hidden, weights.out_channels, case.squeeze
    options = case.activation, case.squeeze_activation, case.residual
    return mbconv_ops.mbconv_hopper(x, *packed, *sizes, *options, case.planned.to_ints())


def apply_reference(x, weights, case):
    """The block in the dtype of `x`."""
    tensors = (w.to(x.device) for w in vars(weights).values())
    return mbconv(x, *tensors, **options_of(case.shape()))


def check(case, random_mbconv_weights, assert_within_rule):
    assert why_invalid(case.planned, case.shape(), PROCESSORS["h200"]) is None
    weights, x = case.weights(random_mbconv_weights), case.input()
    out, again = run_kernel(x, weights, case), run_kernel(x, weights, case)
    assert_within_rule(out, apply_reference(x, weights, case), apply_reference(x.double(), weights, case))
    assert torch.equal(out, again)
    return x, weights, out


@pytest.fixture
def workspaces(monkeypatch):
    """Elements of each workspace that a launch allocates, which are full of NaN."""
    sizes = []

    def poisoned(like, shape, dtype=None):
        sizes.append(prod(shape))
        return scratch(like, shape, dtype).fill_(float("nan"))

    monkeypatch.setattr(mbconv_hopper_launch, "scratch", poisoned)
    return sizes


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_reference(case, random_mbconv_weights, assert_within_rule):
    """The operator launches the same."""
    x, weights, out = check(case, random_mbconv_weights, assert_within_rule)
    assert torch.equal(run_op(x, weights, case), out)


GPU_CASES = [
    Case(24, 96, (1, 4, 32, 8), size=(8, 8), batch=300),
    Case(24, 96, (1, 1, 32, 8), size=(5, 5), batch=5),
    Case(72, 288, (1, 4, 32, 4), squeeze=18, size=(16, 16), batch=140),
    Case(144, 360, (2, 4, 32, 4), squeeze=36, size=(8, 8), batch=5, dtype=torch.bfloat16),
    Case(256, 512, (2, 4, 32, 4), squeeze=64, size=(7, 7), batch=5, activation="relu"),
]


@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_candidate_tiles(case, random_mbconv_weights, assert_within_rule):
    """A compiler may break one tile and spare all others."""
    from fusion.probe import processor_of

    tiles = list(candidate_tiles(case.shape(), processor_of()))
    assert tiles
    for tile in tiles:
        check(replace(case, tile=tuple(tile.to_ints())), random_mbconv_weights, assert_within_rule)


LAUNCH_CASES = [
    Case(24, 72, (2, 4, 64, 4), size=(5, 5), batch=7),
    Case(24, 72, (1, 1, 32, 2), size=(5, 5), batch=11),
    Case(24, 72, (4, 1, 32, 2), size=(4, 4), batch=19),
    Case(144, 576, (1, 4, 32, 4), squeeze=33, size=(16, 16), batch=5),
    Case(256, 512, (2, 4, 64, 3), squeeze=64, batch=5),
    Case(48, 192, (1, 4, 64, 3), squeeze=3, size=(16, 16), batch=5),
]


@pytest.mark.parametrize("case", LAUNCH_CASES, ids=str)
def test_who_computes_an_image_changes_no_bit(case, random_mbconv_weights, monkeypatch):
    """Neither a program for itself, nor several launches that share one workspace."""
    weights, x = case.weights(random_mbconv_weights), case.input()
    together = run_kernel(x, weights, case)
    alone = [run_kernel(x[index : index + 1], weights, case) for index in range(case.batch)]
    assert torch.equal(together, torch.cat(alone))
    monkeypatch.setattr(mbconv_hopper_launch, "processor_count", lambda device: FEW_PROCESSORS)
    assert case.batch > 2 * FEW_PROCESSORS
    for _ in range(3):
        assert torch.equal(run_kernel(x, weights, case), together)


@pytest.mark.parametrize("case", [*STREAMED_CASES, CASES[0], CASES[6], *LAUNCH_CASES[2:4]], ids=str)
def test_reads_nothing_of_the_workspace_that_it_has_not_written(case, random_mbconv_weights, workspaces, monkeypatch):
    monkeypatch.setattr(mbconv_hopper_launch, "processor_count", lambda device: FEW_PROCESSORS)
    weights, x = case.weights(random_mbconv_weights), case.input()
    packed, out = kernels.pack(weights, case.planned, x.dtype, x.device), empty_output(x, weights.out_channels)
    workspaces.clear()
    run_kernel(x, weights, case, packed, out)
    assert workspaces == case.workspaces(FEW_PROCESSORS), "one for all launches"
    monkeypatch.undo()
    assert out.isfinite().all()
    assert torch.equal(run_kernel(x, weights, case, packed), out)


@pytest.mark.parametrize(
    "tile, size",
    [
        ((1, 1, 32, 2), (7, 7)),
        ((1, 4, 64, 3), (15, 12)),
        ((2, 4, 64, 4), (7, 7)),
        ((4, 1, 32, 2), (3, 4)),
        ((8, 2, 32, 3), (1, 11)),
    ],
    ids=str,
)
@pytest.mark.parametrize("out_channels", [24, 32, 72])
def test_reads_and_writes_its_own_images_only(out_channels, tile, size, random_mbconv_weights):
    """What lies before and after the images in memory is neither read nor written, even if a program has room."""
    case = Case(24, 72, tile, out_channels, size=size, batch=5)
    weights, x = case.weights(random_mbconv_weights), case.input()
    expected = run_kernel(x[1:4].clone(memory_format=torch.channels_last), weights, case)
    x[[0, 4]] = float("nan")
    out = empty_output(x, out_channels)
    run_kernel(x[1:4], weights, case, out=out[1:4])
    assert out[1:4].isfinite().all()
    assert torch.equal(out[1:4], expected)
    assert out[[0, 4]].isnan().all()


NEIGHBOUR_CASES = [
    Case(24, 72, (1, 4, 32, 2), batch=5),
    Case(24, 72, (2, 4, 64, 4), batch=5),
    Case(24, 72, (1, 1, 32, 3), size=(7, 7), batch=5),
    Case(24, 1024, (1, 2, 32, 4), batch=5),
    Case(24, 192, (1, 4, 32, 4), size=(13, 16), batch=5),
]


@pytest.mark.parametrize("activation", ["silu", "relu"])
@pytest.mark.parametrize("case", NEIGHBOUR_CASES, ids=str)
def test_an_image_does_not_change_its_neighbours(case, activation, random_mbconv_weights, monkeypatch):
    """Not by what it leaves in the workspace either, whatever is in one of them."""
    monkeypatch.setattr(mbconv_hopper_launch, "processor_count", lambda device: FEW_PROCESSORS)
    case = replace(case, activation=activation)
    weights, x = case.weights(random_mbconv_weights), case.input()
    expected = run_kernel(x, weights, case)
    assert expected.isfinite().all()
    for index in range(case.batch):
        poisoned = x.clone(memory_format=torch.channels_last)
        poisoned[index] = float("nan")
        others = [other for other in range(case.batch) if other != index]
        assert torch.equal(run_kernel(poisoned, weights, case)[others], expected[others])


STACK_CASES = [
    Case(24, 72, (2, 4, 64, 4), size=(7, 7), batch=5, squeeze_activation="silu"),
    Case(40, 160, (1, 1, 32, 3), squeeze=3, size=(9, 13), batch=140),
    Case(144, 576, (2, 4, 32, 4), squeeze=36, size=(5, 7), batch=5, activation="relu"),
    Case(144, 576, (1, 4, 32, 4), squeeze=33, size=(16, 16), batch=5),
    Case(72, 360, (1, 1, 64, 2), squeeze=18, size=(15, 13), batch=140),
    Case(256, 512, (1, 2, 32, 3), squeeze=64, size=(14, 14), batch=5, dtype=torch.bfloat16),
    Case(128, 512, (2, 4, 64, 4), squeeze=32, size=(8, 8), batch=140),
    Case(208, 448, (1, 4, 32, 3), squeeze=52, size=(13, 16), batch=5, activation="relu", dtype=torch.bfloat16),
]


@pytest.mark.parametrize("case", STACK_CASES, ids=str)
def test_stacked_blocks_are_the_blocks_one_after_another(
    case, random_mbconv_weights, assert_within_rule, workspaces, monkeypatch
):
    """In one launch, to the bit: what is between two blocks is rounded like an output."""
    assert why_invalid(case.planned, case.shape(), PROCESSORS["h200"]) is None
    first, x = case.weights(random_mbconv_weights), case.input()
    # Rolled by some rows they are those of other blocks.
    blocks = [MBConvWeights(*(tensor.roll(index, 0) for tensor in vars(first).values())) for index in range(STACK)]
    packed = [kernels.pack(weights, case.planned, x.dtype, x.device) for weights in blocks]
    stacked = stack_mbconv_hopper(packed)
    eager, exact, separate = x, x.double(), x
    for weights, block in zip(blocks, packed, strict=True):
        eager, exact = apply_reference(eager, weights, case), apply_reference(exact, weights, case)
        separate = run_kernel(separate, weights, case, block)
    out = run_kernel(x, first, case, stacked)
    assert_within_rule(out, eager, exact)
    assert torch.equal(out, separate)
    assert torch.equal(run_op(x, first, case, stacked), out)
    monkeypatch.setattr(mbconv_hopper_launch, "processor_count", lambda device: FEW_PROCESSORS)
    assert case.batch > 2 * FEW_PROCESSORS
    for _ in range(3):
        workspaces.clear()
        assert torch.equal(run_kernel(x, first, case, stacked), out)
        assert workspaces == case.workspaces(FEW_PROCESSORS), "one for all launches and blocks"


def test_sums_are_fp32(random_mbconv_weights):
    """The sums of a pool leave the range of fp16, and partial sums of the expansion too."""
    case = Case(32, 64, (2, 4, 32, 2), activation="relu", batch=1)
    weights = case.weights(random_mbconv_weights)
    weights.expand[:, :16] = 1.0
    weights.expand[:, 16:] = -1.0
    weights.expand[:, 0] += 0.5
    x = torch.full_like(case.input(), 8192.0)
    largest = torch.finfo(x.dtype).max
    identity = {"project": torch.eye(64, dtype=torch.float64), "project_bias": torch.zeros(64, dtype=torch.float64)}
    hidden = apply_reference(x.double(), replace(weights, **identity), replace(case, out_channels=64))
    assert 16 * x.max().item() > largest
    assert hidden.max() < largest < hidden.sum((2, 3)).max()
    exact = apply_reference(x.double(), weights, case)
    out = run_kernel(x, weights, case)
    assert ((out.double() - exact).norm() / exact.norm()).item() < 2e-3


CHAIN_CASES = [
    Case(128, 512, (1, 4, 64, 3), squeeze=32, size=(16, 16), batch=140),
    Case(144, 576, (2, 4, 64, 6), squeeze=36, size=(8, 8), batch=200),
    Case(24, 72, (2, 4, 64, 4), size=(7, 7)),
    Case(48, 192, (1, 4, 64, 3), squeeze=3, size=(16, 16), batch=140),
]


@pytest.mark.parametrize("case", CHAIN_CASES, ids=str)
def test_kernels_overlap_without_races(case, random_mbconv_weights):
    """A kernel may start before the one ahead has finished: blocks back to back are as right as one at a time."""
    weights, x = case.weights(random_mbconv_weights), case.input()
    packed = kernels.pack(weights, case.planned, x.dtype, x.device)
    buffers = [empty_output(x, case.channels) for _ in range(2)]

    def chain(synchronize):
        out = x
        for index in range(CHAIN):
            out = run_kernel(out, weights, case, packed, buffers[index % 2])
            if synchronize:
                torch.cuda.synchronize()
            if index % 2:
                out.mul_(0.25)  # reads what was just written, and writes what is read next
        return out.clone()

    expected = chain(synchronize=True)
    assert expected.isfinite().all()
    for _ in range(3):
        for buffer in buffers:
            buffer.fill_(float("nan"))
        assert torch.equal(chain(synchronize=False), expected)


def test_two_streams_at_once(random_mbconv_weights):
    """No program waits for another, so kernels that share the processors neither hang nor disturb each other."""
    random = Random(0)
    blocks = [CASES[index] for index in (0, 1, 6, 9, 12, 17, 20, 27)] + CHAIN_CASES[:2]
    packed = [kernels.pack(case.weights(random_mbconv_weights), case.planned, case.dtype, "cuda") for case in blocks]
    work = []
    for _ in range(LAUNCHES):
        index = random.randrange(len(blocks))
        case = replace(blocks[index], batch=random.randint(1, 300))
        weights, x = case.weights(random_mbconv_weights), case.input()
        expected = run_kernel(x, weights, case, packed[index])
        work.append((x, weights, case, packed[index], empty_output(x, weights.out_channels), expected))
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    for number, (*arguments, _) in enumerate(work):
        with torch.cuda.stream(streams[number % 2]):
            run_kernel(*arguments)
    ends = [stream.record_event() for stream in streams]
    deadline = time.monotonic() + HANG_SECONDS
    while not all(end.query() for end in ends):
        assert time.monotonic() < deadline, "the kernels hang"
        time.sleep(0.01)
    wrong = [str(case) for _, _, case, _, out, expected in work if not torch.equal(out, expected)]
    assert not wrong


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_deterministic_algorithms_give_equal_bits(random_mbconv_weights, deterministic):
    case = CHAIN_CASES[0]
    weights, x = case.weights(random_mbconv_weights), case.input()
    outs = [run_op(x, weights, case) for _ in range(5)]
    assert all(torch.equal(out, outs[0]) for out in outs)
    torch.use_deterministic_algorithms(False)
    assert torch.equal(run_op(x, weights, case), outs[0])


@pytest.mark.parametrize("channels, size", [(64, 16), (72, 7), (144, 16)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_module_takes_the_kernel(dtype, channels, size, assert_within_rule):
    torch.manual_seed(0)
    block = MBConv(channels, channels, squeeze_activation=torch.nn.SiLU).eval().requires_grad_(False)
    for bn in (block.expand_bn, block.conv_bn, block.project_bn):
        bn.running_mean.normal_()
        bn.running_var.uniform_(0.5, 2.0)
    fused = block.fused(partial(plan_block, kernel="mbconv_hopper"))
    x = torch.randn(5, channels, size, size).to("cuda", dtype)
    plan = fused.plan(x)
    assert plan.kernel == "mbconv_hopper" and isinstance(plan.tile, MBConvHopperTile)
    out = fused(x)
    packed = kernels.pack(fused.weights, plan.tile, dtype, "cuda").tensors()
    sizes = fused.weights.hidden_channels, channels, fused.weights.squeeze_channels
    assert torch.equal(mbconv_ops.mbconv_hopper(x, *packed, *sizes, "silu", "silu", True, plan.tile.to_ints()), out)
    exact = block.to("cuda", torch.float64)(x.double())
    assert_within_rule(out, block.to(dtype)(x), exact)

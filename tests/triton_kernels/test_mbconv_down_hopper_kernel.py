"""The stride-2 MBConv kernel on a GPU of compute capability 9.0: Triton's interpreter does not know Gluon."""

import time
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from random import Random

import pytest
import torch

from fusion import kernels
from fusion.down_modules import FusedMBConvDown
from fusion.mbconv_down_hopper_op import mbconv_down_hopper as mbconv_down_hopper_op
from fusion.planner.blocks import mbconv as mbconv_graph
from fusion.planner.match import match_mbconv_down, options_of
from fusion.planner.mbconv_down_hopper_tile import MBConvDownHopperTile, candidate_tiles, why_invalid
from fusion.planner.mbconv_hopper_tile import LOCAL_MEMORY_BYTES
from fusion.planner.plan import plan_block
from fusion.planner.processor import PROCESSORS
from fusion.reference import mbconv_down
from fusion.relaunch import scratch
from fusion.triton_kernels import mbconv_hopper_launch

IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = pytest.mark.skipif(not IS_HOPPER, reason="needs a GPU of compute capability 9.0")

FEW_PROCESSORS = 2
"""With so few, a batch takes several launches."""
CHAIN = 8
LAUNCHES = 100
HANG_SECONDS = 60


@dataclass(frozen=True)
class Case:
    channels: int
    hidden: int
    out_channels: int
    size: tuple[int, int]
    tile: tuple[int, int] = (32, 4)
    """But for whether hidden channels stay in shared memory."""
    streams: bool = False
    """They do not, even if there is room."""
    squeeze: int = 6
    batch: int = 3
    activation: str = "silu"
    dtype: torch.dtype = torch.float16
    squeeze_activation: str = "relu"
    blur: bool = True

    def __str__(self):
        channels = f"{self.channels}-{self.hidden}-{self.out_channels}s{self.squeeze}"
        image = "x".join(map(str, (self.batch, *self.size)))
        activations = f"{self.activation}-{self.squeeze_activation}"
        tile = ",".join(map(str, self.planned.to_ints())) + "-strided" * (not self.blur)
        return f"{channels}-{image}-{activations}-{tile}-{self.dtype_name}"

    @property
    def dtype_name(self):
        return str(self.dtype).removeprefix("torch.")

    @property
    def planned(self):
        resident = MBConvDownHopperTile(*self.tile, resident=1)
        sizes = *self.size, self.channels, self.hidden, self.out_channels, self.squeeze
        fits = resident.memory_bytes(*sizes) <= LOCAL_MEMORY_BYTES
        return replace(resident, resident=int(fits and not self.streams))

    def workspaces(self, processors):
        """Elements of the workspace of a call, if it has one."""
        programs = min(self.batch, processors)
        return [] if self.planned.resident else [programs * self.planned.workspace_elements(*self.size, self.hidden)]

    def shape(self):
        graph = mbconv_graph(
            self.batch,
            *self.size,
            self.channels,
            hidden_channels=self.hidden,
            out_channels=self.out_channels,
            stride=2,
            squeeze_channels=self.squeeze,
            activation=self.activation,
            squeeze_activation=self.squeeze_activation,
            blur=self.blur,
            dtype=self.dtype_name,
        )
        return match_mbconv_down(graph)

    def input(self):
        torch.manual_seed(sum(self.size) + self.channels)
        x = torch.randn(self.batch, self.channels, *self.size).to("cuda", self.dtype)
        return x.contiguous(memory_format=torch.channels_last)

    def weights(self, random_mbconv_weights):
        return random_mbconv_weights(self.channels, self.hidden, self.out_channels, self.squeeze)


DOWN4 = [
    # One tile a column. The networks' blocks, with hidden channels that stay and that do not.
    Case(128, 512, 128, (16, 16), (32, 6), squeeze=32),
    Case(160, 640, 160, (16, 16), (32, 6), squeeze=40),
    Case(192, 768, 192, (16, 16), (32, 6), squeeze=48),
    Case(256, 1024, 256, (16, 16), (32, 6), squeeze=64),
    # Channels that fill their slabs and that do not; hidden channels of one sweep, of an odd number, and of many, that
    # fill the last one and do not; squeeze vectors that fill their padding and do not; more stages than steps.
    Case(8, 8, 8, (16, 16), (32, 2), squeeze=3, batch=5),
    Case(24, 128, 24, (16, 16), (64, 8), squeeze=16, batch=5),
    Case(24, 104, 32, (16, 16), (32, 8), squeeze=18),
    Case(72, 288, 72, (16, 16), (64, 2), squeeze=18),
    Case(144, 576, 144, (16, 16), (64, 4), squeeze=33, batch=5),
    Case(24, 2048, 24, (16, 16), (32, 3)),
    Case(64, 360, 256, (16, 16), (32, 8), squeeze=64),
    Case(256, 512, 40, (16, 16), (64, 3), squeeze=100),
    # Images that do not fill rows or columns, down to the smallest.
    Case(24, 72, 24, (14, 14), squeeze=18),
    Case(40, 160, 112, (10, 16), squeeze=3),
    Case(40, 160, 40, (16, 10), squeeze=3, batch=5),
    Case(72, 256, 24, (12, 12), (64, 2)),
    Case(24, 72, 24, (8, 8), batch=5),
    Case(16, 72, 16, (2, 2), batch=5),
    Case(16, 72, 24, (2, 16), batch=1),
    Case(16, 72, 24, (16, 2), batch=1),
    Case(16, 136, 24, (4, 6)),
    # Hidden channels that would have room, but do not stay.
    Case(128, 512, 128, (16, 16), (32, 6), squeeze=32, streams=True),
    Case(72, 288, 72, (12, 14), (64, 2), squeeze=18, streams=True),
    Case(16, 72, 24, (2, 4), streams=True, batch=5),
    Case(24, 136, 208, (10, 32), streams=True),
    # Wider than high.
    Case(24, 136, 40, (16, 32)),
    Case(24, 136, 208, (12, 30), (64, 3)),
    Case(16, 72, 24, (2, 20)),
    # More images than processors; the other activation and the other dtype.
    Case(24, 96, 24, (16, 16), (32, 8), batch=300),
    Case(256, 1024, 256, (16, 16), (32, 6), squeeze=64, batch=140),
    Case(40, 160, 64, (16, 16), (32, 2), squeeze=3, activation="relu"),
    Case(256, 768, 256, (14, 16), (32, 3), squeeze=64, activation="relu"),
    Case(128, 512, 128, (16, 16), (64, 3), squeeze=32, dtype=torch.bfloat16),
    Case(24, 72, 40, (10, 6), dtype=torch.bfloat16, activation="relu"),
    # The other activation inside of squeeze-and-excitation.
    Case(128, 512, 128, (16, 16), (32, 6), squeeze=32, squeeze_activation="silu"),
    Case(40, 160, 112, (10, 16), squeeze=3, activation="relu", squeeze_activation="silu"),
]
DOWN3 = [
    # Two tiles a column. The networks' blocks.
    Case(48, 192, 128, (32, 32), (32, 6), squeeze=12),
    Case(64, 256, 160, (32, 32), (32, 4), squeeze=16),
    Case(72, 288, 192, (32, 32), (32, 4), squeeze=18),
    Case(96, 384, 256, (32, 32), (32, 4), squeeze=24),
    # Few and many channels; hidden channels that stay and that do not; two passes and one.
    Case(8, 8, 8, (32, 32), (32, 2), squeeze=3, batch=5),
    Case(24, 128, 72, (32, 32), (64, 8), squeeze=16),
    Case(24, 104, 200, (32, 32), (32, 3), squeeze=18, batch=5),
    Case(16, 1000, 24, (32, 32), (32, 8), squeeze=33),
    Case(80, 136, 40, (32, 32), (32, 2), squeeze=100),
    # Hidden channels that would have room, but do not stay; a last sweep that is split, alone and after others, with
    # all of its channels and with fewer.
    Case(24, 64, 24, (32, 32), streams=True),
    Case(24, 128, 24, (32, 32), streams=True, batch=5),
    Case(24, 184, 200, (32, 32), (64, 3), streams=True, batch=5),
    Case(24, 40, 24, (26, 24), streams=True, batch=5, activation="relu"),
    Case(24, 168, 24, (32, 4), streams=True),
    Case(24, 168, 24, (32, 12), streams=True),
    Case(24, 168, 24, (20, 2), streams=True),
    Case(24, 168, 24, (20, 6), streams=True),
    # Images that do not fill rows or columns.
    Case(24, 72, 24, (30, 30), squeeze=18),
    Case(40, 160, 112, (18, 32), squeeze=3),
    Case(40, 160, 40, (32, 18), squeeze=3, batch=5),
    Case(24, 72, 24, (28, 28), batch=5),
    Case(24, 72, 24, (24, 24), batch=5),
    Case(16, 72, 16, (20, 20), (64, 3)),
    Case(16, 72, 24, (32, 2), batch=1),
    Case(16, 72, 24, (18, 4), batch=1),
    Case(16, 72, 24, (32, 6)),
    Case(24, 136, 208, (26, 16), (32, 3)),
    # More images than processors; the other activation and the other dtype.
    Case(48, 192, 128, (32, 32), (32, 6), squeeze=12, batch=140),
    Case(24, 96, 24, (32, 32), (32, 8), batch=300),
    Case(40, 160, 64, (32, 32), (32, 2), squeeze=3, activation="relu"),
    Case(96, 384, 256, (30, 32), (32, 3), squeeze=24, activation="relu"),
    Case(72, 288, 192, (32, 32), (64, 3), squeeze=18, dtype=torch.bfloat16),
    Case(24, 72, 40, (26, 22), dtype=torch.bfloat16, activation="relu"),
    # The other activation inside of squeeze-and-excitation.
    Case(48, 192, 128, (32, 32), (32, 6), squeeze=100, dtype=torch.bfloat16, squeeze_activation="silu"),
    Case(24, 168, 40, (26, 24), squeeze_activation="silu", streams=True),
]
STRIDED = [
    replace(case, blur=False)
    for case in (
        # One tile a column: images that fill rows and columns and that do not, of both parities, down to one pixel.
        Case(128, 512, 128, (16, 16), (32, 6), squeeze=32),
        Case(256, 1024, 256, (16, 16), (32, 6), squeeze=64, batch=140),
        Case(40, 240, 80, (14, 14), squeeze=10, squeeze_activation="silu"),
        Case(24, 72, 24, (15, 13), batch=5),
        Case(72, 288, 72, (9, 16), (64, 2), squeeze=18, streams=True),
        Case(16, 136, 24, (1, 1), batch=5),
        Case(16, 72, 24, (16, 1)),
        Case(24, 136, 208, (11, 31), activation="relu"),
        Case(24, 72, 40, (10, 6), dtype=torch.bfloat16, streams=True),
        # Two tiles a column. Hidden channels that stay and that do not, a last sweep that is split.
        Case(48, 192, 104, (32, 32), (32, 6), squeeze=12),
        Case(40, 240, 80, (28, 28), (32, 6), squeeze=10, squeeze_activation="silu", batch=140),
        Case(96, 384, 256, (31, 32), (32, 4), squeeze=24),
        Case(24, 168, 24, (32, 4), streams=True),
        Case(24, 40, 24, (25, 23), streams=True, batch=5, activation="relu"),
        Case(24, 168, 24, (20, 6), streams=True),
        Case(8, 8, 8, (17, 1), (32, 2), squeeze=3, batch=5),
        Case(24, 72, 40, (27, 22), dtype=torch.bfloat16),
    )
]
CASES = DOWN4 + DOWN3 + STRIDED


def empty_output(x, channels):
    """Full of NaN."""
    batch, _, height, width = x.shape
    out = torch.full((batch, channels, -(-height // 2), -(-width // 2)), float("nan"), dtype=x.dtype, device=x.device)
    return out.contiguous(memory_format=torch.channels_last)


def run_kernel(x, weights, case, packed=None, out=None):
    packed = packed or kernels.pack(weights, case.planned, x.dtype, x.device)
    out = empty_output(x, weights.out_channels) if out is None else out
    kernels.launch(x, packed, out, case.planned, weights, **options_of(case.shape()))
    return out


def run_op(x, weights, case):
    packed = kernels.pack(weights, case.planned, x.dtype, x.device).tensors()
    sizes = case.hidden, weights.out_channels, case.squeeze
    options = case.activation, case.squeeze_activation, case.blur
    return mbconv_down_hopper_op(x, *packed, *sizes, *options, case.planned.to_ints())


def apply_reference(x, weights, case):
    """The block in the dtype of `x`."""
    tensors = (w.to(x.device) for w in vars(weights).values())
    return mbconv_down(x, *tensors, **options_of(case.shape()))


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


ONE_PIXEL_CASES = [
    Case(8, 8, 8, (16, 16), squeeze=3, batch=1, activation="relu"),
    Case(8, 8, 8, (32, 32), squeeze=3, batch=1, activation="relu"),
    Case(8, 8, 8, (12, 10), squeeze=3, batch=1, activation="relu"),
    Case(8, 8, 8, (32, 32), squeeze=3, batch=1, activation="relu", streams=True),
    Case(8, 8, 8, (26, 20), squeeze=3, batch=1, activation="relu", streams=True),
    Case(8, 8, 8, (26, 22), squeeze=3, batch=1, activation="relu"),
    Case(8, 8, 8, (16, 16), squeeze=3, batch=1, activation="relu", blur=False),
    Case(8, 8, 8, (11, 9), squeeze=3, batch=1, activation="relu", blur=False),
    Case(8, 8, 8, (32, 32), squeeze=3, batch=1, activation="relu", streams=True, blur=False),
    Case(8, 8, 8, (25, 21), squeeze=3, batch=1, activation="relu", blur=False),
]


@pytest.mark.parametrize("case", ONE_PIXEL_CASES, ids=str)
def test_every_pixel_is_in_its_place(case, random_mbconv_weights):
    """An input of one pixel after the other, the images of a batch: a wrong row, column or reflection shows."""
    weights = case.weights(random_mbconv_weights)
    height, width = case.size
    pixels = height * width
    x = torch.zeros(pixels, case.channels, pixels, device="cuda", dtype=torch.float16)
    x[torch.arange(pixels), :, torch.arange(pixels)] = 4.0
    x = x.reshape(pixels, case.channels, height, width).contiguous(memory_format=torch.channels_last)
    exact = apply_reference(x.double(), weights, case)
    out = run_kernel(x, weights, replace(case, batch=pixels))
    error = (out.double() - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    assert error.max() < 5e-3, f"pixel {divmod(error.argmax().item(), width)}"


GPU_CASES = [
    Case(128, 512, 128, (16, 16), squeeze=32, batch=5),
    Case(72, 360, 200, (14, 12), squeeze=18, batch=5),
    Case(48, 192, 128, (32, 32), squeeze=12, batch=5),
    Case(96, 384, 256, (30, 32), squeeze=24, batch=5, dtype=torch.bfloat16),
    Case(40, 240, 80, (28, 28), squeeze=10, batch=5, blur=False),
    Case(128, 512, 128, (15, 16), squeeze=32, batch=5, blur=False),
]


@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_candidate_tiles(case, random_mbconv_weights, assert_within_rule):
    """A compiler may break one tile and spare all others."""
    from fusion.probe import processor_of

    tiles = list(candidate_tiles(case.shape(), processor_of()))
    assert tiles
    for tile in tiles:
        step, stages, resident = tile.to_ints()
        chosen = replace(case, tile=(step, stages), streams=not resident)
        assert chosen.planned == tile
        check(chosen, random_mbconv_weights, assert_within_rule)


LAUNCH_CASES = [
    Case(24, 72, 24, (16, 16), batch=7),
    Case(24, 72, 24, (10, 6), batch=11),
    Case(256, 1024, 256, (16, 16), (32, 6), squeeze=64, batch=5),
    Case(48, 192, 128, (32, 32), (32, 6), squeeze=12, batch=5),
    Case(24, 72, 40, (26, 22), batch=7),
    Case(24, 168, 40, (26, 24), batch=7, streams=True),
    Case(24, 72, 24, (13, 15), batch=7, blur=False),
    Case(24, 168, 40, (25, 24), batch=7, streams=True, blur=False),
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


@pytest.mark.parametrize("case", [*(case for case in CASES if not case.planned.resident), CASES[0]], ids=str)
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
    "size, blur",
    [
        *((size, True) for size in ((16, 16), (14, 10), (2, 4), (32, 32), (22, 26))),
        *((size, False) for size in ((16, 16), (13, 9), (25, 31))),
    ],
    ids=str,
)
@pytest.mark.parametrize("out_channels", [24, 32, 72])
def test_reads_and_writes_its_own_images_only(out_channels, size, blur, random_mbconv_weights):
    """What lies before and after the images in memory is neither read nor written, even if a program has room."""
    case = Case(24, 72, out_channels, size, batch=5, blur=blur)
    weights, x = case.weights(random_mbconv_weights), case.input()
    expected = run_kernel(x[1:4].clone(memory_format=torch.channels_last), weights, case)
    x[[0, 4]] = float("nan")
    out = empty_output(x, out_channels)
    run_kernel(x[1:4], weights, case, out=out[1:4])
    assert out[1:4].isfinite().all()
    assert torch.equal(out[1:4], expected)
    assert out[[0, 4]].isnan().all()


NEIGHBOUR_CASES = [
    Case(24, 72, 24, (16, 16), batch=5),
    Case(24, 72, 24, (6, 10), batch=5),
    Case(256, 768, 256, (16, 16), batch=5),
    Case(24, 384, 200, (32, 32), batch=5),
    Case(24, 72, 24, (26, 30), batch=5),
    Case(24, 192, 24, (26, 32), batch=5, streams=True),
    Case(24, 72, 24, (7, 9), batch=5, blur=False),
    Case(24, 192, 24, (25, 31), batch=5, streams=True, blur=False),
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


CHAIN_CASES = [
    Case(128, 512, 128, (16, 16), (32, 6), squeeze=32, batch=140),
    Case(256, 1024, 256, (16, 16), (32, 6), squeeze=64, batch=140),
    Case(48, 192, 48, (32, 32), (32, 6), squeeze=12, batch=140),
    Case(24, 384, 24, (32, 32), (32, 4), batch=140),
]


@pytest.mark.parametrize("case", CHAIN_CASES, ids=str)
def test_kernels_overlap_without_races(case, random_mbconv_weights):
    """A kernel may start before the one ahead has finished: blocks back to back are as right as one at a time."""
    weights, x = case.weights(random_mbconv_weights), case.input()
    packed = kernels.pack(weights, case.planned, x.dtype, x.device)
    height, width = case.size

    def chain(synchronize):
        inputs, outs = [x.clone(memory_format=torch.channels_last) for _ in range(2)], []
        for index in range(CHAIN):
            outs.append(run_kernel(inputs[index % 2], weights, case, packed))
            if synchronize:
                torch.cuda.synchronize()
            # The next input has what was just written, in a corner.
            inputs[(index + 1) % 2][:, :, : height // 2, : width // 2] = outs[-1]
        return torch.stack(outs)

    expected = chain(synchronize=True)
    assert expected.isfinite().all()
    for _ in range(3):
        assert torch.equal(chain(synchronize=False), expected)


def test_two_streams_at_once(random_mbconv_weights):
    """No program waits for another, so kernels that share the processors neither hang nor disturb each other."""
    random = Random(0)
    blocks = [*DOWN4[:6], *DOWN3[:5]]
    packed = [kernels.pack(case.weights(random_mbconv_weights), case.planned, case.dtype, "cuda") for case in blocks]
    work = []
    for _ in range(LAUNCHES):
        index = random.randrange(len(blocks))
        case = replace(blocks[index], batch=random.randint(1, 200))
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


@pytest.mark.parametrize("channels, out_channels, size", [(128, 128, 16), (72, 192, 32), (24, 48, 10)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_module_takes_the_kernel(dtype, channels, out_channels, size, random_mbconv_weights, assert_within_rule):
    case = Case(channels, 4 * channels, out_channels, (size, size), batch=5, dtype=dtype)
    weights, x = case.weights(random_mbconv_weights), case.input()
    fused = FusedMBConvDown(weights, activation="silu", tuner=partial(plan_block, kernel="mbconv_down_hopper"))
    plan = fused.plan(x)
    assert plan.kernel == "mbconv_down_hopper" and isinstance(plan.tile, MBConvDownHopperTile)
    out = fused(x)
    packed = kernels.pack(weights, plan.tile, x.dtype, x.device).tensors()
    sizes = case.hidden, weights.out_channels, case.squeeze
    assert torch.equal(mbconv_down_hopper_op(x, *packed, *sizes, "silu", "relu", True, plan.tile.to_ints()), out)
    assert_within_rule(out, apply_reference(x, weights, case), apply_reference(x.double(), weights, case))

"""The stride-2 MBConv kernel for larger images on a GPU of compute capability 9.0: Triton's interpreter does not know
Gluon."""

import time
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from random import Random

import pytest
import torch

from fusion import kernels
from fusion.cuda_graphs import CudaGraphs
from fusion.down_modules import FusedMBConvDown
from fusion.mbconv_windows_hopper_op import mbconv_down_windows_hopper as mbconv_down_windows_hopper_op
from fusion.planner.blocks import mbconv as mbconv_graph
from fusion.planner.match import match_mbconv_down, options_of
from fusion.planner.mbconv_windows_hopper_tile import MBConvDownWindowsHopperTile, candidate_tiles, why_invalid
from fusion.planner.plan import plan_block
from fusion.planner.processor import PROCESSORS
from fusion.reference import mbconv_down
from fusion.relaunch import scratch
from fusion.triton_kernels import mbconv_hopper_launch

IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = pytest.mark.skipif(not IS_HOPPER, reason="needs a GPU of compute capability 9.0")

KERNEL = "mbconv_down_windows_hopper"
FEW_PROCESSORS = 2
"""With so few, a batch takes several launches."""
CHAIN = 8
LAUNCHES = 100
HANG_SECONDS = 60
HALF, BRAIN = torch.float16, torch.bfloat16


@dataclass(frozen=True)
class Case:
    batch: int
    channels: int
    hidden: int
    out_channels: int
    size: tuple[int, int]
    squeeze: int
    tile: tuple[int, int, int, int] = (4, 8, 64, 4)
    kernel_size: int = 3
    activation: str = "silu"
    dtype: torch.dtype = HALF
    squeeze_activation: str = "relu"

    def __str__(self):
        channels = f"{self.channels}-{self.hidden}-{self.out_channels}s{self.squeeze}"
        image = "x".join(map(str, (self.batch, *self.size)))
        activations = f"{self.kernel_size}-{self.activation}-{self.squeeze_activation}"
        return f"{channels}-{image}-{activations}-{','.join(map(str, self.tile))}-{self.dtype_name}"

    @property
    def dtype_name(self):
        return str(self.dtype).removeprefix("torch.")

    @property
    def planned(self):
        return MBConvDownWindowsHopperTile(*self.tile)

    @property
    def wide(self):
        """With a 5x5 convolution, the other activation and the other dtype."""
        activation, dtype = "relu" if self.activation == "silu" else "silu", BRAIN if self.dtype == HALF else HALF
        return replace(self, kernel_size=5, activation=activation, dtype=dtype)

    def workspace(self, processors):
        """Elements of the workspace of a call."""
        return min(self.batch, processors) * self.planned.workspace_elements(*self.size, self.hidden)

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
            dtype=self.dtype_name,
            kernel_size=self.kernel_size,
            blur=False,
        )
        return match_mbconv_down(graph)

    def input(self, seed=0):
        torch.manual_seed(sum(self.size) + self.channels + seed)
        x = torch.randn(self.batch, self.channels, *self.size).to("cuda", self.dtype)
        return x.contiguous(memory_format=torch.channels_last)

    def weights(self, random_mbconv_weights):
        sizes = self.channels, self.hidden, self.out_channels, self.squeeze
        return random_mbconv_weights(*sizes, kernel_size=self.kernel_size)


BLOCKS = [
    # Channels that fill their slabs and that do not; hidden channels of one sweep and of several, that fill the last
    # one and do not; squeeze vectors that fill their padding and do not. Images of one window and of several, that fill
    # rows, columns, pairs of the output's columns and passes and that do not, down to less than a piece.
    Case(1, 24, 144, 24, (17, 19), 6, (4, 8, 32, 3)),
    Case(2, 72, 288, 72, (18, 18), 18, (4, 8, 64, 2), activation="relu"),
    Case(3, 144, 576, 144, (21, 33), 36, (4, 8, 64, 2), dtype=BRAIN),
    Case(2, 40, 240, 80, (28, 28), 10, squeeze_activation="silu"),
    Case(1, 24, 96, 24, (56, 56), 6, (4, 16, 64, 4)),
    Case(2, 16, 64, 16, (61, 20), 4, (4, 16, 32, 8), activation="relu", dtype=BRAIN),
    Case(2, 32, 128, 32, (14, 30), 8, (4, 16, 32, 6)),
    Case(1, 8, 64, 8, (5, 100), 4, (4, 8, 32, 6), dtype=BRAIN),
    Case(140, 24, 96, 24, (18, 18), 6, (4, 16, 64, 6)),
    Case(2, 104, 624, 128, (18, 18), 26, (4, 16, 32, 4), activation="relu"),
    Case(1, 64, 256, 200, (35, 36), 16, (4, 8, 32, 2), dtype=BRAIN),
    Case(2, 8, 8, 8, (2, 3), 1, (4, 8, 32, 2)),
    Case(2, 16, 48, 16, (1, 40), 3, (4, 16, 64, 3), activation="relu"),
    Case(2, 112, 672, 192, (14, 14), 28, dtype=BRAIN, squeeze_activation="silu"),
    Case(2, 24, 144, 40, (27, 31), 6, (4, 8, 64, 3)),
]
WIDE_BLOCKS = [BLOCKS[index].wide for index in (0, 2, 3, 4, 5, 6, 7, 11, 12, 13, 14)]


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


def run_op(x, weights, case, tile=None):
    tile = tile or case.planned
    packed = kernels.pack(weights, tile, x.dtype, x.device).tensors()
    sizes = case.hidden, weights.out_channels, case.squeeze
    options = case.activation, case.squeeze_activation, False
    return mbconv_down_windows_hopper_op(x, *packed, *sizes, *options, tile.to_ints())


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
def few_processors(monkeypatch):
    monkeypatch.setattr(mbconv_hopper_launch, "processor_count", lambda device: FEW_PROCESSORS)


@pytest.fixture
def workspaces(monkeypatch):
    """Elements of each workspace that a launch allocates, which are full of NaN."""
    sizes = []

    def poisoned(like, shape, dtype=None):
        sizes.append(prod(shape))
        return scratch(like, shape, dtype).fill_(float("nan"))

    monkeypatch.setattr(mbconv_hopper_launch, "scratch", poisoned)
    return sizes


@pytest.mark.parametrize("case", BLOCKS + WIDE_BLOCKS, ids=str)
def test_against_the_reference(case, random_mbconv_weights, assert_within_rule, workspaces):
    """Whatever is in memory before. The operator launches the same."""
    x, weights, out = check(case, random_mbconv_weights, assert_within_rule)
    assert torch.equal(run_op(x, weights, case), out)
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    assert workspaces == [case.workspace(processors)] * 3, "one for all launches of a call"


ONE_PIXEL_CASES = [
    Case(1, 8, 8, 8, (33, 9), 3, (4, 8, 32, 2), activation="relu"),
    Case(1, 8, 8, 8, (33, 10), 3, (4, 8, 32, 2), activation="relu", kernel_size=5),
    Case(1, 8, 8, 8, (5, 42), 3, (4, 16, 32, 2), activation="relu", kernel_size=5),
]


@pytest.mark.parametrize("case", ONE_PIXEL_CASES, ids=str)
def test_every_pixel_is_in_its_place(case, random_mbconv_weights):
    """An input of one pixel after the other, the images of a batch: a wrong row, column, window or pass shows."""
    weights = case.weights(random_mbconv_weights)
    height, width = case.size
    pixels = height * width
    x = torch.zeros(pixels, case.channels, pixels, device="cuda", dtype=HALF)
    x[torch.arange(pixels), :, torch.arange(pixels)] = 4.0
    x = x.reshape(pixels, case.channels, height, width).contiguous(memory_format=torch.channels_last)
    exact = apply_reference(x.double(), weights, case)
    out = run_kernel(x, weights, replace(case, batch=pixels))
    error = (out.double() - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    assert error.max() < 5e-3, f"pixel {divmod(error.argmax().item(), width)}"


@pytest.mark.parametrize("case", [BLOCKS[10], BLOCKS[2].wide], ids=str)
def test_candidate_tiles(case, random_mbconv_weights, assert_within_rule):
    """A compiler may break one tile and spare all others. With the fewest stages and the most of each design."""
    from fusion.probe import processor_of

    stages = {}
    for tile in candidate_tiles(case.shape(), processor_of()):
        stages.setdefault((tile.pass_tiles, tile.step), []).append(tile.stages)
    assert len(stages) > 2
    for (pass_tiles, step), tried in stages.items():
        for count in (min(tried), max(tried)):
            check(replace(case, tile=(4, pass_tiles, step, count)), random_mbconv_weights, assert_within_rule)


LAUNCH_CASES = [
    replace(BLOCKS[0], batch=7),
    replace(BLOCKS[4], batch=5),
    replace(BLOCKS[14].wide, batch=5),
]


@pytest.mark.parametrize("case", LAUNCH_CASES, ids=str)
def test_who_computes_an_image_changes_no_bit(case, random_mbconv_weights, monkeypatch, workspaces):
    """Neither a program for itself, nor several launches that share one workspace, of which nothing is read that the
    call has not written."""
    weights, x = case.weights(random_mbconv_weights), case.input()
    together = run_kernel(x, weights, case)
    assert together.isfinite().all()
    alone = [run_kernel(x[index : index + 1], weights, case) for index in range(case.batch)]
    assert torch.equal(together, torch.cat(alone))
    monkeypatch.setattr(mbconv_hopper_launch, "processor_count", lambda device: FEW_PROCESSORS)
    assert case.batch > 2 * FEW_PROCESSORS
    workspaces.clear()
    for _ in range(3):
        assert torch.equal(run_kernel(x, weights, case), together)
    assert workspaces == [case.workspace(FEW_PROCESSORS)] * 3, "one for all launches of a call"


@pytest.fixture
def same_memory(monkeypatch):
    """Launches have their workspaces in the same memory, one after the other."""
    memory = torch.empty(2**26, dtype=torch.uint8, device="cuda")

    def shared(like, shape, dtype=None):
        return memory.view(dtype or like.dtype)[: prod(shape)].view(shape)

    monkeypatch.setattr(mbconv_hopper_launch, "scratch", shared)


@pytest.mark.parametrize("case", [replace(BLOCKS[0], batch=5), replace(BLOCKS[11].wide, batch=3)], ids=str)
def test_what_a_larger_image_has_left_in_the_workspace_does_not_matter(
    case, random_mbconv_weights, few_processors, same_memory
):
    weights, x = case.weights(random_mbconv_weights), case.input()
    larger = replace(case, size=(40, 36))
    expected = run_kernel(x, weights, case)
    assert expected.isfinite().all()
    for large in (float("nan"), float("inf"), 1.0):
        run_kernel(large * larger.input(), weights, larger)
        assert torch.equal(run_kernel(x, weights, case), expected)


@pytest.mark.parametrize("case", [replace(BLOCKS[0], batch=5), replace(BLOCKS[14].wide, batch=5)], ids=str)
def test_reads_and_writes_its_own_images_only(case, random_mbconv_weights):
    """What lies before and after the images in memory is neither read nor written, even if a program has room."""
    weights, x = case.weights(random_mbconv_weights), case.input()
    expected = run_kernel(x[1:4].clone(memory_format=torch.channels_last), weights, case)
    x[[0, 4]] = float("nan")
    out = empty_output(x, case.out_channels)
    run_kernel(x[1:4], weights, case, out=out[1:4])
    assert out[1:4].isfinite().all()
    assert torch.equal(out[1:4], expected)
    assert out[[0, 4]].isnan().all()


@pytest.mark.parametrize("case", [replace(BLOCKS[1], batch=5), replace(BLOCKS[0].wide, batch=5)], ids=str)
def test_an_image_does_not_change_its_neighbours(case, random_mbconv_weights, few_processors):
    """Not by what it leaves in the workspace either, whatever is in one of them."""
    weights, x = case.weights(random_mbconv_weights), case.input()
    expected = run_kernel(x, weights, case)
    assert expected.isfinite().all()
    for index in range(case.batch):
        poisoned = x.clone(memory_format=torch.channels_last)
        poisoned[index] = float("nan")
        others = [other for other in range(case.batch) if other != index]
        assert torch.equal(run_kernel(poisoned, weights, case)[others], expected[others])


def test_sums_are_fp32(random_mbconv_weights):
    """The sums of a pool leave the range of fp16, and partial sums of the expansion too."""
    case = Case(1, 32, 64, 32, (36, 36), 6, activation="relu")
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


CHAIN_CASES = [replace(BLOCKS[4], batch=140), replace(BLOCKS[6].wide, batch=140)]


@pytest.mark.parametrize("case", CHAIN_CASES, ids=str)
def test_kernels_overlap_without_races(case, random_mbconv_weights):
    """A kernel may start before the one ahead has finished: blocks back to back are as right as one at a time."""
    weights, x = case.weights(random_mbconv_weights), case.input()
    packed = kernels.pack(weights, case.planned, x.dtype, x.device)

    def chain(synchronize):
        inputs, outs = [x.clone(memory_format=torch.channels_last) for _ in range(2)], []
        for index in range(CHAIN):
            outs.append(run_kernel(inputs[index % 2], weights, case, packed))
            if synchronize:
                torch.cuda.synchronize()
            # The next input has what was just written, in a corner.
            height, width = outs[-1].shape[2:]
            inputs[(index + 1) % 2][:, :, :height, :width] = 0.25 * outs[-1]
        return torch.stack(outs)

    expected = chain(synchronize=True)
    assert expected.isfinite().all()
    for _ in range(3):
        assert torch.equal(chain(synchronize=False), expected)


def test_two_streams_at_once(random_mbconv_weights):
    """No program waits for another, so kernels that share the processors neither hang nor disturb each other."""
    random = Random(0)
    blocks = [*(BLOCKS[index] for index in (0, 3, 4, 9)), *WIDE_BLOCKS[:2]]
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


@pytest.fixture
def fused(random_mbconv_weights):
    """`(case) -> ` the module that runs the kernel with the tile that the planner has for it."""

    def make(case):
        options = {"activation": case.activation, "squeeze_activation": case.squeeze_activation, "blur": False}
        return FusedMBConvDown(case.weights(random_mbconv_weights), **options, tuner=partial(plan_block, kernel=KERNEL))

    return make


MODULE_CASES = [
    Case(5, 40, 240, 80, (28, 28), 10, kernel_size=5),
    Case(140, 24, 96, 40, (36, 36), 6, dtype=BRAIN),
    Case(5, 72, 288, 72, (21, 33), 18, activation="relu", squeeze_activation="silu"),
]


@pytest.mark.parametrize("case", MODULE_CASES, ids=str)
def test_a_module_takes_the_kernel(case, fused, assert_within_rule):
    """Calls after the first one launch again what it has launched, with other inputs."""
    module = fused(case)
    for seed in range(3):
        x = case.input(seed)
        plan = module.plan(x)
        assert plan.kernel == KERNEL and isinstance(plan.tile, MBConvDownWindowsHopperTile)
        out = module(x)
        assert torch.equal(run_op(x, module.weights, case, plan.tile), out)
        exact = apply_reference(x.double(), module.weights, case)
        assert_within_rule(out, apply_reference(x, module.weights, case), exact)


def test_a_cuda_graph_replays_with_other_inputs(fused):
    case = MODULE_CASES[0]
    module, smaller = fused(case), replace(case, size=(19, 9))
    graphs = CudaGraphs(module)
    with torch.no_grad():
        for seed in range(3):
            for each in (case, smaller):
                x = each.input(seed)
                assert torch.equal(graphs(x), module(x))
    assert graphs.graphs == 2

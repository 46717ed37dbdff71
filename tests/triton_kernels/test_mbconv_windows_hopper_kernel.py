"""The MBConv kernel for larger images on a GPU of compute capability 9.0: Triton's interpreter does not know Gluon."""

import time
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from random import Random

import pytest
import torch

from fusion import kernels
from fusion.cuda_graphs import CudaGraphs
from fusion.mbconv_windows_hopper_op import mbconv_windows_hopper as mbconv_windows_hopper_op
from fusion.modules import FusedMBConv
from fusion.planner.blocks import mbconv as mbconv_graph
from fusion.planner.match import match_mbconv, options_of
from fusion.planner.mbconv_windows_hopper_tile import MBConvWindowsHopperTile, candidate_tiles, why_invalid
from fusion.planner.plan import plan_block
from fusion.planner.processor import PROCESSORS
from fusion.reference import mbconv
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
    batch: int
    channels: int
    hidden: int
    out_channels: int
    size: tuple[int, int]
    squeeze: int
    tile: tuple[int, int, int, int] = (4, 8, 64, 4)
    activation: str = "silu"
    dtype: torch.dtype = torch.float16
    squeeze_activation: str = "relu"
    kernel_size: int = 3

    def __str__(self):
        channels = f"{self.channels}-{self.hidden}-{self.out_channels}s{self.squeeze}"
        image = "x".join(map(str, (self.batch, *self.size)))
        activations = f"{self.kernel_size}-{self.activation}-{self.squeeze_activation}"
        return f"{channels}-{image}-{activations}-{','.join(map(str, self.tile))}-{self.dtype_name}"

    @property
    def dtype_name(self):
        return str(self.dtype).removeprefix("torch.")

    @property
    def residual(self):
        return self.out_channels == self.channels

    @property
    def planned(self):
        return MBConvWindowsHopperTile(*self.tile)

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
            squeeze_channels=self.squeeze,
            activation=self.activation,
            squeeze_activation=self.squeeze_activation,
            dtype=self.dtype_name,
            kernel_size=self.kernel_size,
        )
        return match_mbconv(graph)

    def input(self, device="cuda", seed=0):
        torch.manual_seed(sum(self.size) + self.channels + seed)
        x = torch.randn(self.batch, self.channels, *self.size).to(device, self.dtype)
        return x.contiguous(memory_format=torch.channels_last)

    def weights(self, random_mbconv_weights):
        sizes = self.channels, self.hidden, self.out_channels, self.squeeze
        return random_mbconv_weights(*sizes, kernel_size=self.kernel_size)


BLOCKS = [
    # Channels that fill their slabs and that do not; hidden channels of one sweep and of several, that fill the last
    # one and do not; squeeze vectors that fill their padding and do not. Images of one window and of several, that fill
    # rows, columns and passes and that do not, down to less than a piece.
    Case(1, 24, 144, 24, (17, 19), 6, (4, 8, 32, 3)),
    Case(2, 72, 288, 72, (18, 18), 18, (2, 8, 64, 2)),
    Case(3, 144, 576, 144, (21, 33), 36, (4, 8, 64, 2)),
    Case(2, 40, 240, 80, (28, 28), 10, (4, 8, 64, 4)),
    Case(1, 24, 96, 24, (56, 56), 6, (4, 16, 64, 4)),
    Case(2, 16, 64, 16, (61, 20), 4, (2, 16, 32, 8)),
    Case(2, 32, 128, 32, (14, 30), 8, (4, 16, 32, 6)),
    Case(1, 8, 64, 8, (5, 100), 4, (2, 8, 32, 6)),
    Case(140, 24, 96, 24, (18, 18), 6, (4, 16, 64, 6)),
    Case(2, 104, 624, 128, (18, 18), 26, (4, 16, 32, 4)),
    Case(1, 64, 256, 200, (35, 36), 16, (2, 16, 32, 2)),
    Case(2, 8, 8, 8, (2, 3), 1, (4, 8, 32, 2)),
    Case(2, 16, 48, 16, (1, 40), 3, (2, 16, 64, 3)),
]
CASES = [
    *BLOCKS,
    *(replace(block, activation="relu", dtype=torch.bfloat16) for block in BLOCKS),
    replace(BLOCKS[0], activation="relu"),
    replace(BLOCKS[3], activation="relu"),
    replace(BLOCKS[2], dtype=torch.bfloat16),
    replace(BLOCKS[6], dtype=torch.bfloat16),
    # 5x5 convolutions, of small images too.
    *(replace(BLOCKS[index], kernel_size=5) for index in (0, 1, 3, 4, 5, 6, 7, 8, 11, 12)),
    replace(BLOCKS[3], kernel_size=5, activation="relu", dtype=torch.bfloat16),
    Case(2, 80, 480, 112, (14, 14), 20, (2, 16, 32, 4), kernel_size=5, squeeze_activation="silu"),
    Case(3, 40, 160, 40, (7, 7), 10, (4, 8, 64, 2), kernel_size=5, activation="relu"),
    Case(3, 64, 256, 64, (32, 32), 16, (4, 16, 64, 2), kernel_size=5),
    # No masks, with an even and an odd number of sweeps.
    Case(3, 64, 256, 64, (32, 32), 16, (4, 16, 64, 2)),
    Case(3, 24, 72, 40, (20, 6), 6, (2, 8, 32, 4)),
    # The other activation inside of squeeze-and-excitation.
    Case(2, 128, 512, 128, (32, 32), 100, (4, 8, 32, 2), squeeze_activation="silu"),
    Case(2, 40, 136, 24, (19, 9), 33, (2, 16, 32, 4), activation="relu", squeeze_activation="silu"),
]


def empty_output(x, channels):
    """Full of NaN."""
    out = torch.full((x.shape[0], channels, *x.shape[2:]), float("nan"), dtype=x.dtype, device=x.device)
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
    options = case.activation, case.squeeze_activation, case.residual
    return mbconv_windows_hopper_op(x, *packed, *sizes, *options, tile.to_ints())


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


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_reference(case, random_mbconv_weights, assert_within_rule, workspaces):
    """Whatever is in memory before. The operator launches the same."""
    x, weights, out = check(case, random_mbconv_weights, assert_within_rule)
    assert torch.equal(run_op(x, weights, case), out)
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    assert workspaces == [case.workspace(processors)] * 3, "one for all launches of a call"


ONE_PIXEL_CASES = [
    Case(1, 8, 8, 8, (18, 8), 3, (4, 8, 32, 2), activation="relu"),
    Case(1, 8, 8, 8, (19, 9), 3, (2, 8, 32, 2), activation="relu"),
    Case(1, 8, 8, 8, (33, 7), 3, (4, 16, 32, 2), activation="relu"),
    Case(1, 8, 8, 8, (45, 6), 3, (2, 16, 32, 2), activation="relu"),
    Case(1, 8, 8, 8, (5, 42), 3, (4, 8, 32, 2), activation="relu"),
    Case(1, 8, 8, 8, (19, 9), 3, (2, 8, 32, 2), activation="relu", kernel_size=5),
    Case(1, 8, 8, 8, (33, 8), 3, (4, 16, 32, 2), activation="relu", kernel_size=5),
]


@pytest.mark.parametrize("case", ONE_PIXEL_CASES, ids=str)
def test_every_pixel_is_in_its_place(case, random_mbconv_weights):
    """An input of one pixel after the other, the images of a batch: a wrong row, column, window or pass shows."""
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


TILE_CASES = [
    Case(5, 72, 288, 72, (18, 18), 18),
    Case(3, 144, 576, 144, (21, 33), 36, activation="relu", dtype=torch.bfloat16),
    Case(2, 64, 256, 200, (35, 36), 16),
    Case(3, 40, 240, 40, (28, 28), 10, kernel_size=5),
]


@pytest.mark.parametrize("case", TILE_CASES, ids=str)
def test_candidate_tiles(case, random_mbconv_weights, assert_within_rule):
    """A compiler may break one tile and spare all others."""
    from fusion.probe import processor_of

    tiles = list(candidate_tiles(case.shape(), processor_of()))
    assert tiles
    for tile in tiles:
        check(replace(case, tile=tuple(tile.to_ints())), random_mbconv_weights, assert_within_rule)


LAUNCH_CASES = [
    Case(7, 24, 72, 24, (18, 18), 6, (4, 8, 32, 4)),
    Case(5, 40, 240, 80, (28, 28), 10, (4, 8, 64, 4)),
    Case(5, 144, 576, 144, (21, 33), 36, (2, 8, 32, 6)),
    Case(7, 16, 136, 16, (1, 40), 3, (2, 16, 64, 3)),
    Case(5, 24, 96, 24, (56, 56), 6, (4, 16, 64, 4), dtype=torch.bfloat16),
    Case(5, 40, 136, 40, (19, 9), 10, (2, 8, 64, 4), kernel_size=5),
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


@pytest.mark.parametrize("case", [*LAUNCH_CASES, *BLOCKS[5:8]], ids=str)
def test_reads_nothing_of_the_workspace_that_it_has_not_written(
    case, random_mbconv_weights, few_processors, workspaces, monkeypatch
):
    weights, x = case.weights(random_mbconv_weights), case.input()
    packed, out = kernels.pack(weights, case.planned, x.dtype, x.device), empty_output(x, weights.out_channels)
    run_kernel(x, weights, case, packed, out)
    assert workspaces == [case.workspace(FEW_PROCESSORS)], "one for all launches"
    monkeypatch.undo()
    assert out.isfinite().all()
    assert torch.equal(run_kernel(x, weights, case, packed), out)


@pytest.fixture
def same_memory(monkeypatch):
    """Launches have their workspaces in the same memory, one after the other."""
    memory = torch.empty(2**26, dtype=torch.uint8, device="cuda")

    def shared(like, shape, dtype=None):
        return memory.view(dtype or like.dtype)[: prod(shape)].view(shape)

    monkeypatch.setattr(mbconv_hopper_launch, "scratch", shared)


@pytest.mark.parametrize("large", [float("nan"), float("inf"), 1.0], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case(5, 24, 72, 24, (17, 19), 6, (4, 8, 32, 3)),
        Case(3, 40, 240, 80, (19, 9), 10, (2, 16, 64, 2)),
        Case(3, 40, 240, 40, (2, 3), 10, (4, 8, 64, 4)),
        Case(3, 40, 240, 40, (17, 18), 10, (4, 8, 64, 4), kernel_size=5),
    ],
    ids=str,
)
def test_what_a_larger_image_has_left_in_the_workspace_does_not_matter(
    case, large, random_mbconv_weights, few_processors, same_memory
):
    weights, x = case.weights(random_mbconv_weights), case.input()
    larger = replace(case, size=(40, 36))
    runs = [run_kernel(x, weights, case)]
    run_kernel(large * larger.input(), weights, larger)
    runs.append(run_kernel(x, weights, case))
    assert runs[0].isfinite().all()
    assert torch.equal(*runs)


@pytest.mark.parametrize(
    "size, tile",
    [
        ((32, 32), (4, 16, 32, 2)),
        ((18, 18), (4, 8, 64, 2)),
        ((19, 9), (2, 16, 32, 3)),
        ((2, 3), (4, 8, 32, 2)),
        ((5, 50), (2, 8, 32, 6)),
    ],
    ids=str,
)
@pytest.mark.parametrize("out_channels", [24, 32, 72])
def test_reads_and_writes_its_own_images_only(out_channels, size, tile, random_mbconv_weights):
    """What lies before and after the images in memory is neither read nor written, even if a program has room."""
    case = Case(5, 24, 72, out_channels, size, 6, tile)
    weights, x = case.weights(random_mbconv_weights), case.input()
    expected = run_kernel(x[1:4].clone(memory_format=torch.channels_last), weights, case)
    x[[0, 4]] = float("nan")
    out = empty_output(x, out_channels)
    run_kernel(x[1:4], weights, case, out=out[1:4])
    assert out[1:4].isfinite().all()
    assert torch.equal(out[1:4], expected)
    assert out[[0, 4]].isnan().all()


NEIGHBOUR_CASES = [
    Case(5, 24, 72, 24, (18, 18), 6, (4, 8, 32, 4)),
    Case(5, 24, 384, 40, (32, 32), 6, (4, 16, 64, 4)),
    Case(5, 24, 192, 24, (19, 9), 6, (2, 8, 32, 2)),
    Case(5, 24, 72, 24, (18, 18), 6, (4, 8, 32, 4), kernel_size=5),
]


@pytest.mark.parametrize("activation", ["silu", "relu"])
@pytest.mark.parametrize("case", NEIGHBOUR_CASES, ids=str)
def test_an_image_does_not_change_its_neighbours(case, activation, random_mbconv_weights, few_processors):
    """Not by what it leaves in the workspace either, whatever is in one of them."""
    case = replace(case, activation=activation)
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
    case = Case(1, 32, 64, 32, (18, 18), 6, activation="relu")
    weights, x = fp32_case(case, random_mbconv_weights, "cuda")
    exact = apply_reference(x.double(), weights, case)
    out = run_kernel(x, weights, case)
    assert ((out.double() - exact).norm() / exact.norm()).item() < 2e-3


def fp32_case(case, random_mbconv_weights, device):
    weights = case.weights(random_mbconv_weights)
    weights.expand[:, :16] = 1.0
    weights.expand[:, 16:] = -1.0
    weights.expand[:, 0] += 0.5
    x = torch.full_like(case.input(device), 8192.0)
    largest = torch.finfo(x.dtype).max
    identity = {"project": torch.eye(64, dtype=torch.float64), "project_bias": torch.zeros(64, dtype=torch.float64)}
    hidden = apply_reference(x.double(), replace(weights, **identity), replace(case, out_channels=64))
    assert 16 * x.max().item() > largest
    assert hidden.max() < largest < hidden.sum((2, 3)).max()
    return weights, x


CHAIN_CASES = [
    Case(140, 40, 240, 40, (28, 28), 10, (4, 8, 64, 4)),
    Case(140, 128, 512, 128, (18, 18), 32, (4, 16, 64, 2)),
    Case(3, 24, 72, 24, (19, 9), 6, (2, 8, 32, 3)),
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
    blocks = [BLOCKS[index] for index in (0, 1, 3, 4, 6, 9)]
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
        options = {name: getattr(case, name) for name in ("activation", "residual", "squeeze_activation")}
        tuner = partial(plan_block, kernel="mbconv_windows_hopper")
        return FusedMBConv(case.weights(random_mbconv_weights), **options, tuner=tuner)

    return make


MODULE_CASES = [
    Case(5, 40, 240, 40, (28, 28), 10),
    Case(140, 24, 96, 40, (18, 18), 6),
    Case(5, 72, 288, 72, (21, 33), 18, activation="relu", squeeze_activation="silu"),
    Case(5, 40, 240, 40, (14, 14), 10, kernel_size=5),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", MODULE_CASES, ids=str)
def test_a_module_takes_the_kernel(case, dtype, fused, assert_within_rule):
    """Calls after the first one launch again what it has launched, with other inputs."""
    case = replace(case, dtype=dtype)
    module = fused(case)
    for seed in range(3):
        x = case.input(seed=seed)
        plan = module.plan(x)
        assert plan.kernel == "mbconv_windows_hopper" and isinstance(plan.tile, MBConvWindowsHopperTile)
        out = module(x)
        assert torch.equal(run_op(x, module.weights, case, plan.tile), out)
        exact = apply_reference(x.double(), module.weights, case)
        assert_within_rule(out, apply_reference(x, module.weights, case), exact)


@pytest.mark.parametrize("case", MODULE_CASES, ids=str)
def test_a_cuda_graph_replays_with_other_inputs(case, fused):
    module = fused(case)
    graphs, smaller = CudaGraphs(module), replace(case, size=(19, 9))
    with torch.no_grad():
        for seed in range(3):
            for each in (case, smaller):
                x = each.input(seed=seed)
                assert torch.equal(graphs(x), module(x))
    assert graphs.graphs == 2


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

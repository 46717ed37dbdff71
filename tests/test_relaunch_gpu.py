"""Launches made again compute what the operators do, for every input that comes after another one.

Under `recording()` operators run: they tell what is right.
"""

import copy
import threading

import pytest
import torch
import triton
from torch import nn

import fusion
from fusion.launch_record import recording
from fusion.modules import FusedBlock
from fusion.relaunch import launch_key
from fusion.stage import FusedStage
from models import ConvFirst, MBConv

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(not triton.__version__.startswith("3.6."), reason="made for Triton 3.6"),
]

SHAPES = ((2, 64, 64), (1, 64, 64), (5, 33, 47), (3, 64, 32))


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module", params=[False, True], ids=["fastest", "portable"])
def network(request, small_network):
    """All kinds of blocks, of kernels of the GPU's own and of those for every GPU; nothing that is not fused."""
    model = small_network()
    layers = nn.Sequential(model.stem, model.stages, model.head).eval()
    return fusion.fuse(layers, dtype=torch.half, device="cuda", portable=request.param)


@pytest.fixture
def ordered():
    """Equal inputs give equal bits, and what kernels leave out is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def mbconvs():
    """Fused blocks that run on one kernel each, or on the same one."""

    def make(count=2, channels=32, portable=False):
        torch.manual_seed(0)
        blocks = [MBConv(channels, channels, expansion=2).eval().requires_grad_(False) for _ in range(count)]
        fused = fusion.fuse(nn.Sequential(*blocks).eval(), dtype=torch.half, device="cuda", portable=portable)
        return fused.module

    return make


def images(shape, channels=3, seed=0, device="cuda"):
    batch, height, width = shape
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(batch, channels, height, width, device=device, generator=generator).half()
    return x.contiguous(memory_format=torch.channels_last)


def by_operators(module, x):
    with recording() as launches:
        out = module(x)
    assert launches
    return out


def same(module, x):
    assert torch.equal(module(x), by_operators(module, x))


def unaligned(x):
    """The same at an address that is no multiple of 16 bytes."""
    room = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:]
    twin = room.as_strided(x.shape, x.stride())
    assert twin.data_ptr() % 16
    return twin.copy_(x)


@pytest.fixture
def operators_run(monkeypatch):
    """The blocks that call their operator."""
    ran, run = [], FusedBlock.run

    def counted(self, *args):
        ran.append(self)
        return run(self, *args)

    monkeypatch.setattr(FusedBlock, "run", counted)
    return ran


def test_networks_launch_again_with_other_inputs(network, ordered, operators_run):
    for seed in range(3):
        for shape in SHAPES:
            same(network, images(shape, seed=seed))
    operators_run.clear()
    for shape in SHAPES:
        network(images(shape))
    assert not operators_run


def test_bfloat16_and_float16_take_turns(small_network, ordered):
    network = fusion.fuse(small_network().stages, dtype=torch.half, device="cuda")
    for dtype in (torch.half, torch.bfloat16) * 2:
        same(network, images((2, 32, 32), 8).to(dtype))


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (3, 3)], ids=str)
@pytest.mark.parametrize("portable", [False, True])
def test_thin_images_and_single_ones(size, portable, mbconvs, ordered):
    torch.manual_seed(0)
    block = ConvFirst(32, 32, expansion=2).eval().requires_grad_(False)
    convfirst = fusion.fuse(nn.Sequential(block).eval(), dtype=torch.half, device="cuda", portable=portable).module
    for network in (convfirst, mbconvs(portable=portable)):
        for batch in (1, 4, 1, 2):
            for seed in range(2):
                same(network, images((batch, *size), 32, seed))


def test_other_formats_and_addresses_after_channels_last(network, ordered):
    for _ in range(2):
        x = images((2, 64, 64))
        for twin in (x, x.contiguous(), unaligned(x), unaligned(x.contiguous())):
            same(network, twin)  # the stem reads contiguous images in another order
        wide = images((4, 64, 64))
        same(network, wide[1:3])
        same(network, wide[::2])


def test_stages_take_other_formats_too(mbconvs, ordered):
    chain = mbconvs()
    x = images((2, 9, 9), 32)
    expected = by_operators(chain, x)
    for twin in (x, x.contiguous(), unaligned(x)) * 3:
        assert torch.equal(chain(twin), expected)


def test_gradients_are_refused_after_launches_without(mbconvs):
    chain = mbconvs(1)
    x = images((2, 9, 9), 32)
    for _ in range(2):
        chain(x)
    x.requires_grad_()
    chain(x)  # nothing needs one under no_grad
    with torch.enable_grad(), pytest.raises(RuntimeError, match="inference operator and has no gradient"):
        chain(x)


def test_deterministic_mode_is_obeyed_whenever_it_is_on(mbconvs):
    (block,) = mbconvs(1, portable=True)
    x = images((4, 14, 14), 32)
    try:
        for mode in (False, True) * 3:
            torch.use_deterministic_algorithms(mode)
            out = block(x)
            if mode:
                assert torch.equal(out, by_operators(block, x)) and torch.equal(out, block(x))
            relaunch = block.relaunch(x)
            names = {launch._compiled.name for launch in relaunch._launches}
            assert len(names) == 2 and bool(relaunch._zeroed) != mode
    finally:
        torch.use_deterministic_algorithms(False)


def test_threads_and_streams(network, ordered):
    inputs = [images(shape, seed=seed) for shape in SHAPES for seed in range(2)]
    expected = [by_operators(network, x) for x in inputs]
    torch.cuda.synchronize()
    wrong = []

    def work(start):
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            for at in [(start + step) % len(inputs) for step in range(40)]:
                out = network(inputs[at])
                if not torch.equal(out, expected[at]):
                    wrong.append(at)

    threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("portable", [False, True])
def test_weights_that_are_packed_again_in_place(portable, mbconvs, ordered):
    chain = mbconvs(3, portable=portable)
    x = images((2, 8, 8), 32)
    before = [chain(x) for _ in range(2)][1]
    for block in chain:
        block.weights.project.mul_(0.5)
    chain.repack()
    same(chain, x)
    assert not torch.equal(chain(x), before)


def test_plans_from_elsewhere_take_effect(mbconvs, ordered, operators_run):
    chain = mbconvs(3)
    x = images((2, 8, 8), 32)
    for _ in range(2):
        chain(x)
    operators_run.clear()
    for block in chain:
        ((device, plan),) = block.plans
        block.adopt_plan(device, plan)
    chain(x)
    assert operators_run
    same(chain, x)


def test_hooks_on_blocks_are_called(mbconvs, ordered):
    chain = mbconvs(3)
    x = images((2, 8, 8), 32)
    expected = [chain(x) for _ in range(2)][1]
    seen = []
    handle = chain[1].register_forward_hook(lambda module, args, out: seen.append(out))
    for count in (1, 2):
        assert torch.equal(chain(x), expected) and len(seen) == count
    handle.remove()
    assert torch.equal(chain(x), expected) and len(seen) == 2


def test_micro_batches(mbconvs, ordered):
    stage = FusedStage(mbconvs(2), micro_batch=2)
    for _ in range(3):
        for batch in (5, 4, 1):
            same(stage, images((batch, 8, 8), 32))


def test_cuda_graphs_capture_launches(network, ordered):
    x = images((2, 64, 64))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            network(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = network(x)
    for seed in (1, 2):
        x.copy_(images((2, 64, 64), seed=seed))
        graph.replay()
        assert torch.equal(out, by_operators(network, x))


def test_compiled_networks_see_operators(network, ordered):
    x = images((2, 64, 64))
    for _ in range(2):
        network(x)
    seen = []

    def backend(graph_module, inputs):
        seen.extend(node.target for node in graph_module.graph.nodes)
        return graph_module.forward

    compiled = torch.compile(network.module, backend=backend, fullgraph=True)
    assert torch.equal(compiled(x), by_operators(network, x))
    assert any("fusion." in str(target) for target in seen)


def test_copies_have_their_own(mbconvs, ordered):
    chain = mbconvs(2)
    x = images((2, 8, 8), 32)
    expected = [chain(x) for _ in range(2)][1]
    twin = copy.deepcopy(chain)
    assert torch.equal(twin(x), expected)
    for block in chain:
        block.weights.project.zero_()
    chain.repack()
    assert torch.equal(twin(x), expected) and not torch.equal(chain(x), expected)


def test_traces_and_modes_see_operators(mbconvs):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Names(TorchDispatchMode):
        seen: list[str]

        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            self.seen.append(str(operator))
            return operator(*args, **(kwargs or {}))

    chain = mbconvs(1)
    x = images((2, 8, 8), 32)
    for _ in range(2):
        chain(x)
    with Names() as mode:
        mode.seen = []
        chain(x)
    assert any(name.startswith("fusion.mbconv") for name in mode.seen)
    assert launch_key(x) is not None and launch_key(nn.Parameter(x, requires_grad=False)) is None


@pytest.mark.parametrize("portable", [False, True])
def test_memory_is_given_back(portable, mbconvs):
    """What launches again keeps weights, but neither inputs, nor outputs, nor scratch memory."""
    chain = mbconvs(2, portable=portable)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        chain(images((8, 32, 32), 32))
    torch.cuda.synchronize()
    packed = [each for holder in (*chain, *chain.parts) for each in holder.layouts.values()]
    weights = [tensor for each in packed for tensor in each.tensors()]
    kept = sum(-(-weight.nbytes // 512) * 512 for weight in weights)
    assert torch.cuda.memory_allocated() - before <= kept


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_each_gpu_runs_its_own_kernels(mbconvs, ordered):
    chain = mbconvs(2)
    for seed in range(3):
        for device in ("cuda:0", "cuda:1"):
            x = images((2, 8, 8), 32, seed, device)
            for current in (0, 1):
                with torch.cuda.device(current):
                    out = chain(x)
                assert out.device == x.device and torch.equal(out, by_operators(chain, x))

"""`torch.export` of fused modules: what the programs compute, for which batches, and what is in them."""

import inspect
import io
from functools import partial
from importlib import import_module

import pytest
import torch
from torch import nn
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import Dim, export
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

import fusion
from fusion import kernels
from fusion.modules import FusedBlock
from fusion.planner.families import CONVFIRST_DOWN, HEAD, MBCONV, MBCONV_DOWN, PORTABLE, STEM
from fusion.planner.plan import plan_block
from models import ConvBnAct, ConvFirst, Ffn, MBConv, PooledHead

HAS_GPU = torch.cuda.is_available()

BLOCKS = {
    "convfirst": lambda: ConvFirst(16, 16, expansion=2),
    "convfirst_down": lambda: ConvFirst(16, 24, expansion=2, stride=2),
    "mbconv": lambda: MBConv(16, 16, expansion=2),
    "mbconv_down": lambda: MBConv(16, 24, expansion=2, stride=2),
    "ffn": lambda: Ffn(16, 16, expansion=2),
    "stem": lambda: ConvBnAct(3, 16, 3, stride=2),
    "head": lambda: PooledHead(16, 24),
}
"""By the name of the kernel family that runs them anywhere, if one does."""


@pytest.fixture(autouse=True)
def deterministic():
    """Equal inputs give equal bits."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def images(device):
    """`(batch=3, channels=16) -> [N, C, 9, 8]` in a dtype that kernels take on the device."""

    def make(batch=3, channels=16):
        generator = torch.Generator().manual_seed(batch)
        return torch.randn(batch, channels, 9, 8, generator=generator).to(device, torch.half if HAS_GPU else None)

    return make


@pytest.fixture
def fuse(images, device):
    """`(network, x, **options) -> FusedModule` for the device, all of whose plans have the tiles of those for `x`."""

    def with_tile(graph, processor, tile):
        return plan_block(graph, processor, tile)

    def make(network, x, **options):
        torch.manual_seed(0)
        fused = fusion.fuse(network.eval(), x, dtype=x.dtype, device=device, **options)
        for block in fused.modules():
            if isinstance(block, FusedBlock) and block.plans:
                ((_, plan),) = block.plans
                block.tuner = partial(with_tile, tile=plan.tile)
        return fused

    return make


def chain():
    blocks = ConvFirst(16, 16, expansion=2), MBConv(16, 16, expansion=2), MBConv(16, 16, expansion=2)
    return nn.Sequential(*blocks, nn.Conv2d(16, 16, 1), MBConv(16, 24, expansion=2, stride=2), PooledHead(24, 32))


def operators(program):
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


def assert_equal(program, module, *inputs):
    with torch.no_grad():
        for x in inputs:
            assert torch.equal(program.module()(x), module(x)), f"batch of {len(x)}"


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_takes_any_batch(name, portable, strict, images, fuse):
    x = images(channels=3 if name == "stem" else 16)
    fused = fuse(BLOCKS[name](), x, portable=portable)
    program = export(fused.module, (x,), dynamic_shapes={"x": {0: Dim("batch")}}, strict=strict)
    assert_equal(program, fused, *(images(batch, x.shape[1]) for batch in (3, 1, 2, 5, 70)))
    if portable and name != "ffn":
        assert operators(program) == [f"fusion.{name}.default"], "weights are constants, packed already"


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("micro_batch", [None, 2, "auto"])
def test_a_chain_with_stages_takes_any_batch_at_once(micro_batch, strict, images, fuse, device):
    x = images()
    network = chain().eval()
    fused = fusion.fuse(network, dtype=x.dtype, device=device, micro_batch=micro_batch)
    whole = fuse(network, x)
    for dynamic_shapes in (None, {"args": ({0: Dim("batch")},)}):
        program = export(fused, (x,), dynamic_shapes=dynamic_shapes, strict=strict)
        assert not {"aten.split.Tensor", "aten.cat.default"}.intersection(operators(program))
        assert_equal(program, whole, *(images(batch) for batch in ((3, 1, 2, 5) if dynamic_shapes else (3,))))


def test_compiled_but_not_exported_chains_keep_their_micro_batches(images, device):
    x = images()
    fused = fusion.fuse(chain().eval(), dtype=x.dtype, device=device, micro_batch=2)
    graphs = []
    compiled = torch.compile(fused, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    with torch.no_grad():
        assert torch.equal(compiled(x), fused(x))
    assert any("split" in str(node.target) for node in graphs[0].graph.nodes)


@pytest.mark.parametrize("portable", [False, True])
def test_a_network(portable, small_network, fuse, device):
    network = small_network()
    network.classifier = nn.Identity()  # cuBLAS is not deterministic by itself
    generator = torch.Generator().manual_seed(0)
    x, *others = (
        torch.randn(n, 3, 38, 34, generator=generator).to(device, torch.half if HAS_GPU else None) for n in (2, 1, 3)
    )
    fused = fuse(network, x, portable=portable)
    assert_equal(export(fused, (x,)), fused, x)
    if portable:
        program = export(fused.module, (x,), dynamic_shapes={"x": {0: Dim("batch")}})
        assert_equal(program, fused, x, *others)


def test_a_module_without_plans_is_exported_and_called_later(images):
    fused = fusion.fuse(BLOCKS["convfirst"]().eval())
    x = images()
    program = export(fused, (x,), dynamic_shapes={"args": ({0: Dim("batch")},)})
    assert_equal(program, fused, x)
    (packed,) = fused.module.layouts.values()
    constants = program.constants.values()
    assert not any(isinstance(tensor, FakeTensor) for tensor in (*packed.tensors(), *constants))
    assert all(any(torch.equal(tensor, constant) for constant in constants) for tensor in packed.tensors())


def test_unpacked_weights_of_a_head_are_constants_too(images, fuse):
    class Features(nn.Module):
        def __init__(self, head):
            super().__init__()
            self.head = head

        def forward(self, x):
            return self.head.features(x)

    features = Features(fuse(BLOCKS["head"](), images()).module)
    program = export(features, (images(),), dynamic_shapes={"x": {0: Dim("batch")}})
    assert_equal(program, features, images(), images(5))


def test_a_program_is_saved_and_loaded(images, fuse):
    x = images()
    fused = fuse(chain(), x)
    buffer = io.BytesIO()
    torch.export.save(export(fused, (x,), dynamic_shapes={"args": ({0: Dim("batch")},)}), buffer)
    buffer.seek(0)
    assert_equal(torch.export.load(buffer), fused, x, images(4))


class Recorder:
    """Stands for a kernel, and records the grids that it is launched with."""

    def __init__(self):
        self.grids = []

    def __getitem__(self, grid):
        self.grids.append(grid)
        return lambda *args, **options: None


@pytest.mark.parametrize(
    "family", [STEM, PORTABLE, CONVFIRST_DOWN, MBCONV, MBCONV_DOWN, HEAD], ids=lambda family: family.name
)
def test_launches_do_not_depend_on_the_example_batch(family):
    """Without a GPU: what torch.export traces when it takes kernels out of their operators."""
    channels = 3 if family is STEM else 16
    block = BLOCKS[family.name]().eval().fused()
    plan = plan_block(block.graph(3, 9, 8, channels, torch.half), "h200", portable=True)
    packed = kernels.pack(block.weights, plan.tile, torch.half, "cpu")
    launch = import_module(f"fusion.triton_kernels.{family.name}").launch
    recorder = Recorder()
    traced = {"kernel": recorder} if "kernel" in inspect.signature(launch).parameters else {"wrap": lambda _: recorder}
    shape_env = ShapeEnv()
    mode = FakeTensorMode(shape_env=shape_env, allow_non_fake_inputs=True)
    any_batch = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC, *[DimDynamic.STATIC] * 3])
    example = torch.empty(3, channels, 9, 8, dtype=torch.half).to(memory_format=torch.channels_last)
    x = mode.from_tensor(example, symbolic_context=any_batch, source=ConstantSource("x"))
    with mode:
        shape = plan.shape
        size = () if family is HEAD else (getattr(shape, "out_height", 9), getattr(shape, "out_width", 8))
        out = x.new_empty((x.shape[0], shape.out_channels, *size))
        options = {name: getattr(block, name) for name in block.OPTIONS}
        wanted = kernels.RUNNERS[family.name].launch_options
        launch(x, *packed.tensors(), out, tile=plan.tile, **{name: options[name] for name in wanted}, **traced)
    assert recorder.grids and shape_env.guards == []
    assert all(any(isinstance(programs, torch.SymInt) for programs in grid) for grid in recorder.grids)
    assert len(recorder.grids) == (2 if family in (MBCONV, MBCONV_DOWN) else 1)

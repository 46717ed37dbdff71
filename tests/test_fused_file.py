"""`FusedModule.save` and `fusion.load`."""

import subprocess
import sys
from collections import OrderedDict, namedtuple
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import fusion
from fusion import fused_file, fusing, kernels
from fusion.cuda_graphs import CudaGraphs
from fusion.down_modules import FusedConvFirstDown
from fusion.edge_modules import FusedEdge
from fusion.ffn_weights import FfnWeights
from fusion.fused_sequential import FusedSequential
from fusion.modules import FusedBlock
from fusion.planner.processor import get_processor
from fusion.stage import FusedStage
from models import ConvFirst, MBConv

Pair = namedtuple("Pair", "first second")


@dataclass(frozen=True)
class Settings:
    scale: float
    kinds: tuple[type, ...]


class Names(list):
    def joined(self):
        return "+".join(self)


class Everything(nn.Module):
    """Attributes of every kind that can be written."""

    def __init__(self):
        super().__init__()
        self.block = ConvFirst(16, 16, expansion=2)
        self.again = self.block
        self.linear = nn.Linear(16, 4)
        self.tied = nn.Linear(16, 4)
        self.tied.weight = self.linear.weight
        self.register_buffer("shift", torch.arange(4.0))
        self.register_buffer("hidden", torch.ones(4), persistent=False)
        self.register_parameter("no_parameter", None)
        self.norm = nn.BatchNorm1d(4)
        self.settings = Settings(0.5, (nn.ReLU, nn.SiLU))
        self.names = Names(["a", "b"])
        self.pair = Pair(1, (2.5, None))
        self.table = OrderedDict([("x", {1, 2}), (3, frozenset({4}))])
        self.dtype, self.device, self.format = torch.float16, torch.device("cpu"), torch.channels_last
        self.size = torch.Size([2, 3])
        self.vector = torch.tensor([1.0, 2.0])
        self.aliases = [self.linear, self.shift, b"bytes", True]

    def forward(self, x):
        y = self.again(self.block(x)).mean((2, 3))
        y = self.norm(self.linear(y) + self.tied(y) * self.hidden) + self.shift
        return y * self.settings.scale


@pytest.fixture
def path(tmp_path):
    return tmp_path / "network.pt"


def images(batch=2, dtype=torch.float32):
    return torch.randn(batch, 3, 37, 33, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.fixture
def no_new_plans(monkeypatch):
    """Fails whoever folds, plans, or packs weights."""

    def refuse(*args, **kwargs):
        raise AssertionError("made anew")

    monkeypatch.setattr(fusing, "plan_block", refuse)
    monkeypatch.setattr(kernels, "pack", refuse)
    monkeypatch.setattr(kernels, "pack_stage", refuse)
    monkeypatch.setattr(FfnWeights, "fold", refuse)
    fusing._plan_once.cache_clear()


def blocks_of(fused):
    return [module for module in fused.modules() if isinstance(module, FusedBlock)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_a_network_comes_back_with_its_plans_and_packed_weights(dtype, small_network, path, request):
    fused = fusion.fuse(small_network(), images(dtype=dtype), dtype=dtype)
    down = next(i for i, block in enumerate(blocks_of(fused)) if isinstance(block, FusedConvFirstDown))
    block = blocks_of(fused)[down]
    ((device, plan),) = block.plans
    block.adopt_plan(device, replace(plan, measured_us=7.5, why="measured fastest"))
    expected = fused(images(dtype=dtype))
    fused.save(path)
    request.getfixturevalue("no_new_plans")
    loaded = fusion.load(path)
    assert torch.equal(loaded(images(dtype=dtype)), expected)
    assert repr(loaded) == repr(fused)
    for twin, block in zip(blocks_of(loaded), blocks_of(fused), strict=True):
        assert [(device, plan.tile) for device, plan in twin.plans] == [(d, plan.tile) for d, plan in block.plans]
        assert twin.layouts.keys() == block.layouts.keys()
    stages = [module for module in loaded.modules() if isinstance(module, FusedSequential)]
    assert any(part.layouts for stage in stages for part in stage.parts if isinstance(part, FusedStage))
    assert blocks_of(loaded)[down].plans[0][1].measured_us == 7.5
    assert 7.5 in [row.measured_us for row in loaded.explain().rows]


def test_other_shapes_and_dtypes_are_planned_and_packed_after_loading(small_network, path):
    network = small_network()
    fusion.fuse(network, images()).save(path)
    loaded = fusion.load(path).double()
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(images(3).double()), network.double()(images(3).double()), rtol=1e-6, atol=1e-6
        )


def test_activations_inside_of_squeeze_and_excitation_come_back(path):
    torch.manual_seed(0)
    network = nn.Sequential(MBConv(16, 16), MBConv(16, 24, stride=2), MBConv(24, 24, squeeze_activation=nn.SiLU)).eval()
    fused, x = fusion.fuse(network), torch.randn(2, 16, 6, 6)
    fused.save(path)
    loaded = fusion.load(path)
    assert [block.squeeze_activation for block in blocks_of(loaded)] == ["relu", "relu", "silu"]
    assert torch.equal(loaded(x), fused(x))
    content = torch.load(path, weights_only=True)
    for module in content["modules"]:
        module.get("arguments", {}).pop("squeeze_activation", None)
    torch.save(content, path)
    assert [block.squeeze_activation for block in blocks_of(fusion.load(path))] == ["relu"] * 3, "as there was no other"


def test_options_and_reasons_come_back(path):
    network = nn.Sequential(MBConv(16, 16), MBConv(16, 16, activation=nn.Mish)).eval()
    options = {"micro_batch": 2, "cuda_graphs": True, "max_graphs": 3}
    fused = fusion.fuse(network, torch.randn(3, 16, 5, 5), **options)
    fused.tune = True
    fused.save(path)
    loaded = fusion.load(path)
    assert loaded.left_eager == fused.left_eager and list(loaded.left_eager) == ["1"]
    assert loaded.module.micro_batch == 2 and loaded.graphs.max_graphs == 3 and loaded.tune
    assert blocks_of(loaded)[0].tuner is fusing.lazy_tuner(tune=True)
    assert torch.equal(loaded(torch.ones(3, 16, 5, 5)), fused(torch.ones(3, 16, 5, 5)))


def test_a_single_block(path):
    fused = fusion.fuse(ConvFirst(16, 16, expansion=2).eval())
    fused.save(path)
    x = torch.randn(1, 16, 5, 5)
    assert torch.equal(fusion.load(path)(x), fused(x))


def test_fused_networks_inside_of_a_network(path):
    inner = fusion.fuse(nn.Sequential(MBConv(16, 16), MBConv(16, 16)).eval(), torch.ones(1, 16, 5, 5), cuda_graphs=True)
    x = torch.randn(2, 16, 5, 5)
    fused = fusion.fuse(nn.Sequential(inner, ConvFirst(16, 16, expansion=2).eval(), CudaGraphs(nn.ReLU())).eval(), x)
    fused.save(path)
    loaded = fusion.load(path)
    assert torch.equal(loaded(x), fused(x))
    assert loaded.graphs is None and loaded.module[0].graphs.module is loaded.module[0].module


def test_what_a_network_may_hold(path):
    torch.manual_seed(0)
    fused = fusion.fuse(Everything().eval())
    fused.save(path)
    loaded = fusion.load(path)
    x = torch.randn(2, 16, 5, 5)
    assert torch.equal(loaded(x), fused(x))
    for name in ("settings", "names", "pair", "table", "dtype", "device", "format", "size"):
        value, expected = getattr(loaded.module, name), getattr(fused.module, name)
        assert value == expected and type(value) is type(expected), name
    assert loaded.names.joined() == "a+b" and loaded.pair.second == (2.5, None)
    module = loaded.module
    assert module.block is module.again and module.tied.weight is module.linear.weight
    assert module.aliases[0] is module.linear and module.aliases[1] is module.shift
    assert module.aliases[2:] == [b"bytes", True]
    assert torch.equal(module.vector, torch.tensor([1.0, 2.0])) and module.no_parameter is None
    assert set(loaded.state_dict()) == set(fused.state_dict())
    assert not any(part.training for part in loaded.modules())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_parts_of_larger_tensors_are_written_without_the_rest(path):
    block = fusion.fuse(nn.Sequential(nn.Linear(4, 4)).eval())
    block.module[0].weight = nn.Parameter(torch.randn(4, 1 << 20)[:, :4], requires_grad=False)
    block.save(path)
    assert path.stat().st_size < 1 << 16
    assert torch.equal(fusion.load(path).module[0].weight, block.module[0].weight)


def test_every_fused_block_can_be_written():
    """Arguments of constructors are attributes of the same name."""
    import inspect

    import fusion.down_modules

    def subclasses(cls):
        return {cls}.union(*map(subclasses, cls.__subclasses__()))

    found = {cls.__name__ for cls in subclasses(FusedBlock)}
    assert {"FusedConvFirst", "FusedConvFirstDown", "FusedMBConv", "FusedMBConvDown", "FusedStem", "FusedHead"} <= found
    for cls in subclasses(FusedBlock):
        assert set(inspect.signature(cls).parameters) <= {"weights", "tuner", *cls.OPTIONS}, cls
    assert issubclass(fusion.edge_modules.FusedStem, FusedEdge)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: setattr(m, "act", lambda x: x),
            r"act is a function, which cannot be written as data",
        ),
        (lambda m: setattr(m[0], "gen", torch.Generator()), r"0.gen is a Generator, which cannot"),
        (lambda m: m[0].register_forward_hook(lambda *_: None), "0 has hooks, which are code"),
        (lambda m: m.register_forward_pre_hook(lambda *_: None), "module has hooks, which are code"),
        (lambda m: m[1].register_forward_hook(lambda *_: None), "1 has hooks"),
        (lambda m: parametrizations.weight_norm(m[0]), r"0 is of class ParametrizedLinear.*remove_parametrizations"),
        (lambda m: m.append(torch.fx.symbolic_trace(nn.ReLU())), r"2 is (a|of class) .*GraphModule"),
        (lambda m: setattr(m[0], "extra", torch.eye(2).to_sparse()), r"0.extra is a Tensor of layout torch.sparse_coo"),
    ],
)
def test_what_is_not_data_is_named(change, message, path):
    fused = fusion.fuse(nn.Sequential(nn.Linear(4, 4), ConvFirst(16, 16, expansion=2)).eval())
    change(fused.module)
    with pytest.raises(ValueError, match=message):
        fused.save(path)
    assert not list(path.parent.iterdir())


def test_local_classes_are_named(path):
    class Local(nn.Module):
        def forward(self, x):
            return x

    with pytest.raises(ValueError, match=r"0 is of class .*Local, which .* does not have under that name"):
        fusion.fuse(nn.Sequential(Local()).eval()).save(path)


def test_a_fresh_process_needs_the_classes_only(small_network, path):
    """It says which are missing, and imports nothing by itself."""
    fused = fusion.fuse(small_network(), images())
    expected = path.with_name("expected.pt")
    torch.save((images(), fused(images())), expected)
    fused.save(path)
    script = f"""
import sys, torch, fusion
assert callable(fusion.fuse)
try:
    fusion.load({str(path)!r})
except ValueError as error:
    assert "needs the classes" in str(error) and "models.convfirstnet.ConvFirstNet" in str(error), error
    assert "import models.convfirstnet" in str(error)
else:
    raise AssertionError
assert "models" not in sys.modules
import models
x, out = torch.load({str(expected)!r})
torch.testing.assert_close(fusion.load({str(path)!r})(x), out)
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(fusion.__file__).parents[1])


def changed(path, **changes):
    content = torch.load(path, weights_only=True)
    torch.save(content | changes, path)


def test_plans_of_another_processor_are_made_anew(small_network, path, monkeypatch):
    fused = fusion.fuse(small_network(), images())
    expected = fused(images())
    fused.save(path)
    monkeypatch.setattr(fused_file, "processor_of_device", lambda device: get_processor("a100"))
    loaded = fusion.load(path)
    assert not any(block.plans or block.layouts for block in blocks_of(loaded))
    torch.testing.assert_close(loaded(images()), expected, rtol=1e-5, atol=1e-6)


def test_plans_of_other_kernels_are_made_anew(small_network, path):
    fused = fusion.fuse(small_network(), images())
    fused.save(path)
    changed(path, kernels="of another version")
    loaded = fusion.load(path)
    assert not any(block.plans or block.layouts for block in blocks_of(loaded))
    torch.testing.assert_close(loaded(images()), fused(images()), rtol=1e-5, atol=1e-6)


def test_files_that_cannot_be_read(small_network, path):
    fused = fusion.fuse(small_network())
    fused.save(path)
    with pytest.raises(FileNotFoundError):
        fusion.load(path.with_name("missing.pt"))
    changed(path, format=2, fusion="9.9")
    with pytest.raises(ValueError, match=r"has format 2 \(fusion 9.9\), this version of fusion .* reads 1; fuse"):
        fusion.load(path)
    torch.save(small_network().state_dict(), path)
    with pytest.raises(ValueError, match=r"no file of FusedModule.save; load a state_dict into the original module"):
        fusion.load(path)
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"no file of FusedModule.save, or is damaged"):
        fusion.load(path)


@pytest.mark.parametrize(
    "changes",
    [{"root": 10_000}, {"tensors": []}, {"modules": [{}]}, {"classes": []}, {"caches": [{"module": 0, "stage": 3}]}],
    ids=str,
)
def test_damaged_files(changes, small_network, path):
    fusion.fuse(small_network(), images()).save(path)
    changed(path, **changes)
    with pytest.raises(ValueError, match="is damaged"):
        fusion.load(path)


class Payload:
    def __reduce__(self):
        return print, ("executed",)


def test_nothing_in_a_file_is_executed(path, capsys):
    torch.save({"magic": fused_file.MAGIC, "payload": Payload()}, path)
    with pytest.raises(ValueError, match="is damaged"):
        fusion.load(path)
    fused = fusion.fuse(nn.Sequential(nn.Linear(2, 2)).eval())
    for name, message in (
        ("builtins:print", "is neither a module, a dataclass nor a container"),
        ("subprocess:Popen", "is neither a module, a dataclass nor a container"),
        ("antigravity:Module", "needs the classes antigravity.Module"),
        ("fusion.unknown:Block", "needs the classes fusion.unknown.Block"),
        ("builtins:list", "list stands where a Module should"),
    ):
        fused.save(path)
        classes = torch.load(path, weights_only=True)["classes"]
        changed(path, classes=[name, *classes[1:]])
        with pytest.raises(ValueError, match=message):
            fusion.load(path)
    assert "antigravity" not in sys.modules
    assert capsys.readouterr().out == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_module_from_a_gpu_needs_one_or_a_device(small_network, path):
    fusion.fuse(small_network(), images()).save(path)
    changed(path, device="cuda")
    with pytest.raises(RuntimeError, match='was saved from a GPU, and there is none; load it with device="cpu"'):
        fusion.load(path)
    assert fusion.load(path, device="cpu")(images()).shape == (2, 10)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_from_a_gpu(small_network, path, request):
    x = images(dtype=torch.half).cuda()
    fused = fusion.fuse(small_network().cuda(), x, dtype=torch.half, cuda_graphs=True)
    expected = fused(x)
    fused.save(path)
    on_cpu = fusion.load(path, device="cpu")
    torch.testing.assert_close(on_cpu(x.cpu()).float(), expected.cpu().float(), rtol=2e-2, atol=2e-2)
    request.getfixturevalue("no_new_plans")
    for device in (None, "cuda", "cuda:0"):
        loaded = fusion.load(path, device)
        with torch.inference_mode():
            torch.testing.assert_close(loaded(x), expected, rtol=1e-2, atol=1e-2)
        assert loaded.graphs.graphs == 1

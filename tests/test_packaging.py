"""`fusion.package`: programs that run without this package."""

import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn

import fusion
from fusion.packaging import OPAQUE_OPERATORS
from fusion.planner.families import FAMILIES
from models import ConvFirst, Ffn, MBConv

HAS_GPU = torch.cuda.is_available()
needs_compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")

RUN = """
import sys
import torch

path, inputs, outputs = sys.argv[1:]
program = torch._inductor.aoti_load_package(path)
with torch.no_grad():
    torch.save([program(x) for x in torch.load(inputs)], outputs)
assert "fusion" not in sys.modules
"""


def blocks(*others):
    torch.manual_seed(0)
    return nn.Sequential(ConvFirst(16, 16, expansion=2), MBConv(16, 16, expansion=2), *others).eval()


def images(batch=2, **options):
    return torch.randn(batch, 16, 9, 8, generator=torch.Generator().manual_seed(batch)).requires_grad_(bool(options))


@pytest.fixture
def compiled(monkeypatch):
    """The programs that would be compiled, and how, instead of compiling them."""
    calls = []

    def compile_and_package(program, *, package_path, inductor_configs):
        calls.append((program, inductor_configs))
        return package_path

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compile_and_package)
    return calls


@needs_compiler
@torch.no_grad()
def test_a_fresh_process_runs_a_package_for_any_batch(device, tmp_path, assert_within_rule):
    network = blocks(nn.Conv2d(16, 8, 1))
    dtype = torch.half if HAS_GPU else torch.float
    inputs = [images(batch).to(device, dtype) for batch in (3, 1, 2, 8)]
    path = tmp_path / "network.pt2"
    options = {"dynamic_batch": True, "dtype": dtype, "device": device}
    quickly = {"aot_inductor.compile_wrapper_opt_level": "O0"}
    assert fusion.package(network, inputs[0], path, inductor_configs=quickly, **options) == str(path)
    torch.save(inputs, tmp_path / "inputs")
    files = path, tmp_path / "inputs", tmp_path / "outputs"
    subprocess.run([sys.executable, "-c", RUN, *map(str, files)], check=True, cwd=tmp_path)
    network.to(device, torch.double)
    exact = [network(x.double()) for x in inputs]
    network.to(dtype)
    for out, x, expected in zip(torch.load(tmp_path / "outputs"), inputs, exact, strict=True):
        assert_within_rule(out, network(x), expected)


@pytest.mark.parametrize("as_example", [lambda x: x, lambda x: (x,), lambda x: {"input": x}])
@pytest.mark.parametrize("dynamic_batch", [False, True])
@torch.no_grad()
def test_what_is_compiled(dynamic_batch, as_example, compiled, tmp_path):
    network, x = blocks(), images()
    options = {"dynamic_batch": dynamic_batch, "inductor_configs": {"max_autotune": True}}
    path = str(tmp_path / "network.pt2")
    for module in (network, fusion.fuse(network, x, portable=True)):
        assert fusion.package(module, as_example(x), path, **options) == path
    arguments = ([], {"input": x}) if isinstance(as_example(x), dict) else ([x], {})
    for program, configs in compiled:
        names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
        assert names == ["fusion.convfirst.default", "fusion.mbconv.default"]
        assert configs == {"max_autotune": True}
        args, kwargs = arguments
        assert torch.equal(program.module()(*args, **kwargs), fusion.fuse(network, x, portable=True)(x))
        if dynamic_batch:
            (sizes,) = program.range_constraints.values()
            assert sizes.upper == 65535


def test_kernels_that_are_not_portable_are_refused(compiled, tmp_path):
    fused = fusion.fuse(blocks(), images())
    with pytest.raises(
        ValueError, match=r"runs fusion::convfirst_hopper.*; pass the original module, or fuse it with po"
    ):
        fusion.package(fused, images(), tmp_path / "network.pt2")
    assert compiled == []


def test_all_operators_are_known_to_be_opaque_or_not():
    for family in FAMILIES:
        operator = getattr(torch.ops.fusion, family.name).default
        assert (operator.name() in OPAQUE_OPERATORS) == (not family.is_portable)


def test_blocks_without_a_portable_kernel_are_packaged_unfused(compiled, tmp_path):
    fusion.package(blocks(Ffn(16, 16, expansion=2)), images(), tmp_path / "network.pt2")
    ((program, _),) = compiled
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert names[:2] == ["fusion.convfirst.default", "fusion.mbconv.default"] and "aten.conv2d.default" in names


@pytest.mark.parametrize(
    "module, example, options, error, message",
    [
        (blocks(), images(), {"path": "network.so"}, ValueError, r"ends with '\.pt2', got 'network\.so'; append that"),
        (blocks(), images(requires_grad=True), {}, RuntimeError, "requires one; pass its detach"),
        (blocks().train(), images(), {}, RuntimeError, "in training mode"),
        (fusion.fuse(blocks(), portable=True), images(), {"tune": True}, ValueError, "fused already, and tune would"),
        (blocks(), images(1), {"dynamic_batch": True}, ValueError, r"2 images or more, got \[1, 16, 9, 8\]"),
        (blocks(), (images(), images(3)), {"dynamic_batch": True}, ValueError, r"first dimension, got \[2, .*\[3, "),
        (blocks(), (images(), torch.zeros(())), {"dynamic_batch": True}, ValueError, r"dimension, got \[2,.*\[\]"),
        (blocks(), 3, {"dynamic_batch": True}, ValueError, "first dimension, got none"),
        ("network", images(), {}, TypeError, r"takes an nn\.Module"),
    ],
)  # fmt: skip
def test_what_is_refused(module, example, options, error, message, compiled):
    with pytest.raises(error, match=message):
        fusion.package(module, example, **{"path": "network.pt2", **options})
    assert compiled == []

"""Where fused blocks would not compute what the model does, and are left alone: gradients, subclasses, autocast."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.testing._internal.two_tensor import TwoTensor

import fusion
from fusion.backend import compile_graph
from fusion.backend.chain import run_chain

FUSE_ALL = {"min_speedup": 0, "strict": True}


def compiled(model):
    return torch.compile(model, backend=compile_graph, options=FUSE_ALL)


def chains_in(graphs):
    return [node for graph in graphs for node in graph.graph.nodes if node.target is run_chain._opoverload]


@pytest.fixture
def block(random_block):
    return random_block(8, 8, expansion=3).double()


@pytest.fixture
def ffn():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(8, 16, 1), nn.ReLU(), nn.Conv2d(16, 8, 1))
    return layers.double().eval().requires_grad_(False)


@pytest.fixture
def x():
    return torch.randn(2, 8, 5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_gradients_that_the_model_turns_on(block, x, uncompiled):
    """In a model that is called without gradients."""

    def saliency(x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(block(x).square().sum(), x)[0]

    def with_gradients(x):
        with torch.enable_grad():
            return block(x)

    block.requires_grad_(True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(saliency)(x), saliency(x))
        assert compiled(with_gradients)(x).requires_grad
    assert not chains_in(uncompiled)


def test_forward_gradients(ffn, x, uncompiled):
    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x + 1)
        ours, eager = (forward_ad.unpack_dual(each(dual)) for each in (compiled(ffn), ffn))
    torch.testing.assert_close(ours.tangent, eager.tangent)
    assert uncompiled and not chains_in(uncompiled)


@pytest.mark.parametrize("transform", [torch.func.jacfwd, torch.func.jacrev, torch.func.vmap])
def test_transforms_of_functions(transform, ffn, x, uncompiled):
    def transformed(x):
        return transform(lambda x: ffn(x).mean((-1, -2)))(x)

    if transform is torch.func.vmap:
        x = x[None]
    with torch.no_grad():
        torch.testing.assert_close(compiled(transformed)(x), transformed(x))
    assert not chains_in(uncompiled)


def test_weights_of_a_subclass(block, x, uncompiled):
    weight = block.expand.weight
    block.expand.weight = nn.Parameter(TwoTensor(weight.data, weight.data.clone()), requires_grad=False)
    out = compiled(block)(x)
    assert isinstance(out, TwoTensor)
    assert not chains_in(uncompiled)


def test_autocast_that_begins_within_a_block(block, uncompiled):
    block.float()
    x = torch.randn(2, 8, 5, 3)

    def model(x):
        y = block.conv_bn(block.conv(x))
        with torch.autocast("cpu", torch.bfloat16):
            return x + block.project_bn(block.project(torch.relu(block.expand_bn(block.expand(y)))))

    assert torch.equal(compiled(model)(x), model(x))
    assert not chains_in(uncompiled)


def test_reset_before_anything_imports_inductor():
    """Its import changes what PyTorch goes through then."""
    script = (
        "import torch\n"
        "from fusion.backend import compile_graph\n"
        "def nothing(x):\n"
        "    torch._dynamo.graph_break()\n"
        "    return x\n"
        "torch.compile(nothing, backend=compile_graph)(torch.ones(1))\n"
        "torch.compiler.reset()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_explanations_do_not_count_among_compilations(block, ffn, x, uncompiled):
    class Broken(nn.Module):
        def __init__(self, first, second):
            super().__init__()
            self.first = first
            self.second = second

        def forward(self, x):
            y = self.first(x)
            torch._dynamo.graph_break()
            return self.second(y)

    model = Broken(block, ffn).eval()
    with torch._dynamo.config.patch(recompile_limit=2):
        for _ in range(4):
            report = fusion.explain(model, {"x": x}, options=FUSE_ALL)
            assert (report.graphs, len(report.fused)) == (2, 2)
        torch.testing.assert_close(compiled(model)(x), model(x), rtol=1e-6, atol=1e-6)
    assert len(chains_in(uncompiled)) == 2


def test_a_model_that_is_compiled_in_place_is_explained(block, x, uncompiled):
    block.compile(backend=compile_graph, options=FUSE_ALL)
    block(x)
    assert len(fusion.explain(block, x, options=FUSE_ALL).fused) == 1

"""Weights that change after compilation, in every way that PyTorch knows, and what keeps packed ones alive."""

import gc
import weakref

import pytest
import torch
from torch import nn

from fusion.backend import chain as chain_module
from fusion.backend import compile_graph, compiled_graph
from models import ConvFirst

FUSE_ALL = {"min_speedup": 0, "strict": True}


def compiled(model, **options):
    return torch.compile(model, backend=compile_graph, options={**FUSE_ALL, **options})


def assert_close(out, expected):
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)


@pytest.fixture
def x():
    return torch.randn(2, 8, 9, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture
def block():
    """`(seed=0) -> models.ConvFirst` of 8 channels, in float64."""

    def make(seed=0):
        torch.manual_seed(seed)
        return ConvFirst(8, 8, expansion=3).eval().double().requires_grad_(False)

    return make


def tensors_of(module):
    return [*module.parameters(), *(each for each in module.buffers() if each.is_floating_point())]


def test_data_that_is_swapped_and_swapped_back(block, x, uncompiled):
    model, other = block(), block(seed=1)
    before, after = model(x), other(x)
    fused = compiled(model)
    for expected in (before, after, before):
        assert_close(fused(x), expected)
        for ours, theirs in zip(tensors_of(model), tensors_of(other), strict=True):
            ours.data, theirs.data = theirs.data, ours.data


def test_data_of_a_single_parameter(block, x, uncompiled):
    model = block()
    fused = compiled(model)
    fused(x)
    model.expand.weight.data = torch.randn_like(model.expand.weight)
    assert_close(fused(x), model(x))


def test_other_parameters_in_the_same_memory_outlive_those_they_replace(block, x, uncompiled):
    model = block()
    fused = compiled(model)
    fused(x)
    old = tensors_of(model)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(parameter.data, requires_grad=False))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.detach())
    for _ in range(2):
        assert_close(fused(x), model(x))
        old.clear()
        parameter = buffer = None


def test_batch_norm_that_is_trained_uncompiled(block, x, uncompiled):
    model = block()
    fused = compiled(model)
    fused(x)
    model.train()(x)  # changes statistics, and the version of no tensor that the graph takes
    model.eval()
    assert_close(fused(x), model(x))


def test_modules_that_share_an_anchor_have_weights_of_their_own(block, x, uncompiled):
    models = [block(), block(seed=1)]
    for name in ("conv_bn", "project_bn"):
        setattr(models[1], name, getattr(models[0], name))
    fused = [compiled(model) for model in models]
    for _ in range(2):
        for each, model in zip(fused, models, strict=True):
            assert_close(each(x), model(x))
    assert len(uncompiled) == 1


def test_parameters_of_inference_mode_are_left_alone(block, x, uncompiled):
    with torch.inference_mode():
        model = block()
        fused = compiled(model)
        assert_close(fused(x), model(x))
        model.conv.weight.mul_(2)
        assert_close(fused(x), model(x))
    assert not any(node.target is chain_module.run_chain._opoverload for node in uncompiled[0].graph.nodes)


def test_a_filter_that_makes_no_block_any_more(small_network, images, uncompiled):
    model = small_network().double().requires_grad_(False)
    fused = compiled(model, strict=False)
    fused(images())
    filters = [buffer for name, buffer in model.named_buffers() if tuple(buffer.shape[1:]) == (1, 3, 3)]
    for each in filters:
        each.mul_(1.5)
    with pytest.warns(RuntimeWarning, match="cannot be folded again.*is not the block that it was") as record:
        for _ in range(2):
            assert_close(fused(images()), model(images()))
    assert filters and len(record) == 1


@pytest.mark.parametrize("by_option", [True, False], ids=["option", "config"])
def test_frozen_modules_have_weights_of_their_own(by_option, block, x):
    models = [nn.Sequential(block(seed), nn.Tanh(), block(seed + 1)).eval() for seed in (0, 5)]
    with torch.no_grad(), torch._inductor.config.patch(freezing=not by_option):
        fused = [compiled(model, **({"freezing": True} if by_option else {})) for model in models]
        for _ in range(2):
            for each, model in zip(fused, models, strict=True):
                assert_close(each(x), model(x))


def test_weights_go_with_their_graph_though_the_model_lives(block, x, uncompiled):
    model = block()
    compiled(model)(x)
    runners = [weakref.ref(each) for chain in chain_module._chains.values() for each in chain._runners.values()]
    uncompiled.clear()
    torch.compiler.reset()
    gc.collect()
    assert runners and not any(runner() for runner in runners)


def test_modules_that_come_and_go_leave_nothing(block, x, uncompiled, monkeypatch):
    graphs = []
    monkeypatch.setattr(compiled_graph._Folded, "_watch", _noting(compiled_graph._Folded._watch, graphs))
    for seed in range(4):
        compiled(block(seed))(x)
        gc.collect()
    assert len(set(map(id, graphs))) == 1
    assert len(graphs[0]._watches) == 1 and not graphs[0]._chains[0]._runners


def _noting(method, owners):
    def noted(self, *args):
        owners.append(self)
        return method(self, *args)

    return noted

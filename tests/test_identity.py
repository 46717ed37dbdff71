"""torch.compile runs fused modules that look alike with weights of their own."""

import copy

import pytest
import torch
from torch import nn

import fusion
from models import ConvFirst, MBConv, PooledHead

CHAINS = {
    "blocks": lambda: nn.Sequential(ConvFirst(16, 16, expansion=2), nn.ReLU(), MBConv(16, 16, expansion=2)),
    "stages": lambda: nn.Sequential(MBConv(16, 16, expansion=2), MBConv(16, 16, expansion=2)),
    "heads": lambda: nn.Sequential(PooledHead(16, 32)),
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    with torch.no_grad():
        yield
    torch.compiler.reset()


def same(compiled, module, x):
    torch.testing.assert_close(compiled(x), module(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("make", CHAINS.values(), ids=CHAINS)
def test_equal_chains_with_other_weights(make):
    x = torch.randn(2, 16, 8, 8, dtype=torch.double)
    chains = [fusion.fuse(make().eval().double(), x) for _ in range(3)]
    assert not torch.allclose(chains[0](x), chains[1](x))
    compiled = [torch.compile(chain, backend="eager", fullgraph=True) for chain in chains]
    for _ in range(2):
        for each, chain in zip(compiled, chains, strict=True):
            same(each, chain, x)


def test_networks_of_one_architecture(small_network):
    x = torch.randn(2, 3, 33, 35, dtype=torch.double)
    for seed in range(2):
        fused = fusion.fuse(small_network(seed).double(), x)
        same(torch.compile(fused, backend="eager"), fused, x)


def test_features_of_heads():
    x = torch.randn(2, 16, 8, 8, dtype=torch.double)
    for _ in range(2):
        head = PooledHead(16, 32).eval().double().fused()
        same(torch.compile(head.features, backend="eager"), head.features, x)


def test_a_copy_that_gets_other_weights():
    x = torch.randn(2, 16, 8, 8, dtype=torch.double)
    block, other = (ConvFirst(16, 16, expansion=2).eval().double().fused() for _ in range(2))
    twin = copy.deepcopy(block)
    same(torch.compile(block, backend="eager"), block, x)
    twin(x)
    twin.weights = other.weights
    twin.repack()
    same(torch.compile(twin, backend="eager"), other, x)
    same(torch.compile(block, backend="eager"), block, x)

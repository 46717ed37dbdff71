"""Models under the backend, with and without Inductor's compiler."""

import pytest
import torch

from fusion.backend import compiled_graph

FUSE_ALL = {"min_speedup": 0, "strict": True}
"""Options under which every block is fused, on CPUs too, and nothing is measured."""


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def uncompiled(monkeypatch):
    """Inductor replaced by the graphs as they are, which takes no time to compile; a list of them."""
    graphs = []

    def keep(graph_module, inputs, options):
        graphs.append(graph_module)
        return graph_module.forward

    monkeypatch.setattr(compiled_graph, "inductor", keep)
    return graphs


@pytest.fixture
def images():
    """`(batch=2, height=37, width=33, dtype=torch.float64, seed=1) -> [batch, 3, height, width]`."""

    def make(batch=2, height=37, width=33, dtype=torch.float64, seed=1):
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(batch, 3, height, width, generator=generator, dtype=torch.float64).to(dtype)

    return make

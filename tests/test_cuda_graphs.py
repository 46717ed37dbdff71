"""Which calls share a graph, how many are kept, and who may call: with stand-ins for graphs, on any machine."""

import copy
import pickle
import threading
import time

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_unflatten

from fusion import cuda_graphs
from fusion.cuda_graphs import CaptureError, CudaGraphs


class Scaled(nn.Module):
    """Outputs of every structure; `calls` counts those that are no replays."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.calls = 0

    def forward(self, x, factor=1.0, *, bias=None):
        self.calls += 1
        y = self.linear(x.flatten(1)[:, :4]) * factor
        return {"y": y if bias is None else y + bias, "list": [x + 1, (2, None)]}


@pytest.fixture
def module():
    torch.manual_seed(0)
    return Scaled().eval().requires_grad_(False)


def same(out, expected):
    torch.testing.assert_close(out["y"], expected["y"])
    torch.testing.assert_close(out["list"][0], expected["list"][0])
    assert out["list"][1] == (2, None)


class StandInPool:
    waits = 0

    def __init__(self, device):
        self.handle = 0

    def renew(self):
        self.handle += 1

    def wait_on_host(self):
        StandInPool.waits += 1


class StandInCall:
    """Runs the module instead of replaying; fails if two do so at once, or if one is captured meanwhile."""

    made: list = []  # noqa: RUF012
    busy = threading.Lock()

    def __init__(self, module, leaves, spec, pool):
        assert StandInCall.busy.acquire(blocking=False)
        time.sleep(0.002)
        StandInCall.made.append(leaves)
        self.module, self.spec, self.memory = module, spec, (pool, pool.handle)
        StandInCall.busy.release()
        if any(isinstance(leaf, torch.Tensor) and leaf.shape[0] == 13 for leaf in leaves):
            raise CaptureError("AcceleratorError: not permitted")

    def replay(self, leaves):
        assert StandInCall.busy.acquire(blocking=False)
        args, kwargs = tree_unflatten(leaves, self.spec)
        out = self.module(*args, **kwargs)
        StandInCall.busy.release()
        return out


@pytest.fixture
def made(monkeypatch):
    """Inputs of the calls that were captured."""
    monkeypatch.setattr(cuda_graphs, "_can_capture", lambda leaves: True)
    monkeypatch.setattr(cuda_graphs, "Pool", StandInPool)
    monkeypatch.setattr(cuda_graphs, "CapturedCall", StandInCall)
    StandInCall.made = []
    return StandInCall.made


def x(batch=2, *shape, dtype=torch.float32):
    return torch.randn(batch, *(shape or (4,)), dtype=dtype)


def test_cpus_run_the_module_itself(module):
    graphs = CudaGraphs(module)
    inputs = x()
    same(graphs(inputs, 2.0, bias=torch.ones(3)), module(inputs, 2.0, bias=torch.ones(3)))
    assert graphs.graphs == 0 and module.calls == 2


def test_a_graph_for_each_kind_of_input(module, made):
    graphs = CudaGraphs(module, max_graphs=20)
    image = x(2, 3, 4, 5)
    kinds = [
        ((x(),), {}),
        ((x(3),), {}),
        ((x(), 2.0), {}),
        ((x(), 3.0), {}),
        ((x(),), {"bias": torch.ones(3)}),
        ((image,), {}),
        ((image.contiguous(memory_format=torch.channels_last),), {}),
    ]
    for count, (args, kwargs) in enumerate(kinds, start=1):
        for _ in range(2):
            same(graphs(*args, **kwargs), module(*args, **kwargs))
        assert len(made) == graphs.graphs == count
    graphs(image[:, :, ::2])
    graphs(torch.empty(2, 2, 5, 3).permute(0, 3, 1, 2)[..., :5])  # neither dense nor channels_last: as contiguous ones
    assert len(made) == 9
    torch.use_deterministic_algorithms(True)
    try:
        graphs(x())
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(made) == 10
    graphs(x())
    assert len(made) == 10
    module.double()
    graphs(x(dtype=torch.float64))
    assert len(made) == 11


def test_the_graphs_that_were_used_last_are_kept(module, made):
    graphs = CudaGraphs(module, max_graphs=2)
    for batch in (1, 2, 1, 3, 1):
        graphs(x(batch))
    assert [leaves[0].shape[0] for leaves in made] == [1, 2, 3]
    graphs(x(2))
    assert [leaves[0].shape[0] for leaves in made] == [1, 2, 3, 2]
    assert graphs.graphs == 2


def test_a_graph_is_waited_for_before_it_goes_and_memory_without_graphs_is_renewed(module, made):
    graphs = CudaGraphs(module, max_graphs=1)
    waits = StandInPool.waits
    for batch in (1, 2, 3):
        graphs(x(batch))
    assert StandInPool.waits == waits + 2
    assert graphs._pools[torch.device("cpu")].handle == 3
    more = CudaGraphs(module, max_graphs=2)
    for batch in (1, 2, 3):
        more(x(batch))
    assert more._pools[torch.device("cpu")].handle == 1


def test_what_cannot_be_captured_runs_without_a_graph_after_one_warning(module, made):
    graphs = CudaGraphs(module)
    with pytest.warns(RuntimeWarning, match=r"Scaled cannot be captured .* shape \[13, 4\] and runs without one \("):
        first = graphs(x(13))
    with torch.no_grad():
        same(graphs(inputs := x(13)), module(inputs))
    assert first["y"].shape == (13, 3)
    assert len(made) == 1 and graphs.graphs == 0
    graphs(x(2))
    assert graphs.graphs == 1


def test_errors_of_the_module_are_raised_each_time(module, made, monkeypatch):
    def run(*args):
        raise ValueError("the module's own")

    monkeypatch.setattr(cuda_graphs, "CapturedCall", run)
    graphs = CudaGraphs(module)
    for _ in range(2):
        with pytest.raises(ValueError, match="the module's own"):
            graphs(x())


def test_clear_and_conversions_forget_graphs(module, made):
    graphs = CudaGraphs(module)
    graphs(x())
    graphs.clear()
    assert graphs.graphs == 0
    graphs(x())
    graphs.double()
    assert graphs.graphs == 0 and module.linear.weight.dtype == torch.float64


def test_threads_share_graphs_one_at_a_time(module, made):
    graphs = CudaGraphs(module, max_graphs=20)
    inputs = [x(batch) for batch in (1, 2, 3, 13)]
    expected = [module(inputs[i]) for i in range(4)]
    failures = []

    def work(seed):
        try:
            for i in torch.randint(0, 4, (30,), generator=torch.Generator().manual_seed(seed)).tolist():
                same(graphs(inputs[i]), expected[i])
        except BaseException as error:  # told by the main thread
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    with pytest.warns(RuntimeWarning):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures
    assert len(made) == 4


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_have_their_own_graphs(copy_of, module, made):
    graphs = CudaGraphs(module, max_graphs=3)
    graphs(x())
    twin = copy_of(graphs)
    assert twin.graphs == 0 and twin.max_graphs == 3
    inputs = x(5)
    same(twin(inputs), module(inputs))
    assert (graphs.graphs, twin.graphs) == (1, 1)


def test_compiles_as_one_graph(module):
    graphs = CudaGraphs(module)
    compiled = torch.compile(graphs, fullgraph=True, backend="aot_eager")
    inputs = x()
    same(compiled(inputs), module(inputs))


def test_at_least_one_graph_is_kept(module):
    with pytest.raises(ValueError, match="max_graphs=0 is not supported, keep at least one graph"):
        CudaGraphs(module, max_graphs=0)
    assert repr(CudaGraphs(module)).splitlines()[1].strip() == "max_graphs=8"

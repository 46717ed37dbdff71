"""CUDA graphs as they are: results, memory, streams, threads, and captures that fail."""

import threading
import warnings

import pytest
import torch
from torch import nn

import fusion
from fusion.cuda_graphs import CudaGraphs
from fusion.timing import graph_us

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SHAPES = ((1, 64, 64), (2, 64, 64), (2, 40, 56), (5, 33, 35))


@pytest.fixture(scope="module")
def convs():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 3, padding=1)
    return nn.Sequential(*layers).cuda().eval()


def images(batch, height, width, seed=0, dtype=torch.float32):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(batch, 3, height, width, device="cuda", generator=generator).to(dtype)


@torch.no_grad()
def same(out, module, x):
    torch.testing.assert_close(out, module(x), rtol=1e-3, atol=1e-3)


def test_replays_compute_the_same_and_give_fresh_tensors(convs):
    graphs = CudaGraphs(convs)
    seen = []
    for seed in range(3):
        for shape in SHAPES:
            for memory_format in (torch.contiguous_format, torch.channels_last):
                x = images(*shape, seed).contiguous(memory_format=memory_format)
                with torch.no_grad():
                    seen.append((graphs(x), x))
    assert graphs.graphs == 2 * len(SHAPES)
    for out, x in seen:
        same(out, convs, x)
        assert not out.requires_grad


def test_eviction_and_coming_back(convs):
    graphs = CudaGraphs(convs, max_graphs=1)
    seen = []
    with torch.inference_mode():
        for seed in range(3):
            for shape in SHAPES:
                x = images(*shape, seed)
                seen.append((graphs(x), x))
                assert graphs.graphs == 1
        for out, x in seen:
            torch.testing.assert_close(out, convs(x), rtol=1e-3, atol=1e-3)


def test_graphs_share_memory(convs):
    x = images(8, 256, 256)
    graphs = CudaGraphs(convs)
    with torch.no_grad():
        graphs(x)
        torch.cuda.synchronize()
        one = torch.cuda.memory_reserved()
        for _ in range(3):
            for batch in (7, 6, 5):
                graphs(x[:batch])
        torch.cuda.synchronize()
    hidden_bytes = 8 * 16 * 256 * 256 * 4
    outputs_and_inputs = (7 + 6 + 5) * (8 + 3) * 256 * 256 * 4
    assert torch.cuda.memory_reserved() - one < outputs_and_inputs + 2 * hidden_bytes


def test_two_streams(convs):
    """Each stream's result is that of its own input, although both graphs use the same memory."""
    graphs = CudaGraphs(convs)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    inputs = [[images(4, 128, 128, seed), images(3, 128, 128, seed)] for seed in range(20)]
    torch.cuda.synchronize()
    outs = []
    with torch.no_grad():
        for pair in inputs:
            for x, stream in zip(pair, streams, strict=True):
                with torch.cuda.stream(stream):
                    outs.append((graphs(x), x))
        torch.cuda.synchronize()
    for out, x in outs:
        same(out, convs, x)


def test_threads_with_streams_of_their_own(convs):
    graphs = CudaGraphs(convs, max_graphs=3)  # fewer than shapes: captures go on while others replay
    failures = []

    def work(seed):
        try:
            with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
                for step in range(40):
                    x = images(*SHAPES[(seed + step) % len(SHAPES)], seed=1000 * seed + step)
                    out = graphs(x)
                    torch.cuda.current_stream().synchronize()
                    same(out, convs, x)
        except BaseException as error:  # told by the main thread
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]


class Waiting(nn.Module):
    """Waits for the GPU, which cannot be captured, if the batch is odd."""

    def forward(self, x):
        return x * x.sum().item() if len(x) % 2 else x * x.sum()


def test_a_capture_that_fails_leaves_nothing_behind():
    module = Waiting()
    graphs = CudaGraphs(module)
    x = torch.randn(4, 1000, device="cuda")
    kept = graphs(x)
    for odd in (x[:3], x[:1]):
        with pytest.warns(RuntimeWarning, match=r"Waiting cannot be captured .* \[\d, 1000\] and runs without one"):
            out = graphs(odd)
        torch.testing.assert_close(out, module(odd))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(graphs(x[:3]), module(x[:3]))
        for batch in (2, 4, 6):
            y = torch.randn(batch, 1000, device="cuda")  # raises if the generator is still captured
            torch.testing.assert_close(graphs(y), module(y))
    assert graphs.graphs == 3
    torch.testing.assert_close(kept, module(x))
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    big = torch.empty(1 << 28, device="cuda", dtype=torch.uint8)
    before = torch.cuda.memory_reserved()
    del big
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before - (1 << 28)  # it was not of a graph's memory


def test_autocast_is_part_of_the_key(convs):
    graphs = CudaGraphs(convs)
    x = images(*SHAPES[0])
    with torch.no_grad():
        for _ in range(3):
            assert graphs(x).dtype == torch.float32
            with torch.autocast("cuda", dtype=torch.bfloat16):
                out = graphs(x)
            assert out.dtype == torch.bfloat16
            torch.testing.assert_close(out.float(), convs(x), rtol=0.1, atol=0.1)
    assert graphs.graphs == 2


def test_gradients_and_outer_captures_run_the_module_itself(convs):
    graphs = CudaGraphs(convs)
    x = images(*SHAPES[0])
    leaf = x.clone().requires_grad_()
    graphs(leaf).sum().backward()
    assert leaf.grad is not None and graphs.graphs == 0
    with torch.no_grad():
        assert graph_us(lambda: graphs(x)) > 0
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = graphs(x)
        graph.replay()
    same(out, convs, x)
    assert graphs.graphs == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_fused_network(dtype, small_network):
    network = small_network()
    example = images(2, 64, 64, dtype=dtype)
    plain = fusion.fuse(network, example, dtype=dtype, device="cuda")
    graphed = fusion.fuse(network, example, dtype=dtype, device="cuda", cuda_graphs=True, max_graphs=3)
    for seed in range(2):
        for shape in SHAPES:
            x = images(*shape, seed, dtype)
            torch.testing.assert_close(graphed(x), plain(x), rtol=2e-2, atol=2e-2)
    assert graphed.graphs.graphs == 3
    with pytest.raises(ValueError, match="too small"):
        graphed(images(1, 8, 8, dtype=dtype))
    out = graphed(images(*SHAPES[0], 5, dtype))
    torch.testing.assert_close(out, plain(images(*SHAPES[0], 5, dtype)), rtol=2e-2, atol=2e-2)

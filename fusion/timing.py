"""Timing on a GPU: median of CUDA graph replays, or mean of calls."""

from collections.abc import Callable
from itertools import pairwise
from statistics import median

import torch

STAGE_DEPTH = 8
"""Blocks of a timed stage, with distinct weights: so weights are not hot in L2 between replays."""


def graph_us(run: Callable[[], object], replays: int = 20, warmup: int = 3) -> float:
    """Median duration in microseconds of `run`, captured in a CUDA graph on the current device.

    A graph leaves out the launch overhead of Python. `run` must launch the same work each time and must not
    synchronise; it runs `warmup` times before the capture.
    """
    graph = capture(run, warmup)
    durations = []
    for _ in range(warmup + replays):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        durations.append(start.elapsed_time(stop) * 1e3)
    return median(durations[warmup:])


def queued_us(run: Callable[[], object], replays: int = 30, warmup: int = 5) -> float:
    """Like `graph_us`, for replays that wait behind each other in the stream.

    So the launch of a graph, some 10 microseconds for one of hundreds of kernels, is left out too.
    """
    graph = capture(run)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(warmup + replays + 1)]
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    return median(start.elapsed_time(stop) * 1e3 for start, stop in pairwise(marks[warmup:]))


def called_us(run: Callable[[], object], calls: int = 30, warmup: int = 5) -> float:
    """Mean duration in microseconds of calls of `run` that wait behind each other in the stream.

    For what cannot be captured, such as code that replays CUDA graphs of its own. The launch overhead of Python counts
    where the GPU waits for it.
    """
    for _ in range(warmup):
        run()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) * 1e3 / calls


def capture(run: Callable[[], object], warmup: int = 3) -> torch.cuda.CUDAGraph:
    """A CUDA graph of what `run` launches on the current device; `run` is called `warmup` times before."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warmup):
            run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph

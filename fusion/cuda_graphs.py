"""CUDA graphs of a module: one for each kind of input, replayed instead of launching kernel by kernel."""

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map_only, tree_unflatten

MAX_GRAPHS = 8
WARM_UP_CALLS = 3
"""Ahead of a capture: kernels are compiled, plans made, weights packed, and libraries choose their algorithms."""

_capturing = threading.RLock()
"""One capture at a time: each begins by waiting for the device, which must not happen during another."""


class CudaGraphs(nn.Module):
    """An inference module whose calls on GPUs are replays of CUDA graphs, without the launch overhead of Python.

    Takes and returns what the module does: tensors on one GPU, constants, and tuples, lists and dicts of them. The
    first call for inputs of a new shape, dtype, device or memory format (or under another setting of autocast or of
    `torch.use_deterministic_algorithms`) runs the module a few times on a stream of its own, then captures it. The
    `max_graphs` graphs that were used last are kept, and share one pool of memory on each device.

    Every call copies the inputs into the graph's own and returns fresh tensors, on the caller's stream. Calls may come
    from any stream and any thread: a replay waits, on the GPU, until the one before it is done. While a graph is
    captured, other threads must neither synchronise the whole device (`torch.cuda.synchronize()`) nor draw random
    numbers on it; a service had better call the module once for each of its shapes before it starts. The module must do
    the same work at each call, and not be changed: call `clear()` after replacing its layers or moving them by other
    means than this module's own `to()`.

    Runs the module as it is, without a graph: on CPUs, where an input requires a gradient, inside of `torch.compile`
    and of another capture, and, after a warning, for inputs with which the module cannot be captured, for example
    because it waits for the GPU. What a graph returns never requires a gradient, whatever the parameters do.

    Raises ValueError for `max_graphs` below 1, and whatever the module raises.
    """

    def __init__(self, module: nn.Module, *, max_graphs: int = MAX_GRAPHS):
        super().__init__()
        if max_graphs < 1:
            raise ValueError(f"max_graphs={max_graphs} is not supported, keep at least one graph")
        self.module = module
        self.max_graphs = max_graphs
        self._reset()

    def forward(self, *args, **kwargs):
        if torch.compiler.is_compiling():
            return self.module(*args, **kwargs)
        leaves, spec = tree_flatten((args, kwargs))
        if not _can_capture(leaves):
            return self.module(*args, **kwargs)
        key = (spec, *map(_kind, leaves), *_settings())
        with self._lock:
            if key in self._calls:
                return self._replay(key, leaves)
            can_try = key not in self._failed
        if can_try:
            # In this order everywhere, so that no two threads wait for each other.
            with _capturing, self._lock:
                if key not in self._calls and key not in self._failed:
                    self._capture(key, leaves, spec)
                if key in self._calls:
                    return self._replay(key, leaves)
        return self.module(*args, **kwargs)

    def clear(self) -> None:
        """Forget all graphs, and give their memory back to PyTorch once it is not in use any more."""
        with self._lock:
            for pool in self._pools.values():
                pool.wait_on_host()
            self._calls.clear()
            self._failed.clear()
            self._pools.clear()

    @property
    def graphs(self) -> int:
        """How many graphs are kept."""
        return len(self._calls)

    def extra_repr(self) -> str:
        return f"max_graphs={self.max_graphs}"

    def _reset(self) -> None:
        self._lock = threading.RLock()
        self._calls: OrderedDict[tuple, CapturedCall] = OrderedDict()
        self._failed: set[tuple] = set()
        self._pools: dict[torch.device, Pool] = {}

    def _apply(self, *args, **kwargs) -> nn.Module:
        self.clear()  # the graphs' parameters may move
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict:
        own = ("_lock", "_calls", "_failed", "_pools")
        return {name: value for name, value in vars(self).items() if name not in own}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._reset()

    def _replay(self, key: tuple, leaves: Sequence[object]):
        self._calls.move_to_end(key)
        return self._calls[key].replay(leaves)

    def _capture(self, key: tuple, leaves: Sequence[object], spec: TreeSpec) -> None:
        device = next(leaf.device for leaf in leaves if isinstance(leaf, Tensor))
        pool = self._pools.get(device)
        if pool is None:
            pool = self._pools[device] = Pool(device)
        while len(self._calls) >= self.max_graphs:
            for other in self._pools.values():
                other.wait_on_host()  # a graph that still runs must keep its memory
            self._calls.popitem(last=False)
        if not any(call.memory == (pool, pool.handle) for call in self._calls.values()):
            pool.renew()
        try:
            self._calls[key] = CapturedCall(self.module, leaves, spec, pool)
        except CaptureError as error:
            self._failed.add(key)
            inputs = ", ".join(str(list(leaf.shape)) for leaf in leaves if isinstance(leaf, Tensor))
            warnings.warn(
                f"{type(self.module).__name__} cannot be captured in a CUDA graph for inputs of shape {inputs} and "
                f"runs without one ({error})",
                RuntimeWarning,
                stacklevel=2,
            )


class CaptureError(RuntimeError):
    """A module that runs cannot be captured."""


class Pool:
    """What the graphs of a device share: memory, the stream that captures, and when the memory may be used again."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.handle: object = None
        self._done = torch.cuda.Event()
        self._last_stream: torch.cuda.Stream | None = None

    def renew(self) -> None:
        """Take fresh memory: that of graphs which are all gone cannot be captured into."""
        self.handle = torch.cuda.graph_pool_handle()

    def acquire(self, stream: torch.cuda.Stream) -> None:
        """Let `stream` wait for the replay before."""
        if self._last_stream not in (None, stream):
            stream.wait_event(self._done)

    def release(self, stream: torch.cuda.Stream) -> None:
        """Say that all work of a replay is in `stream`."""
        self._done.record(stream)
        self._last_stream = stream

    def wait_on_host(self) -> None:
        """Wait until no graph runs."""
        if self._last_stream is not None:
            self._done.synchronize()


class CapturedCall:
    """One graph, its inputs and its outputs.

    Raises CaptureError if there can be no graph, and what the module raises.
    """

    def __init__(self, module: nn.Module, leaves: Sequence[object], spec: TreeSpec, pool: Pool):
        self.memory = pool, pool.handle
        # Ordinary tensors, whatever mode the first caller is in: they are kept for all.
        with torch.cuda.device(pool.device), torch.inference_mode(False), torch.no_grad(), _autocast_uncached():
            pool.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(pool.stream):
                self._inputs = [_static(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
                args, kwargs = tree_unflatten(self._inputs, spec)
                for _ in range(WARM_UP_CALLS):
                    module(*args, **kwargs)
            self._graph, self._outputs = _capture(lambda: module(*args, **kwargs), pool)

    def replay(self, leaves: Sequence[object]):
        """Run the graph on inputs of the kind that it was captured for, on the current stream."""
        pool, _ = self.memory
        with torch.cuda.device(pool.device), torch.no_grad():
            stream = torch.cuda.current_stream()
            pool.acquire(stream)
            for static, leaf in zip(self._inputs, leaves, strict=True):
                if isinstance(leaf, Tensor):
                    static.copy_(leaf)
            self._graph.replay()
            outputs = tree_map_only(Tensor, Tensor.clone, self._outputs)
            pool.release(stream)
        return outputs


def _can_capture(leaves: Sequence[object]) -> bool:
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    constants = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
    if not all(isinstance(leaf, bool | int | float | str | None) for leaf in constants):
        return False
    if {tensor.device.type for tensor in tensors} != {"cuda"} or len({tensor.device for tensor in tensors}) > 1:
        return False
    if any(type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided for tensor in tensors):
        return False
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return not needs_grad and not torch.cuda.is_current_stream_capturing()


def _kind(leaf: object) -> tuple:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, leaf.device, _memory_format(leaf)
    return type(leaf), leaf


def _settings() -> tuple:
    """What else may change the kernels that a module launches."""
    autocast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
    return torch.are_deterministic_algorithms_enabled(), autocast


def _memory_format(x: Tensor) -> torch.memory_format:
    is_nhwc = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if is_nhwc else torch.contiguous_format


def _static(x: Tensor) -> Tensor:
    return x.detach().clone(memory_format=_memory_format(x))


def _autocast_uncached() -> torch.autocast:
    """The caller's autocast, without its cache: a graph must not use memory that goes when the context ends."""
    enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    return torch.autocast("cuda", enabled=enabled, dtype=dtype, cache_enabled=False)


def _capture(run: Callable[[], object], pool: Pool) -> tuple[torch.cuda.CUDAGraph, object]:
    graph = torch.cuda.CUDAGraph()
    try:
        # The outer context restores the caller's stream, which a capture that fails does not.
        with (
            torch.cuda.stream(pool.stream),
            torch.cuda.graph(graph, pool=pool.handle, stream=pool.stream, capture_error_mode="thread_local"),
        ):
            outputs = run()
    except Exception as error:
        _recover(graph, pool)
        first = error.__context__ or error  # the end of a capture that has failed fails too
        reason = str(first).strip().splitlines() or [""]
        raise CaptureError(f"{type(first).__name__}: {reason[0]}") from error
    return graph, outputs


_failed_graphs: list[torch.cuda.CUDAGraph] = []
"""Graphs whose capture failed. The allocator may still ask them whether it records for them."""


def _recover(graph: torch.cuda.CUDAGraph, pool: Pool) -> None:
    """Undo what PyTorch leaves behind when a capture fails.

    Allocations would go on going to the graph's memory, and random number generators believe that they are captured,
    which the next capture that succeeds puts right.
    """
    _failed_graphs.append(graph)
    graph.reset()
    with suppress(RuntimeError):  # where the failure came late, both have happened
        torch._C._cuda_endAllocateToPool(pool.device.index, pool.handle)
        torch._C._cuda_releasePool(pool.device.index, pool.handle)
    pool.renew()
    probe, empty = torch.zeros(1, device=pool.device), torch.cuda.CUDAGraph()
    with torch.cuda.stream(pool.stream), torch.cuda.graph(empty, stream=pool.stream, capture_error_mode="thread_local"):
        probe.add_(1)

"""Launches made again: what a fused block launches for one kind of input, without the work that led to it.

The first call of a kind runs the operator, which checks and computes everything, while a `Tape` notes what the launch
functions of `fusion.triton_kernels` do. They do it by way of `launch_kernel`, `scratch` and `zero`, and nothing that
they decide depends on the input's values or address. So the next calls only allocate the output, put new addresses in
place of the old ones, and launch.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fusion.launch_record import is_recording

ALIGNMENT = 16
"""Of addresses, in bytes: Triton compiles kernels for multiples of it, and others for other addresses."""

SCRATCH_ALIGNMENT = 512
"""Of scratch tensors that share an allocation, in bytes: what PyTorch gives those that have their own."""


@dataclass(frozen=True)
class Launched:
    """A kernel as it was launched, and what Triton's `kernel[grid](*args, **kwargs)` returned."""

    kernel: object
    compiled: object
    grid: tuple[int, ...]
    args: tuple
    kwargs: dict[str, object]


@dataclass
class Tape:
    """What launch functions did: kernels and tensors of scratch memory, some of them filled with zeros at first."""

    launches: list[Launched] = field(default_factory=list)
    scratch: list[Tensor] = field(default_factory=list)
    zeroed: list[Tensor] = field(default_factory=list)


class CannotRelaunch(Exception):
    """A launch cannot be made again in this way; the message says what it has that prevents it."""


_tape: ContextVar[Tape | None] = ContextVar("tape", default=None)
_settling = threading.Lock()


@contextmanager
def taping() -> Iterator[Tape]:
    """Notes what this thread launches while the context is open."""
    tape = Tape()
    token = _tape.set(tape)
    try:
        yield tape
    finally:
        _tape.reset(token)


def launch_kernel(kernel, grid: tuple[int, ...], *args, **kwargs) -> None:
    """`kernel[grid](*args, **kwargs)` for all kernels of fused blocks. The kernel may be a wrapped one, for tracing."""
    # Imported here: Triton takes a while, and a CPU needs none.
    from fusion.triton_kernels.cache_keys import settle_cache_keys

    with _settling:  # a thread that launched meanwhile would give the kernel another key
        settle_cache_keys(kernel)
    compiled = kernel[grid](*args, **kwargs)
    tape = _tape.get()
    if tape is not None:
        tape.launches.append(Launched(kernel, compiled, grid, args, kwargs))


def scratch(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """Memory for kernels of one call, not initialised, on the device of `like` and by default in its dtype."""
    tensor = like.new_empty(shape, dtype=dtype)
    tape = _tape.get()
    if tape is not None:
        tape.scratch.append(tensor)
    return tensor


def zero(tensor: Tensor) -> None:
    """Fill a tensor that `scratch` gave with zeros, ahead of the kernels."""
    tensor.zero_()
    tape = _tape.get()
    if tape is not None:
        tape.zeroed.append(tensor)


def memory_of(tensor: Tensor) -> int:
    """Address of the memory that a tensor is in, which views share."""
    return tensor.untyped_storage().data_ptr()


def launch_key(x: Tensor) -> tuple | None:
    """All that launches on `x` depend on but its address, a multiple of 16 bytes; None if operators are to run.

    Those are needed for other addresses, on CPUs, and where more is wanted of `x` than launches: a trace, a gradient
    (which they refuse), a record.
    """
    if (
        torch.compiler.is_compiling()
        or type(x) is not Tensor
        or not x.is_cuda
        or (x.requires_grad and torch.is_grad_enabled())
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch.jit.is_tracing()
        or is_recording()
        or x.data_ptr() % ALIGNMENT
    ):
        return None
    # MBConv kernels sum in order where PyTorch is to be deterministic.
    return x.shape, x.stride(), x.dtype, x.device, torch.are_deterministic_algorithms_enabled()


class Relaunches:
    """The launches of fused blocks by `launch_key`, and by what else tells them apart.

    They stay here: a copy starts without any, for its weights are at other addresses.
    """

    def __init__(self):
        self._made: dict[tuple, Relaunch | RelaunchChain | None] = {}

    def get(self, key: tuple) -> "Relaunch | RelaunchChain | None":
        """The launches for this kind of input, if they have been made before and can be made again."""
        return self._made.get(key)

    def keep(self, key: tuple, relaunches: "RelaunchChain") -> None:
        """Have launches of several blocks for this kind of input."""
        self._made[key] = relaunches

    def record(self, key: tuple, x: Tensor, packed: Sequence[Tensor], run: Callable[[], Tensor]) -> Tensor:
        """What `run` gives, an operator on `x` with these weights, keeping the launches if they can be made again."""
        if key in self._made:
            relaunch = self._made[key]
            return run() if relaunch is None else relaunch(x)
        with taping() as tape:
            out = run()
        self._made[key] = _relaunch(tape, x, packed, out)
        return out

    def clear(self) -> None:
        """Forget all launches."""
        self._made = {}

    def __deepcopy__(self, memo: dict) -> "Relaunches":
        return Relaunches()

    def __reduce__(self) -> tuple:
        return Relaunches, ()


class Relaunch:
    """Launches that take inputs of one kind: `x -> out`, on the input's device and its current stream.

    `packed` are the weights, whose addresses are among the arguments of `launches`
    (`fusion.triton_kernels.compiled_launch`).
    """

    def __init__(self, tape: Tape, packed: Sequence[Tensor], out: Tensor, launches: Sequence[Callable]):
        self._packed = tuple(packed)
        self._launches = tuple(launches)
        self._shape, self._stride = out.shape, out.stride()
        self._options = {"dtype": out.dtype, "device": out.device}
        self._device = out.device.index
        self._offsets, self._bytes, zeroed = [], 0, {id(tensor) for tensor in tape.zeroed}
        self._zeroed = []
        for tensor in tape.scratch:
            self._offsets.append(self._bytes)
            self._bytes += -(-tensor.nbytes // SCRATCH_ALIGNMENT) * SCRATCH_ALIGNMENT
            if id(tensor) in zeroed:
                self._zeroed.append((self._offsets[-1], tensor.nbytes))

    def __call__(self, x: Tensor) -> Tensor:
        if torch.cuda.current_device() == self._device:
            return self._run(x)
        with torch.cuda.device(self._device):
            return self._run(x)

    def _run(self, x: Tensor) -> Tensor:
        out = torch.empty_strided(self._shape, self._stride, **self._options)
        addresses = [x.data_ptr(), out.data_ptr()]
        if self._offsets:
            memory = torch.empty(self._bytes, dtype=torch.uint8, device=out.device)
            start = memory.data_ptr()
            addresses += [start + offset for offset in self._offsets]
            for offset, size in self._zeroed:
                memory[offset : offset + size].zero_()
        stream = torch._C._cuda_getCurrentRawStream(self._device)
        for launch in self._launches:
            launch(stream, addresses)
        return out


class RelaunchChain:
    """Launches one after the other, some of them by way of operators."""

    def __init__(self, links: Sequence[Callable[[Tensor], Tensor]]):
        self._links = tuple(links)

    def __call__(self, x: Tensor) -> Tensor:
        for link in self._links:
            x = link(x)
        return x


def _relaunch(tape: Tape, x: Tensor, packed: Sequence[Tensor], out: Tensor) -> Relaunch | None:
    """What the tape holds, to be made again; None if it holds what cannot."""
    # Imported here: Triton takes a while, and a CPU needs none.
    from fusion.triton_kernels.compiled_launch import CompiledLaunch

    moving = {memory_of(tensor): (place, tensor.data_ptr()) for place, tensor in enumerate((x, out, *tape.scratch))}
    fixed = set(map(memory_of, packed))
    try:
        launches = [CompiledLaunch(launched, moving, fixed) for launched in tape.launches]
    except CannotRelaunch:
        return None
    return Relaunch(tape, packed, out, launches) if launches else None

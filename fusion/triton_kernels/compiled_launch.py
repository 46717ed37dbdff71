"""A compiled kernel launched again, with other addresses among its arguments (see `fusion.relaunch`).

Triton's own way looks at every argument to find the compiled kernel, and encodes all TMA descriptors anew. Here one
list is kept, of the arguments of Triton's function in C that launches a kernel: compile-time constants are None in it,
pointers are integers, and descriptors of weights stay. What is left is to put in the stream and what has moved.
"""

import inspect
from collections.abc import Callable, Mapping, Set

import triton
from torch import Tensor
from triton import knobs
from triton.backends.nvidia import driver as nvidia

from fusion.relaunch import CannotRelaunch, Launched, memory_of

KNOWN_TRITON = "3.6."
"""The versions whose function takes these arguments."""
STREAM = 3
"""Its place among the arguments."""
HOOKS = slice(10, 13)
"""Places of what hooks are told, and of those that are called before and after the launch."""


class CompiledLaunch:
    """`(stream, addresses)`: a kernel on the current device, with all set but the addresses of some tensors.

    The tensors are told by the start of their memory: `moving` holds the place of each among `addresses`, and the
    address that it has now; `fixed` are those whose address stays, and there must be no others.

    Raises CannotRelaunch for a kernel that Triton has to launch itself.
    """

    def __init__(self, launched: Launched, moving: Mapping[int, tuple[int, int]], fixed: Set[int]):
        compiled = launched.compiled
        if not triton.__version__.startswith(KNOWN_TRITON):
            raise CannotRelaunch(f"Triton {triton.__version__}")
        if not isinstance(getattr(compiled, "run", None), nvidia.CudaLauncher):
            raise CannotRelaunch("no kernel of a CUDA GPU")
        launcher = compiled.run
        if launcher.global_scratch_size or launcher.profile_scratch_size:
            raise CannotRelaunch("memory that Triton allocates")
        self._compiled = compiled
        self._grid = (*launched.grid, 1, 1)[:3]
        self._launch = _in_c(launcher.launch)
        self._encode = triton.runtime.driver.active.utils.fill_tma_descriptor
        self._arguments: list[object] = [
            *(*self._grid, None, compiled.function, launcher.launch_cooperative_grid, launcher.launch_pdl),
            *(None, None, compiled.packed_metadata, None, None, None),
        ]
        self._pointers: list[tuple[int, int, int]] = []  # place among the arguments, which address, bytes from there
        self._descriptors: list[tuple[int, int, int, tuple]] = []  # and what else is encoded
        boxes = iter(getattr(compiled.metadata, "tensordesc_meta", None) or ())
        for kind, value in zip(compiled.src.signature.values(), _values(launched), strict=True):
            if kind == "constexpr":
                self._arguments.append(None)
            elif isinstance(kind, tuple):
                raise CannotRelaunch("a tuple of arguments")
            elif kind.startswith("*"):
                self._add_pointer(value, moving, fixed)
            elif kind.startswith("tensordesc"):
                self._add_descriptor(value, next(boxes, None), moving, fixed)
            else:
                self._arguments.append(value)

    def __call__(self, stream: int, addresses: list[int]) -> None:
        arguments = self._arguments.copy()  # other threads launch it too
        arguments[STREAM] = stream
        for at, which, offset in self._pointers:
            arguments[at] = addresses[which] + offset
        for at, which, offset, box in self._descriptors:
            arguments[at] = self._encode(addresses[which] + offset, *box)
        enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
        if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):  # as profilers have
            arguments[HOOKS] = self._compiled.launch_metadata(self._grid, stream), enter, leave
        self._launch(*arguments)

    def _add_pointer(self, tensor: Tensor, moving: Mapping[int, tuple[int, int]], fixed: Set[int]) -> None:
        which, offset = _place(tensor, moving, fixed)
        if which is not None:
            self._pointers.append((len(self._arguments), which, offset))
        self._arguments.append(offset)

    def _add_descriptor(self, descriptor, box: dict | None, moving: Mapping, fixed: Set[int]) -> None:
        if box is None or box["fp4_padded"]:
            raise CannotRelaunch("a descriptor that Triton changes")
        which, offset = _place(descriptor.base, moving, fixed)
        shape, strides = list(descriptor.shape), list(descriptor.strides)
        element = nvidia.TMA_DTYPE_DEVICE_TO_HOST[box["elem_type"]]
        padding = int(descriptor.padding == "nan")
        encoded = box["swizzle"], box["elem_size"], element, box["block_size"], shape, strides, padding
        if which is not None:
            self._descriptors.append((len(self._arguments), which, offset, encoded))
        self._arguments += [self._encode(offset, *encoded) if which is None else None, *shape, *strides]


def _place(tensor: Tensor, moving: Mapping[int, tuple[int, int]], fixed: Set[int]) -> tuple[int | None, int]:
    """Which address it is, and how many bytes from there; or None, and an address that stays."""
    memory = memory_of(tensor)
    if memory in moving:
        which, address = moving[memory]
        return which, tensor.data_ptr() - address
    if memory in fixed:
        return None, tensor.data_ptr()
    raise CannotRelaunch("a tensor that is made for the launch")


def _values(launched: Launched) -> list[object]:
    """Of a kernel's arguments, in order."""
    signature = launched.kernel.signature
    named = {name: value for name, value in launched.kwargs.items() if name in signature.parameters}
    bound = signature.bind(*launched.args, **named)
    bound.apply_defaults()
    return list(bound.arguments.values())


def _in_c(launch: Callable) -> Callable:
    """What a launcher's function calls once it has encoded the descriptors; the function itself if there are none."""
    return inspect.getclosurevars(launch).nonlocals["launcher"] if inspect.isfunction(launch) else launch

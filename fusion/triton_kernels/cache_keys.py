"""Keys of Triton's compilation cache that are the same in every process.

Triton computes a kernel's key when it is first launched, from the functions that it calls among others. What it takes
of those depends on whether they have keys of their own by then, from a kernel that was launched before. So the same
kernel would have other keys, and be compiled again, in processes that launch kernels in another order.
"""

import sys
from types import ModuleType

from triton.runtime.jit import JITCallable

PACKAGE = __name__.rpartition(".")[0]

_settled: set[str] = set()


def settle_cache_keys(kernel: object) -> None:
    """Give all functions of a kernel's module their keys, those of the modules that it imports from first."""
    kernel = kernel if isinstance(kernel, JITCallable) else getattr(kernel, "kernel", None)  # of one that is wrapped
    if isinstance(kernel, JITCallable):
        _settle(sys.modules[kernel.__module__])


def _settle(module: ModuleType) -> None:
    if module.__name__ in _settled or not module.__name__.startswith(PACKAGE):
        return
    _settled.add(module.__name__)
    functions = [value for value in vars(module).values() if isinstance(value, JITCallable)]
    for function in functions:
        _settle(sys.modules[function.__module__])
    for function in functions:
        _ = function.cache_key

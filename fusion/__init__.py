"""Fused kernels for convolutional networks: whole residual blocks as one kernel, for PyTorch inference.

`fuse(network)` runs a network's blocks fused, and `load(path)` reads back what a fused network's `save` wrote.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fusion.fused_file import load
    from fusion.fusing import fuse

__version__ = "0.1.0"
__all__ = ["fuse", "load"]


def __getattr__(name: str):
    # Imported when first used: the planner and the command line's help work without torch. No module is named after a
    # function, for it would take the function's place when it is imported.
    if name == "fuse":
        return import_module("fusion.fusing").fuse
    if name == "load":
        return import_module("fusion.fused_file").load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

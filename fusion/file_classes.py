"""The classes that a file of a fused network names: how they are found again without trusting the file.

A class is found only if it is fusion's, or the program has imported its module before, and must be a module, a
dataclass or a container. So a file can neither import nor call anything that its reader does not have anyway.
"""

import sys
from collections.abc import Sequence
from dataclasses import is_dataclass
from importlib import import_module

from torch import nn

from fusion.cuda_graphs import CudaGraphs
from fusion.fused_module import FusedModule
from fusion.modules import FusedBlock
from fusion.stage import FusedStage

CONTAINERS = (list, tuple, dict)
CONSTRUCTED = (FusedBlock, FusedStage, FusedModule, CudaGraphs)
"""Made by their constructors, whose arguments are attributes of the same names; other modules are made without."""


def class_path(cls: type) -> str | None:
    """Such as "models.mbconv:MBConv"; None for a class that cannot be found by its name."""
    path = f"{cls.__module__}:{cls.__qualname__}"
    return path if _find(path) is cls else None


def find_classes(paths: Sequence[str]) -> list[type]:
    """The classes of these paths. Raises ValueError for what the program does not have, and for any other object."""
    classes = [_find(path) for path in paths]
    missing = [path.partition(":") for path, cls in zip(paths, classes, strict=True) if cls is None]
    if missing:
        names = ", ".join(f"{module}.{name}" for module, _, name in missing)
        imports = "; ".join(f"import {module}" for module in dict.fromkeys(module for module, _, _ in missing))
        raise ValueError(
            f"the file needs the classes {names}, which this program does not have; it imports no code by itself, so "
            f"do that first: {imports}"
        )
    for cls in classes:
        if not (isinstance(cls, type) and (issubclass(cls, (nn.Module, *CONTAINERS)) or is_dataclass(cls))):
            raise ValueError(f"{cls!r} is neither a module, a dataclass nor a container, and is not made from a file")
    return classes


def _find(path: str) -> type | None:
    module_name, _, name = path.partition(":")
    if module_name.partition(".")[0] == __package__ and module_name not in sys.modules:
        try:
            import_module(module_name)
        except ImportError:
            return None
    found = sys.modules.get(module_name)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found

"""Fused kernels for convolutional networks: whole residual blocks as one kernel, for PyTorch inference.

`torch.compile(model, backend="fusion")` fuses the blocks that it finds in any model, and `explain(model, x)` tells
which those are. `waterline(model, x)` tells how fast a model can be on a GPU, and where its time goes. `fuse(network)`
runs the blocks of this project's networks fused, `load(path)` reads back what a fused network's `save` wrote, and
`package(network, example_input, path)` compiles it for programs without Python.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fusion.analysis.model_waterline import waterline
    from fusion.backend.explain_model import explain
    from fusion.fused_file import load
    from fusion.fusing import fuse
    from fusion.packaging import package

__version__ = "0.1.0"
__all__ = ["explain", "fuse", "load", "package", "waterline"]

# Imported when first used: the planner and the command line's help work without torch. No module is named after a
# function, for it would take the function's place when it is imported.
_HOMES = {
    "explain": "fusion.backend.explain_model",
    "fuse": "fusion.fusing",
    "load": "fusion.fused_file",
    "package": "fusion.packaging",
    "waterline": "fusion.analysis.model_waterline",
}


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

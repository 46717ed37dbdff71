"""The backend of `torch.compile(model, backend="fusion")`: fuses the blocks that it finds in a model's graphs.

PyTorch finds it by the entry point "fusion" of the group `torch_dynamo_backends`, so nothing has to be imported.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, fx

if TYPE_CHECKING:
    from fusion.backend.compiled_graph import CompiledGraph

__all__ = ["compile_graph"]


def compile_graph(
    graph_module: fx.GraphModule,
    inputs: Sequence[Tensor],
    *,
    mode: str | None = None,
    options: Mapping[str, object] | None = None,
) -> "CompiledGraph":
    """Compile a graph as Dynamo passes it: its residual blocks fused, the rest by Inductor.

    `mode` and `options` are those of `torch.compile` (`fusion.backend.options.BackendOptions`).

    Raises:
        ValueError: an option or mode is unknown or not supported.
        What goes wrong in fusing, with the option `strict`; otherwise that is a warning, and Inductor gets the graph as
        it is.
    """
    from fusion.backend.compiled_graph import CompiledGraph
    from fusion.backend.options import BackendOptions

    return CompiledGraph(graph_module, inputs, BackendOptions.parse(mode, options))


def _reset() -> None:
    # Not imported here: that may register backends, while PyTorch goes through them all.
    trees = sys.modules.get("torch._inductor.cudagraph_trees")
    if trees is not None:
        trees.reset_cudagraph_trees()


compile_graph.reset = _reset
"""`torch.compiler.reset()` calls it: CUDA graphs of Inductor's are forgotten."""

"""The backend "fusion", with what it made of each graph kept."""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, fx

from fusion.backend import compile_graph
from fusion.backend.compiled_graph import CompiledGraph
from fusion.backend.report import CompileReport


class RecordingBackend:
    """A backend for `torch.compile`, with mode and options of the backend "fusion", which does the work.

    It needs no entry point: what is measured is this checkout, installed or not.
    """

    __name__ = "fusion"

    def __init__(self):
        self._graphs: list[CompiledGraph] = []

    def __call__(self, graph_module: fx.GraphModule, inputs: Sequence[Tensor], **options: object) -> CompiledGraph:
        compiled = compile_graph(graph_module, inputs, **options)
        self._graphs.append(compiled)
        return compiled

    @property
    def report(self) -> CompileReport:
        """Blocks of all graphs that were compiled, those of the first graph first."""
        reports = [graph.report for graph in self._graphs]
        return CompileReport.joined(
            replace(report, rows=tuple(replace(row, graph=index) for row in report.rows))
            for index, report in enumerate(reports)
        )

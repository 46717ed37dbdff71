"""`fusion.explain`: what the backend makes of a model."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx, nn

from fusion.backend.compiled_once import compiled_for_once, fresh_function
from fusion.backend.examine import examine
from fusion.backend.options import BackendOptions
from fusion.backend.report import CompileReport
from fusion.fused_module import FusedModule, call_arguments


def explain(
    model: nn.Module,
    example_input: Tensor | tuple | dict,
    *,
    mode: str | None = None,
    options: Mapping[str, object] | None = None,
) -> CompileReport:
    """Which blocks `torch.compile(model, backend="fusion")` finds, fuses, or leaves to Inductor, and why.

    The model runs once, as it is, without gradients and in the modes (autocast) of the caller. Its blocks are planned,
    and on a GPU measured, fused and as Inductor would run them, as when it is compiled.

    Args:
        model: a model in eval mode.
        example_input: an input, a tuple of positional arguments, or a dict of keyword arguments.
        mode, options: as for `torch.compile`.

    Returns:
        A report whose `str()` is a table, with predicted and measured microseconds of each block.

    Raises:
        TypeError: the model is fused already.
        ValueError: an option or mode is unknown or not supported.
        What the model itself raises.
    """
    if isinstance(model, FusedModule):
        raise TypeError(
            "fusion.explain takes a model that torch.compile is to fuse; this one is fused: call its explain()"
        )
    model = getattr(model, "_orig_mod", model)  # one that is compiled already
    parsed = BackendOptions.parse(mode, options)
    reports: list[CompileReport] = []

    def note(graph_module: fx.GraphModule, inputs: Sequence[object]):
        reports.append(_numbered(examine(graph_module, inputs, parsed).report, len(reports)))
        return graph_module.forward

    args, kwargs = call_arguments(example_input)
    with torch.no_grad(), compiled_for_once():
        torch.compile(fresh_function(_call), backend=note)(model, args, kwargs)
    return CompileReport.joined(reports)


def _call(model: nn.Module, args: tuple, kwargs: dict) -> object:
    # Not the model's own code: one that is compiled in place already would run as it is compiled.
    return model(*args, **kwargs)


def _numbered(report: CompileReport, index: int) -> CompileReport:
    return replace(report, rows=tuple(replace(row, graph=index) for row in report.rows))

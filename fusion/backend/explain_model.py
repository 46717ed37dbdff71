"""`fusion.explain`: what the backend makes of a model."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import CodeType, FunctionType

import torch
from torch import Tensor, fx, nn
from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list, reset_code
from torch._dynamo.convert_frame import register_bytecode_hook

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
    with torch.no_grad(), _compiled_for_once():
        torch.compile(_fresh(_call), backend=note)(model, args, kwargs)
    return CompileReport.joined(reports)


def _call(model: nn.Module, args: tuple, kwargs: dict) -> object:
    # Not the model's own code: one that is compiled in place already would run as it is compiled.
    return model(*args, **kwargs)


def _fresh(function: FunctionType) -> FunctionType:
    """A function like this one with code of its own: what Dynamo compiles it to goes when it does."""
    return FunctionType(function.__code__.replace(), function.__globals__, function.__name__)


@contextmanager
def _compiled_for_once() -> Iterator[None]:
    """What Dynamo compiles here does not count among the few times that it compiles a function.

    That of functions which it has compiled before stays: those of a model with graph breaks that is compiled already.
    """
    fresh: list[CodeType] = []
    seen: set[int] = set()

    def note(code: CodeType, _: CodeType) -> None:
        if id(code) not in seen and not _debug_get_cache_entry_list(code):
            fresh.append(code)
        seen.add(id(code))

    limits = torch._dynamo.config.patch(recompile_limit=1000, accumulated_recompile_limit=10_000)
    hook = register_bytecode_hook(note)
    try:
        with limits:
            yield
    finally:
        hook.remove()
        for code in fresh:
            reset_code(code)


def _numbered(report: CompileReport, index: int) -> CompileReport:
    return replace(report, rows=tuple(replace(row, graph=index) for row in report.rows))

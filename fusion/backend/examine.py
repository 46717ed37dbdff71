"""The blocks of a graph, and which of them are fused: what to do with a graph, before anything is done."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fusion.backend.graph_copy import constants_of, copy_graph
from fusion.backend.judge import Verdict, judge
from fusion.backend.options import BackendOptions
from fusion.backend.region import input_kind
from fusion.backend.report import BlockRow, CompileReport
from fusion.backend.warm_up import warm_up
from fusion.frontend.find import Findings, FoundBlock, find_blocks
from fusion.fusing import lazy_tuner
from fusion.launch_record import InputKind
from fusion.modules import processor_of_device
from fusion.op_checks import GPU_DTYPES, any_of
from fusion.planner.graph import BlockGraph
from fusion.planner.plan import Plan, PlanError

logger = logging.getLogger("fusion.backend")

NO_METADATA = "the graph does not tell its tensors' shapes"


@dataclass(frozen=True)
class Examined:
    """A graph of its own (`graph_module`), its constants, what was found in it, and which of that is to be fused, in
    order; and a report on all."""

    graph_module: fx.GraphModule
    constants: Mapping[fx.Node, Tensor]
    findings: Findings
    fused: tuple[FoundBlock, ...]
    report: CompileReport


def examine(graph_module: fx.GraphModule, inputs: Sequence[object], options: BackendOptions) -> Examined:
    """Find the blocks of a graph as Dynamo passes it with its inputs, plan them, and measure whether fusing pays.

    `graph_module` stays as it is. Raises, with `strict`, what goes wrong with a block; otherwise that is the reason why
    it is left alone.
    """
    copied = copy_graph(graph_module)
    constants = constants_of(copied, inputs)
    findings = find_blocks(copied, constants, lazy_tuner(options.tune))
    rows: dict[fx.Node, BlockRow] = {
        left.node: BlockRow(0, left.name, left.kind, left.reason) for left in findings.left
    }
    wanted: list[FoundBlock] = []
    for found in findings.found:
        reason = _why_no_kernels(found, options) or _why_not_watched(found, constants, options)
        rows[found.output] = BlockRow(0, found.name, found.kind, reason or "")
        if reason is None:
            wanted.append(found)
    planned = _planned(wanted, options, rows)
    warm_up(planned, options.min_speedup)
    fused = []
    for found, plan in planned:
        row = _judged(copied, found, plan, constants, options, rows[found.output])
        rows[found.output] = row
        if row.is_fused:
            fused.append(found)
    order = {node: index for index, node in enumerate(copied.graph.nodes)}
    report = CompileReport(tuple(rows[node] for node in sorted(rows, key=order.__getitem__)))
    return Examined(copied, constants, findings, tuple(fused), report)


def find_again(
    graph_module: fx.GraphModule, inputs: Sequence[object], options: BackendOptions
) -> tuple[fx.GraphModule, Findings]:
    """The blocks of a graph with the weights that its inputs have now, in a copy of the graph."""
    copied = copy_graph(graph_module)
    return copied, find_blocks(copied, constants_of(copied, inputs), lazy_tuner(options.tune))


def _why_no_kernels(found: FoundBlock, options: BackendOptions) -> str | None:
    """Why no kernel can run a block where and how it runs; None if one may."""
    x, out = found.input.meta.get("example_value"), found.output.meta.get("example_value")
    if not isinstance(x, Tensor) or not isinstance(out, Tensor):
        return NO_METADATA
    if x.dim() != 4:
        return f"its input must be [N, C, H, W], and is {list(x.shape)}"
    for value in (x, out):
        if is_traceable_wrapper_subclass(value) or is_functorch_wrapped_tensor(value):
            return "its tensors are of a class or within a transform of torch.func, and compute in ways of their own"
    if torch.autograd.forward_ad._current_level >= 0:
        return "a forward gradient may be needed: call the model outside of torch.autograd.forward_ad.dual_level()"
    if any(_needs_gradient(node) for node in found.nodes):
        return "a gradient may be needed: call the model under torch.no_grad() or torch.inference_mode()"
    if out.device.type == "cuda":
        if out.dtype not in GPU_DTYPES:
            return (
                f"it computes in {out.dtype}, fused kernels in {any_of(GPU_DTYPES)}: convert the model, or use autocast"
            )
    elif out.device.type != "cpu":
        return f"there are no kernels for {out.device.type}, only for CUDA GPUs"
    elif options.min_speedup > 0:
        return "there are no kernels for CPUs; with min_speedup=0 a fused block computes the reference there"
    elif not out.dtype.is_floating_point:
        return f"it computes in {out.dtype}, not in a floating dtype"
    return None


def _needs_gradient(node: fx.Node) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, Tensor) and value.requires_grad


def _why_not_watched(found: FoundBlock, constants: Mapping[fx.Node, Tensor], options: BackendOptions) -> str | None:
    """Why changes of a block's parameters would go unnoticed (`fusion.backend.watch`); None if they do not matter."""
    if options.inductor.get("freezing"):
        return None
    parameters = (constants[each] for node in found.nodes for each in node.all_input_nodes if each in constants)
    if any(parameter.is_inference() for parameter in parameters):
        return (
            "its parameters are made in inference mode, where PyTorch does not count changes: make the model outside "
            "of torch.inference_mode(), or set the option freezing=True"
        )
    return None


def _planned(
    wanted: Sequence[FoundBlock], options: BackendOptions, rows: dict[fx.Node, BlockRow]
) -> list[tuple[FoundBlock, Plan]]:
    """Blocks that have a kernel, and their plans, which they adopt; for others the rows get the reason."""
    graphs: list[tuple[FoundBlock, InputKind, BlockGraph]] = []
    for found in wanted:
        kind = input_kind(found)
        batch, channels, height, width = kind.shape
        try:
            graph = found.block.graph(max(batch, 1), height, width, channels, kind.dtype)
            lazy_tuner(False)(graph, processor_of_device(kind.device))
        except PlanError as error:
            rows[found.output] = replace(rows[found.output], reason=str(error))
            continue
        graphs.append((found, kind, graph))
    if options.tune:
        _tune([(kind.device, graph) for _, kind, graph in graphs])
    planned = []
    for found, kind, graph in graphs:
        plan = lazy_tuner(options.tune)(graph, processor_of_device(kind.device))
        found.block.adopt_plan(kind.device, plan)
        planned.append((found, plan))
    return planned


def _tune(wanted: Sequence[tuple[torch.device, BlockGraph]]) -> None:
    """Tune all blocks of a device together, with one progress bar; the tuner remembers."""
    from fusion.tuner import tune_blocks

    for device in dict.fromkeys(device for device, _ in wanted):
        if device.type == "cuda":
            tune_blocks(list(dict.fromkeys(graph for where, graph in wanted if where == device)), device=device)


def _judged(
    graph_module: fx.GraphModule,
    found: FoundBlock,
    plan: Plan,
    constants: Mapping[fx.Node, Tensor],
    options: BackendOptions,
    row: BlockRow,
) -> BlockRow:
    row = replace(row, plan=plan)
    if options.min_speedup == 0:
        return row
    try:
        verdict = judge(graph_module, found, plan, constants, options.min_speedup)
    except Exception as error:
        if options.strict:
            raise
        reason = f"it cannot be measured ({type(error).__name__}: {error})"
        logger.warning("block %r is left to Inductor: %s", found.name, reason)
        return replace(row, reason=reason)
    return replace(row, verdict=verdict, reason=_why_slow(verdict, options.min_speedup))


def _why_slow(verdict: Verdict, min_speedup: float) -> str:
    if verdict.speedup >= min_speedup:
        return ""
    return (
        f"fused it takes {verdict.fused_us:.1f} us, as {verdict.other} runs it {verdict.other_us:.1f} us: not "
        f"{min_speedup:g} times as fast"
    )

"""How a fused network runs: a row for every fused block and every layer that is not."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from fusion.launch_record import InputKind, Launch
from fusion.modules import FusedBlock
from fusion.planner.plan import Plan
from fusion.stage import FusedStage
from fusion.timing import graph_us
from fusion.trace import Trace, unfused_layers
from fusion.wide_text import wide_text

NOT_A_BLOCK = "not a block"
NO_PLAN = "no plan yet: pass an input to explain(), or an example_input to fusion.fuse"
NOT_RUN = "does not run for this input"

REPEATS = 8
"""Calls in a measured graph: a single kernel is too short to time."""


@dataclass(frozen=True)
class ExplainedRow:
    """A fused block, or a layer that is not fused, as it runs on an input.

    `name` is that in the network (empty for the network itself), `module` the name of its class, `plan` the block's
    plan, None for a layer that is not fused; `note` says why not. Times are in microseconds. `measured_us` is the
    tuner's, or that of `explain(measure=True)`; blocks of one launch, of which there are `launched_together`, share its
    time evenly.
    """

    name: str
    module: str
    plan: Plan | None = None
    input: InputKind | None = None
    launched_together: int = 1
    measured_us: float | None = None
    note: str = ""

    @property
    def program(self) -> str | None:
        """Name of the planner's program, for example "fused"."""
        return self.plan and self.plan.program.name

    @property
    def kernel(self) -> str | None:
        """Name of the kernel family."""
        return self.plan and self.plan.kernel

    @property
    def tile(self) -> str | None:
        """The tile, as it can be pasted into `fusion.planner.plan.plan_block`."""
        return self.plan and repr(self.plan.tile)

    @property
    def ops(self) -> int | None:
        """Arithmetic operations, in OPs."""
        return self.plan and self.plan.ops_count

    @property
    def bytes(self) -> int | None:
        """DRAM traffic of the block's program, run by itself."""
        return self.plan and self.plan.bytes

    @property
    def predicted_us(self) -> float | None:
        """The planner's estimate."""
        return self.plan and self.plan.predicted_us

    @property
    def limit_us(self) -> float | None:
        """Minimum latency of the block's program on the processor (section 4)."""
        return self.plan and self.plan.limit_us


@dataclass(frozen=True)
class Explanation:
    """Rows in the order in which things run, and the measured time of the whole network if there is one.

    `str()` is a table with the sums over the fused blocks.
    """

    rows: tuple[ExplainedRow, ...]
    network_us: float | None = None

    @property
    def fused(self) -> tuple[ExplainedRow, ...]:
        """The rows of fused blocks."""
        return tuple(row for row in self.rows if row.plan is not None)

    def total(self, what: str) -> float | None:
        """Sum of "ops", "bytes", "predicted_us", "limit_us" or "measured_us" of fused blocks; None if one lacks it."""
        values = [getattr(row, what) for row in self.fused]
        return None if None in values else sum(values)

    def __str__(self) -> str:
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, show_footer=True)
        for title, footer, justify in zip(TITLES, _total_cells(self), JUSTIFY, strict=True):
            table.add_column(title, footer=footer, justify=justify, no_wrap=True)
        for row in self.rows:
            table.add_row(*_cells(row))
        if self.network_us is None:
            return wide_text(table)
        return wide_text(table, f"the whole network, measured: {self.network_us:.1f} us")

    __repr__ = __str__


TITLES = ("name", "module", "input", "program", "kernel")
TITLES += ("GOP", "MB", "predicted us", "limit us", "measured us", "tile, note")
JUSTIFY = ("left",) * 5 + ("right",) * 5 + ("left",)


def explain_trace(network: nn.Module, left_eager: Mapping[str, str], trace: Trace, measure: bool) -> Explanation:
    """Explain what ran; measure it too, on the GPU. Raises RuntimeError for `measure` if it ran elsewhere."""
    names = {module: name for name, module in network.named_modules()}
    rows: list[ExplainedRow] = []
    for run in trace.runs:
        if isinstance(run, Launch):
            us = _us(run.input, _runner(run.blocks)) if measure else None
            together = len(run.blocks)
            for block in run.blocks:
                row = _block_row(names[block], block, run.plan)
                measured = row.measured_us if us is None else us / together
                rows.append(replace(row, input=run.input, launched_together=together, measured_us=measured))
        else:
            us = _us(run.input, run.layer) if measure and run.input is not None else None
            note = left_eager.get(names[run.layer], NOT_A_BLOCK)
            rows.append(_layer_row(names[run.layer], run.layer, note, input=run.input, measured_us=us))
    ran = {row.name for row in rows}
    for row in _rows_of(network, left_eager):
        if row.name not in ran:
            note = NOT_RUN if row.note in ("", NO_PLAN) else f"{NOT_RUN}; {row.note}"
            rows.append(replace(row, plan=None, measured_us=None, note=note))
    return Explanation(tuple(rows), _network_us(network, trace.inputs) if measure else None)


def explain_without_trace(network: nn.Module, left_eager: Mapping[str, str]) -> Explanation:
    """Explain what the modules know: the latest plan of every block, if it has one."""
    return Explanation(tuple(_rows_of(network, left_eager)))


def _rows_of(network: nn.Module, left_eager: Mapping[str, str]) -> Iterable[ExplainedRow]:
    layers = {layer: name for name, layer in unfused_layers(network, left_eager)}
    for name, module in network.named_modules():
        if isinstance(module, FusedBlock):
            plans = module.plans
            yield _block_row(name, module, plans[-1][1] if plans else None)
        elif module in layers:
            yield _layer_row(name, module, left_eager.get(name, NOT_A_BLOCK))


def _block_row(name: str, block: FusedBlock, plan: Plan | None) -> ExplainedRow:
    measured_us = plan.measured_us if plan else None
    return ExplainedRow(name, type(block).__name__, plan, measured_us=measured_us, note="" if plan else NO_PLAN)


def _layer_row(name: str, layer: nn.Module, note: str, **what) -> ExplainedRow:
    return ExplainedRow(name, type(layer).__name__, note=note, **what)


def _runner(blocks: Sequence[FusedBlock]) -> nn.Module:
    return blocks[0] if len(blocks) == 1 else FusedStage(blocks)


def _us(kind: InputKind, module: nn.Module) -> float | None:
    """Microseconds of a call on a random input; None for inputs that cannot be random."""
    if kind.device.type != "cuda":
        raise RuntimeError(f"measuring needs an input on a CUDA GPU, the last one was on {kind.device}")
    if not kind.dtype.is_floating_point:
        return None
    with torch.cuda.device(kind.device), torch.no_grad():
        x = kind.random()

        def run() -> None:
            for _ in range(REPEATS):
                module(x)

        return graph_us(run) / REPEATS


def _network_us(network: nn.Module, inputs: tuple[InputKind, ...] | None) -> float | None:
    if not inputs or not all(kind.dtype.is_floating_point for kind in inputs):
        return None
    with torch.cuda.device(inputs[0].device), torch.no_grad():
        args = [kind.random() for kind in inputs]
        return graph_us(lambda: network(*args))


def _cells(row: ExplainedRow) -> list[str]:
    shape = row.input.shape if row.input else ()
    if row.plan and not shape:
        shape = row.plan.shape.batch, row.plan.shape.in_channels, row.plan.shape.height, row.plan.shape.width
    texts = [row.name or "(itself)", row.module, "x".join(map(str, shape)), row.program, row.kernel]
    numbers = _numbers(row.ops, row.bytes, row.predicted_us, row.limit_us, row.measured_us)
    together = f", {row.launched_together} blocks in one launch" if row.launched_together > 1 else ""
    return [*(text or "-" for text in texts), *numbers, f"{row.tile}{together}" if row.plan else row.note]


def _total_cells(explanation: Explanation) -> list[str]:
    sums = [explanation.total(what) for what in ("ops", "bytes", "predicted_us", "limit_us", "measured_us")]
    return [f"{len(explanation.fused)} fused", "", "", "", "", *_numbers(*sums), ""]


def _numbers(ops: float | None, num_bytes: float | None, *times: float | None) -> list[str]:
    counts = [(ops, 1e9, "{:.3f}"), (num_bytes, 1e6, "{:.2f}"), *((time, 1, "{:.1f}") for time in times)]
    return ["-" if value is None else form.format(value / unit) for value, unit, form in counts]

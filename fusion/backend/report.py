"""What the backend made of a model's blocks, and why."""

from collections.abc import Iterable
from dataclasses import dataclass

from fusion.backend.judge import Verdict
from fusion.planner.plan import Plan
from fusion.wide_text import wide_text

FUSED = "fused"


@dataclass(frozen=True)
class BlockRow:
    """A block that was found in a graph, or something that looked like one.

    `name` is what the model calls it, `kind` what it is ("ConvFirst", "MBConv", "FFN", "stem", "head"), `graph` counts
    the graphs of a model that has graph breaks. `reason` says why it is left to Inductor, and is empty if it is fused.
    `plan` is None if there is no kernel, `verdict` if nothing was measured.
    """

    graph: int
    name: str
    kind: str
    reason: str = ""
    plan: Plan | None = None
    verdict: Verdict | None = None

    @property
    def is_fused(self) -> bool:
        return not self.reason

    @property
    def predicted_us(self) -> float | None:
        """The planner's estimate, in microseconds."""
        return self.plan and self.plan.predicted_us

    @property
    def limit_us(self) -> float | None:
        """Minimum latency of the block's program on the processor (section 4), in microseconds."""
        return self.plan and self.plan.limit_us

    def to_json(self) -> dict[str, object]:
        """The row as plain data."""
        verdict = self.verdict
        return {
            "graph": self.graph,
            "name": self.name,
            "kind": self.kind,
            "fused": self.is_fused,
            "reason": self.reason,
            "kernel": self.plan and self.plan.kernel,
            "predicted_us": self.predicted_us,
            "limit_us": self.limit_us,
            "fused_us": verdict and verdict.fused_us,
            "other_us": verdict and verdict.other_us,
            "other": verdict and verdict.other,
        }


@dataclass(frozen=True)
class CompileReport:
    """The blocks of a model's graphs, in order, and how many graphs there are.

    `str()` is a table; `errors` tell what went wrong in graphs that were left as they are.
    """

    rows: tuple[BlockRow, ...]
    graphs: int = 1
    errors: tuple[str, ...] = ()

    @classmethod
    def joined(cls, reports: Iterable["CompileReport"]) -> "CompileReport":
        """The report of several graphs, from those of each."""
        reports = list(reports)
        rows = (row for report in reports for row in report.rows)
        return cls(tuple(rows), len(reports), tuple(error for report in reports for error in report.errors))

    @property
    def fused(self) -> tuple[BlockRow, ...]:
        """The blocks that run fused."""
        return tuple(row for row in self.rows if row.is_fused)

    @property
    def left(self) -> tuple[BlockRow, ...]:
        """The blocks that are left to Inductor."""
        return tuple(row for row in self.rows if not row.is_fused)

    def to_json(self) -> dict[str, object]:
        """The report as plain data."""
        return {"graphs": self.graphs, "errors": list(self.errors), "blocks": [row.to_json() for row in self.rows]}

    def summary(self) -> str:
        """One line."""
        graphs = "1 graph" if self.graphs == 1 else f"{self.graphs} graphs"
        return f"{graphs}: {len(self.fused)} blocks fused, {len(self.left)} left to Inductor"

    def __str__(self) -> str:
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD)
        for title, justify in zip(TITLES, JUSTIFY, strict=True):
            table.add_column(title, justify=justify, no_wrap=True)
        for row in self.rows:
            table.add_row(*_cells(row))
        return wide_text(*([table] if self.rows else []), self.summary(), *self.errors)

    __repr__ = __str__


TITLES = ("graph", "name", "block", "kernel", "predicted us", "limit us", "fused us", "otherwise us", "speedup", "")
JUSTIFY = ("right", "left", "left", "left", "right", "right", "right", "right", "right", "left")


def _cells(row: BlockRow) -> list[str]:
    numbers = [row.predicted_us, row.limit_us]
    numbers += [row.verdict.fused_us, row.verdict.other_us] if row.verdict else [None, None]
    kernel = row.plan.kernel if row.plan else "-"
    what = row.reason or FUSED
    if row.verdict and row.is_fused:
        what += f", against {row.verdict.other}"
    speedup = f"{row.verdict.speedup:.2f}" if row.verdict else "-"
    cells = ["-" if number is None else f"{number:.1f}" for number in numbers]
    return [str(row.graph), row.name, row.kind, kernel, *cells, speedup, what]

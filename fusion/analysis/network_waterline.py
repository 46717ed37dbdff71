"""The waterline of a whole network: layer by layer, and with its blocks fused (paper sections 4.2 and 6.2)."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from fusion.planner.processor import Processor
from fusion.planner.waterline import KernelBound, Waterline
from fusion.wide_text import wide_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class BlockGain:
    """A block of a network, and what fusing it would win at most.

    `kernel` is the kernel family that the planner runs it with on the processor; None if none does, and `reason` then
    says why. Minimum latencies are in seconds: `layerwise` sums up the block's layers, `fused` the kernels of its fused
    program, or what one kernel for all of it would take, whose input, weights and output alone are in DRAM.
    `predicted` is what the planner expects of its kernel, in seconds, too; None without one.
    """

    name: str
    kind: str
    kernel: str | None
    reason: str
    layerwise: float
    fused: float
    network: float
    """Minimum latency of the network, layer by layer."""
    predicted: float | None = None

    @property
    def gain(self) -> float:
        """How many times as fast the whole network is at most with this block fused (appendix B)."""
        return self.network / (self.network - self.layerwise + self.fused)


@dataclass(frozen=True)
class LeftLayers:
    """What looks like a block and cannot be one, and why."""

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class NetworkWaterline:
    """How fast a network can be on a processor, and where its time goes. `fusion.waterline` makes it.

    Attributes:
        name: what the network is called.
        processor: whose peak and bandwidth are assumed.
        dtype: of all activations and weights, whatever the network was given in.
        layerwise: its layers as one kernel each.
        fused: the same with every block fused that the planner has a kernel for on this processor.
        all_fused: the same with every block fused that was found, as if there were kernels for all.
        blocks: the blocks that were found, in order.
        left: what is left alone although it looks like a block.
        unknown: operators that are none of the planner's operations; they are counted by the bytes that they move.
        why_no_blocks: why no blocks were looked for; empty if they were.
    """

    name: str
    processor: Processor
    dtype: str
    layerwise: Waterline
    fused: Waterline
    all_fused: Waterline
    blocks: tuple[BlockGain, ...] = ()
    left: tuple[LeftLayers, ...] = ()
    unknown: tuple[str, ...] = ()
    why_no_blocks: str = ""

    @property
    def programs(self) -> dict[str, Waterline]:
        """The waterlines that differ, by name: "layerwise", "fused", "all fused"."""
        lines = {"layerwise": self.layerwise}
        if any(block.kernel is not None for block in self.blocks):
            lines["fused"] = self.fused
        if any(block.kernel is None for block in self.blocks):
            lines["all fused"] = self.all_fused
        return lines

    def table(self, kernels: bool = False) -> str:
        """The programs, the blocks and what fusing each would win, as text; with `kernels` each kernel too."""
        parts: list[object] = [f"{self.name}, {self.dtype}, on {self.processor}", _programs_table(self.programs)]
        if self.blocks:
            parts.append(_blocks_table(self.blocks))
        if self.why_no_blocks:
            parts.append(f"no blocks were looked for: {self.why_no_blocks}")
        parts += [f"left alone: {left.name} ({left.kind}): {left.reason}" for left in self.left]
        if self.unknown:
            parts.append(f"unknown, counted by bytes: {', '.join(self.unknown)}")
        if kernels:
            parts += [_kernels_table(name, line) for name, line in self.programs.items()]
        return wide_text(*parts)

    __str__ = table

    def meta(self) -> dict[str, object]:
        """What holds for the whole network, as plain data; efficiencies in percent, times in microseconds."""
        return {
            "model": self.name,
            "dtype": self.dtype,
            "processor": self.processor.title,
            "peak_tflops": self.processor.peak_ops / 1e12,
            "bandwidth_tbs": self.processor.bandwidth / 1e12,
            **{
                f"{name}_{key}": value
                for name, line in (("layerwise", self.layerwise), ("fused", self.fused), ("all_fused", self.all_fused))
                for key, value in _totals(line).items()
            },
            "blocks": [
                {
                    "name": block.name,
                    "kind": block.kind,
                    "kernel": block.kernel,
                    "reason": block.reason,
                    "layerwise_us": block.layerwise * 1e6,
                    "fused_us": block.fused * 1e6,
                    "predicted_us": None if block.predicted is None else block.predicted * 1e6,
                    "network_gain": block.gain,
                }
                for block in self.blocks
            ],
            "left": [vars(left) for left in self.left],
            "unknown": list(self.unknown),
            "why_no_blocks": self.why_no_blocks,
        }

    def rows(self, programs: Mapping[str, Waterline] | None = None) -> list[dict[str, object]]:
        """A row for each kernel of each of the `programs`, in order; of all of them by default."""
        return [
            kernel_row(self.name, program, line, index)
            for program, line in (programs or self.programs).items()
            for index in range(len(line.kernels))
        ]

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """`meta` and `rows` as JSON text, which is written to `path` if there is one. Raises OSError."""
        text = json.dumps({"meta": self.meta(), "rows": self.rows()}, indent=1, ensure_ascii=False) + "\n"
        if path is not None:
            with open(path, "w", encoding="utf-8") as file:
                file.write(text)
        return text

    def plot(self, path: str | os.PathLike[str] | None = None) -> "Figure":
        """The programs as the paper's figures 3 and 15 draw them, one under the other; saved if there is a path.

        Raises ValueError for another suffix than .png, .svg or .pdf, OSError if the file cannot be written.
        """
        return plot_programs([(self.name, program, line) for program, line in self.programs.items()], path)


def plot_programs(
    programs: Sequence[tuple[str, str, Waterline]], path: str | os.PathLike[str] | None = None
) -> "Figure":
    """Draw programs, given as network, name and waterline, on one page. Raises as `NetworkWaterline.plot` does."""
    from fusion.plots.waterline_plot import WaterlinePanel, plot_waterline

    panels = [WaterlinePanel(f"{name}, {PROGRAM_TITLES[program]}", line) for name, program, line in programs]
    return plot_waterline(panels, path)


PROGRAM_TITLES = {
    "layerwise": "layer by layer",
    "fused": "blocks fused as planned",
    "all fused": "all blocks fused, as if there were kernels",
}


def kernel_row(model: str, program: str, line: Waterline, index: int) -> dict[str, object]:
    """A kernel as plain data: OPs, bytes of DRAM traffic, OP/byte (None if it moves nothing), minimum latency in us.

    `gain` is how many times as fast the whole program would be without this kernel's DRAM traffic (appendix B).
    """
    kernel = line.kernels[index]
    return {
        "model": model,
        "program": program,
        "name": kernel.name,
        "kind": str(kernel.layer_kind),
        "ops": kernel.ops_count,
        "bytes": kernel.bytes,
        "intensity": kernel.intensity if math.isfinite(kernel.intensity) else None,
        "minimum_us": kernel.min_latency * 1e6,
        "memory_bound": kernel.is_memory_bound,
        "gain": line.fusion_gain(index),
    }


def _totals(line: Waterline) -> dict[str, object]:
    return {
        "kernels": len(line.kernels),
        "ops": line.ops_count,
        "bytes": line.bytes,
        "minimum_us": line.min_latency * 1e6,
        "max_efficiency_pct": 100 * line.max_efficiency,
        "mediant_intensity": line.mediant_intensity if math.isfinite(line.mediant_intensity) else None,
        "mediant_efficiency_pct": 100 * line.mediant_efficiency,
        "memory_bound_pct": 100 * line.memory_bound_share,
    }


def _programs_table(programs: dict[str, Waterline]) -> object:
    titles = ("program", "kernels", "GOP", "MB", "minimum ms", "max. efficiency %", "mediant OP/byte", "roofline %")
    table = _table((*titles, "memory-bound time %"))
    for name, line in programs.items():
        table.add_row(
            PROGRAM_TITLES[name],
            str(len(line.kernels)),
            f"{line.ops_count / 1e9:.1f}",
            f"{line.bytes / 1e6:.0f}",
            f"{line.min_latency * 1e3:.3f}",
            f"{100 * line.max_efficiency:.1f}",
            f"{line.mediant_intensity:.0f}",
            f"{100 * line.mediant_efficiency:.1f}",
            f"{100 * line.memory_bound_share:.1f}",
        )
    return table


def _blocks_table(blocks: Sequence[BlockGain]) -> object:
    """A row for each run of equal blocks, which are fused together."""
    titles = ("block", "kind", "blocks", "layer-wise µs each", "fused µs each", "network's gain", "predicted µs each")
    table = _table((*titles, "kernel"))
    for _, group in groupby(blocks, key=lambda block: (block.kind, block.kernel, block.layerwise, block.fused)):
        run = list(group)
        first, last = run[0], run[-1]
        spared = len(run) * (first.layerwise - first.fused)
        table.add_row(
            first.name if len(run) == 1 else f"{first.name} to {last.name}",
            first.kind,
            str(len(run)),
            f"{first.layerwise * 1e6:.1f}",
            f"{first.fused * 1e6:.1f}",
            f"{first.network / (first.network - spared):.2f}x",
            "-" if first.predicted is None else f"{first.predicted * 1e6:.1f}",
            first.kernel or f"none: {first.reason}",
        )
    return table


def _kernels_table(program: str, line: Waterline) -> object:
    table = _table((PROGRAM_TITLES[program], "kind", "GOP", "MB", "OP/byte", "minimum µs", "of peak %", "bound"))
    for kernel in line.kernels:
        table.add_row(*_kernel_cells(kernel))
    return table


def _kernel_cells(kernel: KernelBound) -> list[str]:
    numbers = (kernel.ops_count / 1e9, kernel.bytes / 1e6, kernel.intensity, kernel.min_latency * 1e6)
    formats = ("{:.3f}", "{:.2f}", "{:.1f}", "{:.1f}")
    cells = [form.format(number) for form, number in zip(formats, numbers, strict=True)]
    bound = "memory" if kernel.is_memory_bound else "compute"
    return [kernel.name, str(kernel.layer_kind), *cells, f"{100 * kernel.max_efficiency:.1f}", bound]


def _table(titles: Sequence[str]) -> object:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for title in titles:
        is_text = title in ("program", "block", "kind", "kernel", "bound") or title in PROGRAM_TITLES.values()
        table.add_column(title, justify="left" if is_text else "right", no_wrap=True)
    return table

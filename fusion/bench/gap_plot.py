"""The efficiency gap of networks as a picture: accuracy over ideal and actual latency (the paper's figures 1 and 17).

Ideal latency is OPs / peak. The line from a network's ideal to its actual latency is the longer, on the logarithmic
axis, the less of the peak it reaches: it is labelled with that percentage.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from textwrap import fill
from typing import TYPE_CHECKING

from fusion.bench.block_plot import check_suffix

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, object]
Box = tuple[float, float, float, float]
"""Left, bottom, right, top in pixels."""

FAMILIES = {
    "convfirstnet": "ConvFirstNet",
    "convnext": "ConvNeXt",
    "efficientnetv2": "EfficientNetV2",
    "efficientnet": "EfficientNet",
}
COLOURS = {
    "ConvFirstNet": "#1f4e8c",
    "ConvNeXt": "#b00020",
    "EfficientNet": "#2e7d32",
    "EfficientNetV2": "#8a5a00",
}
MARKERS = {"ConvFirstNet": "o", "ConvNeXt": "s", "EfficientNet": "^", "EfficientNetV2": "D"}
FONT_SIZE = 8


@dataclass(frozen=True)
class Gap:
    """One line of the picture: latencies in milliseconds a batch, top-1 in percent, efficiency as a fraction."""

    family: str
    label: str
    program: str
    top1: float
    ideal_ms: float
    actual_ms: float

    @property
    def efficiency(self) -> float:
        return self.ideal_ms / self.actual_ms

    @property
    def text(self) -> str:
        """What stands beside the line."""
        return f"{self.label} {100 * self.efficiency:.0f}%"


def plot_gap(rows: Sequence[Row], meta: Row, path: str | os.PathLike[str]) -> None:
    """Draw the networks of a report whose top-1 is known, at the largest batch, on a linear and a logarithmic axis.

    ConvFirstNets are drawn fused and as Inductor runs them. If nothing was timed, their limits stand for what they
    reach, and the picture says so. Raises ValueError for another suffix than .png, .svg or .pdf and when there is
    nothing to draw, OSError if the file cannot be written.
    """
    check_suffix(path)
    gaps = network_gaps(rows, meta)
    if not gaps:
        raise ValueError(f"cannot draw {path}: no network of known accuracy has a latency")
    figure = draw_gaps(gaps, _title(rows, meta))
    figure.savefig(path, dpi=160)


def network_gaps(rows: Sequence[Row], meta: Row) -> list[Gap]:
    """The lines of the picture."""
    known = [row for row in rows if row["top1"] is not None and row["ops"] is not None]
    batch = max((row["batch"] for row in known), default=None)
    keys = ("fused", "inductor") if meta["timed"] else ("limit",)
    gaps = []
    for row in known:
        ideal_ms = row["ops"] / meta["peak_tflops"] / 1e9
        for program in keys:
            actual_ms = row[f"{program}_ms"]
            if row["batch"] == batch and actual_ms is not None:
                family, label = _family(row["model"])
                gaps.append(Gap(family, label, program, row["top1"], ideal_ms, actual_ms))
    return gaps


def draw_gaps(gaps: Sequence[Gap], title: str) -> "Figure":
    """The picture as a figure with two panels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 8.6), facecolor="white")
    FigureCanvasAgg(figure)  # measures texts
    figure.subplots_adjust(left=0.055, right=0.99, top=0.93, bottom=0.11, wspace=0.1)
    panels = figure.subplots(1, 2)
    for axes, scale in zip(panels, ("linear", "log"), strict=True):
        _draw_panel(axes, gaps, scale)
    for axes in panels:
        _label_gaps(axes, gaps)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=6, frameon=False, fontsize=9)
    figure.suptitle(fill(title, 150), x=0.055, ha="left", weight="bold", size=12)
    return figure


def _draw_panel(axes: "Axes", gaps: Sequence[Gap], scale: str) -> None:
    from matplotlib.ticker import LogLocator

    for gap in gaps:
        colour, marker = COLOURS[gap.family], MARKERS[gap.family]
        is_baseline = gap.family == "ConvFirstNet" and gap.program == "inductor"
        style = {"linestyle": "--" if is_baseline else "-", "linewidth": 1.3, "color": colour, "zorder": 2}
        axes.plot([gap.ideal_ms, gap.actual_ms], [gap.top1] * 2, **style)
        axes.plot(gap.ideal_ms, gap.top1, marker, color=colour, fillstyle="none", markersize=5, zorder=3)
        filled = "white" if is_baseline else colour
        axes.plot(
            gap.actual_ms, gap.top1, "X" if is_baseline else marker, color=colour, markerfacecolor=filled, zorder=3
        )
    _add_legend(axes, gaps)
    latencies = [ms for gap in gaps for ms in (gap.ideal_ms, gap.actual_ms)]
    axes.set_xscale(scale)
    if scale == "log":
        axes.set_xlim(min(latencies) / 1.6, max(latencies) * 2.2)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
    else:
        axes.set_xlim(-0.03 * max(latencies), 1.22 * max(latencies))
    accuracies = [gap.top1 for gap in gaps]
    margin = 0.3 + 0.05 * (max(accuracies) - min(accuracies))
    axes.set_ylim(min(accuracies) - margin, max(accuracies) + margin)
    axes.set_xlabel(f"latency of a batch [ms], {'logarithmic' if scale == 'log' else scale}")
    axes.set_ylabel("ImageNet-1k top-1 [%], as the paper has it")
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _add_legend(axes: "Axes", gaps: Sequence[Gap]) -> None:
    names = {"fused": "fused", "inductor": "Inductor", "limit": "limit, not timed"}
    axes.plot([], [], "o", color="#555555", fillstyle="none", linestyle="none", label="ideal: OPs / peak")
    for family, program in dict.fromkeys((gap.family, gap.program) for gap in gaps):
        is_baseline = family == "ConvFirstNet" and program == "inductor"
        axes.plot(
            [],
            [],
            "X" if is_baseline else MARKERS[family],
            color=COLOURS[family],
            markerfacecolor="white" if is_baseline else COLOURS[family],
            linestyle="--" if is_baseline else "-",
            label=f"{family}, {names[program]}",
        )


def _label_gaps(axes: "Axes", gaps: Sequence[Gap]) -> None:
    """Write each gap's text beside its line, where it covers neither lines, nor markers, nor other texts."""
    renderer = axes.figure.canvas.get_renderer()
    frame = axes.get_window_extent(renderer).extents
    point = axes.figure.dpi / 72
    ends = {gap: axes.transData.transform([(gap.ideal_ms, gap.top1), (gap.actual_ms, gap.top1)]) for gap in gaps}
    taken = [box for line in ends.values() for box in _line_boxes(line, point)]
    for gap in sorted(gaps, key=lambda gap: gap.actual_ms):
        text = axes.annotate(gap.text, (gap.actual_ms, gap.top1), (0, 0), textcoords="offset points", size=FONT_SIZE)
        text.set(color=COLOURS[gap.family], zorder=4)
        (start, y), (end, _) = ends[gap]
        extent = text.get_window_extent(renderer)
        width, height = extent.width, extent.height
        boxes = [
            (end + dx, y + dy, end + dx + width, y + dy + height)
            for dx, dy in _offsets(start - end, width, height, point)
        ]
        best = min(boxes, key=lambda box: (_covered(box, taken, frame), abs(box[0] - end), abs(box[1] - y)))
        text.xyann = ((best[0] - end) / point, (best[1] - y) / point)
        taken.append(best)


def _offsets(length: float, width: float, height: float, point: float) -> Iterator[tuple[float, float]]:
    """Where a text may stand, from the actual end of a line whose ideal end is `length` pixels away."""
    right, left, middle = 8 * point, length - 9 * point - width, (length - width) / 2
    yield right, -0.35 * height
    yield left, -0.35 * height
    for step in range(1, 12):
        lift = (2 + 3 * step) * point
        for dx in (right, middle, left, -width / 2):
            yield dx, lift
            yield dx, -lift - height


def _line_boxes(ends: Sequence[Sequence[float]], point: float) -> list[Box]:
    """The line and the markers at its ends, in pixels."""
    (x0, y), (x1, _) = ends
    markers = [(x - 4 * point, y - 4 * point, x + 4 * point, y + 4 * point) for x in (x0, x1)]
    return [(x0, y - point, x1, y + point), *markers]


def _covered(box: Box, taken: Sequence[Box], frame: Box) -> float:
    """Pixels of `box` that are taken, or outside of the frame."""
    outside = (box[2] - box[0]) * (box[3] - box[1]) - _shared(box, frame)
    return round(outside + sum(_shared(box, other) for other in taken), 6)


def _shared(a: Box, b: Box) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0) * max(height, 0)


def _family(model: str) -> tuple[str, str]:
    for prefix, family in FAMILIES.items():
        name = model.removeprefix("tf_")
        if name.startswith(prefix):
            variant = name.removeprefix(prefix).strip("_")
            return family, f"{family}-{variant.upper() if len(variant) <= 2 else variant.capitalize()}"
    return "ConvFirstNet", model


def _title(rows: Sequence[Row], meta: Row) -> str:
    batch = max(row["batch"] for row in rows)
    where = meta["device"] if meta["timed"] else f"{meta['processor']}, NOT TIMED: each network's limit"
    return (
        f"Efficiency gap on {where}, batch {batch}, {meta['dtype']}; peak {meta['peak_tflops']:.0f} TFLOP/s "
        f"({meta['ceilings_source']}); labels: efficiency in % of peak"
    )

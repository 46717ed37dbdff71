"""Waterline plots: kernels side by side on an axis of minimum latency, in water up to the processor's op:byte.

`plot_waterline` draws whole networks or blocks (the paper's figures 3 and 15), `plot_wells` compares blocks layer by
layer and fused (figures 8 and 12).
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import fill
from typing import TYPE_CHECKING

from fusion.planner.processor import Processor
from fusion.planner.waterline import Waterline
from fusion.plots import kernel_bars
from fusion.plots.kernel_bars import ARROW_ROOM, FONT_SIZE, Span
from fusion.plots.side_labels import EndLabel, label_ends
from fusion.plots.small_print import small_print_height, write_small_print
from fusion.plots.style import FAINT, INK, KIND_STYLES, WATER, check_suffix, new_figure, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMED = 24
"""Kernels have their names beside them in a panel of no more than these."""
WELLS_IN_A_ROW = 5
"""Of more wells than these, up to twice as many are drawn in two rows, and so on."""
LABEL_ROOM = 15.0
"""What a label above a bar needs, in points."""

Unit = tuple[float, str]
MICROSECONDS: Unit = (1e6, "µs")


@dataclass(frozen=True)
class WaterlinePanel:
    """A network or block, and what its title says."""

    title: str
    line: Waterline


@dataclass(frozen=True)
class Well:
    """A block, one kernel per layer and fused. `label` says which, for example "C 16, α 3, 128²"."""

    label: str
    layerwise: Waterline
    fused: Waterline


def plot_waterline(
    panels: Sequence[WaterlinePanel],
    path: str | os.PathLike[str] | None = None,
    *,
    title: str | None = None,
    share_x: bool = True,
    max_intensity: float | None = None,
) -> "Figure":
    """Draw one panel below the other: kernels as bars, and beside them the maximum efficiency.

    A bar is as wide as the kernel's minimum latency and as high as its intensity, up to `max_intensity` in OP/byte
    (default: all of it, or 1000 if any is higher than 1200); an arrow marks those that are higher. Of a few kernels the
    names are written where they fit. With `share_x` all panels have one scale of latency.
    The page is saved if there is a path.

    Raises ValueError for another suffix than .png, .svg or .pdf and when there are no panels, OSError if the file
    cannot be written.
    """
    if not panels:
        raise ValueError("there are no panels to draw")
    lines = [panel.line for panel in panels]
    limit = kernel_bars.bar_limit(lines, max_intensity)
    room = ARROW_ROOM if kernel_bars.are_clipped(lines, limit) else 6
    longest = max(line.min_latency for line in lines)
    units = [_unit(longest if share_x else line.min_latency) for line in lines]
    with new_figure(path, _frame_height(lines) + (2.4 if len(panels) == 1 else 1.75 * len(panels))) as figure:
        _frame(figure, title, lines, limit)
        grid = figure.subplots(len(panels), 2, squeeze=False, width_ratios=(22, 1))
        for row, (panel, (axes, gauge), unit) in enumerate(zip(panels, grid, units, strict=True)):
            kernel_bars.set_up(axes, limit)
            axes.set_xlim(0, 1)
            _draw_gauge(gauge, panel.line.max_efficiency)
            if share_x and row < len(panels) - 1:
                axes.tick_params(labelbottom=False)
            else:
                axes.set_xlabel(f"minimum latency, kernel after kernel [{unit[1]}]")
        _label_intensity(figure, grid[:, 0])
        figure.draw_without_rendering()  # lays out the page
        for panel, (axes, _), unit in zip(panels, grid, units, strict=True):
            _write_title(axes, panel, unit)
        figure.draw_without_rendering()
        labels = [_label_water(axes, line) for line, (axes, _) in zip(lines, grid, strict=True)]
        for line, (axes, _), (scale, _), label in zip(lines, grid, units, labels, strict=True):
            if share_x:
                axes.set_xlim(0, scale * longest / (1 - max(labels)))
            else:
                axes.set_xlim(0, scale * line.min_latency / (1 - label))
            kernel_bars.add_room(axes, limit, room)
            spans = kernel_bars.draw_bars(axes, line.kernels, 0, scale, limit)
            kernel_bars.draw_water(axes, line.processor.op_byte, *axes.get_xlim())
            kernel_bars.mark_clipped(axes, line.kernels, spans, limit)
            if len(line.kernels) <= NAMED:
                _name_kernels(axes, line, spans, limit)
    return figure


def plot_wells(
    wells: Sequence[Well],
    path: str | os.PathLike[str],
    *,
    title: str | None = None,
    max_intensity: float | None = None,
) -> None:
    """Draw blocks beside each other: layer by layer, then fused, with the minimum latencies of both.

    Bars are as `plot_waterline` draws them, but each well has a scale of latency of its own: all are equally wide layer
    by layer. Raises ValueError for another suffix than .png, .svg or .pdf and when there are no wells, OSError if the
    file cannot be written.
    """
    check_suffix(path)
    if not wells:
        raise ValueError(f"cannot draw {path}: there are no wells")
    lines = [line for well in wells for line in (well.layerwise, well.fused)]
    limit = kernel_bars.bar_limit(lines, max_intensity)
    room = LABEL_ROOM + (ARROW_ROOM if kernel_bars.are_clipped(lines, limit) else 0)
    rows = -(-len(wells) // WELLS_IN_A_ROW)
    in_a_row = -(-len(wells) // rows)
    pitch = 1.3 + max(well.fused.min_latency / well.layerwise.min_latency for well in wells)
    with new_figure(path, _frame_height(lines) + 2.3 * rows) as figure:
        _frame(figure, title, lines, limit)
        grid = figure.subplots(rows, 1, squeeze=False)[:, 0]
        chunks = [wells[row * in_a_row : (row + 1) * in_a_row] for row in range(rows)]
        for axes, chunk in zip(grid, chunks, strict=True):
            kernel_bars.set_up(axes, limit)
            axes.grid(visible=False, axis="x")
            axes.set_xlim(-0.15, in_a_row * pitch - 0.15)
            widths = [1 + well.fused.min_latency / well.layerwise.min_latency for well in chunk]
            middles = [pitch * index + width / 2 for index, width in enumerate(widths)]
            axes.set_xticks(middles, [fill(well.label, 22) for well in chunk])
            axes.tick_params(axis="x", length=0)
        grid[-1].set_xlabel("width of a bar: minimum latency, as a part of the well's layer-by-layer one")
        _label_intensity(figure, grid)
        figure.draw_without_rendering()  # lays out the page
        for axes, chunk in zip(grid, chunks, strict=True):
            kernel_bars.add_room(axes, limit, room)
            processors = dict.fromkeys(well.layerwise.processor for well in chunk)
            label_ends(axes, [EndLabel(p.op_byte, _waterline_text(p), WATER, WATER) for p in processors])
        for axes, chunk in zip(grid, chunks, strict=True):
            for index, well in enumerate(chunk):
                _draw_well(axes, well, index * pitch, limit)


def _unit(seconds: float) -> Unit:
    """What makes seconds handy numbers: a factor, and the name of the unit."""
    return (1e3, "ms") if seconds >= 1e-3 else MICROSECONDS


def _latency(seconds: float, unit: Unit) -> str:
    scale, name = unit
    value = scale * seconds
    return f"{value:.0f} {name}" if value >= 100 else f"{value:.3g} {name}"


def _frame_height(lines: Sequence[Waterline]) -> float:
    return 1.1 + small_print_height(line.processor for line in lines)


def _frame(figure: "Figure", title: str | None, lines: Sequence[Waterline], limit: float) -> None:
    """What stands around the panels: title, legend, and the ceilings that the picture assumes."""
    if title is not None:
        figure.suptitle(fill(title, 90), x=0.01, ha="left", weight="bold", size=11)
    write_small_print(figure, kernel_bars.legend_handles(lines, limit), [line.processor for line in lines])


def _label_intensity(figure: "Figure", grid: "Sequence[Axes]") -> None:
    """The label of the y axis: one for all panels."""
    if len(grid) == 1:
        grid[0].set_ylabel("operational intensity\n[OP/byte], square-root scale")
    else:
        figure.supylabel("operational intensity [OP/byte], square-root scale", size=9)


def _write_title(axes: "Axes", panel: WaterlinePanel, unit: Unit) -> None:
    """The panel's title on the left and, in its line if there is room, what the kernels take on the right.

    The page must be laid out.
    """
    line = panel.line
    kernels = f"{len(line.kernels)} kernel{'s' if len(line.kernels) > 1 else ''}"
    shortest = _latency(line.min_latency, unit)
    title = axes.set_title(fill(panel.title, 90), loc="left", weight="bold")
    summary = axes.annotate(
        f"{kernels}, at least {shortest}, {line.memory_bound_share:.0%} of it memory-bound",
        (1, 1),
        (0, 4),
        xycoords="axes fraction",
        textcoords="offset points",
        ha="right",
        va="bottom",
        size=FONT_SIZE,
        color=FAINT,
    )
    renderer, point = axes.figure.canvas.get_renderer(), axes.figure.dpi / 72
    width = title.get_window_extent(renderer).width + summary.get_window_extent(renderer).width
    if width + 8 * point > axes.get_window_extent(renderer).width:
        axes.set_title(title.get_text(), loc="left", weight="bold", pad=18)


def _draw_gauge(axes: "Axes", efficiency: float) -> None:
    """A narrow bar of the maximum efficiency, with its percentage."""
    tidy(axes)
    axes.grid(visible=False)
    axes.spines[["top", "right", "left"]].set_visible(True)
    axes.bar(0, 100 * efficiency, 1, color=FAINT, zorder=2)
    axes.set(xlim=(-0.5, 0.5), ylim=(0, 100), xticks=[], yticks=range(0, 101, 25))
    axes.yaxis.tick_right()
    axes.yaxis.set_label_position("right")
    axes.set_ylabel("max. efficiency [%]")
    inside = efficiency > 0.8
    axes.annotate(
        f"{efficiency:.0%}",
        (0, 100 * efficiency),
        (0, -3 if inside else 2),
        textcoords="offset points",
        ha="center",
        va="top" if inside else "bottom",
        color="white" if inside else INK,
        size=FONT_SIZE,
        weight="bold",
        zorder=3,
    )


def _waterline_text(processor: Processor) -> str:
    return f"{fill(processor.title, 16)}\n{processor.op_byte:.0f} OP/byte"


def _label_water(axes: "Axes", line: Waterline) -> float:
    """Name the processor on its waterline, at the right; the part of the axes' width that this takes."""
    text = axes.annotate(
        _waterline_text(line.processor),
        (1, line.processor.op_byte),
        (-2, 2),
        xycoords=axes.get_yaxis_transform(),
        textcoords="offset points",
        ha="right",
        va="bottom",
        size=FONT_SIZE,
        color=WATER,
        zorder=4,
    )
    renderer = axes.figure.canvas.get_renderer()
    margin = 8 * axes.figure.dpi / 72
    return (text.get_window_extent(renderer).width + margin) / axes.get_window_extent(renderer).width


def _name_kernels(axes: "Axes", line: Waterline, spans: Sequence[Span], limit: float) -> None:
    """Write each kernel's name over its bar, or inside of a high one; not at all where it does not fit."""
    renderer, point = axes.figure.canvas.get_renderer(), axes.figure.dpi / 72
    frame = axes.get_window_extent(renderer)
    _, surface = axes.transData.transform((0, line.processor.op_byte))
    for kernel, (left, right) in zip(line.kernels, spans, strict=True):
        text = axes.annotate(
            kernel.name,
            ((left + right) / 2, min(kernel.intensity, limit)),
            (0, 3),
            textcoords="offset points",
            ha="center",
            va="bottom",
            size=FONT_SIZE,
            zorder=4,
        )
        width = (right - left) * kernel_bars.points_per_unit(axes) * point
        extent = text.get_window_extent(renderer)
        if extent.width > width:
            text.set_rotation("vertical")
            extent = text.get_window_extent(renderer)
        if extent.y0 < surface + 2 * point < extent.y1 + 2 * point:
            text.xyann = (0, 3 + (surface + 2 * point - extent.y0) / point)  # or the waterline would cross it
            extent = text.get_window_extent(renderer)
        if kernel.intensity > limit or extent.y1 > frame.y1:
            face = KIND_STYLES[kernel.layer_kind]["facecolor"]
            text.set(va="top", color="white" if kernel_bars.is_dark(kernel.layer_kind) else INK)
            text.set_bbox({"facecolor": face, "linewidth": 0, "pad": 1})
            text.xyann = (0, -4)
            extent = text.get_window_extent(renderer)
        if extent.width > width or extent.y0 < frame.y0:
            text.remove()


def _draw_well(axes: "Axes", well: Well, start: float, limit: float) -> None:
    gap = 0.08
    op_byte = well.layerwise.processor.op_byte
    position = start
    for line in (well.layerwise, well.fused):
        spans = kernel_bars.draw_bars(axes, line.kernels, position, 1 / well.layerwise.min_latency, limit)
        kernel_bars.mark_clipped(axes, line.kernels, spans, limit)
        highest = max(op_byte, *(kernel.intensity for kernel in line.kernels))
        axes.annotate(
            _latency(line.min_latency, MICROSECONDS),
            ((spans[0][0] + spans[-1][1]) / 2, min(highest, limit)),
            (0, 3 if highest <= limit else 3 + ARROW_ROOM),
            textcoords="offset points",
            ha="center",
            va="bottom",
            size=FONT_SIZE,
            zorder=4,
        )
        position = spans[-1][1] + gap
    kernel_bars.draw_water(axes, op_byte, start - gap, position)

"""Maximum efficiency over the processor's op:byte, by waterline and by roofline (the paper's figures 4 and 16)."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from textwrap import fill
from typing import TYPE_CHECKING

from fusion.planner.op_byte_sweep import SweepPoint
from fusion.planner.processor import Processor
from fusion.plots.side_labels import EndLabel, Flag, label_ends, raise_flags
from fusion.plots.small_print import small_print_height, write_small_print
from fusion.plots.style import INK, check_suffix, new_figure, tidy

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

COLOURS = ("#1f4e8c", "#c2410c", "#2e7d32", "#8e6bb0", "#8a5a00", "#5d5d5d", "#b00020", "#00838f")
MARKERS = "osD^vPX*"
MARKS = 6
"""Markers on a line, evenly spaced: they tell lines apart that have no colour."""
BETWEEN = 0.15
"""Opacity of what is between roofline and waterline."""


@dataclass(frozen=True)
class SweepCurve:
    """A network, or another program, over a range of op:byte, as `fusion.planner.op_byte_sweep.sweep` returns it."""

    label: str
    points: tuple[SweepPoint, ...]


def plot_sweep(
    curves: Sequence[SweepCurve],
    processors: Iterable[Processor],
    path: str | os.PathLike[str],
    *,
    title: str | None = None,
    together: bool = True,
) -> None:
    """Draw the curves in one panel or, if not `together`, each in a panel of its own.

    The x axis ends with the points; a processor whose op:byte is beyond is left out. Raises ValueError for another
    suffix than .png, .svg or .pdf and when there are no curves or one has fewer than two points, OSError if the file
    cannot be written.
    """
    check_suffix(path)
    if not curves:
        raise ValueError(f"cannot draw {path}: there are no curves")
    for curve in curves:
        if len(curve.points) < 2:
            raise ValueError(f"cannot draw {path}: the curve of {curve.label!r} has fewer than two points")
    panels = [curves] if together else [[curve] for curve in curves]
    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    processors = list(processors)
    flags = [Flag(processor.op_byte, f"{processor.name.upper()} {processor.op_byte:.0f}") for processor in processors]
    ratios = [point.op_byte for curve in curves for point in curve.points]
    height = (4.6 if together else 1 + 2.9 * rows) + small_print_height(processors)
    with new_figure(path, height) as figure:
        if title is not None:
            figure.suptitle(fill(title, 90), x=0.01, ha="left", weight="bold", size=11)
        write_small_print(figure, _handles(together), processors)
        grid = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat)
        for axes in grid[len(panels) :]:
            axes.remove()
        for axes, panel in zip(grid, panels, strict=False):
            tidy(axes)
            axes.set(xlim=(min(ratios), max(ratios)), ylim=(0, 104), yticks=range(0, 101, 20))
            axes.tick_params(labelbottom=True, labelleft=True)
            axes.set_xlabel("op:byte of the processor")
            axes.set_ylabel("maximum efficiency [%]")
            for index, curve in enumerate(panel):
                _draw_curve(axes, curve, index, len(panel))
            room = raise_flags(axes, flags)
            if not together:
                axes.set_title(fill(panel[0].label, 50), loc="left", weight="bold", pad=4 + room)
        if together:
            ends = [(100 * curve.points[-1].waterline_efficiency, curve.label) for curve in curves]
            label_ends(
                grid[0], [EndLabel(y, fill(label, 26), _colour(i), _colour(i)) for i, (y, label) in enumerate(ends)]
            )


def _draw_curve(axes: "Axes", curve: SweepCurve, index: int, count: int) -> None:
    ratios = [point.op_byte for point in curve.points]
    waterline = [100 * point.waterline_efficiency for point in curve.points]
    roofline = [100 * point.roofline_efficiency for point in curve.points]
    colour = _colour(index)
    if count == 1:
        axes.fill_between(ratios, waterline, roofline, color=colour, alpha=BETWEEN, linewidth=0, zorder=1)
    axes.plot(ratios, roofline, linestyle="--", linewidth=1.2, color=colour, zorder=2)
    step = max(len(ratios) // MARKS, 1)
    axes.plot(
        ratios,
        waterline,
        linewidth=1.8,
        color=colour,
        marker=MARKERS[index % len(MARKERS)],
        markevery=(step // 2 + step * index // (2 * count), step),
        markersize=5,
        markerfacecolor="white",
        zorder=3,
    )


def _handles(together: bool) -> "list[Artist]":
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    waterline = Line2D([], [], color=INK, linewidth=1.8, label="waterline: one kernel after another")
    roofline = Line2D([], [], color=INK, linewidth=1.2, linestyle="--", label="roofline: of total OPs / total bytes")
    between = Patch(color=_colour(0), alpha=BETWEEN, linewidth=0, label="what roofline overestimates")
    return [waterline, roofline] if together else [waterline, roofline, between]


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]

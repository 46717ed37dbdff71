"""Kernels as bars in water: as wide as their minimum latency, as high as their intensity, water up to the op:byte.

Bars are drawn for the size that they have on the page: hatched and outlined where they are wide enough, in plain colour
where hundreds of them share a few inches. The scale of intensities is that of their square roots, which leaves room for
what is under water.
"""

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from fusion.planner.layer_kind import LayerKind
from fusion.planner.waterline import KernelBound, Waterline
from fusion.plots.style import INK, KIND_STYLES, WATER, tidy

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

Span = tuple[float, float]
"""Left and right end of a bar, on the x axis."""

TOLERATED = 1200.0
"""Bars up to this intensity, in OP/byte, are drawn in full if no other limit is asked for."""
CLIP = 1000.0
"""Where bars end if one of them is higher than that, in OP/byte."""
TICKS = (0, 25, 100, 250, 500, 1000, 2000, 4000)

HATCHED, OUTLINED = 7.0, 1.5
"""Least widths of bars that are hatched and that have an outline, in points."""
LOWEST = 1.6
"""A bar is drawn at least as high as this, in points: kernels without OPs have a colour too."""
FONT_SIZE = 8.5
ARROW = {"marker": (3, 0, 0), "markersize": 6, "color": INK, "linestyle": "none", "zorder": 4}
ARROW_ROOM = 16.0
"""What `mark_clipped` needs above the bars, in points."""


def bar_limit(lines: Iterable[Waterline], max_intensity: float | None = None) -> float:
    """Where bars end, in OP/byte: at `max_intensity` if one is higher, else where the highest does.

    It is never less than 1.5 times the highest op:byte.
    """
    lines = tuple(lines)
    highest = max(kernel.intensity for line in lines for kernel in line.kernels)
    lowest_limit = 1.5 * max(line.processor.op_byte for line in lines)
    if max_intensity is None:
        max_intensity = CLIP if highest > TOLERATED else highest
    return max(min(highest, max_intensity), lowest_limit)


def are_clipped(lines: Iterable[Waterline], limit: float) -> bool:
    """Whether bars of any of the lines end at `limit` though their kernels' intensity is higher."""
    return any(kernel.intensity > limit for line in lines for kernel in line.kernels)


def set_up(axes: "Axes", limit: float) -> None:
    """Axes of intensities up to `limit`."""
    tidy(axes)
    axes.set_yscale("function", functions=(lambda y: abs(y) ** 0.5, lambda root: root * abs(root)))
    axes.set_ylim(0, limit)
    axes.set_yticks([tick for tick in TICKS if tick <= limit])


def add_room(axes: "Axes", limit: float, room: float) -> None:
    """Leave this many points free above bars that end at `limit`. The page must be laid out."""
    height = axes.get_window_extent().height / (axes.figure.dpi / 72)
    axes.set_ylim(0, limit * (height / (height - room)) ** 2)


def draw_water(axes: "Axes", op_byte: float, start: float, end: float) -> None:
    """Water behind the kernels and in front of them."""
    for zorder, alpha in ((0.5, 0.13), (3, 0.08)):
        axes.fill_between([start, end], 0, op_byte, facecolor=WATER, alpha=alpha, linewidth=0, zorder=zorder)
    axes.plot([start, end], [op_byte, op_byte], color=WATER, linewidth=1.6, zorder=3.5, solid_capstyle="butt")


def draw_bars(axes: "Axes", kernels: Sequence[KernelBound], start: float, scale: float, limit: float) -> list[Span]:
    """Draw kernels side by side from `start`, `scale` units of the x axis wide per second, no higher than `limit`.

    Returns the bars' spans. The limits of the axes must be final and the page laid out.
    """
    from matplotlib.patches import Rectangle

    x_point = points_per_unit(axes)
    bottom = axes.get_window_extent().y0 + LOWEST * axes.figure.dpi / 72
    _, lowest = axes.transData.inverted().transform((0, bottom))
    spans = []
    for kernel in kernels:
        width = scale * kernel.min_latency
        height = min(max(kernel.intensity, lowest), limit)
        axes.add_patch(Rectangle((start, 0), width, height, zorder=2, **_style(kernel.layer_kind, width * x_point)))
        spans.append((start, start + width))
        start += width
    return spans


def points_per_unit(axes: "Axes") -> float:
    """Points on the page that one unit of the x axis is wide."""
    left, right = axes.get_xlim()
    return axes.get_window_extent().width / (right - left) / (axes.figure.dpi / 72)


def mark_clipped(axes: "Axes", kernels: Sequence[KernelBound], spans: Sequence[Span], limit: float) -> None:
    """Mark bars that end at `limit` by an arrow and, where there is room, their intensity.

    Bars less than a point apart share an arrow, and the intensity of the highest. One that repeats is written once.
    """
    x_point = points_per_unit(axes)
    runs: list[tuple[float, float, float]] = []
    for kernel, (left, right) in zip(kernels, spans, strict=True):
        if kernel.intensity <= limit:
            continue
        if runs and (left - runs[-1][1]) * x_point < 1:
            runs[-1] = (runs[-1][0], right, max(runs[-1][2], kernel.intensity))
        else:
            runs.append((left, right, kernel.intensity))
    renderer, point = axes.figure.canvas.get_renderer(), axes.figure.dpi / 72
    frame = axes.get_window_extent(renderer)
    arrow_end = text_end = -math.inf
    written = None
    for left, right, intensity in runs:
        x = (left + right) / 2
        pixel, _ = axes.transData.transform((x, limit))
        if pixel < arrow_end:
            continue
        arrow_end = pixel + 6 * point
        axes.plot(x, limit, clip_on=False, **ARROW)
        label = f"{intensity:.0f}" if math.isfinite(intensity) else "∞"
        if label == written:
            continue
        text = axes.annotate(
            label,
            (x, limit),
            (0, 5),
            textcoords="offset points",
            ha="center",
            va="bottom",
            size=FONT_SIZE,
            zorder=4,
        )
        extent = text.get_window_extent(renderer)
        shift = max(frame.x0 - extent.x0, 0)
        if extent.x0 + shift < text_end:
            text.remove()
        else:
            text.xyann = (shift / point, 5)
            text_end, written = extent.x1 + shift + 3 * point, label


def legend_handles(lines: Iterable[Waterline], limit: float) -> "list[Artist]":
    """Legend entries of the kinds of kernels that occur, and of the arrow if bars are clipped."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    lines = tuple(lines)
    occurring = {kernel.layer_kind for line in lines for kernel in line.kernels}
    kinds = [kind for kind in LayerKind if kind in occurring]
    handles = [Patch(edgecolor=INK, linewidth=0.6, label=str(kind), **KIND_STYLES[kind]) for kind in kinds]
    if are_clipped(lines, limit):
        handles.append(Line2D([], [], label="higher than the axis", **ARROW))
    return handles


def is_dark(kind: LayerKind) -> bool:
    """Whether bars of this kind need light lines and letters on them."""
    from matplotlib.colors import to_rgb

    red, green, blue = to_rgb(KIND_STYLES[kind]["facecolor"])
    return 0.3 * red + 0.59 * green + 0.11 * blue < 0.45


def _style(kind: LayerKind, width: float) -> dict[str, object]:
    """Of a bar that is `width` points wide."""
    face, hatch = KIND_STYLES[kind]["facecolor"], KIND_STYLES[kind].get("hatch")
    if width < OUTLINED:
        # An edge of the face's colour, or the page shows between bars that share a pixel.
        return {"facecolor": face, "edgecolor": face, "linewidth": 0.25}
    edge = "white" if is_dark(kind) and not hatch else INK
    hatch = hatch if width >= HATCHED else None
    return {"facecolor": face, "edgecolor": edge, "linewidth": min(0.8, 0.08 * width), "hatch": hatch}

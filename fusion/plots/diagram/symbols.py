"""The tensor machine's picture language in matplotlib: boxes, symbols of operations, arrows, loops, frames (figure 5).

Axes are in inches and y points down.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fusion.planner.program import Memory
from fusion.plots.diagram.flow import op_label
from fusion.plots.diagram.page import Area, Band, Frame, PlacedBox, PlacedOp, Point, Wire
from fusion.plots.diagram.rows import STACK
from fusion.plots.diagram.shapes import BESIDE, DEPTH, LABEL, NOTE_PAD, RADIUS, Place
from fusion.plots.diagram.strokes import Symbol, symbol_of
from fusion.plots.diagram.text import FONT_SIZE, LINE, LOOP_SYMBOL, TEXT_PAD
from fusion.plots.style import INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.path import Path

MEMORY_STYLES: Mapping[Memory, Mapping[str, object]] = {
    Memory.DRAM: {"face": "#d3e0ee", "side": "#6f8fb3", "ink": "#1f4e8c", "hatch": "", "line": 2.2},
    Memory.GLOBAL: {"face": "#ffe0a8", "side": "#f0a030", "ink": "#c76a00", "hatch": "/////", "line": 1.6},
    Memory.LOCAL: {"face": "#fbd5d1", "side": "#d9534f", "ink": INK, "hatch": "....", "line": 0.9},
}
"""Of each memory: front and sides of its tensors, their hatching, colour and width of arrows out of it and into it."""

KERNEL_FACE, KERNEL_EDGE, STACK_FACE = "#f7f7f5", "#8a8a8a", "#e9e9e6"
BAND_FACE, BAND_EDGE = "#eaf3e4", "#5f8f4a"


def draw_box(axes: "Axes", placed: PlacedBox) -> None:
    """A tensor: an activation as a block, a weight as a sheet."""
    from matplotlib.patches import Polygon, Rectangle

    style = MEMORY_STYLES[placed.box.memory]
    left, top, width, height = placed.left, placed.top, placed.shape.width, placed.shape.height
    edge = {"edgecolor": style["ink"], "linewidth": 0.9, "zorder": 4}
    name = placed.box.tensor.name
    if not placed.box.is_flat:
        corners = [(left, top), (left + DEPTH, top - DEPTH), (left + width + DEPTH, top - DEPTH)]
        corners += [(left + width + DEPTH, top + height - DEPTH), (left + width, top + height), (left + width, top)]
        axes.add_patch(Polygon(corners, facecolor=style["side"], hatch=style["hatch"], joinstyle="round", **edge))
    axes.add_patch(Rectangle((left, top), width, height, facecolor=style["face"], label=f"tensor {name}", **edge))
    lines = [*placed.shape.name, *placed.shape.details]
    y = top + (height - LINE * len(lines)) / 2 + LINE / 2
    for number, line in enumerate(lines):
        weight = "bold" if number < len(placed.shape.name) else "normal"
        write(axes, left + width / 2, y + LINE * number, line, ha="center", weight=weight)
    for number, line in enumerate(placed.shape.note):
        y = top + height + NOTE_PAD + LINE / 2
        write(
            axes, left + (width + DEPTH) / 2, y + LINE * number, line, ha="center", color=style["ink"], style="italic"
        )


def draw_op(axes: "Axes", placed: PlacedOp) -> None:
    """An operation's symbol and its label."""
    draw_symbol(axes, symbol_of(placed.op), placed.x, placed.y)
    away = RADIUS + LABEL - LINE / 2
    y = placed.y + (away if placed.place is Place.BELOW else -away)
    is_beside = placed.place is Place.BESIDE
    x, align = (placed.x + BESIDE, "left") if is_beside else (placed.x, "center")
    write(axes, x, y, op_label(placed.op), ha=align)


def draw_symbol(axes: "Axes", symbol: Symbol, x: float, y: float) -> None:
    """A symbol in its circle."""
    from matplotlib.patches import Circle

    axes.add_patch(Circle((x, y), RADIUS, facecolor="white", edgecolor=INK, linewidth=1.1, zorder=4))
    for stroke in symbol.strokes:
        xs, ys = zip(*stroke, strict=True)
        axes.plot([x + RADIUS * s for s in xs], [y - RADIUS * s for s in ys], color=INK, linewidth=1.2, zorder=5)
    if symbol.dot:
        axes.add_patch(Circle((x, y), RADIUS * symbol.dot, facecolor=INK, edgecolor="none", zorder=5))


def draw_wire(axes: "Axes", wire: Wire) -> None:
    """An arrow with round corners, the thicker the slower the memory is."""
    from matplotlib.patches import PathPatch, Polygon

    style = MEMORY_STYLES[wire.memory]
    width = style["line"]
    size = 0.055 + 0.022 * width
    (x0, y0), (x1, y1) = wire.points[-2:]
    length = math.hypot(x1 - x0, y1 - y0)
    along = ((x1 - x0) / length, (y1 - y0) / length)
    base = (x1 - size * along[0], y1 - size * along[1])
    path = _rounded([*wire.points[:-1], base], 0.06)
    axes.add_patch(
        PathPatch(path, facecolor="none", edgecolor=style["ink"], linewidth=width, capstyle="butt", zorder=3)
    )
    across = (-along[1] * size * 0.5, along[0] * size * 0.5)
    head = [(x1, y1), (base[0] + across[0], base[1] + across[1]), (base[0] - across[0], base[1] - across[1])]
    axes.add_patch(Polygon(head, facecolor=style["ink"], edgecolor="none", zorder=3))


def draw_frame(axes: "Axes", frame: Frame) -> None:
    """A kernel, in front of the frames of further processors if its work is divided."""
    from matplotlib.patches import PathPatch

    for shift in (STACK, STACK / 2, 0.0) if frame.is_divided else (0.0,):
        path = _closed([(x + shift, y + shift) for x, y in frame.outline], 0.08)
        face = STACK_FACE if shift else KERNEL_FACE
        axes.add_patch(PathPatch(path, facecolor=face, edgecolor=KERNEL_EDGE, linewidth=1.0, zorder=1))
    left, top = frame.outline[0]
    for number, line in enumerate(frame.lines):
        y = top + TEXT_PAD / 2 + LINE * (number + 0.5)
        write(axes, left + TEXT_PAD, y, line, weight="normal" if number else "bold")


def draw_band(axes: "Axes", band: Band) -> None:
    """What a loop walks, with the loop's symbol and text."""
    _draw_area(axes, band.area, BAND_FACE, BAND_EDGE)
    if band.lines:
        draw_loop_symbol(axes, band.area.left + TEXT_PAD + 0.06, band.text_top + LINE / 2)
    for number, line in enumerate(band.lines):
        y = band.text_top + LINE * (number + 0.5)
        write(axes, band.area.left + TEXT_PAD + LOOP_SYMBOL, y, line, color="#33601f")


def draw_loop_symbol(axes: "Axes", x: float, y: float, radius: float = 0.06) -> None:
    """An arrow around a circle."""
    from matplotlib.patches import Arc, Polygon

    axes.add_patch(Arc((x, y), 2 * radius, 2 * radius, theta1=0, theta2=290, color=BAND_EDGE, linewidth=1.4, zorder=5))
    tip = (x + radius, y + 0.055)
    head = [(x + radius - 0.045, y), (x + radius + 0.045, y), tip]
    axes.add_patch(Polygon(head, facecolor=BAND_EDGE, edgecolor="none", zorder=5))


def _draw_area(axes: "Axes", area: Area, face: str, edge: str) -> None:
    """An area with a dashed line on its closed sides."""
    from matplotlib.patches import PathPatch, Rectangle

    size = (area.right - area.left, area.bottom - area.top)
    axes.add_patch(Rectangle((area.left, area.top), *size, facecolor=face, edgecolor="none", zorder=2))
    top_left, top_right = (area.left, area.top), (area.right, area.top)
    bottom_left, bottom_right = (area.left, area.bottom), (area.right, area.bottom)
    lines = [[top_left, top_right], [bottom_left, bottom_right]]
    lines += [] if area.is_open_left else [[top_left, bottom_left]]
    lines += [] if area.is_open_right else [[top_right, bottom_right]]
    for line in lines:
        style = {"edgecolor": edge, "linewidth": 1.0, "linestyle": (0, (4, 2)), "zorder": 2}
        axes.add_patch(PathPatch(_rounded(line, 0.0), facecolor="none", **style))


def _closed(corners: Sequence[Point], radius: float) -> "Path":
    """A path around corners, all of them round."""
    middle = ((corners[0][0] + corners[1][0]) / 2, (corners[0][1] + corners[1][1]) / 2)
    return _rounded([middle, *corners[1:], corners[0], middle], radius)


def _rounded(points: Sequence[Point], radius: float) -> "Path":
    """A path along points, with round corners."""
    from matplotlib.path import Path

    vertices, codes = [points[0]], [Path.MOVETO]
    for before, corner, after in zip(points, points[1:], points[2:], strict=False):
        for end, code in ((before, Path.LINETO), (after, Path.CURVE3)):
            length = math.dist(corner, end)
            part = min(radius, length / 2) / length if length else 0.0
            point = (corner[0] + part * (end[0] - corner[0]), corner[1] + part * (end[1] - corner[1]))
            if code == Path.CURVE3:
                vertices.append(corner)
                codes.append(code)
            vertices.append(point)
            codes.append(code)
    vertices.append(points[-1])
    codes.append(Path.LINETO)
    return Path(vertices, codes)


def write(axes: "Axes", x: float, y: float, text: str, **style: object) -> None:
    """A line of text around the height ``y``."""
    axes.text(x, y, text, **{"size": FONT_SIZE, "va": "center_baseline", "zorder": 6, **style})

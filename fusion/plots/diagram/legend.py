"""What the symbols of a diagram mean: a line at its foot, and a page of its own (figure 5)."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from fusion.planner.graph import OpKind, Role, Tensor
from fusion.planner.program import Memory
from fusion.plots.diagram.flow import Box
from fusion.plots.diagram.page import Area, Band, Frame, PlacedBox, Point, Wire
from fusion.plots.diagram.shapes import RADIUS, BoxShape
from fusion.plots.diagram.strokes import CONVOLUTION, PRODUCT, SYMBOLS
from fusion.plots.diagram.symbols import (
    draw_band,
    draw_box,
    draw_frame,
    draw_loop_symbol,
    draw_symbol,
    draw_wire,
    write,
)
from fusion.plots.diagram.text import LINE, text_width

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KEY_HEIGHT = 0.32
LEGEND_HEIGHT = 5.25
COLUMN = 1.75
"""From a picture to its words, on the left of the legend."""

MEMORIES = {
    Memory.DRAM: ("DRAM", "large, slow, outside of the chip: bytes are", "counted where they cross a kernel's frame"),
    Memory.GLOBAL: (
        "global memory",
        "on the chip, shared by all processors: a",
        "cache, and where they add partial sums",
    ),
    Memory.LOCAL: ("local memory", "fast, of one processor: small tiles only", ""),
}
"""Name and description of each."""

SIZES = ("of the tile that a processor has at a time;", "n, h, w, c: sizes that are still to be chosen")
LOOP = ("what is inside runs for one tile after another,", "each of which is loaded into local memory")
KERNEL = ("what runs at once; the frames behind it are other", "processors that its work is divided over")

OPERATIONS = (
    (PRODUCT, "tensor-matrix multiplication: 1×1, linear"),
    (CONVOLUTION, "conv2d, grouped: T channels a group"),
    (SYMBOLS[OpKind.MULTIPLY], "element-wise multiplication"),
    (SYMBOLS[OpKind.ADD], "element-wise addition"),
    (SYMBOLS[OpKind.RELU], "ReLU"),
    (SYMBOLS[OpKind.SILU], "SiLU"),
    (SYMBOLS[OpKind.SIGMOID], "sigmoid"),
    (SYMBOLS[OpKind.GLOBAL_AVERAGE_POOL], "global average pooling"),
    (SYMBOLS[OpKind.BLURPOOL], "blur-pool"),
    (SYMBOLS[OpKind.CONCAT], "concatenation"),
)


def draw_key(axes: "Axes", left: float, y: float) -> None:
    """The memories with their arrows, loops and frames in one line around ``y``."""
    x = left
    for memory, (name, *_) in MEMORIES.items():
        _swatch(axes, memory, x, y)
        draw_wire(axes, Wire(((x + 0.36, y), (x + 0.66, y)), memory))
        x = _caption(axes, x + 0.74, y, name)
    draw_loop_symbol(axes, x + 0.06, y)
    x = _caption(axes, x + 0.22, y, "loop over tiles")
    draw_frame(axes, Frame(0, _rectangle(x, y - 0.1, x + 0.3, y + 0.05), (), True))
    _caption(axes, x + 0.5, y, "kernel, divided over processors")


def draw_legend_page(axes: "Axes", left: float, right: float, top: float) -> None:
    """Memories, arrows and loops in a column from ``left``, operations and kernels in one from ``right``."""
    y = _draw_memories(axes, left, top)
    y = _draw_arrows(axes, left, y)
    _heading(axes, left, y, "Loop")
    y += 0.22
    draw_band(axes, Band(Area(left, y, left + 1.45, y + 0.36), ("loop x over C by 16",), y + 0.1))
    _describe(axes, left + COLUMN, y + 0.11, LOOP)

    y = _draw_operations(axes, right, top)
    _heading(axes, right, y, "Kernel")
    y += 0.22
    draw_frame(axes, Frame(0, _rectangle(right, y, right + 0.9, y + 0.3), ("name",), True))
    _describe(axes, right + 1.2, y + 0.11, KERNEL)


def _draw_memories(axes: "Axes", x: float, y: float) -> float:
    """The height below them, as of all parts of the page."""
    _heading(axes, x, y, "Tensors, by memory")
    for memory, (name, *lines) in MEMORIES.items():
        y += 0.56
        for kind, role, offset in (("tensor", Role.ACTIVATION, 0.0), ("weight", Role.WEIGHT, 0.8)):
            box = Box(Tensor(kind, {}, role), memory, ())
            draw_box(axes, PlacedBox(box, BoxShape(0.6, 0.34, (kind,)), x + offset, y - 0.17))
        write(axes, x + COLUMN, y - LINE, name, weight="bold")
        _describe(axes, x + COLUMN, y, lines)
    y += 0.6
    box = Box(Tensor("tile", {}), Memory.LOCAL, ())
    draw_box(axes, PlacedBox(box, BoxShape(1.02, 0.38, ("x",), ("1×(h+2)×w×64",)), x, y - 0.19))
    write(axes, x + COLUMN, y - LINE, "sizes", weight="bold")
    _describe(axes, x + COLUMN, y, SIZES)
    return y + 0.45


def _draw_arrows(axes: "Axes", x: float, y: float) -> float:
    _heading(axes, x, y, "Data movement")
    for memory, (name, *_) in MEMORIES.items():
        y += 0.25
        draw_wire(axes, Wire(((x, y), (x + 0.8, y)), memory))
        write(axes, x + COLUMN, y, "within a processor" if memory is Memory.LOCAL else f"out of or into {name}")
    return y + 0.4


def _draw_operations(axes: "Axes", x: float, y: float) -> float:
    _heading(axes, x, y, "Operations")
    y += 0.32
    for symbol, name in OPERATIONS:
        draw_symbol(axes, symbol, x + RADIUS, y)
        write(axes, x + 2 * RADIUS + 0.15, y, name)
        y += 0.345
    return y + 0.04


def _heading(axes: "Axes", x: float, y: float, text: str) -> None:
    write(axes, x, y, text, weight="bold", size=9)


def _describe(axes: "Axes", x: float, y: float, lines: Iterable[str]) -> None:
    for number, line in enumerate(lines):
        write(axes, x, y + LINE * number, line)


def _swatch(axes: "Axes", memory: Memory, x: float, y: float) -> None:
    box = Box(Tensor("swatch", {}), memory, ())
    draw_box(axes, PlacedBox(box, BoxShape(0.2, 0.11, ()), x, y - 0.02))


def _caption(axes: "Axes", x: float, y: float, text: str) -> float:
    """Write the words of an entry of the key; where the next one begins."""
    write(axes, x, y, text)
    return x + text_width(text) + 0.3


def _rectangle(left: float, top: float, right: float, bottom: float) -> tuple[Point, ...]:
    return ((left, top), (right, top), (right, bottom), (left, bottom))

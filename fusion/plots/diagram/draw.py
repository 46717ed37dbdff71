"""Tensor-machine diagrams of programs (the paper's figures 7, 10 and 11), and their legend (figure 5)."""

import os
from typing import TYPE_CHECKING

from fusion.planner.program import Program
from fusion.plots.diagram.layout import MARGIN, cost_text, page_of
from fusion.plots.diagram.legend import KEY_HEIGHT, LEGEND_HEIGHT, draw_key, draw_legend_page
from fusion.plots.diagram.page import Page
from fusion.plots.diagram.symbols import draw_band, draw_box, draw_frame, draw_op, draw_wire, write
from fusion.plots.diagram.text import text_width
from fusion.plots.style import WIDTH, check_suffix, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLE_HEIGHT = 0.47
COST_Y = 0.42
TITLE_SIZE = 10.5
LEGEND_RIGHT = 5.3
"""Where the legend's right column begins."""


def draw_program(program: Program, path: str | os.PathLike[str], title: str | None = None) -> None:
    """Draw a program of any block: its kernels, where their tensors are, how data move.

    ``title`` stands above the costs, by default the block's and the program's name. Raises ValueError for another
    suffix than .png, .svg or .pdf, OSError if the file cannot be written.
    """
    check_suffix(path)
    page = page_of(program, MARGIN + TITLE_HEIGHT)
    count = f"{len(program.kernels)} kernel{'s' if len(program.kernels) > 1 else ''}"
    with new_figure(path, page.height + 2 * KEY_HEIGHT) as figure:
        axes = _inch_axes(figure)
        _write_title(axes, title or f"{program.graph.name}, {program.name}")
        write(axes, MARGIN, COST_Y, f"{count}: {cost_text(program.ops_count, program.bytes)}")
        _draw_page(axes, page)
        draw_key(axes, MARGIN, page.height + KEY_HEIGHT)


def draw_legend(path: str | os.PathLike[str]) -> None:
    """Draw what memories, operations, arrows, loops and kernels look like. Raises as `draw_program` does."""
    with new_figure(path, LEGEND_HEIGHT) as figure:
        axes = _inch_axes(figure)
        _write_title(axes, "Tensor machine")
        draw_legend_page(axes, MARGIN, LEGEND_RIGHT, MARGIN + TITLE_HEIGHT)


def _write_title(axes: "Axes", text: str) -> None:
    size = min(TITLE_SIZE, TITLE_SIZE * (WIDTH - 2 * MARGIN) / text_width(text, TITLE_SIZE, "bold"))
    axes.text(MARGIN, MARGIN, text, size=size, weight="bold", va="top")


def _draw_page(axes: "Axes", page: Page) -> None:
    for frame in page.frames:
        draw_frame(axes, frame)
    for band in page.bands:
        draw_band(axes, band)
    for wire in page.wires:
        draw_wire(axes, wire)
    for box in page.boxes:
        draw_box(axes, box)
    for op in page.ops:
        draw_op(axes, op)


def _inch_axes(figure: "Figure") -> "Axes":
    """Axes over the whole page, in inches, y down from its top."""
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1))
    width, height = figure.get_size_inches()
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    return axes

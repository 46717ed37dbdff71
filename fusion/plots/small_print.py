"""What stands below a picture: its legend, and what it assumes of processors."""

from collections.abc import Iterable, Sequence
from textwrap import wrap
from typing import TYPE_CHECKING

from fusion.planner.processor import Processor
from fusion.plots.style import FAINT, ceilings

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.figure import Figure

FONT_SIZE = 8.5
CHARACTERS = 142
"""In a line as wide as the page."""
LINE_HEIGHT = 0.16
"""In inches."""
LEGEND_COLUMNS = 4


def assumed_lines(processors: Iterable[Processor]) -> list[str]:
    """Peaks and bandwidths of these processors, in lines that fit the page."""
    texts = dict.fromkeys(ceilings(processor) for processor in processors)
    return wrap(f"Assumed: {'; '.join(texts)}", CHARACTERS, break_on_hyphens=False) if texts else []


def small_print_height(processors: Iterable[Processor]) -> float:
    """Of what is assumed, in inches."""
    return LINE_HEIGHT * len(assumed_lines(processors))


def write_small_print(figure: "Figure", handles: "Sequence[Artist]", processors: Iterable[Processor]) -> None:
    """Write what is assumed, and the legend below it, at the bottom of the page."""
    rows = -(-len(handles) // LEGEND_COLUMNS)
    legend = figure.legend(
        handles=handles,
        loc="outside lower left",
        ncols=-(-len(handles) // rows) if handles else 1,
        frameon=False,
        alignment="left",
        title="\n".join(assumed_lines(processors)),
        title_fontproperties={"size": FONT_SIZE},
    )
    legend.get_title().set_color(FAINT)

"""What all pictures have in common: page, sizes of type, colours that differ in black and white too, file formats.

Pages are opaque and white, so that a picture reads the same on a dark and on a light page. They are at most `WIDTH`
inches wide: at the width of a README a point is then more than a pixel.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fusion.planner.layer_kind import LayerKind
from fusion.planner.processor import Processor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")
WIDTH = 10.0
DPI = 160
INK, FAINT, GRID = "#1a1a1a", "#6b6b6b", "#dddddd"
WATER = "#1565c0"

KIND_STYLES: Mapping[LayerKind, Mapping[str, str]] = {
    LayerKind.FUSED: {"facecolor": "#1f4e8c"},
    LayerKind.CONVOLUTION: {"facecolor": "#8c8c8c"},
    LayerKind.POINTWISE: {"facecolor": "#f0b060", "hatch": "//"},
    LayerKind.MATMUL: {"facecolor": "#8e6bb0", "hatch": "++"},
    LayerKind.GROUPED: {"facecolor": "#7fb77e", "hatch": "\\\\"},
    LayerKind.DEPTHWISE: {"facecolor": "#c2410c", "hatch": "xx"},
    LayerKind.OTHER: {"facecolor": "#d9d9d9", "hatch": ".."},
    LayerKind.UNKNOWN: {"facecolor": "#ffffff", "hatch": "oo"},
}
"""Face and hatching of kernels; edges are `INK`."""

SETTINGS = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "hatch.linewidth": 0.6,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.hashsalt": "fusion",
}


def check_suffix(path: str | os.PathLike[str]) -> None:
    """Raise ValueError unless a picture can be saved under this name."""
    if Path(path).suffix.lower() not in SUFFIXES:
        raise ValueError(f"cannot draw {path}: its name must end in one of {', '.join(SUFFIXES)}")


@contextmanager
def new_figure(path: str | os.PathLike[str] | None, height: float, width: float = WIDTH) -> "Iterator[Figure]":
    """A figure of this size in inches, for the body of the `with`, then saved if there is a path.

    Raises ValueError for another suffix than .png, .svg or .pdf, OSError if the file cannot be written.
    """
    if path is not None:
        check_suffix(path)
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(SETTINGS):
        figure = Figure(figsize=(width, height), facecolor="white", layout="constrained")
        FigureCanvasAgg(figure)  # measures texts
        yield figure
        if path is not None:
            figure.savefig(path, dpi=DPI)


def tidy(axes: "Axes") -> None:
    """Only the axes that carry a scale, and a grid behind what is drawn."""
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def ceilings(processor: Processor) -> str:
    """The peak and the bandwidth that a picture assumes."""
    return (
        f"{processor.title}: {processor.peak_ops / 1e12:.4g} TFLOP/s fp16, {processor.bandwidth / 1e9:.4g} GB/s, "
        f"{processor.op_byte:.0f} OP/byte ({processor.source})"
    )

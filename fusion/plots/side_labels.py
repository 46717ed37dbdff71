"""Labels beside lines that never cover each other: at their right ends, and as flags on vertical lines."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fusion.plots.style import FAINT, INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FONT_SIZE = 8.5
LEADER = 16.0
"""Points between the end of a line and its label."""
LEADER_STYLE = {"arrowstyle": "-", "linewidth": 0.9, "shrinkA": 1, "shrinkB": 1, "relpos": (0, 0.5)}


@dataclass(frozen=True)
class EndLabel:
    """What to write at the right end of a line of this colour that ends at `y`, in data coordinates."""

    y: float
    text: str
    colour: str
    text_colour: str = INK


@dataclass(frozen=True)
class Flag:
    """What to write over a vertical line at `x`, in data coordinates."""

    x: float
    text: str


def label_ends(axes: "Axes", labels: Sequence[EndLabel]) -> None:
    """Write labels to the right of the axes, as near to their lines' ends as room allows, each with a leader line.

    The limits of the axes must be final.
    """
    if not labels:
        return
    figure = axes.figure
    texts = []
    for label in labels:
        text = axes.annotate(
            label.text,
            (1, label.y),
            (LEADER, 0),
            xycoords=axes.get_yaxis_transform(),
            textcoords="offset points",
            size=FONT_SIZE,
            va="center",
            annotation_clip=False,
            arrowprops=LEADER_STYLE | {"color": label.colour},
            color=label.text_colour,
        )
        texts.append(text)
    figure.draw_without_rendering()  # lays out the page: room for the labels, size of the axes
    point = figure.dpi / 72
    renderer = figure.canvas.get_renderer()
    height = max(text.get_window_extent(renderer).height for text in texts) + point
    frame = axes.get_window_extent(renderer)
    wanted = [axes.transData.transform((axes.get_xlim()[1], label.y))[1] for label in labels]
    for text, y, found in zip(texts, wanted, spread(wanted, height, frame.y0, frame.y1), strict=True):
        text.xyann = (LEADER, (found - y) / point)


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions near those `wanted`, in their order and at least `gap` apart, between `low` and `high` if they fit.

    Each run of positions that push each other is centred on what its members want.
    """
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    runs: list[list[int]] = []
    starts: list[float] = []
    for index in order:
        runs.append([index])
        starts.append(wanted[index])
        while len(runs) > 1 and starts[-1] < starts[-2] + gap * len(runs[-2]):
            last = runs.pop()
            starts.pop()
            runs[-1] += last
            starts[-1] = sum(wanted[i] - gap * rank for rank, i in enumerate(runs[-1])) / len(runs[-1])
        starts[-1] = max(starts[-1], low)
    found = [0.0] * len(wanted)
    for run, start in zip(runs, starts, strict=True):
        for rank, index in enumerate(run):
            found[index] = start + gap * rank
    limit = high
    for index in reversed(order):
        found[index] = min(found[index], limit)
        limit = found[index] - gap
    return found


def raise_flags(axes: "Axes", flags: Sequence[Flag]) -> float:
    """Draw vertical lines with a label over each, to the right of its line: further left stands higher.

    The limits of the x axis must be final. Lines outside of them are left out. Returns what the labels take above the
    axes, in points.
    """
    first, last = axes.get_xlim()
    flags = sorted((flag for flag in flags if first <= flag.x <= last), key=lambda flag: flag.x)
    if not flags:
        return 0.0
    figure = axes.figure
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    point = figure.dpi / 72
    row_height = FONT_SIZE * 1.3
    placed: list[tuple[float, int]] = []
    for flag in reversed(flags):
        text = axes.annotate(
            flag.text,
            (flag.x, 1),
            xycoords=axes.get_xaxis_transform(),
            xytext=(2.5, 0),
            textcoords="offset points",
            size=FONT_SIZE,
            color=INK,
            annotation_clip=False,
        )
        x = axes.transData.transform((flag.x, 0))[0]
        end = x + text.get_window_extent(renderer).width + 5 * point
        row = 1 + max((row for other, row in placed if other < end), default=-1)
        placed.append((x, row))
        text.xyann = (2.5, 3 + row * row_height)
        axes.axvline(flag.x, color=FAINT, linewidth=0.9, linestyle=(0, (1, 1.5)), zorder=1.5)
        axes.annotate(
            "",
            (flag.x, 1),
            (0, 3 + row * row_height + FONT_SIZE),
            xycoords=axes.get_xaxis_transform(),
            textcoords="offset points",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": FAINT, "linewidth": 0.9, "shrinkA": 0, "shrinkB": 0},
        )
    return 3 + row_height * (1 + max(row for _, row in placed))

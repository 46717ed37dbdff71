"""The results of blocks as a picture: throughput of each program next to the limit (the paper's figures 13 and 14)."""

import os
from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import TYPE_CHECKING

from fusion.bench.blocks import BlockConfig
from fusion.plots.style import FAINT, new_figure, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Light, hatched and dark: told apart without colour.
TIMED_STYLES = {
    "eager": {"label": "eager PyTorch", "color": "#d9d9d9"},
    "inductor": {"label": "Inductor", "color": "#f0b060", "hatch": "///"},
    "fused": {"label": "fused", "color": "#1f4e8c"},
}
PREDICTED_STYLES = {"predicted": {"label": "fused: predicted, not timed", "color": "#c9d8ee", "hatch": "..."}}
TITLES = {"convfirst": "ConvFirst", "mbconv": "MBConv", "ffn": "FFN"}
LIMIT = "#b00020"
GROUP_WIDTH = 0.78
FEWEST_IN_A_ROW, MOST_IN_A_ROW = 4, 10
"""Blocks side by side whose bars are no slabs, and whose texts stay legible; more blocks fill further panels."""
PANEL_HEIGHT, MARGIN_HEIGHT = 3.4, 1.6

Row = Mapping[str, object]


def plot_blocks(rows: Sequence[Row], meta: Row, path: str | os.PathLike[str]) -> None:
    """Draw a report's rows in TFLOP/s and in percent of peak; rows without timings as predictions, and labelled so.

    Each row has its block (`block, channels, alpha, hw`), `ops` in OPs, `limit_us` and, in microseconds, `eager_us`,
    `inductor_us` and `fused_us` or, if `fused_us` is None in every row, `predicted_us`; a program that no row has is
    left out. `meta` is that of `fusion.bench.report`, with `batch` and `dtype`. Raises ValueError for another suffix
    than .png, .svg or .pdf and when there are no rows, OSError if the file cannot be written.
    """
    if not rows:
        raise ValueError(f"cannot draw {path}: there are no rows")
    with new_figure(path, page_height(rows)) as figure:
        draw_blocks(figure, rows, meta)


def page_height(rows: Sequence[Row]) -> float:
    """The height in inches of a picture of these blocks."""
    return MARGIN_HEIGHT + PANEL_HEIGHT * -(-len(rows) // MOST_IN_A_ROW)


def draw_blocks(figure: "Figure", rows: Sequence[Row], meta: Row) -> None:
    """Draw on an empty figure, in as many panels as it takes."""
    timed = any(row["fused_us"] is not None for row in rows)
    styles = TIMED_STYLES if timed else PREDICTED_STYLES
    styles = {name: style for name, style in styles.items() if any(tflops(row, name) for row in rows)}
    panels = -(-len(rows) // MOST_IN_A_ROW)
    in_a_row = -(-len(rows) // panels)
    highest = max(tflops(row, name) or 0 for row in rows for name in (*styles, "limit"))
    middle, half = (in_a_row - 1) / 2, max(in_a_row, FEWEST_IN_A_ROW) / 2 + 0.1
    for panel, axes in enumerate(figure.subplots(panels, 1, squeeze=False).flat):
        some = rows[panel * in_a_row : (panel + 1) * in_a_row]
        axes.set_xlim(middle - half, middle + half)
        axes.set_ylim(0, 1.16 * highest)
        _draw_bars(axes, some, styles)
        _draw_limits(axes, some)
        _set_axes(axes, some, meta["peak_tflops"])
        for group, row in enumerate(some):
            _annotate(axes, group, row, styles)
    axes.set_xlabel("channels, expansion ratio α, height × width")
    figure.suptitle(fill(_title(rows, meta, timed), 100), x=0.01, ha="left", weight="bold", size=12)
    figure.axes[0].set_title(fill(_assumptions(meta, styles), 135), loc="left", size=9)
    limit, *bars = figure.axes[0].get_legend_handles_labels()[0]
    figure.legend(handles=[*bars, limit], loc="outside lower center", ncols=4, frameon=False)


def _draw_bars(axes: "Axes", rows: Sequence[Row], styles: Mapping[str, Mapping[str, str]]) -> None:
    width = GROUP_WIDTH / len(styles)
    for index, (program, style) in enumerate(styles.items()):
        centers = [group + (index - (len(styles) - 1) / 2) * width for group in range(len(rows))]
        heights = [tflops(row, program) or 0 for row in rows]
        axes.bar(centers, heights, width, edgecolor="black", linewidth=0.8, zorder=2, **style)


def _draw_limits(axes: "Axes", rows: Sequence[Row]) -> None:
    limits = [tflops(row, "limit") for row in rows]
    starts = [group - GROUP_WIDTH / 2 - 0.06 for group in range(len(rows))]
    ends = [group + GROUP_WIDTH / 2 + 0.06 for group in range(len(rows))]
    axes.hlines(limits, starts, ends, color=LIMIT, linewidth=2.2, zorder=3, label="limit of the fused block")


def _set_axes(axes: "Axes", rows: Sequence[Row], peak_tflops: float) -> None:
    axes.set_xticks(range(len(rows)), [_label(row) for row in rows])
    axes.set_ylabel("TFLOP/s")
    tidy(axes)
    axes.grid(visible=False, axis="x")
    percent = axes.secondary_yaxis(
        "right", functions=(lambda y: 100 * y / peak_tflops, lambda y: y * peak_tflops / 100)
    )
    percent.set_ylabel("% of peak")
    percent.spines["right"].set_color(FAINT)


def _annotate(axes: "Axes", group: int, row: Row, styles: Mapping[str, object]) -> None:
    """Over the last bar its speedup over Inductor, over the limit what percentage of it that bar reaches.

    Where the bars leave no room under the limit, both stand over it.
    """
    program = list(styles)[-1]
    throughput, limit, inductor = (tflops(row, name) for name in (program, "limit", "inductor"))
    if throughput is None:
        return
    bars = max(tflops(row, name) or 0 for name in styles)
    top = max(bars, limit)
    _write_above(axes, group, top, 3, f"{throughput / limit:.0%} of limit")
    if inductor is None:
        return
    text = f"{throughput / inductor:.1f}×"
    room = (limit - bars) / axes.get_ylim()[1] * PANEL_HEIGHT * 72
    if room > 24:
        last = group + GROUP_WIDTH / 2 * (1 - 1 / len(styles))
        _write_above(axes, last, bars, 2, text, size=11, weight="bold")
    else:
        _write_above(axes, group, top, 14, text, size=11, weight="bold")


def _write_above(axes: "Axes", x: float, y: float, points: float, text: str, **font: object) -> None:
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.4}  # hides the grid behind the text
    font = {"size": 8.5, **font}
    axes.annotate(text, (x, y), (0, points), textcoords="offset points", ha="center", va="bottom", bbox=box, **font)


def _title(rows: Sequence[Row], meta: Row, timed: bool) -> str:
    kinds = dict.fromkeys(TITLES.get(row["block"], row["block"]) for row in rows)
    what = f"hroughput of {' and '.join(kinds)} blocks on"
    what = f"T{what}" if timed else f"Predicted, not timed: t{what}"
    return f"{what} {meta['device'] if timed else meta['processor']}, batch {meta['batch']}, {meta['dtype']}"


def _assumptions(meta: Row, styles: Mapping[str, object]) -> str:
    ceilings = f"{meta['peak_tflops']:.4g} TFLOP/s and {meta['bandwidth_tbs']:.3g} TB/s ({meta['ceilings_source']})"
    return f"Assumed: {ceilings}." + (
        " Bold: speedup of fused over Inductor." if {"fused", "inductor"} <= set(styles) else ""
    )


def tflops(row: Row, program: str) -> float | None:
    """Throughput of a block with a program, or at its "limit"; None if that was not timed."""
    microseconds = row.get(f"{program}_us")
    return None if microseconds is None else row["ops"] / microseconds / 1e6


def _label(row: Row) -> str:
    """Channels, expansion ratio and image size, one under the other."""
    return BlockConfig(row["block"], row["channels"], row["alpha"], row["hw"]).label.replace(", ", "\n")

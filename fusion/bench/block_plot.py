"""The results of blocks as a picture: throughput of each program next to the block's limit (the paper's figure 13)."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING

from fusion.bench.blocks import BlockConfig

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = (".png", ".svg", ".pdf")

# Light, hatched and dark: told apart without colour.
TIMED_STYLES = {
    "eager": {"label": "eager PyTorch", "color": "#d9d9d9"},
    "inductor": {"label": "Inductor", "color": "#f0b060", "hatch": "///"},
    "fused": {"label": "fused", "color": "#1f4e8c"},
}
PREDICTED_STYLES = {"predicted": {"label": "fused: predicted, not timed", "color": "#c9d8ee", "hatch": "..."}}
GROUP_WIDTH = 0.78

Row = Mapping[str, object]


def check_suffix(path: str | os.PathLike[str]) -> None:
    """Raise ValueError unless a picture can be saved under this name."""
    if Path(path).suffix.lower() not in SUFFIXES:
        raise ValueError(f"cannot draw {path}: its name must end in one of {', '.join(SUFFIXES)}")


def plot_blocks(rows: Sequence[Row], meta: Row, path: str | os.PathLike[str]) -> None:
    """Draw a report's rows in TFLOP/s; rows without timings as predictions, and labelled so.

    Each row has its block (`block, channels, alpha, hw`), `ops` in OPs, `limit_us` and, in microseconds, `eager_us`,
    `inductor_us` and `fused_us` or, if `fused_us` is None in every row, `predicted_us`. `meta` is that of
    `fusion.bench.report`, with `batch` and `dtype`. Raises ValueError for another suffix than .png, .svg or .pdf and
    when there are no rows, OSError if the file cannot be written.
    """
    check_suffix(path)
    if not rows:
        raise ValueError(f"cannot draw {path}: there are no rows")
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    timed = any(row["fused_us"] is not None for row in rows)
    styles = TIMED_STYLES if timed else PREDICTED_STYLES
    width = max(8.5, 1.25 * len(rows) + 1.2)
    with rc_context({"hatch.linewidth": 0.8, "font.size": 10}):
        figure = Figure(figsize=(width, 5.4), facecolor="white", layout="constrained")
        axes = figure.add_subplot()
        _draw_bars(axes, rows, styles)
        _draw_limits(axes, rows)
        _annotate(axes, rows, styles)
        figure.suptitle(fill(_title(meta, timed), int(8.5 * width)), x=0.01, ha="left", weight="bold", size=12)
        axes.set_title(fill(_assumptions(meta, timed), int(12 * (width - 1))), loc="left", size=9)
        figure.legend(loc="outside lower center", ncols=4, frameon=False)
        figure.savefig(path, dpi=160)


def _draw_bars(axes: "Axes", rows: Sequence[Row], styles: Mapping[str, Mapping[str, str]]) -> None:
    width = GROUP_WIDTH / len(styles)
    for index, (program, style) in enumerate(styles.items()):
        centers = [group + (index - (len(styles) - 1) / 2) * width for group in range(len(rows))]
        heights = [_tflops(row, f"{program}_us") or 0 for row in rows]
        axes.bar(centers, heights, width, edgecolor="black", linewidth=0.8, zorder=2, **style)


def _draw_limits(axes: "Axes", rows: Sequence[Row]) -> None:
    limits = [_tflops(row, "limit_us") for row in rows]
    starts = [group - GROUP_WIDTH / 2 - 0.06 for group in range(len(rows))]
    ends = [group + GROUP_WIDTH / 2 + 0.06 for group in range(len(rows))]
    axes.hlines(limits, starts, ends, color="#b00020", linewidth=2.2, zorder=3, label="limit of the fused block")


def _annotate(axes: "Axes", rows: Sequence[Row], styles: Mapping[str, object]) -> None:
    """Over each group, above bars and limit: speedup over Inductor, and the last bar as a percentage of the limit."""
    program = list(styles)[-1]
    tops = []
    for group, row in enumerate(rows):
        throughput, limit, inductor = (_tflops(row, f"{name}_us") for name in (program, "limit", "inductor"))
        others = (_tflops(row, f"{name}_us") or 0 for name in styles)
        tops.append(max(limit, *others))
        if throughput is None:
            continue
        _write_above(axes, group, tops[-1], 5, f"{throughput / limit:.0%} of limit", size=8.5)
        if inductor is not None:
            _write_above(axes, group, tops[-1], 17, f"{throughput / inductor:.1f}×", size=12, weight="bold")
    axes.set_ylim(0, 1.16 * max(tops))
    axes.set_xlim(-0.6, len(rows) - 0.4)
    axes.set_xticks(range(len(rows)), [_label(row) for row in rows])
    axes.set_xlabel("channels, expansion ratio α, height × width")
    axes.set_ylabel("TFLOP/s")
    axes.grid(axis="y", color="#cccccc", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _write_above(axes: "Axes", x: float, y: float, points: float, text: str, **font: object) -> None:
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}  # hides the grid behind the text
    axes.annotate(text, (x, y), (0, points), textcoords="offset points", ha="center", va="bottom", bbox=box, **font)


def _title(meta: Row, timed: bool) -> str:
    what = "Throughput of blocks on" if timed else "Predicted, not timed: throughput of blocks on"
    return f"{what} {meta['device'] if timed else meta['processor']}, batch {meta['batch']}, {meta['dtype']}"


def _assumptions(meta: Row, timed: bool) -> str:
    ceilings = f"{meta['peak_tflops']:.4g} TFLOP/s and {meta['bandwidth_tbs']:.3g} TB/s ({meta['ceilings_source']})"
    return f"Limits assume {ceilings}." + (" Over the bars: speedup of fused over Inductor." if timed else "")


def _tflops(row: Row, key: str) -> float | None:
    """Throughput of a block that takes `row[key]` microseconds; None if that was not timed."""
    microseconds = row.get(key)
    return None if microseconds is None else row["ops"] / microseconds / 1e6


def _label(row: Row) -> str:
    return BlockConfig(row["block"], row["channels"], row["alpha"], row["hw"]).label

"""Minimum and predicted against measured latency of blocks, as two scatter plots.

In the first one a point's distance from the diagonal, the limit, is how many times as long it takes. Filled markers are
fused kernels, next to their program's minimum latency; empty ones are Inductor's, next to that of one kernel for each
layer. The second one shows whether this version's planner predicts what was measured.
"""

import os
from collections.abc import Mapping, Sequence
from math import log10
from textwrap import fill, wrap
from typing import TYPE_CHECKING

from fusion.plots.small_print import CHARACTERS, FONT_SIZE, LINE_HEIGHT
from fusion.plots.style import FAINT, INK, WATER, check_suffix, new_figure, tidy

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

Row = Mapping[str, object]
Style = Mapping[str, object]

KERNEL_STYLES: Mapping[str, Style] = {
    "convfirst_hopper": {"marker": "o", "color": "#1f4e8c"},
    "convfirst": {"marker": "X", "color": "#5b8fd0"},
    "convfirst_down_hopper": {"marker": "v", "color": "#00838f"},
    "convfirst_down": {"marker": "P", "color": "#5fb3bb"},
    "ffn_hopper": {"marker": "*", "color": "#8a5a00", "markersize": 10},
    "mbconv_hopper": {"marker": "s", "color": "#c2410c"},
    "mbconv_windows_hopper": {"marker": "D", "color": "#e08a5f"},
    "mbconv": {"marker": "h", "color": "#7a3b1d", "markersize": 8},
    "mbconv_down_hopper": {"marker": "^", "color": "#2e7d32"},
    "mbconv_down_windows_hopper": {"marker": "<", "color": "#7fb77e"},
    "mbconv_down": {"marker": ">", "color": "#1b4d1e"},
    "stem": {"marker": "p", "color": "#8e6bb0", "markersize": 8},
    "stem_convfirst_hopper": {"marker": "d", "color": "#5b3a86"},
    "head": {"marker": (4, 1, 45), "color": "#5d5d5d", "markersize": 9},
}
OTHER_STYLE: Style = {"marker": "H", "color": INK}
INDUCTOR_STYLES: Mapping[str, Style] = {
    "convfirst": {"marker": "o", "color": "#1f4e8c"},
    "mbconv": {"marker": "s", "color": "#c2410c"},
    "ffn": {"marker": "*", "color": "#8a5a00", "markersize": 10},
}
"""By the beginning of a block's name."""
OTHER_BLOCK: Style = {"marker": (4, 1, 45), "color": "#5d5d5d", "markersize": 9}
MARKER: Style = {"linestyle": "none", "markersize": 6.5, "markeredgewidth": 0.6, "markeredgecolor": INK}
EMPTY: Style = {"markerfacecolor": "white", "markeredgewidth": 1.2}

RATIOS = (1, 2, 5, 10)
BAND = 0.25
"""Error of predictions that the second panel shows."""
PANEL_HEIGHT = 4.6
LEGEND_ROW = 0.19
LEGEND_COLUMNS = 4
MARGIN = 1.25
"""Of the axes around what is drawn, as a factor."""


def plot_predicted(rows: Sequence[Row], path: str | os.PathLike[str]) -> None:
    """Draw the rows of `fusion.bench.predicted_row`, the second panel without what an earlier version predicted.

    Raises ValueError for another suffix than .png, .svg or .pdf and when there are no rows, OSError if the file cannot
    be written.
    """
    check_suffix(path)
    if not rows:
        raise ValueError(f"cannot draw {path}: there are no rows")
    by_inductor = [row for row in rows if row["inductor_ratio"] is not None]
    fused = [(row["minimum_us"], row["measured_us"], _style(row)) for row in rows]
    layerwise = [(row["layerwise_us"], row["inductor_us"], _inductor_style(row)) for row in by_inductor]
    now = [row for row in rows if row["predicted_by"] != "report"]
    predicted = [(row["predicted_us"], row["measured_us"], _style(row)) for row in now]
    handles, small_print = _handles(rows, by_inductor), _assumed(rows)
    below = LINE_HEIGHT * len(small_print) + LEGEND_ROW * -(-len(handles) // LEGEND_COLUMNS)
    with new_figure(path, PANEL_HEIGHT + below) as figure:
        figure.suptitle(fill(_title(rows), 100), x=0.01, ha="left", weight="bold", size=11)
        legend = figure.legend(
            handles=handles,
            loc="outside lower left",
            ncols=LEGEND_COLUMNS,
            frameon=False,
            alignment="left",
            title="\n".join(small_print),
            title_fontproperties={"size": FONT_SIZE},
        )
        legend.get_title().set_color(FAINT)
        limit, *others = figure.subplots(1, 2 if predicted else 1, squeeze=False)[0]
        _draw(limit, layerwise + fused, "minimum latency [µs]")
        limit.set_title("(a) how far from the limit", loc="left", weight="bold", pad=16)
        for ratio in RATIOS:
            _guide(limit, ratio, "limit" if ratio == 1 else f"{ratio}×")
        for axes in others:
            _draw(axes, predicted, "predicted latency [µs]")
            largest = max(abs(row["error_pct"]) for row in now)
            title = f"(b) predictions, ±{BAND:.0%} in grey; largest error {largest:.0f}%"
            axes.set_title(title, loc="left", weight="bold", pad=16)
            _guide(axes, 1, "")
            xs = axes.get_xlim()
            band = [[x / (1 + sign * BAND) for x in xs] for sign in (1, -1)]
            axes.fill_between(xs, *band, color=INK, alpha=0.1, linewidth=0, zorder=1)


def _style(row: Row) -> Style:
    """A marker of a fused kernel; of one launch for several blocks the left half is filled."""
    style = {**MARKER, **KERNEL_STYLES.get(row["kernel"], OTHER_STYLE)}
    return style if row["launch"] == "one" else {**style, "fillstyle": "left", "markerfacecoloralt": "white"}


def _inductor_style(row: Row) -> Style:
    """An empty marker in the colour of the block."""
    kind = next((kind for kind in INDUCTOR_STYLES if row["block"].startswith(f"{kind} ")), None)
    style = INDUCTOR_STYLES.get(kind, OTHER_BLOCK)
    return {**MARKER, **EMPTY, **style, "markeredgecolor": style["color"]}


def _handles(rows: Sequence[Row], by_inductor: Sequence[Row]) -> "list[Artist]":
    from matplotlib.lines import Line2D

    labels: dict[str, Style] = {}
    for row in sorted(rows, key=lambda row: (_rank(row), row["launch"] != "one")):
        together = "" if row["launch"] == "one" else ", several a launch"
        labels.setdefault(f"{row['kernel']}{together}", _style(row))
    for row in by_inductor:
        kind = next((kind for kind in INDUCTOR_STYLES if row["block"].startswith(f"{kind} ")), "other blocks")
        labels.setdefault(f"Inductor: {kind}", _inductor_style(row))
    return [Line2D([], [], label=label, **style) for label, style in labels.items()]


def _rank(row: Row) -> int:
    kernels = list(KERNEL_STYLES)
    return kernels.index(row["kernel"]) if row["kernel"] in kernels else len(kernels)


def _draw(axes: "Axes", points: Sequence[tuple[float, float, Style]], label: str) -> None:
    """Points over measured latency, logarithmically."""
    from matplotlib.ticker import LogLocator, NullFormatter

    tidy(axes)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(label)
    axes.set_ylabel("measured latency [µs]")
    xs, ys, _ = zip(*points, strict=True)
    axes.set_xlim(min(xs) / MARGIN, max(xs) * MARGIN)
    axes.set_ylim(min(ys) / MARGIN, max(ys) * MARGIN)
    for axis, values in ((axes.xaxis, xs), (axes.yaxis, ys)):
        decades = log10(max(values) / min(values))
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 3 else (1,)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())
    for x, y, style in points:
        axes.plot([x], [y], zorder=3, **style)


def _guide(axes: "Axes", ratio: float, text: str) -> None:
    """A line of measured latencies that are so many times those of the x axis, its name where it leaves the axes."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    start, end = max(left, bottom / ratio), min(right, top / ratio)
    if end <= start:
        return
    style = {"color": WATER, "linewidth": 1.6} if ratio == 1 else {"color": FAINT, "linewidth": 1, "linestyle": "--"}
    axes.plot([start, end], [ratio * start, ratio * end], zorder=2, **style)
    leaves_top = ratio * right > top
    axes.annotate(
        text,
        (end, ratio * end),
        (0, 3) if leaves_top else (3, 0),
        textcoords="offset points",
        size=FONT_SIZE,
        color=style["color"],
        ha="center" if leaves_top else "left",
        va="bottom" if leaves_top else "center",
        annotation_clip=False,
    )


def _title(rows: Sequence[Row]) -> str:
    devices = dict.fromkeys(row["device"] for row in rows)
    batches = dict.fromkeys(row["batch"] for row in rows)
    dtypes = dict.fromkeys(row["dtype"] for row in rows)
    of = f"Blocks on {' and '.join(devices)}, batch {', '.join(map(str, batches))}, {' and '.join(dtypes)}"
    return f"{of}: minimum, predicted and measured latency"


def _assumed(rows: Sequence[Row]) -> list[str]:
    """Peaks and bandwidths, of each GPU the range that its reports have, in lines that fit the page."""
    texts = []
    for device in dict.fromkeys(row["device"] for row in rows):
        of_device = [row for row in rows if row["device"] == device]
        peak = _range([row["peak_tflops"] for row in of_device])
        bandwidth = _range([1e3 * row["bandwidth_tbs"] for row in of_device])
        texts.append(f"{device}: {peak} TFLOP/s fp16, {bandwidth} GB/s")
    sentence = f"Assumed for minimum latencies, as measured with the results: {'; '.join(texts)}"
    return wrap(sentence, CHARACTERS, break_on_hyphens=False)


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.4g}", f"{max(values):.4g}"
    return low if low == high else f"{low} to {high}"

"""The efficiency gap of networks as a picture (the paper's figures 1 and 17).

Four panels have the accuracy in common: over OPs and ideal latency, over actual latency, and over both, on a linear and
on a logarithmic axis. On the latter the line from ideal to actual latency is as long as the efficiency is low.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from textwrap import fill
from typing import TYPE_CHECKING

from fusion.bench.gap import ENGINES, Gap, network_gaps
from fusion.plots.placement import Label, place_labels
from fusion.plots.style import new_figure, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, object]

HEIGHT = 9.4
AXIS_HEIGHT, LEGEND_LINE = 0.62, 0.19
"""Inches: ticks and label of an axis, and a line of the legend."""
GRID = {"left": 0.065, "right": 0.985, "top": 0.845, "wspace": 0.06, "hspace": 0.27}
LABEL_SIZE = 8.5
OTHERS = "other networks"

FAMILIES = {
    "convfirstnet": "ConvFirstNet",
    "convnext": "ConvNeXt",
    "efficientnetv2": "EfficientNetV2",
    "efficientnet": "EfficientNet",
}
"""How the names of a family's networks begin: the first that fits."""
COLOURS = {
    "ConvFirstNet": "#1f4e8c",
    "ConvNeXt": "#b00020",
    "EfficientNet": "#2e7d32",
    "EfficientNetV2": "#8a5a00",
    OTHERS: "#4a4a4a",
}
MARKERS = {"ConvFirstNet": "o", "ConvNeXt": "s", "EfficientNet": "^", "EfficientNetV2": "D", OTHERS: "v"}
VARIANTS = (
    {"linestyle": "-", "fillstyle": "full"},
    {"linestyle": "--", "fillstyle": "bottom"},
    {"linestyle": "-.", "fillstyle": "left"},
    {"linestyle": ":", "fillstyle": "top"},
)
"""Lines and actual markers of a family's first and further series; ideal markers are empty."""


@dataclass(frozen=True)
class Series:
    """Networks of a family as one engine runs them on one GPU, the least accurate first."""

    family: str
    engine: str
    device: str
    variant: int
    gaps: tuple[Gap, ...]

    @property
    def colour(self) -> str:
        return COLOURS[self.family]

    @property
    def marker(self) -> Mapping[str, object]:
        """How matplotlib draws a marker of actual latency."""
        style = {"marker": MARKERS[self.family], "fillstyle": VARIANTS[self.variant]["fillstyle"]}
        return {**style, "color": self.colour, "markerfacecoloralt": "white", "markersize": 6.5, "zorder": 4}

    @property
    def ideal_marker(self) -> Mapping[str, object]:
        """How matplotlib draws a marker of ideal latency."""
        return {**self.marker, "fillstyle": "full", "markerfacecolor": "white", "markersize": 5.5, "zorder": 3}

    @property
    def line(self) -> Mapping[str, object]:
        """How matplotlib draws the line from ideal to actual latency."""
        style = {"linestyle": VARIANTS[self.variant]["linestyle"], "linewidth": 1.4}
        return {**style, "color": self.colour, "zorder": 2}


def plot_gap(rows: Sequence[Row], meta: Row, path: str | os.PathLike[str]) -> None:
    """Draw the networks of a report of `fusion.bench network` whose top-1 and OPs are known, as `plot_gaps` does."""
    plot_gaps(network_gaps(rows, meta)[0], path)


def plot_gaps(gaps: Sequence[Gap], path: str | os.PathLike[str]) -> None:
    """Draw `drawn_gaps(gaps)` in four panels.

    Raises ValueError for another suffix than .png, .svg or .pdf and when there is nothing to draw, OSError if the file
    cannot be written.
    """
    gaps = drawn_gaps(gaps)
    if not gaps:
        raise ValueError(f"cannot draw {path}: no network of known accuracy has a latency")
    with new_figure(path, HEIGHT) as figure:
        draw_gaps(figure, gaps)


def drawn_gaps(gaps: Iterable[Gap]) -> list[Gap]:
    """What the picture shows: the largest batch, without eager PyTorch, and what runs twice once.

    A network that `fusion.fuse` runs is not shown with the backend "fusion" too; of equal rows the first is.
    """
    gaps = [gap for gap in gaps if gap.engine != "eager"]
    batch = max((gap.batch for gap in gaps), default=None)
    gaps = [gap for gap in gaps if gap.batch == batch]
    first: dict[object, Gap] = {}
    for gap in gaps:
        first.setdefault((gap.model, gap.size, gap.engine, gap.ceilings.device), gap)
    return [
        gap
        for (model, size, engine, device), gap in first.items()
        if engine != "fusion" or (model, size, "fused", device) not in first
    ]


def draw_gaps(figure: "Figure", gaps: Sequence[Gap]) -> None:
    """Draw on an empty figure."""
    series = gap_series(gaps)
    figure.set_layout_engine("none")
    figure.text(0.012, 0.985, _title(gaps), weight="bold", size=12, va="top")
    figure.text(0.012, 0.957, fill(_assumptions(gaps), 146), size=9, va="top", linespacing=1.3)
    grid = GRID | {"bottom": (AXIS_HEIGHT + LEGEND_LINE * _add_legend(figure, series)) / HEIGHT}
    panels = macs, actual, linear, logarithmic = list(figure.subplots(2, 2, sharey=True, gridspec_kw=grid).flat)
    _draw_curves(macs, series, "macs_g")
    _draw_curves(actual, series, "actual_ms")
    _draw_lines(linear, series)
    _draw_lines(logarithmic, series)
    _set_scales(panels, gaps)
    _label_networks(macs, series, "macs_g")
    _label_networks(actual, series, "actual_ms")
    _label_efficiencies(logarithmic, series)


def gap_series(gaps: Sequence[Gap]) -> list[Series]:
    """Networks by family, engine and GPU."""
    devices = list(dict.fromkeys(gap.ceilings.device for gap in gaps))
    ranks = list(ENGINES)

    def key(gap: Gap) -> tuple[int, int, int]:
        return list(COLOURS).index(family(gap.model)), ranks.index(gap.engine), devices.index(gap.ceilings.device)

    series: list[Series] = []
    for _, group in groupby(sorted(gaps, key=key), key=key):
        members = tuple(sorted(group, key=lambda gap: gap.top1))
        name = family(members[0].model)
        variant = sum(other.family == name for other in series) % len(VARIANTS)
        series.append(Series(name, members[0].engine, members[0].ceilings.device, variant, members))
    return series


def family(model: str) -> str:
    """The family of a network, or `OTHERS`."""
    name = model.removeprefix("tf_")
    return next((title for prefix, title in FAMILIES.items() if name.startswith(prefix)), OTHERS)


def variant_name(model: str) -> str:
    """What a network is called within its family: "Tiny", "B3", "RW-S"; other networks by their full names."""
    title = family(model)
    if title == OTHERS:
        return model
    prefix = next(prefix for prefix, name in FAMILIES.items() if name == title)
    name, colon, arguments = model.removeprefix("tf_").removeprefix(prefix).strip("_").partition(":")
    words = [word.upper() if len(word) <= 2 else word.capitalize() for word in name.split("_")]
    return "-".join(words) + colon + arguments


def _draw_curves(axes: "Axes", series: Sequence[Series], what: str) -> None:
    """Accuracy over MACs, which ideal latency is proportional to, or over actual latency."""
    seen: set[tuple[str, int | None]] = set()
    for one in series:
        networks = {(gap.model, gap.size) for gap in one.gaps}
        if what == "macs_g" and networks <= seen:  # drawn already, for another engine
            continue
        seen |= networks
        xs, ys = [getattr(gap, what) for gap in one.gaps], [gap.top1 for gap in one.gaps]
        if one.family != OTHERS:
            axes.plot(xs, ys, **{**one.line, "linewidth": 1.0, "alpha": 0.8})
        axes.plot(xs, ys, linestyle="none", **(one.ideal_marker if what == "macs_g" else one.marker))


def _draw_lines(axes: "Axes", series: Sequence[Series]) -> None:
    """Accuracy over latency: lines from ideal to actual."""
    for one in series:
        for gap in one.gaps:
            axes.plot([gap.ideal_ms, gap.actual_ms], [gap.top1] * 2, **one.line)
            axes.plot(gap.ideal_ms, gap.top1, **one.ideal_marker)
            axes.plot(gap.actual_ms, gap.top1, **one.marker)


def _set_scales(panels: Sequence["Axes"], gaps: Sequence[Gap]) -> None:
    from matplotlib.ticker import LogLocator

    macs, actual, linear, logarithmic = panels
    batch = gaps[0].batch
    latencies = [ms for gap in gaps for ms in (gap.ideal_ms, gap.actual_ms)]
    for axes, title, label, most in (
        (macs, "(a) ideal: accuracy over OPs", "MACs of an image [G]", max(gap.macs_g for gap in gaps)),
        (actual, "(b) actual: accuracy over latency", f"actual latency of {batch} images [ms]", max(latencies)),
        (linear, "(c) the gap between (a) and (b)", f"ideal and actual latency of {batch} images [ms]", max(latencies)),
    ):
        axes.set_title(title, loc="left", weight="bold")
        axes.set_xlabel(label)
        axes.set_xlim(-0.03 * most, 1.12 * most)
    logarithmic.set_title("(d) logarithmic, with computational efficiency", loc="left", weight="bold")
    logarithmic.set_xlabel(f"ideal and actual latency of {batch} images [ms], logarithmic")
    logarithmic.set_xscale("log")
    logarithmic.set_xlim(min(latencies) / 1.5, max(latencies) * 1.9)
    logarithmic.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    logarithmic.xaxis.set_major_formatter("{x:g}")
    logarithmic.xaxis.set_minor_formatter("")
    accuracies = [gap.top1 for gap in gaps]
    margin = 0.3 + 0.06 * (max(accuracies) - min(accuracies))
    macs.set_ylim(min(accuracies) - margin, max(accuracies) + margin)
    for axes in panels:
        tidy(axes)
    for axes in (macs, linear):
        axes.set_ylabel("ImageNet-1k top-1 [%]")
    peak = common_peak(gaps)
    if peak is not None:
        factor = 2 * batch / peak
        top = macs.secondary_xaxis("top", functions=(lambda x: factor * x, lambda x: x / factor))
        top.set_xlabel(f"ideal latency of {batch} images [ms]")


def common_peak(gaps: Sequence[Gap]) -> float | None:
    """The peak in TFLOP/s that all gaps assume; None if there are several."""
    peaks = {gap.ceilings.peak_tflops for gap in gaps}
    return peaks.pop() if len(peaks) == 1 else None


def _add_legend(figure: "Figure", series: Sequence[Series]) -> int:
    """Add the legend at the bottom; how many lines it has."""
    from matplotlib.lines import Line2D

    several = len({one.device for one in series}) > 1
    handles = [Line2D([], [], label="empty markers: ideal", **_without_line(series[0].ideal_marker, "#555555"))]
    for one in series:
        label = f"{one.family}, {ENGINES[one.engine]}{f', {one.device}' if several else ''}"
        handles.append(Line2D([], [], label=label, **{**one.line, **one.marker}))
    columns = 4 if max(len(handle.get_label()) for handle in handles) < 34 else 2
    figure.legend(handles=handles, loc="lower center", ncols=columns, frameon=False, handlelength=3.2)
    return -(-len(handles) // columns)


def _without_line(marker: Mapping[str, object], colour: str) -> dict[str, object]:
    return {**marker, "color": colour, "marker": "o", "linestyle": "none"}


def _label_networks(axes: "Axes", series: Sequence[Series], what: str) -> None:
    """Name each network of a family once, with the family's name at the most accurate one."""
    labels: dict[tuple[str, int | None], Label] = {}
    for one in series:
        for gap in one.gaps:
            full = one.family != OTHERS and gap is one.gaps[-1]
            text = f"{one.family}-{variant_name(gap.model)}" if full else variant_name(gap.model)
            labels.setdefault((gap.model, gap.size), Label(text, getattr(gap, what), gap.top1, one.colour))
    lines = [[(getattr(gap, what), gap.top1) for gap in one.gaps] for one in series]
    place_labels(axes, list(labels.values()), lines, LABEL_SIZE)


def _label_efficiencies(axes: "Axes", series: Sequence[Series]) -> None:
    labels = [
        Label(f"{100 * gap.efficiency:.0f}%", gap.actual_ms, gap.top1, one.colour, gap.ideal_ms)
        for one in series
        for gap in one.gaps
    ]
    lines = [[(gap.ideal_ms, gap.top1), (gap.actual_ms, gap.top1)] for one in series for gap in one.gaps]
    place_labels(axes, labels, lines, LABEL_SIZE)


def _title(gaps: Sequence[Gap]) -> str:
    devices = dict.fromkeys(gap.ceilings.device for gap in gaps)
    timed = "" if any(gap.engine != "limit" for gap in gaps) else ", NOT TIMED"
    dtypes = dict.fromkeys(gap.dtype for gap in gaps)
    return f"Efficiency gap on {' and '.join(devices)}{timed}, batch {gaps[0].batch}, {', '.join(dtypes)}"


def _assumptions(gaps: Sequence[Gap]) -> str:
    ceilings = list(dict.fromkeys(gap.ceilings for gap in gaps))
    peaks = [f"{one.peak_tflops:.4g} TFLOP/s and {one.bandwidth_tbs:.3g} TB/s ({one.source})" for one in ceilings]
    if len(ceilings) > 1:
        peaks = [f"{one.device} {peak}" for one, peak in zip(ceilings, peaks, strict=True)]
    sources = dict.fromkeys(gap.top1_source for gap in gaps)
    return (
        f"Assumed: {'; '.join(peaks)}. Ideal latency = OPs / peak; computational efficiency = ideal / actual latency. "
        f"Top-1: {' and '.join(sources)}."
    )

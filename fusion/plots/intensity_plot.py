"""Operational intensity of convolutions over their channels, and waterlines of processors (the paper's figure 2e)."""

import os
from collections.abc import Iterable, Sequence
from textwrap import fill

from fusion.planner.intensity import IntensityPoint
from fusion.planner.processor import Processor
from fusion.plots.side_labels import EndLabel, label_ends
from fusion.plots.small_print import small_print_height, write_small_print
from fusion.plots.style import KIND_STYLES, WATER, check_suffix, new_figure, tidy

LINE_STYLES = ("-", "--", ":")
MARKERS = "osD^v"

Curve = Sequence[IntensityPoint]


def plot_intensity(
    curves: Sequence[Curve], processors: Iterable[Processor], path: str | os.PathLike[str], *, title: str | None = None
) -> None:
    """Draw a line for each type of convolution, in the colour of its kind, with a marker where channels double.

    Below the lowest of the processors' op:byte all is under water. Raises ValueError for another suffix than .png, .svg
    or .pdf and when there are no curves or one has no points, OSError if the file cannot be written.
    """
    check_suffix(path)
    if not curves or not all(curves):
        raise ValueError(f"cannot draw {path}: there are no curves, or one has no points")
    from matplotlib.ticker import LogLocator

    processors = sorted(processors, key=lambda processor: processor.op_byte)
    channels = sorted({point.channels for curve in curves for point in curve})
    doubled = [c for c in channels if c in {channels[0] << doublings for doublings in range(c.bit_length())}]
    with new_figure(path, 4.4 + small_print_height(processors)) as figure:
        if title is not None:
            figure.suptitle(fill(title, 90), x=0.01, ha="left", weight="bold", size=11)
        write_small_print(figure, [], processors)
        axes = figure.subplots()
        tidy(axes)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xlim(channels[0] / 1.05, channels[-1])
        axes.set_xticks(doubled, [str(c) for c in doubled])
        axes.minorticks_off()
        axes.set_xlabel("input channels")
        axes.set_ylabel("operational intensity [OP/byte]")
        labels = []
        for index, curve in enumerate(curves):
            colour = KIND_STYLES[curve[-1].layer_kind]["facecolor"]
            axes.plot(
                [point.channels for point in curve],
                [point.intensity for point in curve],
                linewidth=1.8,
                color=colour,
                marker=MARKERS[index % len(MARKERS)],
                markevery=[at for at, point in enumerate(curve) if point.channels in doubled],
                markersize=5,
                markerfacecolor="white",
                clip_on=False,
                zorder=3,
            )
            labels.append(EndLabel(curve[-1].intensity, curve[0].conv_type.label, colour))
        for index, processor in enumerate(processors):
            axes.axhline(processor.op_byte, color=WATER, linewidth=1.4, linestyle=LINE_STYLES[index % 3], zorder=2)
            text = f"{processor.name.upper()}, {processor.op_byte:.0f} OP/byte"
            labels.append(EndLabel(processor.op_byte, text, WATER, WATER))
        heights = [*(label.y for label in labels), *(point.intensity for curve in curves for point in curve)]
        axes.set_ylim(min(heights) / 2, 1.3 * max(heights))
        if processors:
            axes.axhspan(min(heights) / 2, processors[0].op_byte, color=WATER, alpha=0.12, linewidth=0, zorder=0.5)
            sentence = f"under water: memory-bound on {processors[0].name.upper()}"
            axes.annotate(
                sentence, (0, 0), (4, 4), xycoords="axes fraction", textcoords="offset points", size=8.5, color=WATER
            )
        label_ends(axes, labels)

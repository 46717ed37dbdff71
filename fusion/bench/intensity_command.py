"""`python -m fusion.bench intensity`: operational intensity of convolutions over their channels (figure 2e)."""

import argparse

from fusion.bench import report
from fusion.bench.report import Column
from fusion.planner.intensity import CONV_TYPES, IntensityPoint, conv_intensity, intensity_curve
from fusion.planner.processor import PROCESSORS, Processor

DESCRIPTION = """\
How many operations does a convolution do for each byte that it moves? If they are fewer than a GPU's op:byte, which is
its peak / bandwidth, DRAM limits it. Counted are kernels of one layer in fp16, which read input and weights once and
write the output once. Nothing runs: no GPU is needed.
"""

PROTOCOL = (
    "not timed: ops and DRAM bytes are counted on the layer-wise program of one convolution of stride 1 in fp16, "
    "intensity = ops / bytes in OP/byte"
)

Row = dict[str, object]


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "intensity",
        help="operational intensity of convolutions over their channels (the paper's figure 2e)",
        description=DESCRIPTION,
        epilog="examples:\n"
        "  python -m fusion.bench intensity --plot intensity.png\n"
        "  python -m fusion.bench intensity --channels 32:1024 --batch 1 --hw 14 --processor a5000 --processor h200",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--channels",
        type=_parse_range,
        default=(16, 512),
        metavar="FIRST:LAST",
        help="input channels, FIRST doubled up to LAST (default: 16:512)",
    )
    parser.add_argument("--batch", type=int, default=128, metavar="N", help="images (default: 128)")
    parser.add_argument("--hw", type=int, default=28, metavar="HW", help="height = width of an image (default: 28)")
    parser.add_argument(
        "--processor",
        action="append",
        choices=PROCESSORS,
        help="whose op:byte to compare with; repeatable (default: a5000)",
    )
    parser.add_argument("--plot", metavar="PATH", help="draw the intensities, as .png, .svg or .pdf")
    parser.add_argument("--json", metavar="PATH", help="write meta data and rows as JSON, one row a convolution")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run the command. Raises ValueError for sizes that make no convolution, OSError if a file cannot be written."""
    report.check_outputs(args.json, args.plot)
    processors = [PROCESSORS[name] for name in dict.fromkeys(args.processor or ["a5000"])]
    channels = doubled_channels(*args.channels)
    points = [
        conv_intensity(conv_type, c, args.batch, args.hw)
        for c in channels
        for conv_type in CONV_TYPES
        if conv_type.fits(c)
    ]
    sizes = {"batch": args.batch, "hw": args.hw, "dtype": "float16"}
    if args.json:
        op_bytes = {processor.title: processor.op_byte for processor in processors}
        meta = report.collect_meta(PROTOCOL, processors[0], **sizes, op_byte=op_bytes)
        report.write_json(args.json, meta, map(intensity_row, points))
    print_points(points, f"Operational intensity in OP/byte, {_sizes(args)}", processors)
    if args.plot:
        from fusion.plots.intensity_plot import plot_intensity

        between = sorted({*channels, *range(channels[0], channels[-1], 8)})
        curves = [intensity_curve(conv_type, between, args.batch, args.hw) for conv_type in CONV_TYPES]
        title = f"Operational intensity of convolutions, {_sizes(args)}"
        plot_intensity([curve for curve in curves if curve], processors, args.plot, title=title)
    return 0


def doubled_channels(first: int, last: int) -> list[int]:
    """`first`, and twice, four times ... as much, up to `last`."""
    channels = [first]
    while 2 * channels[-1] <= last:
        channels.append(2 * channels[-1])
    return channels


def intensity_row(point: IntensityPoint) -> Row:
    """A convolution as a row of the report: OPs, bytes of DRAM traffic, OP/byte."""
    return {
        "convolution": point.conv_type.name,
        "channels": point.channels,
        "out_channels": point.conv_type.expansion * point.channels,
        "kernel_size": point.conv_type.kernel_size,
        "group_width": point.conv_type.group_width or point.channels,
        "ops": point.ops_count,
        "bytes": point.bytes,
        "intensity": point.intensity,
    }


def print_points(points: list[IntensityPoint], title: str, processors: list[Processor]) -> None:
    """Print intensities, a row for each number of channels, and what they are to be compared with."""
    intensities = {(point.channels, point.conv_type): point.intensity for point in points}
    columns = [Column("C"), *(Column(conv_type.label, "{:.1f}") for conv_type in CONV_TYPES)]
    channels = dict.fromkeys(point.channels for point in points)
    cells = [[c, *(intensities.get((c, conv_type)) for conv_type in CONV_TYPES)] for c in channels]
    report.print_table(columns, cells, title)
    for processor in processors:
        print(f"memory-bound below {processor.op_byte:.0f} OP/byte on {processor}")


def _sizes(args: argparse.Namespace) -> str:
    return f"batch {args.batch}, {args.hw}×{args.hw}, fp16"


def _parse_range(text: str) -> tuple[int, int]:
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 0 < int(first) <= int(last)):
        raise argparse.ArgumentTypeError(
            f"channels {text!r} are not FIRST:LAST: give two positive integers, for example 16:512"
        )
    return int(first), int(last)

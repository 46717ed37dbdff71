"""`python -m fusion.bench sweep`: the efficiency that networks can attain on processors of any op:byte ratio."""

import argparse
import re
from dataclasses import dataclass

from fusion.analysis.network_waterline import PROGRAM_TITLES
from fusion.bench import report
from fusion.bench.report import Column
from fusion.bench.target import TARGETS_HELP, add_arguments, analyse, chosen_processor, parse_target
from fusion.planner.op_byte_sweep import SweepPoint, sweep
from fusion.planner.processor import PROCESSORS

DESCRIPTION = """\
How efficient can a network be on a processor of any op:byte ratio (peak arithmetic over DRAM bandwidth)? By the
waterline, kernel after kernel, and by the roofline of the whole network, which promises too much where some kernels are
memory-bound and others are not. Nothing runs: no GPU is needed, and no weights.
"""

PROTOCOL = (
    "not timed: maximum efficiency = sum of OPs / sum over kernels of max(OPs, op:byte x bytes); roofline = min(1, OPs "
    "/ (op:byte x bytes)) of the whole; OPs and DRAM bytes are counted on the programs, in fp16"
)
PRINTED = 7
"""Ratios that the table has."""


@dataclass(frozen=True)
class OpByteRange:
    """Ratios from `start` to `stop`, `step` apart."""

    start: int
    stop: int
    step: int

    @property
    def ratios(self) -> range:
        return range(self.start, self.stop + 1, self.step)


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "sweep",
        help="maximum efficiency of networks over the processor's op:byte (the paper's figures 4 and 16)",
        description=DESCRIPTION,
        epilog="examples:\n"
        "  python -m fusion.bench sweep small --op-byte 0:600 --plot small.svg\n"
        "  python -m fusion.bench sweep small/fused convnext_small@288/layerwise --panels --json sweep.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("targets", nargs="+", type=parse_target, metavar="TARGET", help=TARGETS_HELP)
    parser.add_argument(
        "--op-byte",
        type=parse_range,
        default=OpByteRange(0, 600, 5),
        metavar="FROM:TO[:STEP]",
        help="the ratios, in OP/byte (default: 0:600:5)",
    )
    parser.add_argument("--panels", action="store_true", help="draw each curve in a panel of its own")
    add_arguments(parser, processor="a5000")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run the command. Raises ValueError for what is no network or makes no block, OSError for files."""
    report.check_outputs(args.json, args.plot)
    processor = chosen_processor(args)
    analysed = analyse(args.targets, args.batch, processor)
    curves = {
        (each.network.name, program): sweep(line, args.op_byte.ratios)
        for each in analysed
        for program, line in each.programs.items()
    }
    _print(curves, f"Maximum efficiency in % over op:byte, batch {args.batch}, fp16; blocks as for {processor.title}")
    if args.json:
        metas = [network.meta() for network in dict.fromkeys(each.network for each in analysed)]
        meta = report.collect_meta(PROTOCOL, processor, batch=args.batch, dtype="float16", networks=metas)
        report.write_json(args.json, meta, [_row(*key, point) for key, points in curves.items() for point in points])
    if args.plot:
        from fusion.plots.sweep_plot import SweepCurve, plot_sweep

        drawn = [SweepCurve(f"{name}, {PROGRAM_TITLES[program]}", curves[name, program]) for name, program in curves]
        shown = {item.name: item for item in (PROCESSORS["a5000"], PROCESSORS["h200"], processor)}
        plot_sweep(drawn, shown.values(), args.plot, together=not args.panels)
    return 0


def parse_range(text: str) -> OpByteRange:
    """Read FROM:TO[:STEP]. Raises argparse.ArgumentTypeError."""
    match = re.fullmatch(r"(\d+):(\d+)(?::(\d+))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not FROM:TO[:STEP] in OP/byte, as in 0:600")
    start, stop, step = (int(part) for part in match.groups("5"))
    if stop - start < step or not step:
        raise argparse.ArgumentTypeError(f"{text!r} has fewer than two ratios: make the range larger, or the step less")
    return OpByteRange(start, stop, step)


def _row(model: str, program: str, point: SweepPoint) -> dict[str, object]:
    return {
        "model": model,
        "program": program,
        "op_byte": point.op_byte,
        "waterline_pct": 100 * point.waterline_efficiency,
        "roofline_pct": 100 * point.roofline_efficiency,
    }


def _print(curves: dict[tuple[str, str], tuple[SweepPoint, ...]], title: str) -> None:
    points = next(iter(curves.values()))
    wanted = sorted({round(index * (len(points) - 1) / (PRINTED - 1)) for index in range(PRINTED)})
    columns = [Column("network"), Column("model of it")]
    columns += [Column(f"{points[index].op_byte:g}", "{:.1f}") for index in wanted]
    cells = []
    for (name, program), curve in curves.items():
        label = f"{name}, {PROGRAM_TITLES[program]}"
        cells.append([label, "waterline", *(100 * curve[index].waterline_efficiency for index in wanted)])
        cells.append([label, "roofline", *(100 * curve[index].roofline_efficiency for index in wanted)])
    report.print_table(columns, cells, title)

"""`python -m fusion.bench predicted`: what the planner predicted, and what was measured, in saved results."""

import argparse
from collections.abc import Sequence

from fusion.bench import report
from fusion.bench.predicted_row import THIS_PLANNER, WRITERS, Row, errors_by_kernel, predicted_rows
from fusion.bench.report import Column
from fusion.bench.saved_results import read_report

DESCRIPTION = """\
How long must a block take, how long should it take, how long does it take? The minimum latency is that of its program:
max(OPs / peak, DRAM bytes / bandwidth) of each kernel. The predicted latency is this version's planner's, for the tile
that was timed. What Inductor takes is compared with the minimum latency of one kernel for each layer. Nothing runs: no
GPU is needed.

RESULTS are reports that `convfirst`, `mbconv`, `ffn`, `network --by-block` or `compile` wrote on a GPU, with --json.
Peak and bandwidth are those that were measured with a report, or else those that the planner knows. Reports of
`network` and `compile` do not tell tiles: those that the planner chooses are assumed. Of networks other than
ConvFirstNets, reports of `compile` do not tell sizes either: their predictions are those of the version that measured.

A prediction is for a block with a launch of its own. Where blocks of a stage ran in one launch, which saves most of
what a launch costs, that is predicted as well, and each is compared with its own measurement: `one` and `stage of 8` in
the column `launch`. Latencies are in microseconds for a block.
"""

EXAMPLES = """\
examples:
  python -m fusion.bench predicted bench/results/h200/convfirst.json bench/results/h200/mbconv.json --plot predicted.png
  python -m fusion.bench mbconv --json mbconv.json && python -m fusion.bench predicted mbconv.json
"""

PROTOCOL = (
    "not timed: measured microseconds for a block are those of the reports given; minimum_us: sum over the kernels of "
    "the block's program of max(ops / peak, bytes / bandwidth), layerwise_us: the same for one kernel for each layer; "
    "predicted_us: the planner's, of this version where predicted_by does not say report; error_pct = 100 "
    "(predicted_us / measured_us - 1); largest_error_pct, mean_error_pct: of its absolute values, by kernel"
)


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "predicted",
        help="minimum, predicted and measured latency of blocks, from saved results",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", nargs="+", metavar="RESULTS", help="JSON of a command that times blocks")
    parser.add_argument("--plot", metavar="PATH", help="draw measured over minimum and predicted: .png, .svg or .pdf")
    parser.add_argument("--json", metavar="PATH", help="write meta data and rows as JSON")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run the command.

    Raises ValueError for results without blocks that were timed, OSError if a file cannot be read or written.
    """
    report.check_outputs(args.json, args.plot)
    reports = {path: read_report(path, (), WRITERS) for path in args.results}
    rows = [row for path, (meta, found) in reports.items() for row in predicted_rows(path, meta, found)]
    errors = errors_by_kernel(rows)
    if args.json:
        by_kernel = {
            "largest_error_pct": {kernel: largest for kernel, (_, largest, _) in errors.items()},
            "mean_error_pct": {kernel: mean for kernel, (_, _, mean) in errors.items()},
        }
        meta = report.collect_meta(PROTOCOL, device="cpu", reports=args.results, **by_kernel)
        report.write_json(args.json, meta, rows)
    if args.plot:
        from fusion.plots.predicted_plot import plot_predicted

        plot_predicted(rows, args.plot)
    # The tables come last: a reader that closes the pipe early must not cost the files.
    print_rows(rows)
    print_errors(rows)
    return 0


def print_rows(rows: Sequence[Row]) -> None:
    """The rows as a table, and the ceilings that they assume."""
    columns = {
        "block": Column("block"),
        "batch": Column("batch"),
        "dtype": Column("dtype"),
        "kernel": Column("kernel"),
        "launch": Column("launch"),
        "minimum_us": Column("minimum µs", "{:.1f}"),
        "predicted_us": Column("predicted µs", "{:.1f}"),
        "measured_us": Column("measured µs", "{:.1f}"),
        "ratio": Column("measured / minimum", "{:.2f}"),
        "error_pct": Column("error %", "{:+.1f}"),
        "predicted_by": Column("predicted by"),
        "layerwise_us": Column("layer-wise minimum µs", "{:.1f}"),
        "inductor_us": Column("Inductor µs", "{:.1f}"),
        "inductor_ratio": Column("Inductor / minimum", "{:.2f}"),
        "report": Column("results"),
    }
    usual = {"predicted_by": THIS_PLANNER, "report": rows[0]["report"], "layerwise_us": None, "inductor_us": None}
    usual |= {"inductor_ratio": None}
    shown = [key for key in columns if key not in usual or any(row[key] != usual[key] for row in rows)]
    title = "Minimum, predicted and measured latency, µs for a block\n" + "\n".join(assumed(rows))
    report.print_table([columns[key] for key in shown], [[row[key] for key in shown] for row in rows], title)


def print_errors(rows: Sequence[Row]) -> None:
    """The largest and the mean error of each kernel's predictions."""
    columns = (
        Column("kernel"),
        Column("predictions"),
        Column("largest error %", "{:.1f}"),
        Column("mean error %", "{:.1f}"),
    )
    cells = [[kernel, *found] for kernel, found in errors_by_kernel(rows).items()]
    report.print_table(columns, cells, "Errors of predictions, absolute")


def assumed(rows: Sequence[Row]) -> list[str]:
    """The peak and the bandwidth of each report."""
    texts = (
        f"{row['report']}: {row['device']}, {row['peak_tflops']:.4g} TFLOP/s and {row['bandwidth_tbs']:.3g} TB/s "
        f"({row['ceilings_source']})"
        for row in rows
    )
    return list(dict.fromkeys(texts))

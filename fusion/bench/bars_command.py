"""`python -m fusion.bench bars`: throughput of blocks, from saved results (the paper's figures 13 and 14)."""

import argparse
import os

from fusion.bench import report
from fusion.bench.blocks import BlockConfig
from fusion.bench.report import Column
from fusion.bench.saved_results import is_table, number, read_report, read_table
from fusion.planner.lower import block_fused
from fusion.planner.processor import get_processor
from fusion.planner.waterline import analyze

DESCRIPTION = """\
Throughput of blocks in TFLOP/s and in percent of the peak: eager PyTorch and Inductor, where they were timed, the fused
kernel, and its limit, which is max(OPs / peak, DRAM bytes / bandwidth) summed over the kernels of the fused block.
Nothing runs: no GPU is needed.

RESULTS is a report that `convfirst`, `mbconv` or `ffn` wrote with --json, or the paper's table 1 or 2 as CSV: its GPU
is an RTX A5000 of 76.7 TFLOP/s and 480 GB/s, its batch 128; the limits are then the planner's.
"""

EXAMPLES = """\
examples:
  python -m fusion.bench bars bench/paper/table1_convfirst.csv --plot figure13.png
  python -m fusion.bench bars bench/paper/table2_mbconv.csv --plot figure14.png
  python -m fusion.bench mbconv --json mbconv.json && python -m fusion.bench bars mbconv.json --plot mbconv.png
"""

PAPER_COLUMNS = ("channels", "alpha", "height", "width", "inductor_tflops", "fused_tflops")
ROW_KEYS = ("block", "channels", "alpha", "hw", "ops", "limit_us", "fused_us", "inductor_us", "eager_us")

Row = dict[str, object]


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "bars",
        help="throughput of saved results of blocks (the paper's figures 13 and 14)",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", metavar="RESULTS", help="JSON of convfirst, mbconv or ffn, or table 1 or 2 as CSV")
    parser.add_argument("--plot", metavar="PATH", help="draw bars and limits: .png, .svg or .pdf")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run the command. Raises ValueError for other results, OSError if a file cannot be read or written."""
    from fusion.plots.block_plot import plot_blocks

    report.check_outputs(None, args.plot)
    if is_table(args.results):
        meta, rows = read_paper_table(args.results)
    else:
        meta, rows = read_report(args.results, ROW_KEYS, "`convfirst`, `mbconv` or `ffn`")
    # The table comes last: a reader that closes the pipe early must not cost the picture.
    if args.plot:
        plot_blocks(rows, meta, args.plot)
    print_bars(meta, rows)
    return 0


def read_paper_table(path: str | os.PathLike[str]) -> tuple[Row, list[Row]]:
    """The paper's table 1 or 2 as the report of a command: meta data, and a row for each block.

    Times follow from throughputs: one table has milliseconds of a block, the other of a stage of eight. Raises
    ValueError for another table.
    """
    processor = get_processor("a5000")
    meta = {
        "device": processor.title,
        "processor": processor.title,
        "peak_tflops": processor.peak_ops / 1e12,
        "bandwidth_tbs": processor.bandwidth / 1e12,
        "ceilings_source": processor.source,
        "batch": 128,
        "dtype": "float16",
        "timed": True,
    }
    rows = []
    for row in read_table(path, PAPER_COLUMNS):
        channels, alpha, height, width = (int(number(path, row, column)) for column in PAPER_COLUMNS[:4])
        if height != width:
            raise ValueError(f"{path}: blocks are of square images, not of {height} x {width}")
        config = BlockConfig("mbconv" if "se_ratio" in row else "convfirst", channels, alpha, height)
        line = analyze(block_fused(config.graph(meta["batch"], meta["dtype"])), processor)
        times = {
            f"{program}_us": line.ops_count / number(path, row, f"{program}_tflops") / 1e6
            for program in ("inductor", "fused")
        }
        rows.append(
            {
                "block": config.block,
                "channels": channels,
                "alpha": alpha,
                "hw": height,
                "ops": line.ops_count,
                "eager_us": None,
                **times,
                "limit_us": 1e6 * line.min_latency,
            }
        )
    return meta, rows


def print_bars(meta: Row, rows: list[Row]) -> None:
    """The throughputs as a table."""
    from fusion.plots.block_plot import tflops

    timed = any(row["fused_us"] is not None for row in rows)
    program = "fused" if timed else "predicted"
    columns = [Column("block"), Column("C"), Column("α"), Column("H=W")]
    shown = [name for name in ("eager", "inductor") if any(tflops(row, name) for row in rows)]
    titles = {"eager": "eager TFLOP/s", "inductor": "Inductor TFLOP/s"}
    columns += [Column(titles[name], "{:.1f}") for name in shown]
    columns += [
        Column(f"{program} TFLOP/s", "{:.1f}"),
        Column("speedup", "{:.1f}x"),
        Column("% of peak", "{:.1f}"),
        Column("limit TFLOP/s", "{:.1f}"),
        Column("% of limit", "{:.1f}"),
    ]
    cells = []
    for row in rows:
        reached, limit, inductor = (tflops(row, name) for name in (program, "limit", "inductor"))
        cells.append(
            [
                *(row[key] for key in ("block", "channels", "alpha", "hw")),
                *(tflops(row, name) for name in shown),
                reached,
                None if None in (reached, inductor) else reached / inductor,
                None if reached is None else 100 * reached / meta["peak_tflops"],
                limit,
                None if reached is None else 100 * reached / limit,
            ]
        )
    where = meta["device"] if timed else f"{meta['processor']}, PREDICTED, NOT TIMED"
    ceilings = f"{meta['peak_tflops']:.4g} TFLOP/s and {meta['bandwidth_tbs']:.3g} TB/s ({meta['ceilings_source']})"
    title = f"Blocks on {where}, batch {meta['batch']}, {meta['dtype']}; limits at {ceilings}; speedup over Inductor"
    report.print_table(columns, cells, title)

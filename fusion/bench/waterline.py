"""`python -m fusion.bench waterline`: minimum latency of blocks, layer by layer and fused (figures 8 and 12)."""

import argparse

from fusion.bench import report
from fusion.bench.blocks import BLOCK_TYPES, FIGURE8, FIGURE12, BlockConfig, parse_block
from fusion.bench.report import Column
from fusion.planner.lower import block_fused, layerwise
from fusion.planner.processor import PROCESSORS, Processor
from fusion.planner.waterline import analyze

DESCRIPTION = """\
How fast can a block be on a GPU? Waterline analysis of the block as one kernel per layer, every tensor between them in
DRAM, and fused into one kernel. A kernel takes at least max(OPs / peak, bytes / bandwidth); a block takes the sum over
its kernels. Nothing runs: no GPU is needed. Printed are minimum latencies in microseconds and intensities in OP/byte.
"""

PROTOCOL = (
    "not timed: waterline analysis, minimum_us = sum over kernels of max(ops / peak, bytes / bandwidth); "
    "ops and DRAM bytes are counted on the program, in fp16"
)

TYPES = tuple(BLOCK_TYPES)
LOWERINGS = (layerwise, block_fused)

Row = dict[str, object]


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command's parser."""
    processors = "\n".join(f"  {name:<8} {processor}" for name, processor in PROCESSORS.items())
    parser = subparsers.add_parser(
        "waterline",
        help="minimum latencies of blocks, layer by layer and fused (the paper's figures 8 and 12)",
        description=DESCRIPTION,
        epilog=f"processors:\n{processors}\n\n"
        "examples:\n"
        "  python -m fusion.bench waterline --json waterline.json\n"
        "  python -m fusion.bench waterline --processor h200 --block 64,6,32 --block mbconv:128,4,16",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--processor", choices=PROCESSORS, default="a5000", help="whose ceilings to use, see below (default: a5000)"
    )
    parser.add_argument("--batch", type=int, default=128, metavar="N", help="images (default: 128)")
    parser.add_argument(
        "--block",
        action="append",
        type=_parse_block,
        metavar="[TYPE:]C,ALPHA,HW",
        help=f"channels, expansion ratio and height = width of a block; TYPE is {' or '.join(TYPES)} (default: "
        f"{TYPES[0]}); repeatable (default: the blocks of the figures)",
    )
    parser.add_argument("--json", metavar="PATH", help="write meta data and rows as JSON, two rows a block")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run the command. Raises ValueError for sizes that make no block, OSError if the JSON cannot be written."""
    if args.json:
        report.check_writable(args.json)
    processor = PROCESSORS[args.processor]
    configs = args.block or (*FIGURE8, *FIGURE12)
    rows = [row for config in configs for row in block_rows(config, args.batch, processor)]
    if args.json:
        report.write_json(args.json, report.collect_meta(PROTOCOL, processor, batch=args.batch, dtype="float16"), rows)
    print_rows(rows, f"Waterline on {processor}, batch {args.batch}, fp16")
    return 0


def block_rows(config: BlockConfig, batch: int, processor: Processor) -> list[Row]:
    """A block's layer-wise and fused program: OPs, bytes of DRAM traffic, OP/byte and minimum latency in us.

    Raises ValueError for sizes that make no block.
    """
    graph = config.graph(batch)
    rows = []
    for lower in LOWERINGS:
        program = lower(graph)
        line = analyze(program, processor)
        rows.append(
            {
                "block": config.block,
                "channels": config.channels,
                "alpha": config.alpha,
                "hw": config.hw,
                "program": program.name,
                "ops": line.ops_count,
                "bytes": line.bytes,
                "intensity": line.mediant_intensity,
                "minimum_us": line.min_latency * 1e6,
            }
        )
    return rows


def print_rows(rows: list[Row], title: str) -> None:
    """Print the rows of `block_rows`, both programs of a block side by side."""
    columns = (
        Column("block"),
        Column("C"),
        Column("α"),
        Column("H=W"),
        Column("GOP", "{:.2f}"),
        Column("layer-wise MB", "{:.1f}"),
        Column("OP/byte", "{:.1f}"),
        Column("min µs", "{:.1f}"),
        Column("fused MB", "{:.1f}"),
        Column("OP/byte", "{:.1f}"),
        Column("min µs", "{:.1f}"),
        Column("gain", "{:.2f}x"),
    )
    cells = []
    for unfused, fused in zip(rows[::2], rows[1::2], strict=True):
        cell = [unfused["block"], unfused["channels"], unfused["alpha"], unfused["hw"], unfused["ops"] / 1e9]
        for row in (unfused, fused):
            cell += [row["bytes"] / 1e6, row["intensity"], row["minimum_us"]]
        cells.append([*cell, unfused["minimum_us"] / fused["minimum_us"]])
    report.print_table(columns, cells, title)


def _parse_block(text: str) -> BlockConfig:
    return parse_block(text, TYPES)

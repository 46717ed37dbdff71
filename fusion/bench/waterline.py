"""`python -m fusion.bench waterline`: minimum latency of networks and blocks, layer by layer and fused."""

import argparse

from fusion.analysis.network_waterline import plot_programs
from fusion.bench import report
from fusion.bench.blocks import FIGURE8, FIGURE12, BlockConfig, parse_block
from fusion.bench.report import Column
from fusion.bench.target import TARGETS_HELP, TYPES, add_arguments, analyse, chosen_processor, parse_target
from fusion.planner.lower import block_fused, layerwise
from fusion.planner.processor import PROCESSORS, Processor
from fusion.planner.waterline import analyze

DESCRIPTION = """\
How fast can a network or a block be on a GPU, and where does its time go? Waterline analysis: layer by layer, with one
kernel per layer and every tensor between them in DRAM, and with blocks fused into one kernel each. A kernel takes at
least max(OPs / peak, bytes / bandwidth); a network takes the sum over its kernels. Nothing runs: no GPU is needed, and
no weights. Without a target it is the blocks of the paper's figures.
"""

PROTOCOL = (
    "not timed: waterline analysis, minimum_us = sum over kernels of max(ops / peak, bytes / bandwidth); "
    "ops and DRAM bytes are counted on the program, in fp16"
)

LOWERINGS = (layerwise, block_fused)
FIGURES = {"8": FIGURE8, "12": FIGURE12}

Row = dict[str, object]


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command's parser."""
    processors = "\n".join(f"  {name:<8} {processor}" for name, processor in PROCESSORS.items())
    parser = subparsers.add_parser(
        "waterline",
        help="minimum latency of networks and blocks, and where it goes (the paper's figures 3, 8, 12, 15)",
        description=DESCRIPTION,
        epilog=f"processors:\n{processors}\n\n"
        "examples:\n"
        "  python -m fusion.bench waterline small --plot small.svg\n"
        "  python -m fusion.bench waterline resnet101@224 convnext_small@288 --processor a5000 --json networks.json\n"
        "  python -m fusion.bench waterline mbconv:128,4,16 --kernels\n"
        "  python -m fusion.bench waterline --figure 8 --plot figure8.svg\n"
        "  python -m fusion.bench waterline --block 64,6,32 --block mbconv:128,4,16 --plot blocks.png",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("targets", nargs="*", type=parse_target, metavar="TARGET", help=TARGETS_HELP)
    parser.add_argument("--kernels", action="store_true", help="print every kernel of the targets")
    parser.add_argument(
        "--block",
        action="append",
        type=_parse_block,
        metavar="[TYPE:]C,ALPHA,HW",
        help="a block to compare with others, one line each; repeatable (default: the blocks of figures 8 and 12)",
    )
    parser.add_argument("--figure", choices=FIGURES, help="the blocks of one of the paper's figures only")
    add_arguments(parser, processor="a5000")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run the command. Raises ValueError for what is no network or makes no block, OSError for files."""
    report.check_outputs(args.json, args.plot)
    if bool(args.targets) + bool(args.block) + bool(args.figure) > 1:
        raise ValueError("give targets, one table each, or --block, one line each, or --figure; not several of them")
    return _run_targets(args) if args.targets else _run_blocks(args)


def _run_targets(args: argparse.Namespace) -> int:
    processor = chosen_processor(args)
    analysed = analyse(args.targets, args.batch, processor)
    networks = list(dict.fromkeys(each.network for each in analysed))
    for network in networks:
        print(network.table(args.kernels), end="\n\n")
    if args.json:
        metas = [network.meta() for network in networks]
        extra = metas[0] if len(metas) == 1 else {"networks": metas}
        meta = report.collect_meta(PROTOCOL, processor, batch=args.batch, dtype="float16") | extra
        report.write_json(args.json, meta, [row for each in analysed for row in each.network.rows(each.programs)])
    if args.plot:
        drawn = [(each.network.name, program, line) for each in analysed for program, line in each.programs.items()]
        plot_programs(drawn, args.plot)
    return 0


def _run_blocks(args: argparse.Namespace) -> int:
    processor = chosen_processor(args)
    configs = args.block or (FIGURES[args.figure] if args.figure else (*FIGURE8, *FIGURE12))
    rows = [row for config in configs for row in block_rows(config, args.batch, processor)]
    if args.json:
        report.write_json(args.json, report.collect_meta(PROTOCOL, processor, batch=args.batch, dtype="float16"), rows)
    print_rows(rows, f"Waterline on {processor}, batch {args.batch}, fp16")
    if args.plot:
        from fusion.plots.waterline_plot import Well, plot_wells

        kinds = tuple(dict.fromkeys(config.block for config in configs))
        wells = []
        for config in configs:
            label = f"C {config.label}" if len(kinds) == 1 else f"{config.block}, C {config.label}"
            graph = config.graph(args.batch)
            wells.append(Well(label, *(analyze(lower(graph), processor) for lower in LOWERINGS)))
        title = f"{' and '.join(kinds)}, batch {args.batch}: layer by layer, and fused"
        plot_wells(wells, args.plot, title=title)
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

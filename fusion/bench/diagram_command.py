"""`python -m fusion.bench diagram`: a block's program as a tensor-machine diagram (figures 5, 7, 10 and 11)."""

import argparse
from collections.abc import Callable, Mapping

from fusion.bench import report
from fusion.bench.blocks import BLOCK_TYPES, BlockConfig, parse_block
from fusion.planner.graph import BlockGraph
from fusion.planner.lower import block_fused, image_fused, layerwise, scaled, two_pass
from fusion.planner.program import Kernel, Program

DESCRIPTION = """\
How does a program run a block? Which kernels, which tensors in which memory, what loops, what every kernel moves. The
program is printed as text, and drawn: every tensor a box coloured by memory, every operation a symbol, and arrows for
data that move, thick where they cost DRAM traffic. Nothing runs: no GPU is needed. The programs:

  layerwise   one kernel per layer, every tensor between them in DRAM (figures 7a and 10)
  fused       one kernel; processors divide pixels (figure 7b) or, for mbconv, hidden channels (figure 11)
  scaled      one kernel; processors divide input and output channels too, and add up hidden channels (figure 7c)
  two-pass    two kernels that meet at the squeeze vector of mbconv
  image       one kernel; processors divide the images of mbconv
"""

PROTOCOL = "not timed: ops and DRAM bytes are counted on the program, in fp16"

LEGEND = "legend"
TYPES = tuple(BLOCK_TYPES)

LOWERINGS: Mapping[str, Callable[..., Program]] = {
    "layerwise": layerwise,
    "fused": block_fused,
    "scaled": scaled,
    "two-pass": two_pass,
    "image": image_fused,
}
OPTIONS: Mapping[str, tuple[str, ...]] = {
    "processors": ("scaled",),
    "hidden_tile": ("fused", "scaled", "two-pass", "image"),
    "pixel_tile": ("fused", "scaled", "two-pass"),
}
"""The programs that each option is for."""

Row = dict[str, object]


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "diagram",
        help="a block's program as a tensor-machine diagram (the paper's figures 5, 7, 10 and 11)",
        description=DESCRIPTION,
        epilog="examples:\n"
        "  python -m fusion.bench diagram 64,6,64 --program layerwise --plot fig7a.svg\n"
        "  python -m fusion.bench diagram 64,6,64 --pixel-tile 8x16 --hidden-tile 16 --plot fig7b.svg\n"
        "  python -m fusion.bench diagram 512,6,32 --program scaled --processors 2 --plot fig7c.svg\n"
        "  python -m fusion.bench diagram mbconv:128,4,16 --program layerwise --plot fig10.svg\n"
        "  python -m fusion.bench diagram mbconv:128,4,16 --hidden-tile 64 --plot fig11.svg\n"
        "  python -m fusion.bench diagram legend --plot fig5.svg",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "block",
        type=_parse_block,
        metavar="BLOCK",
        help=f"[TYPE:]C,ALPHA,HW: channels, expansion ratio and height = width; TYPE is {' or '.join(TYPES)} (default: "
        f"{TYPES[0]}). Or {LEGEND}, which draws what the symbols mean (figure 5)",
    )
    parser.add_argument("--program", choices=LOWERINGS, default="fused", help="see above (default: fused)")
    parser.add_argument(
        "--processors", type=int, metavar="N", help="that divide the channels of the scaled program (default: 2)"
    )
    parser.add_argument(
        "--hidden-tile", type=int, metavar="N", help="hidden channels at a time (default: left open in the program)"
    )
    parser.add_argument(
        "--pixel-tile", type=_parse_tile, metavar="HxW", help="height and width of a tile (default: left open)"
    )
    parser.add_argument("--batch", type=int, default=128, metavar="N", help="images (default: 128)")
    parser.add_argument("--stride", type=int, choices=(1, 2), default=1, help="of the block (default: 1)")
    parser.add_argument("--plot", metavar="PATH", help="draw the diagram: .png, .svg or .pdf")
    parser.add_argument("--json", metavar="PATH", help="write meta data and rows as JSON, one row a kernel")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run the command.

    Raises ValueError for sizes that make no block, options and programs that do not suit it, and names of pictures that
    cannot be drawn, OSError if a file cannot be written.
    """
    from fusion.plots.diagram.draw import draw_legend, draw_program

    report.check_outputs(args.json, args.plot)
    if args.block == LEGEND:
        if not args.plot or args.json:
            raise ValueError("the legend is a picture only: give --plot PATH, and no --json")
        draw_legend(args.plot)
        print(f"wrote {args.plot}")
        return 0
    program = lower(block_graph(args.block, args.batch, args.stride), args)
    if args.json:
        meta = report.collect_meta(PROTOCOL, batch=args.batch, dtype=program.graph.dtype, stride=args.stride)
        report.write_json(args.json, meta, kernel_rows(args.block, args.program, program))
    if args.plot:
        draw_program(program, args.plot, title(args))
    print(program)
    if args.plot:
        print(f"wrote {args.plot}")
    return 0


def block_graph(config: BlockConfig, batch: int, stride: int) -> BlockGraph:
    """The block as a graph. Raises ValueError for sizes that make no block, and for a stride that it cannot have."""
    if stride == 1:
        return config.graph(batch)
    if config.block == "ffn":
        raise ValueError("an ffn block has stride 1 only; use --stride 1, or a convfirst or mbconv block")
    return BLOCK_TYPES[config.block](batch, config.hw, config.hw, config.channels, config.alpha, stride=stride)


def lower(graph: BlockGraph, args: argparse.Namespace) -> Program:
    """The program that was asked for. Raises ValueError for options that it does not have, or if it does not suit."""
    options = {name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None}
    for name in options:
        if args.program not in OPTIONS[name]:
            raise ValueError(
                f"--{name.replace('_', '-')} was given for the {args.program} program, but is for "
                f"{', '.join(OPTIONS[name])} only; omit it, or change --program"
            )
    return LOWERINGS[args.program](graph, **options)


def kernel_rows(config: BlockConfig, name: str, program: Program) -> list[Row]:
    """A row a kernel: OPs, bytes of DRAM traffic, OP/byte, how its work is divided, the memory of each tensor."""
    block = {"block": config.block, "channels": config.channels, "alpha": config.alpha, "hw": config.hw}
    return [{**block, "program": name, **_kernel_row(kernel)} for kernel in program.kernels]


def title(args: argparse.Namespace) -> str:
    """What stands above the diagram."""
    stride = f", stride {args.stride}" if args.stride > 1 else ""
    return f"{args.block.block} {args.block.label}{stride}, batch {args.batch}: {args.program}"


def _kernel_row(kernel: Kernel) -> Row:
    return {
        "kernel": kernel.name,
        "ops": kernel.ops_count,
        "bytes": kernel.bytes,
        "intensity": kernel.ops_count / kernel.bytes if kernel.bytes else None,
        "partition": str(kernel.partition) if kernel.partition else None,
        "loops": [str(loop) for loop in kernel.loops],
        "tensors": {tensor.name: str(memory) for tensor, memory in kernel.placement},
    }


def _parse_block(text: str) -> BlockConfig | str:
    return LEGEND if text == LEGEND else parse_block(text, TYPES)


def _parse_tile(text: str) -> tuple[int, int]:
    sizes = text.split("x")
    if len(sizes) != 2 or not all(size.isdecimal() and int(size) for size in sizes):
        raise argparse.ArgumentTypeError(f"{text!r} is not HxW, such as 8x16")
    return int(sizes[0]), int(sizes[1])

"""`python -m fusion.bench convfirst`: ConvFirst blocks fused into one kernel, next to eager PyTorch and Inductor.

On a GPU the blocks are timed. Without one they run at a small size through Triton's interpreter: that checks the
kernel and prints the plan and its prediction, and times nothing.
"""

import argparse
import os
from functools import partial

from fusion.bench import report
from fusion.bench.blocks import TABLE1, BlockConfig, parse_block
from fusion.planner.processor import PROCESSORS
from fusion.planner.tile import KERNEL_DTYPES

DESCRIPTION = """\
Fuse ConvFirst blocks (grouped 3x3 convolution, expand, ReLU, project, residual) into one kernel each, check every one
against float64 and compare its speed with eager PyTorch, Inductor and the block's own limit.

On a GPU: microseconds per block of a stage of eight blocks with distinct weights in a CUDA graph, channels_last, batch
norm folded by Inductor too. The limit is max(OPs / peak, DRAM bytes / bandwidth) with both ceilings measured in the
same run. Without a GPU: small images through Triton's interpreter, nothing timed.
"""

EXAMPLES = """\
examples:
  python -m fusion.bench convfirst --json convfirst.json --plot convfirst.png
  python -m fusion.bench convfirst --block 24,3,128 --block 72,6,32 --dtype bfloat16
  python -m fusion.bench convfirst --no-tune
"""

PROTOCOL_GPU = (
    "stage of eight blocks with distinct weights and random batch norm statistics in a CUDA graph, channels_last, "
    "median of 20 replays after warm-up, microseconds per block; Inductor: torch.compile default mode with freezing, "
    "cudnn.benchmark on, same graph; error: relative L2 error of the first block's output against float64"
)
PROTOCOL_INTERPRETER = (
    "not timed: the portable kernel in Triton's interpreter on a CPU, one small image (size in column 'checked'); "
    "predicted and limit microseconds are the planner's, for the processor and batch given; error: relative L2 error "
    "against float64"
)


def register(subparsers) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "convfirst",
        help="fuse, check and time ConvFirst blocks (the paper's table 1)",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--block",
        action="append",
        type=partial(parse_block, types=("convfirst",)),
        metavar="C,ALPHA,HW",
        help="channels, expansion ratio and height = width of a block; repeatable (default: the eight of table 1)",
    )
    parser.add_argument("--batch", type=_positive, default=128, metavar="N", help="images (default: 128)")
    parser.add_argument("--dtype", choices=KERNEL_DTYPES, default="float16", help="default: float16")
    parser.add_argument(
        "--processor",
        choices=sorted(PROCESSORS),
        help="whose ceilings give limits and predictions (default: the GPU at hand, measured; h200 without one)",
    )
    parser.add_argument(
        "--no-tune", action="store_true", help="take the planner's tile instead of the fastest of a search"
    )
    parser.add_argument("--retune", action="store_true", help="search even if a tuned tile is in the cache")
    parser.add_argument("--json", metavar="PATH", help="write meta data and rows as JSON")
    parser.add_argument("--plot", metavar="PATH", help="draw the results (the paper's figure 13): .png, .svg or .pdf")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run the command; 1 if a block's error is too large."""
    from fusion.bench import block_plot

    for path in filter(None, (args.json, args.plot)):
        report.check_writable(path)
    if args.plot:
        block_plot.check_suffix(args.plot)
    blocks: list[BlockConfig] = args.block or list(TABLE1)

    import torch

    if torch.cuda.is_available():
        from fusion.bench.measured import measure_blocks, print_blocks

        meta, rows = measure_blocks(blocks, args, PROTOCOL_GPU)
    else:
        # Before anything imports triton: it reads the variable once.
        os.environ["TRITON_INTERPRET"] = "1"
        from fusion.bench.interpreted import interpret_blocks as measure_blocks
        from fusion.bench.interpreted import print_blocks

        meta, rows = measure_blocks(blocks, args, PROTOCOL_INTERPRETER)
    # The table comes last: a reader that closes the pipe early must not cost the files.
    if args.json:
        report.write_json(args.json, meta, rows)
    if args.plot:
        block_plot.plot_blocks(rows, meta, args.plot)
    print_blocks(meta, rows)
    from fusion.reference import ERROR_FACTOR

    wrong = [row for row in rows if not row["error"] <= ERROR_FACTOR * row["eager_error"]]
    for row in wrong:
        print(
            f"WRONG: {row['channels']},{row['alpha']},{row['hw']} has error {row['error']:.1e}, more than "
            f"{ERROR_FACTOR} x eager PyTorch's {row['eager_error']:.1e}"
        )
    return 1 if wrong else 0


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return value

"""Commands that fuse blocks of a type into one kernel each, next to eager PyTorch and Inductor.

On a GPU the blocks are timed. Without one they run at a small size on the CPU: that checks what can be checked there
and prints the plan and its prediction, and times nothing.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

from fusion.bench import report
from fusion.bench.blocks import BlockConfig, parse_block
from fusion.planner.processor import PROCESSORS
from fusion.planner.tile import KERNEL_DTYPES

PROTOCOL_GPU = (
    "stage of eight blocks with distinct weights and random batch norm statistics in a CUDA graph, channels_last, "
    "median of 20 replays after warm-up, microseconds per block; Inductor: torch.compile default mode with freezing, "
    "cudnn.benchmark on, same graph; error: relative L2 error of the first block's output against float64"
)
PROTOCOL_CPU = (
    "not timed: {checked} on a CPU, one small image (size in column 'checked'); predicted and limit microseconds are "
    "the planner's, for the processor and batch given; error: relative L2 error against float64"
)


@dataclass(frozen=True)
class BlockCommand:
    """A command for blocks of one type.

    `block` is the type's name and the command's, `title` the type for people, `blocks` are those of a run without
    `--block`, and `blocks_help` says which they are. `checked_on_cpu` says what runs without a GPU, `figure` is the
    number of the paper's figure that `--plot` draws. With `has_micro_batches` the stage can be timed in micro-batches.
    """

    block: str
    title: str
    help: str
    description: str
    examples: str
    blocks: Sequence[BlockConfig]
    blocks_help: str
    checked_on_cpu: str
    figure: int = 13
    has_micro_batches: bool = False

    def register(self, subparsers) -> None:
        """Add the command's parser."""
        parser = subparsers.add_parser(
            self.block,
            help=self.help,
            description=self.description,
            epilog=self.examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.add_argument(
            "--block",
            action="append",
            type=partial(parse_block, types=(self.block,)),
            metavar="C,ALPHA,HW",
            help=f"channels, expansion ratio and height = width of a block; repeatable (default: {self.blocks_help})",
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
        parser.add_argument(
            "--portable", action="store_true", help="take the portable kernel, with the planner's tile, on any GPU"
        )
        parser.add_argument("--retune", action="store_true", help="search even if a tuned tile is in the cache")
        parser.add_argument("--json", metavar="PATH", help="write meta data and rows as JSON")
        parser.add_argument(
            "--plot",
            metavar="PATH",
            help=f"draw the results (the paper's figure {self.figure}): .png, .svg or .pdf",
        )
        if self.has_micro_batches:
            parser.add_argument(
                "--micro-batch",
                type=_micro_batch,
                metavar="N|auto",
                help="time the fused stage also with N images at a time through all eight blocks, or with as many as "
                "the planner chooses",
            )
        parser.set_defaults(func=partial(run, self), micro_batch=None)


def run(command: BlockCommand, args: argparse.Namespace) -> int:
    """Run the command; 1 if a block's error is too large."""
    from fusion.plots.block_plot import plot_blocks

    report.check_outputs(args.json, args.plot)
    blocks: list[BlockConfig] = args.block or list(command.blocks)

    import torch

    if torch.cuda.is_available():
        from fusion.bench.measured import measure_blocks, print_blocks

        meta, rows = measure_blocks(blocks, args, PROTOCOL_GPU)
    else:
        from fusion.interpreter import interpret_kernels

        # Before anything imports Triton.
        interpret_kernels()
        from fusion.bench.unmeasured import check_blocks, print_blocks

        meta, rows = check_blocks(blocks, args, PROTOCOL_CPU.format(checked=command.checked_on_cpu))
    # The table comes last: a reader that closes the pipe early must not cost the files.
    if args.json:
        report.write_json(args.json, meta, rows)
    if args.plot:
        plot_blocks(rows, meta, args.plot)
    print_blocks(meta, rows, command)
    from fusion.reference import ERROR_FACTOR

    wrong = False
    for row, what in product(rows, ("error", "stage_error")):
        error, eager = row[what], row[f"eager_{what}"]
        if error is not None and not error <= ERROR_FACTOR * eager:
            wrong = True
            name = f"{row['channels']},{row['alpha']},{row['hw']}"
            print(
                f"WRONG: {name} has {what.replace('_', ' ')} {error:.1e}, more than {ERROR_FACTOR} x eager PyTorch's "
                f"{eager:.1e}"
            )
    return 1 if wrong else 0


def _micro_batch(text: str) -> int | str:
    return text if text == "auto" else _positive(text)


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return value

"""`python -m fusion.bench network`: whole networks fused, next to eager PyTorch, Inductor and timm's networks.

On a GPU they are timed. Without one a small ConvFirstNet runs on the CPU: that checks what can be checked there and
times nothing.
"""

import argparse
from collections.abc import Callable
from functools import partial

from fusion.bench import report
from fusion.bench.network_case import (
    CONVFIRSTNETS,
    RIVALS,
    SHORT_NAMES,
    has_timm,
    network_cases,
    parse_model,
    timm_version,
)
from fusion.bench.paper_networks import PAPER_SIZE
from fusion.planner.tile import KERNEL_DTYPES

DESCRIPTION = """\
Run ConvFirstNet Pico, Nano, Tiny and Small with every block fused, check the logits against float64, and compare the
latency with eager PyTorch, Inductor, the network's own limit, what the paper projects, and ConvNeXt, EfficientNet and
EfficientNetV2 of timm with Inductor.

On a GPU: milliseconds a batch in a CUDA graph, channels_last. The limit is the sum over stem, blocks, head and
classifier of max(OPs / peak, DRAM bytes / bandwidth), with both ceilings measured in the same run. Networks are
compiled side by side, one process each, and timed one by one. Weights are untrained, with batch norm calibrated on
synthetic images. Without a GPU: one small network on the CPU, nothing timed.
"""

EXAMPLES = """\
examples:
  python -m fusion.bench network --json network.json --plot network.png
  python -m fusion.bench network pico small --by-block
  python -m fusion.bench network small convnext_small          one network of timm only
  python -m fusion.bench network --batch 1,8 --size 256,512    latency at small batches
"""

PROTOCOL_GPU = (
    "whole network in a CUDA graph, channels_last, weights in the dtype of the row, median of 30 queued replays after "
    "warm-up, milliseconds a batch; Inductor: torch.compile default mode with freezing, cudnn.benchmark on, same "
    "graph; untrained weights, batch norm and logits calibrated on synthetic images; error: relative L2 error of the "
    "logits of 8 images against float64; agreement: percentage of images whose first class is eager's, "
    "eager_agreement: that of eager with float32; limit: one kernel each for stem, blocks, head with its pool and "
    "classifier; pct_peak counts the OPs of convolutions and linear layers; projected: the paper's projected "
    "efficiency at this GPU's measured peak; memory: the most that PyTorch's allocator holds in a run of one engine "
    "alone, in MB: weights (Inductor's: the module's and its frozen copies), input, activations and workspaces, "
    "without CUDA's own; blocks: runs of equal parts on random inputs, in a CUDA graph, microseconds for one of them"
)
PROTOCOL_CPU = (
    "not timed: fused operators as their references on a CPU, small images (size in 'checked'); limit milliseconds are "
    "the planner's, for the processor, batch and size given; projected: the paper's projected efficiency at that "
    "processor's peak; error: relative L2 error of the logits against float64"
)


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "network",
        help="fuse, check and time whole ConvFirstNets (the paper's table 4 and appendix A)",
        description=DESCRIPTION,
        epilog=f"networks of timm, and their image sizes:\n  {_rival_names()}\n\n{EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "names",
        nargs="*",
        type=_model,
        metavar="NAME",
        help=f"{', '.join(SHORT_NAMES)} or a network of timm, see below (default: all ConvFirstNets; one without a "
        "GPU)",
    )
    parser.add_argument(
        "--rivals",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="measure all networks of timm too (default: if timm is installed, and neither names nor sizes are given)",
    )
    parser.add_argument(
        "--batch", type=_sizes, default=None, metavar="N[,N...]", help="images of a batch (default: 128)"
    )
    parser.add_argument(
        "--size",
        type=partial(_sizes, least=17),
        default=None,
        metavar="HW[,HW...]",
        help="height = width of ConvFirstNet's images (default: 256)",
    )
    parser.add_argument("--dtype", choices=KERNEL_DTYPES, default="float16", help="default: float16")
    parser.add_argument("--by-block", action="store_true", help="time parts of fused networks too, on a GPU")
    parser.add_argument(
        "--no-tune", action="store_true", help="take the planner's tiles instead of the fastest of a search"
    )
    parser.add_argument("--workers", type=_positive, metavar="N", help="networks compiled at once (default: all)")
    parser.add_argument(
        "--timeout",
        type=_positive,
        default=400,
        metavar="S",
        help="seconds after which a network that compiles, or is timed, is given up (default: 400)",
    )
    parser.add_argument("--json", metavar="PATH", help="write meta data and rows as JSON, after every row")
    parser.add_argument(
        "--plot", metavar="PATH", help="draw accuracy over latency (the paper's figures 1 and 17): .png, .svg or .pdf"
    )
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run the command; 1 if a network fails or its error is too large.

    Raises ValueError for a network of timm without timm, and what writing files raises.
    """
    from fusion.bench.gap import network_gaps
    from fusion.plots.gap_plot import drawn_gaps, plot_gap

    report.check_outputs(args.json, args.plot)

    import torch

    timed = torch.cuda.is_available()
    cases = network_cases(choose_models(args, timed), args.batch or [128], args.size or [PAPER_SIZE], args.dtype)
    if args.plot and not any(case.is_rival or case.size == PAPER_SIZE for case in cases):
        raise ValueError(f"accuracies are known at {PAPER_SIZE} only: add {PAPER_SIZE} to --size or leave out --plot")
    rows: list[dict] = []
    if timed:
        from fusion.bench.network_measured import measure_networks as run_networks
        from fusion.bench.network_measured import measured_processor

        processor, protocol = measured_processor(), PROTOCOL_GPU
    else:
        from fusion.bench.network_unmeasured import check_networks as run_networks
        from fusion.planner.processor import get_processor

        processor, protocol = get_processor("h200"), PROTOCOL_CPU
    extra = {"dtype": args.dtype, "timed": timed, "tuned": timed and not args.no_tune, "timm": timm_version()}
    meta = report.collect_meta(protocol, processor, **extra)
    run_networks(cases, args, processor, _keeper(rows, meta, args.json))

    # The tables come last: a reader that closes the pipe early must not cost the files.
    if args.plot and drawn_gaps(network_gaps(rows, meta)[0]):
        plot_gap(rows, meta, args.plot)
    elif args.plot:
        print(f"{args.plot} is not drawn: no network of known accuracy has a latency")
    from fusion.bench.network_table import print_networks

    print_networks(meta, rows)
    return _verdict(rows)


def choose_models(args: argparse.Namespace, timed: bool) -> list[str]:
    """The networks of a run. Raises ValueError for one of timm that cannot run, saying why."""
    names = args.names or list(CONVFIRSTNETS if timed else CONVFIRSTNETS[:1])
    asked = bool(args.rivals) or any(name in RIVALS for name in names)
    if asked and not timed:
        raise ValueError("networks of timm are timed and nothing else, which needs a GPU; leave them out without one")
    if asked and not has_timm():
        raise ValueError("timm is not installed: pip install timm, or leave its networks out")
    is_default = not (args.names or args.batch or args.size)
    if timed and args.rivals is None and is_default and not has_timm():
        print("timm is not installed: without it ConvFirstNet is compared with eager PyTorch and Inductor only")
    with_rivals = timed and (args.rivals if args.rivals is not None else is_default and has_timm())
    return list(dict.fromkeys([*names, *RIVALS] if with_rivals else names))


def _keeper(rows: list[dict], meta: dict, path: str | None) -> Callable[[dict], None]:
    def keep(row: dict) -> None:
        rows.append(row)
        if path:
            report.write_json(path, meta, rows)

    return keep


def _verdict(rows: list[dict]) -> int:
    wrong = report.print_wrong(rows, "error")
    for row in rows:
        for block, reason in (row["left_eager"] or {}).items():
            print(f"left eager: {block} of {row['model']} at {row['size']}, batch {row['batch']}: {reason}")
    return 1 if wrong else 0


def _rival_names() -> str:
    return "\n  ".join(f"{name:<22} {size}" for name, size in RIVALS.items())


def _model(text: str) -> str:
    try:
        return parse_model(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _sizes(text: str, least: int = 1) -> list[int]:
    values = [value.strip() for value in text.split(",")]
    if not all(value.isdecimal() and int(value) >= least for value in values):
        raise argparse.ArgumentTypeError(f"{text!r} must be one or more integers from {least} up, as in 256,512")
    return [int(value) for value in values]


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)

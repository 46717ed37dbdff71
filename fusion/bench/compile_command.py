"""`python -m fusion.bench compile`: what `torch.compile(model, backend="fusion")` makes of any network.

On a GPU compiled networks are timed. Without one they run on the CPU on small images: that checks what can be checked
there and times nothing but the compilation.
"""

import argparse
from collections.abc import Callable, Sequence

from fusion.bench import report
from fusion.bench.compile_settings import MODES, CompileSettings
from fusion.bench.model_case import UIR, ModelCase, image_size, known_model
from fusion.bench.network_case import SHORT_NAMES, timm_version
from fusion.planner.tile import KERNEL_DTYPES

BATCH = 128

DESCRIPTION = """\
Compile networks with torch.compile(model, backend="fusion") and compare with eager PyTorch, with Inductor alone
(torch.compile(model), the same mode, without freezing) and, for ConvFirstNets, with fusion.fuse: latency, blocks found,
fused and left, error of the logits against float64, and how long compiling takes.

On a GPU: milliseconds a batch in a CUDA graph, channels_last; in the modes reduce-overhead and max-autotune, whose code
runs as CUDA graphs of its own, milliseconds a call of calls that follow each other. Compiling is timed in fresh
processes, with empty caches (cold) and with the caches that are then there (warm), from the call of torch.compile to
the end of the first run; imports and building the network do not count. Weights are untrained, with batch norm
calibrated on synthetic images; nothing is downloaded. Without a GPU: small images on the CPU, fused blocks computed as
their references.
"""

EXAMPLES = f"""\
networks: {", ".join(SHORT_NAMES)} (ConvFirstNets); {UIR}, an EfficientNet of timm made of universal inverted residuals
that are ConvFirst blocks; any network of timm, by timm.list_models(). Arguments of the constructor may follow a name.

examples:
  python -m fusion.bench compile pico nano tiny small --json compile.json
  python -m fusion.bench compile efficientnet_b0:group_size=8 {UIR} --blocks
  python -m fusion.bench compile resnet50 --batch 32 --size 224 --mode max-autotune --no-cold
"""

PROTOCOL_GPU = (
    "torch.compile(model, backend='fusion') and torch.compile(model), the same mode, no freezing, under no_grad, "
    "channels_last, weights and input in the dtype of the row, cudnn.benchmark on; {timing}; untrained weights, batch "
    "norm and logits calibrated on synthetic images; error: relative L2 error of the logits of 8 images against "
    "float64; seconds: from the call of torch.compile to the end of the first run, in a fresh process, after imports, "
    "building the network, an eager run and a synchronisation: cold with empty caches of Inductor, Triton and fusion, "
    "warm with the caches that the cold run left; all processor cores; one process at a time"
)
TIMED_GRAPHS = "milliseconds a batch: median of 30 queued replays of a CUDA graph after warm-up"
TIMED_CALLS = (
    "milliseconds a call: mean of 30 calls that follow each other, between two CUDA events, after 5 that are not "
    "counted; the launch overhead of Python counts, for eager PyTorch too; fusion.fuse with cuda_graphs=True"
)
PROTOCOL_CPU = (
    "not timed: torch.compile(model, backend='fusion', options={'min_speedup': 0}) on a CPU, fused blocks as their "
    "references, small images; error: relative L2 error of the logits of 8 images against float64; fusion_here_s: "
    "seconds of compilation in this process on this CPU, with the caches as they were"
)


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "compile",
        help='compile any network with torch.compile(model, backend="fusion"), check and time it',
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="NAME or NAME:ARGUMENT=VALUE,... see below")
    parser.add_argument("--batch", type=_positive, metavar="N", help=f"images of a batch (default: {BATCH}; CPU: 2)")
    parser.add_argument(
        "--size",
        type=_size,
        metavar="HW",
        help="height = width of the images (default: 256 for ConvFirstNets, for others what timm tests them at; CPU: "
        "64 where the network takes that)",
    )
    parser.add_argument("--dtype", choices=KERNEL_DTYPES, default="float16", help="default: float16")
    parser.add_argument(
        "--mode", choices=MODES, default="default", help="the mode of both compilers (default: default)"
    )
    parser.add_argument(
        "--min-speedup",
        type=_factor,
        metavar="X",
        help="fuse blocks that are measured to be so many times as fast as otherwise; 0: all that have a kernel "
        "(default: 1; CPU: 0)",
    )
    parser.add_argument("--tune", action="store_true", help="choose the tiles of fused kernels by measurement")
    parser.add_argument("--blocks", action="store_true", help="print the report on the blocks of every network")
    parser.add_argument(
        "--no-cold",
        action="store_true",
        help="use the caches that are there, and do not time compilation; a compilation less",
    )
    parser.add_argument(
        "--timeout",
        type=_positive,
        default=600,
        metavar="S",
        help="seconds after which compiling, or timing, a network is given up, on a GPU (default: 600)",
    )
    parser.add_argument("--json", metavar="PATH", help="write meta data and rows as JSON, after every row")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run the command; 1 if a network fails or its error is too large.

    Raises ValueError for a network that there is not, or of another image size, and what writing files raises.
    """
    if args.json:
        report.check_writable(args.json)

    import torch

    timed = torch.cuda.is_available()
    if not timed and args.min_speedup:
        raise ValueError("--min-speedup needs a GPU: without one nothing is measured, and every block is fused")
    if not timed and args.tune:
        raise ValueError("--tune needs a GPU: tiles are chosen by measurement")
    cases = model_cases(args, timed)
    rows: list[dict] = []
    tables: dict[str, str] = {}
    settings = CompileSettings(args.mode, _min_speedup(args, timed), args.tune)
    protocol = PROTOCOL_GPU.format(timing=TIMED_CALLS if settings.has_graphs else TIMED_GRAPHS)
    meta = report.collect_meta(
        protocol if timed else PROTOCOL_CPU,
        dtype=args.dtype,
        mode=args.mode,
        min_speedup=settings.min_speedup,
        tuned=args.tune,
        cold=timed and not args.no_cold,
        called=settings.has_graphs,
        timed=timed,
        timm=timm_version(),
    )
    keep = _keeper(rows, tables, meta, args.json)
    if timed:
        from fusion.bench.compile_measured import measure_models

        torch.cuda.empty_cache()
        measure_models(cases, settings, not args.no_cold, args.timeout, keep)
    else:
        from fusion.bench.compile_unmeasured import check_models

        check_models(cases, settings, keep)

    # The tables come last: a reader that closes the pipe early must not cost the files.
    from fusion.bench.compile_table import print_compiled

    if args.blocks:
        for name, table in tables.items():
            print(f"{name}\n{table}\n")
    print_compiled(meta, rows)
    return _verdict(rows)


def model_cases(args: argparse.Namespace, timed: bool) -> list[ModelCase]:
    """The networks of a run. Raises ValueError for one that there is not, or that takes images of another size."""
    if timed:
        batch, preferred = args.batch or BATCH, None
    else:
        from fusion.bench.compile_unmeasured import CHECKED_BATCH, CHECKED_PIXELS

        batch, preferred = args.batch or CHECKED_BATCH, CHECKED_PIXELS
    models = list(dict.fromkeys(map(known_model, args.models)))
    return [ModelCase(model, batch, image_size(model, args.size, preferred), args.dtype) for model in models]


def _min_speedup(args: argparse.Namespace, timed: bool) -> float:
    if args.min_speedup is not None:
        return args.min_speedup
    return 1.0 if timed else 0.0


def _keeper(rows: list[dict], tables: dict[str, str], meta: dict, path: str | None) -> Callable[[dict, str], None]:
    def keep(row: dict, table: str) -> None:
        rows.append(row)
        tables[row["model"]] = table or "no report"
        if path:
            report.write_json(path, meta, rows)

    return keep


def _verdict(rows: Sequence[dict]) -> int:
    wrong = report.print_wrong(rows, "fusion_error")
    for row in rows:
        for warning in row["warnings"] or ():
            print(f"warning: {row['model']} at {row['size']}, batch {row['batch']}: {warning}")
    return 1 if wrong else 0


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def _size(text: str) -> int:
    if not text.isdecimal() or int(text) < 17:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer from 17 up")
    return int(text)


def _factor(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 up")
    return value

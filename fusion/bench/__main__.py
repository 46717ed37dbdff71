"""`python -m fusion.bench`: one subcommand per module, imported for its arguments only.

A subcommand has `register(subparsers)`, which adds its parser and sets `func`, the function that runs it and returns
the exit code. It imports torch in that function, so that help and analysis are quick.
"""

import argparse
import os
import sys

from fusion.bench import (
    bars_command,
    compile_command,
    convfirst,
    diagram_command,
    ffn,
    gap_command,
    intensity_command,
    mbconv,
    network,
    predicted_command,
    sweep_command,
    waterline,
)

SUBCOMMANDS = (
    convfirst.COMMAND,
    mbconv.COMMAND,
    ffn.COMMAND,
    network,
    compile_command,
    waterline,
    sweep_command,
    intensity_command,
    gap_command,
    bars_command,
    predicted_command,
    diagram_command,
)

DESCRIPTION = """\
Measure and analyse convolutional networks and their blocks: layer by layer, and fused into one kernel.

Latencies are in microseconds, throughput in TFLOP/s (a multiply-accumulate is two FLOPs), traffic in bytes.
"""

EXAMPLES = """\
examples:
  python -m fusion.bench convfirst                      the paper's ConvFirst blocks: eager, Inductor, fused
  python -m fusion.bench mbconv                         its MBConv blocks with squeeze-and-excitation, the same way
  python -m fusion.bench ffn                            FFN blocks alone, the same way
  python -m fusion.bench network                        whole networks, next to timm's: speed, limit, accuracy
  python -m fusion.bench compile resnet50               any network, as torch.compile with this backend makes it
  python -m fusion.bench waterline small                how fast a network can be, and where its time goes
  python -m fusion.bench sweep small                    the same on processors of any op:byte ratio
  python -m fusion.bench intensity                      operational intensity of convolutions over their channels
  python -m fusion.bench gap RESULTS                    accuracy, ideal and actual latency of measured networks
  python -m fusion.bench predicted RESULTS              what the planner predicts against what was measured
  python -m fusion.bench diagram 64,6,64                a block's program as a tensor-machine diagram
  python -m fusion.bench bars RESULTS                   measured blocks, next to their limits
  python -m fusion.bench COMMAND --help                 what a command does, and its options
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="python -m fusion.bench",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for subcommand in SUBCOMMANDS:
        subcommand.register(subparsers)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command line (default: the process's) and return its exit code: 2 for an error of the user's."""
    args = build_parser().parse_args(argv)
    try:
        code = args.func(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader, `head` for example, has what it wants; Python would complain when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        print("fusion.bench: error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fusion.bench: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

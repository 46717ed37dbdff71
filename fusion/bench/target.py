"""What the analysing commands look at: a block, or a network that is built without weights."""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fusion.analysis.network_waterline import NetworkWaterline
from fusion.bench.blocks import BLOCK_TYPES, BlockConfig, parse_block
from fusion.planner.processor import PROCESSORS, Processor
from fusion.planner.waterline import Waterline

TYPES = tuple(BLOCK_TYPES)
TARGETS_HELP = (
    "a network, NAME[:KEY=VALUE,...][@SIZE]: one of this project (pico, nano, tiny, small) or, where timm is "
    f"installed, of timm's, on images of SIZE x SIZE pixels; or a block, [TYPE:]C,ALPHA,HW with TYPE "
    f"{' or '.join(TYPES)} (default: {TYPES[0]}); followed by /layerwise or /fused for only that program of it"
)


PROGRAMS = ("layerwise", "fused")


@dataclass(frozen=True)
class Target:
    """A block, or the name of a network with its arguments and maybe the height = width of its images in pixels.

    `program` is the only one of `PROGRAMS` that is asked for, if it is only one.
    """

    block: BlockConfig | None = None
    model: str = ""
    size: int | None = None
    program: str | None = None


@dataclass(frozen=True)
class Analysed:
    """The waterline of a target, and those of its programs that are asked for, by name."""

    network: NetworkWaterline
    programs: dict[str, Waterline]


def parse_target(text: str) -> Target:
    """Read a target as `TARGETS_HELP` describes it. Raises argparse.ArgumentTypeError."""
    name, slash, program = text.partition("/")
    if slash and program not in PROGRAMS:
        raise argparse.ArgumentTypeError(f"{text!r}: no program is named {program!r}, use {' or '.join(PROGRAMS)}")
    if re.fullmatch(r"(\w+:)?[\s\d,]+", name):
        return Target(parse_block(name, TYPES), program=program or None)
    model, at, size = name.partition("@")
    if at and not (size.isdecimal() and int(size)):
        raise argparse.ArgumentTypeError(f"{text!r}: write the images' size as a number of pixels, as in resnet101@224")
    return Target(model=model, size=int(size) if at else None, program=program or None)


def add_arguments(parser: argparse.ArgumentParser, processor: str) -> None:
    """The options that all analysing commands have."""
    parser.add_argument(
        "--processor", choices=PROCESSORS, default=processor, help=f"whose ceilings to use (default: {processor})"
    )
    parser.add_argument(
        "--peak", type=_positive, metavar="TFLOPS", help="another peak of 16-bit arithmetic, in TFLOP/s"
    )
    parser.add_argument("--bandwidth", type=_positive, metavar="GBS", help="another DRAM bandwidth, in GB/s")
    parser.add_argument("--batch", type=int, default=128, metavar="N", help="images (default: 128)")
    parser.add_argument("--json", metavar="PATH", help="write meta data and rows as JSON")
    parser.add_argument("--plot", metavar="PATH", help="draw a picture: .png, .svg or .pdf")


def chosen_processor(args: argparse.Namespace) -> Processor:
    """The processor of the options, with other ceilings if they say so."""
    processor = PROCESSORS[args.processor]
    if args.peak is None and args.bandwidth is None:
        return processor
    peak = processor.peak_ops if args.peak is None else args.peak * 1e12
    bandwidth = processor.bandwidth if args.bandwidth is None else args.bandwidth * 1e9
    return processor.with_ceilings(peak, bandwidth, "as given")


def analyse(targets: Sequence[Target], batch: int, processor: Processor) -> list[Analysed]:
    """The waterlines of targets, in fp16.

    Raises ValueError for a batch that is not positive, and for a network that is unknown or needs timm where there is
    none.
    """
    if batch < 1:
        raise ValueError(f"the batch must be a positive number of images, got {batch}")
    if any(target.model for target in targets):
        from fusion.bench.model_case import known_model

        # All of them before the first is traced, which takes a while.
        targets = [replace(target, model=known_model(target.model)) if target.model else target for target in targets]
    networks: dict[Target, NetworkWaterline] = {}
    analysed = []
    for target in targets:
        whole = replace(target, program=None)
        if whole not in networks:
            networks[whole] = _analyse(target, batch, processor)
        analysed.append(Analysed(networks[whole], _programs(target, networks[whole])))
    return analysed


def _programs(target: Target, network: NetworkWaterline) -> dict[str, Waterline]:
    if target.program is None:
        return network.programs
    if target.program not in network.programs:
        raise ValueError(
            f"no block of {network.name} is fused on {network.processor.title}: ask for its layerwise program"
        )
    return {target.program: network.programs[target.program]}


def _analyse(target: Target, batch: int, processor: Processor) -> NetworkWaterline:
    if target.block is not None:
        from fusion.analysis.block_waterline import block_waterline

        return block_waterline(target.block.graph(batch), processor, str(target.block))
    import torch

    from fusion.analysis.model_waterline import waterline
    from fusion.bench.model_build import bare_model
    from fusion.bench.model_case import image_size

    size = image_size(target.model, target.size)
    with torch.device("meta"):
        network = bare_model(target.model).eval()
    channels = getattr(network, "in_chans", 3)
    images = torch.empty(batch, channels, size, size, device="meta")
    return waterline(network, images, processor, name=f"{target.model}, {size}×{size}")


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
    return value

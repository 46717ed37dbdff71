"""Tile of the head kernel: how it divides images and output channels over programs, what is valid, how long it takes.

A program has `channels` of the output channels and `images` images. It keeps the weights of its channels in local
memory and walks over its images' pixels, `pixels` at a time; what it sums is one number for each image and channel.
`why_invalid` is the one judge of validity, for the planner's choice and for the tuner's candidates.
"""

from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from itertools import product
from math import ceil

from fusion.planner.graph import ELEMENT_SIZE
from fusion.planner.match import HeadShape
from fusion.planner.processor import Processor
from fusion.planner.slabs import NARROWEST, slab_widths
from fusion.planner.tile import (
    CHANNEL_MULTIPLE,
    KERNEL_DTYPES,
    MAX_IMAGE_ELEMENTS,
    MAX_REGISTERS,
    MAX_WARPS_PER_PROCESSOR,
    TENSOR_CORES,
    WARP_SIZE,
)

WIDEST_SLAB = 256
"""Input channels of a product."""
PIXELS = (64, 32, 128, 16)
CHANNELS = (128, 64, 256, 32)
MIN_STAGES = 2
"""As for the loops of the ConvFirst kernel (`fusion.planner.tile`)."""
MAX_STAGES = 4
MAX_WARPS = 8

# Not fitted to measurements yet.
LAUNCH_US = 3.5
STEP_US = 0.25
"""Of a step: the wait for a product, and a barrier."""
PRODUCT_SHARE = 0.8
"""Part of the peak that products of `WIDE` or more pixels reach."""
WIDE = 64
ACTIVATION_RATES = {"silu": 16, "gelu": 4}
"""How many a processor computes in a cycle, of those that take time: one special function, or about 30 instructions."""
CLOCK = 1.7e9
"""Cycles a second."""


@dataclass(frozen=True)
class HeadTile:
    """One way to run the head kernel.

    A program computes `channels` of the output channels of `images` images, `pixels` pixels of an image in a step, with
    `warps` warps; the loop over steps is pipelined in `stages` stages.
    """

    pixels: int
    channels: int
    images: int
    warps: int
    stages: int = 3

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"HeadTile: {field.name} must be a positive integer, got {value!r}")

    def in_slabs(self, in_channels: int) -> tuple[int, ...]:
        """Slabs of input channels that the product contracts."""
        return slab_widths(in_channels, WIDEST_SLAB)

    def padded_out(self, out_channels: int) -> int:
        """Output channels that the kernel computes."""
        return ceil(out_channels / self.channels) * self.channels

    def tiles(self, pixels: int) -> int:
        """Steps over an image of `pixels` pixels."""
        return ceil(pixels / self.pixels)

    def programs(self, batch: int, out_channels: int) -> int:
        """Number of programs."""
        return -(-batch // self.images) * ceil(out_channels / self.channels)

    def to_ints(self) -> list[int]:
        """The fields in order, for operators and files that take integers only; `HeadTile(*ints)` undoes it."""
        return list(astuple(self))


def why_unsupported(shape: HeadShape) -> str | None:
    """Why no tile runs this block, and what to do instead; None if some tile may."""
    if shape.dtype not in KERNEL_DTYPES:
        return f"dtype {shape.dtype} is not supported, use one of {', '.join(KERNEL_DTYPES)}"
    for name in ("in_channels", "out_channels"):
        if getattr(shape, name) % CHANNEL_MULTIPLE:
            return f"{name}={getattr(shape, name)} is not supported, use a multiple of {CHANNEL_MULTIPLE}"
    if shape.height * shape.width * shape.in_channels > MAX_IMAGE_ELEMENTS:
        return f"images of {shape.height}x{shape.width} pixels are too large, split them: 2**31 elements are the limit"
    return None


def why_malformed(tile: HeadTile) -> str | None:
    """Why the kernel gives right results for no block with this tile; None if it may."""
    for name in ("pixels", "channels", "warps"):
        if getattr(tile, name) & (getattr(tile, name) - 1):
            return f"{name}={getattr(tile, name)} is not a power of two"
    if min(tile.pixels, tile.channels) < NARROWEST:
        return f"a matrix product needs at least {NARROWEST} pixels and {NARROWEST} channels"
    if not MIN_STAGES <= tile.stages <= MAX_STAGES:
        return f"the loop must be pipelined, in {MIN_STAGES} to {MAX_STAGES} stages"
    if tile.warps > MAX_WARPS:
        return f"{tile.warps} warps are more than are of use, {MAX_WARPS}"
    return None


def why_invalid(tile: HeadTile, shape: HeadShape, processor: Processor) -> str | None:
    """Why the kernel cannot, or should not, run `shape` with this tile on `processor`; None if it is valid."""
    general = why_unsupported(shape) or why_malformed(tile)
    if general:
        return general
    if tile.channels < NARROWEST * tile.warps:
        return f"{tile.warps} warps are too many for {tile.channels} channels"
    local = local_memory_bytes(tile, shape, processor)
    if local > processor.local_memory_bytes:
        return f"{local} bytes of local memory are more than {processor.name} has, {processor.local_memory_bytes}"
    registers = estimated_registers(tile, shape)
    if registers > MAX_REGISTERS:
        return f"about {registers:.0f} registers a thread would spill, {MAX_REGISTERS} are available"
    return None


def why_none(shape: HeadShape, processor: Processor) -> str | None:
    """Why no tile runs `shape` on `processor`; None if some tile does."""
    if next(candidate_tiles(shape, processor), None) is not None:
        return None
    return why_unsupported(shape) or "its input channels need more shared memory than a processor has"


def local_memory_bytes(tile: HeadTile, shape: HeadShape, processor: Processor) -> int:
    """Shared memory of a program, in bytes: the weights of its channels, and the pixels of all stages."""
    in_channels = sum(tile.in_slabs(shape.in_channels))
    return ELEMENT_SIZE[shape.dtype] * in_channels * (tile.channels + tile.stages * tile.pixels)


def estimated_registers(tile: HeadTile, shape: HeadShape) -> float:
    """32-bit registers a thread: fp32 sums of a step, some of them activated, and addresses."""
    return 1.8 * tile.channels * tile.pixels / (tile.warps * WARP_SIZE) + 25


def programs_per_processor(tile: HeadTile, shape: HeadShape, processor: Processor) -> int:
    """Programs that a streaming multiprocessor holds at a time (occupancy), as its memories and warp slots allow."""
    registers = min(estimated_registers(tile, shape), MAX_REGISTERS) * tile.warps * WARP_SIZE
    return max(
        1,
        min(
            int(processor.registers_per_processor // registers),
            processor.local_memory_bytes // local_memory_bytes(tile, shape, processor),
            MAX_WARPS_PER_PROCESSOR // tile.warps,
        ),
    )


def predicted_us(tile: HeadTile, shape: HeadShape, processor: Processor) -> float:
    """Predicted duration of a launch in microseconds.

    A fixed cost, and rounds of programs, as many at a time as processors hold. A round takes its steps' latency, or
    longer where products, activations, or weights and pixels out of global memory take longer on all its processors.
    """
    programs = tile.programs(shape.batch, shape.out_channels)
    occupancy = min(programs_per_processor(tile, shape, processor), ceil(programs / processor.processors))
    rounds = ceil(programs / (processor.processors * occupancy))
    steps = min(tile.images, shape.batch) * tile.tiles(shape.height * shape.width)
    in_channels = sum(tile.in_slabs(shape.in_channels))
    computed = steps * tile.pixels * tile.channels
    tensor_cores = min(1.0, occupancy * tile.warps / TENSOR_CORES)
    share = PRODUCT_SHARE * min(1.0, tile.pixels / WIDE) ** 0.5
    ops_rate = share * tensor_cores * processor.peak_ops / processor.processors
    product_us = occupancy * 2 * computed * in_channels / ops_rate * 1e6
    rate = ACTIVATION_RATES.get(shape.activation)
    activation_us = occupancy * computed / (rate * CLOCK) * 1e6 if rate else 0.0
    running = min(programs, processor.processors * occupancy)
    elements = in_channels * (tile.channels + steps * tile.pixels)
    global_us = running * ELEMENT_SIZE[shape.dtype] * elements / processor.global_bandwidth * 1e6
    latency_us = steps * (STEP_US + (product_us + activation_us) / (occupancy * steps))
    return LAUNCH_US + rounds * max(latency_us, product_us, activation_us, global_us)


def candidate_tiles(shape: HeadShape, processor: Processor) -> Iterator[HeadTile]:
    """Every valid tile worth a measurement: images are divided so that programs fill the processors once or more."""
    for pixels, channels, warps, stages in product(PIXELS, CHANNELS, (4, 8, 2), (3, 4, 2)):
        for images in _image_counts(channels, shape, processor):
            tile = HeadTile(pixels, channels, images, warps, stages)
            if why_invalid(tile, shape, processor) is None:
                yield tile


def _image_counts(channels: int, shape: HeadShape, processor: Processor) -> list[int]:
    """Images of a program with which one to four programs a processor, but no more, have all images."""
    blocks = ceil(shape.out_channels / channels)
    counts = []
    for programs in range(1, 5):
        divisions = max(1, programs * processor.processors // blocks)
        counts.append(ceil(shape.batch / divisions))
    return sorted(set(counts), reverse=True)

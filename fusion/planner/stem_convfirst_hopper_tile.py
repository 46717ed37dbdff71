"""Tile of the Hopper kernel that runs a network's stem together with the ConvFirst block after it: what is valid.

The block's part is that of `fusion.planner.hopper_tile`, with rows of 128 pixels: virtual rows of the stem's output.
The stem computes them, a row of 128 pixels at a time, from images whose elements lie in memory as they are.
"""

from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from itertools import product
from math import ceil

from fusion.planner import hopper_tile, hopper_time
from fusion.planner.graph import ELEMENT_SIZE
from fusion.planner.hopper_tile import (
    BARRIER_BYTES,
    BLOCK_PIXELS,
    COMPUTE_CAPABILITY,
    HIDDEN,
    MAX_JOBS,
    MAX_ROWS,
    PATTERN_ROWS,
    PIECE,
    RESERVED_BYTES,
    WARPS,
    HopperTile,
    aligned_bytes,
    available_registers,
)
from fusion.planner.hopper_tile import why_malformed as why_malformed_rows
from fusion.planner.match import ConvFirstShape, StemConvFirstShape
from fusion.planner.processor import Processor, kilobytes, why_other_capability
from fusion.planner.slabs import WIDEST
from fusion.planner.stem_tile import KERNEL_SIZE, Window, window
from fusion.planner.tile import WARP_SIZE

IN_CHANNELS = 3
"""Of the images: their windows leave one element free, for the bias."""
WIDTH = 128
"""Pixels of a row of the stem's output that are computed together."""
GROUP = 2
"""Neighbouring pixels that share a window."""
WIDTH_MULTIPLE = 2 * GROUP
"""Of images: loads of 8 bytes are aligned then, and no group reaches past the right edge."""
JOB_INPUT_ROWS = 4
"""Rows of the stem's output that two rows of the block's need."""
RING_ROWS = JOB_INPUT_ROWS + 1
"""Row buffers: one is written while the others are needed."""
STEM_SLABS = (16, 32)
"""Of the ring: the stem's channels, and zeros."""
PROGRAMS = (5, 4, 3, 2, 1)
"""On a processor; of equal predictions the planner takes the first."""
ROW_US = 0.1
"""Of a row of the stem: what nothing hides. Not fitted to measurements yet."""


@dataclass(frozen=True)
class StemConvFirstHopperTile:
    """One way to run the kernel: the block's part computes `hidden` of the hidden channels in a step.

    The ring has pixels of `slab` channels, all that the stem has. `programs` run on a processor at once, each of one
    warpgroup; the weights stay in shared memory.
    """

    hidden: int
    programs: int
    slab: int

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"StemConvFirstHopperTile: {field.name} must be a positive integer, got {value!r}")

    @property
    def block(self) -> HopperTile:
        """How the block alone would be divided: its weights and its work are those of this tile."""
        return HopperTile(
            pixels=WIDTH,
            hidden=self.hidden,
            stages=min(hopper_tile.STAGES),
            partitions=1,
            programs=self.programs,
            slab=self.slab,
            weight_chunks=0,
        )

    @property
    def columns(self) -> int:
        """Columns of the stem's product: the channels of both pixels of a group, and padding."""
        return GROUP * self.slab

    def to_ints(self) -> list[int]:
        """The fields in order, for operators and files that take integers only; the class undoes it."""
        return list(astuple(self))


def stem_window() -> Window:
    """What a group needs of an input row; the first of its elements belongs to no pixel that it looks at."""
    return window(IN_CHANNELS, GROUP, planar=False)


def convfirst_shape(shape: StemConvFirstShape) -> ConvFirstShape:
    """The block alone, with the stem's output as its input."""
    return ConvFirstShape(
        shape.batch,
        shape.out_height,
        shape.out_width,
        shape.stem_channels,
        shape.hidden_channels,
        shape.out_channels,
        shape.group_width,
        shape.activation,
        shape.residual,
        shape.dtype,
        shape.kernel_size,
    )


def why_unsupported(shape: StemConvFirstShape) -> str | None:
    """Why no tile runs this stem and block together, and what to do instead; None if some tile may."""
    instead = "run the stem and the block one after the other"
    if shape.in_channels != IN_CHANNELS:
        return f"images of {shape.in_channels} channels are not supported, only of {IN_CHANNELS}; {instead}"
    if shape.stem_channels > max(STEM_SLABS):
        return f"a stem of {shape.stem_channels} channels is not supported, {max(STEM_SLABS)} at most; {instead}"
    return why_unsupported_size(shape.height, shape.width) or hopper_tile.why_unsupported(convfirst_shape(shape))


def why_unsupported_size(height: int, width: int) -> str | None:
    """Why no tile runs images of this size, in pixels; None if some tile may."""
    if height % 2 or width % WIDTH_MULTIPLE or width > 2 * WIDTH:
        return (
            f"images of {height}x{width} pixels are not supported, only of an even height and a width that is a "
            f"multiple of {WIDTH_MULTIPLE} up to {2 * WIDTH}; run the stem and the block one after the other"
        )
    return None


def why_malformed(tile: StemConvFirstHopperTile, stem_channels: int, hidden_channels: int) -> str | None:
    """Why the kernel runs no stem and block of so many channels with this tile; None if it may."""
    if tile.slab not in STEM_SLABS:
        return f"slab={tile.slab} is not one of {', '.join(map(str, STEM_SLABS))}"
    if tile.slab < stem_channels:
        return f"slab={tile.slab} is less than the {stem_channels} channels of the stem, use one that holds them all"
    return why_malformed_rows(tile.block, hidden_channels)


def why_invalid(tile: StemConvFirstHopperTile, shape: StemConvFirstShape, processor: Processor) -> str | None:
    """Why the kernel cannot, or should not, run `shape` with this tile on `processor`; None if it is valid."""
    general = (
        why_other_capability(processor, COMPUTE_CAPABILITY)
        or why_unsupported(shape)
        or why_malformed(tile, shape.stem_channels, shape.hidden_channels)
    )
    if general:
        return general
    work = tile.block.work(shape.batch, shape.out_height, WIDTH, processor.processors)
    if work.rows >= MAX_ROWS or work.jobs >= MAX_JOBS:
        return f"{shape.batch} images of {shape.height}x{shape.width} pixels are too many rows for a launch, split them"
    local = local_memory_bytes(tile, shape, processor)
    if local > processor.local_memory_bytes:
        return (
            f"weights and rows of {kilobytes(local)} do not fit the {kilobytes(processor.local_memory_bytes)} of local "
            f"memory that {processor.name} has"
        )
    registers, limit = estimated_registers(tile, shape), available_registers(tile.block)
    if registers > limit:
        fewer = "" if tile.programs == 1 else f" to each of {tile.programs} programs"
        return f"about {registers:.0f} registers a thread would spill, {limit} are available{fewer}"
    return None


def why_none(shape: StemConvFirstShape, processor: Processor) -> str | None:
    """Why no tile runs `shape` on `processor`; None if some tile may."""
    slab = next((slab for slab in STEM_SLABS if slab >= shape.stem_channels), max(STEM_SLABS))
    return why_invalid(StemConvFirstHopperTile(min(HIDDEN), 1, slab), shape, processor)


def local_memory_bytes(tile: StemConvFirstHopperTile, shape: StemConvFirstShape, processor: Processor) -> int:
    """Shared memory of a program, in bytes: weights, and the ring, with zeros before every row and after the last."""
    element, rows = ELEMENT_SIZE[shape.dtype], tile.block
    sizes = shape.stem_channels, shape.hidden_channels, shape.out_channels
    conv, chunks, bias, _ = hopper_tile.weight_sizes(rows, *sizes)
    stem = KERNEL_SIZE * stem_window().columns * tile.columns
    ring = (8 + RING_ROWS * (8 + WIDTH)) * tile.slab
    buffers = [(conv, PIECE), (chunks, WIDEST), (stem, min(WIDEST, tile.columns)), (ring, tile.slab)]
    matrices = aligned_bytes([(element * size, PATTERN_ROWS * element * columns) for size, columns in buffers])
    return matrices + element * (bias + sum(rows.out_slabs(shape.out_channels))) + BARRIER_BYTES


def estimated_registers(tile: StemConvFirstHopperTile, shape: StemConvFirstShape) -> float:
    """32-bit registers a thread: what the block needs, the windows of a row of the stem, and half of its sums."""
    rows = tile.columns * BLOCK_PIXELS / (WARPS * WARP_SIZE) / 2
    windows = KERNEL_SIZE * stem_window().columns * BLOCK_PIXELS / (WARPS * WARP_SIZE) / 2
    return hopper_tile.estimated_registers(tile.block, convfirst_shape(shape)) + windows + rows / 2


def programs_per_processor(tile: StemConvFirstHopperTile, shape: StemConvFirstShape, processor: Processor) -> int:
    """Programs that a streaming multiprocessor holds at a time: `tile.programs`, or as many as it has memory for."""
    program = local_memory_bytes(tile, shape, processor) + RESERVED_BYTES
    return max(1, min(tile.programs, (processor.local_memory_bytes + RESERVED_BYTES) // program))


def predicted_us(tile: StemConvFirstHopperTile, shape: StemConvFirstShape, processor: Processor) -> float:
    """Predicted duration of a launch in microseconds: that of the block alone, and the stem's products and rows."""
    block = hopper_time.predicted_us(tile.block, convfirst_shape(shape), processor)
    work = tile.block.work(shape.batch, shape.out_height, WIDTH, processor.processors)
    load = ceil(work.grid / processor.processors)
    resident = min(load, programs_per_processor(tile, shape, processor))
    clock_us = hopper_time.OPS_PER_CYCLE * processor.processors / processor.peak_ops * 1e6
    products = KERNEL_SIZE * max(hopper_time.LEAST_PRODUCT_CYCLES, hopper_time.COLUMN_CYCLES * tile.columns)
    rows = 2 * work.jobs + JOB_INPUT_ROWS
    return block + ceil(load / resident) * rows * (ROW_US + resident * products * clock_us)


def candidate_tiles(shape: StemConvFirstShape, processor: Processor) -> Iterator[StemConvFirstHopperTile]:
    """Every valid tile worth a measurement."""
    for slab, hidden, programs in product(STEM_SLABS, HIDDEN, PROGRAMS):
        tile = StemConvFirstHopperTile(hidden, programs, slab)
        if (
            slab // 2 < max(shape.stem_channels, min(STEM_SLABS))
            and why_invalid(tile, shape, processor) is None
            and programs_per_processor(tile, shape, processor) == programs
        ):
            yield tile

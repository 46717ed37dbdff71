"""Tile of the Hopper kernel of stride-2 ConvFirst blocks: what is valid, and how long it should take.

It walks over virtual rows of the *output*, as the kernel of stride 1 does over those of the image
(`fusion.planner.hopper_tile`). The input rows of two output rows, and those around them, are twice as many and twice as
wide, and the expansion takes twice as many channels.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from math import ceil
from typing import ClassVar

from fusion.planner import tile as portable
from fusion.planner.graph import ELEMENT_SIZE
from fusion.planner.hopper_tile import (
    BARRIER_ALIGNMENT,
    BARRIER_BYTES,
    BLOCK_PIXELS,
    COMPUTE_CAPABILITY,
    GROUP_WIDTH,
    HIDDEN,
    JOB_ROWS,
    MAX_JOBS,
    MAX_ROWS,
    OTHER_REGISTERS,
    PARTITION_BYTES,
    PATTERN_ROWS,
    PIECE,
    RESERVED_BYTES,
    SLABS,
    STREAMED_HIDDEN,
    TAP_ELEMENTS,
    WEIGHT_COLUMNS,
    RowsTile,
    aligned_bytes,
    available_registers,
    why_malformed,
)
from fusion.planner.match import ConvFirstDownShape
from fusion.planner.processor import Processor, kilobytes
from fusion.planner.slabs import WIDEST, slab_widths

COLUMN_TAPS = 11
"""Matrices of a column of taps of a piece: five rows, and six that serve the top edge, where rows are reflected."""
INPUT_TAPS = 4
"""Matrices of the blur of the input, the same for all pieces."""
PAIR_ROWS = 8
"""Row buffers of a pair of the ring: even and odd columns of the four input rows of two output rows."""
STAGES = (3, 2, 4)
"""Of a ring; of equal predictions the planner takes the first."""
PROGRAMS = (3, 2, 1)
"""On a processor."""
CHUNKS = (3, 4, 2)
"""Of streamed weights."""

PIECE_CYCLES = 2 * (12 * 20.6 + 9 * 24.3) + 18 * 20.6
"""Products of a piece for 64 pixels of two rows, 16 and 32 columns wide, of the convolution and of the input's blur."""
LEAST_PRODUCT_CYCLES = 13.5
"""Of a product of 64 rows and a depth of 16 whose left operand is in registers."""
COLUMN_CYCLES = 0.5
"""Of such a product, for each column."""
OPS_PER_CYCLE = 4096
"""Of a processor's tensor cores, 16-bit. So the peak tells the clock."""

# Fitted by eye to ten measurements on an H200 at batch 128.
LAUNCH_US = 4.0
BLOCK_US = 0.5
"""Of a block of 64 pixels of two rows: what nothing hides of its beginning and end."""
PIECE_US = 0.6
"""The same for each piece of the convolution."""
STREAMED_STEP_US = 0.1
"""The same for each step over the hidden channels whose weights are streamed."""


@dataclass(frozen=True)
class ConvFirstDownHopperTile(RowsTile):
    """One way to run the Hopper kernel of stride-2 ConvFirst blocks; widths and pixels are those of the output."""

    STREAMING_PARTITIONS: ClassVar[tuple[int, ...]] = (1, 2)

    def in_slabs(self, in_channels: int) -> tuple[int, ...]:
        """Slabs that the expansion contracts: the input's channels and then the convolution's, each in whole pieces."""
        return slab_widths(2 * PIECE * ceil(in_channels / PIECE), WIDEST)


def why_unsupported(shape: ConvFirstDownShape) -> str | None:
    """Why no tile runs this block on any processor, and what to do instead; None if some tile may."""
    if shape.group_width != GROUP_WIDTH:
        return f"group width {shape.group_width} is not supported, use {GROUP_WIDTH}"
    if shape.activation != "relu":
        return f"activation {shape.activation} is not supported, use relu"
    if shape.height % 2 or shape.width % 2:
        return f"images of {shape.height}x{shape.width} pixels are not supported, use an even height and width"
    return portable.why_unsupported(shape)


def why_invalid(tile: ConvFirstDownHopperTile, shape: ConvFirstDownShape, processor: Processor) -> str | None:
    """Why the kernel cannot, or should not, run `shape` with this tile on `processor`; None if it is valid."""
    if processor.compute_capability != COMPUTE_CAPABILITY:
        needed, found = (".".join(map(str, pair)) for pair in (COMPUTE_CAPABILITY, processor.compute_capability))
        return f"it is for compute capability {needed}, {processor.name} has {found}"
    general = why_unsupported(shape) or why_malformed(tile, shape.hidden_channels)
    if general:
        return general
    work = tile.work(shape.batch, shape.out_height, shape.out_width, processor.processors)
    if work.rows >= MAX_ROWS or work.jobs >= MAX_JOBS:
        return f"{shape.batch} images of {shape.height}x{shape.width} pixels are too many rows for a launch, split them"
    local = local_memory_bytes(tile, shape, processor)
    if local > processor.local_memory_bytes:
        weights = weight_bytes(tile, shape)
        return (
            f"weights of {kilobytes(weights)} and rows of {kilobytes(local - weights)} do not fit "
            f"the {kilobytes(processor.local_memory_bytes)} of local memory that {processor.name} has"
        )
    registers, limit = estimated_registers(tile, shape), available_registers(tile)
    if registers > limit:
        fewer = "" if tile.programs == 1 else f" to each of {tile.programs} programs"
        return f"about {registers:.0f} registers a thread would spill, {limit} are available{fewer}"
    return None


def why_none(shape: ConvFirstDownShape, processor: Processor) -> str | None:
    """Why no tile runs `shape` on `processor`, as far as those that ask for least tell; None if some tile may."""
    least = ConvFirstDownHopperTile(BLOCK_PIXELS, min(HIDDEN), min(STAGES), 1, 1, min(SLABS), weight_chunks=0)
    reason = why_invalid(least, shape, processor)
    streamed = replace(least, hidden=min(STREAMED_HIDDEN), weight_chunks=min(CHUNKS))
    if reason is None or streamed.steps(shape.hidden_channels) < min(CHUNKS):
        return reason
    return why_invalid(streamed, shape, processor)


def weight_sizes(
    tile: ConvFirstDownHopperTile, in_channels: int, hidden_channels: int, out_channels: int
) -> tuple[int, int, int, int]:
    """Elements of packed weights: the convolution and blur, the chunks of all steps, the hidden bias, and padding."""
    steps = tile.steps(hidden_channels)
    conv = (3 * COLUMN_TAPS * ceil(in_channels / PIECE) + INPUT_TAPS) * TAP_ELEMENTS
    chunks, bias = steps * tile.chunk_elements(in_channels, out_channels), steps * tile.hidden
    return conv, chunks, bias, -(conv + chunks + bias) % WEIGHT_COLUMNS


def weight_bytes(tile: ConvFirstDownHopperTile, shape: ConvFirstDownShape) -> int:
    """Weights and biases that a program has in shared memory at a time, in bytes."""
    conv, chunks, bias, _ = weight_sizes(tile, shape.in_channels, shape.hidden_channels, shape.out_channels)
    if tile.weight_chunks:
        chunks = tile.weight_chunks * tile.chunk_elements(shape.in_channels, shape.out_channels)
    return ELEMENT_SIZE[shape.dtype] * (conv + chunks + bias + sum(tile.out_slabs(shape.out_channels)))


def local_memory_bytes(tile: ConvFirstDownHopperTile, shape: ConvFirstDownShape, processor: Processor) -> int:
    """Shared memory of a program, in bytes: weights, and a ring of input rows for each partition."""
    element = ELEMENT_SIZE[shape.dtype]
    conv, *_ = weight_sizes(tile, shape.in_channels, shape.hidden_channels, shape.out_channels)
    chunks = tile.weight_chunks or tile.steps(shape.hidden_channels)
    chunks *= tile.chunk_elements(shape.in_channels, shape.out_channels)
    slab = (8 + PAIR_ROWS * tile.stages * (8 + tile.pixels)) * tile.slab
    slabs = tile.partitions * ceil(shape.in_channels / tile.slab)
    neighbours = tile.partitions * min(2, ceil(shape.in_channels / PIECE)) * JOB_ROWS * (8 + tile.pixels) * PIECE
    buffers = [(conv, PIECE), (chunks, WIDEST), *[(slab, tile.slab)] * slabs]
    matrices = aligned_bytes([(element * size, PATTERN_ROWS * element * columns) for size, columns in buffers])
    biases = weight_bytes(tile, shape) - element * (conv + chunks)
    stages = tile.partitions * ceil(BARRIER_BYTES * tile.stages / BARRIER_ALIGNMENT) * BARRIER_ALIGNMENT
    barriers = stages + BARRIER_BYTES * max(1, 2 * tile.weight_chunks)
    return matrices + element * neighbours + biases + barriers + PARTITION_BYTES * (tile.partitions - 1)


def estimated_registers(tile: ConvFirstDownHopperTile, shape: ConvFirstDownShape) -> float:
    """32-bit registers a thread: fp32 sums and 16-bit operands of 16 pixels a warp in each row of a job, addresses.

    The most are needed in the loop over hidden channels, or while two columns of a piece are convolved.
    """
    ins, outs = sum(tile.in_slabs(shape.in_channels)), sum(tile.out_slabs(shape.out_channels))
    ffn = outs + tile.hidden + (ins + tile.hidden) / 2
    conv = 2 * 4 * PIECE / 2 + PIECE + ins / 2
    return max(ffn, conv) + OTHER_REGISTERS


def programs_per_processor(tile: ConvFirstDownHopperTile, shape: ConvFirstDownShape, processor: Processor) -> int:
    """Programs that a streaming multiprocessor holds at a time: `tile.programs`, or as many as it has memory for."""
    program = local_memory_bytes(tile, shape, processor) + RESERVED_BYTES
    return max(1, min(tile.programs, (processor.local_memory_bytes + RESERVED_BYTES) // program))


def predicted_us(tile: ConvFirstDownHopperTile, shape: ConvFirstDownShape, processor: Processor) -> float:
    """Predicted duration of a launch in microseconds.

    A fixed cost, and blocks of pixels one after the other: each takes the time of the products of all partitions that
    the processor works on, and what those do not hide. No less than streamed weights take through L2, and the
    activations through DRAM.
    """
    work = tile.work(shape.batch, shape.out_height, shape.out_width, processor.processors)
    load = ceil(work.grid / processor.processors)
    resident = min(load, programs_per_processor(tile, shape, processor))
    steps, pieces = tile.steps(shape.hidden_channels), ceil(shape.in_channels / PIECE)
    clock_us = OPS_PER_CYCLE * processor.processors / processor.peak_ops * 1e6
    products = pieces * PIECE_CYCLES + JOB_ROWS * steps * _step_cycles(tile, shape)
    block_us = BLOCK_US + PIECE_US * pieces + resident * tile.partitions * products * clock_us
    if tile.weight_chunks:
        block_us += STREAMED_STEP_US * steps
        chunk_bytes = ELEMENT_SIZE[shape.dtype] * tile.chunk_elements(shape.in_channels, shape.out_channels)
        block_us = max(block_us, steps * chunk_bytes * processor.processors / processor.global_bandwidth * 1e6)
    blocks = work.jobs * tile.pixels // BLOCK_PIXELS
    dram_us = shape.activation_bytes / processor.bandwidth * 1e6
    return LAUNCH_US + max(ceil(load / resident) * blocks * block_us, dram_us)


def _step_cycles(tile: ConvFirstDownHopperTile, shape: ConvFirstDownShape) -> float:
    """Products of a step for 64 pixels of a row."""
    expand = sum(tile.in_slabs(shape.in_channels)) / PIECE * _product_cycles(tile.hidden)
    project = tile.hidden / PIECE * sum(map(_product_cycles, tile.out_slabs(shape.out_channels)))
    return expand + project


def _product_cycles(columns: int) -> float:
    return max(LEAST_PRODUCT_CYCLES, COLUMN_CYCLES * columns)


def candidate_tiles(shape: ConvFirstDownShape, processor: Processor) -> Iterator[ConvFirstDownHopperTile]:
    """Every valid tile worth a measurement."""
    slabs = [slab for slab in reversed(SLABS) if slab < 2 * shape.in_channels or slab == min(SLABS)]
    for hidden, slab, stages, chunks in product(HIDDEN, slabs, STAGES, (0, *CHUNKS)):
        alone = ConvFirstDownHopperTile(BLOCK_PIXELS, hidden, stages, 1, 1, slab, chunks)
        several = [replace(alone, programs=programs) for programs in PROGRAMS]
        for tile in (*several, replace(alone, partitions=2)):
            is_valid = why_invalid(tile, shape, processor) is None
            if is_valid and programs_per_processor(tile, shape, processor) == tile.programs:
                yield tile

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

from fusion.planner import hopper_tile
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
)
from fusion.planner.match import ConvFirstDownShape
from fusion.planner.processor import Processor, kilobytes, why_other_capability
from fusion.planner.slabs import WIDEST, slab_widths

COLUMN_TAPS = 11
"""Matrices of a column of taps of a piece: five rows, and six that serve the top edge, where rows are reflected."""
INPUT_TAPS = 4
"""Matrices of the blur of the input, the same for all pieces."""
INPUT_ROWS = 7
"""Input rows of two output rows."""
ROW_ATOMS = 17
"""Atoms of 8 pixels of an input row of a piece: 64 even columns, zeros, and 64 odd columns."""
PAIR_ROWS = 8
"""Row buffers of a pair of the ring: even and odd columns of the four input rows of two output rows."""
STAGES = (3, 2, 4)
"""Of a ring; of equal predictions the planner takes the first."""
PROGRAMS = (3, 2, 1)
"""On a processor."""
BY_PIECE = (0, 1)
CHUNKS = (3, 4, 2)
"""Of streamed weights."""

LOADER_BYTES = 512
"""Shared memory that the compiler takes for what it passes to the second partition and to loaders, and their barriers
of chunks, at most."""

PIECE_CYCLES = 2 * (12 * 20.6 + 9 * 24.3) + 18 * 20.6
"""Products of a piece for 64 pixels of two rows, 16 and 32 columns wide, of the convolution and of the input's blur."""
BY_PIECE_CYCLES = 2 * (12 * 20.6 + 9 * 24.3) + 10 * 16 + 4 * 32
"""The same where threads blur the input: they load ten row buffers, and exchange four rows with their neighbours."""
LEAST_PRODUCT_CYCLES = 13.5
"""Of a product of 64 rows and a depth of 16 whose left operand is in registers."""
COLUMN_CYCLES = 0.5
"""Of such a product, for each column."""
OPS_PER_CYCLE = 4096
"""Of a processor's tensor cores, 16-bit. So the peak tells the clock."""

# Fitted to the measurements of an H100 at batch 128 in NOTES.md: 4 % rms for rings, 9 % by piece.
LAUNCH_US = 4.0
RING_SHARE = 1.15
"""Time of a ring's blocks of 64 pixels of two rows over that of their products."""
RING_BLOCK_US = 0.5
"""What nothing hides of a block's beginning and end."""
RING_PIECE_US = 0.6
"""The same for each piece of the convolution."""
RING_STEP_US = 0.1
"""The same for each step over the hidden channels whose weights are streamed."""
BY_PIECE_SHARE = 1.23
"""The first of these times where the input comes by piece."""
BY_PIECE_STEP_US = 0.23
"""The last of these times where the input comes by piece."""
PART_PIECE_US = 0.43
"""Of each piece if the last one is half empty: its pixels straddle sectors."""


@dataclass(frozen=True)
class ConvFirstDownHopperTile(RowsTile):
    """One way to run the Hopper kernel of stride-2 ConvFirst blocks; widths and pixels are those of the output.

    With `by_piece` 1 a partition has no ring of whole rows, but `stages` buffers of 16 channels of the input rows of
    two output rows.
    """

    by_piece: int = 0

    STREAMING_PARTITIONS: ClassVar[tuple[int, ...]] = (1, 2)
    SWITCHES: ClassVar[tuple[str, ...]] = ("weight_chunks", "by_piece")

    @property
    def input_taps(self) -> int:
        """Matrices of the blur of the input, where products make it."""
        return 0 if self.by_piece else INPUT_TAPS

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


def why_malformed(tile: ConvFirstDownHopperTile, hidden_channels: int) -> str | None:
    """Why the kernel runs no block of so many hidden channels with this tile; None if it may."""
    if tile.by_piece not in BY_PIECE:
        return f"by_piece={tile.by_piece} is not one of {', '.join(map(str, BY_PIECE))}"
    if tile.by_piece:
        for name, value in {"pixels": BLOCK_PIXELS, "partitions": 2, "slab": PIECE}.items():
            if getattr(tile, name) != value:
                return f"by_piece=1 does not go with {name}={getattr(tile, name)}, use {name}={value}"
    return hopper_tile.why_malformed(tile, hidden_channels)


def why_invalid(tile: ConvFirstDownHopperTile, shape: ConvFirstDownShape, processor: Processor) -> str | None:
    """Why the kernel cannot, or should not, run `shape` with this tile on `processor`; None if it is valid."""
    general = (
        why_other_capability(processor, COMPUTE_CAPABILITY)
        or why_unsupported(shape)
        or why_malformed(tile, shape.hidden_channels)
    )
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
    streamed = replace(least, hidden=min(STREAMED_HIDDEN), weight_chunks=min(CHUNKS))
    reason = why_invalid(least, shape, processor)
    for tile in (replace(least, partitions=2, by_piece=1), streamed, replace(streamed, partitions=2, by_piece=1)):
        if reason is not None and tile.weight_chunks <= tile.steps(shape.hidden_channels):
            reason = why_invalid(tile, shape, processor)
    return reason


def weight_sizes(
    tile: ConvFirstDownHopperTile, in_channels: int, hidden_channels: int, out_channels: int
) -> tuple[int, int, int, int]:
    """Elements of packed weights: the convolution and blur, the chunks of all steps, the hidden bias, and padding."""
    steps = tile.steps(hidden_channels)
    conv = (3 * COLUMN_TAPS * ceil(in_channels / PIECE) + tile.input_taps) * TAP_ELEMENTS
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
    if tile.by_piece:
        slab, slabs = tile.stages * INPUT_ROWS * ROW_ATOMS * PATTERN_ROWS * PIECE, tile.partitions
        exchanged, barriers, others = 1, 2, LOADER_BYTES
    else:
        slab = (8 + PAIR_ROWS * tile.stages * (8 + tile.pixels)) * tile.slab
        slabs = tile.partitions * ceil(shape.in_channels / tile.slab)
        exchanged, barriers = min(2, ceil(shape.in_channels / PIECE)), 1
        others = PARTITION_BYTES * (tile.partitions - 1)
    neighbours = tile.partitions * exchanged * JOB_ROWS * (8 + tile.pixels) * PIECE
    buffers = [(conv, PIECE), (chunks, WIDEST), *[(slab, tile.slab)] * slabs]
    matrices = aligned_bytes([(element * size, PATTERN_ROWS * element * columns) for size, columns in buffers])
    biases = weight_bytes(tile, shape) - element * (conv + chunks)
    stages = tile.partitions * barriers * ceil(BARRIER_BYTES * tile.stages / BARRIER_ALIGNMENT) * BARRIER_ALIGNMENT
    return matrices + element * neighbours + biases + stages + BARRIER_BYTES * max(1, 2 * tile.weight_chunks) + others


def estimated_registers(tile: ConvFirstDownHopperTile, shape: ConvFirstDownShape) -> float:
    """32-bit registers a thread: fp32 sums and 16-bit operands of 16 pixels a warp in each row of a job, addresses.

    The most are needed in the loop over hidden channels, or while two columns of a piece are convolved, or of two
    pieces.
    """
    ins, outs = sum(tile.in_slabs(shape.in_channels)), sum(tile.out_slabs(shape.out_channels))
    ffn = outs + tile.hidden + (ins + tile.hidden) / 2
    sums = 2 * 4 * PIECE / 2
    # The next piece's sums, instead of one more column's of the input.
    conv = sums + (sums if tile.by_piece and ins > 2 * PIECE else PIECE) + ins / 2
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
    piece_cycles = BY_PIECE_CYCLES if tile.by_piece else PIECE_CYCLES
    products = pieces * piece_cycles + JOB_ROWS * steps * _step_cycles(tile, shape)
    products_us = resident * tile.partitions * products * clock_us
    if tile.by_piece:
        block_us = BY_PIECE_SHARE * products_us + PART_PIECE_US * pieces * (shape.in_channels % PIECE > 0)
    else:
        block_us = RING_SHARE * products_us + RING_BLOCK_US + RING_PIECE_US * pieces
    if tile.weight_chunks:
        block_us += (BY_PIECE_STEP_US if tile.by_piece else RING_STEP_US) * steps
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
        both = replace(alone, partitions=2)
        for tile in (*several, both, replace(both, by_piece=1)):
            is_valid = why_invalid(tile, shape, processor) is None
            if is_valid and programs_per_processor(tile, shape, processor) == tile.programs:
                yield tile

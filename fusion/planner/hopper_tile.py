"""Tile of the Hopper variant of the ConvFirst kernel: how it divides images over programs, and what is valid.

The images of a batch are one tall image of *virtual rows*: H rows each and a row of zeros after them, which is the
padding below one image and above the next. Programs stay on their processor and walk down it, two rows at a time.
Where images are narrow the batch is cut into *streams*, tall images that lie side by side.
`why_invalid` is the one judge of validity, for the planner's choice and for the tuner's candidates.
"""

from dataclasses import astuple, dataclass, fields, replace
from math import ceil
from typing import ClassVar

from fusion.planner import tile as portable
from fusion.planner.graph import ELEMENT_SIZE
from fusion.planner.match import ConvFirstShape
from fusion.planner.processor import Processor, kilobytes, why_other_capability
from fusion.planner.slabs import NARROWEST, WIDEST, HopperSlabs

COMPUTE_CAPABILITY = (9, 0)
GROUP_WIDTH = 8
PIXELS = (64, 128)
HIDDEN = (16, 32, 64)
STAGES = (2, 3, 4)
"""Of a ring: a convolution needs two pairs of rows."""
PARTITIONS = (1, 2)
SLABS = (16, 32, 64)
STREAMED_HIDDEN = (32, 64)
MIN_CHUNKS = 2
"""Of streamed weights: a chunk is replaced while the next one is used."""
WARPS = 4
"""Warps of a partition: a warpgroup, whose matrix products are Hopper's widest."""
WIDEST_UNIT = 32
PIECE = NARROWEST
"""Channels that the convolution computes together: two groups."""
TAP_ELEMENTS = PIECE * PIECE
"""Weights of a tap of a piece: a matrix with zeros between its groups."""
ATOM_ELEMENTS = 8 * WIDEST
"""What every matrix of a chunk is rounded up to a multiple of: the pattern of the widest swizzle."""
WEIGHT_COLUMNS = 64
"""What packed weights are rounded up to a multiple of: TMA reads them as rows."""
MOST_UNROLLED = 6
"""Steps of the FFN that are one piece of code. Where code is longer the compiler computes addresses for each thread."""
MOST_STREAMS = 8
"""A column's neighbour is as many pixels away, and before every row there are zeros for 8."""
JOB_ROWS = 2
"""Rows of a stream that a partition computes together."""
BARRIER_BYTES = 8
BARRIER_ALIGNMENT = 16
PATTERN_ROWS = 8
"""Of the swizzle: buffers start at multiples of so many rows."""
PARTITION_BYTES = 256
"""Shared memory that the compiler takes for what it passes to the second partition, at most."""
RESERVED_BYTES = 1024
"""Shared memory that the hardware takes for every program; a processor has as much more than a program may use."""
BLOCK_PIXELS = 16 * WARPS
"""Pixels that a warpgroup's product has as rows; a partition with more computes them one block after the other."""
REGISTERS = 65536
"""Of a processor."""
REGISTER_MULTIPLE = 8
"""What a thread gets is a multiple of it."""
PARTITION_REGISTERS = 240
"""Of each thread where a program has two partitions, which take all registers of a processor."""
OTHER_REGISTERS = 26
"""Of each thread, for anything but sums and operands: addresses, mostly."""
MAX_ROWS = 2**30
MAX_JOBS = 2**20
"""Virtual rows, and jobs of a stream, that the kernel can count."""


@dataclass(frozen=True)
class HopperWork:
    """Division of a batch: `rows` virtual rows of every stream, `jobs` of two rows for every run, `grid` programs.

    `streams` of them walk down the images side by side, the first of each `images` after the one before's.
    """

    rows: int
    jobs: int
    grid: int
    images: int
    streams: int


@dataclass(frozen=True)
class RowsTile(HopperSlabs):
    """How the Hopper variants of the ConvFirst kernels walk down rows of images.

    Each of the `partitions` of a program, a warpgroup, has `stages` pairs of input rows of `pixels` pixels in its ring,
    in slabs of `slab` channels. It computes them in blocks of 64 pixels, one after the other, and `hidden` of the
    hidden channels in a step. All partitions share the weights, which stay in shared memory; or with `weight_chunks`,
    those of so many steps are there at a time and come from L2 for every job. `programs` run on a processor at once.
    """

    STREAMING_PARTITIONS: ClassVar[tuple[int, ...]] = (2,)
    """Numbers of partitions with which weights can be streamed."""
    SWITCHES: ClassVar[tuple[str, ...]] = ("weight_chunks",)
    """Fields that may be zero."""

    pixels: int
    hidden: int
    stages: int
    partitions: int
    programs: int
    slab: int
    weight_chunks: int

    def __post_init__(self) -> None:
        for field in fields(self):
            value, least = getattr(self, field.name), int(field.name not in self.SWITCHES)
            if not isinstance(value, int) or value < least:
                raise ValueError(
                    f"{type(self).__name__}: {field.name} must be an integer of {least} or more, got {value!r}"
                )

    @property
    def register_limit(self) -> int | None:
        """Registers a thread with which `programs` fit on a processor; None if the compiler needs no limit."""
        threads = self.programs * self.partitions * WARPS * portable.WARP_SIZE
        limit = REGISTERS // threads // REGISTER_MULTIPLE * REGISTER_MULTIPLE
        return limit if limit < portable.MAX_REGISTERS else None

    def chunk_shapes(self, in_channels: int, out_channels: int) -> tuple[tuple[int, int], ...]:
        """Matrices of a chunk, the weights of a step: expand [slab in, hidden], then project [hidden, slab out]."""
        expand = ((slab, self.hidden) for slab in self.in_slabs(in_channels))
        project = ((self.hidden, slab) for slab in self.out_slabs(out_channels))
        return (*expand, *project)

    def chunk_elements(self, in_channels: int, out_channels: int) -> int:
        """Weights of a step, every matrix of it rounded up to whole atoms."""
        atoms = (ceil(rows * columns / ATOM_ELEMENTS) for rows, columns in self.chunk_shapes(in_channels, out_channels))
        return ATOM_ELEMENTS * sum(atoms)

    def unroll(self, hidden_channels: int) -> int:
        """Steps of a group, one piece of code. Products of streamed weights leave no registers for more than one."""
        steps, most = self.steps(hidden_channels), 1 if self.weight_chunks else MOST_UNROLLED
        return max(group for group in range(1, most + 1) if steps % group == 0)

    def unit(self, out_channels: int) -> int:
        """Output channels of which each thread of a quad stores a fourth: neighbours, as wide as it can."""
        return min(WIDEST_UNIT, self.slab, *self.out_slabs(out_channels))

    def streams(self, width: int) -> int:
        """Runs of rows that a partition computes side by side, more than one where images are narrow."""
        return max(1, min(MOST_STREAMS, self.pixels >> (width - 1).bit_length()))

    def tile_width(self, width: int) -> int:
        """Pixels of a row that a stream computes together, those beyond the image's right edge included."""
        return self.pixels // self.streams(width)

    def strips(self, width: int) -> int:
        """Overlapping strips that wide images are divided into; the first and the last column of each are lost."""
        columns = self.tile_width(width)
        return 1 if width <= columns else ceil(width / (columns - 2))

    def work(self, batch: int, height: int, width: int, processors: int) -> HopperWork:
        """Division of `batch` images of `height x width` pixels over a GPU of `processors` multiprocessors."""
        streams, strips = min(self.streams(width), batch), self.strips(width)
        images = batch // streams
        # The last streams overlap where the batch is not divisible: both compute the same images.
        rows = (batch - (streams - 1) * images) * (height + 1)
        runs = max(1, processors * self.programs * self.partitions // strips)
        jobs = ceil(rows / (JOB_ROWS * runs))
        runs = ceil(rows / (JOB_ROWS * jobs))
        return HopperWork(rows, jobs, ceil(runs * strips / self.partitions), images, streams)

    def to_ints(self) -> list[int]:
        """The fields in order, for operators and files that take integers only; the class undoes it."""
        return list(astuple(self))


@dataclass(frozen=True)
class HopperTile(RowsTile):
    """One way to run the Hopper variant of the ConvFirst kernel of stride 1."""


def why_unsupported(shape: ConvFirstShape) -> str | None:
    """Why no tile runs this block on any processor, and what to do instead; None if some tile may."""
    if shape.group_width != GROUP_WIDTH:
        return f"group width {shape.group_width} is not supported, use {GROUP_WIDTH}"
    if shape.activation != "relu":
        return f"activation {shape.activation} is not supported, use relu"
    if shape.stride != 1:
        return f"stride {shape.stride} of the convolution is not supported, use 1"
    return portable.why_unsupported(shape)


def why_malformed(tile: RowsTile, hidden_channels: int) -> str | None:
    """Why the kernel runs no block of so many hidden channels with this tile; None if it may."""
    choices = {"pixels": PIXELS, "hidden": HIDDEN, "stages": STAGES, "partitions": PARTITIONS, "slab": SLABS}
    for name, values in choices.items():
        if getattr(tile, name) not in values:
            return f"{name}={getattr(tile, name)} is not one of {', '.join(map(str, values))}"
    if tile.partitions > 1 and tile.programs > 1:
        return f"{tile.partitions} partitions take all registers of a processor, use programs=1, not {tile.programs}"
    return _why_not_streamed(tile, tile.steps(hidden_channels)) if tile.weight_chunks else None


def _why_not_streamed(tile: RowsTile, steps: int) -> str | None:
    asked = f"weight_chunks={tile.weight_chunks} does not go with "
    if tile.partitions not in tile.STREAMING_PARTITIONS:
        return asked + f"partitions={tile.partitions}, use partitions=2, or weight_chunks=0 for weights that stay"
    if tile.hidden not in STREAMED_HIDDEN:
        return asked + f"hidden={tile.hidden}, use hidden={' or '.join(map(str, STREAMED_HIDDEN))}"
    if tile.pixels != BLOCK_PIXELS:
        return asked + f"pixels={tile.pixels}, use pixels={BLOCK_PIXELS}"
    if not MIN_CHUNKS <= tile.weight_chunks <= steps:
        return (
            asked + f"{steps} steps over the hidden channels, use {MIN_CHUNKS} to {steps}, or 0 for weights that stay"
        )
    return None


def why_invalid(tile: HopperTile, shape: ConvFirstShape, processor: Processor) -> str | None:
    """Why the kernel cannot, or should not, run `shape` with this tile on `processor`; None if it is valid."""
    general = (
        why_other_capability(processor, COMPUTE_CAPABILITY)
        or why_unsupported(shape)
        or why_malformed(tile, shape.hidden_channels)
    )
    if general:
        return general
    work = tile.work(shape.batch, shape.height, shape.width, processor.processors)
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


def why_none(shape: ConvFirstShape, processor: Processor) -> str | None:
    """Why no tile runs `shape` on `processor`, as far as those that ask for least tell; None if some tile may.

    They are one of weights that stay and one of weights that are streamed, and the reason is that of the latter.
    """
    least = HopperTile(min(PIXELS), min(HIDDEN), min(STAGES), 1, 1, min(SLABS), weight_chunks=0)
    reason = why_invalid(least, shape, processor)
    streamed = replace(least, hidden=min(STREAMED_HIDDEN), partitions=2, weight_chunks=MIN_CHUNKS)
    if reason is None or streamed.steps(shape.hidden_channels) < MIN_CHUNKS:
        return reason
    return why_invalid(streamed, shape, processor)


def weight_sizes(
    tile: HopperTile, in_channels: int, hidden_channels: int, out_channels: int
) -> tuple[int, int, int, int]:
    """Elements of packed weights: the convolution, the chunks of all steps, the hidden bias, and padding at the end."""
    steps = tile.steps(hidden_channels)
    conv = 9 * ceil(in_channels / PIECE) * TAP_ELEMENTS
    chunks, bias = steps * tile.chunk_elements(in_channels, out_channels), steps * tile.hidden
    return conv, chunks, bias, -(conv + chunks + bias) % WEIGHT_COLUMNS


def weight_bytes(tile: HopperTile, shape: ConvFirstShape) -> int:
    """Weights and biases that a program has in shared memory at a time, in bytes."""
    conv, chunks, bias, _ = weight_sizes(tile, shape.in_channels, shape.hidden_channels, shape.out_channels)
    if tile.weight_chunks:
        chunks = tile.weight_chunks * tile.chunk_elements(shape.in_channels, shape.out_channels)
    return ELEMENT_SIZE[shape.dtype] * (conv + chunks + bias + sum(tile.out_slabs(shape.out_channels)))


def local_memory_bytes(tile: HopperTile, shape: ConvFirstShape, processor: Processor) -> int:
    """Shared memory of a program, in bytes: weights, and a ring of input rows for each partition.

    Zeros stand before every row of a ring and after the last. Exact for one partition, for two a bound.
    """
    element = ELEMENT_SIZE[shape.dtype]
    conv, *_ = weight_sizes(tile, shape.in_channels, shape.hidden_channels, shape.out_channels)
    chunks = tile.weight_chunks or tile.steps(shape.hidden_channels)
    chunks *= tile.chunk_elements(shape.in_channels, shape.out_channels)
    slab = (8 + JOB_ROWS * tile.stages * (8 + tile.pixels)) * tile.slab
    slabs = tile.partitions * ceil(shape.in_channels / tile.slab)
    buffers = [(conv, PIECE), (chunks, WIDEST), *[(slab, tile.slab)] * slabs]
    matrices = aligned_bytes([(element * size, PATTERN_ROWS * element * columns) for size, columns in buffers])
    biases = weight_bytes(tile, shape) - element * (conv + chunks)
    stages = tile.partitions * ceil(BARRIER_BYTES * tile.stages / BARRIER_ALIGNMENT) * BARRIER_ALIGNMENT
    barriers = stages + BARRIER_BYTES * max(1, 2 * tile.weight_chunks)
    return matrices + biases + barriers + PARTITION_BYTES * (tile.partitions - 1)


def aligned_bytes(buffers: list[tuple[int, int]]) -> int:
    """Of buffers, sizes and alignments, one after the other, the largest first as the compiler places them."""
    end = 0
    for size, alignment in sorted(buffers, reverse=True):
        end = ceil(end / alignment) * alignment + size
    return end


def estimated_registers(tile: HopperTile, shape: ConvFirstShape) -> float:
    """32-bit registers a thread: fp32 sums and 16-bit operands of 16 pixels a warp in each row of a job, addresses.

    The most are needed either in the loop over hidden channels, or before it while the input is added to the output.
    """
    ins, outs = sum(tile.in_slabs(shape.in_channels)), sum(tile.out_slabs(shape.out_channels))
    sums, operands = outs + tile.hidden, ins  # for two rows, 2 / 2 and 2 / 4 registers a column
    if tile.steps(shape.hidden_channels) > 1:
        operands += tile.hidden
    most = max(operands / 2, ins / 2 + shape.residual * outs / 4)
    return sums + most + OTHER_REGISTERS


def available_registers(tile: RowsTile) -> int:
    """Registers that a thread may have; with more, products wait for one another or registers spill."""
    if tile.partitions > 1:
        return PARTITION_REGISTERS
    return tile.register_limit or portable.MAX_REGISTERS


def programs_per_processor(tile: HopperTile, shape: ConvFirstShape, processor: Processor) -> int:
    """Programs that a streaming multiprocessor holds at a time: `tile.programs`, or as many as it has memory for."""
    return max(1, min(tile.programs, programs_in_local_memory(tile, shape, processor)))


def programs_in_local_memory(tile: HopperTile, shape: ConvFirstShape, processor: Processor) -> int:
    """Programs for which a streaming multiprocessor has shared memory."""
    program = local_memory_bytes(tile, shape, processor) + RESERVED_BYTES
    return (processor.local_memory_bytes + RESERVED_BYTES) // program

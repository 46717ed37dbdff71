"""Tile of the Hopper variant of the ConvFirst kernel: how it divides images over programs, and what is valid.

The images of a batch are one tall image of *virtual rows*: H rows each and a row of zeros after them, which is the
padding below one image and above the next. Programs stay on their processor and walk down it, two rows at a time.
`why_invalid` is the one judge of validity, for the planner's choice and for the tuner's candidates.
"""

from dataclasses import astuple, dataclass, fields
from math import ceil

from fusion.planner import tile as portable
from fusion.planner.graph import ELEMENT_SIZE
from fusion.planner.match import ConvFirstShape
from fusion.planner.processor import Processor
from fusion.planner.slabs import slab_widths

COMPUTE_CAPABILITY = (9, 0)
GROUP_WIDTH = 8
PIXELS = (64, 128)
HIDDEN = (16, 32, 64)
MIN_STAGES = 2
"""Of a ring: a convolution needs two pairs of rows."""
MIN_BULK_STAGES = 3
"""With bulk loads, which bring the next pair meanwhile."""
SWITCHES = ("warp_products", "bulk_loads")
PARTITIONS = (1, 2)
WARPS = 4
"""Warps of a partition: a warpgroup, whose matrix products are Hopper's widest."""
WIDEST_SLAB = 64
NARROWEST_STREAM = 8
"""Least pixels of a row that lie side by side with rows of other streams."""
JOB_ROWS = 2
"""Rows of a stream that a partition computes together."""
CONV_ELEMENTS = 96 * 16
"""Weights of a group: two output rows of 8 channels, from four input rows, three columns and 8 channels."""
RING_MARGIN = 16 * 8
"""Elements of a ring before and after its rows: neighbours of the first and of the last pixel."""
BARRIER_BYTES = 8
"""Of each stage of a ring that TMA fills."""
SLAB_SCRATCH_BYTES = {16: 2048, 32: 2304, 64: 4864}
HIDDEN_SCRATCH_BYTES = {16: 2048, 32: 2304, 64: 2816}
"""Shared memory that the compiler takes for changes of layout in a partition: the larger of what its widest output
slab and its hidden channels need. For two partitions it takes less than that for each."""
RESERVED_BYTES = 1024
"""Shared memory that the hardware takes for every program; a processor has as much more than a program may use."""
BLOCK_PIXELS = 16 * WARPS
"""Pixels that a warpgroup's product has as rows; a partition with more computes them one block after the other."""
BLOCK_REGISTERS = 24
"""Of each thread, for every block of pixels after the first."""
MAX_ROWS = 2**30
MAX_JOBS = 2**20
"""Virtual rows, and jobs of a stream, that the kernel can count."""


@dataclass(frozen=True)
class HopperWork:
    """Division of a batch: `rows` virtual rows in all, `jobs` of two rows for every stream, `grid` programs."""

    rows: int
    jobs: int
    grid: int


@dataclass(frozen=True)
class HopperTile:
    """One way to run the Hopper variant of the ConvFirst kernel.

    Each of the `partitions` of a program, a warpgroup, computes `pixels` pixels of a row together, `hidden` of the
    hidden channels at a time; all share the weights, which stay in shared memory. `stages` pairs of input rows are
    there at a time, for each partition. `programs` run on a processor at once. With `warp_products` 1, a warp each
    computes the products of the FFN; with 0, a warpgroup. With `bulk_loads` 1, TMA brings the input, in pieces of 16
    bytes; with 0, threads load it in wider ones.
    """

    pixels: int
    hidden: int
    stages: int
    partitions: int
    programs: int
    warp_products: int
    bulk_loads: int

    def __post_init__(self) -> None:
        for field in fields(self):
            value, least = getattr(self, field.name), int(field.name not in SWITCHES)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"HopperTile: {field.name} must be an integer of {least} or more, got {value!r}")

    def in_slabs(self, in_channels: int) -> tuple[int, ...]:
        """Slabs that the expansion contracts."""
        return slab_widths(in_channels, WIDEST_SLAB)

    def out_slabs(self, out_channels: int) -> tuple[int, ...]:
        """Slabs that the projection accumulates."""
        return slab_widths(out_channels, WIDEST_SLAB)

    def steps(self, hidden_channels: int) -> int:
        """Steps of the loop over hidden channels."""
        return ceil(hidden_channels / self.hidden)

    def padded_hidden(self, hidden_channels: int) -> int:
        """Hidden channels that the kernel computes: whole steps of the loop."""
        return self.steps(hidden_channels) * self.hidden

    def streams(self, width: int) -> int:
        """Runs of rows that a partition computes side by side, more than one where images are narrow."""
        return max(1, self.pixels // max(NARROWEST_STREAM, 1 << (width - 1).bit_length()))

    def tile_width(self, width: int) -> int:
        """Pixels of a row that a stream computes together, those beyond the image's right edge included."""
        return self.pixels // self.streams(width)

    def strips(self, width: int) -> int:
        """Overlapping strips that wide images are divided into; the first and the last column of each are lost."""
        columns = self.tile_width(width)
        return 1 if width <= columns else ceil(width / (columns - 2))

    def work(self, batch: int, height: int, width: int, processors: int) -> HopperWork:
        """Division of `batch` images of `height x width` pixels over a GPU of `processors` multiprocessors."""
        rows = batch * (height + 1)
        streams, strips = self.partitions * self.streams(width), self.strips(width)
        runs = max(1, processors * self.programs * streams // strips)
        jobs = ceil(rows / (JOB_ROWS * runs))
        runs = ceil(rows / (JOB_ROWS * jobs))
        return HopperWork(rows, jobs, ceil(runs * strips / streams))

    def to_ints(self) -> list[int]:
        """The fields in order, for operators and files that take integers only; `HopperTile(*ints)` undoes it."""
        return list(astuple(self))


def why_unsupported(shape: ConvFirstShape) -> str | None:
    """Why no tile runs this block on any processor, and what to do instead; None if some tile may."""
    if shape.group_width != GROUP_WIDTH:
        return f"group width {shape.group_width} is not supported, use {GROUP_WIDTH}"
    if shape.activation != "relu":
        return f"activation {shape.activation} is not supported, use relu"
    return portable.why_unsupported(shape)


def why_malformed(tile: HopperTile) -> str | None:
    """Why the kernel runs no block with this tile; None if it may."""
    choices = {"pixels": PIXELS, "hidden": HIDDEN, "partitions": PARTITIONS, **dict.fromkeys(SWITCHES, (0, 1))}
    for name, values in choices.items():
        if getattr(tile, name) not in values:
            return f"{name}={getattr(tile, name)} is not one of {', '.join(map(str, values))}"
    least = MIN_BULK_STAGES if tile.bulk_loads else MIN_STAGES
    if tile.stages < least:
        return f"{tile.stages} pairs of rows are too few, {least} are needed"
    return None


def why_invalid(tile: HopperTile, shape: ConvFirstShape, processor: Processor) -> str | None:
    """Why the kernel cannot, or should not, run `shape` with this tile on `processor`; None if it is valid."""
    if processor.compute_capability != COMPUTE_CAPABILITY:
        needed, found = (".".join(map(str, pair)) for pair in (COMPUTE_CAPABILITY, processor.compute_capability))
        return f"it is for compute capability {needed}, {processor.name} has {found}"
    general = why_unsupported(shape) or why_malformed(tile)
    if general:
        return general
    work = tile.work(shape.batch, shape.height, shape.width, processor.processors)
    if work.rows >= MAX_ROWS or work.jobs >= MAX_JOBS:
        return f"{shape.batch} images of {shape.height}x{shape.width} pixels are too many rows for a launch, split them"
    local = local_memory_bytes(tile, shape, processor)
    if local > processor.local_memory_bytes:
        weights = weight_bytes(tile, shape)
        return (
            f"weights of {_kb(weights)} and rows of {_kb(local - weights)} do not fit "
            f"the {_kb(processor.local_memory_bytes)} of local memory that {processor.name} has"
        )
    registers = estimated_registers(tile, shape)
    if registers > portable.SPILL_ALLOWANCE * portable.MAX_REGISTERS:
        return f"about {registers:.0f} registers a thread would spill, {portable.MAX_REGISTERS} are available"
    return None


def why_none(shape: ConvFirstShape, processor: Processor) -> str | None:
    """Why no tile runs `shape` on `processor`, as far as the one that asks for least tells; None if some tile may."""
    least = HopperTile(min(PIXELS), min(HIDDEN), MIN_STAGES, min(PARTITIONS), programs=1, warp_products=0, bulk_loads=0)
    return why_invalid(least, shape, processor)


def weight_bytes(tile: HopperTile, shape: ConvFirstShape) -> int:
    """Weights and biases that stay in the shared memory of a program, in bytes."""
    in_channels, out_channels = sum(tile.in_slabs(shape.in_channels)), sum(tile.out_slabs(shape.out_channels))
    conv = shape.in_channels // GROUP_WIDTH * CONV_ELEMENTS
    ffn = tile.padded_hidden(shape.hidden_channels) * (in_channels + out_channels + 1)
    return ELEMENT_SIZE[shape.dtype] * (conv + ffn + out_channels)


def local_memory_bytes(tile: HopperTile, shape: ConvFirstShape, processor: Processor) -> int:
    """Shared memory of a program, in bytes: its weights, and a ring of input rows for each partition."""
    ring = tile.stages * JOB_ROWS * tile.pixels * sum(tile.in_slabs(shape.in_channels)) + RING_MARGIN
    scratch = max(SLAB_SCRATCH_BYTES[max(tile.out_slabs(shape.out_channels))], HIDDEN_SCRATCH_BYTES[tile.hidden])
    barriers = tile.stages * BARRIER_BYTES * tile.bulk_loads
    partition = ELEMENT_SIZE[shape.dtype] * ring + barriers + scratch
    return weight_bytes(tile, shape) + tile.partitions * partition


def estimated_registers(tile: HopperTile, shape: ConvFirstShape) -> float:
    """32-bit registers a thread: fp32 sums and 16-bit operands of 16 pixels a warp in each row of a job, addresses."""
    in_channels, out_channels = sum(tile.in_slabs(shape.in_channels)), sum(tile.out_slabs(shape.out_channels))
    sums, operands = out_channels + tile.hidden, in_channels + tile.hidden
    return JOB_ROWS * (sums / 2 + operands / 4) + BLOCK_REGISTERS * (tile.pixels // BLOCK_PIXELS - 1) + 40


def programs_per_processor(tile: HopperTile, shape: ConvFirstShape, processor: Processor) -> int:
    """Programs that a streaming multiprocessor holds at a time: `tile.programs`, or as many as its memories allow."""
    registers = min(estimated_registers(tile, shape), portable.MAX_REGISTERS)
    if tile.partitions > 1:
        registers = portable.MAX_REGISTERS  # what the compiler gives to partitions that run different code
    in_registers = processor.registers_per_processor // (registers * tile.partitions * WARPS * portable.WARP_SIZE)
    return max(1, min(tile.programs, int(in_registers), programs_in_local_memory(tile, shape, processor)))


def programs_in_local_memory(tile: HopperTile, shape: ConvFirstShape, processor: Processor) -> int:
    """Programs for which a streaming multiprocessor has shared memory."""
    program = local_memory_bytes(tile, shape, processor) + RESERVED_BYTES
    return (processor.local_memory_bytes + RESERVED_BYTES) // program


def _kb(size: int) -> str:
    return f"{size / 1024:.0f} KB"

"""Tile of the Hopper kernel of the FFN block: how it divides pixels over programs, what is valid, how long it takes.

The pixels of a batch are one list. Two partitions of a program, which stays on its processor, take a *tile* of one or
two blocks of 64 pixels at a time, and the hidden channels in steps. What a step needs of the two weight matrices are
two *chunks* in shared memory. `why_invalid` is the one judge of validity, for the planner's choice and for the tuner's
candidates.
"""

from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from itertools import product
from math import ceil

from fusion.planner.graph import ELEMENT_SIZE
from fusion.planner.match import FfnShape
from fusion.planner.processor import Processor, kilobytes, why_other_capability
from fusion.planner.slabs import WIDEST, HopperSlabs
from fusion.planner.tile import CHANNEL_MULTIPLE, KERNEL_DTYPES, MAX_REGISTERS

COMPUTE_CAPABILITY = (9, 0)
WARPS = 4
"""Of a partition: a warpgroup, whose matrix products are Hopper's widest."""
PARTITIONS = 2
BLOCK_PIXELS = 16 * WARPS
WEIGHT_COLUMNS = WIDEST
"""Of the matrix of packed weights; narrower slabs are padded."""
BLOCKS = (2, 1)
HIDDEN = (64, 32, 16)
STAGES = (2, 3, 1)
RING_CHUNKS = (4, 3, 2)
"""Chunks of a weight matrix where not all have room."""
MIN_RING_CHUNKS = 2
"""A chunk is replaced while the next one is used."""
BARRIER_BYTES = 8
COMPILER_BYTES = 440
"""Shared memory that the compiler takes for alignment and for what it passes to the second partition, at most."""
MAX_PIXELS = 2**30
"""The kernel counts them in 32 bits."""

# Fitted to nine measurements on an H200 at batch 128 (tests/planner/test_ffn_tile.py).
LAUNCH_US = 6.0
TILE_US = 0.25
"""Of a tile: what is not hidden behind the products of the other partition."""
NARROW_EXPANSION = 1.5
"""Time of an expansion of fewer than 64 hidden channels over its products': shared memory brings both operands."""
NARROWEST_COST = 1.7
"""Time of a projection to a slab of 16 channels over its products'."""
SHARED_OPERAND = 1.04
"""Time of a tile whose input is read from shared memory for every product over that of one in registers."""


@dataclass(frozen=True)
class FfnWork:
    """Division of a batch: tiles of each partition, and the grid of programs."""

    tiles: int
    grid: int


@dataclass(frozen=True)
class FfnTile(HopperSlabs):
    """One way to run the FFN kernel.

    Each of the two partitions of a program computes `blocks` blocks of 64 pixels together, `hidden` of the hidden
    channels in a step, and has `stages` tiles of its input in shared memory at a time. `expand_chunks` and
    `project_chunks` are how many steps' weights are there, for both partitions: as many as there are steps, then they
    stay, or fewer, then they come from L2 for every tile. With `x_in_registers` 1 the expansion reads its input from
    registers, with 0 from shared memory.
    """

    blocks: int
    hidden: int
    stages: int
    expand_chunks: int
    project_chunks: int
    x_in_registers: int

    def __post_init__(self) -> None:
        for field in fields(self):
            value, least = getattr(self, field.name), int(field.name != "x_in_registers")
            if not isinstance(value, int) or value < least:
                raise ValueError(f"FfnTile: {field.name} must be an integer of {least} or more, got {value!r}")

    @property
    def pixels(self) -> int:
        """Pixels that a partition computes together."""
        return self.blocks * BLOCK_PIXELS

    def work(self, pixels: int, processors: int) -> FfnWork:
        """Division of `pixels` pixels over a GPU of `processors` multiprocessors."""
        program_tiles = ceil(pixels / (PARTITIONS * self.pixels))
        tiles = ceil(program_tiles / processors)
        return FfnWork(tiles, ceil(program_tiles / tiles))

    def to_ints(self) -> list[int]:
        """The fields in order, for operators and files that take integers only; `FfnTile(*ints)` undoes it."""
        return list(astuple(self))


def why_unsupported(shape: FfnShape) -> str | None:
    """Why no tile runs this block on any processor, and what to do instead; None if some tile may."""
    if shape.dtype not in KERNEL_DTYPES:
        return f"dtype {shape.dtype} is not supported, use one of {', '.join(KERNEL_DTYPES)}"
    if shape.activation != "relu":
        return f"activation {shape.activation} is not supported, use relu"
    for name in ("in_channels", "out_channels"):
        if getattr(shape, name) % CHANNEL_MULTIPLE:
            return f"{name}={getattr(shape, name)} is not supported, use a multiple of {CHANNEL_MULTIPLE}"
    if shape.pixels >= MAX_PIXELS:
        return f"{shape.pixels} pixels are too many for a launch, split the batch: {MAX_PIXELS} are the limit"
    return None


def why_malformed(tile: FfnTile, hidden_channels: int) -> str | None:
    """Why the kernel runs no block of so many hidden channels with this tile; None if it may."""
    for name, values in {"blocks": BLOCKS, "hidden": HIDDEN, "x_in_registers": (0, 1)}.items():
        if getattr(tile, name) not in values:
            return f"{name}={getattr(tile, name)} is not one of {', '.join(map(str, sorted(values)))}"
    steps = tile.steps(hidden_channels)
    chunks = tile.expand_chunks, tile.project_chunks
    stay = chunks == (steps, steps)
    rotate = MIN_RING_CHUNKS <= tile.expand_chunks < steps and MIN_RING_CHUNKS <= tile.project_chunks <= steps
    if not stay and not rotate:
        return (
            f"{chunks[0]} and {chunks[1]} chunks of weights do not go with {steps} steps over {hidden_channels} hidden "
            f"channels; use {steps} and {steps}, or at least {MIN_RING_CHUNKS} of each and fewer than {steps}"
        )
    return None


def why_invalid(tile: FfnTile, shape: FfnShape, processor: Processor) -> str | None:
    """Why the kernel cannot, or should not, run `shape` with this tile on `processor`; None if it is valid."""
    general = (
        why_other_capability(processor, COMPUTE_CAPABILITY)
        or why_unsupported(shape)
        or why_malformed(tile, shape.hidden_channels)
    )
    if general:
        return general
    registers = estimated_registers(tile, shape)
    if registers > MAX_REGISTERS:
        return (
            f"about {registers:.0f} registers a thread would spill, {MAX_REGISTERS} are available: the sums of "
            f"{tile.pixels} pixels and {shape.out_channels} output channels stay in registers"
        )
    local = local_memory_bytes(tile, shape, processor)
    if local > processor.local_memory_bytes:
        return (
            f"weights and tiles of {kilobytes(local)} do not fit the {kilobytes(processor.local_memory_bytes)} of "
            f"local memory that {processor.name} has"
        )
    return None


def why_none(shape: FfnShape, processor: Processor) -> str | None:
    """Why no tile runs `shape` on `processor`, as far as the one that asks for least tells; None if some tile may."""
    return why_invalid(_least_tile(shape), shape, processor)


def _least_tile(shape: FfnShape) -> FfnTile:
    chunks = min(MIN_RING_CHUNKS, ceil(shape.hidden_channels / min(HIDDEN)))
    return FfnTile(min(BLOCKS), min(HIDDEN), 1, chunks, chunks, x_in_registers=0)


def local_memory_bytes(tile: FfnTile, shape: FfnShape, processor: Processor) -> int:
    """Shared memory of a program, in bytes: chunks of weights, tiles, biases. The compiler may need some bytes less."""
    in_slabs, out_slabs = tile.in_slabs(shape.in_channels), tile.out_slabs(shape.out_channels)
    in_channels, out_channels = sum(in_slabs), sum(out_slabs)
    weights = tile.hidden * (tile.expand_chunks * in_channels + tile.project_chunks * out_channels)
    outputs = 0 if in_slabs == out_slabs else out_channels  # else the output takes the place of the input
    tiles = PARTITIONS * tile.pixels * (tile.stages * in_channels + outputs)
    biases = tile.padded_hidden(shape.hidden_channels) + out_channels
    barriers = 2 * tile.expand_chunks + tile.project_chunks + PARTITIONS * tile.stages
    elements = ELEMENT_SIZE[shape.dtype] * (weights + tiles + biases)
    return elements + BARRIER_BYTES * barriers + COMPILER_BYTES


def estimated_registers(tile: FfnTile, shape: FfnShape) -> float:
    """32-bit registers a thread: fp32 sums of 16 pixels a warp, 16-bit operands, and addresses of every slab."""
    in_slabs, out_slabs = tile.in_slabs(shape.in_channels), tile.out_slabs(shape.out_channels)
    sums = tile.blocks * (sum(out_slabs) + tile.hidden) / 2
    operands = (tile.hidden + tile.blocks * tile.x_in_registers * sum(in_slabs)) / 4
    return sums + operands + 6 * (len(in_slabs) + len(out_slabs)) + 20


def programs_per_processor(tile: FfnTile, shape: FfnShape, processor: Processor) -> int:
    """Programs that a streaming multiprocessor holds at a time: two partitions take all its registers."""
    return 1


def predicted_us(tile: FfnTile, shape: FfnShape, processor: Processor) -> float:
    """Predicted duration of a launch in microseconds.

    A fixed cost, and tiles one after the other: the products of both partitions, and what nothing hides. With a single
    stage a tile waits for its input and output. No less than the activations take through DRAM.
    """
    in_slabs, out_slabs = tile.in_slabs(shape.in_channels), tile.out_slabs(shape.out_channels)
    expansion = sum(in_slabs) * (1 if tile.hidden == max(HIDDEN) else NARROW_EXPANSION)
    projection = sum(slab * (NARROWEST_COST if slab == 16 else 1) for slab in out_slabs)
    ops = 2 * PARTITIONS * tile.pixels * tile.padded_hidden(shape.hidden_channels) * (expansion + projection)
    tile_us = TILE_US + ops / (processor.peak_ops / processor.processors) * 1e6
    tile_us *= 1 if tile.x_in_registers else SHARED_OPERAND
    pixel_us = shape.pixel_bytes / processor.bandwidth * 1e6  # through DRAM
    if tile.stages == 1:
        tile_us += PARTITIONS * tile.pixels * processor.processors * pixel_us
    tiles = tile.work(shape.pixels, processor.processors).tiles
    return LAUNCH_US + max(tiles * tile_us, shape.pixels * pixel_us)


def candidate_tiles(shape: FfnShape, processor: Processor) -> Iterator[FfnTile]:
    """Every valid tile worth a measurement: weights stay where they have room, else rings are as deep as they can."""
    for blocks, hidden, stages, x_in_registers in product(BLOCKS, HIDDEN, STAGES, (1, 0)):
        steps = ceil(shape.hidden_channels / hidden)
        chunks = [(steps, steps)]
        chunks += sorted(product(RING_CHUNKS, RING_CHUNKS), key=lambda pair: (-sum(pair), pair))
        tiles = (FfnTile(blocks, hidden, stages, *pair, x_in_registers) for pair in chunks)
        tile = next((tile for tile in tiles if why_invalid(tile, shape, processor) is None), None)
        if tile is not None:
            yield tile

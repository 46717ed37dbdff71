"""How long the Hopper variant of the ConvFirst kernel should take, and which of its tiles are worth a measurement."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from math import ceil

from fusion.planner.graph import ELEMENT_SIZE
from fusion.planner.hopper_tile import (
    BLOCK_PIXELS,
    HIDDEN,
    JOB_ROWS,
    MIN_CHUNKS,
    PIECE,
    PIXELS,
    SLABS,
    HopperTile,
    programs_in_local_memory,
    programs_per_processor,
    why_invalid,
)
from fusion.planner.match import ConvFirstShape
from fusion.planner.processor import Processor

PIECE_CYCLES = 6 * 20.6 + 6 * 24.3
"""Products of a piece for 64 pixels of two rows, 16 and 32 columns wide: shared memory brings both operands."""
LEAST_PRODUCT_CYCLES = 13.5
"""Of a product of 64 rows and a depth of 16 whose left operand is in registers."""
COLUMN_CYCLES = 0.5
"""Of such a product, for each column: what the tensor cores need."""
OPS_PER_CYCLE = 4096
"""Of a processor's tensor cores, 16-bit. So the peak tells the clock."""

# Fitted to 48 measurements on an H200 at batch 128 (in bench/results/h200 convfirst*.json, compile*.json and v12 of
# convfirst_hopper_exploration.json; tests/planner/test_hopper_time.py): 7 % off (root mean square).
LAUNCH_US = 4.0
PRODUCT_SHARE = 0.92
"""Part of the products' time, those of all partitions of a processor, that is not hidden behind other work."""
BLOCK_US = 0.155
"""Of a block of 64 pixels of two rows: what nothing hides of its beginning and end."""
PIECE_US = 0.158
"""The same for each piece of the convolution."""
STEP_US = 0.02
"""The same for each step over the hidden channels."""
STREAM_STEP_US = 0.06
"""More of a step whose weights are streamed: both partitions wait for a chunk, and free it."""

STAGES = (3, 2, 4)
"""Of tiles with equal predictions the planner takes the first. On the H200 three stages were faster than two, wide
slabs than narrow ones, and two programs than one of two partitions."""
PROGRAMS = (2, 3, 4, 6)
"""On a processor. A program alone is for where there is no room, or no work, for two."""
MIN_ADVISABLE_CHUNKS = 3
MOST_PADDING = 2
"""Channels of the ring's slabs over those of the input, up to which a wider slab is worth a measurement."""


def predicted_us(tile: HopperTile, shape: ConvFirstShape, processor: Processor) -> float:
    """Predicted duration of a launch in microseconds.

    A fixed cost, and blocks of pixels one after the other: each takes a share of the time of the products of all
    partitions that the processor works on, and what nothing hides. No less than streamed weights take through L2, and
    the activations through DRAM.
    """
    work = tile.work(shape.batch, shape.height, shape.width, processor.processors)
    load = ceil(work.grid / processor.processors)
    resident = min(load, programs_per_processor(tile, shape, processor))
    steps, pieces = tile.steps(shape.hidden_channels), ceil(shape.in_channels / PIECE)
    clock_us = OPS_PER_CYCLE * processor.processors / processor.peak_ops * 1e6
    products = pieces * PIECE_CYCLES + JOB_ROWS * steps * _step_cycles(tile, shape)
    block_us = BLOCK_US + PIECE_US * pieces + STEP_US * steps
    block_us += PRODUCT_SHARE * resident * tile.partitions * products * clock_us
    if tile.weight_chunks:
        block_us += STREAM_STEP_US * steps
        chunk_bytes = ELEMENT_SIZE[shape.dtype] * tile.chunk_elements(shape.in_channels, shape.out_channels)
        block_us = max(block_us, steps * chunk_bytes * processor.processors / processor.global_bandwidth * 1e6)
    blocks = work.jobs * tile.pixels // BLOCK_PIXELS
    dram_us = shape.activation_bytes / processor.bandwidth * 1e6
    return LAUNCH_US + max(ceil(load / resident) * blocks * block_us, dram_us)


def _step_cycles(tile: HopperTile, shape: ConvFirstShape) -> float:
    """Products of a step for 64 pixels of a row."""
    expand = sum(tile.in_slabs(shape.in_channels)) / PIECE * _product_cycles(tile.hidden)
    project = tile.hidden / PIECE * sum(map(_product_cycles, tile.out_slabs(shape.out_channels)))
    return expand + project


def _product_cycles(columns: int) -> float:
    return max(LEAST_PRODUCT_CYCLES, COLUMN_CYCLES * columns)


def candidate_tiles(shape: ConvFirstShape, processor: Processor) -> Iterator[HopperTile]:
    """Every valid tile worth a measurement: one whose programs find room in local memory, and work.

    Programs of two partitions come last: for where there is no room for three of one.
    """
    pairs = []
    for pixels, hidden, slab, stages in product(PIXELS, HIDDEN, _slabs(shape.in_channels), STAGES):
        alone = HopperTile(pixels, hidden, stages, 1, 1, slab, weight_chunks=0)
        tiles = [replace(alone, programs=programs) for programs in PROGRAMS]
        tiles = [tile for tile in tiles if _is_useful(tile, shape, processor)] or [alone]
        if tiles[-1].programs <= min(PROGRAMS):
            pair = replace(alone, partitions=2)
            stays = why_invalid(pair, shape, processor) is None
            pairs += [pair] if stays else _streamed(pair, shape, processor)
        yield from (tile for tile in tiles if why_invalid(tile, shape, processor) is None)
    yield from pairs


def _slabs(channels: int) -> list[int]:
    """Widths of slabs of the ring, widest first: that which pads least, and wider ones that do not pad too much.

    Of those that pad alike the widest.
    """
    widest = {ceil(channels / slab) * slab: slab for slab in SLABS}
    fit = [slab for padded, slab in widest.items() if padded == min(widest) or padded < MOST_PADDING * channels]
    return sorted(fit, reverse=True)


def _is_useful(tile: HopperTile, shape: ConvFirstShape, processor: Processor) -> bool:
    if why_invalid(tile, shape, processor) or tile.programs > programs_in_local_memory(tile, shape, processor):
        return False
    image = shape.batch, shape.height, shape.width, processor.processors
    return tile.work(*image) != replace(tile, programs=tile.programs - 1).work(*image)


def _streamed(pair: HopperTile, shape: ConvFirstShape, processor: Processor) -> list[HopperTile]:
    """Numbers of chunks that divide the steps, where a chunk's place is known in advance, or else the most that fit."""
    steps = pair.steps(shape.hidden_channels)
    tiles = [replace(pair, weight_chunks=chunks) for chunks in range(MIN_CHUNKS, steps)]
    valid = [tile for tile in tiles if why_invalid(tile, shape, processor) is None]
    return [
        tile for tile in valid if tile.weight_chunks >= MIN_ADVISABLE_CHUNKS and steps % tile.weight_chunks == 0
    ] or valid[-1:]

"""How long the Hopper variant of the ConvFirst kernel should take, and which of its tiles are worth a measurement."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from math import ceil

from fusion.planner.graph import ELEMENT_SIZE
from fusion.planner.hopper_tile import (
    BLOCK_PIXELS,
    CONV_ELEMENTS,
    GROUP_WIDTH,
    HIDDEN,
    JOB_ROWS,
    PIXELS,
    HopperTile,
    estimated_registers,
    programs_in_local_memory,
    programs_per_processor,
    why_invalid,
)
from fusion.planner.match import ConvFirstShape
from fusion.planner.processor import Processor
from fusion.planner.tile import MAX_REGISTERS

# Fitted to eleven measurements on an H200 at batch 128 (tests/planner/test_hopper_time.py), about 11 % rms.
LAUNCH_US = 4.6
GROUP_US = 0.4
"""Convolution of a group of 8 channels, for 64 pixels of two rows: loads, two products and the wait for them."""
STEP_US = 0.07
"""A step of the loop over hidden channels, for 64 pixels of two rows: products of a warpgroup and the wait for them."""
WARP_STEP_US = 0.01
"""The same with products of a warp each."""
PRODUCT_SHARE = 0.47
"""Part of the matrix products' time, those of all programs of a processor, that is not hidden behind other work."""
WARP_PRODUCT_COST = 2
"""Time of a warp's products over that of a warpgroup's."""
MOST_WARP_PRODUCT_CHANNELS = 32
"""Input channels up to which products of a warp each may pay."""
CREWS = (*((1, programs) for programs in range(1, 6)), (2, 1))
"""Partitions and programs: two partitions take all registers of a processor."""


def predicted_us(tile: HopperTile, shape: ConvFirstShape, processor: Processor) -> float:
    """Predicted duration of a launch in microseconds.

    A fixed cost, and jobs one after the other: each takes the latency of its dependent products, and a share of the
    tensor cores' time for the products of all partitions that the processor works on. No less than the activations
    take through DRAM.
    """
    work = tile.work(shape.batch, shape.height, shape.width, processor.processors)
    load = ceil(work.grid / processor.processors)
    resident = min(load, programs_per_processor(tile, shape, processor))
    steps = tile.steps(shape.hidden_channels) * (WARP_STEP_US if tile.warp_products else STEP_US)
    groups = shape.in_channels // GROUP_WIDTH
    latency_us = tile.pixels / BLOCK_PIXELS * (GROUP_US * groups + steps)
    conv = groups * CONV_ELEMENTS // JOB_ROWS
    channels = sum(tile.in_slabs(shape.in_channels)) + sum(tile.out_slabs(shape.out_channels))
    ffn = tile.padded_hidden(shape.hidden_channels) * channels * (WARP_PRODUCT_COST if tile.warp_products else 1)
    product_ops = 2 * JOB_ROWS * tile.pixels * tile.partitions * resident * (conv + ffn)
    product_us = product_ops / (processor.peak_ops / processor.processors) * 1e6
    spill = max(1.0, estimated_registers(tile, shape) / MAX_REGISTERS) ** 0.5
    job_us = spill * max(latency_us + PRODUCT_SHARE * product_us, product_us)
    pixels = shape.batch * shape.height * shape.width
    dram_bytes = ELEMENT_SIZE[shape.dtype] * pixels * (shape.in_channels + shape.out_channels)
    return LAUNCH_US + max(ceil(load / resident) * work.jobs * job_us, dram_bytes / processor.bandwidth * 1e6)


def candidate_tiles(shape: ConvFirstShape, processor: Processor) -> Iterator[HopperTile]:
    """Every valid tile worth a measurement: one whose programs find room in local memory, and work."""
    warp_products = (0, 1) if shape.in_channels <= MOST_WARP_PRODUCT_CHANNELS else (0,)
    loads = (*((stages, 1) for stages in (3, 4)), *((stages, 0) for stages in (3, 2)))
    for pixels, hidden, (stages, bulk), crew, warps in product(PIXELS, HIDDEN, loads, CREWS, warp_products):
        tile = HopperTile(pixels, hidden, stages, *crew, warps, bulk)
        if why_invalid(tile, shape, processor) is None and _needs_programs(tile, shape, processor):
            yield tile


def _needs_programs(tile: HopperTile, shape: ConvFirstShape, processor: Processor) -> bool:
    if tile.programs == 1:
        return True
    if tile.programs > programs_in_local_memory(tile, shape, processor):
        return False
    image = shape.batch, shape.height, shape.width, processor.processors
    return tile.work(*image) != replace(tile, programs=tile.programs - 1).work(*image)

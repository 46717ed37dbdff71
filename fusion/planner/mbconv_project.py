"""The second of the two portable MBConv kernels, which gates and projects: its part of a tile, and its time.

Blocks of either stride end with it. Their shapes have `height` and `width` of the hidden tensor here, which are those
of the output.
"""

from collections.abc import Iterator
from itertools import product
from math import ceil

from fusion.planner.graph import ELEMENT_SIZE
from fusion.planner.match import MBConvShape
from fusion.planner.processor import Processor
from fusion.planner.slabs import NARROWEST, slab_widths
from fusion.planner.tile import (
    MAX_REGISTERS,
    MAX_WARPS_PER_PROCESSOR,
    MIN_HIDDEN_STEPS,
    TENSOR_MEMORY_LANES,
    WARP_SIZE,
    WIDEST_OUTPUT_SLAB,
)

MAX_EXCITE_ELEMENTS = 4096
"""Of a weight of squeeze-and-excitation that are read together."""

# Fitted to launches of single kernels on an H200, blocks of 128 and 256 channels at batch 128: predictions are 15 % off
# (root mean square; no record).
LAUNCH_US = 2.5
"""Of each kernel, in a CUDA graph: start, first loads and tail. Chosen, not fitted."""
PROJECT_COST = 1.5
"""Time of the projection over its products'."""
PROJECT_BYTES_COST = 0.44
"""Part of the time of the kernel's bytes, at the L2 cache's bandwidth, that is not hidden."""
PROJECT_STEP_US = 0.06
GATE_STEP_US = 0.18
"""One round of gates."""


class ProjectTile:
    """What follows from the fields of the second kernel, `project_...`, and from `hidden`, the first one's step."""

    def padded_hidden(self, hidden_channels: int) -> int:
        """Hidden channels that are computed: whole steps of both kernels, `MIN_HIDDEN_STEPS` of the second's."""
        return ceil(hidden_channels / self._unit) * self._unit

    def padded_squeeze(self, squeeze_channels: int) -> int:
        """Length of the squeeze vector, a power of two."""
        return max(NARROWEST, 1 << (squeeze_channels - 1).bit_length())

    def gates(self, squeeze_channels: int) -> int:
        """Gates that a program of the second kernel computes together."""
        return max(1, min(self._unit, MAX_EXCITE_ELEMENTS // self.padded_squeeze(squeeze_channels)))

    @property
    def _unit(self) -> int:
        return max(self.hidden, MIN_HIDDEN_STEPS * self.project_hidden)

    def out_programs(self, out_channels: int) -> int:
        """Programs of the second kernel that share the output channels of a pixel."""
        return ceil(out_channels / self.project_out)

    def out_slabs(self, out_channels: int) -> tuple[int, ...]:
        """Slabs that one of them accumulates; those of all are equal."""
        return slab_widths(ceil(out_channels / self.out_programs(out_channels)), WIDEST_OUTPUT_SLAB)

    def padded_out(self, out_channels: int) -> int:
        """Output channels that are computed."""
        return self.out_programs(out_channels) * sum(self.out_slabs(out_channels))

    def project_programs(self, height: int, width: int, out_channels: int) -> int:
        """Programs of the second kernel for an image of `height x width` pixels of output."""
        return ceil(height * width / self.project_pixels) * self.out_programs(out_channels)


def project_fields(shape: MBConvShape) -> Iterator[tuple[int, int, int, int, int]]:
    """Ways to run the second kernel: pixels, hidden and output channels, warps, stages; they may not be valid."""
    outs = [out for out in (256, 128, 64, 32, 16) if out < 2 * shape.out_channels or out == 16]
    for stages, pixels, hidden, out, warps in product((3, 4), (64, 128, 32, 16), (64, 32), outs, (4, 8, 2)):
        yield pixels, hidden, out, warps, stages


def project_bytes(tile: ProjectTile, shape: MBConvShape, processor: Processor) -> int:
    """Shared memory of a program of the second kernel, in bytes."""
    out = sum(tile.out_slabs(shape.out_channels))
    excite = tile.project_stages * tile.gates(shape.squeeze_channels) * tile.padded_squeeze(shape.squeeze_channels)
    project = tile.project_stages * tile.project_hidden * (tile.project_pixels + out + 1)
    if uses_tensor_memory(processor):
        project += tile.project_pixels * tile.project_hidden
    return ELEMENT_SIZE[shape.dtype] * max(excite, project)


def project_columns(tile: ProjectTile, shape: MBConvShape) -> int:
    """Upper bound on the columns of tensor memory, where sums are kept there."""
    return ceil(tile.project_pixels / TENSOR_MEMORY_LANES) * sum(tile.out_slabs(shape.out_channels))


def project_registers(tile: ProjectTile, shape: MBConvShape) -> float:
    """Estimated 32-bit registers a thread of the second kernel."""
    excite = 1.5 * tile.gates(shape.squeeze_channels) * tile.padded_squeeze(shape.squeeze_channels)
    sums = tile.project_pixels * sum(tile.out_slabs(shape.out_channels))
    gated = tile.project_pixels * tile.project_hidden
    return max(excite, sums + gated) / (tile.project_warps * WARP_SIZE) + 40


def project_occupancy(tile: ProjectTile, shape: MBConvShape, processor: Processor) -> int:
    """Programs of the second kernel that a streaming multiprocessor holds at a time."""
    registers, local = project_registers(tile, shape), project_bytes(tile, shape, processor)
    return occupancy(registers, local, tile.project_warps, processor)


def project_us(tile: ProjectTile, shape: MBConvShape, processor: Processor, images: int, occupancy: int) -> float:
    """Predicted duration of a launch of the second kernel on so many images, in microseconds."""
    hidden, out_slabs = tile.padded_hidden(shape.hidden_channels), tile.out_slabs(shape.out_channels)
    out, squeeze = sum(out_slabs), tile.padded_squeeze(shape.squeeze_channels)
    ops = 2 * tile.project_pixels * hidden * out
    elements = hidden * (tile.project_pixels + out + squeeze) + 2 * tile.project_pixels * out
    work_us = PROJECT_COST * ops / processor.peak_ops * 1e6
    bytes_us = PROJECT_BYTES_COST * ELEMENT_SIZE[shape.dtype] * elements / processor.global_bandwidth * 1e6
    steps_us = GATE_STEP_US * hidden / tile.gates(shape.squeeze_channels)
    steps_us += PROJECT_STEP_US * hidden / tile.project_hidden * (1 + len(out_slabs))
    programs = images * tile.project_programs(shape.height, shape.width, shape.out_channels)
    return launch_us(processor, programs, work_us, bytes_us, steps_us, project_registers(tile, shape), occupancy)


def launch_us(
    processor: Processor,
    programs: int,
    work_us: float,
    bytes_us: float,
    steps_us: float,
    registers: float,
    occupancy: float,
) -> float:
    """Of a kernel with so many programs: work and bytes of one at the rates of the whole GPU, and its steps.

    `occupancy` is how many of them a streaming multiprocessor holds at a time, on average, where that is less than one.
    """
    waves = max(1.0, programs / (processor.processors * occupancy))
    busy = min(1.0, programs / processor.processors, occupancy)
    spill = max(1.0, registers / MAX_REGISTERS) ** 0.5
    return LAUNCH_US + spill * (programs * (work_us / busy + bytes_us) + waves * steps_us)


def occupancy(registers: float, local: int, warps: int, processor: Processor) -> int:
    """Programs that a streaming multiprocessor holds at a time, from what one uses: registers a thread, bytes of shared
    memory, warps."""
    limits = (
        int(processor.registers_per_processor // (min(registers, MAX_REGISTERS) * warps * WARP_SIZE)),
        processor.local_memory_bytes // local,
        MAX_WARPS_PER_PROCESSOR // warps,
    )
    return max(1, min(limits))


def uses_tensor_memory(processor: Processor) -> bool:
    """Whether matrix products accumulate in tensor memory."""
    return processor.compute_capability[0] == 10

"""Tile of the stride-2 ConvFirst kernel: what may be chosen, what is valid, and how long it should take.

Everything here is arithmetic on shapes and processors. `why_invalid` is the one judge of validity, for the planner's
choice and for the tuner's candidates.
"""

from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from itertools import product
from math import ceil

from fusion.planner import tile as stride_1
from fusion.planner.graph import ELEMENT_SIZE
from fusion.planner.match import ConvFirstDownShape
from fusion.planner.processor import Processor
from fusion.planner.slabs import slab_widths
from fusion.planner.tile import (
    LAUNCH_US,
    MAX_REGISTERS,
    MAX_WARPS_PER_PROCESSOR,
    MIN_HIDDEN_STEPS,
    MIN_STAGES,
    SPILL_ALLOWANCE,
    TENSOR_MEMORY_COLUMNS,
    TENSOR_MEMORY_LANES,
    WARP_SIZE,
    WIDEST_OUTPUT_SLAB,
    operands_in_memory,
    portable_work,
    uses_tensor_memory,
    work_us,
)

TAPS = 25
"""Of the grouped 5x5 convolution that the 3x3 one and the blur-pool are together."""
BORDERS = 9
"""Kinds of output pixels that have taps of their own: inner, first and last rows times such columns."""
MIN_SIZE = 2
"""Pixels that reflection needs in each direction."""
COPY_BYTES = (16, 8)
"""Of the copies from global to shared memory. Those of 8 bytes go through the L1 cache, which serves the overlaps of
neighbouring views; those of 16 bytes, half as many, take all from L2."""


@dataclass(frozen=True)
class ConvFirstDownTile:
    """One way to run the stride-2 ConvFirst kernel.

    A program computes `pixels` output pixels, `hidden` of the hidden channels at a time, with `warps` warps. The
    convolution works in slabs of at most `conv_slab` input channels; `conv_stages` and `ffn_stages` are the depths of
    the software pipelines of its loop over taps and of the loop over hidden channels. Input is copied in pieces of
    `copy_bytes`.
    """

    pixels: int
    hidden: int
    conv_slab: int
    warps: int
    conv_stages: int = 3
    ffn_stages: int = 3
    copy_bytes: int = 16

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"ConvFirstDownTile: {field.name} must be a positive integer, got {value!r}")

    def in_slabs(self, in_channels: int) -> tuple[int, ...]:
        """Slabs of the input, of which the convolution makes twice as many channels: blurred input and output."""
        return slab_widths(in_channels, self.conv_slab)

    def out_slabs(self, out_channels: int) -> tuple[int, ...]:
        """Slabs that the projection accumulates."""
        return slab_widths(out_channels, WIDEST_OUTPUT_SLAB)

    def splits_groups(self, in_channels: int, group_width: int) -> bool:
        """Whether a group of the convolution would lie in two slabs, which the kernel cannot do."""
        return any(slab % group_width for slab in self.in_slabs(in_channels))

    def padded_hidden(self, hidden_channels: int) -> int:
        """Hidden channels that the kernel computes: whole steps of the loop, and at least `MIN_HIDDEN_STEPS`."""
        return max(MIN_HIDDEN_STEPS, ceil(hidden_channels / self.hidden)) * self.hidden

    def programs(self, batch: int, height: int, width: int) -> int:
        """Number of programs for inputs of this size: pixels of all images together, each kind of border by itself."""
        return sum(-(-batch * rows * columns // self.pixels) for _, rows, _, columns in regions(height, width))

    def to_ints(self) -> list[int]:
        """The fields in order, for operators and files that take integers only; `ConvFirstDownTile(*ints)` undoes
        it."""
        return list(astuple(self))


def regions(height: int, width: int) -> tuple[tuple[int, int, int, int], ...]:
    """First row, rows, first column and columns of the output pixels of each of the `BORDERS`, for an input's size.

    Rows are inner ones, the first one, and the last one of an odd number of input rows, in this order, and so are
    columns; a region may be empty. An even number of input rows ends with an inner one: its blur reflects nothing.
    """
    return tuple((*rows, *columns) for rows in _ranges(height) for columns in _ranges(width))


def _ranges(size: int) -> tuple[tuple[int, int], ...]:
    outputs, is_odd = (size + 1) // 2, size % 2
    return (1, outputs - 1 - is_odd), (0, 1), (outputs - 1, is_odd)


def why_unsupported(shape: ConvFirstDownShape) -> str | None:
    """Why no tile runs this block, and what to do instead; None if some tile may."""
    if min(shape.height, shape.width) < MIN_SIZE:
        return f"{shape.height}x{shape.width} pixels cannot be blur-pooled: reflection needs {MIN_SIZE} each way"
    return stride_1.why_unsupported(shape)


def why_malformed(tile: ConvFirstDownTile) -> str | None:
    """Why the kernel gives right results for no block with this tile; None if it may."""
    for name in ("pixels", "hidden", "conv_slab", "warps"):
        if getattr(tile, name) & (getattr(tile, name) - 1):
            return f"{name}={getattr(tile, name)} is not a power of two"
    if min(tile.pixels, tile.hidden, tile.conv_slab) < 16:
        return "a matrix product needs at least 16 pixels, 16 hidden channels and slabs of 16 channels"
    if min(tile.conv_stages, tile.ffn_stages) < MIN_STAGES:
        return f"loops must be pipelined, in {MIN_STAGES} stages at least"
    if tile.warps > 16:
        return f"{tile.warps} warps are more than a program may have, 16"
    if tile.copy_bytes not in COPY_BYTES:
        return f"copies of {tile.copy_bytes} bytes are not supported, use {' or '.join(map(str, COPY_BYTES))}"
    return None


def why_invalid(tile: ConvFirstDownTile, shape: ConvFirstDownShape, processor: Processor) -> str | None:
    """Why the kernel cannot, or should not, run `shape` with this tile on `processor`; None if it is valid."""
    general = why_unsupported(shape) or why_malformed(tile)
    if general:
        return general
    if tile.pixels < 8 * tile.warps:
        return f"{tile.warps} warps are too many for {tile.pixels} pixels"
    if tile.splits_groups(shape.in_channels, shape.group_width):
        return f"slabs {tile.in_slabs(shape.in_channels)} split groups of {shape.group_width} channels"
    local = local_memory_bytes(tile, shape, processor)
    if local > processor.local_memory_bytes:
        return f"{local} bytes of local memory are more than {processor.name} has, {processor.local_memory_bytes}"
    columns = tensor_memory_columns(tile, shape, processor)
    if columns > TENSOR_MEMORY_COLUMNS:
        return f"about {columns} columns of tensor memory are more than there are, {TENSOR_MEMORY_COLUMNS}"
    registers = estimated_registers(tile, shape)
    if registers > SPILL_ALLOWANCE * MAX_REGISTERS:
        return f"about {registers:.0f} registers a thread would spill, {MAX_REGISTERS} are available"
    return None


def why_none(shape: ConvFirstDownShape, processor: Processor) -> str | None:
    """Why no tile runs `shape` on `processor`; None if some tile does."""
    if next(candidate_tiles(shape, processor), None) is not None:
        return None
    return why_unsupported(shape) or "its channels need more registers or shared memory than a processor has"


def local_memory_bytes(tile: ConvFirstDownTile, shape: ConvFirstDownShape, processor: Processor) -> int:
    """Shared memory of a program, in bytes: the operands in flight of the hungrier of its two loops.

    Operands come on top that only some processors have there (`operands_in_memory`).
    """
    widest = max(tile.in_slabs(shape.in_channels))
    conv = tile.conv_stages * widest * (tile.pixels + 2 * widest)
    ffn = tile.ffn_stages * tile.hidden * _expanded_and_out(tile, shape)
    convolved = 2 * sum(tile.in_slabs(shape.in_channels))
    operands = operands_in_memory(tile.pixels, tile.warps, convolved, tile.hidden, processor)
    return ELEMENT_SIZE[shape.dtype] * (max(conv, ffn) + operands)


def tensor_memory_columns(tile: ConvFirstDownTile, shape: ConvFirstDownShape, processor: Processor) -> int:
    """Upper bound on the columns of tensor memory that a program's sums take; 0 where registers hold them."""
    if not uses_tensor_memory(tile.pixels, tile.warps, processor):
        return 0
    slabs = tile.in_slabs(shape.in_channels)
    columns = _expanded_and_out(tile, shape) + len(slabs) * tile.hidden
    return ceil(tile.pixels / TENSOR_MEMORY_LANES) * columns


def estimated_registers(tile: ConvFirstDownTile, shape: ConvFirstDownShape) -> float:
    """32-bit registers a thread: fp32 sums of outputs, 16-bit input of the FFN, hidden channels, and addresses."""
    pixels_a_thread = tile.pixels / (tile.warps * WARP_SIZE)
    channels = sum(tile.out_slabs(shape.out_channels)) + sum(tile.in_slabs(shape.in_channels)) + 1.5 * tile.hidden
    return pixels_a_thread * channels + 40


def programs_per_processor(tile: ConvFirstDownTile, shape: ConvFirstDownShape, processor: Processor) -> int:
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


def predicted_us(tile: ConvFirstDownTile, shape: ConvFirstDownShape, processor: Processor) -> float:
    """Predicted duration of a launch in microseconds.

    The terms are those of the stride-1 kernel (`fusion.planner.tile`), with its constants, for 25 views of the input
    and their taps. `copy_bytes` makes no difference: what the L1 cache saves is left to measurements.
    """
    work = portable_work(
        tile,
        shape,
        tile.programs(shape.batch, shape.height, shape.width),
        estimated_registers(tile, shape),
        programs_per_processor(tile, shape, processor),
        views=TAPS,
        outputs=2,
        ffn_channels=_expanded_and_out(tile, shape),
    )
    return LAUNCH_US + max(work_us(work, processor), shape.activation_bytes / processor.bandwidth * 1e6)


def candidate_tiles(shape: ConvFirstDownShape, processor: Processor) -> Iterator[ConvFirstDownTile]:
    """Every valid tile worth a measurement."""
    pipelines = ((3, 3), (4, 2), (5, 3), (2, 2))
    for stages, copy_bytes, pixels, hidden, conv_slab, warps in product(
        pipelines, COPY_BYTES, (128, 256, 64, 32, 16), (32, 64, 16, 128), (16, 32, 64), (4, 8, 2, 1)
    ):
        tile = ConvFirstDownTile(pixels, hidden, conv_slab, warps, *stages, copy_bytes)
        is_same_as_narrower = conv_slab > 16 and tile.in_slabs(shape.in_channels) == slab_widths(
            shape.in_channels, conv_slab // 2
        )
        if not is_same_as_narrower and why_invalid(tile, shape, processor) is None:
            yield tile


def _expanded_and_out(tile: ConvFirstDownTile, shape: ConvFirstDownShape) -> int:
    return 2 * sum(tile.in_slabs(shape.in_channels)) + sum(tile.out_slabs(shape.out_channels))

"""Tile of the Hopper kernel of the stride-2 MBConv block: how it divides an image, what is valid, how long it takes.

A program computes a whole image with all its hidden channels (`fusion.triton_kernels.mbconv_down_hopper`), as that of
stride 1 does (`mbconv_hopper_tile`). `why_invalid` is the one judge of validity, for the planner's choice and for the
tuner's candidates.
"""

from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from itertools import product
from math import ceil

from fusion.planner.graph import ELEMENT_SIZE
from fusion.planner.match import MBConvDownShape
from fusion.planner.mbconv_hopper_tile import (
    BIAS_CHANNELS,
    BYTES_PER_US,
    COMPILER_BYTES,
    COMPUTE_CAPABILITY,
    FEWEST_TILES,
    GATE_BYTES_PER_US,
    GRAPH_SHARE_US,
    GROUP_REGISTERS,
    LAUNCH_US,
    LOCAL_MEMORY_BYTES,
    MAX_STAGES,
    MAX_TILES,
    MAX_TILES_AT_ONCE,
    MIN_STAGES,
    PASS_REGISTERS,
    PIECE_US,
    PRODUCT_CHANNELS,
    ROWS,
    STAGE_US,
    STEPS,
    SWEEP,
    TILE_PIXELS,
    TRIED_STAGES,
    WARPS,
    SweptChannels,
    images_us,
    ring_us,
    rounds,
    spilled_us,
    taps_pieces,
    why_block_unsupported,
    why_no_room,
)
from fusion.planner.processor import Processor, why_other_capability
from fusion.planner.slabs import slab_widths

PIECE = MAX_TILES_AT_ONCE
"""Tiles that are expanded together."""
MIN_PIECES = 2
MAX_ROWS = 2 * ROWS
MAX_COLUMNS = 32
# Fitted to nine blocks on an H200 and an H100 at batch 128 (compile*.json and network.json in bench/results): 6 % off
# (root mean square). All other terms are those of stride 1.
DOWN_TILE_US = 0.1
"""Of a sweep and a tile: expanded, activated, and a quarter of its pixels convolved."""
BLURRED_TILE_US = 0.21
"""The same if all its pixels are convolved, and blurred."""
DEPTH_US = 0.008
"""Of a sweep, a tile and a product of depth 16 of the expansion."""
GOOD_STAGES = 6
"""As many as are good where a pass of the stride-1 kernel has pixels for all warps."""


@dataclass(frozen=True)
class MBConvDownHopperTile(SweptChannels):
    """One way to run the Hopper kernel of the stride-2 MBConv block.

    The projection takes `step` hidden channels at a time, and the weights of `stages` steps are on their way together.
    All hidden channels stay in shared memory if `resident` is 1; with 0 they go to global memory and come back.

    How an image is divided follows from its size: each of eight lanes of a warp has two rows of up to 16, or four of up
    to 32, and a *tile* is two rows of all lanes of a column.
    """

    step: int
    stages: int
    resident: int

    def __post_init__(self) -> None:
        for field in fields(self):
            value, least = getattr(self, field.name), int(field.name != "resident")
            if not isinstance(value, int) or value < least:
                raise ValueError(
                    f"MBConvDownHopperTile: {field.name} must be an integer of {least} or more, got {value!r}"
                )

    @property
    def hidden(self) -> int:
        """Hidden channels that are computed together."""
        return SWEEP

    def tiles_of_column(self, height: int) -> int:
        """One if each lane has two rows of the input, two if it has four."""
        return 1 if height <= ROWS else 2

    def columns(self, height: int, width: int) -> int:
        """Columns of the input that are computed: whole pieces, two of them at least."""
        piece = PIECE // self.tiles_of_column(height)
        return piece * max(MIN_PIECES, ceil(width / piece))

    def pieces(self, height: int, width: int) -> int:
        """Pieces that are computed."""
        return self.columns(height, width) * self.tiles_of_column(height) // PIECE

    def in_tiles(self, height: int, width: int) -> int:
        """Tiles of the input that there is room for, a power of two."""
        return _power_of_two(self.pieces(height, width) * PIECE)

    def out_tiles(self, height: int, width: int) -> int:
        """Tiles of the output that there is room for, a power of two; each has two columns, or one of 16 rows."""
        columns_of_tile = 2 // self.tiles_of_column(height)
        return max(FEWEST_TILES, _power_of_two(ceil(self.columns(height, width) / 2 / columns_of_tile)))

    def in_pixels(self, height: int, width: int) -> int:
        """Pixels of the input that there is room for."""
        return TILE_PIXELS * self.in_tiles(height, width)

    def out_pixels(self, height: int, width: int) -> int:
        """Pixels of the output that there is room for."""
        return TILE_PIXELS * self.out_tiles(height, width)

    def splits_last(self, height: int, width: int, hidden_channels: int) -> bool:
        """Whether the last sweep has half of the hidden channels, and each warpgroup half of the columns.

        Not if hidden channels stay in shared memory, where they lie by whole sweeps.
        """
        divisible = self.tiles_of_column(height) == 2 and self.pieces(height, width) % 2 == 0
        return not self.resident and divisible and 0 < hidden_channels % SWEEP <= SWEEP // 2

    def computed_hidden(self, height: int, width: int, hidden_channels: int) -> int:
        """Hidden channels that the kernel computes; the padded weights may have some more."""
        spared = SWEEP // 2 if self.splits_last(height, width, hidden_channels) else 0
        return self.padded_hidden(hidden_channels) - spared

    def passes(self, height: int, width: int, out_channels: int) -> int:
        """Times that all hidden channels are projected, each for other pixels."""
        sums = self.out_pixels(height, width) * sum(self.out_slabs(out_channels)) // (32 * WARPS)
        return 2 if sums > PASS_REGISTERS and self.out_tiles(height, width) == MAX_TILES else 1

    def products(self, out_channels: int) -> tuple[int, ...]:
        """Output channels of each product of the projection."""
        return slab_widths(out_channels, PRODUCT_CHANNELS)

    def sum_registers(self, height: int, width: int, out_channels: int) -> int:
        """Sums of the projection that a thread holds."""
        rows = self.out_pixels(height, width) // self.passes(height, width, out_channels)
        return rows * sum(self.out_slabs(out_channels)) // (32 * WARPS)

    def group(self, height: int, width: int, out_channels: int) -> int:
        """Steps of the projection that follow each other without a wait for their products."""
        return 4 if self.step == min(STEPS) and self._has_room(height, width, out_channels) else 2

    def reads_ahead(
        self, height: int, width: int, in_channels: int, hidden_channels: int, out_channels: int, squeeze_channels: int
    ) -> bool:
        """Whether a step's hidden channels are read before the step before has left its stage: not if there are two."""
        sizes = height, width, in_channels, hidden_channels, out_channels, squeeze_channels
        enough = self.resident or self.hidden_stages(*sizes) > MIN_STAGES
        return bool(enough) and self._has_room(height, width, out_channels)

    def _has_room(self, height: int, width: int, out_channels: int) -> bool:
        """Whether a thread has registers for the operands of several steps of the projection."""
        return self.sum_registers(height, width, out_channels) <= GROUP_REGISTERS

    def input_bytes(self, height: int, width: int, in_channels: int) -> int:
        """The input in shared memory."""
        return 2 * self.in_pixels(height, width) * sum(self.in_slabs(in_channels))

    def output_bytes(self, height: int, width: int, out_channels: int) -> int:
        """The output in shared memory."""
        return 2 * self.out_pixels(height, width) * sum(self.out_slabs(out_channels))

    def other_bytes(self, hidden_channels: int, out_channels: int, squeeze_channels: int) -> int:
        """What is in shared memory all the time: gates, biases, and the constant one of the expansion's bias, in whose
        place shares of the squeeze vector are added afterwards."""
        ones = 2 * TILE_PIXELS * PIECE * BIAS_CHANNELS
        shares = 4 * WARPS * self.squeeze_room(squeeze_channels)
        others = self.gate_bytes(hidden_channels, out_channels, squeeze_channels) - shares
        return max(ones, shares) + others + COMPILER_BYTES

    def room_bytes(self, height: int, width: int, in_channels: int, out_channels: int) -> int:
        """The input, and in its place afterwards the output and the stages of the projection's weights."""
        later = self.output_bytes(height, width, out_channels) + self.weight_bytes(out_channels)
        return max(self.input_bytes(height, width, in_channels), later)

    def hidden_stage_bytes(self, height: int, width: int, out_channels: int) -> int:
        """Hidden channels of a step on their way back from global memory."""
        return 2 * self.step * self.out_pixels(height, width) // self.passes(height, width, out_channels)

    def hidden_stages(
        self, height: int, width: int, in_channels: int, hidden_channels: int, out_channels: int, squeeze_channels: int
    ) -> int:
        """Steps whose hidden channels are on their way together, if they do not stay: as many as have room.

        But fewer than there are steps: ptxas 12.8 crashes on some loops in which nothing is ever loaded again.
        """
        if self.resident:
            return MIN_STAGES
        steps = self.computed_hidden(height, width, hidden_channels) // self.step
        steps *= self.passes(height, width, out_channels)
        taken = self.room_bytes(height, width, in_channels, out_channels)
        taken += self.other_bytes(hidden_channels, out_channels, squeeze_channels)
        room = (LOCAL_MEMORY_BYTES - taken) // self.hidden_stage_bytes(height, width, out_channels)
        return max(MIN_STAGES, min(MAX_STAGES, room, steps - 1))

    def hidden_bytes(
        self, height: int, width: int, in_channels: int, hidden_channels: int, out_channels: int, squeeze_channels: int
    ) -> int:
        """All hidden channels, or the stages in which they come back."""
        if self.resident:
            return 2 * self.out_pixels(height, width) * self.padded_hidden(hidden_channels)
        sizes = height, width, in_channels, hidden_channels, out_channels, squeeze_channels
        return self.hidden_stages(*sizes) * self.hidden_stage_bytes(height, width, out_channels)

    def memory_bytes(
        self, height: int, width: int, in_channels: int, hidden_channels: int, out_channels: int, squeeze_channels: int
    ) -> int:
        """Shared memory of a program."""
        return (
            self.room_bytes(height, width, in_channels, out_channels)
            + self.hidden_bytes(height, width, in_channels, hidden_channels, out_channels, squeeze_channels)
            + self.other_bytes(hidden_channels, out_channels, squeeze_channels)
        )

    def workspace_elements(self, height: int, width: int, hidden_channels: int) -> int:
        """16-bit elements of a program's workspace: its hidden channels, if they do not stay in shared memory."""
        return self.computed_hidden(height, width, hidden_channels) * self.out_pixels(height, width)

    def to_ints(self) -> list[int]:
        """The fields in order, for operators and files that take integers only; the class undoes it."""
        return list(astuple(self))


def why_unsupported(shape: MBConvDownShape) -> str | None:
    """Why no tile runs this block on any processor, and what to do instead; None if some tile may."""
    return why_block_unsupported(shape) or why_not_covering(shape.height, shape.width, shape.blur)


def why_malformed(tile: MBConvDownHopperTile) -> str | None:
    """Why the kernel runs no block with this tile; None if it may."""
    if tile.step not in STEPS:
        return f"step={tile.step} is not one of {', '.join(map(str, STEPS))}"
    if not MIN_STAGES <= tile.stages <= MAX_STAGES:
        return f"stages={tile.stages} is not between {MIN_STAGES} and {MAX_STAGES}"
    if tile.resident > 1:
        return f"resident={tile.resident} is not one of 0, 1"
    return None


def why_not_covering(height: int, width: int, blur: bool) -> str | None:
    """Why no tile fits images of this size; None if all do."""
    if blur and (height % 2 or width % 2):
        return f"images of {height}x{width} pixels are not supported: height and width must be even for a blur-pool"
    if height > MAX_ROWS or width > MAX_COLUMNS:
        return f"images of {height}x{width} pixels are too large: up to {MAX_ROWS}x{MAX_COLUMNS} are supported"
    return None


def why_invalid(tile: MBConvDownHopperTile, shape: MBConvDownShape, processor: Processor) -> str | None:
    """Why the kernel cannot, or should not, run `shape` with this tile on `processor`; None if it is valid."""
    general = why_other_capability(processor, COMPUTE_CAPABILITY) or why_unsupported(shape) or why_malformed(tile)
    if general:
        return general
    return why_no_room(estimated_registers(tile, shape), local_memory_bytes(tile, shape, processor), shape, processor)


def why_none(shape: MBConvDownShape, processor: Processor) -> str | None:
    """Why no tile runs `shape` on `processor`; None if some tile does."""
    reasons = [why_invalid(tiles[-1], shape, processor) for tiles in _candidates()]
    return None if None in reasons else reasons[0]


def local_memory_bytes(tile: MBConvDownHopperTile, shape: MBConvDownShape, processor: Processor) -> int:
    """Shared memory of a program, in bytes. The compiler may need some bytes less."""
    return tile.memory_bytes(*_sizes(shape))


def estimated_registers(tile: MBConvDownHopperTile, shape: MBConvDownShape) -> float:
    """32-bit registers a thread: of the expansion and the convolution, or of the projection."""
    size = shape.height, shape.width
    depth = 16 * tile.depths(shape.in_channels)
    tiles = tile.tiles_of_column(shape.height)
    # Of each tile of a column a window of two columns and sums that the next ones blur; the pool and output columns.
    # Without a blur a window of one column, the pool and sums.
    held = tiles * (2 * 8 + 8) + 12 if shape.blur else tiles * 8 + 16
    produce = depth / 4 + 8 * PIECE + held + 4 * taps_pieces(shape.kernel_size) + 24
    rows = tile.out_pixels(*size) // tile.passes(*size, shape.out_channels)
    divided = max(1, TILE_PIXELS * WARPS // rows)
    project = tile.sum_registers(*size, shape.out_channels)
    project += rows * divided * tile.step / (2 * 32 * WARPS)
    return 30 + max(produce, project)


def programs_per_processor(tile: MBConvDownHopperTile, shape: MBConvDownShape, processor: Processor) -> int:
    """Programs that a streaming multiprocessor holds at a time: eight warps take all its registers."""
    return 1


def predicted_us(tile: MBConvDownHopperTile, shape: MBConvDownShape, processor: Processor) -> float:
    """Predicted duration of a launch in microseconds, in the terms of stride 1 (`mbconv_hopper_tile`)."""
    once = GRAPH_SHARE_US + LAUNCH_US + images_us(shape, shape.activation_bytes, processor)
    return once + rounds(shape, processor) * _program_us(tile, shape, processor)


def _program_us(tile: MBConvDownHopperTile, shape: MBConvDownShape, processor: Processor) -> float:
    image = shape.height, shape.width
    hidden, passes = tile.computed_hidden(*image, shape.hidden_channels), tile.passes(*image, shape.out_channels)
    size, pixels = ELEMENT_SIZE[shape.dtype], tile.out_pixels(*image)
    workspace = 0 if tile.resident else size * hidden * pixels
    l2_bytes = size * hidden * passes * sum(tile.out_slabs(shape.out_channels)) + 2 * workspace
    gate_bytes = size * hidden * 32 * tile.squeeze_depths(shape.squeeze_channels)
    l2_us = l2_bytes / BYTES_PER_US + gate_bytes / GATE_BYTES_PER_US
    pieces = tile.pieces(*image) * tile.sweeps(shape.hidden_channels)
    if tile.splits_last(*image, shape.hidden_channels):
        pieces -= tile.pieces(*image) // 2 - 1
    tile_us = (BLURRED_TILE_US if shape.blur else DOWN_TILE_US) + DEPTH_US * tile.depths(shape.in_channels)
    wait_us = ring_us(tile, hidden, pixels // passes) * passes
    preference = abs(tile.stages - GOOD_STAGES) * STAGE_US + tile.step / max(STEPS) * STAGE_US
    return (
        pieces * (PIECE * tile_us + PIECE_US) + l2_us + spilled_us(shape, workspace, processor) + wait_us + preference
    )


def candidate_tiles(shape: MBConvDownShape, processor: Processor) -> Iterator[MBConvDownHopperTile]:
    """Every valid tile worth a measurement: the most stages that have room, and some other numbers of stages."""
    for tiles in _candidates():
        valid = [tile for tile in tiles if why_invalid(tile, shape, processor) is None]
        yield from dict.fromkeys(valid[:1] + [tile for tile in valid if tile.stages in TRIED_STAGES])


def _power_of_two(size: int) -> int:
    """The least that is not smaller."""
    return 1 << (size - 1).bit_length()


def _sizes(shape: MBConvDownShape) -> tuple[int, int, int, int, int, int]:
    channels = shape.in_channels, shape.hidden_channels, shape.out_channels, shape.squeeze_channels
    return shape.height, shape.width, *channels


def _candidates() -> Iterator[list[MBConvDownHopperTile]]:
    """For each step, and hidden channels that stay or do not, tiles with ever fewer stages."""
    for resident, step in product((1, 0), STEPS):
        yield [MBConvDownHopperTile(step, stages, resident) for stages in range(MAX_STAGES, MIN_STAGES - 1, -1)]

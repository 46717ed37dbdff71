"""Tiles of the Hopper kernel of the MBConv block for larger images, of stride 1 or 2: how they divide images, what is
valid, how long it takes.

A program computes a whole image with all its hidden channels, as that of small images does (`mbconv_hopper_tile`), but
a *window* of 16 rows at a time (`fusion.triton_kernels.mbconv_windows_hopper`). `why_invalid` is the one judge of
validity, for the planner's choice and for the tuner's candidates.
"""

from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from itertools import product
from math import ceil
from typing import ClassVar

from fusion.planner import mbconv_hopper_tile
from fusion.planner.graph import ELEMENT_SIZE
from fusion.planner.match import MBConvDownShape, MBConvShape
from fusion.planner.mbconv_hopper_tile import (
    BIAS_CHANNELS,
    COMPILER_BYTES,
    COMPUTE_CAPABILITY,
    GRAPH_SHARE_US,
    GROUP_REGISTERS,
    LANES,
    LOCAL_MEMORY_BYTES,
    MAX_STAGES,
    MIN_STAGES,
    PRODUCT_CHANNELS,
    STEPS,
    SWEEP,
    TILE_PIXELS,
    WARPS,
    SweptChannels,
    images_us,
    rounds,
    spilled_us,
    taps_pieces,
    why_no_room,
)
from fusion.planner.processor import Processor, why_other_capability
from fusion.planner.slabs import slab_widths
from fusion.planner.tile import MAX_IMAGE_ELEMENTS

MIN_PIECES = 2
PASS_TILES = (8, 16)
"""Of pixels that are projected together: rows of products for all warps."""
TRIED_STAGES = (6, 4, 3, 2)
# Fitted to 18 blocks with 5 to 16 tiles each and to 16 planned ones, on an H200 and an H100 at batch 128
# (mbconv_windows_exploration.json, and mbconv_windows.json and compile.json of the H200, in bench/results): 5 % off
# (root mean square).
LAUNCH_US = 5.6
"""Of a launch: start, first window, gates, tail."""
TILE_US = {(1, 3): 0.097, (1, 5): 0.273, (2, 3): 0.063, (2, 5): 0.15}
"""Of a sweep and a tile, by stride and kernel size: activated and convolved. Of stride 2 a quarter of the pixels is."""
DEPTH_US = 0.012
"""Of a sweep, a tile and a product of depth 16 of the expansion."""
PIECE_US = 0.16
"""Of a sweep and what is expanded together: waits that its tiles share."""
STEP_US = 0.13
"""Of a step of the projection."""
WEIGHT_BYTES_PER_US = 59e3
"""Weights of the projection that a processor reads from L2 meanwhile."""
HIDDEN_BYTES_PER_US = 43e3
"""Hidden channels that a processor writes to and reads from L2."""
SPILLED_SHARE = 0.3
"""Part of the way of hidden channels through DRAM, for which L2 has no room, that is not hidden."""
STAGE_US = 0.01
"""Of a stage more or less than `GOOD_STAGES`, a preference."""
GOOD_STAGES = 4


@dataclass(frozen=True)
class WindowsTile(SweptChannels):
    """What tiles of either stride have.

    Rows of an image are taken in pairs. A window has eight pairs, one in each of eight lanes of a warp, and all
    columns, of which `piece` are expanded together. The projection takes 16 pixels of the output `pass_tiles` times and
    `step` hidden channels together, and the operands of `stages` steps are on their way together.
    """

    piece: int
    pass_tiles: int
    step: int
    stages: int

    STRIDE: ClassVar[int]
    PIECES: ClassVar[tuple[int, ...]]
    """Supported columns of a piece."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{type(self).__name__}: {field.name} must be a positive integer, got {value!r}")

    @property
    def hidden(self) -> int:
        """Hidden channels that are computed together."""
        return SWEEP

    def inner_pairs(self, kernel_size: int) -> int:
        """Of a window's pairs of rows, those of which all neighbours are in it: a 3x3 convolution of stride 2 needs
        none of the rows below a pair."""
        return LANES - (1 if (self.STRIDE, kernel_size) == (2, 3) else 2)

    def windows(self, height: int, kernel_size: int) -> int:
        """Windows of an image: from one to the next its inner pairs of rows."""
        pairs, inner = row_pairs(height), self.inner_pairs(kernel_size)
        return 1 if pairs <= LANES else ceil((pairs - LANES) / inner) + 1

    def columns(self, width: int) -> int:
        """Columns of the input that are computed: whole pieces, two of them at least."""
        return self.piece * max(MIN_PIECES, ceil(width / self.piece))

    def window_pixels(self, width: int) -> int:
        """Pixels of a window of the input."""
        return TILE_PIXELS * self.columns(width)

    def pass_pixels(self) -> int:
        """Pixels of the output that are projected together."""
        return TILE_PIXELS * self.pass_tiles

    def pixel_pairs(self, width: int) -> int:
        """Pairs of the output's pixels that a pair of the input's rows gives: two rows of each column, or one of two
        columns."""
        return width if self.STRIDE == 1 else ceil(width / 4)

    def passes(self, height: int, width: int) -> int:
        """Times that all hidden channels are projected, each for other pairs of pixels, in order."""
        return ceil(row_pairs(height) * self.pixel_pairs(width) / (LANES * self.pass_tiles))

    def products(self, out_channels: int) -> tuple[int, ...]:
        """Output channels of each product of the projection."""
        return slab_widths(out_channels, PRODUCT_CHANNELS)

    def sum_registers(self, out_channels: int) -> int:
        """Sums of the projection that a thread holds."""
        return self.pass_pixels() * sum(self.out_slabs(out_channels)) // (32 * WARPS)

    def has_room(self, out_channels: int) -> bool:
        """Whether a thread has registers for the operands of several steps of the projection."""
        return self.sum_registers(out_channels) <= GROUP_REGISTERS

    def group(self, out_channels: int) -> int:
        """Steps of the projection that follow each other without a wait for their products."""
        return 4 if self.step == min(STEPS) and self.has_room(out_channels) else 2

    def reads_ahead(
        self, width: int, in_channels: int, hidden_channels: int, out_channels: int, squeeze_channels: int
    ) -> bool:
        """Whether a step's hidden channels are read before the step before has left its stage: not if there are two."""
        sizes = width, in_channels, hidden_channels, out_channels, squeeze_channels
        return self.hidden_stages(*sizes) > MIN_STAGES and self.has_room(out_channels)

    def room_bytes(self, width: int, in_channels: int, out_channels: int) -> int:
        """Shared memory of a window of the input, then of the output and weights of the projection."""
        window = 2 * self.window_pixels(width) * sum(self.in_slabs(in_channels))
        output = 2 * self.pass_pixels() * sum(self.out_slabs(out_channels))
        return max(window, output + self.weight_bytes(out_channels))

    def fixed_bytes(
        self, width: int, in_channels: int, hidden_channels: int, out_channels: int, squeeze_channels: int
    ) -> int:
        """Shared memory of a program, but for hidden channels."""
        return (
            self.room_bytes(width, in_channels, out_channels)
            + 2 * TILE_PIXELS * self.piece * BIAS_CHANNELS
            + self.gate_bytes(hidden_channels, out_channels, squeeze_channels)
            + COMPILER_BYTES
        )

    def hidden_stage_bytes(self) -> int:
        """Hidden channels of a step on their way back from global memory."""
        return 2 * self.step * self.pass_pixels()

    def hidden_stages(
        self, width: int, in_channels: int, hidden_channels: int, out_channels: int, squeeze_channels: int
    ) -> int:
        """Steps whose hidden channels are on their way together: as many as have room."""
        fixed = self.fixed_bytes(width, in_channels, hidden_channels, out_channels, squeeze_channels)
        return max(MIN_STAGES, min(MAX_STAGES, (LOCAL_MEMORY_BYTES - fixed) // self.hidden_stage_bytes()))

    def memory_bytes(
        self, width: int, in_channels: int, hidden_channels: int, out_channels: int, squeeze_channels: int
    ) -> int:
        """Shared memory of a program."""
        sizes = width, in_channels, hidden_channels, out_channels, squeeze_channels
        return self.fixed_bytes(*sizes) + self.hidden_stages(*sizes) * self.hidden_stage_bytes()

    def workspace_elements(self, height: int, width: int, hidden_channels: int) -> int:
        """16-bit elements of a program's workspace: the hidden channels of its image."""
        return self.padded_hidden(hidden_channels) * self.passes(height, width) * self.pass_pixels()

    def to_ints(self) -> list[int]:
        """The fields in order, for operators and files that take integers only; the class undoes it."""
        return list(astuple(self))


@dataclass(frozen=True)
class MBConvWindowsHopperTile(WindowsTile):
    """One way to run the Hopper kernel of the stride-1 MBConv block for larger images."""

    STRIDE = 1
    PIECES = (2, 4)
    KERNEL_SIZES = (3, 5)


@dataclass(frozen=True)
class MBConvDownWindowsHopperTile(WindowsTile):
    """One way to run the Hopper kernel of the stride-2 MBConv block without a blur-pool for larger images.

    Each piece of columns gives two columns of the output.
    """

    STRIDE = 2
    PIECES = (4,)
    KERNEL_SIZES = (3, 5)


def row_pairs(height: int) -> int:
    """Pairs of rows of an image, the last of which may lack a row."""
    return ceil(height / 2)


def why_unsupported(shape: MBConvShape | MBConvDownShape) -> str | None:
    """Why no tile runs this block on any processor, and what to do instead; None if some tile may."""
    if isinstance(shape, MBConvDownShape) and shape.blur:
        return "a blur-pool is not supported, use an MBConvDownTile, or up to 32x32 pixels an MBConvDownHopperTile"
    return mbconv_hopper_tile.why_block_unsupported(shape, _tile_type(shape).KERNEL_SIZES) or why_too_large(
        _tile_type(shape)(4, max(PASS_TILES), min(STEPS), MIN_STAGES),
        *(shape.height, shape.width),
        *(shape.in_channels, shape.hidden_channels, shape.out_channels),
    )


def why_too_large(
    tile: WindowsTile,
    height: int,
    width: int,
    in_channels: int,
    hidden_channels: int,
    out_channels: int,
) -> str | None:
    """Why offsets within an image or its workspace would not fit 32 bits; None if they fit."""
    elements = height * width * max(in_channels, out_channels), tile.workspace_elements(height, width, hidden_channels)
    if max(elements) > MAX_IMAGE_ELEMENTS:
        return (
            f"images of {height}x{width} pixels are too large, split them: 2**31 elements of the input, hidden or "
            "output tensor are the limit"
        )
    return None


def why_malformed(tile: WindowsTile) -> str | None:
    """Why the kernel runs no block with this tile; None if it may."""
    for name, values in (("piece", tile.PIECES), ("pass_tiles", PASS_TILES), ("step", STEPS)):
        if getattr(tile, name) not in values:
            return f"{name}={getattr(tile, name)} is not one of {', '.join(map(str, values))}"
    if not MIN_STAGES <= tile.stages <= MAX_STAGES:
        return f"stages={tile.stages} is not between {MIN_STAGES} and {MAX_STAGES}"
    return None


def why_invalid(tile: WindowsTile, shape: MBConvShape | MBConvDownShape, processor: Processor) -> str | None:
    """Why the kernel cannot, or should not, run `shape` with this tile on `processor`; None if it is valid."""
    general = why_other_capability(processor, COMPUTE_CAPABILITY) or why_unsupported(shape) or why_malformed(tile)
    if general:
        return general
    return why_no_room(estimated_registers(tile, shape), local_memory_bytes(tile, shape, processor), shape, processor)


def why_none(shape: MBConvShape | MBConvDownShape, processor: Processor) -> str | None:
    """Why no tile runs `shape` on `processor`; None if some tile does."""
    if any(why_invalid(tile, shape, processor) is None for tile in _tiles(shape)):
        return None
    smallest = min(_tiles(shape), key=lambda tile: local_memory_bytes(tile, shape, processor))
    return why_invalid(smallest, shape, processor)


def local_memory_bytes(tile: WindowsTile, shape: MBConvShape | MBConvDownShape, processor: Processor) -> int:
    """Shared memory of a program, in bytes. The compiler may need some bytes less."""
    return tile.memory_bytes(*_sizes(shape))


def estimated_registers(tile: WindowsTile, shape: MBConvShape | MBConvDownShape) -> float:
    """32-bit registers a thread: of the expansion and the convolution, or of the projection."""
    # Of 3x3 a window of three tiles. Of 5x5 sums of five columns, or of stride 2 three pairs, and tiles with more rows.
    held = 12 * 3 if shape.kernel_size == 3 else (5 if tile.STRIDE == 1 else 3) * 8 + 12 * tile.piece
    produce = 4 * tile.depths(shape.in_channels) + 8 * tile.piece + held + 4 * taps_pieces(shape.kernel_size) + 24
    project = tile.sum_registers(shape.out_channels) + tile.pass_pixels() * tile.step / (2 * 32 * WARPS)
    return 30 + max(produce, project)


def programs_per_processor(tile: WindowsTile, shape: MBConvShape | MBConvDownShape, processor: Processor) -> int:
    """Programs that a streaming multiprocessor holds at a time: eight warps take all its registers."""
    return 1


def predicted_us(tile: WindowsTile, shape: MBConvShape | MBConvDownShape, processor: Processor) -> float:
    """Predicted duration of a launch in microseconds: a fixed cost, the images' way in and out, and programs in rounds.

    A program's time is that of its tiles, of the steps of its projection, and what nothing hides of what it reads from
    L2 and writes there, or to DRAM.
    """
    outputs = shape.out_height * shape.out_width * shape.out_channels
    elements = shape.batch * (shape.height * shape.width * shape.in_channels + outputs)
    once = GRAPH_SHARE_US + LAUNCH_US + images_us(shape, ELEMENT_SIZE[shape.dtype] * elements, processor)
    return once + rounds(shape, processor) * _program_us(tile, shape, processor)


def _program_us(tile: WindowsTile, shape: MBConvShape | MBConvDownShape, processor: Processor) -> float:
    """Of an image, apart from its way in and out."""
    sweeps, passes = tile.sweeps(shape.hidden_channels), tile.passes(shape.height, shape.width)
    hidden_bytes = ELEMENT_SIZE[shape.dtype] * sweeps * SWEEP * passes
    workspace = hidden_bytes * tile.pass_pixels()
    l2_us = hidden_bytes * sum(tile.out_slabs(shape.out_channels)) / WEIGHT_BYTES_PER_US
    l2_us += 2 * workspace / HIDDEN_BYTES_PER_US + SPILLED_SHARE * spilled_us(shape, workspace, processor)
    tiles = sweeps * tile.windows(shape.height, shape.kernel_size) * tile.columns(shape.width)
    tile_us = TILE_US[tile.STRIDE, shape.kernel_size] + DEPTH_US * tile.depths(shape.in_channels)
    steps = passes * sweeps * SWEEP / tile.step
    preference = abs(tile.stages - GOOD_STAGES) * STAGE_US
    return tiles * (tile_us + PIECE_US / tile.piece) + steps * STEP_US + l2_us + preference


def candidate_tiles(shape: MBConvShape | MBConvDownShape, processor: Processor) -> Iterator[WindowsTile]:
    """Every valid tile worth a measurement."""
    for tile in _tiles(shape):
        if why_invalid(tile, shape, processor) is None:
            yield tile


def _tile_type(shape: MBConvShape | MBConvDownShape) -> type[WindowsTile]:
    return MBConvDownWindowsHopperTile if isinstance(shape, MBConvDownShape) else MBConvWindowsHopperTile


def _tiles(shape: MBConvShape | MBConvDownShape) -> Iterator[WindowsTile]:
    tile_type = _tile_type(shape)
    for sizes in product(tile_type.PIECES, PASS_TILES, STEPS, TRIED_STAGES):
        yield tile_type(*sizes)


def _sizes(shape: MBConvShape | MBConvDownShape) -> tuple[int, int, int, int, int]:
    return shape.width, shape.in_channels, shape.hidden_channels, shape.out_channels, shape.squeeze_channels

"""Tile of the Hopper kernel of the MBConv block: how it divides an image, what is valid, how long it takes.

A program computes a whole image with all its hidden channels (`fusion.triton_kernels.mbconv_hopper`), so the images
have to be small. `why_invalid` is the one judge of validity, for the planner's choice and for the tuner's candidates.
"""

from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from itertools import product
from math import ceil
from typing import ClassVar

from fusion.planner.graph import ELEMENT_SIZE
from fusion.planner.match import MBConvDownShape, MBConvShape
from fusion.planner.processor import Processor, kilobytes, why_other_capability
from fusion.planner.slabs import WIDEST, slab_widths
from fusion.planner.tile import CHANNEL_MULTIPLE, KERNEL_DTYPES, MAX_REGISTERS

COMPUTE_CAPABILITY = (9, 0)
GROUP_WIDTH = 8
ACTIVATIONS = ("relu", "silu")
WARPS = 8
SWEEP = 16 * WARPS
"""Hidden channels that are computed together: two groups of each warp."""
TILE_PIXELS = 16
"""Of a tile: two rows of eight lanes."""
LANES = 8
ROWS = 2 * LANES
"""Of all bands of a tile."""
MAX_TILES = 16
FEWEST_TILES = 4
"""For which there is room, so that the projection has 64 pixels, the rows of a product."""
MAX_TILES_AT_ONCE = 4
"""Whose sums of the expansion a thread holds: a piece, and all of an image of several bands."""
BANDS = (1, 2, 4, 8)
PIECES = (1, 2, MAX_TILES_AT_ONCE)
STEPS = (32, 64)
MIN_STAGES = 2
"""A stage is filled again only after the products of the next one have started."""
MAX_STAGES = 8
TRIED_STAGES = (8, 6, 4, 3)
GOOD_STAGES, GOOD_NARROW_STAGES = 6, 4
"""That were best, or close to it, where a pass has pixels for all warps, and where it has not."""
BIAS_CHANNELS = 16
"""Channels of the constant one that follow the input's: the depth of a product. Two are in use."""
DEPTH_ELEMENTS = 16 * SWEEP
"""Weights of the expansion of a sweep, for 16 channels: a product's depth."""
KERNEL_SIZE = 3
"""Of the convolution."""
TAPS_PIECE_ELEMENTS = 8 * 32 * WARPS
"""Of a piece of all threads' weights of the convolution (`taps_pieces`), 16 bytes each."""
PRODUCT_CHANNELS = 256
"""Output channels that a product projects, at most."""
PASS_REGISTERS = 160
"""Sums of the projection that a thread holds; of more, two passes are needed, each for half of the pixels."""
GROUP_REGISTERS = 128
"""Sums up to which there is room for the operands of several steps that follow each other without a wait."""
LOCAL_MEMORY_BYTES = 227 * 1024
COMPILER_BYTES = 512
"""Shared memory for barriers and alignment, at most."""
MAX_IMAGES = 2**20

# Fitted to blocks by themselves and in stages, on an H200 and an H100 at batch 128 (mbconv.json, compile*.json and
# network.json in bench/results), and to 112 tiles on an H100 (mbconv_exploration.json): 4 % off, those tiles 7 % (root
# mean square).
LAUNCH_US = 1.6
"""Start and tail of a launch, in a CUDA graph."""
GRAPH_SHARE_US = 1.1
"""Of the graph's own launch, if it has eight blocks, in one launch or in eight."""
TILE_US = 0.25
"""Of a sweep and a tile: expanded, activated, convolved."""
PIECE_US = 0.15
"""Of a sweep and what is expanded together: waits that its tiles share."""
GATE_BYTES_PER_US = 23e3
"""Weights of squeeze and excitation that a processor reads from L2: all read the same ones at once, with nothing to
hide that behind."""
BYTES_PER_US = 83e3
"""Weights of the projection and hidden channels that a processor moves from and to L2 meanwhile. Those of expansion and
convolution are hidden."""
RING_US = 1.1e-3
"""Of a turn of the projection's ring, for each pixel that it projects: the way to L2 and back, the longer the more the
hidden channels keep L2 busy."""
RING_CHANNELS = 160
"""Hidden channels that are on their way at a time in a ring that is long enough."""
CACHE_SHARE = 0.5
"""Of the L2 cache that hidden channels of all programs have; the others' way is through DRAM."""
NARROW_STEP_US = 0.04
"""Of a step of the projection that the warps divide by output channels, too: its products are short."""
# A preference rather than a prediction.
STAGE_US = 0.01
"""Of a stage more or less than are good."""


class SweptChannels:
    """What tiles with a `step` and `stages` make of a block's channels, whatever its images are."""

    KERNEL_SIZES: ClassVar[tuple[int, ...]] = (KERNEL_SIZE,)
    """Of the convolution, as far as there are kernels."""

    def in_slabs(self, in_channels: int) -> tuple[int, ...]:
        """Slabs of the input, which the expansion contracts."""
        return slab_widths(in_channels, WIDEST)

    def out_slabs(self, out_channels: int) -> tuple[int, ...]:
        """Slabs of the output, and of the projection's weights."""
        return slab_widths(out_channels, WIDEST)

    def depths(self, in_channels: int) -> int:
        """Products of depth 16 of the expansion, with that of the bias."""
        return (sum(self.in_slabs(in_channels)) + BIAS_CHANNELS) // 16

    def sweeps(self, hidden_channels: int) -> int:
        """Times that hidden channels are computed together."""
        return ceil(hidden_channels / SWEEP)

    def padded_hidden(self, hidden_channels: int) -> int:
        """Hidden channels of whole sweeps."""
        return self.sweeps(hidden_channels) * SWEEP

    def squeeze_depths(self, squeeze_channels: int) -> int:
        """Products of depth 16 that have room for the squeeze vector."""
        return ceil(squeeze_channels / 16)

    def weight_bytes(self, out_channels: int) -> int:
        """Stages of the projection's weights."""
        return 2 * self.stages * self.step * sum(self.out_slabs(out_channels))

    def gate_room(self, hidden_channels: int) -> int:
        """Gates in shared memory, a power of two."""
        return _power_of_two(self.padded_hidden(hidden_channels))

    def bias_room(self, out_channels: int) -> int:
        """Biases of the output in shared memory, a power of two."""
        return _power_of_two(sum(self.out_slabs(out_channels)))

    def squeeze_room(self, squeeze_channels: int) -> int:
        """Length of the squeeze vector in shared memory, a power of two."""
        return max(32, _power_of_two(16 * self.squeeze_depths(squeeze_channels)))

    def gate_bytes(self, hidden_channels: int, out_channels: int, squeeze_channels: int) -> int:
        """Gates in 16 bits; in fp32 biases, the squeeze vector, and its shares of all warps while they are added."""
        words = self.bias_room(out_channels) + (1 + WARPS) * self.squeeze_room(squeeze_channels)
        return 2 * self.gate_room(hidden_channels) + 4 * words


@dataclass(frozen=True)
class MBConvHopperTile(SweptChannels):
    """One way to run the Hopper kernel of the MBConv block.

    An image is cut into `bands` bands of columns side by side, whose pixels lie in different lanes of a warp. A *tile*
    is a column of every band, of up to `16 / bands` rows; `piece` tiles are expanded together. The projection takes
    `step` hidden channels at a time, and the operands of `stages` steps are on their way together.
    """

    bands: int
    piece: int
    step: int
    stages: int

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"MBConvHopperTile: {field.name} must be a positive integer, got {value!r}")

    @property
    def hidden(self) -> int:
        """Hidden channels that are computed together."""
        return SWEEP

    @property
    def rows(self) -> int:
        """Rows that a tile has room for."""
        return ROWS // self.bands

    def columns(self, width: int) -> int:
        """Columns of a band, and tiles of an image: with several bands a power of two, and computed all at once."""
        columns = ceil(width / self.bands)
        return columns if self.bands == 1 else 1 << (columns - 1).bit_length()

    def tiles(self, width: int) -> int:
        """Tiles that there is room for, a power of two."""
        return max(FEWEST_TILES, 1 << (self.columns(width) - 1).bit_length())

    def pixels(self, width: int) -> int:
        """Pixels that there is room for."""
        return TILE_PIXELS * self.tiles(width)

    def splits_last(self, width: int, hidden_channels: int) -> bool:
        """Whether the last sweep has half of the hidden channels, and each warpgroup half of the columns."""
        whole = self.bands == 1 and self.piece == MAX_TILES_AT_ONCE and self.columns(width) == MAX_TILES
        return whole and 0 < hidden_channels % SWEEP <= SWEEP // 2

    def computed_hidden(self, width: int, hidden_channels: int) -> int:
        """Hidden channels that the kernel computes; the padded weights may have some more."""
        spared = SWEEP // 2 if self.splits_last(width, hidden_channels) else 0
        return self.padded_hidden(hidden_channels) - spared

    def passes(self, width: int, out_channels: int) -> int:
        """Times that all hidden channels are projected, each for other pixels."""
        sums = self.pixels(width) * sum(self.out_slabs(out_channels)) // (32 * WARPS)
        return 2 if sums > PASS_REGISTERS and self.tiles(width) == MAX_TILES else 1

    def products(self, width: int, out_channels: int) -> tuple[int, ...]:
        """Output channels of each product of the projection."""
        return slab_widths(out_channels, PRODUCT_CHANNELS)

    def group(self, width: int, out_channels: int) -> int:
        """Steps of the projection that follow each other without a wait for their products."""
        return 4 if self.step == min(STEPS) and self._has_room(width, out_channels) else 2

    def reads_ahead(
        self, width: int, in_channels: int, hidden_channels: int, out_channels: int, squeeze_channels: int
    ) -> bool:
        """Whether a step's hidden channels are read before the step before has left its stage: not if there are two."""
        sizes = width, in_channels, hidden_channels, out_channels, squeeze_channels
        enough = self.is_resident(*sizes) or self.hidden_stages(*sizes) > MIN_STAGES
        return enough and self._has_room(width, out_channels)

    def _has_room(self, width: int, out_channels: int) -> bool:
        """Whether a thread has registers for the operands of several steps of the projection."""
        return self.sum_registers(width, out_channels) <= GROUP_REGISTERS

    def sum_registers(self, width: int, out_channels: int) -> int:
        """Sums of the projection that a thread holds."""
        rows = self.pixels(width) // self.passes(width, out_channels)
        return rows * sum(self.out_slabs(out_channels)) // (32 * WARPS)

    def input_bytes(self, width: int, in_channels: int, hidden_channels: int) -> int:
        """The input in shared memory, and of the constant one as much as is expanded together."""
        channels = self.pixels(width) * sum(self.in_slabs(in_channels))
        together = 2 if self.splits_last(width, hidden_channels) else 1
        return 2 * (channels + together * TILE_PIXELS * self.piece * BIAS_CHANNELS)

    def output_bytes(self, width: int, in_channels: int, out_channels: int) -> int:
        """The output in shared memory, unless it takes the place of the input."""
        if self.in_slabs(in_channels) == self.out_slabs(out_channels):
            return 0
        return 2 * self.pixels(width) * sum(self.out_slabs(out_channels))

    def fixed_bytes(
        self, width: int, in_channels: int, hidden_channels: int, out_channels: int, squeeze_channels: int
    ) -> int:
        """Shared memory of a program, but for hidden channels."""
        return (
            self.input_bytes(width, in_channels, hidden_channels)
            + self.output_bytes(width, in_channels, out_channels)
            + self.weight_bytes(out_channels)
            + self.gate_bytes(hidden_channels, out_channels, squeeze_channels)
            + COMPILER_BYTES
        )

    def hidden_stage_bytes(self, width: int, out_channels: int) -> int:
        """Hidden channels of a step on their way back from global memory."""
        return 2 * self.step * self.pixels(width) // self.passes(width, out_channels)

    def hidden_stages(
        self, width: int, in_channels: int, hidden_channels: int, out_channels: int, squeeze_channels: int
    ) -> int:
        """Steps whose hidden channels are on their way together, if they do not stay: as many as have room."""
        fixed = self.fixed_bytes(width, in_channels, hidden_channels, out_channels, squeeze_channels)
        room = (LOCAL_MEMORY_BYTES - fixed) // self.hidden_stage_bytes(width, out_channels)
        return max(MIN_STAGES, min(MAX_STAGES, room))

    def memory_bytes(
        self,
        width: int,
        in_channels: int,
        hidden_channels: int,
        out_channels: int,
        squeeze_channels: int,
        resident: bool,
    ) -> int:
        """Shared memory of a program, with all hidden channels in it or not."""
        sizes = width, in_channels, hidden_channels, out_channels, squeeze_channels
        if resident:
            hidden = 2 * self.pixels(width) * self.padded_hidden(hidden_channels)
        else:
            hidden = self.hidden_stages(*sizes) * self.hidden_stage_bytes(width, out_channels)
        return self.fixed_bytes(*sizes) + hidden

    def is_resident(
        self, width: int, in_channels: int, hidden_channels: int, out_channels: int, squeeze_channels: int
    ) -> bool:
        """Whether all hidden channels stay in shared memory, because there is room and no sweep is split."""
        sizes = width, in_channels, hidden_channels, out_channels, squeeze_channels
        fits = self.memory_bytes(*sizes, resident=True) <= LOCAL_MEMORY_BYTES
        return fits and not self.splits_last(width, hidden_channels)

    def workspace_elements(self, width: int, hidden_channels: int) -> int:
        """16-bit elements of a program's workspace: its hidden channels, if they do not stay in shared memory."""
        return self.computed_hidden(width, hidden_channels) * self.pixels(width)

    def to_ints(self) -> list[int]:
        """The fields in order, for operators and files that take integers only; `MBConvHopperTile(*ints)` undoes it."""
        return list(astuple(self))


def taps_pieces(kernel_size: int) -> int:
    """Pieces of a thread's weights of the convolution, 16 bytes each: for each column those of two rows that are as far
    above and below, and of two columns those of the same row."""
    return kernel_size // 2 * kernel_size + ceil(kernel_size / 2)


def why_block_unsupported(
    shape: MBConvShape | MBConvDownShape, kernel_sizes: Sequence[int] = (KERNEL_SIZE,)
) -> str | None:
    """Why no tile runs this block, whatever its images' size, and what to do instead; None if some tile may."""
    if shape.dtype not in KERNEL_DTYPES:
        return f"dtype {shape.dtype} is not supported, use one of {', '.join(KERNEL_DTYPES)}"
    if shape.activation not in ACTIVATIONS:
        return f"activation {shape.activation} is not supported, use {' or '.join(ACTIVATIONS)}"
    if shape.kernel_size not in kernel_sizes or shape.group_width != GROUP_WIDTH:
        return (
            f"kernel size {shape.kernel_size} with group width {shape.group_width} is not supported, use "
            f"{' or '.join(map(str, kernel_sizes))} and {GROUP_WIDTH}"
        )
    for name in ("in_channels", "out_channels"):
        if getattr(shape, name) % CHANNEL_MULTIPLE:
            return f"{name}={getattr(shape, name)} is not supported, use a multiple of {CHANNEL_MULTIPLE}"
    if shape.batch > MAX_IMAGES:
        return f"{shape.batch} images are too many for a launch, split the batch: {MAX_IMAGES} are the limit"
    return None


def why_unsupported(shape: MBConvShape) -> str | None:
    """Why no tile runs this block on any processor, and what to do instead; None if some tile may."""
    reason = why_block_unsupported(shape)
    if reason:
        return reason
    if not any(_divisions(shape.height, shape.width)):
        return (
            f"images of {shape.height}x{shape.width} pixels are too large: up to {ROWS}x{MAX_TILES} are supported, and "
            f"{ROWS // BANDS[-1]} rows of up to {BANDS[-1] * MAX_TILES_AT_ONCE} columns"
        )
    return None


def why_malformed(tile: MBConvHopperTile) -> str | None:
    """Why the kernel runs no block with this tile; None if it may."""
    for name, values in (("bands", BANDS), ("piece", PIECES), ("step", STEPS)):
        if getattr(tile, name) not in values:
            return f"{name}={getattr(tile, name)} is not one of {', '.join(map(str, values))}"
    if not MIN_STAGES <= tile.stages <= MAX_STAGES:
        return f"stages={tile.stages} is not between {MIN_STAGES} and {MAX_STAGES}"
    return None


def why_not_covering(tile: MBConvHopperTile, height: int, width: int) -> str | None:
    """Why the tile does not fit images of this size; None if it does."""
    columns, most = tile.columns(width), MAX_TILES if tile.bands == 1 else MAX_TILES_AT_ONCE
    if height > tile.rows or columns > most:
        return (
            f"{tile.bands} bands of {tile.rows} rows and up to {most} columns do not cover images of {height}x{width} "
            "pixels"
        )
    if columns % tile.piece or (tile.bands > 1 and columns != tile.piece):
        return (
            f"{columns} columns of each of {tile.bands} bands cannot be computed {tile.piece} at a time: that must "
            f"{'divide them' if tile.bands == 1 else 'be all of them'}"
        )
    return None


def why_invalid(tile: MBConvHopperTile, shape: MBConvShape, processor: Processor) -> str | None:
    """Why the kernel cannot, or should not, run `shape` with this tile on `processor`; None if it is valid."""
    general = (
        why_other_capability(processor, COMPUTE_CAPABILITY)
        or why_unsupported(shape)
        or why_malformed(tile)
        or why_not_covering(tile, shape.height, shape.width)
    )
    if general:
        return general
    return why_no_room(estimated_registers(tile, shape), local_memory_bytes(tile, shape, processor), shape, processor)


def why_no_room(registers: float, local: int, shape: MBConvShape | MBConvDownShape, processor: Processor) -> str | None:
    """Why a program does not fit a thread's registers or a processor's local memory; None if it does."""
    if registers > MAX_REGISTERS:
        return (
            f"about {registers:.0f} registers a thread would spill, {MAX_REGISTERS} are available: expansion weights "
            f"of {shape.in_channels} channels, sums of {shape.out_channels} output channels and weights of "
            f"{shape.squeeze_channels} squeeze channels stay in registers"
        )
    if local > processor.local_memory_bytes:
        return (
            f"input, hidden channels and weights of {kilobytes(local)} do not fit the "
            f"{kilobytes(processor.local_memory_bytes)} of local memory that {processor.name} has"
        )
    return None


def why_none(shape: MBConvShape, processor: Processor) -> str | None:
    """Why no tile runs `shape` on `processor`; None if some tile does."""
    reasons = [why_invalid(tiles[-1], shape, processor) for tiles in _candidates(shape)]
    if not reasons:
        return why_unsupported(shape)
    return None if None in reasons else reasons[0]


def local_memory_bytes(tile: MBConvHopperTile, shape: MBConvShape, processor: Processor) -> int:
    """Shared memory of a program, in bytes. The compiler may need some bytes less."""
    return tile.memory_bytes(*_sizes(shape), resident=is_resident(tile, shape))


def estimated_registers(tile: MBConvHopperTile, shape: MBConvShape) -> float:
    """32-bit registers a thread: of the expansion and the convolution, or of the projection."""
    depth = 16 * tile.depths(shape.in_channels)
    held = 12 * 3 if tile.bands == 1 else 8 * (tile.piece + 2)
    produce = depth / 4 + 8 * tile.piece + held + 4 * taps_pieces(shape.kernel_size) + 24
    rows = tile.pixels(shape.width) // tile.passes(shape.width, shape.out_channels)
    divided = max(1, TILE_PIXELS * WARPS // rows)
    project = tile.sum_registers(shape.width, shape.out_channels)
    project += rows * divided * tile.step / (2 * 32 * WARPS)
    return 30 + max(produce, project)


def programs_per_processor(tile: MBConvHopperTile, shape: MBConvShape, processor: Processor) -> int:
    """Programs that a streaming multiprocessor holds at a time: eight warps take all its registers."""
    return 1


def predicted_us(tile: MBConvHopperTile, shape: MBConvShape, processor: Processor) -> float:
    """Predicted duration in microseconds of a launch of one block.

    A fixed cost, the images' way in and out, and programs in rounds (`_program_us`).
    """
    return stage_us(tile, shape, processor, 1)


def stage_us(tile: MBConvHopperTile, shape: MBConvShape, processor: Processor, blocks: int) -> float:
    """Predicted microseconds of a block in a launch of so many equal ones: they share what a launch costs, and the
    images' way in and out."""
    once = LAUNCH_US + images_us(shape, shape.pixels * shape.pixel_bytes, processor)
    return GRAPH_SHARE_US + once / blocks + rounds(shape, processor) * _program_us(tile, shape, processor)


def rounds(shape: MBConvShape | MBConvDownShape, processor: Processor) -> int:
    """Images that a processor takes one after the other."""
    return ceil(shape.batch / processor.processors)


def images_us(shape: MBConvShape | MBConvDownShape, activation_bytes: int, processor: Processor) -> float:
    """Microseconds of input and output, while nothing else happens: through DRAM, or of few images from and to L2."""
    image_us = activation_bytes / shape.batch / BYTES_PER_US
    return max(activation_bytes / processor.bandwidth * 1e6, rounds(shape, processor) * image_us)


def spilled_us(shape: MBConvShape | MBConvDownShape, workspace_bytes: int, processor: Processor) -> float:
    """Microseconds in which hidden channels go to DRAM and back for which L2 has no room, where each program has so
    many bytes of them."""
    programs = min(shape.batch, processor.processors)
    spilled = max(0, programs * workspace_bytes - CACHE_SHARE * processor.global_memory_bytes)
    return 2 * spilled / processor.bandwidth * 1e6


def _program_us(tile: MBConvHopperTile, shape: MBConvShape, processor: Processor) -> float:
    """Of an image, apart from its way in and out: its tiles, what nothing hides of the weights' and hidden channels'
    way from and to L2, or DRAM, and the waits of the projection."""
    columns, hidden = tile.columns(shape.width), tile.computed_hidden(shape.width, shape.hidden_channels)
    passes = tile.passes(shape.width, shape.out_channels)
    size, pixels = ELEMENT_SIZE[shape.dtype], tile.pixels(shape.width)
    workspace = 0 if is_resident(tile, shape) else size * hidden * pixels
    l2_bytes = size * hidden * passes * sum(tile.out_slabs(shape.out_channels)) + 2 * workspace
    gate_bytes = size * hidden * 32 * tile.squeeze_depths(shape.squeeze_channels)
    l2_us = l2_bytes / BYTES_PER_US + gate_bytes / GATE_BYTES_PER_US
    produce_us = hidden / SWEEP * columns * (TILE_US + PIECE_US / tile.piece)
    narrow = pixels < TILE_PIXELS * WARPS
    wait_us = ring_us(tile, hidden, pixels // passes) * passes + narrow * hidden / tile.step * NARROW_STEP_US
    preference = abs(tile.stages - (GOOD_NARROW_STAGES if narrow else GOOD_STAGES)) * STAGE_US
    return produce_us + l2_us + spilled_us(shape, workspace, processor) + wait_us + preference


def ring_us(tile: SweptChannels, hidden: int, pixels: int) -> float:
    """Microseconds that a pass of the projection over `hidden` channels of so many pixels waits for its ring."""
    return hidden / min((tile.stages - 1) * tile.step, RING_CHANNELS) * pixels * RING_US


def candidate_tiles(shape: MBConvShape, processor: Processor) -> Iterator[MBConvHopperTile]:
    """Every valid tile worth a measurement.

    Of those with the fewest columns the widest pieces, and half of them; the most stages that have room, and some other
    numbers of stages.
    """
    valid = [[tile for tile in tiles if why_invalid(tile, shape, processor) is None] for tiles in _candidates(shape)]
    valid = [tiles for tiles in valid if tiles]
    fewest = min((tiles[0].columns(shape.width) for tiles in valid), default=0)
    valid = [tiles for tiles in valid if tiles[0].columns(shape.width) == fewest]
    widest = max((tiles[0].piece for tiles in valid), default=0)
    for tiles in valid:
        if 2 * tiles[0].piece >= widest:
            yield from dict.fromkeys(tiles[:1] + [tile for tile in tiles if tile.stages in TRIED_STAGES])


def is_resident(tile: MBConvHopperTile, shape: MBConvShape) -> bool:
    """Whether all hidden channels of an image stay in shared memory."""
    return tile.is_resident(*_sizes(shape))


def _power_of_two(size: int) -> int:
    """The least that is not smaller."""
    return 1 << (size - 1).bit_length()


def _sizes(shape: MBConvShape) -> tuple[int, int, int, int, int]:
    return shape.width, shape.in_channels, shape.hidden_channels, shape.out_channels, shape.squeeze_channels


def _candidates(shape: MBConvShape) -> Iterator[list[MBConvHopperTile]]:
    """For each division of an image and each step, tiles with ever fewer stages."""
    for (bands, piece), step in product(_divisions(shape.height, shape.width), STEPS):
        yield [MBConvHopperTile(bands, piece, step, stages) for stages in range(MAX_STAGES, MIN_STAGES - 1, -1)]


def _divisions(height: int, width: int) -> Iterator[tuple[int, int]]:
    """Bands and pieces that cover an image."""
    for bands, piece in product(BANDS, reversed(PIECES)):
        if why_not_covering(MBConvHopperTile(bands, piece, min(STEPS), 2), height, width) is None:
            yield bands, piece

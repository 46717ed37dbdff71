"""Tile of the Hopper kernel of the MBConv block: how it divides images over programs, what is valid, how long it takes.

A program computes whole images with all their hidden channels (`fusion.triton_kernels.mbconv_hopper`), so the images
have to be small. `why_invalid` is the one judge of validity, for the planner's choice and for the tuner's candidates.
"""

from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from itertools import product
from math import ceil

from fusion.planner.graph import ELEMENT_SIZE
from fusion.planner.match import MBConvShape
from fusion.planner.processor import Processor, kilobytes
from fusion.planner.slabs import WIDEST, slab_widths
from fusion.planner.tile import CHANNEL_MULTIPLE, KERNEL_DTYPES, MAX_REGISTERS

COMPUTE_CAPABILITY = (9, 0)
GROUP_WIDTH = 8
WARPS = 4
"""Of a partition: a warpgroup, whose matrix products are Hopper's widest."""
PARTITIONS = 2
CHUNK = 64
"""Hidden channels that a partition expands together: the rows of a product."""
HALF = 32
"""Hidden channels that it convolves together."""
BLOCK_PIXELS = 64
MAX_PIXELS = 256
"""Of a program: the columns of a product."""
ROWS = (4, 2, 1)
GATES = 256
"""Gates that a partition computes together."""
TAPS_ELEMENTS = 9 * 16 * HALF
"""Weights of the convolution of a half of a chunk: dense pieces of 16 channels, two groups each."""
WIDEST_OUTPUT_SLAB = 256
PASS_CHANNELS = 128
"""Output channels of four blocks of pixels whose sums both partitions hold at once; of more, two passes are needed."""
STEP_CHANNELS = 192
"""Output channels up to which a step of the projection takes a chunk; beyond, half of one, so that more are on their
way together."""
MAX_STAGES = 6
ARENA_ATOM = 1024
"""Bytes. Rows of products and copies by TMA start at multiples of it."""
COMPILER_BYTES = 640
"""Shared memory for barriers, alignment and what the compiler passes to the second partition, at most."""
MAX_IMAGES = 2**20
"""The kernel's opaque zero is made of the image's number."""

# Fitted to ten measurements on an H200 at batch 128 (tests/planner/test_mbconv_hopper_tile.py).
LAUNCH_US = 4.0
PIXEL_US = 0.0176
"""Of a pixel and a chunk."""
BYTES_PER_US = 70e3
"""That a processor moves from and to L2: weights, and hidden channels twice. Little of it is hidden behind the rest."""


@dataclass(frozen=True)
class MBConvHopperTile:
    """One way to run the Hopper kernel of the MBConv block.

    A program computes `images` images, each cut into `bands` bands of `rows` rows; a row takes `columns` pixels. Bands
    and columns are powers of two, and may reach past the image.
    """

    images: int
    rows: int
    bands: int
    columns: int

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"MBConvHopperTile: {field.name} must be a positive integer, got {value!r}")

    @property
    def hidden(self) -> int:
        """Hidden channels that are expanded together."""
        return CHUNK

    @property
    def row_pixels(self) -> int:
        """Pixels of a row of all bands: a row buffer."""
        return self.bands * self.columns

    @property
    def pixels(self) -> int:
        """Pixels of a program, with those outside of the images."""
        return self.images * self.rows * self.row_pixels

    @property
    def blocks(self) -> int:
        """Blocks of 64 pixels, the rows of a product."""
        return self.pixels // BLOCK_PIXELS

    @property
    def pad(self) -> int:
        """Zeros between row buffers, in pixels: a column and one more, a multiple of 8."""
        return ceil((self.bands + 1) / 8) * 8

    @property
    def buffer_pixels(self) -> int:
        """Pixels of a partition's row buffers: each image has two more than rows, and there are zeros around each."""
        return self.images * (self.rows + 2) * (self.row_pixels + self.pad) + self.pad

    def in_slabs(self, in_channels: int) -> tuple[int, ...]:
        """Slabs of the input, which the expansion contracts."""
        return slab_widths(in_channels, WIDEST)

    def store_slabs(self, out_channels: int) -> tuple[int, ...]:
        """Slabs of the output in shared memory."""
        return slab_widths(out_channels, WIDEST)

    def out_slabs(self, out_channels: int) -> tuple[int, ...]:
        """Slabs that the projection accumulates, if a partition projects all output channels of its pixels."""
        return slab_widths(out_channels, WIDEST_OUTPUT_SLAB)

    def out_tiles(self, out_channels: int) -> int:
        """Tiles of up to 64 output channels of the packed weights: one for each slab."""
        return len(self.store_slabs(out_channels))

    def chunks(self, hidden_channels: int) -> int:
        """Chunks of hidden channels."""
        return ceil(hidden_channels / CHUNK)

    def squeeze(self, squeeze_channels: int) -> int:
        """Length of the squeeze vector, a power of two."""
        return max(16, 1 << (squeeze_channels - 1).bit_length())

    def gate_steps(self, hidden_channels: int) -> int:
        """Times that 256 gates are computed together."""
        return ceil(hidden_channels / GATES)

    def bias_elements(self, hidden_channels: int) -> int:
        """Biases of the expansion and the convolution that a partition needs, a power of two."""
        turns = ceil(self.chunks(hidden_channels) / PARTITIONS)
        return 2 * CHUNK << (turns - 1).bit_length()

    @property
    def splits_columns(self) -> bool:
        """Whether the partitions divide the output channels, because there is a single block of pixels."""
        return self.blocks == 1

    def passes(self, out_channels: int) -> int:
        """Times that all hidden channels are projected, each for other pixels."""
        return 2 if self.blocks > PARTITIONS and sum(self.out_slabs(out_channels)) > PASS_CHANNELS else 1

    def step(self, out_channels: int) -> int:
        """Hidden channels that are projected together."""
        return CHUNK if sum(self.out_slabs(out_channels)) <= STEP_CHANNELS else HALF

    def buffer_bytes(self) -> int:
        """Row buffers of a partition, a multiple of 512 bytes."""
        return ceil(2 * HALF * self.buffer_pixels / 512) * 512

    def partition_bytes(self) -> int:
        """Row buffers of a partition, and taps of both halves of a chunk."""
        return self.buffer_bytes() + 2 * 2 * TAPS_ELEMENTS

    def share_bytes(self, squeeze_channels: int) -> int:
        """Shares of squeeze vectors of every warp, and for each partition their sum."""
        return 4 * PARTITIONS * (WARPS + 1) * self.images * self.squeeze(squeeze_channels)

    def step_bytes(self, out_channels: int) -> int:
        """The projection's weights of a step."""
        return 2 * self.step(out_channels) * WIDEST * self.out_tiles(out_channels)

    def stages(self, out_channels: int, squeeze_channels: int) -> int:
        """Steps of the projection whose weights are there together: as many as row buffers and taps leave room."""
        room = PARTITIONS * self.partition_bytes() - self.share_bytes(squeeze_channels)
        return max(2, min(MAX_STAGES, room // self.step_bytes(out_channels)))

    def shares_atom(self, out_channels: int, squeeze_channels: int) -> int:
        """Of the arena, where the squeeze vectors' shares begin: after the projection's weights."""
        return ceil(self.stages(out_channels, squeeze_channels) * self.step_bytes(out_channels) / ARENA_ATOM)

    def arena_atoms(self, out_channels: int, squeeze_channels: int) -> int:
        """Of what first holds row buffers and taps, then the projection's weights and squeeze vectors."""
        later = self.shares_atom(out_channels, squeeze_channels) * ARENA_ATOM + self.share_bytes(squeeze_channels)
        return ceil(max(PARTITIONS * self.partition_bytes(), later) / ARENA_ATOM)

    def workspace_elements(self, hidden_channels: int) -> int:
        """16-bit elements of a program's workspace: hidden channels, and their sums over pixels of every warp, fp32."""
        return self.chunks(hidden_channels) * CHUNK * (self.pixels + 2 * WARPS * self.images)

    def to_ints(self) -> list[int]:
        """The fields in order, for operators and files that take integers only; `MBConvHopperTile(*ints)` undoes it."""
        return list(astuple(self))


def why_unsupported(shape: MBConvShape) -> str | None:
    """Why no tile runs this block on any processor, and what to do instead; None if some tile may."""
    if shape.dtype not in KERNEL_DTYPES:
        return f"dtype {shape.dtype} is not supported, use one of {', '.join(KERNEL_DTYPES)}"
    if (shape.kernel_size, shape.group_width) != (3, GROUP_WIDTH):
        return (
            f"kernel size {shape.kernel_size} with group width {shape.group_width} is not supported, use 3 and "
            f"{GROUP_WIDTH}"
        )
    for name in ("in_channels", "out_channels"):
        if getattr(shape, name) % CHANNEL_MULTIPLE:
            return f"{name}={getattr(shape, name)} is not supported, use a multiple of {CHANNEL_MULTIPLE}"
    if shape.batch > MAX_IMAGES:
        return f"{shape.batch} images are too many for a launch, split the batch: {MAX_IMAGES} are the limit"
    if not any(_divisions(shape.height, shape.width)):
        return (
            f"images of {shape.height}x{shape.width} pixels are too large: a program holds up to {MAX_PIXELS}, in "
            "columns and bands of rows that are powers of two"
        )
    return None


def why_malformed(tile: MBConvHopperTile) -> str | None:
    """Why the kernel runs no block with this tile; None if it may."""
    if tile.rows not in ROWS:
        return f"rows={tile.rows} is not one of {', '.join(map(str, sorted(ROWS)))}"
    for name in ("bands", "columns"):
        if getattr(tile, name) & (getattr(tile, name) - 1):
            return f"{name}={getattr(tile, name)} is not a power of two"
    if tile.row_pixels % BLOCK_PIXELS:
        return f"rows of {tile.row_pixels} pixels of all bands are no multiple of {BLOCK_PIXELS}"
    if tile.pixels not in (64, 128, 256):
        return f"{tile.pixels} pixels of a program are not 64, 128 or {MAX_PIXELS}"
    return None


def why_not_covering(tile: MBConvHopperTile, height: int, width: int) -> str | None:
    """Why the tile does not fit images of this size; None if it does."""
    if height % tile.rows or ceil(height / tile.rows) > tile.bands or width > tile.columns:
        return (
            f"{tile.bands} bands of {tile.rows} rows and {tile.columns} columns do not cover images of "
            f"{height}x{width} pixels evenly"
        )
    return None


def why_invalid(tile: MBConvHopperTile, shape: MBConvShape, processor: Processor) -> str | None:
    """Why the kernel cannot, or should not, run `shape` with this tile on `processor`; None if it is valid."""
    if processor.compute_capability != COMPUTE_CAPABILITY:
        needed, found = (".".join(map(str, pair)) for pair in (COMPUTE_CAPABILITY, processor.compute_capability))
        return f"it is for compute capability {needed}, {processor.name} has {found}"
    general = why_unsupported(shape) or why_malformed(tile) or why_not_covering(tile, shape.height, shape.width)
    if general:
        return general
    registers = estimated_registers(tile, shape)
    if registers > MAX_REGISTERS:
        return (
            f"about {registers:.0f} registers a thread would spill, {MAX_REGISTERS} are available: the sums of "
            f"{shape.out_channels} output channels and weights of {shape.squeeze_channels} squeeze channels stay in "
            "registers"
        )
    local = local_memory_bytes(tile, shape, processor)
    if local > processor.local_memory_bytes:
        return (
            f"input, row buffers and weights of {kilobytes(local)} do not fit the "
            f"{kilobytes(processor.local_memory_bytes)} of local memory that {processor.name} has"
        )
    return None


def why_none(shape: MBConvShape, processor: Processor) -> str | None:
    """Why no tile runs `shape` on `processor`; None if some tile does."""
    tiles = list(_tiles(shape))
    reasons = [why_invalid(tile, shape, processor) for tile in tiles]
    if not tiles:
        return why_unsupported(shape)
    return None if None in reasons else reasons[-1]


def local_memory_bytes(tile: MBConvHopperTile, shape: MBConvShape, processor: Processor) -> int:
    """Shared memory of a program, in bytes. The compiler may need some bytes less."""
    in_slabs, store_slabs = tile.in_slabs(shape.in_channels), tile.store_slabs(shape.out_channels)
    channels = sum(in_slabs) + (0 if in_slabs == store_slabs else sum(store_slabs))  # else the output takes its place
    biases = PARTITIONS * tile.bias_elements(shape.hidden_channels)
    gates = tile.images * tile.gate_steps(shape.hidden_channels) * GATES
    elements = ELEMENT_SIZE[shape.dtype] * (tile.pixels * channels + biases + gates)
    arena = tile.arena_atoms(shape.out_channels, shape.squeeze_channels) * ARENA_ATOM
    return elements + arena + COMPILER_BYTES


def estimated_registers(tile: MBConvHopperTile, shape: MBConvShape) -> float:
    """32-bit registers a thread: of the expansion, of excite weights, or of the projection with its left operands."""
    expansion = CHUNK * tile.pixels / (32 * WARPS) + CHUNK / 2
    if tile.splits_columns:
        blocks, channels = 1, WIDEST * ceil(tile.out_tiles(shape.out_channels) / PARTITIONS)
    else:
        blocks = tile.blocks // PARTITIONS // tile.passes(shape.out_channels)
        channels = sum(tile.out_slabs(shape.out_channels))
    projection = blocks * (channels / 2 + 2 * tile.step(shape.out_channels) / 4)
    excitation = tile.squeeze(shape.squeeze_channels) * GATES / (2 * 32 * WARPS)
    return 60 + max(expansion, excitation, projection)


def programs_per_processor(tile: MBConvHopperTile, shape: MBConvShape, processor: Processor) -> int:
    """Programs that a streaming multiprocessor holds at a time: two partitions take all its registers."""
    return 1


def predicted_us(tile: MBConvHopperTile, shape: MBConvShape, processor: Processor) -> float:
    """Predicted duration in microseconds: a fixed cost, and programs in rounds.

    A program's time is that of its pixels, and of what it reads from L2 and writes there.
    """
    chunks = tile.chunks(shape.hidden_channels)
    rounds = ceil(ceil(shape.batch / tile.images) / processor.processors)
    # Columns of all matrices of a chunk, and its pixels, which are written and read.
    columns = sum(tile.in_slabs(shape.in_channels)) + 2 * tile.squeeze(shape.squeeze_channels)
    columns += WIDEST * tile.out_tiles(shape.out_channels) * tile.passes(shape.out_channels)
    elements = chunks * (CHUNK * (columns + 2 * tile.pixels) + 2 * TAPS_ELEMENTS)
    l2_us = ELEMENT_SIZE[shape.dtype] * elements / BYTES_PER_US
    return LAUNCH_US + rounds * (chunks * tile.pixels * PIXEL_US + l2_us)


def candidate_tiles(shape: MBConvShape, processor: Processor) -> Iterator[MBConvHopperTile]:
    """Every valid tile worth a measurement."""
    return (tile for tile in _tiles(shape) if why_invalid(tile, shape, processor) is None)


def _tiles(shape: MBConvShape) -> Iterator[MBConvHopperTile]:
    for (rows, bands, columns), images in product(_divisions(shape.height, shape.width), (1, 2, 4)):
        tile = MBConvHopperTile(images, rows, bands, columns)
        if why_malformed(tile) is None:
            yield tile


def _divisions(height: int, width: int) -> Iterator[tuple[int, int, int]]:
    """Rows, bands and columns that cover an image; bands are added to reach a block of pixels."""
    columns = 1 << (width - 1).bit_length()
    for rows in ROWS:
        bands = max(1 << (ceil(height / rows) - 1).bit_length(), ceil(BLOCK_PIXELS / columns))
        if height % rows == 0 and rows * bands * columns <= MAX_PIXELS:
            yield rows, bands, columns

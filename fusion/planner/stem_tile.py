"""Tile of the stem kernel: how it divides a dense 3x3 convolution of stride 2, what is valid, how long it should take.

An image has too few channels for a matrix product over channels. So a row of the product is a *group* of neighbouring
output pixels: for each of the three rows of the filter a `Window` of elements that lie next to each other in memory,
which the group shares, and a fourth one that is one in its first elements, for the bias. The right operand is the
filter, once for each pixel of the group, with zeros where a pixel does not look. Its columns are the output pixels'
channels, as they lie in memory. `why_invalid` is the one judge of validity, for the planner's choice and for the
tuner's candidates.
"""

from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from itertools import product
from math import ceil, gcd, prod

from fusion.planner.graph import ELEMENT_SIZE
from fusion.planner.match import StemShape
from fusion.planner.processor import Processor
from fusion.planner.slabs import NARROWEST
from fusion.planner.tile import (
    CHANNEL_MULTIPLE,
    KERNEL_DTYPES,
    MAX_IMAGE_ELEMENTS,
    MAX_REGISTERS,
    MAX_WARPS_PER_PROCESSOR,
    TENSOR_CORES,
    WARP_SIZE,
)

KERNEL_SIZE = 3
WINDOWS = KERNEL_SIZE + 1
"""Of a group: rows of the filter, and the bias. A product's depth has to be a power of two."""
BIAS_TERMS = 2
"""Of the bias in 16 bits: rounded, and what rounding took away."""
STRIDE = 2
MAX_IN_CHANNELS = 4
MAX_OUT_CHANNELS = 64
MAX_COLUMNS = 128
"""Of a product. One product a program: of two, Triton 3.6 gives the second one wrong on Hopper."""
GROUPS = (2, 4)
MAX_WARPS = 8
MAX_GRID = 65535
"""Programs along the second and the third dimension of a launch."""

# Fitted to eight stems on an H200 and an H100 at batch 128 (compile*.json, stride2_exploration.json in bench/results):
# 8 % off (root mean square).
LAUNCH_US = 4.0
DRAM_SHARE = 0.9
"""Part of the bandwidth that reading and writing at once can have."""
LOCAL_BYTES_PER_US = 72e3
"""Windows, and outputs on their way to where they are stored, that a processor moves to and from shared memory."""
PROGRAM_US = 1.0
"""Latency of a program from its first load to its last store, without what it has to do meanwhile."""
WARP_ROWS = 32
"""Rows of a warp that take as long again."""
PRODUCT_SHARE = 0.5
"""Part of the peak that products as narrow as these reach."""


@dataclass(frozen=True)
class Window:
    """What a group needs of an input row: `columns` elements, a power of two.

    Interleaved channels (channels_last): pixel p and channel c, counted from the group's first input pixel, is element
    `lead + p * channels + c` of `span` elements that lie next to each other. Planar channels: pixel p is element
    `lead + p` of the `span` that a channel has, and channels follow each other. What is past these is padding.
    """

    channels: int
    planar: bool
    lead: int
    span: int
    columns: int

    def column(self, pixel: int, channel: int) -> int:
        """Where pixel `pixel` of channel `channel` is; the group's first input pixel is 0, the one before it -1."""
        if self.planar:
            return channel * self.span + self.lead + pixel
        return self.lead + pixel * self.channels + channel

    def vector(self, group: int, width: int) -> int:
        """Elements of a load, for rows of `width` pixels: as many as divide both a row and the way between windows."""
        return gcd(STRIDE * group, width if self.planar else width * self.channels)


def window(in_channels: int, group: int, planar: bool) -> Window:
    """The window of a group of `group` output pixels. It starts where a load of 2 * `group` elements may."""
    pixels = STRIDE * group
    if planar:
        span = 2 * pixels
        return Window(in_channels, planar, pixels, span, max(NARROWEST, span * _power_of_two(in_channels)))
    lead = ceil(in_channels / pixels) * pixels
    span = lead + pixels * in_channels
    return Window(in_channels, planar, lead, span, max(NARROWEST, _power_of_two(span)))


@dataclass(frozen=True)
class StemTile:
    """One way to run the stem kernel.

    A program computes `height x width` output pixels, `group` neighbours in a row of its products, with `warps` warps.
    """

    height: int
    width: int
    group: int
    warps: int

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"StemTile: {field.name} must be a positive integer, got {value!r}")

    @property
    def rows(self) -> int:
        """Rows of a product: groups of a program."""
        return self.height * self.width // self.group

    def columns(self, out_channels: int) -> int:
        """Columns of a product: the channels of all output pixels of a group, and padding up to a power of two."""
        return max(NARROWEST, _power_of_two(self.group * out_channels))

    def grid(self, batch: int, height: int, width: int) -> tuple[int, int, int]:
        """Tiles that cover an output of `height x width` pixels: in a row, rows of tiles, and images."""
        return ceil(width / self.width), ceil(height / self.height), batch

    def programs(self, batch: int, height: int, width: int) -> int:
        """Number of tiles that cover an output of `height x width` pixels."""
        return prod(self.grid(batch, height, width))

    def to_ints(self) -> list[int]:
        """The fields in order, for operators and files that take integers only; `StemTile(*ints)` undoes it."""
        return list(astuple(self))


def why_unsupported(shape: StemShape) -> str | None:
    """Why no tile runs this convolution, and what to do instead; None if some tile may."""
    if shape.dtype not in KERNEL_DTYPES:
        return f"dtype {shape.dtype} is not supported, use one of {', '.join(KERNEL_DTYPES)}"
    if shape.in_channels > MAX_IN_CHANNELS:
        return (
            f"in_channels={shape.in_channels} is not supported, the kernel is for images of up to {MAX_IN_CHANNELS} "
            "channels"
        )
    if shape.out_channels % CHANNEL_MULTIPLE or shape.out_channels > MAX_OUT_CHANNELS:
        return (
            f"out_channels={shape.out_channels} is not supported, use a multiple of {CHANNEL_MULTIPLE} up to "
            f"{MAX_OUT_CHANNELS}"
        )
    elements = shape.height * shape.width * shape.in_channels, shape.out_height * shape.out_width * shape.out_channels
    if max(elements) > MAX_IMAGE_ELEMENTS:
        return f"images of {shape.height}x{shape.width} pixels are too large, split them: 2**31 elements are the limit"
    return None


def why_malformed(tile: StemTile) -> str | None:
    """Why the kernel runs nothing with this tile; None if it may."""
    for name in ("height", "width", "warps"):
        if getattr(tile, name) & (getattr(tile, name) - 1):
            return f"{name}={getattr(tile, name)} is not a power of two"
    if tile.group not in GROUPS:
        return f"group={tile.group} is not one of {', '.join(map(str, GROUPS))}"
    if tile.rows < NARROWEST:
        return f"{tile.rows} groups are too few for a matrix product, use at least {NARROWEST}"
    if tile.warps > MAX_WARPS:
        return f"{tile.warps} warps are more than are of use, {MAX_WARPS}"
    return None


def why_not_launched(tile: StemTile, batch: int, height: int, width: int) -> str | None:
    """Why a launch cannot have the programs for an output of `height x width` pixels; None if it can."""
    _, rows, images = tile.grid(batch, height, width)
    if max(rows, images) > MAX_GRID:
        return (
            f"{images} images and {rows} rows of tiles are too many for a launch, split the batch or the images: "
            f"{MAX_GRID} of each are the limit"
        )
    return None


def why_invalid(tile: StemTile, shape: StemShape, processor: Processor) -> str | None:
    """Why the kernel cannot, or should not, run `shape` with this tile on `processor`; None if it is valid."""
    general = (
        why_unsupported(shape)
        or why_malformed(tile)
        or why_not_launched(tile, shape.batch, shape.out_height, shape.out_width)
    )
    if general:
        return general
    if tile.columns(shape.out_channels) > MAX_COLUMNS:
        return f"groups of {tile.group} pixels have {tile.group * shape.out_channels} channels, {MAX_COLUMNS} at most"
    if tile.rows < NARROWEST * tile.warps:
        return f"{tile.warps} warps are too many for {tile.rows} groups of {tile.group} pixels"
    local = local_memory_bytes(tile, shape, processor)
    if local > processor.local_memory_bytes:
        return f"{local} bytes of local memory are more than {processor.name} has, {processor.local_memory_bytes}"
    registers = estimated_registers(tile, shape)
    if registers > MAX_REGISTERS:
        return f"about {registers:.0f} registers a thread would spill, {MAX_REGISTERS} are available"
    return None


def why_none(shape: StemShape, processor: Processor) -> str | None:
    """Why no tile runs `shape` on `processor`; None if some tile does."""
    if next(candidate_tiles(shape, processor), None) is not None:
        return None
    least = StemTile(1, NARROWEST * min(GROUPS), min(GROUPS), 1)
    return why_invalid(least, shape, processor) or "its channels need more registers than a thread has"


def local_memory_bytes(tile: StemTile, shape: StemShape, processor: Processor) -> int:
    """Shared memory of a program, in bytes, for the hungrier memory format of the input: a contiguous one."""
    return max(_local_memory_bytes(tile, shape, planar) for planar in (False, True))


def _local_memory_bytes(tile: StemTile, shape: StemShape, planar: bool) -> int:
    # Windows and weights. The output is there later, on its way to where it is stored.
    depth = WINDOWS * window(shape.in_channels, tile.group, planar).columns
    columns = tile.columns(shape.out_channels)
    return ELEMENT_SIZE[shape.dtype] * max(depth * (tile.rows + columns), tile.rows * columns)


def estimated_registers(tile: StemTile, shape: StemShape) -> float:
    """32-bit registers a thread: fp32 sums, half of the windows as loaded, and addresses."""
    depth = WINDOWS * window(shape.in_channels, tile.group, planar=False).columns
    return tile.rows * (tile.columns(shape.out_channels) + depth / 4) / (tile.warps * WARP_SIZE) + 30


def programs_per_processor(tile: StemTile, shape: StemShape, processor: Processor) -> int:
    """Programs that a streaming multiprocessor holds at a time (occupancy), as its memories and warp slots allow.

    For a channels_last input, as the predicted time.
    """
    registers = min(estimated_registers(tile, shape), MAX_REGISTERS) * tile.warps * WARP_SIZE
    return max(
        1,
        min(
            int(processor.registers_per_processor // registers),
            processor.local_memory_bytes // _local_memory_bytes(tile, shape, planar=False),
            MAX_WARPS_PER_PROCESSOR // tile.warps,
        ),
    )


def predicted_us(tile: StemTile, shape: StemShape, processor: Processor) -> float:
    """Predicted duration of a launch in microseconds.

    A fixed cost, and the largest of four times: input and output through DRAM, windows and output through shared
    memory, the products as the kernel pads them, and the latency of one program after the other. Few programs leave
    processors, and so bandwidth, idle. What tiles reach past the image costs DRAM less than what lies in it.
    """
    programs = tile.programs(shape.batch, shape.out_height, shape.out_width)
    covered = programs * tile.height * tile.width / (shape.batch * shape.out_height * shape.out_width)
    dram_us = shape.activation_bytes / (DRAM_SHARE * processor.bandwidth) * 1e6
    depth = WINDOWS * window(shape.in_channels, tile.group, planar=False).columns
    ops = 2 * programs * tile.rows * depth * tile.columns(shape.out_channels)
    occupancy = programs_per_processor(tile, shape, processor)
    load = programs / processor.processors
    busy = min(1.0, load) * min(1.0, min(occupancy, ceil(load)) * tile.warps / TENSOR_CORES)
    product_us = ops / (PRODUCT_SHARE * busy * processor.peak_ops) * 1e6
    program_us = PROGRAM_US * (1 + tile.rows / (WARP_ROWS * tile.warps))
    latency_us = program_us * max(1.0, load / occupancy)
    local_bytes = 2 * ELEMENT_SIZE[shape.dtype] * tile.rows * (depth + tile.columns(shape.out_channels))
    local_us = max(1.0, load) * local_bytes / LOCAL_BYTES_PER_US
    return LAUNCH_US + max(dram_us * covered**0.5 / min(1.0, load), local_us, product_us, latency_us)


def candidate_tiles(shape: StemShape, processor: Processor) -> Iterator[StemTile]:
    """Every valid tile worth a measurement; where predictions tie, what should be better comes first."""
    pixel_tiles = ((2, 128), (4, 128), (4, 64), (1, 128), (2, 64), (8, 32), (4, 32), (8, 16), (1, 64), (2, 32), (4, 16))
    for group, (height, width), warps in product(GROUPS, pixel_tiles, (8, 4, 2, 1)):
        tile = StemTile(height, width, group, warps)
        if why_invalid(tile, shape, processor) is None:
            yield tile


def _power_of_two(size: int) -> int:
    """The least power of two that is no less."""
    return 1 << (size - 1).bit_length()

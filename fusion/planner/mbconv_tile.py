"""Tile of the portable MBConv kernels: what may be chosen, what is valid, and how long it should take.

A block runs as two kernels, a micro-batch of images at a time. The first one leaves the hidden tensor and the squeeze
vector in global memory, the second one gates and projects it. `why_invalid` is the one judge of validity, for the
planner's choice and for the tuner's candidates.
"""

from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields, replace
from itertools import product
from math import ceil

from fusion.planner.graph import ELEMENT_SIZE
from fusion.planner.match import MBConvShape
from fusion.planner.mbconv_project import (
    LAUNCH_US,
    ProjectTile,
    launch_us,
    occupancy,
    project_bytes,
    project_columns,
    project_fields,
    project_occupancy,
    project_registers,
    project_us,
    uses_tensor_memory,
)
from fusion.planner.processor import Processor, kilobytes
from fusion.planner.slabs import NARROWEST
from fusion.planner.tile import (
    CHANNEL_MULTIPLE,
    KERNEL_DTYPES,
    MAX_IMAGE_ELEMENTS,
    MAX_REGISTERS,
    MIN_HIDDEN_STEPS,
    MIN_STAGES,
    SPILL_ALLOWANCE,
    TENSOR_MEMORY_COLUMNS,
    TENSOR_MEMORY_LANES,
    WARP_SIZE,
)

MAX_GROUP_WIDTH = 64
MAX_WINDOW_PIXELS = 128
"""Of the window that are expanded together."""
WORKSPACE_SHARE = 0.5
"""Of the L2 cache that a micro-batch may fill with its hidden tensor: weights, input and output need room too."""
MAX_EXPAND_SUMS = 64
"""Of the expansion that a thread holds: with twice as many, kernels compiled for compute capability 9.0 spilled."""
KERNEL_SIZES = (3, 5)
"""Of the grouped convolution."""
PRODUCE_FIELDS = 8
"""Of a tile that are the first kernel's; those of the second one follow."""
BEST_HALVES = 2
"""Best predictions for one kernel that are combined with every way to run the other."""

# Fitted to launches of single kernels on an H200, blocks of 128 and 256 channels at batch 128: predictions of the first
# kernel are 17 % off (root mean square; no record).
EXPAND_COST = 2.1
"""Time of the expansion with its activation over its products'."""
CONV_COST = 0.64
"""Part of the time of the convolution's products that is not hidden behind its loads."""
NARROW_CONV_COST = 4.3
"""The same for slabs of 16 channels."""
VIEW_COST = 1.4
"""Time of the views of the window, one for each tap, over that of their bytes at the L2 cache's bandwidth."""
STEP_US = 0.27
"""One dependent step of the first kernel: barrier, product, and the wait for its operands."""


@dataclass(frozen=True)
class MBConvTile(ProjectTile):
    """One way to run the two MBConv kernels.

    Both run on `images` images at a time. A program of the first one has `warps` warps and computes `hidden` of the
    hidden channels for `height x width` pixels: the expansion in steps of `channels` input channels, the convolution
    in slabs of `conv_slab` channels, both as pipelines of `stages` stages. A program of the second one has
    `project_warps` warps and computes up to `project_out` output channels for `project_pixels` pixels, in steps of
    `project_hidden` hidden channels and `project_stages` stages.
    """

    images: int
    height: int
    width: int
    hidden: int
    channels: int
    conv_slab: int
    warps: int
    stages: int
    project_pixels: int
    project_hidden: int
    project_out: int
    project_warps: int
    project_stages: int

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"MBConvTile: {field.name} must be a positive integer, got {value!r}")

    @property
    def pixels(self) -> int:
        """Pixels of a program of the first kernel."""
        return self.height * self.width

    @property
    def window_pixels(self) -> int:
        """Pixels of the window that are expanded together."""
        return min(self.pixels, MAX_WINDOW_PIXELS)

    def window(self, height: int, width: int, kernel_size: int) -> tuple[int, int]:
        """Height and width of what a program of the first kernel expands: its pixels and their neighbours."""
        return min(self.height + kernel_size - 1, height), min(self.width + kernel_size - 1, width)

    def padded_in(self, in_channels: int) -> int:
        """Input channels that are multiplied: whole steps of the loop, and at least `MIN_HIDDEN_STEPS`."""
        return max(MIN_HIDDEN_STEPS, ceil(in_channels / self.channels)) * self.channels

    def parts(self, height: int, width: int, hidden_channels: int) -> int:
        """Programs of the first kernel for an image: pixel tiles times groups of hidden channels."""
        tiles = ceil(height / self.height) * ceil(width / self.width)
        return tiles * (self.padded_hidden(hidden_channels) // self.hidden)

    def to_ints(self) -> list[int]:
        """The fields in order, for operators and files that take integers only; `MBConvTile(*ints)` undoes it."""
        return list(astuple(self))


def why_unsupported(shape: MBConvShape) -> str | None:
    """Why no tile runs this block, and what to do instead; None if some tile may."""
    if shape.dtype not in KERNEL_DTYPES:
        return f"dtype {shape.dtype} is not supported, use one of {', '.join(KERNEL_DTYPES)}"
    for name in ("in_channels", "out_channels"):
        if getattr(shape, name) % CHANNEL_MULTIPLE:
            return f"{name}={getattr(shape, name)} is not supported, use a multiple of {CHANNEL_MULTIPLE}"
    return (
        why_kernel_size_unsupported(shape.kernel_size)
        or why_group_unsupported(shape.group_width)
        or why_too_large(shape)
    )


def why_kernel_size_unsupported(kernel_size: int) -> str | None:
    """Why no tile runs convolutions of this size; None if some tile may."""
    if kernel_size not in KERNEL_SIZES:
        return f"kernel size {kernel_size} is not supported, use {' or '.join(map(str, KERNEL_SIZES))}"
    return None


def why_group_unsupported(group_width: int) -> str | None:
    """Why no tile runs groups of so many channels; None if some tile may."""
    if group_width > MAX_GROUP_WIDTH or group_width & (group_width - 1):
        return f"group width {group_width} is not supported, use a power of two up to {MAX_GROUP_WIDTH}"
    return None


def why_too_large(shape: MBConvShape, tile: MBConvTile | None = None) -> str | None:
    """Why images are too large for the offsets within one, with the padding of a tile, if given; None if they fit."""
    hidden = shape.hidden_channels if tile is None else tile.padded_hidden(shape.hidden_channels)
    if shape.height * shape.width * max(shape.in_channels, hidden, shape.out_channels) > MAX_IMAGE_ELEMENTS:
        return (
            f"images of {shape.height}x{shape.width} pixels are too large, split them: 2**31 elements of the input, "
            "hidden or output tensor are the limit"
        )
    return None


def why_malformed(tile: MBConvTile) -> str | None:
    """Why the kernels give right results for no block with this tile; None if they may."""
    for field in fields(tile):
        value = getattr(tile, field.name)
        if field.name not in ("images", "stages", "project_stages") and value & (value - 1):
            return f"{field.name}={value} is not a power of two"
    if min(tile.pixels, tile.hidden, tile.channels, tile.conv_slab) < NARROWEST:
        return f"a matrix product needs at least {NARROWEST} pixels, hidden channels, channels and slabs of as many"
    if min(tile.project_pixels, tile.project_hidden, tile.project_out) < NARROWEST:
        return f"a matrix product needs at least {NARROWEST} pixels, hidden channels and output channels"
    if tile.conv_slab > tile.hidden:
        return f"slabs of {tile.conv_slab} channels are wider than the {tile.hidden} hidden channels of a program"
    if min(tile.stages, tile.project_stages) < MIN_STAGES:
        return f"loops must be pipelined, in {MIN_STAGES} stages at least"
    if max(tile.warps, tile.project_warps) > 16:
        return f"{max(tile.warps, tile.project_warps)} warps are more than a program may have, 16"
    return None


def why_splits_groups(tile: MBConvTile, group_width: int) -> str | None:
    """Why the convolution cannot have groups of so many channels with this tile; None if it can."""
    if tile.conv_slab % group_width:
        return f"slabs of {tile.conv_slab} channels split groups of {group_width}"
    return None


def why_invalid(tile: MBConvTile, shape: MBConvShape, processor: Processor) -> str | None:
    """Why the kernels cannot, or should not, run `shape` with this tile on `processor`; None if it is valid."""
    general = (
        why_unsupported(shape)
        or why_malformed(tile)
        or why_splits_groups(tile, shape.group_width)
        or why_too_large(shape, tile)
    )
    if general:
        return general
    for pixels, warps in ((tile.window_pixels, tile.warps), (tile.project_pixels, tile.project_warps)):
        if pixels < 8 * warps:
            return f"{warps} warps are too many for {pixels} pixels"
    local = local_memory_bytes(tile, shape, processor)
    if local > processor.local_memory_bytes:
        return f"{kilobytes(local)} of local memory are more than {processor.name} has"
    columns = tensor_memory_columns(tile, shape, processor)
    if columns > TENSOR_MEMORY_COLUMNS:
        return f"about {columns} columns of tensor memory are more than there are, {TENSOR_MEMORY_COLUMNS}"
    sums = tile.window_pixels * tile.hidden // (tile.warps * WARP_SIZE)
    if sums > MAX_EXPAND_SUMS:
        return f"{sums} sums of the expansion a thread would spill, {MAX_EXPAND_SUMS} do not"
    registers = estimated_registers(tile, shape)
    if registers > SPILL_ALLOWANCE * MAX_REGISTERS:
        return f"about {registers:.0f} registers a thread would spill, {MAX_REGISTERS} are available"
    return None


def why_none(shape: MBConvShape, processor: Processor) -> str | None:
    """Why no tile runs `shape` on `processor`; None if some tile does."""
    halves = _produce_halves(shape, processor), _project_halves(shape, processor)
    if all(next(tiles, None) is not None for tiles in halves):
        return None
    return why_unsupported(shape) or "its squeeze vector needs more registers or shared memory than a processor has"


def local_memory_bytes(tile: MBConvTile, shape: MBConvShape, processor: Processor) -> int:
    """Shared memory of a program of the hungrier kernel, in bytes: the operands in flight of its loops.

    Where products accumulate in tensor memory, the operands that other processors keep in registers come on top.
    """
    return max(_produce_bytes(tile, shape), project_bytes(tile, shape, processor))


def tensor_memory_columns(tile: MBConvTile, shape: MBConvShape, processor: Processor) -> int:
    """Upper bound on the columns of tensor memory that a program's sums take; 0 where registers hold them."""
    if not uses_tensor_memory(processor):
        return 0
    expand = ceil(tile.window_pixels / TENSOR_MEMORY_LANES) * tile.hidden
    conv = ceil(tile.pixels / TENSOR_MEMORY_LANES) * tile.conv_slab
    return max(expand + conv, project_columns(tile, shape))


def estimated_registers(tile: MBConvTile, shape: MBConvShape) -> float:
    """32-bit registers a thread of the hungrier kernel: fp32 sums, what they are rounded to, and addresses."""
    return max(_produce_registers(tile, shape), project_registers(tile, shape))


def programs_per_processor(tile: MBConvTile, shape: MBConvShape, processor: Processor) -> int:
    """Programs of either kernel that a streaming multiprocessor holds at a time (occupancy), at least."""
    return min(_produce_occupancy(tile, shape, processor), project_occupancy(tile, shape, processor))


def images_that_fit(tile: MBConvTile, shape: MBConvShape, processor: Processor) -> int:
    """Images of a micro-batch whose hidden tensor and scratch memory stay in L2, one at least.

    A batch is divided into micro-batches of nearly equal size.
    """
    image = ELEMENT_SIZE[shape.dtype] * sum(workspace_elements(tile, shape))
    fitting = max(1, int(WORKSPACE_SHARE * processor.global_memory_bytes / image))
    return ceil(shape.batch / ceil(shape.batch / fitting))


def workspace_elements(tile: MBConvTile, shape: MBConvShape) -> tuple[int, int]:
    """Elements of the hidden tensor and of the scratch memory, for an image."""
    window_height, window_width = tile.window(shape.height, shape.width, shape.kernel_size)
    hidden = tile.padded_hidden(shape.hidden_channels)
    parts = tile.parts(shape.height, shape.width, shape.hidden_channels)
    return shape.height * shape.width * hidden, parts * window_height * window_width * tile.hidden


def predicted_us(tile: MBConvTile, shape: MBConvShape, processor: Processor) -> float:
    """Predicted duration of the block in microseconds.

    Every micro-batch costs two kernels, and each of them a fixed time, its matrix products as they are padded, its
    traffic through global memory, and the latency of the dependent steps of a program, constants fitted to
    measurements. Few programs leave processors idle, and registers that spill slow all of it. No less than what the
    program moves through DRAM takes: the input, the output, and the input once more for the residual.
    """
    pixel_bytes = shape.pixel_bytes + shape.residual * ELEMENT_SIZE[shape.dtype] * shape.in_channels
    dram_us = shape.pixels * pixel_bytes / processor.bandwidth * 1e6
    produce = _produce_occupancy(tile, shape, processor)
    project = project_occupancy(tile, shape, processor)
    us = 0.0
    for images, count in ((tile.images, shape.batch // tile.images), (shape.batch % tile.images, 1)):
        if images:
            us += count * _produce_us(tile, shape, processor, images, produce)
            us += count * project_us(tile, shape, processor, images, project)
    return max(us, LAUNCH_US + dram_us)


def design(tile: MBConvTile) -> tuple[int, ...]:
    """What tells tiles apart by more than the depth and the steps of their pipelines."""
    produce = tile.pixels, tile.hidden, tile.conv_slab, tile.warps
    return *produce, tile.project_pixels, tile.project_out, tile.project_warps


def candidate_tiles(shape: MBConvShape, processor: Processor) -> Iterator[MBConvTile]:
    """Every valid tile worth a measurement.

    The two kernels have little to do with each other: every way to run one is combined with the best predictions for
    the other, and not all with all.
    """
    produces = sorted(_produce_halves(shape, processor), key=lambda tile: predicted_us(tile, shape, processor))
    projects = sorted(_project_halves(shape, processor), key=lambda tile: predicted_us(tile, shape, processor))
    produces = [tuple(tile.to_ints()[:PRODUCE_FIELDS]) for tile in produces]
    projects = [tuple(tile.to_ints()[PRODUCE_FIELDS:]) for tile in projects]
    pairs = [(produce, project) for produce in produces for project in projects[:BEST_HALVES]]
    pairs += [(produce, project) for produce in produces[:BEST_HALVES] for project in projects]
    for produce, project in dict.fromkeys(pairs):
        tile = MBConvTile(*produce, *project)
        tile = replace(tile, images=images_that_fit(tile, shape, processor))
        if why_invalid(tile, shape, processor) is None:
            yield tile


def _produce_halves(shape: MBConvShape, processor: Processor) -> Iterator[MBConvTile]:
    """Valid tiles that differ in the first kernel, and ask for as little as they can in the second."""
    pixel_tiles = dict.fromkeys(_covering(shape, pixels) for pixels in (256, 128, 64, 32, 16))
    for stages, (height, width), hidden, channels, conv_slab, warps in product(
        (3, 4, 2), pixel_tiles, (64, 128, 32, 16), (32, 64, 16), (32, 16, 64), (4, 8, 2)
    ):
        tile = MBConvTile(shape.batch, height, width, hidden, channels, conv_slab, warps, stages, 16, 16, 16, 2, 2)
        if why_invalid(tile, shape, processor) is None:
            yield tile


def _project_halves(shape: MBConvShape, processor: Processor) -> Iterator[MBConvTile]:
    """Valid tiles that differ in the second kernel, and ask for as little as they can in the first."""
    slab = max(NARROWEST, shape.group_width)
    for fields_of_project in project_fields(shape):
        tile = MBConvTile(shape.batch, 4, 4, slab, 16, slab, 2, 2, *fields_of_project)
        if why_invalid(tile, shape, processor) is None:
            yield tile


def _covering(shape: MBConvShape, pixels: int) -> tuple[int, int]:
    """Height and width, powers of two, of the tiles of at most so many pixels that expand fewest."""

    def expanded(size: tuple[int, int]) -> tuple[int, int]:
        height, width = size
        tiles = ceil(shape.height / height) * ceil(shape.width / width)
        more = shape.kernel_size - 1
        window = min(height + more, shape.height) * min(width + more, shape.width)
        return tiles * (window + height * width), abs(width - height)

    least = min(pixels, 1 << max(0, (shape.height - 1).bit_length() + (shape.width - 1).bit_length()))
    pixels = max(NARROWEST, least)
    return min(((pixels >> shift, 1 << shift) for shift in range(pixels.bit_length())), key=expanded)


def _produce_us(tile: MBConvTile, shape: MBConvShape, processor: Processor, images: int, occupancy: int) -> float:
    window_height, window_width = tile.window(shape.height, shape.width, shape.kernel_size)
    rounds = ceil(window_height * window_width / tile.window_pixels)
    ins, taps = tile.padded_in(shape.in_channels), shape.kernel_size**2
    expand_ops = 2 * tile.hidden * rounds * tile.window_pixels * ins
    conv_ops = 2 * tile.hidden * taps * tile.pixels * tile.conv_slab
    conv_cost = NARROW_CONV_COST if tile.conv_slab == NARROWEST else CONV_COST
    work_us = (EXPAND_COST * expand_ops + conv_cost * conv_ops) / processor.peak_ops * 1e6
    view_bytes = ELEMENT_SIZE[shape.dtype] * taps * tile.pixels * tile.hidden
    views_us = VIEW_COST * view_bytes / processor.global_bandwidth * 1e6
    steps_us = STEP_US * (rounds * ins // tile.channels + taps * tile.hidden // tile.conv_slab)
    programs = images * tile.parts(shape.height, shape.width, shape.hidden_channels)
    registers = _produce_registers(tile, shape)
    return launch_us(processor, programs, work_us, views_us, steps_us, registers, occupancy)


def _produce_occupancy(tile: MBConvTile, shape: MBConvShape, processor: Processor) -> int:
    """Programs of the first kernel that a streaming multiprocessor holds at a time."""
    return occupancy(_produce_registers(tile, shape), _produce_bytes(tile, shape), tile.warps, processor)


def _produce_bytes(tile: MBConvTile, shape: MBConvShape) -> int:
    expand = tile.stages * tile.channels * (tile.window_pixels + tile.hidden)
    conv = tile.stages * tile.conv_slab * (tile.pixels + tile.conv_slab)
    # A tile of hidden channels changes its layout on the way to global memory, through shared memory.
    store = max(tile.window_pixels * tile.hidden, tile.pixels * tile.conv_slab)
    return ELEMENT_SIZE[shape.dtype] * max(expand, conv, store)


def _produce_registers(tile: MBConvTile, shape: MBConvShape) -> float:
    squeeze = tile.padded_squeeze(shape.squeeze_channels)
    expand = 1.5 * tile.window_pixels * tile.hidden
    conv = 1.5 * tile.pixels * tile.conv_slab + tile.conv_slab * squeeze
    return max(expand, conv) / (tile.warps * WARP_SIZE) + 40

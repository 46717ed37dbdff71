"""Tile of the portable kernels of stride-2 MBConv: what may be chosen, what is valid, and how long it should take.

A block runs as two kernels, a micro-batch of images at a time. The first one leaves the hidden tensor, blurred or
convolved with stride 2, and the squeeze vector in global memory; the second one is that of stride 1
(`fusion.planner.mbconv_project`). `why_invalid` is the one judge of validity, for the planner's choice and for the
tuner's candidates.
"""

from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields, replace
from itertools import product
from math import ceil

from fusion.planner.graph import ELEMENT_SIZE
from fusion.planner.match import MBConvDownShape, MBConvShape
from fusion.planner.mbconv_project import (
    LAUNCH_US,
    MAX_EXCITE_ELEMENTS,
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
from fusion.planner.mbconv_tile import (
    BEST_HALVES,
    EXPAND_COST,
    MAX_WINDOW_PIXELS,
    STEP_US,
    why_group_unsupported,
    why_kernel_size_unsupported,
    why_splits_groups,
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

QUAD = 4
"""Pixels of full resolution that one row of a product convolves, two rows of two."""
NEIGHBOURS = 16
"""Pixels that a quad's convolutions look at, four rows of four."""
QUAD_KERNEL_SIZE = 3
"""Of convolutions whose weights are matrices of quads; larger ones multiply pixel by pixel, tap by tap."""
STEP_CHANNELS = 64
"""Hidden channels of neighbours in one row that a step of the convolution multiplies, if slabs are no wider."""
EXPAND_SUMS = 32
"""Of the expansion that a thread holds: with twice as many, compiled kernels took all registers there are."""
COPY_BYTES = (16, 8)
BLUR_ELEMENTS = 16
"""Of a thread that are blurred together, each from nine loads."""
SCRATCH_SHARE = 0.5
"""Of the L2 cache that the programs of the first kernel may fill with what is theirs alone."""
HIDDEN_SHARE = 0.5
"""Of the L2 cache that a micro-batch may fill with its hidden tensor."""
LEAST_SIZE = 2
"""Rows and columns of an image: the blur reflects at its borders."""
PRODUCE_FIELDS = 11
"""Of a tile that are the first kernel's; those of the second one follow."""

# Chosen, not fitted: no tile has been timed yet. The expansion is that of stride 1.
CONV_COST = 1.5
"""Time of the convolution over its products'."""
BYTES_COST = 1.0
"""Part of the time of the first kernel's bytes, at the L2 cache's bandwidth, that is not hidden."""
REGISTERS_PER_SUM = 3.5
"""Of the expansion and of the convolution, as compiled for compute capability 9.0."""
REGISTERS_PER_VIEW = 2
"""Of the same, where quads have one pixel each: addresses and masks of an element of the convolution's operands."""
BLUR_VIEWS = 9 / 4
"""Loads of the blur for each element of full resolution."""


@dataclass(frozen=True)
class MBConvDownTile(ProjectTile):
    """One way to run the two kernels of an MBConv block of stride 2.

    Both run on `images` images at a time. Up to `programs` programs of the first one divide its parts and take one
    after the other: `hidden` of the hidden channels for `height x width` pixels of the output. A program has `warps`
    warps and computes the expansion in steps of `channels` input channels and the convolution in slabs of `conv_slab`
    channels, for `quads` quads (2x2 pixels of full resolution) at a time, both as pipelines of `stages` stages; the
    convolution's operands are copied in pieces of `copy_bytes` bytes, 16, or 8 by way of the L1 cache. A program of the
    second kernel has `project_warps` warps and computes up to `project_out` output channels for `project_pixels`
    pixels, in steps of `project_hidden` hidden channels and `project_stages` stages.

    Of a block without a blur-pool only the first pixel of each quad is convolved.
    """

    images: int
    programs: int
    height: int
    width: int
    hidden: int
    channels: int
    conv_slab: int
    quads: int
    warps: int
    stages: int
    copy_bytes: int
    project_pixels: int
    project_hidden: int
    project_out: int
    project_warps: int
    project_stages: int

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"MBConvDownTile: {field.name} must be a positive integer, got {value!r}")

    @property
    def window_pixels(self) -> int:
        """Pixels of the window that are expanded together, no more than a thread has registers for."""
        sums = EXPAND_SUMS * WARP_SIZE * self.warps // self.hidden
        return min(QUAD * self.quads, MAX_WINDOW_PIXELS, max(NARROWEST * self.warps, sums))

    @property
    def step_pixels(self) -> int:
        """Neighbours of a quad, in one row, that a step of the convolution multiplies, or taps: 4, 2 or 1."""
        return max(1, min(4, STEP_CHANNELS // self.conv_slab))

    def row_steps(self, blur: bool) -> int:
        """Steps of the convolution for the neighbours in one row: four of a quad, three of its first pixel."""
        return ceil((4 if blur else QUAD_KERNEL_SIZE) / self.step_pixels)

    def tap_steps(self, kernel_size: int) -> int:
        """Steps of a convolution whose weights are not matrices of quads."""
        return ceil(kernel_size**2 / self.step_pixels)

    def quad_window(self, out_height: int, out_width: int, blur: bool) -> tuple[int, int]:
        """Rows and columns of quads that a part convolves: one for each output pixel and, with a blur, one before."""
        return min(self.height + blur, out_height), min(self.width + blur, out_width)

    def window(self, height: int, width: int, blur: bool, kernel_size: int) -> tuple[int, int]:
        """Height and width of what a part expands, in pixels of the input: all neighbours of what it convolves."""
        rows, columns = self.quad_window(ceil(height / 2), ceil(width / 2), blur)
        more = kernel_size - 1 if blur else kernel_size - 2
        return min(2 * rows + more, height), min(2 * columns + more, width)

    def blur_channels(self, squeeze_channels: int) -> int:
        """Hidden channels that are blurred together, and multiplied with the squeeze layer."""
        return max(1, min(self.hidden, MAX_EXCITE_ELEMENTS // self.padded_squeeze(squeeze_channels)))

    def blur_pixels(self, squeeze_channels: int) -> int:
        """Pixels of the output that are blurred together."""
        elements = BLUR_ELEMENTS * WARP_SIZE * self.warps
        return min(self.height * self.width, max(1, elements // self.blur_channels(squeeze_channels)))

    def padded_in(self, in_channels: int) -> int:
        """Input channels that are multiplied: whole steps of the loop, and at least `MIN_HIDDEN_STEPS`."""
        return max(MIN_HIDDEN_STEPS, ceil(in_channels / self.channels)) * self.channels

    def parts(self, out_height: int, out_width: int, hidden_channels: int) -> int:
        """Parts of an image: tiles of the output times groups of hidden channels."""
        tiles = ceil(out_height / self.height) * ceil(out_width / self.width)
        return tiles * (self.padded_hidden(hidden_channels) // self.hidden)

    def scratch_elements(self, height: int, width: int, blur: bool, kernel_size: int) -> tuple[int, int]:
        """Elements of a program's scratch memory: its window's hidden channels and, for a blur, those of its quads,
        convolved."""
        window_height, window_width = self.window(height, width, blur, kernel_size)
        window_elements = window_height * window_width * self.hidden
        if not blur:
            return window_elements, 0
        rows, columns = self.quad_window(ceil(height / 2), ceil(width / 2), blur)
        return window_elements, QUAD * rows * columns * self.hidden

    def to_ints(self) -> list[int]:
        """The fields in order, for operators and files that take integers only; `MBConvDownTile(*ints)` undoes it."""
        return list(astuple(self))


def why_unsupported(shape: MBConvDownShape) -> str | None:
    """Why no tile runs this block, and what to do instead; None if some tile may."""
    if shape.dtype not in KERNEL_DTYPES:
        return f"dtype {shape.dtype} is not supported, use one of {', '.join(KERNEL_DTYPES)}"
    for name in ("in_channels", "out_channels"):
        if getattr(shape, name) % CHANNEL_MULTIPLE:
            return f"{name}={getattr(shape, name)} is not supported, use a multiple of {CHANNEL_MULTIPLE}"
    return (
        why_kernel_unsupported(shape.kernel_size, shape.blur)
        or why_group_unsupported(shape.group_width)
        or why_size_unsupported(shape.height, shape.width, shape.blur)
        or _why_too_large(shape)
    )


def why_kernel_unsupported(kernel_size: int, blur: bool) -> str | None:
    """Why no tile runs convolutions of this size, followed by a blur-pool or of stride 2; None if some tile may."""
    if blur and kernel_size != QUAD_KERNEL_SIZE:
        return (
            f"kernel size {kernel_size} with a blur-pool is not supported, use {QUAD_KERNEL_SIZE}, or let the "
            "convolution have stride 2"
        )
    return why_kernel_size_unsupported(kernel_size)


def why_size_unsupported(height: int, width: int, blur: bool) -> str | None:
    """Why images of this size cannot be blurred; None if they can, or need not be."""
    if blur and min(height, width) < LEAST_SIZE:
        return (
            f"images of {height}x{width} pixels are too small: a blur-pool reflects its input, use {LEAST_SIZE}x"
            f"{LEAST_SIZE} pixels at least"
        )
    return None


def why_malformed(tile: MBConvDownTile) -> str | None:
    """Why the kernels give right results for no block with this tile; None if they may."""
    for field in fields(tile):
        value = getattr(tile, field.name)
        if field.name not in ("images", "programs", "stages", "project_stages") and value & (value - 1):
            return f"{field.name}={value} is not a power of two"
    if min(tile.quads, tile.hidden, tile.channels, tile.conv_slab) < NARROWEST:
        return f"a matrix product needs at least {NARROWEST} quads, hidden channels, channels and slabs of as many"
    if min(tile.project_pixels, tile.project_hidden, tile.project_out) < NARROWEST:
        return f"a matrix product needs at least {NARROWEST} pixels, hidden channels and output channels"
    if tile.conv_slab > tile.hidden:
        return f"slabs of {tile.conv_slab} channels are wider than the {tile.hidden} hidden channels of a part"
    if tile.copy_bytes not in COPY_BYTES:
        return f"copies of {tile.copy_bytes} bytes are not supported, use {' or '.join(map(str, COPY_BYTES))}"
    if min(tile.stages, tile.project_stages) < MIN_STAGES:
        return f"loops must be pipelined, in {MIN_STAGES} stages at least"
    if max(tile.warps, tile.project_warps) > 16:
        return f"{max(tile.warps, tile.project_warps)} warps are more than a program may have, 16"
    return None


def why_invalid(tile: MBConvDownTile, shape: MBConvDownShape, processor: Processor) -> str | None:
    """Why the kernels cannot, or should not, run `shape` with this tile on `processor`; None if it is valid."""
    general = (
        why_unsupported(shape)
        or why_malformed(tile)
        or why_splits_groups(tile, shape.group_width)
        or _why_too_large(shape, tile)
    )
    if general:
        return general
    for pixels, warps in ((tile.quads, tile.warps), (tile.project_pixels, tile.project_warps)):
        if pixels < 8 * warps:
            return f"{warps} warps are too many for {pixels} rows of a product"
    local = local_memory_bytes(tile, shape, processor)
    if local > processor.local_memory_bytes:
        return f"{kilobytes(local)} of local memory are more than {processor.name} has"
    columns = tensor_memory_columns(tile, shape, processor)
    if columns > TENSOR_MEMORY_COLUMNS:
        return f"about {columns} columns of tensor memory are more than there are, {TENSOR_MEMORY_COLUMNS}"
    registers = estimated_registers(tile, shape)
    if registers > SPILL_ALLOWANCE * MAX_REGISTERS:
        return f"about {registers:.0f} registers a thread would spill, {MAX_REGISTERS} are available"
    return None


def why_none(shape: MBConvDownShape, processor: Processor) -> str | None:
    """Why no tile runs `shape` on `processor`; None if some tile does."""
    halves = _produce_halves(shape, processor), _project_halves(shape, processor)
    if all(next(tiles, None) is not None for tiles in halves):
        return None
    return why_unsupported(shape) or "its squeeze vector needs more registers or shared memory than a processor has"


def local_memory_bytes(tile: MBConvDownTile, shape: MBConvDownShape, processor: Processor) -> int:
    """Shared memory of a program of the hungrier kernel, in bytes: the operands in flight of its loops.

    Where products accumulate in tensor memory, the operands that other processors keep in registers come on top.
    """
    return max(_produce_bytes(tile, shape), project_bytes(tile, projected_shape(shape), processor))


def tensor_memory_columns(tile: MBConvDownTile, shape: MBConvDownShape, processor: Processor) -> int:
    """Upper bound on the columns of tensor memory that a program's sums take; 0 where registers hold them."""
    if not uses_tensor_memory(processor):
        return 0
    expand = ceil(tile.window_pixels / TENSOR_MEMORY_LANES) * tile.hidden
    conv = ceil(tile.quads / TENSOR_MEMORY_LANES) * _sums(tile, shape)
    return max(expand + conv, project_columns(tile, projected_shape(shape)))


def estimated_registers(tile: MBConvDownTile, shape: MBConvDownShape) -> float:
    """32-bit registers a thread of the hungrier kernel: fp32 sums, what they are rounded to, and addresses."""
    return max(_produce_registers(tile, shape), project_registers(tile, projected_shape(shape)))


def programs_per_processor(tile: MBConvDownTile, shape: MBConvDownShape, processor: Processor) -> int:
    """Programs of either kernel that a streaming multiprocessor holds at a time (occupancy), at least."""
    project = project_occupancy(tile, projected_shape(shape), processor)
    return min(_produce_occupancy(tile, shape, processor), project)


def projected_shape(shape: MBConvDownShape) -> MBConvShape:
    """What the second kernel sees of a block: one of stride 1 on images of the output's size."""
    return MBConvShape(
        batch=shape.batch,
        height=shape.out_height,
        width=shape.out_width,
        in_channels=shape.in_channels,
        hidden_channels=shape.hidden_channels,
        out_channels=shape.out_channels,
        squeeze_channels=shape.squeeze_channels,
        group_width=shape.group_width,
        activation=shape.activation,
        residual=False,
        dtype=shape.dtype,
        squeeze_activation=shape.squeeze_activation,
    )


def images_that_fit(tile: MBConvDownTile, shape: MBConvDownShape, processor: Processor) -> int:
    """Images of a micro-batch whose hidden tensor stays in L2, one at least.

    A batch is divided into micro-batches of nearly equal size.
    """
    hidden = shape.out_height * shape.out_width * tile.padded_hidden(shape.hidden_channels)
    image = ELEMENT_SIZE[shape.dtype] * hidden
    fitting = max(1, int(HIDDEN_SHARE * processor.global_memory_bytes / image))
    return ceil(shape.batch / ceil(shape.batch / fitting))


def programs_that_fit(tile: MBConvDownTile, shape: MBConvDownShape, processor: Processor) -> int:
    """Programs of the first kernel that fill a GPU's processors, or fewer, whose scratch memory stays in L2."""
    scratch = ELEMENT_SIZE[shape.dtype] * sum(_scratch_elements(tile, shape))
    fitting = max(1, int(SCRATCH_SHARE * processor.global_memory_bytes / scratch))
    return min(fitting, processor.processors * _produce_occupancy(tile, shape, processor))


def predicted_us(tile: MBConvDownTile, shape: MBConvDownShape, processor: Processor) -> float:
    """Predicted duration of the block in microseconds.

    Every micro-batch costs two kernels, and each of them a fixed time, its matrix products as they are padded, its
    traffic through global memory, and the latency of the dependent steps of a program. Few programs leave processors
    idle, and registers that spill slow all of it. No less than what the program moves through DRAM takes. `copy_bytes`
    makes no difference: what the L1 cache saves is left to measurements.
    """
    project = project_occupancy(tile, projected_shape(shape), processor)
    us = 0.0
    for images, count in ((tile.images, shape.batch // tile.images), (shape.batch % tile.images, 1)):
        if images:
            us += count * _produce_us(tile, shape, processor, images)
            us += count * project_us(tile, projected_shape(shape), processor, images, project)
    return max(us, LAUNCH_US + shape.activation_bytes / processor.bandwidth * 1e6)


def design(tile: MBConvDownTile) -> tuple[int, ...]:
    """What tells tiles apart by more than the depth and the steps of their pipelines."""
    produce = tile.height * tile.width, tile.hidden, tile.conv_slab, tile.quads, tile.warps, tile.copy_bytes
    return *produce, tile.project_pixels, tile.project_out, tile.project_warps


def candidate_tiles(shape: MBConvDownShape, processor: Processor) -> Iterator[MBConvDownTile]:
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
        tile = MBConvDownTile(*produce, *project)
        tile = replace(tile, images=images_that_fit(tile, shape, processor))
        if why_invalid(tile, shape, processor) is None:
            yield tile


def _why_too_large(shape: MBConvDownShape, tile: MBConvDownTile | None = None) -> str | None:
    """Why images are too large for the offsets within one, with the padding of a tile, if given; None if they fit."""
    hidden = shape.hidden_channels if tile is None else tile.padded_hidden(shape.hidden_channels)
    inputs = shape.height * shape.width * shape.in_channels
    outputs = shape.out_height * shape.out_width * max(hidden, shape.out_channels)
    if max(inputs, outputs) > MAX_IMAGE_ELEMENTS:
        return (
            f"images of {shape.height}x{shape.width} pixels are too large, split them: 2**31 elements of the input, "
            "hidden or output tensor are the limit"
        )
    return None


def _produce_halves(shape: MBConvDownShape, processor: Processor) -> Iterator[MBConvDownTile]:
    """Valid tiles that differ in the first kernel, and ask for as little as they can in the second."""
    slab = max(NARROWEST, shape.group_width)
    for stages, copy_bytes, (height, width), hidden, channels, quads, warps in product(
        (3, 2),
        COPY_BYTES,
        dict.fromkeys(_covering(shape, pixels) for pixels in (64, 128, 256, 32, 16)),
        (32, 64, 16),
        (32, 64, 16),
        (128, 64, 256, 32, 16),
        (4, 8, 2),
    ):
        tile = MBConvDownTile(
            shape.batch,
            1,
            height,
            width,
            hidden,
            channels,
            slab,
            quads,
            warps,
            stages,
            copy_bytes,
            *(16, 16, 16, 2, 2),
        )
        wasted = quads > NARROWEST and quads >= 2 * _quads(tile, shape)
        if not wasted and why_invalid(tile, shape, processor) is None:
            yield replace(tile, programs=programs_that_fit(tile, shape, processor))


def _project_halves(shape: MBConvDownShape, processor: Processor) -> Iterator[MBConvDownTile]:
    """Valid tiles that differ in the second kernel, and ask for as little as they can in the first."""
    slab = max(NARROWEST, shape.group_width)
    for fields_of_project in project_fields(projected_shape(shape)):
        tile = MBConvDownTile(shape.batch, processor.processors, 4, 4, slab, 16, slab, 16, 2, 2, 16, *fields_of_project)
        if why_invalid(tile, shape, processor) is None:
            yield tile


def _covering(shape: MBConvDownShape, pixels: int) -> tuple[int, int]:
    """Height and width, powers of two, of the tiles of at most so many pixels that convolve and expand fewest."""
    more, convolved = (shape.kernel_size - 1, QUAD) if shape.blur else (shape.kernel_size - 2, 1)

    def computed(size: tuple[int, int]) -> tuple[int, int]:
        height, width = size
        tiles = ceil(shape.out_height / height) * ceil(shape.out_width / width)
        rows, columns = min(height + shape.blur, shape.out_height), min(width + shape.blur, shape.out_width)
        window = min(2 * rows + more, shape.height) * min(2 * columns + more, shape.width)
        return tiles * (window + convolved * rows * columns), abs(width - height)

    most = 1 << (shape.out_height - 1).bit_length() + (shape.out_width - 1).bit_length()
    pixels = min(pixels, most)
    return min(((pixels >> shift, 1 << shift) for shift in range(pixels.bit_length())), key=computed)


def _quads(tile: MBConvDownTile, shape: MBConvDownShape) -> int:
    """Quads that a part convolves."""
    rows, columns = tile.quad_window(shape.out_height, shape.out_width, shape.blur)
    return rows * columns


def _scratch_elements(tile: MBConvDownTile, shape: MBConvDownShape) -> tuple[int, int]:
    """Of the window and of the quads of a program of the first kernel."""
    return tile.scratch_elements(shape.height, shape.width, shape.blur, shape.kernel_size)


def _conv_steps(tile: MBConvDownTile, shape: MBConvDownShape) -> int:
    """Steps of the convolution of `tile.quads` quads and a slab."""
    if shape.kernel_size != QUAD_KERNEL_SIZE:
        return tile.tap_steps(shape.kernel_size)
    return (4 if shape.blur else QUAD_KERNEL_SIZE) * tile.row_steps(shape.blur)


def _sums(tile: MBConvDownTile, shape: MBConvDownShape) -> int:
    """Sums of the convolution for each quad."""
    return (QUAD if shape.blur else 1) * tile.conv_slab


def _produce_us(tile: MBConvDownTile, shape: MBConvDownShape, processor: Processor, images: int) -> float:
    window, convolved = _scratch_elements(tile, shape)
    rounds = ceil(window / (tile.hidden * tile.window_pixels))
    slabs, chunks = tile.hidden // tile.conv_slab, ceil(_quads(tile, shape) / tile.quads)
    steps = _conv_steps(tile, shape)
    ins, depth = tile.padded_in(shape.in_channels), steps * tile.step_pixels * tile.conv_slab
    expand_ops = 2 * tile.hidden * rounds * tile.window_pixels * ins
    conv_ops = 2 * slabs * chunks * tile.quads * depth * _sums(tile, shape)
    work_us = (EXPAND_COST * expand_ops + CONV_COST * conv_ops) / processor.peak_ops * 1e6
    expanded = rounds * ins * (tile.window_pixels + tile.hidden) + window
    views = slabs * chunks * depth * (tile.quads + _sums(tile, shape)) + convolved
    blurred = BLUR_VIEWS * convolved + tile.height * tile.width * tile.hidden
    scratch_bytes = ELEMENT_SIZE[shape.dtype] * (expanded + views + blurred)
    bytes_us = BYTES_COST * scratch_bytes / processor.global_bandwidth * 1e6
    squeeze = shape.squeeze_channels
    blur_steps = tile.height * tile.width * tile.hidden / (tile.blur_pixels(squeeze) * tile.blur_channels(squeeze))
    steps_us = STEP_US * (rounds * ins // tile.channels + slabs * chunks * steps + blur_steps * shape.blur)
    parts = images * tile.parts(shape.out_height, shape.out_width, shape.hidden_channels)
    registers = _produce_registers(tile, shape)
    held = min(tile.programs / processor.processors, _produce_occupancy(tile, shape, processor))
    return launch_us(processor, parts, work_us, bytes_us, steps_us, registers, held)


def _produce_occupancy(tile: MBConvDownTile, shape: MBConvDownShape, processor: Processor) -> int:
    """Programs of the first kernel that a streaming multiprocessor holds at a time."""
    return occupancy(_produce_registers(tile, shape), _produce_bytes(tile, shape), tile.warps, processor)


def _produce_bytes(tile: MBConvDownTile, shape: MBConvDownShape) -> int:
    sums = _sums(tile, shape)
    expand = tile.stages * tile.channels * (tile.window_pixels + tile.hidden)
    conv = tile.stages * tile.step_pixels * tile.conv_slab * (tile.quads + sums)
    # A tile of hidden channels changes its layout on the way to global memory, through shared memory.
    store = max(tile.window_pixels * tile.hidden, tile.quads * sums)
    return ELEMENT_SIZE[shape.dtype] * max(expand, conv, store)


def _produce_registers(tile: MBConvDownTile, shape: MBConvDownShape) -> float:
    expand = REGISTERS_PER_SUM * tile.window_pixels * tile.hidden
    conv = REGISTERS_PER_SUM * tile.quads * _sums(tile, shape)
    if not shape.blur:
        conv += REGISTERS_PER_VIEW * tile.quads * tile.step_pixels * tile.conv_slab
    # Channels that are pooled together: beside them, the weights of the squeeze layer.
    pooled = tile.blur_channels(shape.squeeze_channels) if shape.blur else tile.conv_slab
    # Loads of two rows in flight, and their sum.
    blur = 4 * tile.blur_pixels(shape.squeeze_channels) * pooled if shape.blur else 0
    squeeze = 1.5 * pooled * tile.padded_squeeze(shape.squeeze_channels)
    return max(expand, conv, blur, squeeze) / (tile.warps * WARP_SIZE) + 40

"""Tile of the ConvFirst kernel: what may be chosen, what is valid, and how long it should take.

Everything here is arithmetic on shapes and processors. `why_invalid` is the one judge of validity, for the planner's
choice and for the tuner's candidates.
"""

from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from itertools import product
from math import ceil
from typing import TYPE_CHECKING

from fusion.planner.graph import ELEMENT_SIZE
from fusion.planner.match import ConvFirstDownShape, ConvFirstShape
from fusion.planner.processor import Processor
from fusion.planner.slabs import NARROWEST, slab_widths

if TYPE_CHECKING:
    from fusion.planner.convfirst_down_tile import ConvFirstDownTile

KERNEL_DTYPES = ("float16", "bfloat16")
CHANNEL_MULTIPLE = 8
"""Channels that make 16 bytes, the widest load: pixels must start on such a boundary."""
WIDEST_OUTPUT_SLAB = 128
MAX_IMAGE_ELEMENTS = 2**31 - 1
"""The kernel computes offsets within an image in 32 bits."""
MIN_HIDDEN_STEPS = 2
MIN_STAGES = 2
"""Triton 3.6 folds a loop of one step into straight code, and on Hopper such tiles gave wrong results. It does not
pipeline a loop of one stage, whose code looks the same: refused as a precaution, never seen to fail by itself."""
MAX_REGISTERS = 255
SPILL_ALLOWANCE = 1.6
"""Estimated registers over available ones up to which a tile is worth trying: the estimate leaves out what the
compiler keeps in shared memory, and a few spills outside of the loops cost little."""
WARP_SIZE = 32
WARPGROUP = 4
WARPGROUP_ROWS = 64
"""Of a product on Hopper and later, which a warpgroup of four warps has at least. Smaller ones run as before."""
MAX_WARPS_PER_PROCESSOR = 64
TENSOR_MEMORY_COLUMNS = 512
TENSOR_MEMORY_LANES = 128
TENSOR_CORES = 4
"""Of a streaming multiprocessor, each serving the warps of its own quarter."""

# Fitted to 397 tiles of nine blocks and to six blocks of a network, on an H200 at batch 128 (tiles.json and
# compile.json in bench/results/h200). The 15 fastest tiles of each block are 5 % off (root mean square).
LAUNCH_US = 6.0
"""Of a launch in a CUDA graph of eight: start, first loads and tail, and its share of the graph's own launch."""
WARPGROUP_SHARE = 0.58
"""Part of the time of expansion and projection, as products of warpgroups, that is not hidden behind other work."""
MMA_SHARE = 0.88
"""The same for products of single warps."""
MMA_RATE = 0.62
"""Of the peak that products of single warps reach where the peak is that of warpgroups."""
NARROWEST_COST = 8.0
"""Time of a warpgroup's projection to a slab of 16 channels over its share of a wider one's. Seen with 16 and 48
channels; the products alone do not explain it."""
VIEW_SHARE = 0.62
"""Part of the time for the nine views of the input through global memory that is not hidden."""
STRADDLE_SHARE = 0.47
"""More of it, if pixels do not start and end with sectors. Seen with 24 channels."""
SECTOR_BYTES = 32
"""Of global memory that are read together."""
WEIGHT_SHARE = 0.31
"""Part of the time for weights through global memory, all of them for each program, that is not hidden."""
MOST_BANDWIDTH = 2
"""Of global memory that a processor may have over its share, if others have nothing to do."""
ALONE_SHARE = 0.3
"""How much longer all that takes a program that has a processor to itself: nothing else runs while it waits."""
STEP_US = 0.028
"""One dependent step of a program of `STEP_PIXELS` pixels: barrier, product, and moving its operands."""
STEP_PIXELS = 128
LONE_WARP_US = 0.038
"""More of a step if a program has one warp, which does nothing while it waits."""
WAIT_US = 0.16
"""A step's wait for global memory, divided by the steps that a pipeline is ahead."""
SPILL_EXPONENT = 1.5
"""Of estimated registers over available ones, as a factor of the time: warpgroups' products then run one after the
other. Products of single warps were as fast with 1.3 times as many."""


@dataclass(frozen=True)
class ConvFirstTile:
    """One way to run the ConvFirst kernel.

    A program computes `height x width` output pixels, `hidden` of the hidden channels at a time, with `warps` warps.
    The convolution works in slabs of at most `conv_slab` channels; `conv_stages` and `ffn_stages` are the depths of the
    software pipelines of its loop over taps and of the loop over hidden channels.
    """

    height: int
    width: int
    hidden: int
    conv_slab: int
    warps: int
    conv_stages: int = 3
    ffn_stages: int = 3

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"ConvFirstTile: {field.name} must be a positive integer, got {value!r}")

    @property
    def pixels(self) -> int:
        """Output pixels of a program."""
        return self.height * self.width

    def in_slabs(self, in_channels: int) -> tuple[int, ...]:
        """Slabs that the convolution computes and the expansion contracts."""
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
        """Number of tiles that cover an output of `height x width` pixels."""
        return batch * ceil(height / self.height) * ceil(width / self.width)

    def to_ints(self) -> list[int]:
        """The fields in order, for operators and files that take integers only; `ConvFirstTile(*ints)` undoes it."""
        return list(astuple(self))


def why_unsupported(shape: ConvFirstShape) -> str | None:
    """Why no tile runs this block, and what to do instead; None if some tile may."""
    if shape.dtype not in KERNEL_DTYPES:
        return f"dtype {shape.dtype} is not supported, use one of {', '.join(KERNEL_DTYPES)}"
    if shape.kernel_size != 3:
        return f"kernel size {shape.kernel_size} is not supported, use 3"
    for name in ("in_channels", "out_channels"):
        if getattr(shape, name) % CHANNEL_MULTIPLE:
            return f"{name}={getattr(shape, name)} is not supported, use a multiple of {CHANNEL_MULTIPLE}"
    if shape.group_width > 64 or shape.group_width & (shape.group_width - 1):
        return f"group width {shape.group_width} is not supported, use a power of two up to 64"
    if shape.height * shape.width * max(shape.in_channels, shape.out_channels) > MAX_IMAGE_ELEMENTS:
        return f"images of {shape.height}x{shape.width} pixels are too large, split them: 2**31 elements are the limit"
    return None


def why_malformed(tile: ConvFirstTile) -> str | None:
    """Why the kernel gives right results for no block with this tile; None if it may."""
    for name in ("height", "width", "hidden", "conv_slab", "warps"):
        if getattr(tile, name) & (getattr(tile, name) - 1):
            return f"{name}={getattr(tile, name)} is not a power of two"
    if min(tile.pixels, tile.hidden, tile.conv_slab) < 16:
        return "a matrix product needs at least 16 pixels, 16 hidden channels and slabs of 16 channels"
    if min(tile.conv_stages, tile.ffn_stages) < MIN_STAGES:
        return f"loops must be pipelined, in {MIN_STAGES} stages at least"
    if tile.warps > 16:
        return f"{tile.warps} warps are more than a program may have, 16"
    return None


def why_invalid(tile: ConvFirstTile, shape: ConvFirstShape, processor: Processor) -> str | None:
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


def why_none(shape: ConvFirstShape, processor: Processor) -> str | None:
    """Why no tile runs `shape` on `processor`; None if some tile does."""
    if next(candidate_tiles(shape, processor), None) is not None:
        return None
    return why_unsupported(shape) or "its channels need more registers or shared memory than a processor has"


def local_memory_bytes(tile: ConvFirstTile, shape: ConvFirstShape, processor: Processor) -> int:
    """Shared memory of a program, in bytes: the operands in flight of the hungrier of its two loops.

    Operands come on top that only some processors have there (`operands_in_memory`).
    """
    size = ELEMENT_SIZE[shape.dtype]
    widest = max(tile.in_slabs(shape.in_channels))
    conv = tile.conv_stages * widest * (tile.pixels + widest)
    ffn = tile.ffn_stages * tile.hidden * _padded_in_and_out(tile, shape)
    convolved = sum(tile.in_slabs(shape.in_channels))
    operands = operands_in_memory(tile.pixels, tile.warps, convolved, tile.hidden, processor)
    return size * (max(conv, ffn) + operands)


def operands_in_memory(pixels: int, warps: int, convolved: int, hidden: int, processor: Processor) -> int:
    """Elements of a program's left operands that are in shared memory, and in registers elsewhere: pixels of
    `convolved` channels, and of `hidden` ones."""
    if uses_tensor_memory(pixels, warps, processor):
        return pixels * (convolved + hidden)
    return pixels * convolved if _warpgroups_share_rows(pixels, warps, processor) else 0


def uses_tensor_memory(pixels: int, warps: int, processor: Processor) -> bool:
    """Whether products accumulate in tensor memory, and have their left operands in shared memory."""
    # They take four warps and 64 rows at least; smaller ones run as before.
    return processor.compute_capability[0] == 10 and warps >= WARPGROUP and pixels >= WARPGROUP_ROWS


def tensor_memory_columns(tile: ConvFirstTile, shape: ConvFirstShape, processor: Processor) -> int:
    """Upper bound on the columns of tensor memory that a program's sums take; 0 where registers hold them."""
    if not uses_tensor_memory(tile.pixels, tile.warps, processor):
        return 0
    in_slabs, out_slabs = tile.in_slabs(shape.in_channels), tile.out_slabs(shape.out_channels)
    columns = sum(in_slabs) + sum(out_slabs) + len(in_slabs) * tile.hidden
    return ceil(tile.pixels / TENSOR_MEMORY_LANES) * columns


def estimated_registers(tile: ConvFirstTile, shape: ConvFirstShape) -> float:
    """32-bit registers a thread: fp32 sums of outputs, 16-bit convolution result, hidden channels, and addresses."""
    pixels_a_thread = tile.pixels / (tile.warps * WARP_SIZE)
    channels = sum(tile.out_slabs(shape.out_channels)) + sum(tile.in_slabs(shape.in_channels)) / 2 + 1.5 * tile.hidden
    return pixels_a_thread * channels + 40


def programs_per_processor(tile: ConvFirstTile, shape: ConvFirstShape, processor: Processor) -> int:
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


@dataclass(frozen=True)
class PortableWork:
    """What a portable ConvFirst kernel does for a launch.

    `pixels`, `warps` and `registers`, of a thread, are those of one of its `programs`, of which a processor holds
    `occupancy` at a time. OPs and bytes are those of all programs; `narrow_ops` are of projections to slabs of 16
    channels, which `ffn_ops` has too. A program takes `steps` one after the other, and `waits` times as long for global
    memory as if nothing was loaded ahead.
    """

    programs: int
    pixels: int
    warps: int
    registers: float
    occupancy: int
    conv_ops: float
    ffn_ops: float
    narrow_ops: float
    view_bytes: float
    straddles: bool
    weight_bytes: float
    steps: int
    waits: float


def predicted_us(tile: ConvFirstTile, shape: ConvFirstShape, processor: Processor) -> float:
    """Predicted duration of a launch in microseconds.

    A fixed cost, and the work of all programs (`work_us`). It takes at least as long as the activations through DRAM,
    which a convolution of stride 2 has more of than views.
    """
    work = portable_work(
        tile,
        shape,
        tile.programs(shape.batch, shape.out_height, shape.out_width),
        estimated_registers(tile, shape),
        programs_per_processor(tile, shape, processor),
        views=9,
        outputs=1,
        ffn_channels=_padded_in_and_out(tile, shape),
    )
    return LAUNCH_US + max(work_us(work, processor), shape.activation_bytes / processor.bandwidth * 1e6)


def portable_work(
    tile: "ConvFirstTile | ConvFirstDownTile",
    shape: ConvFirstShape | ConvFirstDownShape,
    programs: int,
    registers: float,
    occupancy: int,
    *,
    views: int,
    outputs: int,
    ffn_channels: int,
) -> PortableWork:
    """The work of a launch of so many programs, of either stride.

    The convolution takes so many `views` of the input, and makes `outputs` times as many channels of it as it takes;
    `ffn_channels` are those that the FFN takes and gives, as the kernel pads them.
    """
    in_slabs, out_slabs = tile.in_slabs(shape.in_channels), tile.out_slabs(shape.out_channels)
    hidden = tile.padded_hidden(shape.hidden_channels)
    pixels, size = programs * tile.pixels, ELEMENT_SIZE[shape.dtype]
    taps, hidden_steps = views * outputs * sum(slab * slab for slab in in_slabs), hidden // tile.hidden
    return PortableWork(
        programs,
        tile.pixels,
        tile.warps,
        registers,
        occupancy,
        conv_ops=2 * pixels * taps,
        ffn_ops=2 * pixels * hidden * ffn_channels,
        narrow_ops=2 * pixels * hidden * NARROWEST * out_slabs.count(NARROWEST),
        view_bytes=size * pixels * views * sum(in_slabs),
        straddles=size * shape.in_channels % SECTOR_BYTES > 0,
        weight_bytes=size * programs * (taps + hidden * ffn_channels),
        steps=views * len(in_slabs) + hidden_steps * (len(in_slabs) + len(out_slabs)),
        waits=views * len(in_slabs) / (tile.conv_stages - 1) + hidden_steps / (tile.ffn_stages - 1),
    )


def work_us(work: PortableWork, processor: Processor) -> float:
    """Microseconds of a launch of a portable ConvFirst kernel, without a launch's fixed cost.

    Matrix products as the kernel pads them, the convolution's only where they take longer than its views of the input
    through global memory; weights; and the latency of the dependent steps of one program after the other. Few programs
    leave processors idle, few warps leave tensor cores of a processor idle, a processor with few programs waits for
    them, and registers that spill slow the products of warpgroups.
    """
    load = work.programs / processor.processors
    resident, working = min(work.occupancy, ceil(load)), min(1.0, load)
    busy = working * min(1.0, resident * work.warps / TENSOR_CORES)
    has_warpgroups = processor.compute_capability[0] >= 9
    spill, narrow_ops = 1.0, 0.0
    if has_warpgroups and work.warps >= WARPGROUP and work.pixels >= WARPGROUP_ROWS:
        spill = max(1.0, work.registers / MAX_REGISTERS) ** SPILL_EXPONENT
        share, narrow_ops = WARPGROUP_SHARE, (NARROWEST_COST - 1) * work.narrow_ops
    else:
        share = MMA_SHARE / (MMA_RATE if has_warpgroups else 1)
    product_us = share / (busy * processor.peak_ops) * 1e6
    bytes_us = 1 / (min(1.0, MOST_BANDWIDTH * load) * processor.global_bandwidth) * 1e6
    view_us = (VIEW_SHARE + STRADDLE_SHARE * work.straddles) * bytes_us * work.view_bytes
    us = product_us * (work.ffn_ops + narrow_ops) + WEIGHT_SHARE * bytes_us * work.weight_bytes
    us += max(product_us * work.conv_ops, view_us)
    waves = max(1.0, work.programs / (processor.processors * work.occupancy))
    step_us = STEP_US * work.pixels / STEP_PIXELS + LONE_WARP_US * (work.warps == 1)
    latency_us = step_us * work.steps + WAIT_US * work.waits
    return spill * ((1 + ALONE_SHARE / resident) * us + waves * latency_us)


def candidate_tiles(shape: ConvFirstShape, processor: Processor) -> Iterator[ConvFirstTile]:
    """Every valid tile worth a measurement; where predictions tie, what proved better more often comes first."""
    pixel_tiles = ((8, 16), (4, 32), (16, 16), (8, 32), (8, 8), (4, 8), (4, 4))
    pipelines = ((3, 3), (4, 2), (5, 3), (2, 2))
    for stages, (height, width), hidden, conv_slab, warps in product(
        pipelines, pixel_tiles, (32, 64, 16, 128), (64, 32, 16), (4, 2, 8, 1)
    ):
        tile = ConvFirstTile(height, width, hidden, conv_slab, warps, *stages)
        is_same_as_narrower = conv_slab > 16 and tile.in_slabs(shape.in_channels) == slab_widths(
            shape.in_channels, conv_slab // 2
        )
        if not is_same_as_narrower and why_invalid(tile, shape, processor) is None:
            yield tile


def _padded_in_and_out(tile: ConvFirstTile, shape: ConvFirstShape) -> int:
    return sum(tile.in_slabs(shape.in_channels)) + sum(tile.out_slabs(shape.out_channels))


def _warpgroups_share_rows(pixels: int, warps: int, processor: Processor) -> bool:
    """Whether Hopper's products have too few rows for their warps: warpgroups then have columns of the same rows, and
    read the left operand, which each would keep in registers otherwise, from shared memory."""
    return processor.compute_capability[0] == 9 and WARPGROUP_ROWS <= pixels < warps * WARPGROUP_ROWS // WARPGROUP

"""Kernel families and the blocks that they run, in one table: what the planner and the tuner ask of each."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fusion.planner import (
    convfirst_down_hopper_tile,
    convfirst_down_tile,
    ffn_tile,
    head_tile,
    hopper_tile,
    hopper_time,
    mbconv_down_hopper_tile,
    mbconv_down_tile,
    mbconv_hopper_tile,
    mbconv_tile,
    mbconv_windows_hopper_tile,
    stem_convfirst_hopper_tile,
    stem_tile,
)
from fusion.planner import tile as portable_tile
from fusion.planner.convfirst_down_hopper_tile import ConvFirstDownHopperTile
from fusion.planner.convfirst_down_tile import ConvFirstDownTile
from fusion.planner.ffn_tile import FfnTile
from fusion.planner.graph import BlockGraph
from fusion.planner.head_tile import HeadTile
from fusion.planner.hopper_tile import HopperTile
from fusion.planner.lower import block_fused, image_fused, pool_fused, two_pass
from fusion.planner.match import (
    BlockShape,
    ConvFirstDownShape,
    ConvFirstShape,
    FfnShape,
    HeadShape,
    MBConvDownShape,
    MBConvShape,
    StemConvFirstShape,
    StemShape,
)
from fusion.planner.mbconv_down_hopper_tile import MBConvDownHopperTile
from fusion.planner.mbconv_down_tile import MBConvDownTile
from fusion.planner.mbconv_hopper_tile import MBConvHopperTile
from fusion.planner.mbconv_tile import MBConvTile
from fusion.planner.mbconv_windows_hopper_tile import MBConvDownWindowsHopperTile, MBConvWindowsHopperTile
from fusion.planner.processor import Processor
from fusion.planner.program import Program
from fusion.planner.stem_convfirst_hopper_tile import StemConvFirstHopperTile
from fusion.planner.stem_tile import StemTile
from fusion.planner.tile import ConvFirstTile

Tile = (
    ConvFirstTile
    | HopperTile
    | ConvFirstDownTile
    | ConvFirstDownHopperTile
    | FfnTile
    | MBConvTile
    | MBConvDownTile
    | MBConvHopperTile
    | MBConvWindowsHopperTile
    | MBConvDownHopperTile
    | MBConvDownWindowsHopperTile
    | StemTile
    | StemConvFirstHopperTile
    | HeadTile
)


@dataclass(frozen=True)
class KernelFamily:
    """A kernel and the tiles that parametrise it.

    `name` is that of its module in `fusion.triton_kernels`, `title` is for people. It runs blocks whose shape is a
    `shape_type`, except those that `why_unsupported` names a reason for. `why_none` says why the kernel cannot run a
    block on a processor with any tile, if there are no `candidate_tiles`; `why_invalid` judges one tile. Sizes are
    those of one program, times are in microseconds. `predicted_us` is that of a block with a launch of its own, as it
    takes one by one in a CUDA graph of eight; a kernel that runs equal blocks in one launch has `stage_us` too, which
    takes their number and gives the share of one. Tiles of the same `design` differ in little: a search tries one of
    each first. `lower` makes the program that the kernel runs with a tile. If not `is_repeatable`, sums are formed in
    any order, and two runs may differ by rounding errors. If `is_portable`, the kernel is plain Triton, which runs on
    any GPU, and a compiler may take it out of its operator: a packaged program holds the kernel itself.
    """

    name: str
    title: str
    shape_type: type[BlockShape]
    tile_type: type[Tile]
    why_unsupported: Callable[[BlockShape], str | None]
    why_none: Callable[[BlockShape, Processor], str | None]
    why_invalid: Callable[[Tile, BlockShape, Processor], str | None]
    candidate_tiles: Callable[[BlockShape, Processor], Iterator[Tile]]
    predicted_us: Callable[[Tile, BlockShape, Processor], float]
    local_memory_bytes: Callable[[Tile, BlockShape, Processor], int]
    estimated_registers: Callable[[Tile, BlockShape], float]
    programs_per_processor: Callable[[Tile, BlockShape, Processor], int]
    design: Callable[[Tile], tuple[int, ...]]
    lower: Callable[[BlockGraph, Tile, BlockShape], Program]
    stage_us: Callable[[Tile, BlockShape, Processor, int], float] | None = None
    is_repeatable: bool = True
    is_portable: bool = False

    def ranked_tiles(self, shape: BlockShape, processor: Processor) -> list[Tile]:
        """All valid candidates, the best prediction first."""
        tiles = self.candidate_tiles(shape, processor)
        return sorted(tiles, key=lambda tile: round(self.predicted_us(tile, shape, processor), 2))


HOPPER = KernelFamily(
    name="convfirst_hopper",
    title="Hopper kernel",
    shape_type=ConvFirstShape,
    tile_type=HopperTile,
    why_unsupported=hopper_tile.why_unsupported,
    why_none=hopper_tile.why_none,
    why_invalid=hopper_tile.why_invalid,
    candidate_tiles=hopper_time.candidate_tiles,
    predicted_us=hopper_time.predicted_us,
    local_memory_bytes=hopper_tile.local_memory_bytes,
    estimated_registers=hopper_tile.estimated_registers,
    programs_per_processor=hopper_tile.programs_per_processor,
    lower=lambda graph, tile, shape: block_fused(
        graph, (hopper_tile.JOB_ROWS, tile.tile_width(shape.width)), tile.hidden
    ),
    design=lambda tile: (tile.pixels, tile.hidden, tile.partitions, tile.weight_chunks > 0),
)

PORTABLE = KernelFamily(
    name="convfirst",
    title="portable kernel",
    shape_type=ConvFirstShape,
    tile_type=ConvFirstTile,
    why_unsupported=portable_tile.why_unsupported,
    why_none=portable_tile.why_none,
    why_invalid=portable_tile.why_invalid,
    candidate_tiles=portable_tile.candidate_tiles,
    predicted_us=portable_tile.predicted_us,
    local_memory_bytes=portable_tile.local_memory_bytes,
    estimated_registers=portable_tile.estimated_registers,
    programs_per_processor=portable_tile.programs_per_processor,
    lower=lambda graph, tile, shape: block_fused(graph, (tile.height, tile.width), tile.hidden),
    design=lambda tile: (tile.pixels, tile.hidden, tile.conv_slab, tile.warps),
    is_portable=True,
)

CONVFIRST_DOWN_HOPPER = KernelFamily(
    name="convfirst_down_hopper",
    title="Hopper kernel",
    shape_type=ConvFirstDownShape,
    tile_type=ConvFirstDownHopperTile,
    why_unsupported=convfirst_down_hopper_tile.why_unsupported,
    why_none=convfirst_down_hopper_tile.why_none,
    why_invalid=convfirst_down_hopper_tile.why_invalid,
    candidate_tiles=convfirst_down_hopper_tile.candidate_tiles,
    predicted_us=convfirst_down_hopper_tile.predicted_us,
    local_memory_bytes=convfirst_down_hopper_tile.local_memory_bytes,
    estimated_registers=convfirst_down_hopper_tile.estimated_registers,
    programs_per_processor=convfirst_down_hopper_tile.programs_per_processor,
    lower=lambda graph, tile, shape: block_fused(
        graph, (hopper_tile.JOB_ROWS, tile.tile_width(shape.out_width)), tile.hidden
    ),
    design=lambda tile: (tile.pixels, tile.hidden, tile.partitions, tile.weight_chunks > 0),
)

CONVFIRST_DOWN = KernelFamily(
    name="convfirst_down",
    title="portable kernel",
    shape_type=ConvFirstDownShape,
    tile_type=ConvFirstDownTile,
    why_unsupported=convfirst_down_tile.why_unsupported,
    why_none=convfirst_down_tile.why_none,
    why_invalid=convfirst_down_tile.why_invalid,
    candidate_tiles=convfirst_down_tile.candidate_tiles,
    predicted_us=convfirst_down_tile.predicted_us,
    local_memory_bytes=convfirst_down_tile.local_memory_bytes,
    estimated_registers=convfirst_down_tile.estimated_registers,
    programs_per_processor=convfirst_down_tile.programs_per_processor,
    lower=lambda graph, tile, shape: block_fused(graph, None, tile.hidden),
    design=lambda tile: (tile.pixels, tile.hidden, tile.conv_slab, tile.warps, tile.copy_bytes),
    is_portable=True,
)

FFN = KernelFamily(
    name="ffn_hopper",
    title="Hopper kernel",
    shape_type=FfnShape,
    tile_type=FfnTile,
    why_unsupported=ffn_tile.why_unsupported,
    why_none=ffn_tile.why_none,
    why_invalid=ffn_tile.why_invalid,
    candidate_tiles=ffn_tile.candidate_tiles,
    predicted_us=ffn_tile.predicted_us,
    local_memory_bytes=ffn_tile.local_memory_bytes,
    estimated_registers=ffn_tile.estimated_registers,
    programs_per_processor=ffn_tile.programs_per_processor,
    lower=lambda graph, tile, shape: block_fused(graph, None, tile.hidden),
    design=lambda tile: (tile.blocks, tile.hidden, tile.x_in_registers),
)

MBCONV = KernelFamily(
    name="mbconv",
    title="portable kernels",
    shape_type=MBConvShape,
    tile_type=MBConvTile,
    why_unsupported=mbconv_tile.why_unsupported,
    why_none=mbconv_tile.why_none,
    why_invalid=mbconv_tile.why_invalid,
    candidate_tiles=mbconv_tile.candidate_tiles,
    predicted_us=mbconv_tile.predicted_us,
    local_memory_bytes=mbconv_tile.local_memory_bytes,
    estimated_registers=mbconv_tile.estimated_registers,
    programs_per_processor=mbconv_tile.programs_per_processor,
    design=mbconv_tile.design,
    lower=lambda graph, tile, shape: two_pass(graph, (tile.height, tile.width), tile.hidden),
    is_repeatable=False,
    is_portable=True,
)

MBCONV_HOPPER = KernelFamily(
    name="mbconv_hopper",
    title="Hopper kernel",
    shape_type=MBConvShape,
    tile_type=MBConvHopperTile,
    why_unsupported=mbconv_hopper_tile.why_unsupported,
    why_none=mbconv_hopper_tile.why_none,
    why_invalid=mbconv_hopper_tile.why_invalid,
    candidate_tiles=mbconv_hopper_tile.candidate_tiles,
    predicted_us=mbconv_hopper_tile.predicted_us,
    stage_us=mbconv_hopper_tile.stage_us,
    local_memory_bytes=mbconv_hopper_tile.local_memory_bytes,
    estimated_registers=mbconv_hopper_tile.estimated_registers,
    programs_per_processor=mbconv_hopper_tile.programs_per_processor,
    design=lambda tile: (tile.bands, tile.piece),
    lower=lambda graph, tile, shape: image_fused(graph, tile.hidden, mbconv_hopper_tile.is_resident(tile, shape)),
)

MBCONV_WINDOWS_HOPPER = KernelFamily(
    name="mbconv_windows_hopper",
    title="Hopper kernel for larger images",
    shape_type=MBConvShape,
    tile_type=MBConvWindowsHopperTile,
    why_unsupported=mbconv_windows_hopper_tile.why_unsupported,
    why_none=mbconv_windows_hopper_tile.why_none,
    why_invalid=mbconv_windows_hopper_tile.why_invalid,
    candidate_tiles=mbconv_windows_hopper_tile.candidate_tiles,
    predicted_us=mbconv_windows_hopper_tile.predicted_us,
    local_memory_bytes=mbconv_windows_hopper_tile.local_memory_bytes,
    estimated_registers=mbconv_windows_hopper_tile.estimated_registers,
    programs_per_processor=mbconv_windows_hopper_tile.programs_per_processor,
    design=lambda tile: (tile.piece, tile.pass_tiles),
    lower=lambda graph, tile, shape: image_fused(graph, tile.hidden, False),
)

MBCONV_DOWN = KernelFamily(
    name="mbconv_down",
    title="portable kernels",
    shape_type=MBConvDownShape,
    tile_type=MBConvDownTile,
    why_unsupported=mbconv_down_tile.why_unsupported,
    why_none=mbconv_down_tile.why_none,
    why_invalid=mbconv_down_tile.why_invalid,
    candidate_tiles=mbconv_down_tile.candidate_tiles,
    predicted_us=mbconv_down_tile.predicted_us,
    local_memory_bytes=mbconv_down_tile.local_memory_bytes,
    estimated_registers=mbconv_down_tile.estimated_registers,
    programs_per_processor=mbconv_down_tile.programs_per_processor,
    design=mbconv_down_tile.design,
    lower=lambda graph, tile, shape: two_pass(graph, (tile.height, tile.width), tile.hidden),
    is_repeatable=False,
    is_portable=True,
)

MBCONV_DOWN_HOPPER = KernelFamily(
    name="mbconv_down_hopper",
    title="Hopper kernel",
    shape_type=MBConvDownShape,
    tile_type=MBConvDownHopperTile,
    why_unsupported=mbconv_down_hopper_tile.why_unsupported,
    why_none=mbconv_down_hopper_tile.why_none,
    why_invalid=mbconv_down_hopper_tile.why_invalid,
    candidate_tiles=mbconv_down_hopper_tile.candidate_tiles,
    predicted_us=mbconv_down_hopper_tile.predicted_us,
    local_memory_bytes=mbconv_down_hopper_tile.local_memory_bytes,
    estimated_registers=mbconv_down_hopper_tile.estimated_registers,
    programs_per_processor=mbconv_down_hopper_tile.programs_per_processor,
    design=lambda tile: (tile.resident,),
    lower=lambda graph, tile, shape: image_fused(graph, tile.hidden, tile.resident == 1),
)

MBCONV_DOWN_WINDOWS_HOPPER = KernelFamily(
    name="mbconv_down_windows_hopper",
    title="Hopper kernel for larger images",
    shape_type=MBConvDownShape,
    tile_type=MBConvDownWindowsHopperTile,
    why_unsupported=mbconv_windows_hopper_tile.why_unsupported,
    why_none=mbconv_windows_hopper_tile.why_none,
    why_invalid=mbconv_windows_hopper_tile.why_invalid,
    candidate_tiles=mbconv_windows_hopper_tile.candidate_tiles,
    predicted_us=mbconv_windows_hopper_tile.predicted_us,
    local_memory_bytes=mbconv_windows_hopper_tile.local_memory_bytes,
    estimated_registers=mbconv_windows_hopper_tile.estimated_registers,
    programs_per_processor=mbconv_windows_hopper_tile.programs_per_processor,
    design=lambda tile: (tile.piece, tile.pass_tiles),
    lower=lambda graph, tile, shape: image_fused(graph, tile.hidden, False),
)

STEM = KernelFamily(
    name="stem",
    title="portable kernel",
    shape_type=StemShape,
    tile_type=StemTile,
    why_unsupported=stem_tile.why_unsupported,
    why_none=stem_tile.why_none,
    why_invalid=stem_tile.why_invalid,
    candidate_tiles=stem_tile.candidate_tiles,
    predicted_us=stem_tile.predicted_us,
    local_memory_bytes=stem_tile.local_memory_bytes,
    estimated_registers=stem_tile.estimated_registers,
    programs_per_processor=stem_tile.programs_per_processor,
    lower=lambda graph, tile, shape: block_fused(graph, (tile.height, tile.width)),
    design=lambda tile: (tile.height * tile.width, tile.group, tile.warps),
    is_portable=True,
)

STEM_CONVFIRST_HOPPER = KernelFamily(
    name="stem_convfirst_hopper",
    title="Hopper kernel",
    shape_type=StemConvFirstShape,
    tile_type=StemConvFirstHopperTile,
    why_unsupported=stem_convfirst_hopper_tile.why_unsupported,
    why_none=stem_convfirst_hopper_tile.why_none,
    why_invalid=stem_convfirst_hopper_tile.why_invalid,
    candidate_tiles=stem_convfirst_hopper_tile.candidate_tiles,
    predicted_us=stem_convfirst_hopper_tile.predicted_us,
    local_memory_bytes=stem_convfirst_hopper_tile.local_memory_bytes,
    estimated_registers=stem_convfirst_hopper_tile.estimated_registers,
    programs_per_processor=stem_convfirst_hopper_tile.programs_per_processor,
    lower=lambda graph, tile, shape: block_fused(
        graph, (hopper_tile.JOB_ROWS, stem_convfirst_hopper_tile.WIDTH), tile.hidden
    ),
    design=lambda tile: (tile.hidden, tile.slab),
)

HEAD = KernelFamily(
    name="head",
    title="portable kernel",
    shape_type=HeadShape,
    tile_type=HeadTile,
    why_unsupported=head_tile.why_unsupported,
    why_none=head_tile.why_none,
    why_invalid=head_tile.why_invalid,
    candidate_tiles=head_tile.candidate_tiles,
    predicted_us=head_tile.predicted_us,
    local_memory_bytes=head_tile.local_memory_bytes,
    estimated_registers=head_tile.estimated_registers,
    programs_per_processor=head_tile.programs_per_processor,
    lower=lambda graph, tile, shape: pool_fused(graph, tile.images, tile.channels),
    design=lambda tile: (tile.pixels, tile.channels, tile.warps),
    is_portable=True,
)

FAMILIES = (
    HOPPER,
    PORTABLE,
    CONVFIRST_DOWN_HOPPER,
    CONVFIRST_DOWN,
    FFN,
    MBCONV_HOPPER,
    MBCONV_WINDOWS_HOPPER,
    MBCONV,
    MBCONV_DOWN_HOPPER,
    MBCONV_DOWN_WINDOWS_HOPPER,
    MBCONV_DOWN,
    STEM,
    STEM_CONVFIRST_HOPPER,
    HEAD,
)
"""The planner takes the first one of a block's shape that has a valid tile, unless a later one should be much
faster."""


def families_of(shape: BlockShape) -> tuple[KernelFamily, ...]:
    """The families for blocks of this shape, in order of preference."""
    return tuple(family for family in FAMILIES if isinstance(shape, family.shape_type))


def family_of(tile: Tile) -> KernelFamily:
    """The family that a tile belongs to. Raises TypeError for anything else."""
    for family in FAMILIES:
        if isinstance(tile, family.tile_type):
            return family
    raise TypeError(f"{tile!r} is not a tile; use a {' or a '.join(family.tile_type.__name__ for family in FAMILIES)}")


def family_named(name: str) -> KernelFamily:
    """The family of this name. Raises ValueError if there is none."""
    for family in FAMILIES:
        if family.name == name:
            return family
    raise ValueError(f"kernel {name!r} is unknown; use one of {', '.join(family.name for family in FAMILIES)}")

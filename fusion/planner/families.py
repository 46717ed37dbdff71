"""Kernel families that run a ConvFirst block, in one table: what the planner and the tuner ask of each."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fusion.planner import hopper_tile, hopper_time
from fusion.planner import tile as portable_tile
from fusion.planner.hopper_tile import HopperTile
from fusion.planner.match import ConvFirstShape
from fusion.planner.processor import Processor
from fusion.planner.tile import ConvFirstTile

Tile = ConvFirstTile | HopperTile


@dataclass(frozen=True)
class KernelFamily:
    """A kernel and the tiles that parametrise it.

    `name` is that of its module in `fusion.triton_kernels`, `title` is for people. `why_none` says why the kernel
    cannot run a block on a processor with any tile, if there are no `candidate_tiles`; `why_invalid` judges one tile.
    Sizes are those of one program, times are in microseconds. `pixel_tile` is the height and width of what a program
    computes together. Tiles of the same `design` differ in little: a search tries one of each first.
    """

    name: str
    title: str
    tile_type: type[Tile]
    why_none: Callable[[ConvFirstShape, Processor], str | None]
    why_invalid: Callable[[Tile, ConvFirstShape, Processor], str | None]
    candidate_tiles: Callable[[ConvFirstShape, Processor], Iterator[Tile]]
    predicted_us: Callable[[Tile, ConvFirstShape, Processor], float]
    local_memory_bytes: Callable[[Tile, ConvFirstShape, Processor], int]
    estimated_registers: Callable[[Tile, ConvFirstShape], float]
    programs_per_processor: Callable[[Tile, ConvFirstShape, Processor], int]
    pixel_tile: Callable[[Tile, ConvFirstShape], tuple[int, int]]
    design: Callable[[Tile], tuple[int, ...]]

    def ranked_tiles(self, shape: ConvFirstShape, processor: Processor) -> list[Tile]:
        """All valid candidates, the best prediction first."""
        tiles = self.candidate_tiles(shape, processor)
        return sorted(tiles, key=lambda tile: round(self.predicted_us(tile, shape, processor), 2))


HOPPER = KernelFamily(
    name="convfirst_hopper",
    title="Hopper kernel",
    tile_type=HopperTile,
    why_none=hopper_tile.why_none,
    why_invalid=hopper_tile.why_invalid,
    candidate_tiles=hopper_time.candidate_tiles,
    predicted_us=hopper_time.predicted_us,
    local_memory_bytes=hopper_tile.local_memory_bytes,
    estimated_registers=hopper_tile.estimated_registers,
    programs_per_processor=hopper_tile.programs_per_processor,
    pixel_tile=lambda tile, shape: (hopper_tile.JOB_ROWS, tile.tile_width(shape.width)),
    design=lambda tile: (tile.pixels, tile.hidden, tile.partitions, tile.warp_products),
)

PORTABLE = KernelFamily(
    name="convfirst",
    title="portable kernel",
    tile_type=ConvFirstTile,
    why_none=portable_tile.why_none,
    why_invalid=portable_tile.why_invalid,
    candidate_tiles=portable_tile.candidate_tiles,
    predicted_us=portable_tile.predicted_us,
    local_memory_bytes=portable_tile.local_memory_bytes,
    estimated_registers=portable_tile.estimated_registers,
    programs_per_processor=portable_tile.programs_per_processor,
    pixel_tile=lambda tile, shape: (tile.height, tile.width),
    design=lambda tile: (tile.pixels, tile.hidden, tile.conv_slab, tile.warps),
)

FAMILIES = (HOPPER, PORTABLE)
"""The planner takes the first one that has a valid tile."""


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

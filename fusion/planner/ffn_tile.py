"""Tile of the Hopper kernel of the FFN block: how it divides pixels over programs, and what is valid."""

from dataclasses import astuple, dataclass
from math import ceil

from fusion.planner.slabs import slab_widths

WARPS = 4
BLOCK_PIXELS = 64
PARTITIONS = 2
WIDEST_SLAB = 64
WEIGHT_COLUMNS = 64
"""Of the matrix of packed weights: those of the widest slab."""


@dataclass(frozen=True)
class FfnWork:
    tiles: int
    grid: int


@dataclass(frozen=True)
class FfnTile:
    blocks: int
    hidden: int
    stages: int
    expand_chunks: int
    project_chunks: int
    x_in_registers: int

    def streams(self, hidden_channels):
        return self.expand_chunks < self.steps(hidden_channels)

    def in_slabs(self, in_channels: int) -> tuple[int, ...]:
        return slab_widths(in_channels, WIDEST_SLAB)

    def out_slabs(self, out_channels: int) -> tuple[int, ...]:
        return slab_widths(out_channels, WIDEST_SLAB)

    def steps(self, hidden_channels: int) -> int:
        return ceil(hidden_channels / self.hidden)

    def padded_hidden(self, hidden_channels: int) -> int:
        return self.steps(hidden_channels) * self.hidden

    def work(self, pixels: int, processors: int) -> FfnWork:
        units = ceil(pixels / (PARTITIONS * self.blocks * BLOCK_PIXELS))
        tiles = ceil(units / processors)
        return FfnWork(tiles, ceil(units / tiles))

    def to_ints(self) -> list[int]:
        return list(astuple(self))

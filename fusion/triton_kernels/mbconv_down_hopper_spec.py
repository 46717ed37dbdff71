"""Compile-time constants of the Hopper kernel of the stride-2 MBConv block."""

from dataclasses import dataclass
from functools import cache

from fusion.planner.mbconv_down_hopper_tile import PIECE, MBConvDownHopperTile
from fusion.planner.mbconv_hopper_tile import LANES
from fusion.triton_kernels.mbconv_hopper_room import RoomSpec
from fusion.triton_kernels.mbconv_hopper_spec import Spec

LOAD_REGISTERS = 96
"""Of a thread, for pixels of the input on their way together."""


@dataclass(frozen=True)
class DownSpec(RoomSpec):
    """Constants of the block, and how a tile divides its images (`MBConvDownHopperTile` tells of most).

    Pixels of `produced` are the input's, those of `projected` the output's. Without a `blur` the convolution has stride
    2.
    """

    blur: bool
    tiles_of_column: int
    columns: int

    @property
    def exact(self) -> bool:
        """Whether no lane and no tile lies outside of the image."""
        lanes = 2 * LANES * self.tiles_of_column
        return (self.produced.height, self.produced.width) == (lanes, self.columns)

    @property
    def out_columns(self) -> int:
        """Columns of the output that are computed."""
        return self.columns // 2

    @property
    def out_pixels(self) -> int:
        """Pixels of the output that are computed."""
        return self.out_columns * LANES * self.tiles_of_column

    @property
    def piece_columns(self) -> int:
        """Columns that are expanded together."""
        return PIECE // self.tiles_of_column

    @property
    def rows_of_lane(self) -> int:
        """Rows of the input that a lane has."""
        return 2 * self.tiles_of_column

    @property
    def load_pixels(self) -> int:
        """Pixels of the input that are on their way together."""
        pixels, channels = self.produced.pixels, sum(self.produced.in_slabs)
        while pixels * channels > 2 * LOAD_REGISTERS * 256:
            pixels //= 2
        return pixels


@cache
def constants(
    height: int,
    width: int,
    in_channels: int,
    hidden_channels: int,
    out_channels: int,
    squeeze_channels: int,
    *,
    activation: str,
    squeeze_activation: str,
    blur: bool,
    tile: MBConvDownHopperTile,
) -> DownSpec:
    """Compile-time constants of the kernel for images of `height x width` pixels, these channels and this tile."""
    size = height, width
    sizes = *size, in_channels, hidden_channels, out_channels, squeeze_channels
    common = {
        "in_channels": in_channels,
        "out_channels": out_channels,
        "residual": False,
        "activation": activation,
        "squeeze_activation": squeeze_activation,
        "in_slabs": tile.in_slabs(in_channels),
        "out_slabs": tile.out_slabs(out_channels),
        "products": tile.products(out_channels),
        "sweeps": tile.sweeps(hidden_channels),
        "hidden": tile.computed_hidden(*size, hidden_channels),
        "depths": tile.depths(in_channels),
        "squeeze_depths": tile.squeeze_depths(squeeze_channels),
        "squeeze_room": tile.squeeze_room(squeeze_channels),
        "gate_room": tile.gate_room(hidden_channels),
        "bias_room": tile.bias_room(out_channels),
        "bands": 1,
        "step": tile.step,
        "stages": tile.stages,
        "hidden_stages": tile.hidden_stages(*sizes),
        "passes": tile.passes(*size, out_channels),
        "group": tile.group(*size, out_channels),
        "reads_ahead": tile.reads_ahead(*sizes),
        "resident": tile.resident == 1,
    }
    columns, out_tiles = tile.columns(*size), tile.out_tiles(*size)
    produced = Spec(
        **common,
        height=height,
        width=width,
        columns=columns,
        tiles=tile.in_tiles(*size),
        piece=PIECE,
        split=False,
    )
    projected = Spec(
        **common,
        height=-(-height // 2),
        width=-(-width // 2),
        columns=out_tiles,
        tiles=out_tiles,
        piece=1,
        split=tile.splits_last(*size, hidden_channels),
    )
    room = tile.room_bytes(*size, in_channels, out_channels) // 2
    return DownSpec(produced, projected, room, blur, tile.tiles_of_column(height), columns)

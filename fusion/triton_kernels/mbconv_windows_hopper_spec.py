"""Compile-time constants of the Hopper kernel of the MBConv block for larger images."""

from dataclasses import dataclass
from functools import cache

from fusion.planner.mbconv_hopper_tile import ROWS, WARPS, taps_pieces
from fusion.planner.mbconv_windows_hopper_tile import WindowsTile, row_pairs
from fusion.triton_kernels.mbconv_hopper_room import RoomSpec
from fusion.triton_kernels.mbconv_hopper_spec import Spec

LOAD_REGISTERS = 80
"""Of a thread, for pixels of the input on their way together."""


@dataclass(frozen=True)
class WindowSpec(Spec):
    """Of the first phase: height and width are the image's, pixels those of a window."""

    kernel_size: int

    @property
    def taps(self) -> int:
        return taps_pieces(self.kernel_size)

    @property
    def exact(self) -> bool:
        """Whether no window has pixels outside of the image."""
        return self.height >= ROWS and self.height % 2 == 0 and self.width == self.columns

    @property
    def loaded_pieces(self) -> int:
        """Pieces of the input that are on their way together."""
        registers = self.piece_pixels * sum(self.in_slabs) // (2 * 32 * WARPS)
        return max(1, min(self.pieces, LOAD_REGISTERS // registers))

    def pieces_together(self, first: int) -> int:
        """How many pieces are loaded together from piece `first` on."""
        return min(self.loaded_pieces, self.pieces - first)


@dataclass(frozen=True)
class PassSpec(Spec):
    """Of the second phase: what the projection takes for a block is a pass, some pixels of the image."""

    @property
    def packed_steps(self) -> int:
        """From the weights of a pass to those of the next: they are the same."""
        return 0

    @property
    def weights_in_order(self) -> bool:
        return False

    @property
    def all_hidden(self) -> bool:
        return True


@dataclass(frozen=True)
class WindowsSpec(RoomSpec):
    """Constants of the block, and how a tile divides its images (`WindowsTile` tells of most).

    Pixels of `produced` are the input's, those of `projected` the output's.
    """

    stride: int
    row_pairs: int
    pixel_pairs: int
    inner_pairs: int


@cache
def constants(
    height: int,
    width: int,
    in_channels: int,
    hidden_channels: int,
    out_channels: int,
    squeeze_channels: int,
    *,
    kernel_size: int,
    activation: str,
    squeeze_activation: str,
    residual: bool,
    tile: WindowsTile,
) -> WindowsSpec:
    """Compile-time constants of the kernel for images of `height x width` pixels, these channels and this tile."""
    sizes = width, in_channels, hidden_channels, out_channels, squeeze_channels
    common = {
        "in_channels": in_channels,
        "out_channels": out_channels,
        "residual": residual,
        "activation": activation,
        "squeeze_activation": squeeze_activation,
        "in_slabs": tile.in_slabs(in_channels),
        "out_slabs": tile.out_slabs(out_channels),
        "products": tile.products(out_channels),
        "sweeps": tile.sweeps(hidden_channels),
        "hidden": tile.padded_hidden(hidden_channels),
        "depths": tile.depths(in_channels),
        "squeeze_depths": tile.squeeze_depths(squeeze_channels),
        "squeeze_room": tile.squeeze_room(squeeze_channels),
        "gate_room": tile.gate_room(hidden_channels),
        "bias_room": tile.bias_room(out_channels),
        "bands": 1,
        "step": tile.step,
        "stages": tile.stages,
        "hidden_stages": tile.hidden_stages(*sizes),
        "passes": 1,
        "group": tile.group(out_channels),
        "reads_ahead": tile.reads_ahead(*sizes),
        "resident": False,
        "split": False,
    }
    columns, stride = tile.columns(width), tile.STRIDE
    produced = WindowSpec(
        **common,
        height=height,
        width=width,
        columns=columns,
        tiles=columns,
        piece=tile.piece,
        kernel_size=kernel_size,
    )
    projected = PassSpec(
        **common,
        height=-(-height // stride),
        width=-(-width // stride),
        columns=tile.pass_tiles,
        tiles=tile.pass_tiles,
        piece=1,
    )
    room = tile.room_bytes(width, in_channels, out_channels) // 2
    return WindowsSpec(
        produced, projected, room, stride, row_pairs(height), tile.pixel_pairs(width), tile.inner_pairs(kernel_size)
    )

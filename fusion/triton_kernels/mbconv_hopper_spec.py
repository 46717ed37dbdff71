"""What the phases of the Hopper kernel of the MBConv block share: constants, layouts, weights as threads hold them."""

import struct
from dataclasses import dataclass
from functools import cache

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from fusion.planner import mbconv_hopper_tile as planned
from fusion.planner.mbconv_hopper_tile import (
    KERNEL_SIZE,
    LANES,
    ROWS,
    SWEEP,
    TAPS_PIECE_ELEMENTS,
    TILE_PIXELS,
    MBConvHopperTile,
    taps_pieces,
)

WARPS = gl.constexpr(planned.WARPS)
HIDDEN = gl.constexpr(SWEEP)
"""Hidden channels of a sweep."""
TILE = gl.constexpr(TILE_PIXELS)
"""Pixels of a tile."""
UNIT = gl.constexpr(256)
"""Elements of 16 hidden channels of a tile."""
BIAS = gl.constexpr(planned.BIAS_CHANNELS)
PRODUCT_WIDTHS = (256, 128, 64, 32, 16)
"""Of the projection's products: for each there may be a descriptor of the weights."""


@dataclass(frozen=True)
class Spec:
    """Compile-time constants of the kernel: the block, and how a tile divides it (`MBConvHopperTile` tells of most)."""

    height: int
    width: int
    in_channels: int
    out_channels: int
    residual: bool
    activation: str
    squeeze_activation: str
    in_slabs: tuple[int, ...]
    out_slabs: tuple[int, ...]
    products: tuple[int, ...]
    sweeps: int
    hidden: int
    depths: int
    squeeze_depths: int
    squeeze_room: int
    gate_room: int
    bias_room: int
    bands: int
    columns: int
    tiles: int
    piece: int
    step: int
    stages: int
    hidden_stages: int
    passes: int
    group: int
    reads_ahead: bool
    resident: bool
    split: bool

    @property
    def packed_hidden(self) -> int:
        """Hidden channels that there are weights for."""
        return self.sweeps * SWEEP

    @property
    def whole_sweeps(self) -> int:
        """But for a last one whose columns the warpgroups divide."""
        return self.sweeps - self.split

    @property
    def pixels(self) -> int:
        """Pixels that there is room for."""
        return self.tiles * TILE_PIXELS

    @property
    def pieces(self) -> int:
        """Pieces that there is room for."""
        return self.tiles // self.piece

    @property
    def piece_pixels(self) -> int:
        return self.piece * TILE_PIXELS

    @property
    def rows(self) -> int:
        """Pixels of a pass of the projection."""
        return self.pixels // self.passes

    @property
    def steps(self) -> int:
        """Of a pass."""
        return self.hidden // self.step

    @property
    def turns(self) -> int:
        """Steps of all passes."""
        return self.steps * self.passes

    @property
    def packed_steps(self) -> int:
        """Steps that there are weights for."""
        return self.packed_hidden // self.step

    @property
    def weights_in_order(self) -> bool:
        """Whether the weights of all turns follow each other, those of one block after another's."""
        return self.passes == 1 and not self.split

    @property
    def all_hidden(self) -> bool:
        """Whether the hidden channels of all blocks are there before the first one is projected."""
        return False

    @property
    def chunk(self) -> int:
        """Steps whose code follows each other."""
        return SWEEP // 2 // self.step if self.split else SWEEP // self.step * self.together

    @property
    def units(self) -> int:
        """Of 16 hidden channels, in a step."""
        return self.step // 16

    @property
    def warps_of_rows(self) -> int:
        """Warps that divide the pixels of a pass; the others divide output channels."""
        return min(planned.WARPS, self.rows // TILE_PIXELS)

    @property
    def pixel_share(self) -> str:
        """A pixel's share of a mean, as assembly has it."""
        return "0f" + struct.pack(">f", 1 / (self.height * self.width)).hex()

    @property
    def squeeze_parts(self) -> int:
        """Parts of the squeeze vector, of 32 channels."""
        return -(-self.squeeze_depths // 2)

    @property
    def taps_elements(self) -> int:
        """Of a sweep."""
        return self.taps * TAPS_PIECE_ELEMENTS

    @property
    def taps(self) -> int:
        return taps_pieces(KERNEL_SIZE)

    @property
    def weight_rows(self) -> int:
        """Rows of 64 of the projection's packed weights, of a step."""
        return self.step * sum(self.out_slabs) // 64

    @property
    def hidden_rows(self) -> int:
        """Rows of 64 of the workspace, of a step and a pass."""
        return self.step * self.rows // 64

    @property
    def pairs(self) -> int:
        """Rows of pixels in the lanes of a band, in pairs."""
        return LANES // self.bands

    @property
    def exact(self) -> bool:
        """Whether no lane lies outside of the image."""
        return self.height == ROWS // self.bands and self.width == self.bands * self.columns

    @property
    def at_once(self) -> bool:
        """Whether all tiles of a sweep are expanded together."""
        return self.piece == self.columns

    @property
    def together(self) -> int:
        """Sweeps whose code follows each other: two load expansion weights, and store, to different places."""
        return 2 if self.at_once and self.sweeps % 2 == 0 else 1

    @property
    def in_place(self) -> bool:
        """Whether the output takes the place of the input."""
        return self.in_slabs == self.out_slabs


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
    residual: bool,
    tile: MBConvHopperTile,
) -> Spec:
    """Compile-time constants of the kernel for images of `height x width` pixels, these channels and this tile."""
    return Spec(
        height=height,
        width=width,
        in_channels=in_channels,
        out_channels=out_channels,
        residual=residual,
        activation=activation,
        squeeze_activation=squeeze_activation,
        in_slabs=tile.in_slabs(in_channels),
        out_slabs=tile.out_slabs(out_channels),
        products=tile.products(width, out_channels),
        sweeps=tile.sweeps(hidden_channels),
        hidden=tile.computed_hidden(width, hidden_channels),
        depths=tile.depths(in_channels),
        squeeze_depths=tile.squeeze_depths(squeeze_channels),
        squeeze_room=tile.squeeze_room(squeeze_channels),
        gate_room=tile.gate_room(hidden_channels),
        bias_room=tile.bias_room(out_channels),
        bands=tile.bands,
        columns=tile.columns(width),
        tiles=tile.tiles(width),
        piece=tile.piece,
        step=tile.step,
        stages=tile.stages,
        hidden_stages=tile.hidden_stages(width, in_channels, hidden_channels, out_channels, squeeze_channels),
        passes=tile.passes(width, out_channels),
        group=tile.group(width, out_channels),
        reads_ahead=tile.reads_ahead(width, in_channels, hidden_channels, out_channels, squeeze_channels),
        resident=tile.is_resident(width, in_channels, hidden_channels, out_channels, squeeze_channels),
        split=tile.splits_last(width, hidden_channels),
    )


@gluon.constexpr_function
def tile_layout():
    """[hidden of a sweep, tile]: eight registers of a thread.

    So the sums of the expansion hold them: rows are hidden channels, columns pixels. After `movmatrix` the registers
    hold pixels in lanes and pairs of hidden channels, whatever this layout says.
    """
    return gl.NVMMADistributedLayout([3, 0], [planned.WARPS, 1], [16, TILE_PIXELS, 16])


@gluon.constexpr_function
def fragment_layout():
    """[warps, 32, 8]: 16 bytes of each thread."""
    return gl.BlockedLayout([1, 1, 8], [1, 32, 1], [planned.WARPS, 1, 1], [2, 1, 0])


@gluon.jit
def fragment_offsets(WARP_STRIDE: gl.constexpr, LANES_APART: gl.constexpr, WARPS_APART: gl.constexpr):
    """[warps, 32, 8]: 8 elements of each lane, the same ones for lanes and warps that are so far from each other."""
    LAYOUT: gl.constexpr = fragment_layout()
    w = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT))) % WARPS_APART
    t = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))
    e = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))
    return w[:, None, None] * WARP_STRIDE + (t % LANES_APART)[None, :, None] * 8 + e[None, None, :]


@gluon.jit
def as_tile(fragments):
    """[warps, 32, 8] -> [hidden, tile], in the registers' order."""
    t = fragments.reshape((WARPS, 8, 4, 2, 2, 2)).permute((0, 4, 1, 3, 2, 5)).reshape((HIDDEN, TILE))
    return gl.convert_layout(t, tile_layout(), assert_trivial=True)


@gluon.jit
def as_fragments(t):
    """[hidden, tile] -> [warps, 32, 8], in the registers' order."""
    fragments = t.reshape((WARPS, 2, 8, 2, 4, 2)).permute((0, 2, 4, 3, 1, 5)).reshape((WARPS, 32, 8))
    return gl.convert_layout(fragments, fragment_layout(), assert_trivial=True)


@gluon.jit
def load_operands(pointer, used, DEPTHS: gl.constexpr, WARPS_APART: gl.constexpr, dtype: gl.constexpr):
    """Left operands of products: of each two [hidden, tile] int32, and of an odd last one 16 bits."""
    offsets = fragment_offsets(UNIT, 32, WARPS_APART)
    left = ()
    for i in gl.static_range(DEPTHS // 2):
        left = left + (as_tile(gl.load(pointer + i * (UNIT * WARPS) + offsets, mask=used, other=0)),)
    if DEPTHS % 2 == 1:
        single = (pointer + DEPTHS // 2 * (UNIT * WARPS)).to(gl.pointer_type(dtype), bitcast=True)
        left = left + (as_tile(gl.load(single + offsets, mask=used, other=0.0)),)
    return left


@gluon.jit
def swapped(piece, S: gl.constexpr):
    """Where a piece lies, and what lies there: those that warpgroups expand together are next to each other."""
    if S.split:
        return piece % 2 * 2 + piece // 2
    else:
        return piece


@gluon.jit
def place(column, S: gl.constexpr):
    """Where a column's tile lies, and what column lies there."""
    return swapped(column // S.piece, S) * S.piece + column % S.piece


@gluon.constexpr_function
def copy_layout(slab):
    """[pixels, slab] copied 16 bytes a thread."""
    lanes = slab // 8
    return gl.BlockedLayout([1, 8], [32 // lanes, lanes], [planned.WARPS, 1], [1, 0])


@gluon.jit
def new_barriers(COUNT: gl.constexpr):
    """[COUNT, 1], each for one arrival."""
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(barriers.index(i), count=1)
    return barriers

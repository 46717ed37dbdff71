"""What the phases of the Hopper kernel of the MBConv block share: constants, barriers, operands in memory."""

from dataclasses import dataclass

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from fusion.planner import mbconv_hopper_tile as planned
from fusion.planner.mbconv_hopper_tile import (
    BLOCK_PIXELS,
    GATES,
    PARTITIONS,
    TAPS_ELEMENTS,
    WARPS,
    WIDEST,
    MBConvHopperTile,
)

CHUNK = gl.constexpr(planned.CHUNK)
"""Hidden channels that a partition expands together."""
HALF = gl.constexpr(planned.HALF)
"""Hidden channels that it convolves together."""
BLOCK = gl.constexpr(BLOCK_PIXELS)
"""Pixels of a product whose rows are pixels."""
CREW = gl.constexpr(PARTITIONS)
"""Partitions of a program."""
TAPS_ROWS = gl.constexpr(TAPS_ELEMENTS // WIDEST)
"""Rows of the packed weights that hold the taps of a half."""
GATE_COLUMNS = gl.constexpr(GATES)
"""Gates that a partition computes together."""
SLAB_WIDTHS = (64, 32, 16)
"""Of slabs: for each there may be a descriptor of the input and the output."""


@dataclass(frozen=True)
class Spec:
    """Compile-time constants of the kernel: the block, and how a tile divides it (`MBConvHopperTile` tells of most).

    `part` pixels are expanded together, `turns` are the steps of the projection in all its passes, `taps_start` is the
    first byte of a partition's taps, after its row buffers. `exact` tells that no pixel is outside of the images.
    """

    height: int
    width: int
    residual: bool
    activation: str
    in_slabs: tuple[int, ...]
    store_slabs: tuple[int, ...]
    out_slabs: tuple[int, ...]
    out_tiles: int
    chunks: int
    squeeze: int
    gate_steps: int
    bias_elements: int
    images: int
    rows: int
    bands: int
    columns: int
    pad: int
    buffer_pixels: int
    taps_start: int
    partition_bytes: int
    arena_atoms: int
    shares_atom: int
    workspace_elements: int
    splits_columns: bool
    passes: int
    step: int
    stages: int

    @property
    def row_pixels(self) -> int:
        """Pixels of a row buffer."""
        return self.bands * self.columns

    @property
    def image_pixels(self) -> int:
        return self.rows * self.row_pixels

    @property
    def pixels(self) -> int:
        return self.images * self.image_pixels

    @property
    def blocks(self) -> int:
        return self.pixels // BLOCK_PIXELS

    @property
    def row_blocks(self) -> int:
        """Blocks of a row buffer."""
        return self.row_pixels // BLOCK_PIXELS

    @property
    def part(self) -> int:
        """At most half of the pixels, so that those are activated while others are expanded."""
        return max(self.row_pixels, min(128, self.pixels // 2))

    @property
    def turns(self) -> int:
        return self.passes * self.chunks * planned.CHUNK // self.step

    @property
    def exact(self) -> bool:
        return self.columns == self.width and self.rows * self.bands == self.height


def constants(
    height: int,
    width: int,
    in_channels: int,
    hidden_channels: int,
    out_channels: int,
    squeeze_channels: int,
    *,
    activation: str,
    residual: bool,
    tile: MBConvHopperTile,
) -> Spec:
    """Compile-time constants of the kernel for images of `height x width` pixels, these channels and this tile."""
    return Spec(
        height=height,
        width=width,
        residual=residual,
        activation=activation,
        in_slabs=tile.in_slabs(in_channels),
        store_slabs=tile.store_slabs(out_channels),
        out_slabs=tile.out_slabs(out_channels),
        out_tiles=tile.out_tiles(out_channels),
        chunks=tile.chunks(hidden_channels),
        squeeze=tile.squeeze(squeeze_channels),
        gate_steps=tile.gate_steps(hidden_channels),
        bias_elements=tile.bias_elements(hidden_channels),
        images=tile.images,
        rows=tile.rows,
        bands=tile.bands,
        columns=tile.columns,
        pad=tile.pad,
        buffer_pixels=tile.buffer_pixels,
        taps_start=tile.buffer_bytes(),
        partition_bytes=tile.partition_bytes(),
        arena_atoms=tile.arena_atoms(out_channels, squeeze_channels),
        shares_atom=tile.shares_atom(out_channels, squeeze_channels),
        workspace_elements=tile.workspace_elements(hidden_channels),
        splits_columns=tile.splits_columns,
        passes=tile.passes(out_channels),
        step=tile.step(out_channels),
        stages=tile.stages(out_channels, squeeze_channels),
    )


@gluon.constexpr_function
def fragment_layout(count):
    """[count, threads, 8]: 16 bytes of each thread."""
    return gl.BlockedLayout([count, 1, 8], [1, 32, 1], [1, WARPS, 1], [2, 1, 0])


@gluon.constexpr_function
def pixels_layout(channels):
    """[1 image, rows, columns, bands, channels] that TMA copies."""
    return gl.NVMMASharedLayout(swizzle_byte_width=2 * channels, element_bitwidth=16, rank=5)


@gluon.constexpr_function
def width_index(width):
    """Index of the descriptor for slabs of this width, in the order of `SLAB_WIDTHS`."""
    return (64 // width).bit_length() - 1


@gluon.jit
def new_barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """[COUNT, 1], each for so many arrivals."""
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers


@gluon.jit
def fragment_offsets(COUNT: gl.constexpr, STRIDE: gl.constexpr):
    """[COUNT, threads, 8]: each 16 columns are `STRIDE` elements after those before, 16 bytes of each thread."""
    LAYOUT: gl.constexpr = fragment_layout(COUNT)
    k = gl.arange(0, COUNT, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))
    t = gl.arange(0, 128, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))
    e = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))
    return k[:, None, None] * STRIDE + t[None, :, None] * 8 + e[None, None, :]


@gluon.jit
def store_fragments(pointer, y):
    """[64, 16] as threads hold it."""
    y = y.reshape((4, 2, 8, 2, 4, 2))  # warp, row + 8, row, k + 8, pair, element
    y = y.permute((0, 2, 4, 3, 1, 5)).reshape((1, 128, 8))
    y = gl.convert_layout(y, fragment_layout(1), assert_trivial=True)
    gl.store(pointer + fragment_offsets(1, 0), y)


@gluon.jit
def read_fragments(pointer, COUNT: gl.constexpr, STRIDE: gl.constexpr):
    """[64, 16 count], as left operand: each 16 columns are `STRIDE` elements after those before."""
    y = gl.load(pointer + fragment_offsets(COUNT, STRIDE))
    y = y.reshape((COUNT, 4, 8, 4, 2, 2, 2))  # k16, warp, row, pair, k + 8, row + 8, element
    return y.permute((1, 5, 2, 0, 4, 3, 6)).reshape((64, 16 * COUNT))

"""A last sweep of 64 hidden channels, in the first phase of the Hopper kernel of the MBConv block.

Both warpgroups expand and convolve the same hidden channels, each for half of the columns: of four pieces one has the
first two, the other the last two. A piece of one and a piece of the other are the columns of one product, so they lie
next to each other in shared memory (`swapped`). At the border each needs a tile of the other.

As everywhere, a tile [hidden, tile] means registers: here warps w and w + 4 have the same hidden channels.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fusion.triton_kernels.hopper_layouts import plain_layout, powers
from fusion.triton_kernels.hopper_parts import fixed, zeros
from fusion.triton_kernels.mbconv_hopper_produce import (
    finish_expand,
    left_operands,
    load_conv,
    load_squeeze,
    squeeze_pool,
    start_products,
    tiles_of,
)
from fusion.triton_kernels.mbconv_hopper_registers import convolve, pixel_mask
from fusion.triton_kernels.mbconv_hopper_spec import (
    HIDDEN,
    TILE,
    UNIT,
    WARPS,
    as_fragments,
    as_tile,
    fragment_layout,
    place,
    tile_layout,
)

GROUP_WARPS = gl.constexpr(WARPS.value // 2)
"""Warps of a warpgroup."""


@gluon.constexpr_function
def sums_layout(S):
    """[hidden, pixels of two pieces], sums of the expansion."""
    return gl.NVMMADistributedLayout([3, 0], [GROUP_WARPS.value, 2], [16, TILE.value * S.piece, 16])


@gluon.constexpr_function
def shared_layout():
    """[2, warps of a warpgroup, 256]: 32 bits each, eight elements of a thread; the first index is the warpgroup."""
    lanes = [[0, 0, element] for element in powers(8, UNIT.value)]
    warps = [[0, warp, 0] for warp in powers(1, GROUP_WARPS.value)] + [[1, 0, 0]]
    return gl.DistributedLinearLayout([[0, 0, 1], [0, 0, 2], [0, 0, 4]], lanes, warps, [], [2, GROUP_WARPS.value, 256])


@gluon.jit
def as_rows(fragments):
    """[warps of a warpgroup, 256] -> [hidden, 16], in the registers' order."""
    rows = fragments.reshape((GROUP_WARPS, 8, 4, 2, 2, 2)).permute((0, 4, 1, 3, 2, 5))
    return rows.reshape((GROUP_WARPS * 16, 16))


@gluon.jit
def load_left(expand_ptr, sweep, dtype: gl.constexpr, S: gl.constexpr):
    """U of the sweep: of each two depths [hidden, 16] int32, and of an odd last one 16 bits."""
    LAYOUT: gl.constexpr = gl.SliceLayout(0, shared_layout())
    w = gl.arange(0, GROUP_WARPS, gl.SliceLayout(1, LAYOUT))
    e = gl.arange(0, UNIT, gl.SliceLayout(0, LAYOUT))
    offsets = w[:, None] * UNIT + e[None, :]
    pointer = expand_ptr + sweep * (S.depths * UNIT * WARPS // 2)
    left = ()
    for i in gl.static_range(S.depths // 2):
        left = left + (as_rows(gl.load(pointer + i * (UNIT * WARPS) + offsets)),)
    if S.depths % 2 == 1:
        single = (pointer + S.depths // 2 * (UNIT * WARPS)).to(gl.pointer_type(dtype), bitcast=True)
        left = left + (as_rows(gl.load(single + offsets)),)
    return left


@gluon.jit
def start_expand(operands, xs, pair: gl.constexpr, S: gl.constexpr):
    """[hidden, pixels of two pieces]: pieces `pair` of both warpgroups."""
    PIXELS: gl.constexpr = 2 * TILE * S.piece
    return start_products(operands, xs, 2 * pair, HIDDEN // 2, PIXELS, sums_layout(S), S)


@gluon.jit
def column_of(k, S: gl.constexpr):
    """Column of tile `k` of both warpgroups, for each row of [hidden, tile]."""
    return k + S.columns // 2 * (gl.arange(0, HIDDEN, gl.SliceLayout(1, tile_layout())) // (HIDDEN // 2))


@gluon.jit
def activated(sums, pair: gl.constexpr, dtype: gl.constexpr, S: gl.constexpr):
    """The tiles of two pieces."""
    sums = sums.reshape((HIDDEN // 2, 2, TILE * S.piece)).permute((1, 0, 2)).reshape((HIDDEN, TILE * S.piece))
    return tiles_of(sums, column_of(pair * S.piece, S), dtype, S)


@gluon.jit
def of_other(edges, WARPGROUP: gl.constexpr):
    """What a warpgroup's warps have stored, [8 warps, 256], for the other warpgroup's; zero for its own."""
    stored = edges.slice(WARPGROUP * GROUP_WARPS, GROUP_WARPS, dim=0).load(gl.SliceLayout(0, shared_layout()))
    own = gl.arange(0, 2, gl.SliceLayout(1, gl.SliceLayout(2, shared_layout()))) == WARPGROUP
    both = gl.where(own[:, None, None], 0, stored[None, :, :])
    return as_tile(both.reshape((WARPS, 32, 8)))


@gluon.jit
def tiles_beside(tiles, scratch, S: gl.constexpr):
    """The tile before the first one and that after the last one, from the other warpgroup."""
    edges = scratch._reinterpret(gl.int32, [2 * WARPS, UNIT], plain_layout(2))
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [WARPS, 1], [1, 0])
    for i in gl.static_range(2):
        edge = as_fragments(tiles[i * (len(tiles) - 1)]).reshape((WARPS, UNIT))
        edges.slice(i * WARPS, WARPS, dim=0).store(gl.convert_layout(edge, LAYOUT, assert_trivial=True))
    gl.thread_barrier()
    return of_other(edges.slice(WARPS, WARPS, dim=0), 0), of_other(edges.slice(0, WARPS, dim=0), 1)


@gluon.jit
def store(y, ws, k: gl.constexpr, S: gl.constexpr):
    """[hidden, tile] of tile `k` to the workspace, as `store_streamed`; warps have different columns."""
    LAYOUT: gl.constexpr = fragment_layout()
    TILES: gl.constexpr = S.tiles // S.passes
    w = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))
    t = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))
    e = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))
    at = place(k + S.columns // 2 * (w // GROUP_WARPS), S)
    unit = (S.sweeps - 1) * WARPS + w % GROUP_WARPS
    offsets = (at // TILES * (S.hidden // 16) + unit) * (TILES * UNIT) + at % TILES * UNIT
    gl.store(ws + offsets[:, None, None] + t[None, :, None] * 8 + e[None, None, :], as_fragments(y))


@gluon.jit
def produce_half(block, squeezed, xs, weights, ws, scratch, dtype: gl.constexpr, S: gl.constexpr):
    """The last 64 hidden channels of the image, to the workspace; returns each warp's shares of the squeeze vector."""
    expand_ptr, taps_ptr, bias_ptr, squeeze_ptr = weights
    of_all = block * S.sweeps + S.sweeps - 1
    left = load_left(expand_ptr, of_all, dtype, S)
    conv = load_conv(taps_ptr, bias_ptr, of_all, GROUP_WARPS, S)
    squeeze = load_squeeze(squeeze_ptr, of_all, GROUP_WARPS, dtype, S)
    operands = left_operands(left, conv[0][0], sums_layout(S), S)
    first, second = start_expand(operands, xs, 0, S), start_expand(operands, xs, 1, S)
    tiles = activated(finish_expand(first), 0, dtype, S) + activated(finish_expand(second), 1, dtype, S)
    before, after = tiles_beside(tiles, scratch, S)
    tiles = (before,) + tiles + (after,)
    pool = zeros(HIDDEN, TILE, gl.float32, tile_layout())
    for k in gl.static_range(fixed(S.columns // 2)):
        y, pool = convolve(tiles[k], tiles[k + 1], tiles[k + 2], conv, pool, pixel_mask(column_of(k, S), S), S)
        store(y, ws, k, S)
    return squeeze_pool(pool, squeeze, squeezed, conv[0][0], S)

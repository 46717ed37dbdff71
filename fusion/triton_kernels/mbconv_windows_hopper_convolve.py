"""The convolution of a window of an image, 3x3 or 5x5, of stride 1 or 2, a piece of columns at a time.

Each has its own way to hand on to the next piece what that needs: tiles of the last columns, or, as tiles of a 5x5
convolution take more registers, sums of columns of the output that lack some of theirs.

Of stride 1 a column gives a tile of the output; of stride 2 four columns do: one row of each lane, two columns.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fusion.planner import mbconv_hopper_tile as planned
from fusion.triton_kernels.hopper_parts import fixed, split_units
from fusion.triton_kernels.mbconv_down_hopper_registers import strided_taps
from fusion.triton_kernels.mbconv_hopper_registers import activate, convolved, finish, no_tile
from fusion.triton_kernels.mbconv_hopper_spec import (
    HIDDEN,
    TILE,
    UNIT,
    WARPS,
    as_fragments,
    fragment_layout,
    fragment_offsets,
    tile_layout,
)
from fusion.triton_kernels.mbconv_windows_hopper_wide import activate_wide, add_piece, add_tile

LANES = gl.constexpr(planned.LANES)


@gluon.jit
def inside_mask(window, column, S: gl.constexpr):
    """[hidden, tile] int32: all bits set in registers that hold pixels of the image, of the tile of `column`.

    Where all registers do, nobody looks at the mask.
    """
    if S.exact:
        return no_tile()
    else:
        LAYOUT: gl.constexpr = tile_layout()
        top, _, _ = window
        pair = top + gl.arange(0, HIDDEN, gl.SliceLayout(1, LAYOUT)) % LANES
        parity = gl.arange(0, TILE, gl.SliceLayout(0, LAYOUT)) // LANES
        row = (2 * pair)[:, None] + parity[None, :]
        return gl.where((row < S.height) & (column < S.width), -1, 0)


@gluon.jit
def output_mask(window, index, D: gl.constexpr):
    """[hidden, tile] int32: as `inside_mask`, of a tile of the output."""
    if D.stride == 1:
        return inside_mask(window, index, fixed(D.produced))
    elif D.produced.exact:
        return no_tile()
    else:
        column = 2 * index + gl.arange(0, TILE, gl.SliceLayout(0, tile_layout())) // LANES
        return no_tile() + gl.where(column < D.projected.width, -1, 0)[None, :]


@gluon.jit
def activated(sums, window, first, like, D: gl.constexpr):
    """The tiles of a piece from column `first` on, in 16 bits as `like`, each with those of its lanes' neighbours that
    the convolution needs."""
    S: gl.constexpr = D.produced
    sums = split_units(sums, fixed(TILE.value))
    tiles = ()
    for k in gl.static_range(fixed(S.piece)):
        unit = gl.convert_layout(sums[k], tile_layout(), assert_trivial=True)
        mask = inside_mask(window, first + k, S)
        if S.kernel_size == 5:
            tiles = tiles + (activate_wide(unit, mask, like, S),)
        else:
            tiles = tiles + (activate(unit, mask, like.dtype, S, fixed(D.stride == 1)),)
    return tiles


@gluon.jit
def store(y, target, index, D: gl.constexpr):
    """[hidden, tile], tile `index` of the output, to the workspace, as the projection's left operand: [passes,
    hidden / 16, tiles, 256].

    There, lanes of a tile have neighbouring pairs of pixels of a pair of rows, and pairs of rows follow each other.
    """
    S: gl.constexpr = D.projected
    window, ws, sweep = target
    top, first, end = window
    t = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(2, fragment_layout())))
    pair = (top + t // 4)[None, :, None]
    lane = pair * D.pixel_pairs + index
    own = (pair >= first) & (pair < end) & (index < D.pixel_pairs)
    PASS_LANES: gl.constexpr = S.tiles * LANES
    place = lane // PASS_LANES * (S.hidden // 16 * S.tiles * UNIT) + lane % PASS_LANES * (UNIT // LANES)
    # A warp's units are so far from each other; of a lane of eight, four threads have 16 bytes each.
    w = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, fragment_layout())))
    offsets = place + (w * (S.tiles * UNIT))[:, None, None] + fragment_offsets(0, 4, WARPS)
    gl.store(ws + sweep * (WARPS * S.tiles * UNIT) + offsets, as_fragments(y), mask=own)


@gluon.jit
def finish_tile(sums, index, weights, pool, target, D: gl.constexpr):
    """Activate and store tile `index` of the output; returns the pool with it."""
    mask = output_mask(target[0], index, D)
    y, pool = finish(sums, pool, mask, weights[0][0], D.produced.exact, fixed(D.projected))
    store(y, target, index, D)
    return pool


@gluon.jit
def convolve_3(neighbours, tiles, first, PLACE: gl.constexpr, weights, pool, target, D: gl.constexpr):
    """Stride 1. Hands on the last two columns, of which the last one is not convolved yet."""
    if PLACE == "first":
        tiles = (no_tile(),) + tiles
    else:
        first -= 1
        tiles = neighbours + tiles
    if PLACE == "last":
        tiles = tiles + (no_tile(),)
    COUNT: gl.constexpr = len(tiles) - 2
    for k in gl.static_range(COUNT):
        sums = convolved(tiles[k], tiles[k + 1], tiles[k + 2], weights)
        pool = finish_tile(sums, first + k, weights, pool, target, D)
    return (tiles[COUNT], tiles[COUNT + 1]), pool


@gluon.jit
def convolve_3_strided(last, tiles, piece, PLACE: gl.constexpr, weights, pool, target, D: gl.constexpr):
    """Stride 2. Hands on the last column."""
    taps, sums = weights
    before = no_tile() if PLACE == "first" else last
    sums = strided_taps((before, tiles[1]), taps[0], taps[3], sums, 0)
    sums = strided_taps((tiles[0], tiles[2]), taps[1], taps[3], sums, 1)
    sums = strided_taps((tiles[1], tiles[3]), taps[2], taps[4], sums, 0)
    return tiles[3], finish_tile(sums, piece, weights, pool, target, D)


@gluon.jit
def convolve_5(columns, tiles, first, PLACE: gl.constexpr, weights, pool, target, D: gl.constexpr):
    """Stride 1. Hands on the sums of four columns, from two before the next piece on."""
    bias = weights[1]
    if PLACE == "first":
        columns = (bias, bias, bias, bias)
    for k in gl.static_range(fixed(D.produced.piece)):
        added = add_tile(tiles[k], weights, columns + (bias,))
        if PLACE != "first" or k >= 2:  # two columns before the image's first one are none
            pool = finish_tile(added[0], first + k - 2, weights, pool, target, D)
        columns = (added[1], added[2], added[3], added[4])
    if PLACE == "last":
        for k in gl.static_range(2):
            pool = finish_tile(columns[k], D.produced.columns - 2 + k, weights, pool, target, D)
    return columns, pool


@gluon.jit
def convolve_5_strided(tiles_of_output, tiles, piece, PLACE: gl.constexpr, weights, pool, target, D: gl.constexpr):
    """Stride 2. Hands on the sums of two tiles of the output, of which the first lacks one column."""
    if PLACE == "first":
        _, before, here = add_piece(tiles, weights, weights[1], weights[1])
    else:
        done, before, here = add_piece(tiles, weights, tiles_of_output[0], tiles_of_output[1])
        pool = finish_tile(done, piece - 1, weights, pool, target, D)
    if PLACE == "last":
        pool = finish_tile(before, piece, weights, pool, target, D)
    return (before, here), pool


@gluon.jit
def convolve_piece(state, tiles, piece, first, PLACE: gl.constexpr, weights, pool, target, D: gl.constexpr):
    """Convolve the tiles of a piece, the "first" one, an "inner" or the "last"; activate, store and pool what is then
    complete of the output.

    `state` is what the piece before has handed on, `target` the window, the workspace, and which sweep this is. Returns
    what the next piece needs, and the pool.
    """
    if D.produced.kernel_size == 3 and D.stride == 1:
        return convolve_3(state, tiles, first, PLACE, weights, pool, target, D)
    elif D.produced.kernel_size == 3:
        return convolve_3_strided(state, tiles, piece, PLACE, weights, pool, target, D)
    elif D.stride == 1:
        return convolve_5(state, tiles, first, PLACE, weights, pool, target, D)
    else:
        return convolve_5_strided(state, tiles, piece, PLACE, weights, pool, target, D)

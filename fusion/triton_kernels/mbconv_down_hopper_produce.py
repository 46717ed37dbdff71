"""First phase of the Hopper kernel of the stride-2 MBConv block: expand, convolve, blur, pool, 128 hidden channels at a
time, as that of stride 1 does (`mbconv_hopper_produce`).

Of a piece of columns all but the last can be convolved, and of these every odd one completes an output column, of which
it is the last of three.

A convolution of stride 2 and no blur needs no column after a piece's last one: each piece gives a tile of the output.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fusion.triton_kernels.hopper_parts import fixed, split_units, zeros
from fusion.triton_kernels.mbconv_down_hopper_registers import (
    activate_column,
    add_even,
    add_odd,
    blur_column,
    convolve_column,
    convolve_strided,
    halves,
    of_halves,
)
from fusion.triton_kernels.mbconv_hopper_produce import (
    expand_layout,
    finish_expand,
    left_operands,
    load_conv,
    load_left,
    load_squeeze,
    squeeze_pool,
    start_expand,
    store_resident,
)
from fusion.triton_kernels.mbconv_hopper_registers import no_tile
from fusion.triton_kernels.mbconv_hopper_spec import (
    HIDDEN,
    TILE,
    UNIT,
    WARPS,
    as_fragments,
    fragment_offsets,
    load_operands,
    tile_layout,
)

GROUP_WARPS = gl.constexpr(WARPS.value // 2)
"""Warps of a warpgroup."""


@gluon.jit
def no_sums():
    return zeros(HIDDEN, TILE, gl.float32, tile_layout())


@gluon.jit
def columns_of(sums, first, dtype: gl.constexpr, D: gl.constexpr):
    """The tiles of a piece, activated, from column `first` on."""
    T: gl.constexpr = D.tiles_of_column
    units = split_units(sums, fixed(TILE.value))
    tiles = ()
    for k in gl.static_range(fixed(D.piece_columns)):
        column = ()
        for i in gl.static_range(T):
            column = column + (gl.convert_layout(units[T * k + i], tile_layout(), assert_trivial=True),)
        tiles = tiles + activate_column(column, first + k, dtype, D)
    return tiles


@gluon.jit
def start_columns(D: gl.constexpr):
    """Sums of columns, for each tile of one, of the first output column."""
    sums = ()
    for _ in gl.static_range(fixed(D.tiles_of_column)):
        sums = sums + (no_sums(),)
    return sums


@gluon.jit
def start_pool(D: gl.constexpr):
    """[warps, 8, 16] where an output column is half of a tile, else [hidden, tile]."""
    if D.tiles_of_column == 1:
        pool, _ = halves(no_sums())
        return pool
    else:
        return no_sums()


@gluon.jit
def whole_pool(pool, D: gl.constexpr):
    """[hidden, tile]"""
    if D.tiles_of_column == 1:
        none, _ = halves(no_sums())
        return of_halves(pool, none)
    else:
        return pool


@gluon.jit
def reflected(column, k: gl.constexpr, D: gl.constexpr):
    """[hidden, tile] of how often an odd column counts: twice if it is column 1, which is that before column 0, too.

    That can be the second column of a piece where a piece has four, and else the first one.
    """
    if k == 2 - D.tiles_of_column:
        return no_sums() + gl.where(column == 1, 2.0, 1.0)
    else:
        return no_sums() + 1.0


@gluon.jit
def warpgroup():
    """0 or 1. A scalar that differs: the warpgroups run the same code on other columns."""
    return gl.inline_asm_elementwise(
        "{ .reg .b32 t; mov.u32 t, %tid.x; shr.u32 t, t, 7; add.s32 $0, t, $1; }",
        "=r,r",
        [gl.to_tensor(0)],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def is_own(column, pieces, group, HALF: gl.constexpr):
    """Whether an output column is the warpgroup's own; in a whole sweep all are."""
    if HALF:
        return (column >= pieces - 1) == (group == 1)
    else:
        return True


@gluon.jit
def convolve_columns(
    window,
    tiles,
    first,
    FIRST: gl.constexpr,
    columns,
    pool,
    weights,
    target,
    place,
    HALF: gl.constexpr,
    D: gl.constexpr,
):
    """Convolve the columns after the first one and before the last: those of a window of two, and what follows.

    The first column convolved is `first`, which is odd as `FIRST` is. `columns` are the sums of an output column that
    those before it have begun. Output columns that are complete are stored, if they are whole tiles. Returns the last
    two columns, the output columns, sums of the one that is not complete, and the pool.
    """
    T: gl.constexpr = D.tiles_of_column
    S: gl.constexpr = D.produced
    sweep, pieces, group = place
    tiles = window + tiles
    COUNT: gl.constexpr = len(tiles) // T - 2
    complete = ()
    for k in gl.static_range(COUNT):
        sums = convolve_column(tiles, k * T, weights, D)
        done, rest = (), ()
        for i in gl.static_range(T):
            if (FIRST + k) % 2 == 1:
                whole, last = add_odd(sums[i], columns[i], reflected(first + k, k, D), S)
                done, rest = done + (whole,), rest + (last,)
            else:
                rest = rest + (add_even(sums[i], columns[i], S),)
        columns = rest
        if (FIRST + k) % 2 == 1:
            own = is_own((first + k) // 2, pieces, group, HALF)
            blurred, pool = blur_column(done, pool, (first + k) // 2, own, weights[0][0], HALF, D)
            if T == 2:
                store(blurred, target, sweep, (first + k) // 2, own, HALF, D)
            complete = complete + (blurred,)
    last = ()
    for i in gl.static_range(2 * T):
        last = last + (tiles[COUNT * T + i],)
    return last, complete, columns, pool


@gluon.jit
def store(y, target, sweep, tile, own, HALF: gl.constexpr, D: gl.constexpr):
    """[hidden, tile] to shared memory or to the workspace, as the projection's left operand."""
    ws, hidden = target
    S: gl.constexpr = D.projected
    if S.resident:
        store_resident((y,), hidden[0], sweep * S.tiles + tile)
    else:
        # As `store_streamed` does, but tiles are in order with a half sweep, too.
        TILES: gl.constexpr = S.tiles // S.passes
        offsets = fragment_offsets(TILES * UNIT, 32, GROUP_WARPS if HALF else WARPS)
        pointer = ws + (tile // TILES * (S.hidden // 16) + sweep * WARPS) * (TILES * UNIT) + tile % TILES * UNIT
        if HALF:
            gl.store(pointer + offsets, as_fragments(y), mask=own)
        else:
            gl.store(pointer + offsets, as_fragments(y))


@gluon.jit
def store_last(tiles, target, sweep, first, D: gl.constexpr):
    """The last two tiles, in shared memory at once."""
    S: gl.constexpr = D.projected
    if S.resident:
        store_resident(tiles, target[1][0], sweep * S.tiles + first)
    else:
        store(tiles[0], target, sweep, first, True, False, D)
        store(tiles[1], target, sweep, first + 1, True, False, D)


@gluon.jit
def produce_sweep(
    sweep, pieces, left, squeezed, xs, weights, target, HALF: gl.constexpr, dtype: gl.constexpr, D: gl.constexpr
):
    """128 hidden channels of the image, blurred, pooled and squeezed. `left` is U; returns U of the next sweep.

    Or 64 for half of the columns by each warpgroup: `pieces` are then those of one. The second one starts a piece
    early, and leaves out the output column that it completes first; the first one that which it completes last.

    The compiler must not know the number of `pieces` (see `mbconv_hopper_produce`).
    """
    S: gl.constexpr = D.produced
    COLUMNS: gl.constexpr = D.piece_columns
    T: gl.constexpr = D.tiles_of_column
    APART: gl.constexpr = GROUP_WARPS if HALF else WARPS
    expand_ptr, taps_ptr, bias_ptr, squeeze_ptr = weights
    conv = load_conv(taps_ptr, bias_ptr, sweep, APART, S)
    operands = left_operands(left, conv[0][0], expand_layout(S), S)
    group = warpgroup() if HALF else 0
    start = group * (pieces - 2)
    place = sweep, pieces, group
    outside = ()
    for _ in gl.static_range(T):
        outside = outside + (no_tile(),)
    pool, columns = start_pool(D), start_columns(D)
    sums = start_expand(operands, xs, start, S)
    tiles = columns_of(finish_expand(sums), start * COLUMNS, dtype, D)
    sums = start_expand(operands, xs, start + 1, S)
    window, first, columns, pool = convolve_columns(
        outside, tiles, start * COLUMNS, 0, columns, pool, conv, target, place, HALF, D
    )
    sums = finish_expand(sums)
    for piece in range(1, pieces - 1):
        column = (start + piece) * COLUMNS
        tiles = columns_of(sums, column, dtype, D)
        sums = start_expand(operands, xs, start + piece + 1, S)
        window, complete, columns, pool = convolve_columns(
            window, tiles, column - 1, 1, columns, pool, conv, target, place, HALF, D
        )
        if T == 1:
            store(of_halves(complete[0], complete[1]), target, sweep, piece - 1, True, False, D)
        sums = finish_expand(sums)
    left = load_left(expand_ptr, sweep + 1, sweep + 1 < D.projected.whole_sweeps, dtype, S)
    squeeze = load_squeeze(squeeze_ptr, sweep, APART, dtype, S)
    column = (start + pieces - 1) * COLUMNS
    tiles = columns_of(sums, column, dtype, D) + outside
    _, complete, _, pool = convolve_columns(window, tiles, column - 1, 1, columns, pool, conv, target, place, HALF, D)
    if T == 1:
        # Tile t has columns 2 t + 1 and 2 t + 2, the last one the last column and the first.
        last = of_halves(complete[0], complete[1]), of_halves(complete[2], first[0])
        store_last(last, target, sweep, pieces - 2, D)
    return left, squeeze_pool(whole_pool(pool, D), squeeze, squeezed, conv[0][0], fixed(D.projected))


@gluon.jit
def convolve_piece(window, tiles, tile, pool, weights, target, place, HALF: gl.constexpr, D: gl.constexpr):
    """Convolve a piece of columns with stride 2, after those of a window of one, to a tile of the output, which is
    stored. Returns the last column, and the pool."""
    T: gl.constexpr = D.tiles_of_column
    sweep, pieces, group = place
    own = is_own(tile, pieces, group, HALF)
    y, pool = convolve_strided(window + tiles, tile, own, pool, weights, HALF, D)
    store(y, target, sweep, tile, own, HALF, D)
    last = ()
    for i in gl.static_range(T):
        last = last + (tiles[len(tiles) - T + i],)
    return last, pool


@gluon.jit
def produce_strided_sweep(
    sweep, pieces, left, squeezed, xs, weights, target, HALF: gl.constexpr, dtype: gl.constexpr, D: gl.constexpr
):
    """As `produce_sweep`, for a convolution of stride 2 without a blur.

    Each piece completes its tile, so what the second warpgroup leaves out is the first tile, which lacks a column, and
    the first one leaves out its last.
    """
    S: gl.constexpr = D.produced
    COLUMNS: gl.constexpr = D.piece_columns
    APART: gl.constexpr = GROUP_WARPS if HALF else WARPS
    expand_ptr, taps_ptr, bias_ptr, squeeze_ptr = weights
    conv = load_conv(taps_ptr, bias_ptr, sweep, APART, S)
    operands = left_operands(left, conv[0][0], expand_layout(S), S)
    group = warpgroup() if HALF else 0
    start = group * (pieces - 2)
    place = sweep, pieces, group
    window = ()
    for _ in gl.static_range(fixed(D.tiles_of_column)):
        window = window + (no_tile(),)
    pool = no_sums()
    sums = finish_expand(start_expand(operands, xs, start, S))
    for piece in range(0, pieces - 1):
        tile = start + piece
        tiles = columns_of(sums, tile * COLUMNS, dtype, D)
        sums = start_expand(operands, xs, tile + 1, S)
        window, pool = convolve_piece(window, tiles, tile, pool, conv, target, place, HALF, D)
        sums = finish_expand(sums)
    left = load_left(expand_ptr, sweep + 1, sweep + 1 < D.projected.whole_sweeps, dtype, S)
    squeeze = load_squeeze(squeeze_ptr, sweep, APART, dtype, S)
    tile = start + pieces - 1
    tiles = columns_of(sums, tile * COLUMNS, dtype, D)
    _, pool = convolve_piece(window, tiles, tile, pool, conv, target, place, HALF, D)
    return left, squeeze_pool(pool, squeeze, squeezed, conv[0][0], fixed(D.projected))


@gluon.jit
def sweep_of_block(
    sweep, pieces, left, squeezed, xs, weights, target, HALF: gl.constexpr, dtype: gl.constexpr, D: gl.constexpr
):
    """`produce_sweep`, or that without a blur."""
    if D.blur:
        return produce_sweep(sweep, pieces, left, squeezed, xs, weights, target, HALF, dtype, D)
    else:
        return produce_strided_sweep(sweep, pieces, left, squeezed, xs, weights, target, HALF, dtype, D)


@gluon.jit
def produce(pieces, left, xs, weights, target, dtype: gl.constexpr, D: gl.constexpr):
    """Hidden channels of the output, and each warp's shares of the squeeze vector, as `mbconv_hopper_produce` has them.

    `left` is U of the first sweep. `weights` point to expansion, taps, bias of the convolution, and squeeze. `target`
    is the workspace and the hidden channels in shared memory; one of them is in use.
    """
    S: gl.constexpr = D.projected
    squeezed = ()
    for _ in gl.static_range(fixed(S.squeeze_parts)):
        squeezed = squeezed + (no_sums(),)
    for sweep in range(0, S.whole_sweeps):
        left, squeezed = sweep_of_block(sweep, pieces, left, squeezed, xs, weights, target, False, dtype, D)
    if S.split:
        pointer = weights[0] + S.whole_sweeps * (S.depths * UNIT * WARPS // 2)
        half = load_operands(pointer, True, fixed(S.depths), GROUP_WARPS, dtype)
        _, squeezed = sweep_of_block(
            S.whole_sweeps, pieces // 2 + 1, half, squeezed, xs, weights, target, True, dtype, D
        )
    return squeezed

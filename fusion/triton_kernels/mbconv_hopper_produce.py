"""First phase of the Hopper kernel of the MBConv block: expand, convolve, pool, 128 hidden channels at a time.

The expansion's products have hidden channels as rows and pixels as columns, 16 hidden channels for each warp. So a warp
has all pixels of its hidden channels, and convolves them without the others (`mbconv_hopper_registers`).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from fusion.triton_kernels.hopper_layouts import plain_layout, rows_layout
from fusion.triton_kernels.hopper_parts import fixed, join_columns, slab_start, split_units, zeros
from fusion.triton_kernels.mbconv_hopper_registers import (
    activate,
    add_products,
    beside,
    convolve,
    means,
    no_tile,
    pixel_mask,
    registers,
)
from fusion.triton_kernels.mbconv_hopper_spec import (
    BIAS,
    HIDDEN,
    TILE,
    UNIT,
    WARPS,
    as_fragments,
    as_tile,
    fragment_offsets,
    load_operands,
    place,
    swapped,
    tile_layout,
)


@gluon.constexpr_function
def expand_layout(S):
    """[hidden, pixels of a piece], sums of the expansion."""
    return gl.NVMMADistributedLayout([3, 0], [WARPS.value, 1], [16, TILE.value * S.piece, 16])


@gluon.jit
def load_left(expand_ptr, sweep, used, dtype: gl.constexpr, S: gl.constexpr):
    """U of a sweep of all blocks."""
    pointer = expand_ptr + sweep * (S.depths * UNIT * WARPS // 2)
    return load_operands(pointer, used, fixed(S.depths), WARPS, dtype)


@gluon.constexpr_function
def unpack_text():
    return "".join(f"mov.b32 ${i}, ${8 + i}; " for i in range(8))


@gluon.jit
def unpack(pair, like):
    """The operands of two depths, in the dtype of `like`."""
    return gl.inline_asm_elementwise(
        unpack_text(), registers("8r", "8r"), [pair], dtype=(like.dtype, like.dtype), is_pure=True, pack=8
    )


@gluon.jit
def joined(depths, FIRST: gl.constexpr, COUNT: gl.constexpr):
    """[hidden, 16 COUNT]"""
    if COUNT == 1:
        return depths[FIRST]
    else:
        return join_columns(joined(depths, FIRST, COUNT // 2), joined(depths, FIRST + COUNT // 2, COUNT // 2))


@gluon.jit
def left_operands(left, like, SUMS: gl.constexpr, S: gl.constexpr):
    """[hidden, slab] of each slab of the input, and [hidden, 16] of the bias, of products with sums of this layout."""
    LAYOUT: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    depths = ()
    for i in gl.static_range(S.depths // 2):
        first, second = unpack(left[i], like)
        depths = depths + (first, second)
    if S.depths % 2 == 1:
        depths = depths + (left[S.depths // 2],)
    operands = ()
    for s in gl.static_range(len(S.in_slabs)):
        operand = joined(depths, slab_start(S.in_slabs, s) // 16, S.in_slabs[s] // 16)
        operands = operands + (gl.convert_layout(operand, LAYOUT, assert_trivial=True),)
    return operands + (gl.convert_layout(depths[S.depths - 1], LAYOUT, assert_trivial=True),)


@gluon.jit
def start_products(operands, xs, first, ROWS: gl.constexpr, PIXELS: gl.constexpr, SUMS: gl.constexpr, S: gl.constexpr):
    """[hidden, pixels] from the piece that lies at `first` on; the last of `xs` is the constant one, once."""
    SLABS: gl.constexpr = len(S.in_slabs)
    sums = zeros(ROWS, PIXELS, gl.float32, SUMS)
    for s in gl.static_range(SLABS):
        x = xs[s].index(first)._reinterpret(xs[s].dtype, [PIXELS, S.in_slabs[s]], rows_layout(S.in_slabs[s]))
        sums = warpgroup_mma(operands[s], x.permute((1, 0)), sums, use_acc=s > 0, is_async=True)
    ones = xs[SLABS]._reinterpret(xs[SLABS].dtype, [PIXELS, BIAS], rows_layout(BIAS))
    return warpgroup_mma(operands[SLABS], ones.permute((1, 0)), sums, is_async=True)


@gluon.jit
def start_expand(operands, xs, piece, S: gl.constexpr):
    """[hidden, pixels of a piece]"""
    return start_products(operands, xs, swapped(piece, S), HIDDEN, fixed(S.piece_pixels), expand_layout(S), S)


@gluon.jit
def finish_expand(sums):
    return warpgroup_mma_wait(0, deps=[sums])


@gluon.jit
def tiles_of(sums, first, dtype: gl.constexpr, S: gl.constexpr):
    """The tiles of a piece, activated, from column `first` on, which may differ from row to row."""
    sums = split_units(sums, fixed(TILE.value))
    tiles = ()
    for k in gl.static_range(fixed(S.piece)):
        mask = pixel_mask(first + k, S)
        tiles = tiles + (activate(gl.convert_layout(sums[k], tile_layout(), assert_trivial=True), mask, dtype, S),)
    return tiles


@gluon.jit
def store_streamed(y, ws, sweep, column, S: gl.constexpr):
    """[hidden, tile] to the workspace, as the projection's left operand: [passes, hidden / 16, tiles, 256]."""
    TILES: gl.constexpr = S.tiles // S.passes
    at = place(column, S)
    pointer = ws + (at // TILES * (S.hidden // 16) + sweep * WARPS) * (TILES * UNIT) + at % TILES * UNIT
    gl.store(pointer + fragment_offsets(TILES * UNIT, 32, WARPS), as_fragments(y))


@gluon.jit
def stacked(ys, FIRST: gl.constexpr, COUNT: gl.constexpr):
    """[hidden, tile] of each -> [count, warps, 256]"""
    if COUNT == 1:
        return as_fragments(ys[FIRST]).reshape((1, WARPS, UNIT))
    else:
        both = gl.join(stacked(ys, FIRST, COUNT // 2), stacked(ys, FIRST + COUNT // 2, COUNT // 2))
        return both.permute((3, 0, 1, 2)).reshape((COUNT, WARPS, UNIT))


@gluon.jit
def store_resident(ys, hidden, first):
    """[hidden, tile] of each to shared memory from tile `first` of all sweeps on, as the projection's left operand."""
    COUNT: gl.constexpr = len(ys)
    LAYOUT: gl.constexpr = gl.BlockedLayout([COUNT, 1, 8], [1, 1, 32], [1, WARPS, 1], [2, 1, 0])
    target = hidden.index(first)._reinterpret(hidden.dtype, [COUNT, WARPS, UNIT], plain_layout(3))
    target.store(gl.convert_layout(stacked(ys, 0, COUNT), LAYOUT, assert_trivial=True))


@gluon.jit
def convolve_at_once(tiles, weights, pool, target, sweep, S: gl.constexpr):
    """All tiles of a sweep; returns the pool."""
    ws, hidden, first = target
    left = beside(tiles[S.columns - 1], "up", S)
    tiles = tiles + (beside(tiles[0], "down", S),)
    ys = ()
    for k in gl.static_range(fixed(S.columns)):
        y, pool = convolve(left, tiles[k], tiles[k + 1], weights, pool, pixel_mask(k, S), S)
        left = tiles[k]
        ys = ys + (y,)
    if S.resident:
        store_resident(ys, hidden, first)
    else:
        for k in gl.static_range(fixed(S.columns)):
            store_streamed(ys[k], ws, sweep, k, S)
    return pool


@gluon.jit
def convolve_piece(window, tiles, first, weights, pool, target, sweep, S: gl.constexpr):
    """Convolve tiles from column `first` on, but for the last one: those of a window of two, and what follows.

    Returns the last two tiles, and the pool.
    """
    ws, hidden, first_tile = target
    tiles = window + tiles
    COUNT: gl.constexpr = len(tiles) - 2
    for k in gl.static_range(COUNT):
        y, pool = convolve(tiles[k], tiles[k + 1], tiles[k + 2], weights, pool, pixel_mask(first + k, S), S)
        if S.resident:
            store_resident((y,), hidden, first_tile + first + k)
        else:
            store_streamed(y, ws, sweep, first + k, S)
    return (tiles[COUNT], tiles[COUNT + 1]), pool


@gluon.jit
def load_conv(taps_ptr, bias_ptr, sweep, WARPS_APART: gl.constexpr, S: gl.constexpr):
    """Taps and bias of the convolution of a sweep of all blocks."""
    taps = ()
    for i in gl.static_range(fixed(S.taps)):
        pointer = taps_ptr + sweep * S.taps_elements + i * (UNIT * WARPS)
        taps = taps + (as_tile(gl.load(pointer + fragment_offsets(UNIT, 32, WARPS_APART))),)
    return taps, as_tile(gl.load(bias_ptr + sweep * (2 * HIDDEN) + fragment_offsets(32, 4, WARPS_APART)))


@gluon.constexpr_function
def halves_of(dtype):
    """Of 32 bits that hold two operands, and of 16 that hold one."""
    return (0, 1) if dtype == gl.int32 else (0,)


@gluon.jit
def load_squeeze(squeeze_ptr, sweep, WARPS_APART: gl.constexpr, dtype: gl.constexpr, S: gl.constexpr):
    """W1 of a sweep of all blocks."""
    pointer = squeeze_ptr + sweep * (S.squeeze_depths * UNIT * WARPS // 2)
    return load_operands(pointer, True, fixed(S.squeeze_depths), WARPS_APART, dtype)


@gluon.jit
def squeeze_pool(pool, squeeze, squeezed, like, S: gl.constexpr):
    """Add a sweep's pool to each warp's shares of the squeeze vector."""
    right = means(pool, like, S)
    added = ()
    for i in gl.static_range(len(squeeze)):
        added = added + (add_products(squeeze[i], right, squeezed[i], halves_of(squeeze[i].dtype)),)
    return added


@gluon.jit
def produce_sweep(
    block, blocks, pieces, sweep, left, squeezed, xs, weights, target, dtype: gl.constexpr, S: gl.constexpr
):
    """128 hidden channels of the image, pooled and squeezed. `left` is U; returns U of the next sweep.

    The compiler must not know the number of `pieces`: what it makes of a loop of three, unrolled, is wrong.
    """
    expand_ptr, taps_ptr, bias_ptr, squeeze_ptr = weights
    of_all = block * S.sweeps + sweep
    conv = load_conv(taps_ptr, bias_ptr, of_all, WARPS, S)
    operands = left_operands(left, conv[0][0], expand_layout(S), S)
    pool = zeros(HIDDEN, TILE, gl.float32, tile_layout())
    sums = start_expand(operands, xs, 0, S)
    if S.at_once:
        used = of_all + 1 < blocks * S.sweeps
        # U is an operand until the products are done. The next one may come meanwhile if it has other registers.
        if S.together > 1:
            left = load_left(expand_ptr, of_all + 1, used, dtype, S)
            squeeze = load_squeeze(squeeze_ptr, of_all, WARPS, dtype, S)
            tiles = tiles_of(finish_expand(sums), 0, dtype, S)
        else:
            tiles = tiles_of(finish_expand(sums), 0, dtype, S)
            left = load_left(expand_ptr, of_all + 1, used, dtype, S)
            squeeze = load_squeeze(squeeze_ptr, of_all, WARPS, dtype, S)
        pool = convolve_at_once(tiles, conv, pool, target, sweep, S)
    else:
        tiles = tiles_of(finish_expand(sums), 0, dtype, S)
        sums = start_expand(operands, xs, 1, S)
        window, pool = convolve_piece((no_tile(),), tiles, 0, conv, pool, target, sweep, S)
        sums = finish_expand(sums)
        for piece in range(1, pieces - 1):
            tiles = tiles_of(sums, piece * S.piece, dtype, S)
            sums = start_expand(operands, xs, piece + 1, S)
            window, pool = convolve_piece(window, tiles, piece * S.piece - 1, conv, pool, target, sweep, S)
            sums = finish_expand(sums)
        left = load_left(expand_ptr, of_all + 1, sweep + 1 < S.whole_sweeps, dtype, S)
        squeeze = load_squeeze(squeeze_ptr, of_all, WARPS, dtype, S)
        tiles = tiles_of(sums, S.columns - S.piece, dtype, S) + (no_tile(),)
        _, pool = convolve_piece(window, tiles, S.columns - S.piece - 1, conv, pool, target, sweep, S)
    return left, squeeze_pool(pool, squeeze, squeezed, conv[0][0], S)


@gluon.jit
def produce(block, blocks, pieces, left, xs, weights, target, dtype: gl.constexpr, S: gl.constexpr):
    """Hidden channels of the image, and each warp's shares of the squeeze vector; whole sweeps only.

    `left` is U of the block's first sweep; returns that of the next block, and the shares. These are [hidden, tile] for
    32 squeeze channels: 8 rows of a warp's 16 and one half of the columns for 8 channels, whose 8 columns are to be
    added. `weights` point to those of all blocks: expansion, taps, bias of the convolution, squeeze. `target` is the
    workspace and the hidden channels in shared memory; one of them is in use.
    """
    squeezed = ()
    for _ in gl.static_range(fixed(S.squeeze_parts)):
        squeezed = squeezed + (zeros(HIDDEN, TILE, gl.float32, tile_layout()),)
    ws, hidden = target
    for turn in range(0, S.whole_sweeps // S.together):
        for i in gl.static_range(fixed(S.together)):
            sweep = turn * S.together + i
            left, squeezed = produce_sweep(
                block, blocks, pieces, sweep, left, squeezed, xs, weights, (ws, hidden[i], turn * S.tiles), dtype, S
            )
    return left, squeezed

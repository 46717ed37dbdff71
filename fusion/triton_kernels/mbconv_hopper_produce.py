"""First phase of the Hopper kernel of the MBConv block: expand, convolve, pool, 128 hidden channels at a time.

The expansion's products have hidden channels as rows and pixels as columns, 16 hidden channels for each warp. So a warp
has all pixels of its hidden channels, and convolves them without the others (`mbconv_hopper_registers`).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from fusion.triton_kernels.hopper_layouts import powers
from fusion.triton_kernels.hopper_parts import fixed, join_columns, slab_start, split_units, zeros
from fusion.triton_kernels.mbconv_hopper_registers import (
    activate,
    beside,
    convolve,
    no_tile,
    pixel_mask,
    registers,
)
from fusion.triton_kernels.mbconv_hopper_spec import (
    HIDDEN,
    TILE,
    UNIT,
    WARPS,
    as_fragments,
    as_tile,
    fragment_offsets,
    tile_layout,
)


@gluon.constexpr_function
def expand_layout(S):
    """[hidden, pixels of a piece], sums of the expansion."""
    return gl.NVMMADistributedLayout([3, 0], [WARPS.value, 1], [16, TILE.value * S.piece, 16])


@gluon.constexpr_function
def squeeze_layout(S):
    """[hidden, squeeze]: a thread has channels 2 t and 2 t + 1 of both groups, as of the pool."""
    own = [[1, 0], [8, 0], *([0, column] for column in powers(1, S.squeeze // 8))]
    lanes = [[2, 0], [4, 0], *([0, column] for column in powers(S.squeeze // 8, S.squeeze))]
    warps = [[16 * warp, 0] for warp in powers(1, WARPS.value)]
    return gl.DistributedLinearLayout(own, lanes, warps, [], [HIDDEN.value, S.squeeze])


@gluon.jit
def load_left(expand_ptr, sweep, dtype: gl.constexpr, S: gl.constexpr):
    """U of a sweep, if there is one: of each two depths [hidden, tile] int32, and of an odd last one 16 bits."""
    used = sweep < S.sweeps
    pointer = expand_ptr + sweep * (S.expand_elements // 2)
    left = ()
    for i in gl.static_range(S.depths // 2):
        left = left + (as_tile(gl.load(pointer + i * (UNIT * WARPS) + fragment_offsets(UNIT, 32), mask=used, other=0)),)
    if S.depths % 2 == 1:
        single = (pointer + S.depths // 2 * (UNIT * WARPS)).to(gl.pointer_type(dtype), bitcast=True)
        left = left + (as_tile(gl.load(single + fragment_offsets(UNIT, 32), mask=used, other=0.0)),)
    return left


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
def left_operands(left, like, S: gl.constexpr):
    """[hidden, slab] of each slab of the input, and [hidden, 16] of the bias."""
    LAYOUT: gl.constexpr = gl.DotOperandLayout(0, expand_layout(S), 2)
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
def start_expand(operands, xs, piece, S: gl.constexpr):
    """[hidden, pixels of a piece]"""
    sums = zeros(HIDDEN, TILE * S.piece, gl.float32, expand_layout(S))
    for s in gl.static_range(len(S.in_slabs) + 1):
        sums = warpgroup_mma(operands[s], xs[s].index(piece).permute((1, 0)), sums, use_acc=s > 0, is_async=True)
    return sums


@gluon.jit
def finish_expand(sums):
    return warpgroup_mma_wait(0, deps=[sums])


@gluon.jit
def tile_sums(sums, K: gl.constexpr):
    """Of tile `K` of a piece."""
    return gl.convert_layout(split_units(sums, fixed(TILE.value))[K], tile_layout(), assert_trivial=True)


@gluon.jit
def store_hidden(y, target, sweep, column, S: gl.constexpr):
    """[hidden, tile] as the projection's left operand, to shared memory or to the workspace."""
    ws, hidden = target
    y = as_fragments(y)
    if S.resident:
        LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [WARPS, 1], [1, 0])
        y = gl.convert_layout(y.reshape((WARPS, UNIT)), LAYOUT, assert_trivial=True)
        hidden.index(sweep * S.tiles + column).store(y)
    else:
        pointer = ws + sweep * (WARPS * S.tiles * UNIT) + column * UNIT
        gl.store(pointer + fragment_offsets(S.tiles * UNIT, 32), y)


@gluon.jit
def advance(window, right, column, ones, taps, bias, pool, target, sweep, S: gl.constexpr):
    """Convolve the tile in the middle of a window whose last one is `right`, and move the window."""
    y, pool = convolve(window[0], window[1], right, taps, bias, pool, pixel_mask(column, ones, S), S)
    store_hidden(y, target, sweep, column, S)
    return (window[1], right), pool


@gluon.jit
def sweep_at_once(sums, ones, taps, bias, pool, target, sweep, dtype: gl.constexpr, S: gl.constexpr):
    """All tiles of a sweep, [hidden, pixels] of which are `sums`."""
    tiles = ()
    for k in gl.static_range(fixed(S.columns)):
        tiles = tiles + (activate(tile_sums(sums, k), ones, pixel_mask(k, ones, S), dtype, S),)
    window = (beside(tiles[S.columns - 1], "up", S), tiles[0])
    tiles = tiles + (beside(tiles[0], "down", S),)
    for k in gl.static_range(fixed(S.columns)):
        window, pool = advance(window, tiles[k + 1], k, ones, taps, bias, pool, target, sweep, S)
    return pool


@gluon.jit
def produce_sweep(sweep, left, sums, squeezed, ones, xs, weights, target, dtype: gl.constexpr, S: gl.constexpr):
    """128 hidden channels of the image, pooled and squeezed. `sums` are those of the first piece, `left` is U.

    Returns the same of the next sweep, whose products run while this one's pool is summed.
    """
    expand_ptr, taps_ptr, bias_ptr, squeeze_ptr = weights
    taps = ()
    for i in gl.static_range(fixed(S.taps)):
        pointer = taps_ptr + sweep * S.taps_elements + i * (UNIT * WARPS)
        taps = taps + (as_tile(gl.load(pointer + fragment_offsets(UNIT, 32))),)
    bias = as_tile(gl.load(bias_ptr + sweep * (2 * HIDDEN) + fragment_offsets(32, 4)))
    LAYOUT: gl.constexpr = squeeze_layout(S)
    row = sweep * HIDDEN + gl.arange(0, HIDDEN, gl.SliceLayout(1, LAYOUT))
    squeeze = squeeze_ptr + row[:, None] * S.squeeze + gl.arange(0, S.squeeze, gl.SliceLayout(0, LAYOUT))[None, :]
    pool = zeros(HIDDEN, TILE, gl.float32, tile_layout())
    if S.at_once:
        left = load_left(expand_ptr, sweep + 1, dtype, S)
        squeeze_weights = gl.load(squeeze)
        pool = sweep_at_once(sums, ones, taps, bias, pool, target, sweep, dtype, S)
    else:
        PIECES: gl.constexpr = S.columns // S.piece
        operands = left_operands(left, taps[0], S)
        window = (no_tile(), no_tile())
        for piece in range(0, PIECES - 1):
            for k in gl.static_range(fixed(S.piece)):
                column = piece * S.piece + k
                right = activate(tile_sums(sums, k), ones, pixel_mask(column, ones, S), dtype, S)
                if k == 0:
                    # With two pieces there is one here, and a condition that is constant would crash the compiler.
                    if PIECES > 2:  # noqa: SIM102
                        if piece > 0:
                            _, pool = advance(window, right, column - 1, ones, taps, bias, pool, target, sweep, S)
                    window = (window[1], right)
                else:
                    window, pool = advance(window, right, column - 1, ones, taps, bias, pool, target, sweep, S)
            sums = finish_expand(start_expand(operands, xs, piece + 1, S))
        left = load_left(expand_ptr, sweep + 1, dtype, S)
        squeeze_weights = gl.load(squeeze)
        for k in gl.static_range(fixed(S.piece)):
            column = S.columns - S.piece + k
            right = activate(tile_sums(sums, k), ones, pixel_mask(column, ones, S), dtype, S)
            window, pool = advance(window, right, column - 1, ones, taps, bias, pool, target, sweep, S)
        window, pool = advance(window, no_tile(), S.columns - 1, ones, taps, bias, pool, target, sweep, S)
    sums = start_expand(left_operands(left, taps[0], S), xs, 0, S)
    # Rows of pixels, lanes, groups, pairs of channels.
    mean = gl.sum(gl.sum(pool.reshape((WARPS, 2, 8, 2, 4, 2)), axis=2), axis=1) * (1.0 / (S.height * S.width))
    mean = gl.convert_layout(mean.reshape((HIDDEN,)), gl.SliceLayout(1, LAYOUT), assert_trivial=True)
    squeezed += shares(squeeze_weights.to(gl.float32) * mean[:, None], S)
    return left, finish_expand(sums), squeezed


@gluon.jit
def shares(products, S: gl.constexpr):
    """[hidden, squeeze] -> [warps, 4, squeeze]: what each thread can add alone."""
    products = products.reshape((WARPS, 2, 4, 2, S.squeeze))
    return gl.sum(gl.sum(products, axis=3), axis=1)


@gluon.jit
def no_shares(S: gl.constexpr):
    return shares(zeros(HIDDEN, S.squeeze, gl.float32, squeeze_layout(S)), S)


@gluon.jit
def produce(ones, xs, weights, target, dtype: gl.constexpr, S: gl.constexpr):
    """Hidden channels of the image, and the squeeze vector's shares [warps, 4, squeeze].

    `weights` point to those of the block: expansion, taps, bias of the convolution, squeeze. `target` is the workspace
    and the hidden channels in shared memory; one of them is in use.
    """
    like = zeros(HIDDEN, TILE, dtype, tile_layout())
    left = load_left(weights[0], 0, dtype, S)
    sums = finish_expand(start_expand(left_operands(left, like, S), xs, 0, S))
    squeezed = no_shares(S)
    for sweep in range(0, S.sweeps):
        left, sums, squeezed = produce_sweep(sweep, left, sums, squeezed, ones, xs, weights, target, dtype, S)
    return squeezed

"""First phase of the Hopper kernel of the MBConv block for larger images: expand, convolve, pool a window of an image,
128 hidden channels at a time, as that of small images does (`mbconv_hopper_produce`).

A window is where it lies, the image's pair of rows in its first lane, and the pairs that it stores and pools, its own.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fusion.triton_kernels.hopper_parts import fixed, zeros
from fusion.triton_kernels.mbconv_hopper_produce import (
    expand_layout,
    finish_expand,
    left_operands,
    load_conv,
    load_left,
    load_squeeze,
    squeeze_pool,
    start_expand,
)
from fusion.triton_kernels.mbconv_hopper_spec import HIDDEN, TILE, WARPS, tile_layout
from fusion.triton_kernels.mbconv_windows_hopper_convolve import LANES, activated, convolve_piece


@gluon.jit
def own_pool(pool, window):
    """The pool of a window's own pairs of rows: lanes have pools of their own."""
    top, first, end = window
    pair = top + gl.arange(0, HIDDEN, gl.SliceLayout(1, tile_layout())) % LANES
    return gl.where(((pair >= first) & (pair < end))[:, None], pool, 0.0)


@gluon.jit
def produce_sweep(window, sweep, pieces, left, squeezed, xs, weights, ws, dtype: gl.constexpr, D: gl.constexpr):
    """128 hidden channels of a window, pooled and squeezed. `left` is U; returns U of the next sweep.

    The next piece is expanded while one is convolved. The compiler must not know the number of `pieces` (see
    `mbconv_hopper_produce`).
    """
    S: gl.constexpr = D.produced
    expand_ptr, taps_ptr, bias_ptr, squeeze_ptr = weights
    conv = load_conv(taps_ptr, bias_ptr, sweep, WARPS, S)
    like = conv[0][0]
    operands = left_operands(left, like, expand_layout(S), S)
    pool = zeros(HIDDEN, TILE, gl.float32, tile_layout())
    target = window, ws, sweep
    tiles = activated(finish_expand(start_expand(operands, xs, 0, S)), window, 0, like, D)
    sums = start_expand(operands, xs, 1, S)
    state, pool = convolve_piece((), tiles, 0, 0, "first", conv, pool, target, D)
    sums = finish_expand(sums)
    for piece in range(1, pieces - 1):
        first = piece * S.piece
        tiles = activated(sums, window, first, like, D)
        sums = start_expand(operands, xs, piece + 1, S)
        state, pool = convolve_piece(state, tiles, piece, first, "inner", conv, pool, target, D)
        sums = finish_expand(sums)
    # The next window begins with the first sweep again.
    left = load_left(expand_ptr, (sweep + 1) % S.sweeps, True, dtype, S)
    squeeze = load_squeeze(squeeze_ptr, sweep, WARPS, dtype, S)
    # A constant, so that the compiler knows which columns are beyond the image.
    LAST: gl.constexpr = S.columns - S.piece
    tiles = activated(sums, window, LAST, like, D)
    _, pool = convolve_piece(state, tiles, pieces - 1, LAST, "last", conv, pool, target, D)
    return left, squeeze_pool(own_pool(pool, window), squeeze, squeezed, like, fixed(D.projected))


@gluon.jit
def produce(window, pieces, left, squeezed, xs, weights, ws, dtype: gl.constexpr, D: gl.constexpr):
    """Hidden channels of a window to the workspace, and what it adds to each warp's shares of the squeeze vector.

    `left` is U of the first sweep, and is returned again. `weights` point to expansion, taps, bias of the convolution,
    and squeeze.
    """
    for sweep in range(0, D.produced.sweeps):
        left, squeezed = produce_sweep(window, sweep, pieces, left, squeezed, xs, weights, ws, dtype, D)
    return left, squeezed

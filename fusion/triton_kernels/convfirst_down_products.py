"""Products of the convolution of stride-2 ConvFirst blocks on Hopper, into which the blur down the rows is folded."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma

from fusion.planner.convfirst_down_hopper_tile import COLUMN_TAPS, INPUT_ROWS
from fusion.triton_kernels.hopper_layouts import rows_layout, sum_layout
from fusion.triton_kernels.hopper_parts import moved, split_columns

COLUMN = gl.constexpr(COLUMN_TAPS)
"""Matrices of a column of taps of a piece: v4, v2, v0, v3, v1 and t4, v2, t2, v0, t3, v1, where v0 to v4 are the taps
of the five rows, and t2 to t4 those at the top edge. Neighbours serve two output rows at once."""
ROWS = gl.constexpr(INPUT_ROWS)
"""Input rows of two output rows."""
COLUMN_PRODUCTS = gl.constexpr(42)
"""Products of a piece of the convolution: two columns, seven rows and three columns of taps."""


@gluon.jit
def matrix(w, index, ROWS: gl.constexpr):
    """Weights of a tap to `ROWS` output rows, [16, 16 ROWS], from matrix `index` on."""
    return w.index(index)._reinterpret(w.dtype, [16 * ROWS, 16], rows_layout(16)).permute((1, 0))


@gluon.jit
def edge_taps(w, first, second):
    """`w` from where the taps of each of some rows are found at the same places, wherever the top edge is.

    `first`, `second`: 1 if that output row is the first of an image, else 0. Four for input rows 2 i and 2 i + 1,
    2 i + 2, 2 i + 3, 2 i + 4 of the convolution, two for rows 2 i + 1 and 2 i + 3 of the input's blur.
    """
    convolution = (moved(w, 6 * first), moved(w, 5 * first + 6 * second), moved(w, 6 * second), moved(w, 5 * second))
    return convolution + (moved(w, 2 * first), moved(w, 2 * second))


@gluon.jit
def add_row(x, w, edges, y, y0, y1, ROW: gl.constexpr, TAP: gl.constexpr, PIECE_INDEX: gl.constexpr):
    """Start to add input row 2 i - 2 + `ROW`, shifted as tap `TAP` of 3 wants it, to output rows i and i + 1."""
    centre, below, last, beyond = edges
    base: gl.constexpr = (3 * PIECE_INDEX + TAP) * COLUMN
    if ROW == 0:
        y0 = warpgroup_mma(x, matrix(w, base + 2, 1), y0, use_acc=TAP > 0, is_async=True)
    elif ROW == 1:
        y0 = warpgroup_mma(x, matrix(w, base + 4, 1), y0, is_async=True)
    elif ROW == 2:
        y = warpgroup_mma(x, matrix(centre, base + 1, 2), y, use_acc=TAP > 0, is_async=True)
    elif ROW == 3:
        y = warpgroup_mma(x, matrix(centre, base + 3, 2), y, is_async=True)
    elif ROW == 4:
        y = warpgroup_mma(x, matrix(below, base, 2), y, is_async=True)
    elif ROW == 5:
        y1 = warpgroup_mma(x, matrix(last, base + 3, 1), y1, use_acc=TAP > 0, is_async=True)
    else:
        y1 = warpgroup_mma(x, matrix(beyond, base, 1), y1, is_async=True)
    return y, y0, y1


@gluon.jit
def joined(y, y0, y1):
    """Two output rows [block, 16] from what they have in common [block, 32] and the rest of each."""
    common0, common1 = split_columns(y)
    y0 += gl.convert_layout(common0, sum_layout(16), assert_trivial=True)
    y1 += gl.convert_layout(common1, sum_layout(16), assert_trivial=True)
    return y0, y1

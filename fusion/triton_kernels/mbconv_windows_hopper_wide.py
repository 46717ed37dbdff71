"""A 5x5 convolution of hidden channels in the registers of a warp, as `mbconv_hopper_registers` has it for 3x3.

Of each lane's two rows a tile has four neighbours: *near* ones, the row above and that below, beside the two rows
themselves, and *far* ones. A tile gives a part of the sums of five columns and is not needed afterwards, so what a loop
carries are sums of four columns, which take fewer registers than their tiles.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fusion.triton_kernels.hopper_parts import fixed
from fusion.triton_kernels.mbconv_hopper_registers import (
    activation_text,
    outer_taps,
    product_text,
    registers,
    same_taps,
    type_name,
)

SIZE = gl.constexpr(5)


@gluon.constexpr_function
def activate_wide_text(S, dtype):
    """Outputs: for both groups rows 2 q - 1, 2 q, 2 q + 1, 2 q + 2; for both rows 2 q - 2 and 2 q + 3.

    Inputs: sums, a mask.
    """
    text = "{ .reg .f32 u, v, s, t; .reg .b32 r, r<4>; .reg .pred p; "
    for i in range(4):
        text += f"mov.f32 u, ${12 + 2 * i}; mov.f32 v, ${13 + 2 * i}; {activation_text(S.activation)}"
        text += f"cvt.rn.{type_name(dtype)}x2.f32 r, v, u; movmatrix.sync.aligned.m8n8.trans.b16 r{i}, r; "
        if not S.exact:
            text += f"and.b32 r{i}, r{i}, ${20 + 2 * i}; "
    for group in range(2):
        near, far, even, odd = 4 * group, 8 + 2 * group, f"r{group}", f"r{group + 2}"
        text += f"mov.b32 ${near + 1}, {even}; mov.b32 ${near + 2}, {odd}; "
        for out, row in ((near, odd), (far, even)):
            text += f"shfl.sync.up.b32 r|p, {row}, 4, 0, 0xffffffff; selp.b32 ${out}, r, 0, p; "
        for out, row in ((near + 3, even), (far + 1, odd)):
            text += f"shfl.sync.down.b32 r|p, {row}, 4, 31, 0xffffffff; selp.b32 ${out}, r, 0, p; "
    return text + "}"


@gluon.jit
def activate_wide(sums, mask, like, S: gl.constexpr):
    """A tile, near and far rows, in 16 bits as `like`. Zero outside of the image, as the convolution's padding is."""
    return gl.inline_asm_elementwise(
        activate_wide_text(S, like.dtype),
        registers("8r4r", "8f8r"),
        [sums, mask],
        dtype=(gl.int32, like.dtype),
        is_pure=True,
        pack=8,
    )


@gluon.constexpr_function
def far_text(dtype):
    return product_text(
        16,
        dtype,
        lambda group: [16 + 2 * group, 8 + 4 * group, 11 + 4 * group, 17 + 2 * group],
        lambda group: range(20 + 2 * group, 22 + 2 * group),
        lambda group: range(24 + 4 * group, 28 + 4 * group),
    )


@gluon.jit
def far_taps(tile, taps, sums):
    """Add what the rows above and below those next to each give."""
    near, far = tile
    return gl.inline_asm_elementwise(
        far_text(taps.dtype),
        registers("8f", "16r8f"),
        [near, far, taps, sums],
        dtype=gl.float32,
        is_pure=True,
        pack=8,
    )


@gluon.jit
def add_column(tile, taps, sums, COLUMN: gl.constexpr):
    """Add what a tile gives to a column, of whose five columns of taps it needs number `COLUMN`."""
    sums = outer_taps(tile[0], taps[COLUMN], sums)
    sums = far_taps(tile, taps[SIZE + COLUMN], sums)
    return same_taps(tile[0], taps[2 * SIZE + COLUMN // 2], sums, COLUMN % 2)


@gluon.jit
def add_tile(tile, weights, sums):
    """Add to the sums of five columns, from two columns before a tile's own on, what the tile gives to each."""
    taps, _ = weights
    added = ()
    for k in gl.static_range(fixed(SIZE.value)):
        added = added + (add_column(tile, taps, sums[k], SIZE - 1 - k),)
    return added


@gluon.constexpr_function
def strided_text(dtype, rows, has, which):
    """Of a convolution of stride 2 products whose left operands have rows of two tiles, those that two columns of the
    output need for the same taps.

    `rows` are one or two of a tile's registers, far ones after the four near ones. `has` tells which of the tiles there
    are, "first", "second" or "both"; another one counts as zero. With one row `which` says which taps of a piece are
    used.
    """

    def register(group, tile, row):
        near, far = 8 + 12 * tile + 4 * group, 16 + 12 * tile + 2 * group
        return (near + row if row < 4 else far + row - 4) if has in ("both", ("first", "second")[tile]) else "none"

    products = product_text(
        8 * len(rows),
        dtype,
        lambda group: [register(group, tile, row) for row in rows for tile in range(2)],
        lambda group: range(32 + 2 * group, 34 + 2 * group) if len(rows) == 2 else [32 + 2 * which + group],
        lambda group: range(36 + 4 * group, 40 + 4 * group),
    )
    return "{ .reg .b32 none; mov.b32 none, 0; " + products + "}"


@gluon.jit
def add_rows(first, second, taps, sums, ROWS: gl.constexpr, HAS: gl.constexpr, WHICH: gl.constexpr):
    return gl.inline_asm_elementwise(
        strided_text(taps.dtype, ROWS, HAS, WHICH),
        registers("8f", "8r4r8r4r4r8f"),
        [first[0], first[1], second[0], second[1], taps, sums],
        dtype=gl.float32,
        is_pure=True,
        pack=8,
    )


@gluon.jit
def add_columns(first, second, weights, sums, COLUMN: gl.constexpr, HAS: gl.constexpr):
    """Add what two tiles give to two neighbouring columns of the output, the first to the first, for which both are
    number `COLUMN` of five. `HAS` tells which of the tiles there are."""
    taps, _ = weights
    sums = add_rows(first, second, taps[COLUMN], sums, (0, 2), HAS, 0)
    sums = add_rows(first, second, taps[SIZE + COLUMN], sums, (4, 3), HAS, 0)
    return add_rows(first, second, taps[2 * SIZE + COLUMN // 2], sums, (1,), HAS, COLUMN % 2)


@gluon.jit
def add_piece(tiles, weights, before, here):
    """Add the tiles of four columns to the sums of two tiles of the output, each of two columns: `before`, which lacks
    the first of these columns only, and `here`. Returns the first, complete, the second, which then lacks one column,
    and the sums of the next tile."""
    a, b, c, d = tiles
    before = add_columns(a, a, weights, before, 4, "second")
    here = add_columns(a, a, weights, here, 0, "second")
    here = add_columns(b, b, weights, here, 1, "second")
    here = add_columns(a, c, weights, here, 2, "both")
    here = add_columns(b, d, weights, here, 3, "both")
    here = add_columns(c, c, weights, here, 4, "first")
    after = add_columns(c, c, weights, weights[1], 0, "first")
    return before, here, add_columns(d, d, weights, after, 1, "first")

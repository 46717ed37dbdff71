"""Columns of hidden channels in the registers of a warp: activated, convolved and blurred to half of rows and columns,
or convolved with stride 2.

A *column* of an image is one tile, or two if each lane has four rows (`mbconv_hopper_registers` tells of tiles): then
lane g has rows 4 g and 4 g + 1 in the first tile, and 4 g + 2 and 4 g + 3 in the second. So most neighbours of a row
are in the same lane. Columns are blurred first, and sums of three are then blurred by rows: that takes fewer shuffles.

A blurred output column of one tile is half of a tile, eight rows: four registers, [warps, 8, 16].

A convolution of stride 2 takes as left operands of a product the even rows of two columns, or, of a column of two
tiles, those of both: sixteen pixels of the output, of which none is thrown away.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fusion.triton_kernels.hopper_parts import fixed
from fusion.triton_kernels.mbconv_hopper_registers import (
    activate,
    activation_text,
    convolved,
    finish,
    no_tile,
    pixel_mask,
    product_text,
    registers,
    type_name,
)
from fusion.triton_kernels.mbconv_hopper_spec import HIDDEN, TILE, WARPS, tile_layout

SHARE = gl.constexpr("0f3D800000")
"""1/16: [1, 2, 1] / 4 of rows and of columns."""


@gluon.constexpr_function
def activate_pair_text(S, exact, dtype, below=True):
    """Outputs: of the first tile for both groups rows 4 g - 1 to 4 g + 2, of the second one rows 4 g + 1 to 4 g + 4, or
    zeros in place of the last. Inputs: sums of both tiles, masks of both.
    """
    text = "{ .reg .f32 u, v, s, t; .reg .b32 r, r<8>; .reg .pred p; "
    for i in range(8):
        low = 16 + 2 * i
        text += f"mov.f32 u, ${low}; mov.f32 v, ${low + 1}; {activation_text(S.activation)}"
        text += f"cvt.rn.{type_name(dtype)}x2.f32 r, v, u; movmatrix.sync.aligned.m8n8.trans.b16 r{i}, r; "
        if not exact:
            text += f"and.b32 r{i}, r{i}, ${low + 16}; "
    for group in range(2):
        rows = [f"r{2 * row + group}" for row in range(4)]
        for tile in range(2):
            quad = 8 * tile + 4 * group
            for register in range(1, 3):
                text += f"mov.b32 ${quad + register}, {rows[2 * tile + register - 1]}; "
        text += f"mov.b32 ${4 * group + 3}, {rows[2]}; mov.b32 ${8 + 4 * group}, {rows[1]}; "
        text += f"shfl.sync.up.b32 r|p, {rows[3]}, 4, 0, 0xffffffff; selp.b32 ${4 * group}, r, 0, p; "
        if below:
            text += f"shfl.sync.down.b32 r|p, {rows[0]}, 4, 31, 0xffffffff; selp.b32 ${8 + 4 * group + 3}, r, 0, p; "
        else:
            text += f"mov.b32 ${8 + 4 * group + 3}, 0; "
    return text + "}"


@gluon.jit
def row_mask(column, INDEX: gl.constexpr, D: gl.constexpr):
    """[hidden, tile] int32: as `pixel_mask`, of one of the two tiles of a column."""
    if D.exact:
        return no_tile()
    else:
        LAYOUT: gl.constexpr = tile_layout()
        g = gl.arange(0, HIDDEN, gl.SliceLayout(1, LAYOUT)) % 8
        parity = gl.arange(0, TILE, gl.SliceLayout(0, LAYOUT)) // 8
        row = (4 * g + 2 * INDEX)[:, None] + parity[None, :]
        return gl.where((row < D.produced.height) & (column < D.produced.width), -1, 0)


@gluon.jit
def activate_column(sums, column, dtype: gl.constexpr, D: gl.constexpr):
    """The tiles of a column, from sums of each."""
    if D.tiles_of_column == 1:
        return (activate(sums[0], pixel_mask(column, fixed(D.produced)), dtype, fixed(D.produced), D.blur),)
    else:
        return gl.inline_asm_elementwise(
            activate_pair_text(D.produced, D.exact, dtype, D.blur),
            registers("16r", "16f16r"),
            [sums[0], sums[1], row_mask(column, 0, D), row_mask(column, 1, D)],
            dtype=(gl.int32, gl.int32),
            is_pure=True,
            pack=8,
        )


@gluon.constexpr_function
def even_text(S):
    """Outputs: sums of columns with twice an activated one. Inputs: sums of the convolution, sums of columns."""
    text = "{ .reg .f32 u, v, s, t; "
    for low in range(0, 8, 2):
        text += f"mov.f32 u, ${8 + low}; mov.f32 v, ${9 + low}; {activation_text(S.activation)}"
        text += f"fma.rn.f32 ${low}, u, 0f40000000, ${16 + low}; fma.rn.f32 ${low + 1}, v, 0f40000000, ${17 + low}; "
    return text + "}"


@gluon.constexpr_function
def odd_text(S):
    """Outputs: sums of three columns, the last one activated. Inputs: its sums, those of columns, its weight."""
    text = "{ .reg .f32 u, v, s, t; "
    for low in range(0, 8, 2):
        text += f"mov.f32 u, ${16 + low}; mov.f32 v, ${17 + low}; {activation_text(S.activation)}"
        text += f"fma.rn.f32 ${low}, u, ${32 + low}, ${24 + low}; fma.rn.f32 ${low + 1}, v, ${33 + low}, ${25 + low}; "
        text += f"mov.f32 ${8 + low}, u; mov.f32 ${9 + low}, v; "
    return text + "}"


@gluon.jit
def add_even(sums, columns, S: gl.constexpr):
    """A tile of an even column, activated, into the sums of an output column, twice."""
    return gl.inline_asm_elementwise(
        even_text(S), registers("8f", "16f"), [sums, columns], dtype=gl.float32, is_pure=True, pack=8
    )


@gluon.jit
def add_odd(sums, columns, weight, S: gl.constexpr):
    """A tile of an odd column, activated, into the sums of an output column, which are complete; and that tile alone,
    with which those of the next one start."""
    return gl.inline_asm_elementwise(
        odd_text(S),
        registers("16f", "24f"),
        [sums, columns, weight],
        dtype=(gl.float32, gl.float32),
        is_pure=True,
        pack=8,
    )


@gluon.jit
def halves(t):
    """[hidden, tile] -> two of [warps, 8, 16]: of products' sums even rows and odd ones, of operands two columns."""
    return gl.split(t.reshape((WARPS, 2, 8, TILE)).permute((0, 2, 3, 1)))


@gluon.jit
def of_halves(first, second):
    """[hidden, tile] of what `halves` makes of it."""
    t = gl.join(first, second).permute((0, 3, 1, 2)).reshape((HIDDEN, TILE))
    return gl.convert_layout(t, tile_layout(), assert_trivial=True)


@gluon.constexpr_function
def finish_row_text(dtype, exact, rows, out, pool, new_pool, mask):
    """A row of blurred channels of a group: rounded to `out`, added to a pool. `rows` has, for both channels, code that
    leaves the sum of the outer rows in u, and the register of the row between them."""
    text = ""
    for row, share in zip(rows, "wv", strict=True):
        outer, middle = row
        text += f"{outer} fma.rn.f32 u, {middle}, 0f40000000, u; mul.rn.f32 {share}, u, {SHARE.value}; "
    text += f"cvt.rn.{type_name(dtype)}x2.f32 ${out}, v, w; "
    if not exact:
        text += f"setp.ne.b32 p, ${mask}, 0; selp.f32 w, w, 0f00000000, p; selp.f32 v, v, 0f00000000, p; "
    return text + f"add.f32 ${new_pool}, ${pool}, w; add.f32 ${new_pool + 1}, ${pool + 1}, v; "


@gluon.constexpr_function
def blur_half_text(exact, dtype):
    """Outputs: hidden channels, 16 bits; the pool. Inputs: even rows, odd rows, the pool, a mask.

    The row above the first one is that below it: a lane without a lane above gets its own odd row.
    """
    text = "{ .reg .f32 u, v, w; .reg .pred p; "
    for group in range(2):
        rows = []
        for channel in range(2):
            register = 2 * group + channel
            up = f"shfl.sync.up.b32 u, ${10 + register}, 4, 0, 0xffffffff; add.f32 u, u, ${10 + register};"
            rows.append((up, f"${6 + register}"))
        first = 2 * group
        text += finish_row_text(dtype, exact, rows, group, 14 + first, 2 + first, 18 + first)
    return text + "}"


@gluon.jit
def blur_half(columns, pool, column, like, D: gl.constexpr):
    """[warps, 8, 16] of an output column from sums of three columns, in 16 bits as `like`; and the pool with it."""
    even, odd = halves(columns)
    return gl.inline_asm_elementwise(
        blur_half_text(D.exact, like.dtype),
        registers("2r4f", "12f4r"),
        [even, odd, pool, half_mask(column, D)],
        dtype=(like.dtype, gl.float32),
        is_pure=True,
        pack=4,
    )


@gluon.jit
def half_mask(column, D: gl.constexpr):
    """[warps, 8, 16] int32: all bits set in registers that hold pixels of the output, of its `column`."""
    if D.exact:
        mask, _ = halves(no_tile())
    else:
        LAYOUT: gl.constexpr = tile_layout()
        g = gl.arange(0, HIDDEN, gl.SliceLayout(1, LAYOUT)) % 8
        inside = (g < D.projected.height) & (column < D.projected.width)
        mask, _ = halves(no_tile() + gl.where(inside, -1, 0)[:, None])
    return mask


@gluon.constexpr_function
def blur_text(exact, dtype):
    """Outputs: hidden channels, 16 bits; the pool. Inputs: rows 4 g and 4 g + 1, 4 g + 2 and 4 g + 3, the pool, a mask.

    The row above the first one is that below it.
    """
    text = "{ .reg .f32 u, v, w; .reg .pred p; "
    for group in range(2):
        a, b = 12 + 4 * group, 20 + 4 * group
        even, odd = [], []
        for channel in range(2):
            up = f"shfl.sync.up.b32 u|p, ${b + 2 + channel}, 4, 0, 0xffffffff; selp.f32 u, u, ${a + 2 + channel}, p; "
            even.append((up + f"add.f32 u, u, ${a + 2 + channel};", f"${a + channel}"))
            odd.append((f"add.f32 u, ${a + 2 + channel}, ${b + 2 + channel};", f"${b + channel}"))
        for half, rows in enumerate((even, odd)):
            register = 4 * group + 2 * half
            out, mask = 2 * group + half, 36 + 4 * half
            text += finish_row_text(dtype, exact, rows, out, 28 + register, 4 + register, mask)
    return text + "}"


@gluon.jit
def blur(columns, pool, column, own, like, HALF: gl.constexpr, D: gl.constexpr):
    """[hidden, tile] of an output column from sums of three columns, in 16 bits as `like`; and the pool with it.

    In a half sweep it counts in the pool only if it is the warpgroup's own.
    """
    mask = pixel_mask(column, fixed(D.projected))
    if HALF:
        mask = gl.where(own, (mask | -1) if D.exact else mask, 0)
    return gl.inline_asm_elementwise(
        blur_text(D.exact and not HALF, like.dtype),
        registers("4r8f", "24f8r"),
        [columns[0], columns[1], pool, mask],
        dtype=(like.dtype, gl.float32),
        is_pure=True,
        pack=8,
    )


@gluon.jit
def blur_column(columns, pool, column, own, like, HALF: gl.constexpr, D: gl.constexpr):
    """An output column, half a tile or a whole one, and the pool with it."""
    if D.tiles_of_column == 1:
        return blur_half(columns[0], pool, column, like, D)
    else:
        return blur(columns, pool, column, own, like, HALF, D)


@gluon.jit
def convolve_column(tiles, FIRST: gl.constexpr, weights, D: gl.constexpr):
    """Sums of each tile of the column after the one whose tiles start at `FIRST`."""
    sums = ()
    T: gl.constexpr = D.tiles_of_column
    for i in gl.static_range(FIRST, FIRST + T):
        sums = sums + (convolved(tiles[i], tiles[i + T], tiles[i + 2 * T], weights),)
    return sums


@gluon.constexpr_function
def strided_outer_text(dtype):
    """As `outer_text`, but of two tiles, and of the first row of each lane only."""
    return product_text(
        16,
        dtype,
        lambda group: [8 + 4 * group, 16 + 4 * group, 10 + 4 * group, 18 + 4 * group],
        lambda group: range(24 + 2 * group, 26 + 2 * group),
        lambda group: range(28 + 4 * group, 32 + 4 * group),
    )


@gluon.constexpr_function
def strided_same_text(dtype, which):
    return product_text(
        8,
        dtype,
        lambda group: [9 + 4 * group, 17 + 4 * group],
        lambda group: [24 + 2 * which + group],
        lambda group: range(28 + 4 * group, 32 + 4 * group),
    )


@gluon.jit
def strided_taps(tiles, outer, same, sums, WHICH: gl.constexpr):
    """Add what a column of each of two tiles gives to their output pixels."""
    first, second = tiles
    sums = gl.inline_asm_elementwise(
        strided_outer_text(outer.dtype),
        registers("8f", "20r8f"),
        [first, second, outer, sums],
        dtype=gl.float32,
        is_pure=True,
        pack=8,
    )
    return gl.inline_asm_elementwise(
        strided_same_text(same.dtype, WHICH),
        registers("8f", "20r8f"),
        [first, second, same, sums],
        dtype=gl.float32,
        is_pure=True,
        pack=8,
    )


@gluon.jit
def output_mask(tile, D: gl.constexpr):
    """[hidden, tile] int32: all bits set in registers that hold pixels of the output, of one of its tiles."""
    LAYOUT: gl.constexpr = tile_layout()
    g = gl.arange(0, HIDDEN, gl.SliceLayout(1, LAYOUT)) % 8
    half = gl.arange(0, TILE, gl.SliceLayout(0, LAYOUT)) // 8
    if D.tiles_of_column == 1:
        inside = (g < D.projected.height)[:, None] & (2 * tile + half < D.projected.width)[None, :]
    else:
        inside = ((2 * g)[:, None] + half[None, :] < D.projected.height) & (tile < D.projected.width)
    return gl.where(inside, -1, 0)


@gluon.jit
def convolve_strided(tiles, tile, own, pool, weights, HALF: gl.constexpr, D: gl.constexpr):
    """[hidden, tile] of the output, activated, in 16 bits as the taps, and the pool with it.

    `tiles` are those of a column and of the piece after it. In a half sweep the tile counts in the pool only if it is
    the warpgroup's own.
    """
    taps, sums = weights
    T: gl.constexpr = D.tiles_of_column
    OTHER: gl.constexpr = 3 - T  # from a tile to that which shares its products: of its column, or of the second next
    sums = strided_taps((tiles[0], tiles[OTHER]), taps[0], taps[3], sums, 0)
    sums = strided_taps((tiles[T], tiles[T + OTHER]), taps[1], taps[3], sums, 1)
    sums = strided_taps((tiles[2 * T], tiles[2 * T + OTHER]), taps[2], taps[4], sums, 0)
    mask = no_tile()
    if HALF or not D.exact:
        mask = output_mask(tile, D)
    if HALF:
        mask = gl.where(own, mask, 0)
    return finish(sums, pool, mask, taps[0], D.exact and not HALF, fixed(D.projected))

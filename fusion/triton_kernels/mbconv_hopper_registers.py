"""A tile of hidden channels in the registers of a warp: activated, shifted, convolved, activated again.

A *tile* is a column of every band of an image, and two groups of 8 hidden channels of each warp. Lane 4 g + t has the
pixels of rows 2 q and 2 q + 1, where g = `pairs` band + q, and of each group channels 2 t and 2 t + 1, a pair in 16
bits: four registers. Products of `mma` take these as left operands, pixels by channels, so a shift by a column is
another tile's registers, and of a shift by a row half comes from the same lane, and half from a neighbour's.

Everything here acts on eight registers of a thread at a time, [hidden, tile] in `tile_layout()`, and means those
registers, not the elements that the layout names.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fusion.planner import mbconv_hopper_tile as planned
from fusion.triton_kernels.hopper_parts import zeros
from fusion.triton_kernels.mbconv_hopper_spec import HIDDEN, TILE, tile_layout

LANES = gl.constexpr(planned.LANES)


@gluon.constexpr_function
def registers(outs, ins):
    """Constraints: "8r4f" are eight 32-bit integer registers and four fp32 ones."""
    import re

    def kinds(text):
        return [kind for count, kind in re.findall(r"(\d+)(\w)", text) for _ in range(int(count))]

    return ",".join([f"=&{kind}" for kind in kinds(outs)] + kinds(ins))


@gluon.constexpr_function
def type_name(dtype):
    return "bf16" if dtype == gl.bfloat16 else "f16"


@gluon.constexpr_function
def activation_text(activation):
    """Of halved sums in u and v: x sigmoid(x) = x/2 tanh(x/2) + x/2."""
    if activation == "silu":
        return "tanh.approx.f32 s, u; tanh.approx.f32 t, v; fma.rn.f32 u, u, s, u; fma.rn.f32 v, v, t, v; "
    return "add.f32 u, u, u; add.f32 v, v, v; max.f32 u, u, 0f00000000; max.f32 v, v, 0f00000000; "


@gluon.constexpr_function
def activate_text(S, dtype):
    """Outputs: for both groups rows 2 q - 1, 2 q, 2 q + 1, 2 q + 2; with copies for both rows 2 q, 2 q + 1 again.

    Inputs: sums, ones, a mask.
    """
    outs = 16 if S.copies else 8
    lanes = 32 // S.bands
    segment = (32 - lanes) << 8
    text = "{ .reg .f32 u, v, s, t; .reg .b32 r, r<4>; .reg .pred p; "
    for i in range(4):
        low, high = outs + 2 * i, outs + 2 * i + 1
        text += f"mov.f32 u, ${low}; mov.f32 v, ${high}; {activation_text(S.activation)}"
        text += f"cvt.rn.{type_name(dtype)}x2.f32 r, v, u; movmatrix.sync.aligned.m8n8.trans.b16 r{i}, r; "
        if not S.exact:
            text += f"and.b32 r{i}, r{i}, ${outs + 16 + 2 * i}; "
    for group in range(2):
        quad, pair = 4 * group, 8 + 2 * group
        first, second = f"r{group}", f"r{group + 2}"
        text += f"mov.b32 ${quad + 1}, {first}; mov.b32 ${quad + 2}, {second}; "
        text += f"shfl.sync.up.b32 r|p, {second}, 4, {segment}, 0xffffffff; selp.b32 ${quad}, r, 0, p; "
        text += f"shfl.sync.down.b32 r|p, {first}, 4, {segment + 31}, 0xffffffff; selp.b32 ${quad + 3}, r, 0, p; "
        if S.copies:
            text += f"and.b32 ${pair}, {first}, ${outs + 8}; and.b32 ${pair + 1}, {second}, ${outs + 8}; "
            text += f"mov.b32 ${pair + 4}, 0; mov.b32 ${pair + 5}, 0; "
    return text + "}"


@gluon.jit
def activate(sums, ones, mask, dtype: gl.constexpr, S: gl.constexpr):
    """A tile: rows with their neighbours, and rows alone. Zero outside of the image, as the convolution's padding is.

    Operands of 64 and 128 bits are aligned registers. A copy, made with `ones` so that the compiler takes it for
    another value, spares it to make one for every product.
    """
    if S.copies:
        return gl.inline_asm_elementwise(
            activate_text(S, dtype),
            registers("16r", "8f16r"),
            [sums, ones, mask],
            dtype=(gl.int32, gl.int32),
            is_pure=True,
            pack=8,
        )
    else:
        tile = gl.inline_asm_elementwise(
            activate_text(S, dtype), registers("8r", "8f16r"), [sums, ones, mask], dtype=gl.int32, is_pure=True, pack=8
        )
        return tile, tile


@gluon.jit
def no_tile():
    none = zeros(HIDDEN, TILE, gl.int32, tile_layout())
    return none, none


@gluon.constexpr_function
def beside_text(direction, lanes):
    clamp = 0 if direction == "up" else 31
    text = "{ .reg .pred p; .reg .b32 t; "
    for i in range(8):
        text += f"shfl.sync.{direction}.b32 t|p, ${8 + i}, {lanes}, {clamp}, 0xffffffff; selp.b32 ${i}, t, 0, p; "
    return text + "}"


@gluon.jit
def moved(part, DIRECTION: gl.constexpr, S: gl.constexpr):
    return gl.inline_asm_elementwise(
        beside_text(DIRECTION, 32 // S.bands), registers("8r", "8r"), [part], dtype=gl.int32, is_pure=True, pack=8
    )


@gluon.jit
def beside(tile, DIRECTION: gl.constexpr, S: gl.constexpr):
    """The last ("up") or first ("down") column of every band, where the band beside it expects its neighbour."""
    if S.bands == 1:
        return no_tile()
    else:
        rows = moved(tile[0], DIRECTION, S)  # of which there are no copies
        return rows, rows


@gluon.constexpr_function
def product_text(depth, dtype, left, right, sums):
    """Products of both groups; each argument has a function of the group that names registers."""
    text = ""
    for group in range(2):
        outs, a, b, c = (
            ",".join(f"${register}" for register in operand(group))
            for operand in (lambda group: range(4 * group, 4 * group + 4), left, right, sums)
        )
        types = f"f32.{type_name(dtype)}.{type_name(dtype)}.f32"
        text += f"mma.sync.aligned.m16n8k{depth}.row.col.{types} {{{outs}}}, {{{a}}}, {{{b}}}, {{{c}}}; "
    return text


@gluon.constexpr_function
def outer_text(dtype):
    return product_text(
        16,
        dtype,
        lambda group: range(8 + 4 * group, 12 + 4 * group),
        lambda group: range(16 + 2 * group, 18 + 2 * group),
        lambda group: range(20 + 4 * group, 24 + 4 * group),
    )


@gluon.constexpr_function
def same_text(dtype, which, copies):
    return product_text(
        8,
        dtype,
        lambda group: range(8 + 2 * group, 10 + 2 * group) if copies else range(9 + 4 * group, 11 + 4 * group),
        lambda group: [16 + 2 * which + group],
        lambda group: range(20 + 4 * group, 24 + 4 * group),
    )


@gluon.jit
def outer_taps(tile, taps, sums):
    """Add what the rows above and below of a column give."""
    return gl.inline_asm_elementwise(
        outer_text(taps.dtype), registers("8f", "12r8f"), [tile[0], taps, sums], dtype=gl.float32, is_pure=True, pack=8
    )


@gluon.jit
def same_taps(tile, taps, sums, WHICH: gl.constexpr, S: gl.constexpr):
    """Add what a row gives to itself; `taps` are those of two columns."""
    return gl.inline_asm_elementwise(
        same_text(taps.dtype, WHICH, S.copies),
        registers("8f", "12r8f"),
        [tile[1], taps, sums],
        dtype=gl.float32,
        is_pure=True,
        pack=8,
    )


@gluon.constexpr_function
def finish_text(S, dtype):
    """Outputs: hidden channels, 16 bits; the pool. Inputs: sums, the pool, a mask."""
    text = "{ .reg .f32 u, v, s, t; .reg .pred p; "
    for i in range(4):
        low, high = 2 * i, 2 * i + 1
        text += f"mov.f32 u, ${12 + low}; mov.f32 v, ${12 + high}; {activation_text(S.activation)}"
        text += f"cvt.rn.{type_name(dtype)}x2.f32 ${i}, v, u; "
        if not S.exact:
            row = 4 * (i % 2)
            text += f"setp.ne.b32 p, ${28 + row}, 0; selp.f32 u, u, 0f00000000, p; selp.f32 v, v, 0f00000000, p; "
        text += f"add.f32 ${4 + low}, ${20 + low}, u; add.f32 ${4 + high}, ${20 + high}, v; "
    return text + "}"


@gluon.jit
def finish(sums, pool, mask, taps, S: gl.constexpr):
    """Activated hidden channels as the projection's left operand, 16 bits like `taps`, and their sums over pixels."""
    return gl.inline_asm_elementwise(
        finish_text(S, taps.dtype),
        registers("4r8f", "16f8r"),
        [sums, pool, mask],
        dtype=(taps.dtype, gl.float32),
        is_pure=True,
        pack=8,
    )


@gluon.jit
def convolve(left, here, right, taps, bias, pool, mask, S: gl.constexpr):
    """Hidden channels of a tile after the convolution, from the tiles of three columns, and the pool with them."""
    sums = outer_taps(left, taps[0], bias)
    sums = same_taps(left, taps[3], sums, 0, S)
    sums = outer_taps(here, taps[1], sums)
    sums = same_taps(here, taps[3], sums, 1, S)
    sums = outer_taps(right, taps[2], sums)
    sums = same_taps(right, taps[4], sums, 0, S)
    return finish(sums, pool, mask, taps[0], S)


@gluon.jit
def pixel_mask(column, ones, S: gl.constexpr):
    """[hidden, tile] int32: all bits set in registers that hold pixels of the image, of tile `column`."""
    if S.exact:
        return ones
    else:
        LAYOUT: gl.constexpr = tile_layout()
        g = gl.arange(0, HIDDEN, gl.SliceLayout(1, LAYOUT)) % LANES
        parity = gl.arange(0, TILE, gl.SliceLayout(0, LAYOUT)) // LANES
        row = (g % S.pairs * 2)[:, None] + parity[None, :]
        image_column = (column + S.columns * (g // S.pairs))[:, None] + parity[None, :] * 0
        return gl.where((row < S.height) & (image_column < S.width), -1, 0)

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
def activate_text(S, dtype, below=True):
    """Outputs: for both groups rows 2 q - 1, 2 q, 2 q + 1, 2 q + 2, if not `below` zeros in place of the last.

    Inputs: sums, a mask.
    """
    lanes = 32 // S.bands
    segment = (32 - lanes) << 8
    text = "{ .reg .f32 u, v, s, t; .reg .b32 r, r<4>; .reg .pred p; "
    for i in range(4):
        text += f"mov.f32 u, ${8 + 2 * i}; mov.f32 v, ${9 + 2 * i}; {activation_text(S.activation)}"
        text += f"cvt.rn.{type_name(dtype)}x2.f32 r, v, u; movmatrix.sync.aligned.m8n8.trans.b16 r{i}, r; "
        if not S.exact:
            text += f"and.b32 r{i}, r{i}, ${16 + 2 * i}; "
    for group in range(2):
        quad, first, second = 4 * group, f"r{group}", f"r{group + 2}"
        text += f"mov.b32 ${quad + 1}, {first}; mov.b32 ${quad + 2}, {second}; "
        text += f"shfl.sync.up.b32 r|p, {second}, 4, {segment}, 0xffffffff; selp.b32 ${quad}, r, 0, p; "
        if below:
            text += f"shfl.sync.down.b32 r|p, {first}, 4, {segment + 31}, 0xffffffff; selp.b32 ${quad + 3}, r, 0, p; "
        else:
            text += f"mov.b32 ${quad + 3}, 0; "
    return text + "}"


@gluon.jit
def activate(sums, mask, dtype: gl.constexpr, S: gl.constexpr, BELOW: gl.constexpr = True):
    """A tile: rows with their neighbours. Zero outside of the image, as the convolution's padding is.

    Not `BELOW` leaves out the row below the last one of each lane.
    """
    return gl.inline_asm_elementwise(
        activate_text(S, dtype, BELOW), registers("8r", "8f8r"), [sums, mask], dtype=gl.int32, is_pure=True, pack=8
    )


@gluon.jit
def no_tile():
    return zeros(HIDDEN, TILE, gl.int32, tile_layout())


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
        return moved(tile, DIRECTION, S)


@gluon.constexpr_function
def product_text(depth, dtype, left, right, sums, groups=(0, 1)):
    """Products of two groups, or of one of them; the other keeps its sums. Functions tell each group's registers, by
    the operand's number or a name."""
    text = ""
    types = f"f32.{type_name(dtype)}.{type_name(dtype)}.f32"
    for group in range(2):
        outs, a, b, c = (
            ",".join(register if isinstance(register, str) else f"${register}" for register in operand(group))
            for operand in (lambda group: range(4 * group, 4 * group + 4), left, right, sums)
        )
        if group in groups:
            text += f"mma.sync.aligned.m16n8k{depth}.row.col.{types} {{{outs}}}, {{{a}}}, {{{b}}}, {{{c}}}; "
        else:
            text += "".join(f"mov.b32 ${4 * group + i}, ${register}; " for i, register in enumerate(sums(group)))
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
def same_text(dtype, which):
    return product_text(
        8,
        dtype,
        lambda group: range(9 + 4 * group, 11 + 4 * group),
        lambda group: [16 + 2 * which + group],
        lambda group: range(20 + 4 * group, 24 + 4 * group),
    )


@gluon.jit
def outer_taps(tile, taps, sums):
    """Add what the rows above and below of a column give."""
    return gl.inline_asm_elementwise(
        outer_text(taps.dtype), registers("8f", "12r8f"), [tile, taps, sums], dtype=gl.float32, is_pure=True, pack=8
    )


@gluon.jit
def same_taps(tile, taps, sums, WHICH: gl.constexpr):
    """Add what a row gives to itself; `taps` are those of two columns."""
    return gl.inline_asm_elementwise(
        same_text(taps.dtype, WHICH),
        registers("8f", "12r8f"),
        [tile, taps, sums],
        dtype=gl.float32,
        is_pure=True,
        pack=8,
    )


@gluon.constexpr_function
def finish_text(S, exact, dtype):
    """Outputs: hidden channels, 16 bits; the pool. Inputs: sums, the pool, a mask."""
    text = "{ .reg .f32 u, v, s, t; .reg .pred p; "
    for i in range(4):
        low, high = 2 * i, 2 * i + 1
        text += f"mov.f32 u, ${12 + low}; mov.f32 v, ${12 + high}; {activation_text(S.activation)}"
        text += f"cvt.rn.{type_name(dtype)}x2.f32 ${i}, v, u; "
        if not exact:
            row = 4 * (i % 2)
            text += f"setp.ne.b32 p, ${28 + row}, 0; selp.f32 u, u, 0f00000000, p; selp.f32 v, v, 0f00000000, p; "
        text += f"add.f32 ${4 + low}, ${20 + low}, u; add.f32 ${4 + high}, ${20 + high}, v; "
    return text + "}"


@gluon.jit
def finish(sums, pool, mask, taps, EXACT: gl.constexpr, S: gl.constexpr):
    """Activated hidden channels as the projection's left operand, 16 bits like `taps`, and their sums over pixels, of
    those that the mask has if not `EXACT`."""
    return gl.inline_asm_elementwise(
        finish_text(S, EXACT, taps.dtype),
        registers("4r8f", "16f8r"),
        [sums, pool, mask],
        dtype=(taps.dtype, gl.float32),
        is_pure=True,
        pack=8,
    )


@gluon.jit
def convolved(left, here, right, weights):
    """Sums of the convolution of a tile, from the tiles of three columns."""
    taps, bias = weights
    sums = outer_taps(left, taps[0], bias)
    sums = same_taps(left, taps[3], sums, 0)
    sums = outer_taps(here, taps[1], sums)
    sums = same_taps(here, taps[3], sums, 1)
    sums = outer_taps(right, taps[2], sums)
    return same_taps(right, taps[4], sums, 0)


@gluon.jit
def convolve(left, here, right, weights, pool, mask, S: gl.constexpr):
    """Hidden channels of a tile after the convolution, from the tiles of three columns, and the pool with them."""
    return finish(convolved(left, here, right, weights), pool, mask, weights[0][0], S.exact, S)


@gluon.jit
def pixel_mask(column, S: gl.constexpr):
    """[hidden, tile] int32: all bits set in registers that hold pixels of the image, of the tile of `column`.

    That may be a vector, [hidden]. Where all registers hold pixels, nobody looks at the mask.
    """
    if S.exact:
        return no_tile()
    else:
        LAYOUT: gl.constexpr = tile_layout()
        g = gl.arange(0, HIDDEN, gl.SliceLayout(1, LAYOUT)) % LANES
        parity = gl.arange(0, TILE, gl.SliceLayout(0, LAYOUT)) // LANES
        row = (g % S.pairs * 2)[:, None] + parity[None, :]
        image_column = (column + S.columns * (g // S.pairs))[:, None] + parity[None, :] * 0
        return gl.where((row < S.height) & (image_column < S.width), -1, 0)


@gluon.constexpr_function
def means_text(S, dtype):
    """Outputs: of both groups two channels in 16 bits, twice. Inputs: the pool."""
    text = "{ .reg .f32 u, v; "
    for group in range(2):
        out, first = 2 * group, 4 + 4 * group
        text += f"add.f32 u, ${first}, ${first + 2}; add.f32 v, ${first + 1}, ${first + 3}; "
        text += f"mul.f32 u, u, {S.pixel_share}; mul.f32 v, v, {S.pixel_share}; "
        text += f"cvt.rn.{type_name(dtype)}x2.f32 ${out}, v, u; mov.b32 ${out + 1}, ${out}; "
    return text + "}"


@gluon.jit
def means(pool, like, S: gl.constexpr):
    """Eight lanes' shares of the means over all pixels, in 16 bits as `like`: a right operand, channels by shares."""
    return gl.inline_asm_elementwise(
        means_text(S, like.dtype), registers("4r", "8f"), [pool], dtype=like.dtype, is_pure=True, pack=8
    )


@gluon.constexpr_function
def add_text(dtype, halves, left_count):
    right, sums = 8 + left_count, 12 + left_count
    return product_text(
        16,
        dtype,
        lambda half: range(8 + 4 * half, 12 + 4 * half),
        lambda half: (right, right + 2),
        lambda half: range(sums + 4 * half, sums + 4 * half + 4),
        halves,
    )


@gluon.jit
def add_products(left, right, sums, HALVES: gl.constexpr):
    """Add products with a right operand `[16, 8]` to one half of the sums or to each, `[16, 8]` for each warp.

    `left` are two operands `[16, 16]` in 32 bits for both halves, or one in 16 bits for the first. `right` is in the
    first and the third register, the sums are fp32.
    """
    COUNT: gl.constexpr = 8 if left.dtype == gl.int32 else 4
    return gl.inline_asm_elementwise(
        add_text(right.dtype, HALVES, COUNT),
        registers("8f", f"{COUNT}r4r8f"),
        [left, right, sums],
        dtype=gl.float32,
        is_pure=True,
        pack=8,
    )

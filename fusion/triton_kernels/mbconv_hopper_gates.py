"""Between the phases of the Hopper kernel of the MBConv block: excite, a gate for each hidden channel."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fusion.triton_kernels.hopper_layouts import plain_layout
from fusion.triton_kernels.hopper_parts import fixed, join_columns, zeros
from fusion.triton_kernels.mbconv_hopper_registers import add_products
from fusion.triton_kernels.mbconv_hopper_spec import HIDDEN, TILE, UNIT, WARPS, load_operands, tile_layout

AHEAD_REGISTERS = 160
"""Of a thread, for excite weights on their way together."""


@gluon.constexpr_function
def excite_ahead(S):
    """Sweeps of excite weights that are loaded before the squeeze vector is complete."""
    return max(1, min(S.sweeps, AHEAD_REGISTERS // (4 * S.squeeze_depths)))


@gluon.jit
def load_excite(excite_ptr, sweep, dtype: gl.constexpr, S: gl.constexpr):
    """Of 128 gates."""
    pointer = excite_ptr + sweep * (S.squeeze_depths * UNIT * WARPS // 2)
    return load_operands(pointer, True, fixed(S.squeeze_depths), WARPS, dtype)


@gluon.jit
def share_of(squeezed, part: gl.constexpr, S: gl.constexpr):
    """[warps, 32] of the squeeze vector, zero beyond the last part."""
    if part < S.squeeze_parts:
        # Warps, halves of 16 channels, 8 channels, which 16 of 32, shares.
        shares = gl.sum(squeezed[part].reshape((WARPS, 2, 8, 2, 8)), axis=4)
    else:
        shares = gl.sum(zeros(HIDDEN, TILE, gl.float32, tile_layout()).reshape((WARPS, 2, 8, 2, 8)), axis=4)
    return shares.permute((0, 3, 1, 2)).reshape((WARPS, 32))


@gluon.jit
def shares_of(squeezed, FIRST: gl.constexpr, COUNT: gl.constexpr, S: gl.constexpr):
    """[warps, 32 count]"""
    if COUNT == 1:
        return share_of(squeezed, FIRST, S)
    else:
        half: gl.constexpr = COUNT // 2
        return join_columns(shares_of(squeezed, FIRST, half, S), shares_of(squeezed, FIRST + half, half, S))


@gluon.jit
def strung(vectors, FIRST: gl.constexpr, COUNT: gl.constexpr):
    """[count x n] of some vectors [n], the last of which is repeated where there are not enough."""
    if COUNT == 1:
        LAST: gl.constexpr = len(vectors) - 1
        return vectors[FIRST if FIRST < LAST else LAST]
    else:
        half: gl.constexpr = COUNT // 2
        both = gl.join(strung(vectors, FIRST, half), strung(vectors, FIRST + half, half))
        return both.permute((1, 0)).reshape((2 * both.shape[0],))


@gluon.jit
def squeeze_activated(x, S: gl.constexpr):
    if S.squeeze_activation == "silu":
        return x / (1.0 + gl.exp(-x))
    else:
        return gl.maximum(x, 0.0)


@gluon.constexpr_function
def bias_layout():
    """[output channels]"""
    return gl.BlockedLayout([1], [32], [WARPS.value], [0])


@gluon.jit
def excite(
    squeezed, vector, gates, biases, squeeze_bias_ptr, excite_ptr, excite_bias_ptr, project_bias_ptr, S: gl.constexpr
):
    """Gates of all hidden channels, from each warp's shares of the squeeze vector; and biases of the projection.

    All loads but the last weights' start before anything waits for another warp. The vector is a right operand whose
    columns are all the same, and so are the columns of the products.
    """
    ROWS: gl.constexpr = gl.SliceLayout(1, tile_layout())
    COLUMNS: gl.constexpr = gl.SliceLayout(0, tile_layout())
    AHEAD: gl.constexpr = excite_ahead(S)
    dtype: gl.constexpr = gates.dtype
    weights = ()
    for sweep in gl.static_range(AHEAD):
        weights = weights + (load_excite(excite_ptr, sweep, dtype, S),)
    excite_biases = ()
    for sweep in gl.static_range(fixed(S.sweeps)):
        excite_biases = excite_biases + (gl.load(excite_bias_ptr + sweep * HIDDEN + gl.arange(0, HIDDEN, ROWS)),)
    squeeze_biases = ()
    for depth in gl.static_range(fixed(S.squeeze_depths)):
        squeeze_biases = squeeze_biases + (gl.load(squeeze_bias_ptr + depth * 16 + gl.arange(0, 16, COLUMNS)),)
    channel = gl.arange(0, biases.shape[0], bias_layout())
    project_bias = gl.load(project_bias_ptr + channel, mask=channel < S.out_channels, other=0.0)
    vector.store(gl.sum(shares_of(squeezed, 0, vector.shape[0] // 32, S), axis=0))
    biases.store(project_bias)
    gl.thread_barrier()
    like = zeros(HIDDEN, TILE, dtype, tile_layout())
    right = ()
    for depth in gl.static_range(fixed(S.squeeze_depths)):
        part = vector.slice(16 * depth, 16).load(COLUMNS) + squeeze_biases[depth]
        part = squeeze_activated(part, S).to(dtype)
        part, _ = gl.broadcast(part[None, :], like)
        right = right + (part,)
    all_gates = ()
    for sweep in gl.static_range(fixed(S.sweeps)):
        sums = zeros(HIDDEN, TILE, gl.float32, tile_layout())
        for depth in gl.static_range(fixed(S.squeeze_depths)):
            sums = add_products(weights[sweep][depth // 2], right[depth], sums, fixed((depth % 2,)))
        if sweep + AHEAD < S.sweeps:
            weights = weights + (load_excite(excite_ptr, sweep + AHEAD, dtype, S),)
        gate = gl.sum(sums, axis=1) * 0.125 + excite_biases[sweep]
        all_gates = all_gates + ((1.0 / (1.0 + gl.exp(-gate))).to(dtype),)
    ROOM: gl.constexpr = gates.shape[0] * gates.shape[1]
    gates._reinterpret(dtype, [ROOM], plain_layout(1)).store(strung(all_gates, 0, ROOM // HIDDEN))
    gl.thread_barrier()

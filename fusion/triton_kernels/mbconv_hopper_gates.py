"""Between the phases of the Hopper kernel of the MBConv block: excite, a gate for each hidden channel."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fusion.triton_kernels.hopper_layouts import plain_layout
from fusion.triton_kernels.hopper_parts import fixed, zeros
from fusion.triton_kernels.mbconv_hopper_registers import add_products
from fusion.triton_kernels.mbconv_hopper_spec import HIDDEN, TILE, UNIT, WARPS, load_operands, tile_layout

AHEAD_REGISTERS = 64
"""Of a thread, for excite weights on their way together."""


@gluon.constexpr_function
def excite_ahead(S):
    """Sweeps of excite weights that are loaded before the squeeze vector is complete."""
    return max(1, min(S.sweeps, AHEAD_REGISTERS // (4 * S.squeeze_depths)))


@gluon.jit
def load_excite(excite_ptr, sweep, dtype: gl.constexpr, S: gl.constexpr):
    """Of 128 gates."""
    pointer = excite_ptr + sweep * (S.squeeze_depths * UNIT * WARPS // 2)
    return load_operands(pointer, sweep < S.sweeps, fixed(S.squeeze_depths), dtype)


@gluon.jit
def store_vector(squeezed, vector, S: gl.constexpr):
    """The squeeze vector without its bias, [2 parts, 16], from each warp's shares."""
    for part in gl.static_range(fixed(S.squeeze_parts)):
        # Warps, halves of 16 channels, 8 channels, which 16 of 32, shares.
        shares = squeezed[part].reshape((WARPS, 2, 8, 2, 8))
        sums = gl.sum(gl.sum(shares, axis=4), axis=0).permute((2, 0, 1)).reshape((32,))
        vector.index(2 * part)._reinterpret(gl.float32, [32], plain_layout(1)).store(sums)


@gluon.jit
def excite(squeezed, vector, gates, squeeze_bias_ptr, excite_ptr, excite_bias_ptr, S: gl.constexpr):
    """Gates of all hidden channels, from each warp's shares of the squeeze vector.

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
    biases = ()
    for sweep in gl.static_range(fixed(S.sweeps)):
        biases = biases + (gl.load(excite_bias_ptr + sweep * HIDDEN + gl.arange(0, HIDDEN, ROWS)),)
    squeeze_biases = ()
    for depth in gl.static_range(fixed(S.squeeze_depths)):
        squeeze_biases = squeeze_biases + (gl.load(squeeze_bias_ptr + depth * 16 + gl.arange(0, 16, COLUMNS)),)
    store_vector(squeezed, vector, S)
    gl.thread_barrier()
    like = zeros(HIDDEN, TILE, dtype, tile_layout())
    right = ()
    for depth in gl.static_range(fixed(S.squeeze_depths)):
        part = gl.maximum(vector.index(depth).load(COLUMNS) + squeeze_biases[depth], 0.0).to(dtype)
        part, _ = gl.broadcast(part[None, :], like)
        right = right + (part,)
    for sweep in gl.static_range(fixed(S.sweeps)):
        sums = zeros(HIDDEN, TILE, gl.float32, tile_layout())
        for depth in gl.static_range(fixed(S.squeeze_depths)):
            sums = add_products(weights[sweep][depth // 2], right[depth], sums, fixed((depth % 2,)))
        if sweep + AHEAD < S.sweeps:
            weights = weights + (load_excite(excite_ptr, sweep + AHEAD, dtype, S),)
        gate = gl.sum(sums, axis=1) * 0.125 + biases[sweep]
        gate = 1.0 / (1.0 + gl.exp(-gate))
        view = gates.index(sweep * HIDDEN // S.step)
        view._reinterpret(dtype, [HIDDEN], plain_layout(1)).store(gate.to(dtype))
    gl.thread_barrier()

"""Between the phases of the Hopper kernel of the MBConv block: excite, a gate for each hidden channel."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fusion.triton_kernels.hopper_layouts import plain_layout
from fusion.triton_kernels.hopper_parts import fixed
from fusion.triton_kernels.mbconv_hopper_spec import WARPS

AHEAD_ELEMENTS = 64 * 2 * 32 * WARPS.value
"""Excite weights on their way together: 64 registers of each thread."""


@gluon.constexpr_function
def excite_layout(S):
    """[gates, squeeze]: 16 bytes a thread."""
    lanes = min(32, S.squeeze // 8)
    return gl.BlockedLayout([1, 8], [32 // lanes, lanes], [WARPS.value, 1], [1, 0])


@gluon.constexpr_function
def excite_ahead(S):
    """Times that excite weights are loaded before the squeeze vector is complete."""
    return max(1, min(S.gates // S.gate_count, AHEAD_ELEMENTS // (S.gate_count * S.squeeze)))


@gluon.jit
def load_excite(excite_ptr, step, S: gl.constexpr):
    """[gates, squeeze]"""
    LAYOUT: gl.constexpr = excite_layout(S)
    row = step * S.gate_count + gl.arange(0, S.gate_count, gl.SliceLayout(1, LAYOUT))
    return gl.load(excite_ptr + row[:, None] * S.squeeze + gl.arange(0, S.squeeze, gl.SliceLayout(0, LAYOUT))[None, :])


@gluon.jit
def excite(squeezed, vector, gates, squeeze_bias_ptr, excite_ptr, excite_bias_ptr, S: gl.constexpr):
    """Gates of all hidden channels, from shares [warps, 4, squeeze] of the squeeze vector.

    All loads but the last weights' start before anything waits for another warp.
    """
    LAYOUT: gl.constexpr = excite_layout(S)
    STEPS: gl.constexpr = S.gates // S.gate_count
    AHEAD: gl.constexpr = excite_ahead(S)
    row = gl.arange(0, S.gate_count, gl.SliceLayout(1, LAYOUT))
    weights = ()
    for step in gl.static_range(AHEAD):
        weights = weights + (load_excite(excite_ptr, step, S),)
    biases = ()
    for step in gl.static_range(STEPS):
        biases = biases + (gl.load(excite_bias_ptr + step * S.gate_count + row),)
    bias = gl.load(squeeze_bias_ptr + gl.arange(0, S.squeeze, gl.SliceLayout(0, LAYOUT)))
    vector.store(gl.sum(gl.sum(squeezed, axis=1), axis=0))
    gl.thread_barrier()
    v = gl.maximum(vector.load(gl.SliceLayout(0, LAYOUT)) + bias, 0.0)[None, :]
    for step in gl.static_range(STEPS):
        gate = gl.sum(weights[step].to(gl.float32) * v, axis=1) + biases[step]
        if step + AHEAD < STEPS:
            weights = weights + (load_excite(excite_ptr, step + AHEAD, S),)
        gate = 1.0 / (1.0 + gl.exp(-gate))
        view = gates.index(step * S.gate_count // S.step)
        view._reinterpret(gates.dtype, [fixed(S.gate_count)], plain_layout(1)).store(gate.to(gates.dtype))
    gl.thread_barrier()

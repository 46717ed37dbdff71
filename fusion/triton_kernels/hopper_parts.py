"""What the Hopper kernels have in common: small stages, and what the compiler has to be told."""

from functools import cache

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fusion.planner.slabs import NARROWEST
from fusion.triton_kernels.hopper_layouts import (
    hidden_bias_layout,
    plain_layout,
    rows_layout,
    sum_layout,
    thread_layout,
)

BIAS_ROW = gl.constexpr(NARROWEST)
"""Elements of the output's bias that share an index: slabs start at multiples of it."""


@gluon.constexpr_function
def fixed(value):
    """Bounds of a static loop must be constexpr, which arithmetic on attributes of `Spec` alone does not make."""
    return value


@gluon.constexpr_function
def slab_start(slabs, index):
    """First channel of slab `index`."""
    return sum(slabs[:index])


@gluon.jit
def zeros(ROWS: gl.constexpr, COLUMNS: gl.constexpr, dtype: gl.constexpr, LAYOUT: gl.constexpr):
    return gl.zeros((ROWS, COLUMNS), dtype, LAYOUT)


@gluon.jit
def join_columns(a, b):
    """[block, n], [block, n] -> [block, 2 n]"""
    return gl.join(a, b).permute((0, 2, 1)).reshape((a.shape[0], 2 * a.shape[1]))


@gluon.jit
def split_columns(x):
    """[block, 2 n] -> [block, n], [block, n]"""
    return gl.split(x.reshape((x.shape[0], 2, x.shape[1] // 2)).permute((0, 2, 1)))


@gluon.jit
def split_units(x, UNIT: gl.constexpr):
    """[block, channels] -> channels / unit of [block, unit]"""
    if x.shape[1] == UNIT:
        return (x,)
    else:
        a, b = split_columns(x)
        return split_units(a, UNIT) + split_units(b, UNIT)


@gluon.jit
def moved(matrices, zero):
    """[count, rows, columns], from a first matrix on that the compiler does not know."""
    SHAPE: gl.constexpr = [matrices.shape[0], matrices.shape[1], matrices.shape[2]]
    return matrices.index(zero)._reinterpret(matrices.dtype, SHAPE, matrices.layout)


@gluon.jit
def taps(w, PIECE_INDEX: gl.constexpr, COLUMN: gl.constexpr, FIRST: gl.constexpr, ROWS: gl.constexpr):
    """Weights of one column's taps to `ROWS` output rows, [16, 16 ROWS]; the last tap comes first."""
    view = w.index((PIECE_INDEX * 3 + COLUMN + 1) * 3 + FIRST)
    return view._reinterpret(w.dtype, [16 * ROWS, 16], rows_layout(16)).permute((1, 0))


@gluon.jit
def activate(h, bias, dtype: gl.constexpr):
    """relu(h + bias) of fp32 sums and a 16-bit bias, in 16 bits, two elements an instruction."""
    if dtype == gl.float16:
        return gl.inline_asm_elementwise(
            "{ .reg .b32 t, one; mov.b32 one, 0x3C003C00; cvt.rn.f16x2.f32 t, $2, $1; "
            "fma.rn.relu.f16x2 $0, t, one, $3; }",
            "=r,r,r,r",
            [h, bias],
            dtype=gl.float16,
            is_pure=True,
            pack=2,
        )
    else:
        return gl.inline_asm_elementwise(
            "{ .reg .b32 t, one; mov.b32 one, 0x3F803F80; cvt.rn.bf16x2.f32 t, $2, $1; "
            "fma.rn.relu.bf16x2 $0, t, one, $3; }",
            "=r,r,r,r",
            [h, bias],
            dtype=gl.bfloat16,
            is_pure=True,
            pack=2,
        )


@gluon.jit
def hidden_bias(bias, step, S: gl.constexpr):
    """[1, hidden], 16 bits."""
    b = bias.index(step).load(hidden_bias_layout(S.hidden))
    b = b.reshape((4, S.hidden // 8, 2)).permute((1, 0, 2)).reshape((S.hidden,))
    columns: gl.constexpr = gl.SliceLayout(0, sum_layout(S.hidden))
    return gl.convert_layout(b, columns, assert_trivial=True)[None, :]


@gluon.jit
def load_out_bias(pointer, dtype: gl.constexpr, S: gl.constexpr):
    """[sum of output slabs] in 16 bits, in shared memory."""
    ROWS: gl.constexpr = slab_start(S.out_slabs, len(S.out_slabs)) // BIAS_ROW
    out_bias = gl.allocate_shared_memory(dtype, [ROWS, BIAS_ROW], plain_layout(1))
    for s in gl.static_range(len(S.out_slabs)):
        store_bias_slab(out_bias, pointer, slab_start(S.out_slabs, s), S.out_slabs[s])
    return out_bias


@gluon.jit
def store_bias_slab(out_bias, pointer, FIRST: gl.constexpr, SLAB: gl.constexpr):
    values = gl.load(pointer + FIRST + gl.arange(0, SLAB, thread_layout()))
    bias_slab(out_bias, FIRST, SLAB).store(values.to(out_bias.dtype))


@gluon.jit
def bias_slab(out_bias, FIRST: gl.constexpr, SLAB: gl.constexpr):
    """[SLAB] of the output's bias."""
    return out_bias.index(FIRST // BIAS_ROW)._reinterpret(out_bias.dtype, [SLAB], plain_layout(1))


@gluon.jit
def run_in_every_thread(TEXT: gl.constexpr):
    """PTX, the last instruction of which copies $1 to $0."""
    thread = gl.arange(0, 32 * gl.num_warps(), gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    gl.inline_asm_elementwise(TEXT, "=r,r", [thread], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def wait_for_previous_kernel():
    """Wait until the kernel ahead in the stream has finished, and let the one behind start."""
    run_in_every_thread("griddepcontrol.wait; griddepcontrol.launch_dependents; mov.b32 $0, $1;")


@gluon.jit
def fence_async_global():
    """What this thread has written to global memory is there for TMA, once all threads have met."""
    run_in_every_thread("fence.proxy.async.global; mov.b32 $0, $1;")


@cache
def processor_count(device: int) -> int:
    """Streaming multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count

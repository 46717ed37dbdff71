"""Activations of fp32 sums by instructions that Triton has no name for; in the interpreter by what they stand for."""

import triton
import triton.language as tl

NATIVE = tl.constexpr(not triton.knobs.runtime.interpret)
"""The interpreter has no inline assembly."""


@triton.jit
def silu_of_double(u):
    """x sigmoid(x) of x = 2 u, as u + u tanh(u): one special function, where a sigmoid takes two."""
    if NATIVE:
        t = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [u], dtype=tl.float32, is_pure=True, pack=1)
        return u + u * t
    return 2 * u * tl.sigmoid(2 * u)


@triton.jit
def rounded_relu(x, dtype: tl.constexpr):
    """max(x, 0) in fp16 or bf16, two of them by one conversion."""
    if NATIVE:
        if dtype == tl.float16:
            asm: tl.constexpr = "cvt.rn.relu.f16x2.f32 $0, $2, $1;"
            return tl.inline_asm_elementwise(asm, "=r,f,f", [x], dtype=tl.float16, is_pure=True, pack=2)
        else:
            asm: tl.constexpr = "cvt.rn.relu.bf16x2.f32 $0, $2, $1;"
            return tl.inline_asm_elementwise(asm, "=r,f,f", [x], dtype=tl.bfloat16, is_pure=True, pack=2)
    return tl.maximum(x, 0.0).to(dtype)

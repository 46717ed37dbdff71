"""Activations of fp32 values, natively and in the interpreter."""

import triton
import triton.language as tl

SQRT_HALF = tl.constexpr(0.5**0.5)


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """`x` after an activation, one of `fusion.reference.EDGE_ACTIVATIONS`; all of them leave zero as it is."""
    if ACTIVATION == "relu":
        x = tl.maximum(x, 0.0)
    elif ACTIVATION == "silu":
        x = x * tl.sigmoid(x)
    elif ACTIVATION == "relu6":
        x = tl.minimum(tl.maximum(x, 0.0), 6.0)
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * SQRT_HALF))
    elif ACTIVATION == "hardswish":
        x = x * (tl.minimum(tl.maximum(x + 3.0, 0.0), 6.0) * (1 / 6))
    else:
        tl.static_assert(ACTIVATION == "none", "the activation is not supported")
    return x

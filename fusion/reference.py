"""Blocks in plain PyTorch: what the operators compute on a CPU, and what kernels are judged by in float64."""

import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {"relu": F.relu, "silu": F.silu}
ERROR_FACTOR = 2
"""Largest error of a kernel against float64, as a multiple of eager PyTorch's in the same dtype."""


def convfirst(
    x: Tensor,
    conv: Tensor,
    expand: Tensor,
    expand_bias: Tensor,
    project: Tensor,
    project_bias: Tensor,
    activation: str,
    residual: bool,
) -> Tensor:
    """ConvFirst block (section 5.3) of `x` `[N, C, H, W]` in the dtype of `x`: `[N, K, H, W]`.

    Weights as in `fusion.weights.ConvFirstWeights`, of any dtype; the arithmetic is that of `x`.
    """
    y = F.conv2d(x, conv.to(x.dtype), padding=1, groups=x.shape[1] // conv.shape[1])
    z = ffn(y, expand, expand_bias, project, project_bias, activation, residual=False)
    return x + z if residual else z


def ffn(
    x: Tensor,
    expand: Tensor,
    expand_bias: Tensor,
    project: Tensor,
    project_bias: Tensor,
    activation: str,
    residual: bool,
) -> Tensor:
    """FFN block (section 5.2) of `x` `[N, C, H, W]` in the dtype of `x`: `[N, K, H, W]`.

    Weights as in `fusion.ffn_weights.FfnWeights`, of any dtype; the arithmetic is that of `x`.
    """
    expand, expand_bias, project, project_bias = (w.to(x.dtype) for w in (expand, expand_bias, project, project_bias))
    h = ACTIVATIONS[activation](F.conv2d(x, expand[:, :, None, None], expand_bias))
    z = F.conv2d(h, project[:, :, None, None], project_bias)
    return x + z if residual else z


def relative_error(out: Tensor, expected: Tensor) -> float:
    """Relative L2 error of `out` against `expected` in float64; NaN if `out` holds a NaN."""
    return ((out.double() - expected).norm() / expected.norm()).item()

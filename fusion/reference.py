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


def mbconv(
    x: Tensor,
    expand: Tensor,
    expand_bias: Tensor,
    conv: Tensor,
    conv_bias: Tensor,
    squeeze: Tensor,
    squeeze_bias: Tensor,
    excite: Tensor,
    excite_bias: Tensor,
    project: Tensor,
    project_bias: Tensor,
    activation: str,
    residual: bool,
) -> Tensor:
    """MBConv block (section 5.4) of `x` `[N, C, H, W]` in the dtype of `x`: `[N, K, H, W]`.

    Weights as in `fusion.mbconv_weights.MBConvWeights`, of any dtype; the arithmetic is that of `x`.
    """
    weights = (expand, expand_bias, conv, conv_bias, squeeze, squeeze_bias, excite, excite_bias, project, project_bias)
    expand, expand_bias, conv, conv_bias, squeeze, squeeze_bias, excite, excite_bias, project, project_bias = (
        w.to(x.dtype) for w in weights
    )
    act = ACTIVATIONS[activation]
    h = act(F.conv2d(x, expand[:, :, None, None], expand_bias))
    y = act(F.conv2d(h, conv, conv_bias, padding=1, groups=h.shape[1] // conv.shape[1]))
    squeezed = F.relu(F.linear(y.mean((2, 3)), squeeze, squeeze_bias))
    gate = F.sigmoid(F.linear(squeezed, excite, excite_bias))
    z = F.conv2d(y * gate[:, :, None, None], project[:, :, None, None], project_bias)
    return x + z if residual else z


def relative_error(out: Tensor, expected: Tensor) -> float:
    """Relative L2 error of `out` against `expected` in float64; NaN if `out` holds a NaN."""
    return ((out.double() - expected).norm() / expected.norm()).item()

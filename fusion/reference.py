"""Blocks in plain PyTorch: what the operators compute on a CPU, and what kernels are judged by in float64."""

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {"relu": F.relu, "silu": F.silu, "relu6": F.relu6, "gelu": F.gelu, "hardswish": F.hardswish}
"""By name; GELU is the exact one, by the error function."""
SQUEEZE_ACTIVATIONS = {"relu": F.relu, "silu": F.silu}
"""Of a squeeze layer."""
EDGE_ACTIVATIONS = {**ACTIVATIONS, "none": lambda x: x}
"""Of a network's first and last convolution."""
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
    stride: int = 1,
) -> Tensor:
    """ConvFirst block (section 5.3) of `x` `[N, C, H, W]` in its dtype: `[N, K, ceil(H / stride), ceil(W / stride)]`.

    `stride` is that of the grouped convolution. Weights as in `fusion.weights.ConvFirstWeights`, `expand` being
    `[hidden, C]`, of any dtype; the arithmetic is that of `x`.
    """
    y = F.conv2d(x, conv.to(x.dtype), stride=stride, padding=1, groups=x.shape[1] // conv.shape[1])
    z = ffn(y, expand, expand_bias, project, project_bias, activation, residual=False)
    return x + z if residual else z


def convfirst_down(
    x: Tensor,
    conv: Tensor,
    expand: Tensor,
    expand_bias: Tensor,
    project: Tensor,
    project_bias: Tensor,
    activation: str,
) -> Tensor:
    """Stride-2 ConvFirst block with its blur-pool (section 5.3) of `x` `[N, C, H, W]` in its dtype:
    `[N, K, ceil(H / 2), ceil(W / 2)]`.

    Weights as in `fusion.weights.ConvFirstWeights`, `expand` being `[hidden, 2 C]`, of any dtype; the arithmetic is
    that of `x`. H and W must be at least 2 (torch raises RuntimeError otherwise).
    """
    y = F.conv2d(x, conv.to(x.dtype), padding=1, groups=x.shape[1] // conv.shape[1])
    y = blur_pool(torch.cat([x, y], dim=1))
    return ffn(y, expand, expand_bias, project, project_bias, activation, residual=False)


def blur_pool(x: Tensor) -> Tensor:
    """[1, 2, 1] / 4 in each direction, stride 2, reflection padding 1: `[N, C, ceil(H / 2), ceil(W / 2)]`."""
    channels = x.shape[1]
    triangle = torch.tensor([0.25, 0.5, 0.25], dtype=x.dtype, device=x.device)
    filter = triangle.outer(triangle).expand(channels, 1, 3, 3)
    return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), filter, stride=2, groups=channels)


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
    squeeze_activation: str = "relu",
) -> Tensor:
    """MBConv block (section 5.4) of `x` `[N, C, H, W]` in the dtype of `x`: `[N, K, H, W]`.

    Weights as in `fusion.mbconv_weights.MBConvWeights`, of any dtype; the arithmetic is that of `x`.
    """
    weights = (expand, expand_bias, conv, conv_bias, squeeze, squeeze_bias, excite, excite_bias, project, project_bias)
    expand, expand_bias, conv, conv_bias, *gated = (w.to(x.dtype) for w in weights)
    y = _expanded_conv(x, expand, expand_bias, conv, conv_bias, activation)
    z = _gated_projection(y, *gated, squeeze_activation)
    return x + z if residual else z


def mbconv_down(
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
    squeeze_activation: str = "relu",
    blur: bool = True,
) -> Tensor:
    """Stride-2 MBConv block (section 5.4) of `x` `[N, C, H, W]` in its dtype: `[N, K, ceil(H / 2), ceil(W / 2)]`.

    Weights as in `fusion.mbconv_weights.MBConvWeights`, of any dtype; the arithmetic is that of `x`. The convolution
    is followed by a blur-pool, for which H and W must be at least 2 (torch raises RuntimeError otherwise), or, if not
    `blur`, has stride 2 itself.
    """
    weights = (expand, expand_bias, conv, conv_bias, squeeze, squeeze_bias, excite, excite_bias, project, project_bias)
    expand, expand_bias, conv, conv_bias, *gated = (w.to(x.dtype) for w in weights)
    y = _expanded_conv(x, expand, expand_bias, conv, conv_bias, activation, stride=1 if blur else 2)
    y = blur_pool(y) if blur else y
    return _gated_projection(y, *gated, squeeze_activation)


def _expanded_conv(
    x: Tensor, expand: Tensor, expand_bias: Tensor, conv: Tensor, conv_bias: Tensor, activation: str, stride: int = 1
) -> Tensor:
    act = ACTIVATIONS[activation]
    h = act(F.conv2d(x, expand[:, :, None, None], expand_bias))
    return act(F.conv2d(h, conv, conv_bias, stride, padding=conv.shape[-1] // 2, groups=h.shape[1] // conv.shape[1]))


def _gated_projection(
    y: Tensor,
    squeeze: Tensor,
    squeeze_bias: Tensor,
    excite: Tensor,
    excite_bias: Tensor,
    project: Tensor,
    project_bias: Tensor,
    activation: str,
) -> Tensor:
    squeezed = SQUEEZE_ACTIVATIONS[activation](F.linear(y.mean((2, 3)), squeeze, squeeze_bias))
    gate = F.sigmoid(F.linear(squeezed, excite, excite_bias))
    return F.conv2d(y * gate[:, :, None, None], project[:, :, None, None], project_bias)


def stem(x: Tensor, conv: Tensor, bias: Tensor, activation: str) -> Tensor:
    """Dense 3x3 convolution of stride 2 of `x` `[N, C, H, W]` in its dtype: `[N, K, ceil(H / 2), ceil(W / 2)]`.

    Weights as in `fusion.edge_weights.StemWeights`, of any dtype; the arithmetic is that of `x`.
    """
    y = F.conv2d(x, conv.to(x.dtype), bias.to(x.dtype), stride=2, padding=1)
    return EDGE_ACTIVATIONS[activation](y)


def stem_convfirst(
    x: Tensor,
    stem_conv: Tensor,
    stem_bias: Tensor,
    conv: Tensor,
    expand: Tensor,
    expand_bias: Tensor,
    project: Tensor,
    project_bias: Tensor,
    activation: str,
    residual: bool,
) -> Tensor:
    """Stem and ConvFirst block of `x` `[N, C, H, W]` in its dtype, `stem` and then `convfirst`, both with `activation`:
    `[N, K, ceil(H / 2), ceil(W / 2)]`."""
    y = stem(x, stem_conv, stem_bias, activation)
    return convfirst(y, conv, expand, expand_bias, project, project_bias, activation, residual)


def head(x: Tensor, conv: Tensor, bias: Tensor, activation: str) -> Tensor:
    """1x1 convolution and global average pool of `x` `[N, C, H, W]` in its dtype: `[N, K]`.

    Weights as in `fusion.edge_weights.HeadWeights`, of any dtype; the arithmetic is that of `x`.
    """
    return head_features(x, conv, bias, activation).mean((2, 3))


def head_features(x: Tensor, conv: Tensor, bias: Tensor, activation: str) -> Tensor:
    """What `head` pools: `[N, K, H, W]`."""
    y = F.conv2d(x, conv.to(x.dtype)[:, :, None, None], bias.to(x.dtype))
    return EDGE_ACTIVATIONS[activation](y)


def relative_error(out: Tensor, expected: Tensor) -> float:
    """Relative L2 error of `out` against `expected` in float64; NaN if `out` holds a NaN."""
    return ((out.double() - expected).norm() / expected.norm()).item()

"""Stride-2 ConvFirst blocks as PyTorch operators, for inference only."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import triton_op, wrap_triton

from fusion import reference
from fusion.convfirst_down_weights import unpack_expand, unpack_taps
from fusion.op_checks import (
    any_of,
    check_input,
    check_weights,
    empty_output,
    gradient_refusal,
    refuse_malformed,
    tile_from_ints,
    weight_dtype,
)
from fusion.planner.convfirst_down_tile import BORDERS, MIN_SIZE, TAPS, ConvFirstDownTile, regions, why_malformed


@triton_op("fusion::convfirst_down", mutates_args=())
def convfirst_down(
    x: Tensor,
    conv: Tensor,
    expand: Tensor,
    expand_bias: Tensor,
    project: Tensor,
    project_bias: Tensor,
    hidden_channels: int,
    out_channels: int,
    group_width: int,
    activation: str,
    tile: list[int],
) -> Tensor:
    """ConvFirst block of stride 2 (section 5.3) as one kernel: `[N, C, H, W] -> [N, K, ceil(H / 2), ceil(W / 2)]`.

    Grouped 3x3 convolution with zero padding 1, its input and output concatenated and blur-pooled with reflection, 1x1
    expand with bias, `activation` (one of `fusion.reference.ACTIVATIONS`), 1x1 project with bias. All sums are fp32,
    the result is channels_last.

    Args:
        x: fp16 or bf16 activations with H and W of at least 2. Any other memory format than channels_last is converted
            first, at the cost of a copy. On a CPU any floating dtype will do: there PyTorch computes the same, with the
            packed taps.
        conv, expand, expand_bias, project, project_bias: `fusion.convfirst_down_weights.PackedConvFirstDown`, packed
            for `tile`.
        hidden_channels, out_channels, group_width: sizes without their padding.
        tile: `ConvFirstDownTile.to_ints()`.

    Raises:
        RuntimeError: a gradient would be needed, or the tensors are on several devices.
        TypeError: a dtype is not supported.
        ValueError: shapes, activation or tile do not fit together.
    """
    config = tile_from_ints("fusion::convfirst_down", ConvFirstDownTile, tile)
    packed = conv, expand, expand_bias, project, project_bias
    _check(x, *packed, hidden_channels, out_channels, group_width, config)
    if activation not in reference.ACTIVATIONS:
        raise ValueError(
            f"fusion::convfirst_down: activation {activation!r} is not supported, use {any_of(reference.ACTIVATIONS)}"
        )
    x = x.contiguous(memory_format=torch.channels_last)
    if x.device.type == "cpu":
        return _on_cpu(x, *packed, hidden_channels, out_channels, group_width, activation, config)

    from fusion.triton_kernels.convfirst_down import convfirst_down_kernel, launch

    out = empty_output(x, out_channels, stride=2)
    if x.numel():
        with torch.cuda.device(x.device):
            launch(x, *packed, out, activation=activation, tile=config, kernel=wrap_triton(convfirst_down_kernel))
    return out


convfirst_down.register_autograd(lambda ctx, grad: None, setup_context=gradient_refusal("fusion::convfirst_down"))


def _check(
    x: Tensor,
    conv: Tensor,
    expand: Tensor,
    expand_bias: Tensor,
    project: Tensor,
    project_bias: Tensor,
    hidden_channels: int,
    out_channels: int,
    group_width: int,
    tile: ConvFirstDownTile,
) -> None:
    op = "fusion::convfirst_down"
    check_input(op, x, out_channels)
    _, in_channels, height, width = x.shape
    if min(height, width) < MIN_SIZE:
        raise ValueError(
            f"{op}: images of {height}x{width} pixels cannot be blur-pooled, whose reflection needs {MIN_SIZE} each "
            "way; pad them"
        )
    if group_width < 1 or in_channels % group_width:
        raise ValueError(f"{op}: {in_channels} channels do not divide into groups of {group_width}")
    refuse_malformed(op, tile, why_malformed(tile))
    slabs = tile.in_slabs(in_channels)
    if tile.splits_groups(in_channels, group_width):
        raise ValueError(f"{op}: slabs {slabs} of {tile!r} split groups of {group_width} channels")
    in_padded, out_padded = sum(slabs), sum(tile.out_slabs(out_channels))
    hidden = tile.padded_hidden(hidden_channels)
    check_weights(
        op,
        x,
        hidden_channels,
        out_channels,
        tile,
        "fusion.convfirst_down_weights.pack_convfirst_down",
        (
            ("conv", conv, [BORDERS * sum(TAPS * 2 * slab * slab for slab in slabs)], weight_dtype(x)),
            ("expand", expand, [2 * in_padded, hidden], weight_dtype(x)),
            ("expand_bias", expand_bias, [hidden], torch.float32),
            ("project", project, [hidden, out_padded], weight_dtype(x)),
            ("project_bias", project_bias, [out_padded], torch.float32),
        ),
    )


def _on_cpu(
    x: Tensor,
    conv: Tensor,
    expand: Tensor,
    expand_bias: Tensor,
    project: Tensor,
    project_bias: Tensor,
    hidden_channels: int,
    out_channels: int,
    group_width: int,
    activation: str,
    tile: ConvFirstDownTile,
) -> Tensor:
    _, channels, height, width = x.shape
    slabs = tile.in_slabs(channels)
    taps = unpack_taps(conv, slabs, channels, group_width).to(x.dtype)
    kinds = regions(height, width)

    def convolved(border: int) -> Tensor:
        top, rows, left, columns = kinds[border]
        everywhere = F.conv2d(x, taps[border], stride=2, padding=2, groups=channels // group_width)
        return everywhere[..., top : top + rows, left : left + columns]

    # Regions are told as inner, first and last ones.
    y = torch.cat([torch.cat([convolved(3 * row + column) for column in (1, 0, 2)], 3) for row in (1, 0, 2)], 2)
    out = reference.ffn(
        torch.cat([reference.blur_pool(x), y], dim=1),
        unpack_expand(expand, slabs, channels)[:, :hidden_channels].T,
        expand_bias[:hidden_channels],
        project[:hidden_channels, :out_channels].T,
        project_bias[:out_channels],
        activation,
        residual=False,
    )
    return out.contiguous(memory_format=torch.channels_last)

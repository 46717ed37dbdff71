"""Fused blocks as PyTorch operators, for inference only."""

import torch
from torch import Tensor
from torch.library import custom_op, triton_op, wrap_triton

from fusion import reference
from fusion.ffn_weights import PackedFfn, ffn_sizes, unpack_ffn
from fusion.op_checks import (
    aligned,
    any_of,
    check_gpu,
    check_input,
    check_residual,
    check_weights,
    empty_output,
    gradient_refusal,
    is_too_many,
    refuse_malformed,
    tile_from_ints,
    weight_dtype,
)
from fusion.planner import ffn_tile, hopper_tile
from fusion.planner.ffn_tile import MAX_PIXELS, FfnTile
from fusion.planner.hopper_tile import HopperTile, weight_sizes
from fusion.planner.tile import ConvFirstTile, why_malformed
from fusion.weights import unpack_conv, unpack_hopper

OTHER_CONVFIRST = "pack the weights for a ConvFirstTile and call fusion::convfirst, for any GPU"
"""What to do on other GPUs than Hopper's."""


@triton_op("fusion::convfirst", mutates_args=())
def convfirst(
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
    residual: bool,
    stride: int,
    tile: list[int],
) -> Tensor:
    """ConvFirst block (section 5.3) as one kernel: `[N, C, H, W] -> [N, K, ceil(H / stride), ceil(W / stride)]`.

    Grouped 3x3 convolution of stride 1 or 2 with zero padding 1, 1x1 expand with bias, `activation` (one of
    `fusion.reference.ACTIVATIONS`), 1x1 project with bias, and with `residual` the input added. All sums are fp32;
    the result is channels_last. With stride 2 there is no residual.

    Args:
        x: fp16 or bf16 activations. Any other memory format than channels_last is converted first, at the cost of a
            copy. On a CPU any floating dtype will do: there the operator computes the reference.
        conv, expand, expand_bias, project, project_bias: `fusion.weights.PackedConvFirst`, packed for `tile`.
        hidden_channels, out_channels, group_width: sizes without their padding.
        tile: `ConvFirstTile.to_ints()`.

    Raises:
        RuntimeError: a gradient would be needed, or the tensors are on several devices.
        TypeError: a dtype is not supported.
        ValueError: shapes, activation or tile do not fit together.
    """
    config = tile_from_ints("fusion::convfirst", ConvFirstTile, tile)
    _check_convfirst(
        x, conv, expand, expand_bias, project, project_bias, hidden_channels, out_channels, group_width, config
    )
    if activation not in reference.ACTIVATIONS:
        raise ValueError(
            f"fusion::convfirst: activation {activation!r} is not supported, use {any_of(reference.ACTIVATIONS)}"
        )
    _check_stride(stride, residual)
    check_residual("fusion::convfirst", residual, x.shape[1], out_channels)
    x = x.contiguous(memory_format=torch.channels_last)
    if x.device.type == "cpu":
        out = reference.convfirst(
            x,
            unpack_conv(conv, config.in_slabs(x.shape[1]), x.shape[1], group_width),
            expand[: x.shape[1], :hidden_channels].T,
            expand_bias[:hidden_channels],
            project[:hidden_channels, :out_channels].T,
            project_bias[:out_channels],
            activation,
            residual,
            stride,
        )
        return out.contiguous(memory_format=torch.channels_last)

    from fusion.triton_kernels.convfirst import convfirst_kernel, launch

    out = empty_output(x, out_channels, stride)
    if x.numel():
        with torch.cuda.device(x.device):
            launch(
                x,
                conv,
                expand,
                expand_bias,
                project,
                project_bias,
                out,
                activation=activation,
                residual=residual,
                stride=stride,
                tile=config,
                kernel=wrap_triton(convfirst_kernel),
            )
    return out


convfirst.register_autograd(lambda ctx, grad: None, setup_context=gradient_refusal("fusion::convfirst"))


def _check_stride(stride: int, residual: bool) -> None:
    if stride not in (1, 2):
        raise ValueError(f"fusion::convfirst: stride {stride} is not supported, use 1 or 2")
    if residual and stride != 1:
        raise ValueError(
            f"fusion::convfirst: a residual cannot be added to the smaller output of stride {stride}; use stride 1, or "
            "pass residual=False"
        )


def _check_convfirst(
    x: Tensor,
    conv: Tensor,
    expand: Tensor,
    expand_bias: Tensor,
    project: Tensor,
    project_bias: Tensor,
    hidden_channels: int,
    out_channels: int,
    group_width: int,
    tile: ConvFirstTile,
) -> None:
    check_input("fusion::convfirst", x, out_channels)
    in_channels = x.shape[1]
    if group_width < 1 or in_channels % group_width:
        raise ValueError(f"fusion::convfirst: {in_channels} channels do not divide into groups of {group_width}")
    refuse_malformed("fusion::convfirst", tile, why_malformed(tile))
    in_slabs = tile.in_slabs(in_channels)
    if tile.splits_groups(in_channels, group_width):
        raise ValueError(f"fusion::convfirst: slabs {in_slabs} of {tile!r} split groups of {group_width} channels")
    in_padded, out_padded = sum(in_slabs), sum(tile.out_slabs(out_channels))
    hidden = tile.padded_hidden(hidden_channels)
    check_weights(
        "fusion::convfirst",
        x,
        hidden_channels,
        out_channels,
        tile,
        "fusion.weights.ConvFirstWeights.pack",
        (
            ("conv", conv, [sum(9 * slab * slab for slab in in_slabs)], weight_dtype(x)),
            ("expand", expand, [in_padded, hidden], weight_dtype(x)),
            ("expand_bias", expand_bias, [hidden], torch.float32),
            ("project", project, [hidden, out_padded], weight_dtype(x)),
            ("project_bias", project_bias, [out_padded], torch.float32),
        ),
    )


@custom_op("fusion::convfirst_hopper", mutates_args=())
def convfirst_hopper(
    x: Tensor,
    weights: Tensor,
    project_bias: Tensor,
    hidden_channels: int,
    out_channels: int,
    residual: bool,
    tile: list[int],
) -> Tensor:
    """ConvFirst block (section 5.3) with ReLU and groups of 8 channels as one kernel for Hopper GPUs.

    `[N, C, H, W] -> [N, K, H, W]`, channels_last. It computes what `fusion::convfirst` does, but rounds the biases to
    the dtype of `x` and adds them in it: the hidden bias to the rounded sums, the output's bias to the input.

    Args:
        x: fp16 or bf16 activations. Any other memory format than channels_last, or an address that is no multiple of
            16 bytes, costs a copy. On a CPU any floating dtype will do: there the operator computes the reference.
        weights, project_bias: `fusion.weights.PackedHopper`, packed for `tile`. The kernel reads them before the kernel
            ahead of it in the stream has finished: that one must not be what writes them.
        hidden_channels, out_channels: sizes without their padding.
        tile: `HopperTile.to_ints()`.

    Raises:
        RuntimeError: the GPU is not of compute capability 9.0, a gradient would be needed, or the tensors are on
            several devices.
        TypeError: a dtype is not supported.
        ValueError: shapes and tile do not fit together.
    """
    config = _check_convfirst_hopper(x, weights, project_bias, hidden_channels, out_channels, residual, tile)
    x = x.contiguous(memory_format=torch.channels_last)
    if x.device.type == "cpu":
        conv, expand, expand_bias, project = unpack_hopper(weights, config, x.shape[1], hidden_channels, out_channels)
        out = reference.convfirst(x, conv, expand, expand_bias, project, project_bias[:out_channels], "relu", residual)
        return out.contiguous(memory_format=torch.channels_last)
    check_gpu("fusion::convfirst_hopper", x.device, OTHER_CONVFIRST)
    x = aligned("fusion::convfirst_hopper", x, weights)

    from fusion.triton_kernels.convfirst_hopper import launch

    out = empty_output(x, out_channels)
    if x.numel():
        with torch.cuda.device(x.device):
            launch(x, weights, project_bias, out, hidden_channels=hidden_channels, residual=residual, tile=config)
    return out


@convfirst_hopper.register_fake
def _(
    x: Tensor,
    weights: Tensor,
    project_bias: Tensor,
    hidden_channels: int,
    out_channels: int,
    residual: bool,
    tile: list[int],
) -> Tensor:
    _check_convfirst_hopper(x, weights, project_bias, hidden_channels, out_channels, residual, tile)
    return empty_output(x, out_channels)


convfirst_hopper.register_autograd(lambda ctx, grad: None, setup_context=gradient_refusal("fusion::convfirst_hopper"))


def _check_convfirst_hopper(
    x: Tensor,
    weights: Tensor,
    project_bias: Tensor,
    hidden_channels: int,
    out_channels: int,
    residual: bool,
    tile: list[int],
) -> HopperTile:
    config = tile_from_ints("fusion::convfirst_hopper", HopperTile, tile)
    check_input("fusion::convfirst_hopper", x, out_channels)
    refuse_malformed("fusion::convfirst_hopper", config, hopper_tile.why_malformed(config, hidden_channels))
    size = sum(weight_sizes(config, x.shape[1], hidden_channels, out_channels))
    check_weights(
        "fusion::convfirst_hopper",
        x,
        hidden_channels,
        out_channels,
        config,
        "fusion.weights.ConvFirstWeights.pack_hopper",
        (
            ("weights", weights, [size], weight_dtype(x)),
            ("project_bias", project_bias, [sum(config.out_slabs(out_channels))], torch.float32),
        ),
    )
    check_residual("fusion::convfirst_hopper", residual, x.shape[1], out_channels)
    return config


@custom_op("fusion::ffn_hopper", mutates_args=())
def ffn_hopper(
    x: Tensor,
    weights: Tensor,
    hidden_bias: Tensor,
    project_bias: Tensor,
    hidden_channels: int,
    out_channels: int,
    residual: bool,
    tile: list[int],
) -> Tensor:
    """FFN block (section 5.2) with ReLU as one kernel for Hopper GPUs: `[N, C, H, W] -> [N, K, H, W]`, channels_last.

    1x1 expand with bias, ReLU, 1x1 project with bias, and with `residual` the input added. It rounds the biases to the
    dtype of `x`, and fp32 sums before biases and the input are added to them.

    Args:
        x: fp16 or bf16 activations. Any other memory format than channels_last, or an address that is no multiple of
            16 bytes, costs a copy. On a CPU any floating dtype will do: there the operator computes the reference.
        weights, hidden_bias, project_bias: `fusion.ffn_weights.PackedFfn`, packed for `tile`. The kernel reads them
            before the kernel ahead of it in the stream has finished: that one must not be what writes them.
        hidden_channels, out_channels: sizes without their padding.
        tile: `FfnTile.to_ints()`.

    Raises:
        RuntimeError: the GPU is not of compute capability 9.0, a gradient would be needed, or the tensors are on
            several devices.
        TypeError: a dtype is not supported.
        ValueError: shapes and tile do not fit together.
    """
    config = _check_ffn_hopper(x, weights, hidden_bias, project_bias, hidden_channels, out_channels, residual, tile)
    x = x.contiguous(memory_format=torch.channels_last)
    if x.device.type == "cpu":
        packed = PackedFfn(weights, hidden_bias, project_bias)
        folded = unpack_ffn(packed, config, x.shape[1], hidden_channels, out_channels)
        out = reference.ffn(x, folded.expand, folded.expand_bias, folded.project, folded.project_bias, "relu", residual)
        return out.contiguous(memory_format=torch.channels_last)
    check_gpu("fusion::ffn_hopper", x.device, "run the block layer by layer")
    x = aligned("fusion::ffn_hopper", x, weights)

    from fusion.triton_kernels.ffn_hopper import launch

    out = empty_output(x, out_channels)
    if x.numel():
        with torch.cuda.device(x.device):
            launch(
                x,
                weights,
                hidden_bias,
                project_bias,
                out,
                hidden_channels=hidden_channels,
                residual=residual,
                tile=config,
            )
    return out


@ffn_hopper.register_fake
def _(
    x: Tensor,
    weights: Tensor,
    hidden_bias: Tensor,
    project_bias: Tensor,
    hidden_channels: int,
    out_channels: int,
    residual: bool,
    tile: list[int],
) -> Tensor:
    _check_ffn_hopper(x, weights, hidden_bias, project_bias, hidden_channels, out_channels, residual, tile)
    return empty_output(x, out_channels)


ffn_hopper.register_autograd(lambda ctx, grad: None, setup_context=gradient_refusal("fusion::ffn_hopper"))


def _check_ffn_hopper(
    x: Tensor,
    weights: Tensor,
    hidden_bias: Tensor,
    project_bias: Tensor,
    hidden_channels: int,
    out_channels: int,
    residual: bool,
    tile: list[int],
) -> FfnTile:
    config = tile_from_ints("fusion::ffn_hopper", FfnTile, tile)
    check_input("fusion::ffn_hopper", x, out_channels)
    refuse_malformed("fusion::ffn_hopper", config, ffn_tile.why_malformed(config, hidden_channels))
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    if is_too_many(pixels, MAX_PIXELS - 1):
        raise ValueError(f"fusion::ffn_hopper: {pixels} pixels are too many for a launch, split the batch")
    shapes = ffn_sizes(config, x.shape[1], hidden_channels, out_channels)
    check_weights(
        "fusion::ffn_hopper",
        x,
        hidden_channels,
        out_channels,
        config,
        "fusion.ffn_weights.FfnWeights.pack",
        (
            ("weights", weights, shapes[0], weight_dtype(x)),
            ("hidden_bias", hidden_bias, shapes[1], weight_dtype(x)),
            ("project_bias", project_bias, shapes[2], torch.float32),
        ),
    )
    check_residual("fusion::ffn_hopper", residual, x.shape[1], out_channels)
    return config

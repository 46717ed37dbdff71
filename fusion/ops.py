"""Fused blocks as PyTorch operators, for inference only."""

from dataclasses import fields

import torch
from torch import Tensor
from torch.library import triton_op, wrap_triton

from fusion import reference
from fusion.planner.tile import CHANNEL_MULTIPLE, KERNEL_DTYPES, MAX_IMAGE_ELEMENTS, ConvFirstTile, why_malformed
from fusion.weights import unpack_conv

GPU_DTYPES = tuple(getattr(torch, name) for name in KERNEL_DTYPES)


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
    tile: list[int],
) -> Tensor:
    """ConvFirst block (section 5.3) as one kernel: `[N, C, H, W] -> [N, K, H, W]`, channels_last.

    Grouped 3x3 convolution with zero padding 1, 1x1 expand with bias, `activation` ("relu" or "silu"), 1x1 project
    with bias, and with `residual` the input added. All sums are fp32.

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
    if len(tile) != len(fields(ConvFirstTile)):
        raise ValueError(
            f"fusion::convfirst: tile must be the {len(fields(ConvFirstTile))} integers of ConvFirstTile.to_ints(), "
            f"got {tile}"
        )
    config = ConvFirstTile(*tile)
    _check(x, conv, expand, expand_bias, project, project_bias, hidden_channels, out_channels, group_width, config)
    if activation not in reference.ACTIVATIONS:
        raise ValueError(
            f"fusion::convfirst: activation {activation!r} is not supported, use {_any_of(reference.ACTIVATIONS)}"
        )
    if residual and out_channels != x.shape[1]:
        raise ValueError(
            f"fusion::convfirst: a residual of {x.shape[1]} input channels cannot be added to {out_channels} output "
            "channels; they must be equal, or pass residual=False"
        )
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
        )
        return out.contiguous(memory_format=torch.channels_last)

    from fusion.triton_kernels.convfirst import convfirst_kernel, launch

    batch, _, height, width = x.shape
    out = torch.empty(
        (batch, out_channels, height, width), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )
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
                tile=config,
                kernel=wrap_triton(convfirst_kernel),
            )
    return out


def _refuse_gradient(ctx, inputs, output) -> None:
    raise RuntimeError(
        "fusion::convfirst is an inference operator and has no gradient, but one of its inputs requires a gradient; "
        "call it under torch.no_grad() or torch.inference_mode(), and train the unfused module"
    )


convfirst.register_autograd(lambda ctx, grad: None, setup_context=_refuse_gradient)


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
    tile: ConvFirstTile,
) -> None:
    if x.dim() != 4:
        raise ValueError(f"fusion::convfirst: x must be [N, C, H, W], got shape {list(x.shape)}")
    if x.device.type not in ("cuda", "cpu"):
        raise RuntimeError(
            f"fusion::convfirst: x is on {x.device}; supported are CUDA GPUs, and CPUs for reference: move it there"
        )
    if x.device.type == "cuda" and x.dtype not in GPU_DTYPES:
        raise TypeError(
            f"fusion::convfirst: x has dtype {x.dtype}; supported are {_any_of(GPU_DTYPES)}: convert the model "
            "and its input, for example with .half()"
        )
    in_channels = x.shape[1]
    for name, channels in (("input", in_channels), ("output", out_channels)):
        if channels % CHANNEL_MULTIPLE:
            raise ValueError(
                f"fusion::convfirst: {channels} {name} channels are not supported, use a multiple of {CHANNEL_MULTIPLE}"
            )
    if group_width < 1 or in_channels % group_width:
        raise ValueError(f"fusion::convfirst: {in_channels} channels do not divide into groups of {group_width}")
    if x.shape[2] * x.shape[3] * max(in_channels, out_channels) > MAX_IMAGE_ELEMENTS:
        raise ValueError(
            f"fusion::convfirst: images of {x.shape[2]}x{x.shape[3]} pixels are too large, split them: 2**31 elements "
            "are the limit"
        )
    malformed = why_malformed(tile)
    if malformed:
        raise ValueError(f"fusion::convfirst: {tile!r} cannot run: {malformed}; take the tile of a plan")
    in_slabs = tile.in_slabs(in_channels)
    if tile.splits_groups(in_channels, group_width):
        raise ValueError(f"fusion::convfirst: slabs {in_slabs} of {tile!r} split groups of {group_width} channels")
    in_padded, out_padded = sum(in_slabs), sum(tile.out_slabs(out_channels))
    hidden = tile.padded_hidden(hidden_channels)
    weight_dtype = x.dtype if x.device.type == "cuda" else None
    for name, tensor, shape, dtype in (
        ("conv", conv, [sum(9 * slab * slab for slab in in_slabs)], weight_dtype),
        ("expand", expand, [in_padded, hidden], weight_dtype),
        ("expand_bias", expand_bias, [hidden], torch.float32),
        ("project", project, [hidden, out_padded], weight_dtype),
        ("project_bias", project_bias, [out_padded], torch.float32),
    ):
        if list(tensor.shape) != shape or not tensor.is_contiguous():
            raise ValueError(
                f"fusion::convfirst: {name} must be a contiguous {shape} for {in_channels} input, {hidden_channels} "
                f"hidden and {out_channels} output channels with {tile!r}, got shape {list(tensor.shape)} with strides "
                f"{list(tensor.stride())}; pack the weights for this tile with fusion.weights.ConvFirstWeights.pack"
            )
        if dtype is not None and tensor.dtype != dtype:
            raise TypeError(f"fusion::convfirst: {name} has dtype {tensor.dtype}, it must be {dtype} for {x.dtype} x")
        if tensor.device != x.device:
            raise RuntimeError(f"fusion::convfirst: {name} is on {tensor.device}, x on {x.device}; move one of them")


def _any_of(names) -> str:
    return " or ".join(map(str, names))

"""The fused MBConv block as PyTorch operators, for inference only."""

import torch
from torch import Tensor
from torch.library import custom_op, triton_op, wrap_triton

from fusion import reference
from fusion.mbconv_hopper_checks import check_block
from fusion.mbconv_hopper_weights import PackedMBConvHopper, unpack_mbconv_hopper
from fusion.mbconv_weights import PackedMBConv, mbconv_sizes, packed_kernel_size, unpack_mbconv
from fusion.op_checks import (
    aligned,
    any_of,
    check_gpu,
    check_input,
    check_residual,
    check_squeeze_activation,
    check_weights,
    empty_output,
    gradient_refusal,
    refuse_malformed,
    tile_from_ints,
    weight_dtype,
)
from fusion.planner import mbconv_hopper_tile
from fusion.planner.mbconv_hopper_tile import MBConvHopperTile
from fusion.planner.mbconv_tile import MBConvTile, why_kernel_size_unsupported, why_malformed, why_splits_groups
from fusion.planner.tile import MAX_IMAGE_ELEMENTS


@triton_op("fusion::mbconv", mutates_args=())
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
    hidden_channels: int,
    out_channels: int,
    squeeze_channels: int,
    group_width: int,
    activation: str,
    squeeze_activation: str,
    residual: bool,
    tile: list[int],
) -> Tensor:
    """MBConv block (section 5.4) as two kernels a micro-batch: `[N, C, H, W] -> [N, K, H, W]`, channels_last.

    1x1 expand, `activation` (one of `fusion.reference.ACTIVATIONS`), grouped 3x3 or 5x5 convolution with zero padding 1
    or 2, the same activation, a gate of squeeze-and-excitation (mean, squeeze, `squeeze_activation`, "relu" or "silu",
    excite, sigmoid), 1x1 project, each with a bias, and with `residual` the input added. All sums are fp32. The squeeze
    vector is summed in any order, so that two runs may differ by rounding errors; under
    `torch.use_deterministic_algorithms(True)` it is summed in order, which is slower, and equal inputs give equal bits.

    Args:
        x: fp16 or bf16 activations. Any other memory format than channels_last is converted first, at the cost of a
            copy. On a CPU any floating dtype will do: there the operator computes the reference.
        expand, ..., project_bias: `fusion.mbconv_weights.PackedMBConv`, packed for `tile`; the shape of
            `conv` tells the kernel size.
        hidden_channels, out_channels, squeeze_channels, group_width: sizes without their padding.
        tile: `MBConvTile.to_ints()`.

    Raises:
        RuntimeError: a gradient would be needed, or the tensors are on several devices.
        TypeError: a dtype is not supported.
        ValueError: shapes, activations or tile do not fit together.
    """
    config = tile_from_ints("fusion::mbconv", MBConvTile, tile)
    packed = PackedMBConv(
        expand,
        expand_bias,
        conv,
        conv_bias,
        squeeze,
        squeeze_bias,
        excite,
        excite_bias,
        project,
        project_bias,
    )
    _check(x, packed, hidden_channels, out_channels, squeeze_channels, group_width, config)
    if activation not in reference.ACTIVATIONS:
        raise ValueError(
            f"fusion::mbconv: activation {activation!r} is not supported, use {any_of(reference.ACTIVATIONS)}"
        )
    check_squeeze_activation("fusion::mbconv", squeeze_activation)
    check_residual("fusion::mbconv", residual, x.shape[1], out_channels)
    x = x.contiguous(memory_format=torch.channels_last)
    if x.device.type == "cpu":
        sizes = x.shape[1], hidden_channels, out_channels, squeeze_channels, group_width
        folded = vars(unpack_mbconv(packed, *sizes)).values()
        out = reference.mbconv(x, *folded, activation, residual, squeeze_activation)
        return out.contiguous(memory_format=torch.channels_last)

    from fusion.triton_kernels.mbconv import launch

    out = empty_output(x, out_channels)
    if x.numel():
        with torch.cuda.device(x.device):
            launch(
                x,
                *packed.tensors(),
                out,
                activation=activation,
                squeeze_activation=squeeze_activation,
                residual=residual,
                tile=config,
                ordered=torch.are_deterministic_algorithms_enabled(),
                wrap=wrap_triton,
            )
    return out


mbconv.register_autograd(lambda ctx, grad: None, setup_context=gradient_refusal("fusion::mbconv"))


def _check(
    x: Tensor,
    packed: PackedMBConv,
    hidden_channels: int,
    out_channels: int,
    squeeze_channels: int,
    group_width: int,
    tile: MBConvTile,
) -> None:
    check_input("fusion::mbconv", x, out_channels)
    if min(hidden_channels, squeeze_channels, group_width) < 1 or hidden_channels % group_width:
        raise ValueError(
            f"fusion::mbconv: {hidden_channels} hidden and {squeeze_channels} squeeze channels with groups of "
            f"{group_width} do not go together; all are positive, and hidden channels a multiple of the group width"
        )
    kernel_size = packed_kernel_size(packed.conv)
    unsupported = why_kernel_size_unsupported(kernel_size)
    if unsupported:
        raise ValueError(f"fusion::mbconv: {unsupported}")
    refuse_malformed("fusion::mbconv", tile, why_malformed(tile) or why_splits_groups(tile, group_width))
    if x.shape[2] * x.shape[3] * tile.padded_hidden(hidden_channels) > MAX_IMAGE_ELEMENTS:
        raise ValueError(
            f"fusion::mbconv: images of {x.shape[2]}x{x.shape[3]} pixels and {hidden_channels} hidden channels are "
            "too large, split them: 2**31 elements are the limit"
        )
    shapes = mbconv_sizes(tile, x.shape[1], hidden_channels, out_channels, squeeze_channels, kernel_size)
    check_weights(
        "fusion::mbconv",
        x,
        hidden_channels,
        out_channels,
        tile,
        "fusion.mbconv_weights.MBConvWeights.pack",
        (
            (name, tensor, shapes[name], torch.float32 if name.endswith("_bias") else weight_dtype(x))
            for name, tensor in vars(packed).items()
        ),
    )


@custom_op("fusion::mbconv_hopper", mutates_args=())
def mbconv_hopper(
    x: Tensor,
    expand: Tensor,
    taps: Tensor,
    conv_bias: Tensor,
    squeeze: Tensor,
    squeeze_bias: Tensor,
    excite: Tensor,
    excite_bias: Tensor,
    project: Tensor,
    project_bias: Tensor,
    hidden_channels: int,
    out_channels: int,
    squeeze_channels: int,
    activation: str,
    squeeze_activation: str,
    residual: bool,
    tile: list[int],
) -> Tensor:
    """MBConv block (section 5.4) of small images and groups of 8 channels as one kernel for Hopper GPUs.

    `[N, C, H, W] -> [N, K, H, W]`, channels_last. It computes what `fusion::mbconv` does, with tanh approximated and
    hidden channels rounded to the dtype of `x`. Equal inputs give equal bits: a program sums the squeeze vector of its
    image in order.

    Weights of several blocks, stacked, run all of them on one image after the other, and what is between two blocks
    never leaves a processor (section 5.5.2 taken to the end). Each must then have a residual.

    Args:
        x: fp16 or bf16 activations. Any other memory format than channels_last, or an address that is no multiple of
            16 bytes, costs a copy. On a CPU any floating dtype will do: there the operator computes the reference.
        expand, ..., project_bias: `fusion.mbconv_hopper_weights.PackedMBConvHopper`, packed for `tile`. The kernel
            reads them before the kernel ahead of it in the stream has finished: that one must not be what writes them.
        hidden_channels, out_channels, squeeze_channels: sizes without their padding.
        tile: `MBConvHopperTile.to_ints()`.

    Raises:
        RuntimeError: the GPU is not of compute capability 9.0, a gradient would be needed, or the tensors are on
            several devices.
        TypeError: a dtype is not supported.
        ValueError: shapes, activations and tile do not fit together.
    """
    packed = PackedMBConvHopper(
        expand, taps, conv_bias, squeeze, squeeze_bias, excite, excite_bias, project, project_bias
    )
    sizes = hidden_channels, out_channels, squeeze_channels
    config = _check_hopper(x, packed, *sizes, activation, squeeze_activation, residual, tile)
    x = x.contiguous(memory_format=torch.channels_last)
    if x.device.type == "cpu":
        out = x
        for folded in unpack_mbconv_hopper(packed, config, x.shape[1], *sizes):
            out = reference.mbconv(out, *vars(folded).values(), activation, residual, squeeze_activation)
        return out.contiguous(memory_format=torch.channels_last)
    check_gpu("fusion::mbconv_hopper", x.device, "pack the weights for an MBConvTile and call fusion::mbconv")
    for weight in packed.tensors():
        x = aligned("fusion::mbconv_hopper", x, weight)

    from fusion.triton_kernels.mbconv_hopper import launch

    out = empty_output(x, out_channels)
    if x.numel():
        with torch.cuda.device(x.device):
            launch(
                x,
                *packed.tensors(),
                out,
                hidden_channels=hidden_channels,
                squeeze_channels=squeeze_channels,
                activation=activation,
                squeeze_activation=squeeze_activation,
                residual=residual,
                tile=config,
            )
    return out


@mbconv_hopper.register_fake
def _(
    x: Tensor,
    expand: Tensor,
    taps: Tensor,
    conv_bias: Tensor,
    squeeze: Tensor,
    squeeze_bias: Tensor,
    excite: Tensor,
    excite_bias: Tensor,
    project: Tensor,
    project_bias: Tensor,
    hidden_channels: int,
    out_channels: int,
    squeeze_channels: int,
    activation: str,
    squeeze_activation: str,
    residual: bool,
    tile: list[int],
) -> Tensor:
    packed = PackedMBConvHopper(
        expand, taps, conv_bias, squeeze, squeeze_bias, excite, excite_bias, project, project_bias
    )
    sizes = hidden_channels, out_channels, squeeze_channels
    _check_hopper(x, packed, *sizes, activation, squeeze_activation, residual, tile)
    return empty_output(x, out_channels)


mbconv_hopper.register_autograd(lambda ctx, grad: None, setup_context=gradient_refusal("fusion::mbconv_hopper"))


def _check_hopper(
    x: Tensor,
    packed: PackedMBConvHopper,
    hidden_channels: int,
    out_channels: int,
    squeeze_channels: int,
    activation: str,
    squeeze_activation: str,
    residual: bool,
    tile: list[int],
) -> MBConvHopperTile:
    op = "fusion::mbconv_hopper"
    config = tile_from_ints(op, MBConvHopperTile, tile)
    blocks = max(1, len(packed.expand)) if packed.expand.dim() else 1
    check_block(
        op,
        x,
        packed,
        out_channels,
        config,
        hidden_channels=hidden_channels,
        squeeze_channels=squeeze_channels,
        activation=activation,
        squeeze_activation=squeeze_activation,
        why_malformed=mbconv_hopper_tile.why_malformed(config),
        residual=residual,
        blocks=blocks,
    )
    uncovered = mbconv_hopper_tile.why_not_covering(config, *x.shape[2:])
    if uncovered:
        raise ValueError(f"{op}: {uncovered}; take the tile of a plan for this size")
    if blocks > 1 and not residual:
        raise ValueError(f"{op}: {blocks} blocks in one launch without residuals are not supported, call it for each")
    return config

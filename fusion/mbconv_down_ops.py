"""MBConv blocks of stride 2 as PyTorch operators, for inference only."""

import torch
from torch import Tensor
from torch.library import triton_op, wrap_triton

from fusion import reference
from fusion.mbconv_weights import PackedMBConv, mbconv_sizes, packed_kernel_size, unpack_mbconv
from fusion.op_checks import (
    any_of,
    check_input,
    check_squeeze_activation,
    check_weights,
    empty_output,
    gradient_refusal,
    refuse_malformed,
    tile_from_ints,
    weight_dtype,
)
from fusion.planner.mbconv_down_tile import (
    MBConvDownTile,
    why_kernel_unsupported,
    why_malformed,
    why_size_unsupported,
)
from fusion.planner.mbconv_tile import why_splits_groups
from fusion.planner.tile import MAX_IMAGE_ELEMENTS


@triton_op("fusion::mbconv_down", mutates_args=())
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
    hidden_channels: int,
    out_channels: int,
    squeeze_channels: int,
    group_width: int,
    activation: str,
    squeeze_activation: str,
    blur: bool,
    tile: list[int],
) -> Tensor:
    """MBConv block of stride 2 (section 5.4) as two kernels a micro-batch: `[N, C, H, W] -> [N, K, ceil(H / 2),
    ceil(W / 2)]`, channels_last.

    1x1 expand, `activation` (one of `fusion.reference.ACTIVATIONS`), grouped 3x3 convolution with zero padding 1, the
    same activation, blur-pool with reflection, a gate of squeeze-and-excitation (mean, squeeze, `squeeze_activation`,
    "relu" or "silu", excite, sigmoid), 1x1 project, each but the blur-pool with a bias. If not `blur`, the convolution
    has stride 2, there is no blur-pool, and it may be 5x5 with zero padding 2. All sums are fp32. The squeeze vector is
    summed in any order, so that two runs may differ by rounding errors; under
    `torch.use_deterministic_algorithms(True)` it is summed in order, which is slower, and equal inputs give equal bits.

    Args:
        x: fp16 or bf16 activations, with `blur` H and W of at least 2. Any other memory format than channels_last is
            converted first, at the cost of a copy. On a CPU any floating dtype will do: there the operator computes the
            reference.
        expand, ..., project_bias: `fusion.mbconv_weights.PackedMBConv`, packed for `tile`; the shape of
            `conv` tells the kernel size.
        hidden_channels, out_channels, squeeze_channels, group_width: sizes without their padding.
        tile: `MBConvDownTile.to_ints()`.

    Raises:
        RuntimeError: a gradient would be needed, or the tensors are on several devices.
        TypeError: a dtype is not supported.
        ValueError: shapes, activations or tile do not fit together.
    """
    config = tile_from_ints("fusion::mbconv_down", MBConvDownTile, tile)
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
    _check(x, packed, hidden_channels, out_channels, squeeze_channels, group_width, blur, config)
    if activation not in reference.ACTIVATIONS:
        raise ValueError(
            f"fusion::mbconv_down: activation {activation!r} is not supported, use {any_of(reference.ACTIVATIONS)}"
        )
    check_squeeze_activation("fusion::mbconv_down", squeeze_activation)
    x = x.contiguous(memory_format=torch.channels_last)
    if x.device.type == "cpu":
        sizes = x.shape[1], hidden_channels, out_channels, squeeze_channels, group_width
        folded = vars(unpack_mbconv(packed, *sizes)).values()
        out = reference.mbconv_down(x, *folded, activation, squeeze_activation, blur)
        return out.contiguous(memory_format=torch.channels_last)

    from fusion.triton_kernels.mbconv_down import launch

    out = empty_output(x, out_channels, stride=2)
    if x.numel():
        with torch.cuda.device(x.device):
            launch(
                x,
                *packed.tensors(),
                out,
                activation=activation,
                squeeze_activation=squeeze_activation,
                tile=config,
                blur=blur,
                ordered=torch.are_deterministic_algorithms_enabled(),
                wrap=wrap_triton,
            )
    return out


mbconv_down.register_autograd(lambda ctx, grad: None, setup_context=gradient_refusal("fusion::mbconv_down"))


def _check(
    x: Tensor,
    packed: PackedMBConv,
    hidden_channels: int,
    out_channels: int,
    squeeze_channels: int,
    group_width: int,
    blur: bool,
    tile: MBConvDownTile,
) -> None:
    op = "fusion::mbconv_down"
    check_input(op, x, out_channels)
    _, in_channels, height, width = x.shape
    kernel_size = packed_kernel_size(packed.conv)
    unsupported = why_size_unsupported(height, width, blur) or why_kernel_unsupported(kernel_size, blur)
    if unsupported:
        raise ValueError(f"{op}: {unsupported}")
    if min(hidden_channels, squeeze_channels, group_width) < 1 or hidden_channels % group_width:
        raise ValueError(
            f"{op}: {hidden_channels} hidden and {squeeze_channels} squeeze channels with groups of {group_width} do "
            "not go together; all are positive, and hidden channels a multiple of the group width"
        )
    refuse_malformed(op, tile, why_malformed(tile) or why_splits_groups(tile, group_width))
    if (height + 1) // 2 * ((width + 1) // 2) * tile.padded_hidden(hidden_channels) > MAX_IMAGE_ELEMENTS:
        raise ValueError(
            f"{op}: images of {height}x{width} pixels and {hidden_channels} hidden channels are too large, split them: "
            "2**31 elements are the limit"
        )
    shapes = mbconv_sizes(tile, in_channels, hidden_channels, out_channels, squeeze_channels, kernel_size)
    check_weights(
        op,
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

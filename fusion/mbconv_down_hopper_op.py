"""The MBConv block of stride 2 on Hopper GPUs as a PyTorch operator, for inference only."""

import torch
from torch import Tensor
from torch.library import custom_op

from fusion import reference
from fusion.mbconv_hopper_checks import check_block
from fusion.mbconv_hopper_weights import PackedMBConvHopper, unpack_mbconv_hopper
from fusion.op_checks import (
    aligned,
    check_gpu,
    empty_output,
    gradient_refusal,
    tile_from_ints,
)
from fusion.planner.mbconv_down_hopper_tile import MBConvDownHopperTile, why_malformed, why_not_covering

NAME = "fusion::mbconv_down_hopper"
INSTEAD = "pack the weights for an MBConvDownTile and call fusion::mbconv_down"
"""What to do on other GPUs than Hopper's, and with other sizes."""


@custom_op(NAME, mutates_args=())
def mbconv_down_hopper(
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
    blur: bool,
    tile: list[int],
) -> Tensor:
    """MBConv block of stride 2 (section 5.4) of images of up to 32x32 pixels and groups of 8 channels as one kernel for
    Hopper GPUs.

    `[N, C, H, W] -> [N, K, ceil(H / 2), ceil(W / 2)]`, channels_last, with `blur` for even H and W only. It computes
    what `fusion::mbconv_down` does, with tanh approximated and hidden channels rounded to the dtype of `x` after the
    expansion and ahead of the gate. Equal inputs give equal bits: a program sums the squeeze vector of its image in
    order.

    Args:
        x: fp16 or bf16 activations. Any other memory format than channels_last, or an address that is no multiple of
            16 bytes, costs a copy. On a CPU any floating dtype will do: there the operator computes the reference.
        expand, ..., project_bias: `fusion.mbconv_hopper_weights.PackedMBConvHopper` of one block, packed for `tile`.
            The kernel reads them before the kernel ahead of it in the stream has finished: that one must not be what
            writes them.
        hidden_channels, out_channels, squeeze_channels: sizes without their padding.
        tile: `MBConvDownHopperTile.to_ints()`.

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
    config = _check(x, packed, *sizes, activation, squeeze_activation, blur, tile)
    x = x.contiguous(memory_format=torch.channels_last)
    if x.device.type == "cpu":
        (folded,) = unpack_mbconv_hopper(packed, config, x.shape[1], *sizes)
        out = reference.mbconv_down(x, *vars(folded).values(), activation, squeeze_activation, blur)
        return out.contiguous(memory_format=torch.channels_last)
    check_gpu(NAME, x.device, INSTEAD)
    for weight in packed.tensors():
        x = aligned(NAME, x, weight)

    from fusion.triton_kernels.mbconv_down_hopper import launch

    out = empty_output(x, out_channels, stride=2)
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
                tile=config,
                blur=blur,
            )
    return out


@mbconv_down_hopper.register_fake
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
    blur: bool,
    tile: list[int],
) -> Tensor:
    packed = PackedMBConvHopper(
        expand, taps, conv_bias, squeeze, squeeze_bias, excite, excite_bias, project, project_bias
    )
    _check(x, packed, hidden_channels, out_channels, squeeze_channels, activation, squeeze_activation, blur, tile)
    return empty_output(x, out_channels, stride=2)


mbconv_down_hopper.register_autograd(lambda ctx, grad: None, setup_context=gradient_refusal(NAME))


def _check(
    x: Tensor,
    packed: PackedMBConvHopper,
    hidden_channels: int,
    out_channels: int,
    squeeze_channels: int,
    activation: str,
    squeeze_activation: str,
    blur: bool,
    tile: list[int],
) -> MBConvDownHopperTile:
    config = tile_from_ints(NAME, MBConvDownHopperTile, tile)
    check_block(
        NAME,
        x,
        packed,
        out_channels,
        config,
        hidden_channels=hidden_channels,
        squeeze_channels=squeeze_channels,
        activation=activation,
        squeeze_activation=squeeze_activation,
        why_malformed=why_malformed(config),
    )
    uncovered = why_not_covering(*x.shape[2:], blur)
    if uncovered:
        raise ValueError(f"{NAME}: {uncovered}; {INSTEAD}")
    return config

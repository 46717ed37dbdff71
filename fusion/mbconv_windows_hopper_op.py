"""The MBConv blocks of larger images on Hopper GPUs as PyTorch operators, for inference only."""

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
from fusion.planner.mbconv_windows_hopper_tile import (
    MBConvDownWindowsHopperTile,
    MBConvWindowsHopperTile,
    WindowsTile,
    why_malformed,
    why_too_large,
)

NAME, DOWN_NAME = "fusion::mbconv_windows_hopper", "fusion::mbconv_down_windows_hopper"
INSTEAD = {
    NAME: "pack the weights for an MBConvTile and call fusion::mbconv",
    DOWN_NAME: "pack the weights for an MBConvDownTile and call fusion::mbconv_down",
}
"""What to do on other GPUs than Hopper's."""


@custom_op(NAME, mutates_args=())
def mbconv_windows_hopper(
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
    """MBConv block (section 5.4) of images that are too large for `fusion::mbconv_hopper`, or with a 5x5 convolution,
    groups of 8 channels, as one kernel for Hopper GPUs.

    `[N, C, H, W] -> [N, K, H, W]`, channels_last. It computes what `fusion::mbconv` does, with tanh approximated and
    hidden channels rounded to the dtype of `x`. Equal inputs give equal bits: a program sums the squeeze vector of its
    image in order.

    Args:
        x: fp16 or bf16 activations. Any other memory format than channels_last, or an address that is no multiple of
            16 bytes, costs a copy. On a CPU any floating dtype will do: there the operator computes the reference.
        expand, ..., project_bias: `fusion.mbconv_hopper_weights.PackedMBConvHopper` of one block, packed for `tile`.
            The kernel reads them before the kernel ahead of it in the stream has finished: that one must not be what
            writes them.
        hidden_channels, out_channels, squeeze_channels: sizes without their padding.
        tile: `MBConvWindowsHopperTile.to_ints()`.

    Raises:
        RuntimeError: the GPU is not of compute capability 9.0, a gradient would be needed, or the tensors are on
            several devices.
        TypeError: a dtype is not supported.
        ValueError: shapes, activations and tile do not fit together.
    """
    packed = PackedMBConvHopper(
        expand, taps, conv_bias, squeeze, squeeze_bias, excite, excite_bias, project, project_bias
    )
    config = tile_from_ints(NAME, MBConvWindowsHopperTile, tile)
    channels = {"hidden_channels": hidden_channels, "squeeze_channels": squeeze_channels}
    options = {"activation": activation, "squeeze_activation": squeeze_activation, "residual": residual}
    return _run(NAME, x, packed, out_channels, config, channels, options)


@mbconv_windows_hopper.register_fake
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
    config = tile_from_ints(NAME, MBConvWindowsHopperTile, tile)
    channels = {"hidden_channels": hidden_channels, "squeeze_channels": squeeze_channels}
    options = {"activation": activation, "squeeze_activation": squeeze_activation, "residual": residual}
    _check(NAME, x, packed, out_channels, config, **channels, **options)
    return empty_output(x, out_channels)


mbconv_windows_hopper.register_autograd(lambda ctx, grad: None, setup_context=gradient_refusal(NAME))


@custom_op(DOWN_NAME, mutates_args=())
def mbconv_down_windows_hopper(
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
    """MBConv block of stride 2 (section 5.4) without a blur-pool, of images that are too large for
    `fusion::mbconv_down_hopper`, or with a 5x5 convolution, groups of 8 channels, as one kernel for Hopper GPUs.

    `[N, C, H, W] -> [N, K, ceil(H / 2), ceil(W / 2)]`, channels_last. It computes what `fusion::mbconv_down` does
    without `blur`, which must be false, and otherwise is as `fusion::mbconv_windows_hopper`; `tile` is
    `MBConvDownWindowsHopperTile.to_ints()`.
    """
    packed = PackedMBConvHopper(
        expand, taps, conv_bias, squeeze, squeeze_bias, excite, excite_bias, project, project_bias
    )
    config = tile_from_ints(DOWN_NAME, MBConvDownWindowsHopperTile, tile)
    channels = {"hidden_channels": hidden_channels, "squeeze_channels": squeeze_channels}
    options = {"activation": activation, "squeeze_activation": squeeze_activation, "blur": blur}
    return _run(DOWN_NAME, x, packed, out_channels, config, channels, options)


@mbconv_down_windows_hopper.register_fake
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
    config = tile_from_ints(DOWN_NAME, MBConvDownWindowsHopperTile, tile)
    channels = {"hidden_channels": hidden_channels, "squeeze_channels": squeeze_channels}
    options = {"activation": activation, "squeeze_activation": squeeze_activation, "blur": blur}
    _check(DOWN_NAME, x, packed, out_channels, config, **channels, **options)
    return empty_output(x, out_channels, stride=2)


mbconv_down_windows_hopper.register_autograd(lambda ctx, grad: None, setup_context=gradient_refusal(DOWN_NAME))


def _run(
    name: str,
    x: Tensor,
    packed: PackedMBConvHopper,
    out_channels: int,
    tile: WindowsTile,
    channels: dict[str, int],
    options: dict[str, object],
) -> Tensor:
    """The operator of this name: `channels` are hidden and squeeze channels, `options` those of the block."""
    _check(name, x, packed, out_channels, tile, **channels, **options)
    x = x.contiguous(memory_format=torch.channels_last)
    if x.device.type == "cpu":
        sizes = channels["hidden_channels"], out_channels, channels["squeeze_channels"]
        (folded,) = unpack_mbconv_hopper(packed, tile, x.shape[1], *sizes)
        reference_of = reference.mbconv if tile.STRIDE == 1 else reference.mbconv_down
        return reference_of(x, *vars(folded).values(), **options).contiguous(memory_format=torch.channels_last)
    check_gpu(name, x.device, INSTEAD[name])
    for weight in packed.tensors():
        x = aligned(name, x, weight)

    from fusion.triton_kernels.mbconv_windows_hopper import launch

    out = empty_output(x, out_channels, stride=tile.STRIDE)
    if x.numel():
        with torch.cuda.device(x.device):
            launch(x, *packed.tensors(), out, **channels, **options, tile=tile)
    return out


def _check(
    name: str,
    x: Tensor,
    packed: PackedMBConvHopper,
    out_channels: int,
    tile: WindowsTile,
    *,
    hidden_channels: int,
    squeeze_channels: int,
    activation: str,
    squeeze_activation: str,
    residual: bool = False,
    blur: bool = False,
) -> None:
    check_block(
        name,
        x,
        packed,
        out_channels,
        tile,
        hidden_channels=hidden_channels,
        squeeze_channels=squeeze_channels,
        activation=activation,
        squeeze_activation=squeeze_activation,
        why_malformed=why_malformed(tile),
        residual=residual,
    )
    _, in_channels, height, width = x.shape
    too_large = why_too_large(tile, height, width, in_channels, hidden_channels, out_channels)
    if too_large:
        raise ValueError(f"{name}: {too_large}")
    if blur:
        raise ValueError(f"{name}: a blur-pool is not supported, {INSTEAD[name]}")

"""A network's stem and the ConvFirst block after it on Hopper GPUs as one PyTorch operator, for inference only."""

import torch
from torch import Tensor
from torch.library import custom_op

from fusion import reference
from fusion.op_checks import (
    aligned,
    check_gpu,
    check_image_size,
    check_images,
    check_packed,
    check_residual,
    gradient_refusal,
    refuse_malformed,
    tile_from_ints,
    weight_dtype,
)
from fusion.planner.hopper_tile import weight_sizes
from fusion.planner.stem_convfirst_hopper_tile import (
    IN_CHANNELS,
    StemConvFirstHopperTile,
    why_malformed,
    why_unsupported_size,
)
from fusion.planner.tile import CHANNEL_MULTIPLE
from fusion.stem_convfirst_weights import stem_sizes, unpack_stem_convfirst

NAME = "fusion::stem_convfirst_hopper"
INSTEAD = "call fusion::stem and fusion::convfirst one after the other, for any GPU"
"""What to do on other GPUs than Hopper's."""


@custom_op(NAME, mutates_args=())
def stem_convfirst_hopper(
    x: Tensor,
    stem: Tensor,
    weights: Tensor,
    project_bias: Tensor,
    stem_channels: int,
    hidden_channels: int,
    out_channels: int,
    residual: bool,
    tile: list[int],
) -> Tensor:
    """Stem (dense 3x3 convolution of stride 2, bias, ReLU) and stride-1 ConvFirst block with ReLU and groups of 8
    channels as one kernel for Hopper GPUs: `[N, 3, H, W] -> [N, K, H / 2, W / 2]`, channels_last.

    What the stem gives is rounded to the dtype of `x`, as if it were stored, but never is in global memory. A
    non-finite element of the input may reach a few outputs next to those that it should reach.

    Args:
        x: fp16 or bf16 images of an even height and a width that is a multiple of 4 up to 256. Any other memory format
            than channels_last, or an address that is no multiple of 16 bytes, costs a copy. On a CPU any floating dtype
            will do: there the operator computes the reference.
        stem, weights, project_bias: `fusion.stem_convfirst_weights.PackedStemConvFirst`, packed for `tile`. The kernel
            reads them before the kernel ahead of it in the stream has finished: that one must not be what writes them.
        stem_channels: between the stem and the block.
        hidden_channels, out_channels: of the block, without their padding.
        residual: whether to add the stem's output to the block's.
        tile: `StemConvFirstHopperTile.to_ints()`.

    Raises:
        RuntimeError: the GPU is not of compute capability 9.0, a gradient would be needed, or the tensors are on
            several devices.
        TypeError: a dtype is not supported.
        ValueError: shapes and tile do not fit together.
    """
    sizes = stem_channels, hidden_channels, out_channels
    config = _check(x, stem, weights, project_bias, *sizes, residual, tile)
    x = x.contiguous(memory_format=torch.channels_last)
    if x.device.type == "cpu":
        unpacked, block = unpack_stem_convfirst(stem, weights, config, *sizes)
        tensors = (unpacked.conv, unpacked.bias, *block, project_bias[:out_channels])
        out = reference.stem_convfirst(x, *tensors, "relu", residual)
        return out.contiguous(memory_format=torch.channels_last)
    check_gpu(NAME, x.device, INSTEAD)
    x = aligned(NAME, aligned(NAME, x, weights), stem)

    from fusion.triton_kernels.stem_convfirst_hopper import launch

    out = _empty_output(x, out_channels)
    if x.numel():
        options = {"stem_channels": stem_channels, "hidden_channels": hidden_channels, "residual": residual}
        with torch.cuda.device(x.device):
            launch(x, stem, weights, project_bias, out, **options, tile=config)
    return out


@stem_convfirst_hopper.register_fake
def _(
    x: Tensor,
    stem: Tensor,
    weights: Tensor,
    project_bias: Tensor,
    stem_channels: int,
    hidden_channels: int,
    out_channels: int,
    residual: bool,
    tile: list[int],
) -> Tensor:
    _check(x, stem, weights, project_bias, stem_channels, hidden_channels, out_channels, residual, tile)
    return _empty_output(x, out_channels)


stem_convfirst_hopper.register_autograd(lambda ctx, grad: None, setup_context=gradient_refusal(NAME))


def _check(
    x: Tensor,
    stem: Tensor,
    weights: Tensor,
    project_bias: Tensor,
    stem_channels: int,
    hidden_channels: int,
    out_channels: int,
    residual: bool,
    tile: list[int],
) -> StemConvFirstHopperTile:
    config = tile_from_ints(NAME, StemConvFirstHopperTile, tile)
    check_images(NAME, x)
    in_channels, height, width = x.shape[1:]
    if in_channels != IN_CHANNELS:
        raise ValueError(
            f"{NAME}: images of {in_channels} channels are not supported, only of {IN_CHANNELS}; run the stem and the "
            "block one after the other"
        )
    for name, channels in (("stem", stem_channels), ("output", out_channels)):
        if channels % CHANNEL_MULTIPLE:
            raise ValueError(
                f"{NAME}: {channels} {name} channels are not supported, use a multiple of {CHANNEL_MULTIPLE}"
            )
    too_large = why_unsupported_size(height, width)
    if too_large:
        raise ValueError(f"{NAME}: {too_large}")
    check_image_size(NAME, x, max(height * width * in_channels, height * width // 4 * out_channels))
    check_residual(NAME, residual, stem_channels, out_channels)
    refuse_malformed(NAME, config, why_malformed(config, stem_channels, hidden_channels))
    size = sum(weight_sizes(config.block, stem_channels, hidden_channels, out_channels))
    check_packed(
        NAME,
        x,
        f"{stem_channels} stem, {hidden_channels} hidden and {out_channels} output channels with {config!r}",
        "fusion.stem_convfirst_weights.StemConvFirstWeights.pack",
        (
            ("stem", stem, stem_sizes(config), weight_dtype(x)),
            ("weights", weights, [size], weight_dtype(x)),
            ("project_bias", project_bias, [sum(config.block.out_slabs(out_channels))], torch.float32),
        ),
    )
    return config


def _empty_output(x: Tensor, out_channels: int) -> Tensor:
    batch, _, height, width = x.shape
    sizes = (batch, out_channels, height // 2, width // 2)
    return torch.empty(sizes, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)

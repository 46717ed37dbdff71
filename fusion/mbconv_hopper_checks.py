"""What the operators of the Hopper kernels of MBConv blocks check alike."""

import torch
from torch import Tensor

from fusion.mbconv_hopper_weights import PackedMBConvHopper, kernel_size_of, packed_sizes
from fusion.op_checks import (
    any_of,
    check_input,
    check_residual,
    check_squeeze_activation,
    check_weights,
    is_too_many,
    refuse_malformed,
    weight_dtype,
)
from fusion.planner.mbconv_hopper_tile import ACTIVATIONS, GROUP_WIDTH, MAX_IMAGES, SweptChannels

FP32_NAMES = ("conv_bias", "squeeze_bias", "excite_bias", "project_bias")


def check_block(
    op: str,
    x: Tensor,
    packed: PackedMBConvHopper,
    out_channels: int,
    tile: SweptChannels,
    *,
    hidden_channels: int,
    squeeze_channels: int,
    activation: str,
    squeeze_activation: str,
    why_malformed: str | None,
    residual: bool = False,
    blocks: int = 1,
) -> None:
    """Raises TypeError or ValueError for an input, weights, options and a tile that do not fit together; `op` is the
    operator's name, `why_malformed` why no block runs with the tile."""
    check_input(op, x, out_channels)
    batch, in_channels = x.shape[:2]
    if min(hidden_channels, squeeze_channels) < 1 or hidden_channels % GROUP_WIDTH:
        raise ValueError(
            f"{op}: {hidden_channels} hidden and {squeeze_channels} squeeze channels do not go together with groups of "
            f"{GROUP_WIDTH}; both are positive, and hidden channels a multiple of the group width"
        )
    refuse_malformed(op, tile, why_malformed)
    if is_too_many(batch, MAX_IMAGES):
        raise ValueError(f"{op}: {batch} images are too many for a launch, split the batch")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation {activation!r} is not supported, use {any_of(ACTIVATIONS)}")
    check_squeeze_activation(op, squeeze_activation)
    sizes = in_channels, hidden_channels, out_channels, squeeze_channels
    shapes = packed_sizes(tile, *sizes, blocks, kernel_size_of(packed.taps, tile.KERNEL_SIZES))
    check_weights(
        op,
        x,
        hidden_channels,
        out_channels,
        tile,
        "fusion.mbconv_hopper_weights.pack_mbconv_hopper",
        (
            (name, tensor, shapes[name], torch.float32 if name in FP32_NAMES else weight_dtype(x))
            for name, tensor in vars(packed).items()
        ),
    )
    check_residual(op, residual, in_channels, out_channels)

"""A network's stem and head as PyTorch operators, for inference only."""

import torch
from torch import Tensor
from torch.library import triton_op, wrap_triton

from fusion import reference
from fusion.edge_weights import PackedStem, head_sizes, stem_sizes, unpack_stem
from fusion.op_checks import (
    any_of,
    check_image_size,
    check_images,
    check_input,
    check_packed,
    empty_output,
    gradient_refusal,
    refuse_malformed,
    tile_from_ints,
    weight_dtype,
)
from fusion.planner import head_tile, stem_tile
from fusion.planner.head_tile import HeadTile
from fusion.planner.stem_tile import MAX_IN_CHANNELS, MAX_OUT_CHANNELS, STRIDE, StemTile
from fusion.planner.tile import CHANNEL_MULTIPLE


@triton_op("fusion::stem", mutates_args=())
def stem(
    x: Tensor,
    interleaved: Tensor,
    planar: Tensor,
    out_channels: int,
    activation: str,
    tile: list[int],
) -> Tensor:
    """Dense 3x3 convolution of stride 2 as one kernel: `[N, C, H, W] -> [N, K, ceil(H / 2), ceil(W / 2)]`.

    Zero padding 1, bias, `activation` (one of `fusion.reference.EDGE_ACTIVATIONS`; SiLU with an approximated tanh). All
    sums are fp32; the output is channels_last. A non-finite element of the input may reach a few outputs next to those
    that it should reach.

    Args:
        x: fp16 or bf16 images of up to 4 channels, channels_last or contiguous; any other memory format is converted
            first, at the cost of a copy. On a CPU any floating dtype will do: there the operator computes the
            reference.
        interleaved, planar: `fusion.edge_weights.PackedStem`, packed for `tile`.
        out_channels: K, a multiple of 8.
        tile: `StemTile.to_ints()`.

    Raises:
        RuntimeError: a gradient would be needed, or the tensors are on several devices.
        TypeError: a dtype is not supported.
        ValueError: shapes, activation or tile do not fit together.
    """
    config = _check_stem(x, interleaved, planar, out_channels, activation, tile)
    if x.device.type == "cpu":
        weights = unpack_stem(PackedStem(interleaved, planar), config, x.shape[1], out_channels)
        out = reference.stem(x, weights.conv, weights.bias, activation)
        return out.contiguous(memory_format=torch.channels_last)

    from fusion.triton_kernels.stem import launch, stem_kernel

    if not x.is_contiguous():
        x = x.contiguous(memory_format=torch.channels_last)
    out = empty_output(x, out_channels, STRIDE)
    if x.numel():
        with torch.cuda.device(x.device):
            launch(
                x,
                interleaved,
                planar,
                out,
                activation=activation,
                tile=config,
                kernel=wrap_triton(stem_kernel),
            )
    return out


stem.register_autograd(lambda ctx, grad: None, setup_context=gradient_refusal("fusion::stem"))


def _out_size(size: int) -> int:
    return -(-size // STRIDE)


def _check_stem(
    x: Tensor, interleaved: Tensor, planar: Tensor, out_channels: int, activation: str, tile: list[int]
) -> StemTile:
    op = "fusion::stem"
    config = tile_from_ints(op, StemTile, tile)
    check_images(op, x)
    in_channels, height, width = x.shape[1:]
    if not 1 <= in_channels <= MAX_IN_CHANNELS:
        raise ValueError(
            f"{op}: images of {in_channels} channels are not supported, only of 1 to {MAX_IN_CHANNELS}; run the "
            "convolution unfused"
        )
    if out_channels % CHANNEL_MULTIPLE or not 0 < out_channels <= MAX_OUT_CHANNELS:
        raise ValueError(
            f"{op}: {out_channels} output channels are not supported, use a multiple of {CHANNEL_MULTIPLE} up to "
            f"{MAX_OUT_CHANNELS}"
        )
    output = _out_size(height) * _out_size(width) * out_channels
    check_image_size(op, x, max(height * width * in_channels, output))
    refuse_malformed(op, config, stem_tile.why_malformed(config))
    # Of a batch of any size, which torch.export traces, nothing is known.
    batch = x.shape[0] if isinstance(x.shape[0], int) else 1
    too_many = stem_tile.why_not_launched(config, batch, _out_size(height), _out_size(width))
    if too_many:
        raise ValueError(f"{op}: {too_many}")
    _check_activation(op, activation)
    shapes = stem_sizes(config, in_channels, out_channels)
    check_packed(
        op,
        x,
        f"{in_channels} input and {out_channels} output channels with {config!r}",
        "fusion.edge_weights.StemWeights.pack",
        (
            ("interleaved", interleaved, shapes["interleaved"], weight_dtype(x)),
            ("planar", planar, shapes["planar"], weight_dtype(x)),
        ),
    )
    return config


@triton_op("fusion::head", mutates_args=())
def head(x: Tensor, conv: Tensor, bias: Tensor, out_channels: int, activation: str, tile: list[int]) -> Tensor:
    """1x1 convolution, bias, activation, global average pool: `[N, C, H, W] -> [N, K]`.

    One kernel; what is pooled is never in memory. `activation` is one of `fusion.reference.EDGE_ACTIVATIONS`. All sums
    are fp32, and SiLU's tanh is approximated.

    Args:
        x: fp16 or bf16 activations. Any other memory format than channels_last is converted first, at the cost of a
            copy. On a CPU any floating dtype will do: there the operator computes the reference.
        conv, bias: `fusion.edge_weights.PackedHead`, packed for `tile`.
        out_channels: K, without its padding.
        tile: `HeadTile.to_ints()`.

    Raises:
        RuntimeError: a gradient would be needed, or the tensors are on several devices.
        TypeError: a dtype is not supported.
        ValueError: shapes, activation or tile do not fit together.
    """
    config = _check_head(x, conv, bias, out_channels, activation, tile)
    if x.device.type == "cpu":
        return reference.head(x, conv[:out_channels, : x.shape[1]], bias[:out_channels], activation)

    from fusion.triton_kernels.head import head_kernel, launch

    x = x.contiguous(memory_format=torch.channels_last)
    out = torch.empty((x.shape[0], out_channels), dtype=x.dtype, device=x.device)
    if x.numel():
        with torch.cuda.device(x.device):
            launch(x, conv, bias, out, activation=activation, tile=config, kernel=wrap_triton(head_kernel))
    return out


head.register_autograd(lambda ctx, grad: None, setup_context=gradient_refusal("fusion::head"))


def _check_head(x: Tensor, conv: Tensor, bias: Tensor, out_channels: int, activation: str, tile: list[int]) -> HeadTile:
    op = "fusion::head"
    config = tile_from_ints(op, HeadTile, tile)
    check_input(op, x, out_channels)
    height, width = x.shape[2:]
    if not height * width:
        raise ValueError(f"{op}: images of {height}x{width} pixels have no mean, use at least one pixel")
    refuse_malformed(op, config, head_tile.why_malformed(config))
    _check_activation(op, activation)
    shapes = head_sizes(config, x.shape[1], out_channels)
    check_packed(
        op,
        x,
        f"{x.shape[1]} input and {out_channels} output channels with {config!r}",
        "fusion.edge_weights.HeadWeights.pack",
        (("conv", conv, shapes["conv"], weight_dtype(x)), ("bias", bias, shapes["bias"], torch.float32)),
    )
    return config


def _check_activation(op: str, activation: str) -> None:
    if activation not in reference.EDGE_ACTIVATIONS:
        raise ValueError(f"{op}: activation {activation!r} is not supported, use {any_of(reference.EDGE_ACTIVATIONS)}")

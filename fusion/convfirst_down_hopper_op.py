"""The stride-2 ConvFirst block on Hopper GPUs as a PyTorch operator, for inference only."""

import torch
from torch import Tensor
from torch.library import custom_op

from fusion import reference
from fusion.convfirst_down_hopper_weights import unpack_convfirst_down_hopper
from fusion.op_checks import (
    aligned,
    check_gpu,
    check_input,
    check_weights,
    gradient_refusal,
    refuse_malformed,
    tile_from_ints,
    weight_dtype,
)
from fusion.planner.convfirst_down_hopper_tile import ConvFirstDownHopperTile, weight_sizes, why_malformed

NAME = "fusion::convfirst_down_hopper"
INSTEAD = "pack the weights for a ConvFirstDownTile and call fusion::convfirst_down, for any GPU"
"""What to do on other GPUs than Hopper's, and with odd sizes."""


@custom_op(NAME, mutates_args=())
def convfirst_down_hopper(
    x: Tensor,
    weights: Tensor,
    project_bias: Tensor,
    hidden_channels: int,
    out_channels: int,
    tile: list[int],
) -> Tensor:
    """Stride-2 ConvFirst block (figure 6c) with ReLU and groups of 8 channels as one kernel for Hopper GPUs.

    `[N, C, H, W] -> [N, K, H / 2, W / 2]`, channels_last, for even H and W. It computes what `fusion::convfirst_down`
    does, but rounds the biases to the dtype of `x` and adds them in it.

    Args:
        x: fp16 or bf16 activations. Any other memory format than channels_last, or an address that is no multiple of
            16 bytes, costs a copy. On a CPU any floating dtype will do: there the operator computes the reference.
        weights, project_bias: `fusion.convfirst_down_hopper_weights.pack_convfirst_down_hopper(...).tensors()`, packed
            for `tile`. The kernel reads them before the kernel ahead of it in the stream has finished: that one must
            not be what writes them.
        hidden_channels, out_channels: sizes without their padding.
        tile: `ConvFirstDownHopperTile.to_ints()`.

    Raises:
        RuntimeError: the GPU is not of compute capability 9.0, a gradient would be needed, or the tensors are on
            several devices.
        TypeError: a dtype is not supported.
        ValueError: shapes and tile do not fit together.
    """
    config = _check(x, weights, project_bias, hidden_channels, out_channels, tile)
    x = x.contiguous(memory_format=torch.channels_last)
    if x.device.type == "cpu":
        conv, *ffn = unpack_convfirst_down_hopper(weights, config, x.shape[1], hidden_channels, out_channels)
        out = reference.convfirst_down(x, conv, *ffn, project_bias[:out_channels], "relu")
        return out.contiguous(memory_format=torch.channels_last)
    check_gpu(NAME, x.device, INSTEAD)
    x = aligned(NAME, x, weights)

    from fusion.triton_kernels.convfirst_down_hopper import launch

    out = _empty_output(x, out_channels)
    if x.numel():
        with torch.cuda.device(x.device):
            launch(x, weights, project_bias, out, hidden_channels=hidden_channels, tile=config)
    return out


@convfirst_down_hopper.register_fake
def _(
    x: Tensor,
    weights: Tensor,
    project_bias: Tensor,
    hidden_channels: int,
    out_channels: int,
    tile: list[int],
) -> Tensor:
    _check(x, weights, project_bias, hidden_channels, out_channels, tile)
    return _empty_output(x, out_channels)


convfirst_down_hopper.register_autograd(lambda ctx, grad: None, setup_context=gradient_refusal(NAME))


def _check(
    x: Tensor, weights: Tensor, project_bias: Tensor, hidden_channels: int, out_channels: int, tile: list[int]
) -> ConvFirstDownHopperTile:
    config = tile_from_ints(NAME, ConvFirstDownHopperTile, tile)
    check_input(NAME, x, out_channels)
    if x.shape[2] % 2 or x.shape[3] % 2:
        raise ValueError(f"{NAME}: images of {x.shape[2]}x{x.shape[3]} pixels must have even sizes; {INSTEAD}")
    refuse_malformed(NAME, config, why_malformed(config, hidden_channels))
    size = sum(weight_sizes(config, x.shape[1], hidden_channels, out_channels))
    check_weights(
        NAME,
        x,
        hidden_channels,
        out_channels,
        config,
        "fusion.convfirst_down_hopper_weights.pack_convfirst_down_hopper",
        (
            ("weights", weights, [size], weight_dtype(x)),
            ("project_bias", project_bias, [sum(config.out_slabs(out_channels))], torch.float32),
        ),
    )
    return config


def _empty_output(x: Tensor, out_channels: int) -> Tensor:
    batch, _, height, width = x.shape
    sizes = (batch, out_channels, height // 2, width // 2)
    return torch.empty(sizes, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)

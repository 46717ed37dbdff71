"""Weights of an MBConv block in the layout that the Hopper kernel reads."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusion.mbconv_weights import MBConvWeights
from fusion.planner.mbconv_hopper_tile import (
    BIAS_CHANNELS,
    DEPTH_ELEMENTS,
    GROUP_WIDTH,
    KERNEL_SIZE,
    WARPS,
    SweptChannels,
    taps_pieces,
)
from fusion.planner.mbconv_tile import KERNEL_SIZES
from fusion.planner.slabs import WIDEST
from fusion.weights import padded, swizzled

HALF = 0.5
"""Expansion and convolution are packed halved, biases too: x sigmoid(x) = x/2 tanh(x/2) + x/2."""


@dataclass(frozen=True)
class PackedMBConvHopper:
    """Weights of one block, or of several that follow each other, as the Hopper kernel reads them.

    Every tensor's first dimension counts blocks. Hidden channels are padded to sweeps of 128, 16 for each of 8 warps.

    `expand` is `[blocks, sweeps, elements]`: the left operand of products as threads hold it, 16 channels deep, two
    products at a time, and the last one alone if their number is odd; after the input's channels come the bias,
    rounded, and what rounding lost. `taps` is `[blocks, sweeps, 5, 8 warps, 32 lanes, 8]`: right operands of products,
    the rows above and below of each column, then those of the same row. `conv_bias` is
    `[blocks, sweeps, 8 warps, 4, 8]` in fp32: what each lane of four adds to its sums. `squeeze` and `excite` are
    `[blocks, sweeps, elements]`: left operands as those of `expand`, 16 squeeze channels by a warp's 16 hidden
    channels, and the other way round. `project` is `[blocks, rows, 64]`: for each step every slab of output channels,
    `[step, slab]` as shared memory holds it. The other biases are fp32.
    """

    expand: Tensor
    taps: Tensor
    conv_bias: Tensor
    squeeze: Tensor
    squeeze_bias: Tensor
    excite: Tensor
    excite_bias: Tensor
    project: Tensor
    project_bias: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        """In the order of the kernel's and the operator's arguments."""
        return tuple(vars(self).values())


def pack_mbconv_hopper(
    weights: MBConvWeights, tile: SweptChannels, dtype: torch.dtype, device: torch.device | str
) -> PackedMBConvHopper:
    """Round once to `dtype` and lay out for `tile`, of either stride, zero wherever channels are padded.

    Raises ValueError for groups that are not 8 channels wide, and for convolutions of a size that the tile has not.
    """
    kernel_size = weights.kernel_size
    if kernel_size not in tile.KERNEL_SIZES:
        raise ValueError(
            f"weights cannot be packed for {tile!r}: kernel size {kernel_size} is not supported, use "
            f"{' or '.join(map(str, tile.KERNEL_SIZES))}, or an MBConvTile or MBConvDownTile"
        )
    if weights.group_width != GROUP_WIDTH:
        raise ValueError(
            f"weights cannot be packed for {tile!r}: groups of {weights.group_width} channels are not supported, only "
            f"of {GROUP_WIDTH}; use an MBConvTile"
        )
    hidden = tile.padded_hidden(weights.hidden_channels)
    ins, slabs = sum(tile.in_slabs(weights.in_channels)), tile.out_slabs(weights.out_channels)
    squeeze = 16 * tile.squeeze_depths(weights.squeeze_channels)
    bias = padded(HALF * weights.expand_bias, hidden)
    rounded = bias.to(dtype).to(bias.dtype)
    left = torch.cat([padded(HALF * weights.expand, hidden, ins), rounded[:, None], (bias - rounded)[:, None]], dim=1)
    taps = _pack_taps(padded(HALF * weights.conv, hidden, GROUP_WIDTH, kernel_size, kernel_size))
    project = padded(weights.project.T, hidden, sum(slabs)).split(slabs, dim=1)
    project = [swizzled(slab.reshape(-1, tile.step, slab.shape[1])).flatten(1) for slab in project]
    tensors = (
        _pack_left(padded(left, hidden, ins + BIAS_CHANNELS)).to(dtype),
        taps.to(dtype),
        _pack_conv_bias(padded(HALF * weights.conv_bias, hidden)).float(),
        _pack_left(_pieces_swapped(padded(weights.squeeze, squeeze, hidden))).to(dtype),
        padded(weights.squeeze_bias, squeeze).float(),
        _pack_left(padded(weights.excite, hidden, squeeze)).to(dtype),
        padded(weights.excite_bias, hidden).float(),
        torch.cat(project, dim=1).reshape(-1, WIDEST).to(dtype),
        padded(weights.project_bias, sum(slabs)).float(),
    )
    # By way of the CPU: the kernel may start before the kernel ahead of it in the stream has finished, which must not
    # be one that writes weights. Copies from the CPU are none.
    return PackedMBConvHopper(*(tensor.contiguous().cpu().to(device)[None] for tensor in tensors))


def stack_mbconv_hopper(packed: Sequence[PackedMBConvHopper]) -> PackedMBConvHopper:
    """Weights of blocks that follow each other, from those of each, all of the same shapes."""
    device = packed[0].expand.device
    stacked = zip(*(each.tensors() for each in packed), strict=True)
    # By way of the CPU, as above.
    return PackedMBConvHopper(*(torch.cat([each.cpu() for each in tensors]).to(device) for tensors in stacked))


def packed_sizes(
    tile: SweptChannels,
    in_channels: int,
    hidden_channels: int,
    out_channels: int,
    squeeze_channels: int,
    blocks: int = 1,
    kernel_size: int = KERNEL_SIZE,
) -> dict[str, list[int]]:
    """Shapes of the tensors of `PackedMBConvHopper`, by name."""
    hidden, sweeps = tile.padded_hidden(hidden_channels), tile.sweeps(hidden_channels)
    squeeze = tile.squeeze_depths(squeeze_channels)
    outs = sum(tile.out_slabs(out_channels))
    return {
        "expand": [blocks, sweeps, tile.depths(in_channels) * DEPTH_ELEMENTS],
        "taps": [blocks, sweeps, taps_pieces(kernel_size), WARPS, 32, 8],
        "conv_bias": [blocks, sweeps, WARPS, 4, 8],
        "squeeze": [blocks, sweeps, squeeze * DEPTH_ELEMENTS],
        "squeeze_bias": [blocks, 16 * squeeze],
        "excite": [blocks, sweeps, squeeze * DEPTH_ELEMENTS],
        "excite_bias": [blocks, hidden],
        "project": [blocks, hidden * outs // WIDEST, WIDEST],
        "project_bias": [blocks, outs],
    }


def unpack_mbconv_hopper(
    packed: PackedMBConvHopper,
    tile: SweptChannels,
    in_channels: int,
    hidden_channels: int,
    out_channels: int,
    squeeze_channels: int,
) -> list[MBConvWeights]:
    """The weights of each block back from their packed form, in its dtypes."""
    sizes = in_channels, hidden_channels, out_channels, squeeze_channels
    return [_unpack(PackedMBConvHopper(*block), tile, *sizes) for block in zip(*packed.tensors(), strict=True)]


def _unpack(
    block: PackedMBConvHopper,
    tile: SweptChannels,
    in_channels: int,
    hidden_channels: int,
    out_channels: int,
    squeeze_channels: int,
) -> MBConvWeights:
    ins, slabs = sum(tile.in_slabs(in_channels)), tile.out_slabs(out_channels)
    left = _unpack_left(block.expand) / HALF
    parts = block.project.reshape(-1, tile.step * sum(slabs)).split([tile.step * slab for slab in slabs], dim=1)
    project = [
        swizzled(part.reshape(-1, tile.step, slab)).flatten(0, 1) for part, slab in zip(parts, slabs, strict=True)
    ]  # which undoes itself
    return MBConvWeights(
        left[:hidden_channels, :in_channels],
        left[:hidden_channels, ins : ins + 2].sum(1),
        _unpack_taps(block.taps)[:hidden_channels] / HALF,
        _unpack_conv_bias(block.conv_bias)[:hidden_channels] / HALF,
        _pieces_swapped(_unpack_left(block.squeeze))[:squeeze_channels, :hidden_channels],
        block.squeeze_bias[:squeeze_channels],
        _unpack_left(block.excite)[:hidden_channels, :squeeze_channels],
        block.excite_bias[:hidden_channels],
        torch.cat(project, dim=1)[:hidden_channels, :out_channels].T,
        block.project_bias[:out_channels],
    )


def _pack_left(left: Tensor) -> Tensor:
    """`[hidden, channels] -> [sweeps, elements]`."""
    depths = left.shape[1] // 16
    # [sweeps, warps, 2 groups, 8 rows, depths, 2 channel halves, 4, 2]
    left = left.reshape(-1, WARPS, 2, 8, depths, 2, 4, 2).permute(0, 4, 1, 3, 6, 5, 2, 7)
    pairs, single = left.split([depths - depths % 2, depths % 2], dim=1)
    # [sweeps, pairs, 2 of a pair, warps, 8 rows, 4, 2 channel halves, 2 groups, 2]: a thread has both of a pair.
    pairs = pairs.unflatten(1, (-1, 2)).permute(0, 1, 3, 4, 5, 2, 6, 7, 8)
    return torch.cat([pairs.flatten(1), single.flatten(1)], dim=1)


def _unpack_left(left: Tensor) -> Tensor:
    depths = left.shape[1] // DEPTH_ELEMENTS
    elements = (depths - depths % 2) * DEPTH_ELEMENTS
    pairs = left[:, :elements].reshape(len(left), depths // 2, WARPS, 8, 4, 2, 2, 2, 2)
    pairs = pairs.permute(0, 1, 5, 2, 3, 4, 6, 7, 8)
    single = left[:, elements:].reshape(len(left), depths % 2, WARPS, 8, 4, 2, 2, 2)
    left = torch.cat([pairs.flatten(1, 2), single], dim=1)
    # [sweeps, depths, warps, 8 rows, 4, 2 channel halves, 2 groups, 2]
    return left.permute(0, 2, 6, 3, 1, 5, 4, 7).reshape(len(left) * WARPS * 16, depths * 16)


def _pieces_swapped(matrix: Tensor) -> Tensor:
    """`[rows, columns] -> [columns, rows]`, transposing pieces of `[16, 16]` as wholes. It undoes itself."""
    return matrix.reshape(len(matrix) // 16, 16, -1, 16).permute(2, 1, 0, 3).reshape(-1, len(matrix))


def _pack_taps(conv: Tensor) -> Tensor:
    """`[hidden, 8, size, size] -> [sweeps, pieces, warps, 32, 8]`."""
    size = conv.shape[-1]
    middle = size // 2
    # [sweeps, warps, 2 groups, 8 out, 4, 2 in, rows, columns] -> [.., 8 out, 4, 2 groups, 2 in, ..]
    taps = conv.reshape(-1, WARPS, 2, 8, 4, 2, size, size).permute(0, 1, 3, 4, 2, 5, 6, 7)
    outer = [
        torch.stack([taps[..., middle - distance, dx], taps[..., middle + distance, dx]], dim=-2)
        for distance in range(1, middle + 1)
        for dx in range(size)
    ]
    same = [*taps[..., middle, :].unbind(-1), torch.zeros_like(taps[..., middle, 0])]
    same = [torch.stack(same[first : first + 2], dim=-3) for first in range(0, size, 2)]
    return torch.stack(outer + same, dim=1).reshape(len(taps), len(outer) + len(same), WARPS, 32, 8)


def _unpack_taps(taps: Tensor) -> Tensor:
    size = kernel_size_of(taps)
    middle = size // 2
    taps = taps.reshape(-1, taps.shape[-4], WARPS, 8, 4, 2, 2, 2)
    conv = taps.new_zeros(len(taps), WARPS, 8, 4, 2, 2, size, size)
    for dx in range(size):
        for distance in range(1, middle + 1):
            rows = taps[:, (distance - 1) * size + dx].unbind(-2)
            conv[..., middle - distance, dx], conv[..., middle + distance, dx] = rows
        conv[..., middle, dx] = taps[:, middle * size + dx // 2].unbind(-3)[dx % 2]
    return conv.permute(0, 1, 4, 2, 3, 5, 6, 7).reshape(-1, GROUP_WIDTH, size, size)


def kernel_size_of(taps: Tensor, sizes: Sequence[int] = KERNEL_SIZES) -> int:
    """Of the convolution, of one of these sizes, whose packed taps these are; 3 for tensors of another shape."""
    found = (size for size in sizes if taps.dim() >= 4 and taps.shape[-4] == taps_pieces(size))
    return next(found, KERNEL_SIZE)


def _pack_conv_bias(bias: Tensor) -> Tensor:
    """`[hidden] -> [sweeps, warps, 4, 8]`: for both groups and both rows of pixels two channels."""
    bias = bias.reshape(-1, WARPS, 2, 4, 2).transpose(2, 3)
    return torch.stack([bias, bias], dim=4).reshape(-1, WARPS, 4, 8)


def _unpack_conv_bias(bias: Tensor) -> Tensor:
    return bias.reshape(-1, WARPS, 4, 2, 2, 2)[..., 0, :].transpose(2, 3).flatten()

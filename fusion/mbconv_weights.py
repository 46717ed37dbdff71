"""Weights of an MBConv block: batch norm folded in float64, then packed once into the layout that the kernels read."""

from dataclasses import dataclass
from itertools import product
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusion.planner.mbconv_down_tile import NEIGHBOURS, QUAD, QUAD_KERNEL_SIZE, MBConvDownTile
from fusion.planner.mbconv_tile import MBConvTile, why_splits_groups
from fusion.weights import LinearMap, padded


@dataclass(frozen=True)
class MBConvWeights:
    """Folded weights of an MBConv block with squeeze-and-excitation, float64.

    `expand` is `[hidden, C]`, `expand_bias` `[hidden]`, `conv` `[hidden, T, R, R]` with group width T and kernel size
    R, `conv_bias` `[hidden]`, `squeeze` `[s, hidden]`, `squeeze_bias` `[s]`, `excite` `[hidden, s]`, `excite_bias`
    `[hidden]`, `project` `[K, hidden]`, `project_bias` `[K]`.
    """

    expand: Tensor
    expand_bias: Tensor
    conv: Tensor
    conv_bias: Tensor
    squeeze: Tensor
    squeeze_bias: Tensor
    excite: Tensor
    excite_bias: Tensor
    project: Tensor
    project_bias: Tensor

    @classmethod
    def fold(
        cls,
        expand: nn.Conv2d,
        expand_bn: nn.BatchNorm2d,
        conv: nn.Conv2d,
        conv_bn: nn.BatchNorm2d,
        squeeze: nn.Linear,
        excite: nn.Linear,
        project: nn.Conv2d,
        project_bn: nn.BatchNorm2d,
    ) -> "MBConvWeights":
        """Fold the layers of a block (section 5.5) into weights that share no memory with them."""
        return cls.of(
            LinearMap.of(expand, expand_bn),
            LinearMap.of(conv, conv_bn),
            LinearMap.of(squeeze),
            LinearMap.of(excite),
            LinearMap.of(project, project_bn),
        )

    @classmethod
    def of(
        cls, expand: LinearMap, conv: LinearMap, squeeze: LinearMap, excite: LinearMap, project: LinearMap
    ) -> "MBConvWeights":
        """The weights of a block of these layers, each with its batch norm folded."""
        return cls(
            expand.matrix,
            expand.bias,
            conv.weight,
            conv.bias,
            squeeze.matrix,
            squeeze.bias,
            excite.matrix,
            excite.bias,
            project.matrix,
            project.bias,
        )

    @property
    def in_channels(self) -> int:
        return self.expand.shape[1]

    @property
    def hidden_channels(self) -> int:
        return self.expand.shape[0]

    @property
    def out_channels(self) -> int:
        return self.project.shape[0]

    @property
    def squeeze_channels(self) -> int:
        return self.squeeze.shape[0]

    @property
    def group_width(self) -> int:
        return self.conv.shape[1]

    @property
    def kernel_size(self) -> int:
        return self.conv.shape[-1]

    def pack(self, tile: MBConvTile | MBConvDownTile, dtype: torch.dtype, device: torch.device | str) -> "PackedMBConv":
        """Round once to `dtype` and lay out for `tile`, of either stride, zero wherever channels are padded.

        Raises ValueError for a tile whose slabs split a group.
        """
        reason = why_splits_groups(tile, self.group_width)
        if reason:
            raise ValueError(f"weights cannot be packed for {tile!r}: {reason}; use a tile with a wider conv_slab")
        ins, hidden = tile.padded_in(self.in_channels), tile.padded_hidden(self.hidden_channels)
        squeeze, out = tile.padded_squeeze(self.squeeze_channels), tile.padded_out(self.out_channels)
        conv = _pack_conv(F.pad(self.conv, (0, 0, 0, 0, 0, 0, 0, hidden - self.hidden_channels)), tile.conv_slab)
        if _has_quads(tile, self.kernel_size):
            conv = _quads_of_taps(conv)
        return PackedMBConv(
            padded(self.expand.T, ins, hidden).to(device, dtype),
            padded(self.expand_bias, hidden).to(device, torch.float32),
            conv.to(device, dtype),
            padded(self.conv_bias, hidden).to(device, torch.float32),
            padded(self.squeeze.T, hidden, squeeze).to(device, dtype),
            padded(self.squeeze_bias, squeeze).to(device, torch.float32),
            padded(self.excite, hidden, squeeze).to(device, dtype),
            padded(self.excite_bias, hidden).to(device, torch.float32),
            padded(self.project.T, hidden, out).to(device, dtype),
            padded(self.project_bias, out).to(device, torch.float32),
        )


@dataclass(frozen=True)
class PackedMBConv:
    """Weights as the MBConv kernels read them, padded to the steps and slabs of the tile.

    `expand` is `[C padded, hidden padded]`, `conv` `[slabs, taps, slab in, slab out]`, zero between groups,
    `squeeze` and `excite` `[hidden padded, s padded]`, `project` `[hidden padded, K padded]`; the biases are fp32. With
    stride 2 and nine taps, `conv` is `[slabs, 4x4 neighbours x slab in, 2x2 pixels x slab out]`, zero for neighbours
    that are not among the nine of a pixel.
    """

    expand: Tensor
    expand_bias: Tensor
    conv: Tensor
    conv_bias: Tensor
    squeeze: Tensor
    squeeze_bias: Tensor
    excite: Tensor
    excite_bias: Tensor
    project: Tensor
    project_bias: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        """In the order of the kernels' and the operator's arguments."""
        return tuple(vars(self).values())


def packed_kernel_size(conv: Tensor) -> int:
    """Of a convolution as it is packed, by its shape."""
    return isqrt(conv.shape[1]) if conv.dim() == 4 else QUAD_KERNEL_SIZE


def mbconv_sizes(
    tile: MBConvTile | MBConvDownTile,
    in_channels: int,
    hidden_channels: int,
    out_channels: int,
    squeeze_channels: int,
    kernel_size: int = 3,
) -> dict[str, list[int]]:
    """Shapes of the tensors of `PackedMBConv`, by name."""
    ins, hidden = tile.padded_in(in_channels), tile.padded_hidden(hidden_channels)
    squeeze, out = tile.padded_squeeze(squeeze_channels), tile.padded_out(out_channels)
    slab = tile.conv_slab
    quads, taps = [NEIGHBOURS * slab, QUAD * slab], [kernel_size**2, slab, slab]
    return {
        "expand": [ins, hidden],
        "expand_bias": [hidden],
        "conv": [hidden // slab, *(quads if _has_quads(tile, kernel_size) else taps)],
        "conv_bias": [hidden],
        "squeeze": [hidden, squeeze],
        "squeeze_bias": [squeeze],
        "excite": [hidden, squeeze],
        "excite_bias": [hidden],
        "project": [hidden, out],
        "project_bias": [out],
    }


def unpack_mbconv(
    packed: PackedMBConv,
    in_channels: int,
    hidden_channels: int,
    out_channels: int,
    squeeze_channels: int,
    group_width: int,
) -> MBConvWeights:
    """The weights back from their packed form, of either stride, in its dtypes."""
    conv = _taps_of_quads(packed.conv) if packed.conv.dim() == 3 else packed.conv
    return MBConvWeights(
        packed.expand[:in_channels, :hidden_channels].T,
        packed.expand_bias[:hidden_channels],
        _unpack_conv(conv, group_width)[:hidden_channels],
        packed.conv_bias[:hidden_channels],
        packed.squeeze[:hidden_channels, :squeeze_channels].T,
        packed.squeeze_bias[:squeeze_channels],
        packed.excite[:hidden_channels, :squeeze_channels],
        packed.excite_bias[:hidden_channels],
        packed.project[:hidden_channels, :out_channels].T,
        packed.project_bias[:out_channels],
    )


def _has_quads(tile: MBConvTile | MBConvDownTile, kernel_size: int) -> bool:
    """Whether the tile's kernel takes a convolution of this size as matrices of quads, and not tap by tap."""
    return isinstance(tile, MBConvDownTile) and kernel_size == QUAD_KERNEL_SIZE


def _pack_conv(conv: Tensor, slab: int) -> Tensor:
    """`[slabs, R * R, slab in, slab out]` of `[slabs * slab, T, R, R]`."""
    width, taps = conv.shape[1], conv.shape[2] * conv.shape[3]
    # [slabs, groups, out, in, R, R] -> [slabs, groups, R * R, in, out]
    grouped = conv.reshape(-1, slab // width, width, width, taps).permute(0, 1, 4, 3, 2)
    dense = conv.new_zeros(len(grouped), taps, slab, slab)
    for group in range(slab // width):
        channels = slice(group * width, (group + 1) * width)
        dense[:, :, channels, channels] = grouped[:, group]
    return dense


def _unpack_conv(dense: Tensor, width: int) -> Tensor:
    """The inverse of `_pack_conv`, for groups of `width` channels."""
    slab, size = dense.shape[-1], packed_kernel_size(dense)
    starts = range(0, slab, width)
    grouped = torch.stack([dense[:, :, start : start + width, start : start + width] for start in starts], dim=1)
    return grouped.permute(0, 1, 4, 3, 2).reshape(-1, width, size, size)


def _quads_of_taps(taps: Tensor) -> Tensor:
    """`[slabs, 16 * slab in, 4 * slab out]` of `[slabs, 9, slab in, slab out]`.

    Neighbours are rows and columns -1 to 2 of a quad, whose pixels are in rows and columns 0 and 1.
    """
    slabs, _, slab, _ = taps.shape
    quads = taps.new_zeros(slabs, 4, 4, slab, 2, 2, slab)
    for row, column, tap in product(range(2), range(2), range(QUAD_KERNEL_SIZE**2)):
        dy, dx = divmod(tap, QUAD_KERNEL_SIZE)
        quads[:, row + dy, column + dx, :, row, column] = taps[:, tap]
    return quads.reshape(slabs, NEIGHBOURS * slab, QUAD * slab)


def _taps_of_quads(quads: Tensor) -> Tensor:
    """The inverse of `_quads_of_taps`."""
    slab = quads.shape[2] // QUAD
    first_pixel = quads.reshape(-1, 4, 4, slab, QUAD, slab)[:, :QUAD_KERNEL_SIZE, :QUAD_KERNEL_SIZE, :, 0]
    return first_pixel.flatten(1, 2)

"""Weights of a network's stem and head: batch norm folded in float64, then packed once into what the kernels read."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fusion.planner.head_tile import HeadTile
from fusion.planner.stem_tile import BIAS_TERMS, KERNEL_SIZE, STRIDE, WINDOWS, StemTile, Window, window
from fusion.weights import LinearMap, padded


@dataclass(frozen=True)
class StemWeights:
    """Folded weights of a stem, a dense 3x3 convolution of stride 2, float64: `conv` `[K, C, 3, 3]`, `bias` `[K]`."""

    conv: Tensor
    bias: Tensor

    @classmethod
    def fold(cls, conv: nn.Conv2d, bn: nn.BatchNorm2d) -> "StemWeights":
        """Fold a convolution and its batch norm (section 5.5) into weights that share no memory with them."""
        return cls.of(LinearMap.of(conv, bn))

    @classmethod
    def of(cls, conv: LinearMap) -> "StemWeights":
        """The weights of a stem of this convolution, with its batch norm folded."""
        return cls(conv.weight, conv.bias)

    @property
    def in_channels(self) -> int:
        return self.conv.shape[1]

    @property
    def out_channels(self) -> int:
        return self.conv.shape[0]

    def pack(self, tile: StemTile, dtype: torch.dtype, device: torch.device | str) -> "PackedStem":
        """Round to `dtype` and lay out for the kernel, for both memory formats of its input.

        The bias is rounded to twice the precision of `dtype`, and may be twice its largest number.
        """
        filters, largest = [], torch.finfo(dtype).max
        for is_planar in (False, True):
            elements = window(self.in_channels, tile.group, is_planar)
            rows = elements.columns * KERNEL_SIZE
            operand = self.conv.new_zeros(WINDOWS * elements.columns, tile.columns(self.out_channels), dtype=dtype)
            matrix = _filters_of_group(self.conv, elements, tile.group)
            operand[:rows, : matrix.shape[1]] = matrix.to(dtype)
            rest = self.bias.repeat(tile.group)
            for term in range(BIAS_TERMS):
                rounded = rest.clamp(-largest, largest).to(dtype)
                operand[rows + term, : len(rest)] = rounded
                rest = rest - rounded
            filters.append(operand.to(device))
        return PackedStem(*filters)


@dataclass(frozen=True)
class PackedStem:
    """Weights as the stem kernel reads them.

    `interleaved` and `planar` are the right operands for a channels_last and a contiguous input: `[4 * window columns,
    group * K]`, with columns of zeros up to a power of two. For each of three windows they hold the filter once for
    each output pixel of a group, zero where that pixel does not look. In the fourth one, whose first two elements are
    ones, there is the bias, in two terms.
    """

    interleaved: Tensor
    planar: Tensor

    def tensors(self) -> tuple[Tensor, Tensor]:
        """In the order of the kernel's and the operator's arguments."""
        return self.interleaved, self.planar


def stem_sizes(tile: StemTile, in_channels: int, out_channels: int) -> dict[str, list[int]]:
    """Shapes of the tensors of `PackedStem`."""
    columns = tile.columns(out_channels)
    rows = [WINDOWS * window(in_channels, tile.group, planar).columns for planar in (False, True)]
    return {"interleaved": [rows[0], columns], "planar": [rows[1], columns]}


def unpack_stem(packed: PackedStem, tile: StemTile, in_channels: int, out_channels: int) -> StemWeights:
    """`[K, C, 3, 3]` in the packed dtype and `[K]`, fp32 or the packed dtype if that is wider, back from `pack`."""
    elements = window(in_channels, tile.group, planar=False)
    windows = packed.interleaved.reshape(WINDOWS, elements.columns, -1)[:, :, :out_channels]
    # [3 rows, 3 columns, C, K]
    filters = windows[:KERNEL_SIZE]
    taps = torch.stack([filters[:, elements.column(dx, 0) :][:, :in_channels] for dx in _NEIGHBOURS], dim=1)
    bias = windows[KERNEL_SIZE, :BIAS_TERMS]
    return StemWeights(taps.permute(3, 2, 0, 1), bias.to(torch.promote_types(bias.dtype, torch.float32)).sum(0))


_NEIGHBOURS = range(-(KERNEL_SIZE // 2), KERNEL_SIZE // 2 + 1)


def _filters_of_group(conv: Tensor, columns: Window, group: int) -> Tensor:
    """`[3 * columns, group * K]`: what each element of a window contributes to each output pixel of the group."""
    out_channels, in_channels = conv.shape[:2]
    filters = conv.new_zeros(KERNEL_SIZE, columns.columns, group, out_channels)
    for pixel in range(group):
        for tap, dx in enumerate(_NEIGHBOURS):
            for channel in range(in_channels):
                filters[:, columns.column(STRIDE * pixel + dx, channel), pixel] = conv[:, channel, :, tap].T
    return filters.reshape(KERNEL_SIZE * columns.columns, group * out_channels)


@dataclass(frozen=True)
class HeadWeights:
    """Folded weights of a head, a 1x1 convolution ahead of a global pool, float64: `conv` `[K, C]`, `bias` `[K]`."""

    conv: Tensor
    bias: Tensor

    @classmethod
    def fold(cls, conv: nn.Conv2d, bn: nn.BatchNorm2d) -> "HeadWeights":
        """Fold a 1x1 convolution and its batch norm (section 5.5) into weights that share no memory with them."""
        return cls.of(LinearMap.of(conv, bn))

    @classmethod
    def of(cls, conv: LinearMap) -> "HeadWeights":
        """The weights of a head of this 1x1 convolution, with its batch norm folded."""
        return cls(conv.matrix, conv.bias)

    @property
    def in_channels(self) -> int:
        return self.conv.shape[1]

    @property
    def out_channels(self) -> int:
        return self.conv.shape[0]

    def pack(self, tile: HeadTile, dtype: torch.dtype, device: torch.device | str) -> "PackedHead":
        """Round once to `dtype` and pad for the kernel."""
        shapes = head_sizes(tile, self.in_channels, self.out_channels)
        bias = padded(self.bias[None], 1, *shapes["bias"])[0]
        return PackedHead(padded(self.conv, *shapes["conv"]).to(device, dtype), bias.to(device, torch.float32))


@dataclass(frozen=True)
class PackedHead:
    """Weights as the head kernel reads them: `conv` `[K padded, C padded]`, `bias` fp32 `[K padded]`."""

    conv: Tensor
    bias: Tensor

    def tensors(self) -> tuple[Tensor, Tensor]:
        """In the order of the kernel's and the operator's arguments."""
        return self.conv, self.bias


def head_sizes(tile: HeadTile, in_channels: int, out_channels: int) -> dict[str, list[int]]:
    """Shapes of the tensors of `PackedHead`."""
    padded_out = tile.padded_out(out_channels)
    return {"conv": [padded_out, sum(tile.in_slabs(in_channels))], "bias": [padded_out]}

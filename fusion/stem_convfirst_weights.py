"""Weights of a network's stem and of the ConvFirst block after it, packed for the one Hopper kernel that runs both."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fusion.edge_weights import PackedStem, StemWeights, unpack_stem
from fusion.planner.stem_convfirst_hopper_tile import GROUP, IN_CHANNELS, StemConvFirstHopperTile, stem_window
from fusion.planner.stem_tile import BIAS_TERMS, KERNEL_SIZE, WINDOWS, StemTile
from fusion.weights import ConvFirstWeights, unpack_hopper

STEM_TILE = StemTile(1, 32, GROUP, 1)
"""A tile with groups of as many pixels: how the stem alone packs its filters."""


@dataclass(frozen=True)
class StemConvFirstWeights:
    """Folded weights of a stem and of the stride-1 ConvFirst block that takes its output, float64.

    `stem_conv` and `stem_bias` are those of `fusion.edge_weights.StemWeights`, the others those of
    `fusion.weights.ConvFirstWeights`.
    """

    stem_conv: Tensor
    stem_bias: Tensor
    conv: Tensor
    expand: Tensor
    expand_bias: Tensor
    project: Tensor
    project_bias: Tensor

    @classmethod
    def join(cls, stem: StemWeights, block: ConvFirstWeights) -> "StemConvFirstWeights":
        """Those of both. Raises ValueError if the block does not take as many channels as the stem has."""
        if stem.out_channels != block.in_channels:
            raise ValueError(
                f"a stem of {stem.out_channels} output channels and a block of {block.in_channels} input channels "
                "cannot run together; they must be equal"
            )
        return cls(stem.conv, stem.bias, **vars(block))

    @property
    def stem(self) -> StemWeights:
        """Those of the stem alone."""
        return StemWeights(self.stem_conv, self.stem_bias)

    @property
    def block(self) -> ConvFirstWeights:
        """Those of the block alone."""
        return ConvFirstWeights(self.conv, self.expand, self.expand_bias, self.project, self.project_bias)

    @property
    def in_channels(self) -> int:
        """Channels of the images."""
        return self.stem_conv.shape[1]

    @property
    def stem_channels(self) -> int:
        """Channels between the stem and the block."""
        return self.stem_conv.shape[0]

    @property
    def hidden_channels(self) -> int:
        return self.block.hidden_channels

    @property
    def out_channels(self) -> int:
        return self.block.out_channels

    @property
    def group_width(self) -> int:
        return self.block.group_width

    def pack(
        self, tile: StemConvFirstHopperTile, dtype: torch.dtype, device: torch.device | str
    ) -> "PackedStemConvFirst":
        """Round once to `dtype` and lay out for the kernel, the stem's bias to twice the precision of `dtype`.

        Raises ValueError for images that have not 3 channels, for groups of the block that are not 8 channels wide and
        for a block of stride 2.
        """
        if self.in_channels != IN_CHANNELS:
            raise ValueError(
                f"weights of a stem of {self.in_channels} input channels cannot be packed for {tile!r}, only of "
                f"{IN_CHANNELS}; run the stem by itself"
            )
        packed = self.block.pack_hopper(tile.block, dtype, device)
        alone = self.stem.pack(STEM_TILE, dtype, "cpu").interleaved[:, : GROUP * self.stem_channels]
        elements, rows = stem_window().columns, KERNEL_SIZE * stem_window().columns
        filters = alone.new_zeros(KERNEL_SIZE, elements, GROUP, tile.slab)
        filters[..., : self.stem_channels] = alone[:rows].reshape(KERNEL_SIZE, elements, GROUP, -1)
        # The bias multiplies ones in the first element of the first windows, which no filter looks at.
        filters[:BIAS_TERMS, 0, :, : self.stem_channels] = alone[rows : rows + BIAS_TERMS].reshape(
            BIAS_TERMS, GROUP, -1
        )
        # By way of the CPU, as `fusion.weights.pack_rows` says.
        stem = _permuted(filters, 4, 2).contiguous().to("cpu").to(device)
        return PackedStemConvFirst(stem, packed.weights, packed.project_bias)


@dataclass(frozen=True)
class PackedStemConvFirst:
    """Weights as the kernel reads them.

    `stem` is the right operand `[3 input rows, 16 elements, 2 slab]` of the stem's product, both permuted so that a
    thread has neighbours: elements of a window, of which the first is a one for the bias, and channels of two pixels.
    `weights` and `project_bias` are those of the block (`fusion.weights.PackedHopper`).
    """

    stem: Tensor
    weights: Tensor
    project_bias: Tensor

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """In the order of the kernel's and the operator's arguments."""
        return self.stem, self.weights, self.project_bias


def stem_sizes(tile: StemConvFirstHopperTile) -> list[int]:
    """Shape of `PackedStemConvFirst.stem`."""
    return [KERNEL_SIZE, stem_window().columns, tile.columns]


def unpack_stem_convfirst(
    stem: Tensor, weights: Tensor, tile: StemConvFirstHopperTile, stem_channels: int, hidden: int, out_channels: int
) -> tuple[StemWeights, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The stem's weights, and `conv` `[C, 8, 3, 3]`, `expand` `[hidden, C]`, `expand_bias` `[hidden]` and `project`
    `[K, hidden]` of the block, back from `PackedStemConvFirst`."""
    elements = stem_window().columns
    filters = _permuted(stem.reshape(KERNEL_SIZE, elements, GROUP, tile.slab), 2, 4)
    filters = filters.reshape(KERNEL_SIZE, elements, GROUP, tile.slab)[..., :stem_channels].flatten(2)
    alone = filters.new_zeros(WINDOWS, elements, GROUP * stem_channels)
    alone[:KERNEL_SIZE] = filters
    alone[KERNEL_SIZE, :BIAS_TERMS] = filters[:BIAS_TERMS, 0]
    alone = alone.flatten(0, 1)
    unpacked = unpack_stem(PackedStem(alone, alone), STEM_TILE, IN_CHANNELS, stem_channels)
    return unpacked, unpack_hopper(weights, tile.block, stem_channels, hidden, out_channels)


def _permuted(filters: Tensor, a: int, b: int) -> Tensor:
    """`[3, a x b x 2 elements, 2, slab]` as `[3, b x a x 2 elements, 2 slab]`; of every 32 columns, 4 x 4 x 2 as well.

    A thread of a quad has elements 2 q and 2 q + 1 of every 8 of the left operand, and such columns of the sums.
    """
    rows, columns = filters.shape[0], filters.shape[2] * filters.shape[3]
    split = filters.reshape(rows, a, b, 2, columns // 32, 4, 4, 2)
    return split.permute(0, 2, 1, 3, 4, 6, 5, 7).reshape(rows, a * b * 2, columns)

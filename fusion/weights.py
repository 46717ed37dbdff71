"""Weights of a block: batch norm folded in float64, then packed once into the layout that a kernel reads."""

from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor, nn

from fusion.planner.hopper_tile import (
    ATOM_ELEMENTS,
    GROUP_WIDTH,
    WEIGHT_COLUMNS,
    HopperTile,
    RowsTile,
    weight_sizes,
)
from fusion.planner.tile import ConvFirstTile


@dataclass(frozen=True)
class Statistics:
    """Tensors `[K]` of a batch norm in eval mode, which normalises by its running statistics."""

    mean: Tensor
    variance: Tensor
    gamma: Tensor | None
    beta: Tensor | None
    eps: float

    @classmethod
    def of(cls, bn: nn.BatchNorm2d) -> "Statistics":
        """Raises ValueError if the batch norm has no running statistics."""
        if bn.running_mean is None or bn.running_var is None:
            raise ValueError(
                "batch norm without running statistics cannot be folded: it normalises by each batch's own; build it "
                "with track_running_stats=True, or leave the block unfused"
            )
        return cls(bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.eps)


@dataclass(frozen=True)
class LinearMap:
    """A convolution or linear layer with all that is folded into it, float64: `weight` `[K, ...]`, `bias` `[K]`."""

    weight: Tensor
    bias: Tensor

    @classmethod
    def fold(
        cls,
        weight: Tensor,
        bias: Tensor | None = None,
        statistics: Statistics | None = None,
        scale: Tensor | None = None,
    ) -> "LinearMap":
        """A layer, a batch norm after it, then a product with `scale`, `[K]` or a single number.

        Shares no memory with the arguments, which may have any floating dtype.
        """
        weight = weight.detach().to(torch.float64, copy=True)
        bias = weight.new_zeros(len(weight)) if bias is None else bias.detach().to(torch.float64, copy=True)
        if statistics is not None:
            gamma = torch.ones_like(bias) if statistics.gamma is None else statistics.gamma.detach().double()
            beta = torch.zeros_like(bias) if statistics.beta is None else statistics.beta.detach().double()
            factor = gamma / torch.sqrt(statistics.variance.detach().double() + statistics.eps)
            weight, bias = _scaled(weight, factor), beta + (bias - statistics.mean.detach().double()) * factor
        if scale is not None:
            factor = scale.detach().double().flatten().expand(len(weight))
            weight, bias = _scaled(weight, factor), bias * factor
        return cls(weight, bias)

    @classmethod
    def of(cls, layer: nn.Conv2d | nn.Linear, bn: nn.BatchNorm2d | None = None) -> "LinearMap":
        """A layer and the batch norm after it, by its running statistics. Raises ValueError if it has none."""
        return cls.fold(layer.weight, layer.bias, None if bn is None else Statistics.of(bn))

    @property
    def matrix(self) -> Tensor:
        """`[K, C]`, of a linear layer or a 1x1 convolution."""
        return self.weight.flatten(1)


def _scaled(weight: Tensor, factor: Tensor) -> Tensor:
    """Each of K filters times its factor."""
    return weight * factor.reshape(-1, *[1] * (weight.dim() - 1))


@dataclass(frozen=True)
class ConvFirstWeights:
    """Folded weights of a ConvFirst block, float64: three linear maps and one activation.

    `conv` is `[C, T, 3, 3]` with group width T, `expand` `[hidden, C]`, `expand_bias` `[hidden]`, `project`
    `[K, hidden]`, `project_bias` `[K]`. The convolution's bias is part of `expand_bias`: nothing non-linear stands
    between the two, and the zero padding comes before the convolution.

    Of a block of stride 2 with a blur-pool `expand` is `[hidden, 2 C]`, the block's input first and then the
    convolution's output. The blur-pool between the two linear maps leaves constants as they are. The weights do not
    tell the stride of the convolution itself.
    """

    conv: Tensor
    expand: Tensor
    expand_bias: Tensor
    project: Tensor
    project_bias: Tensor

    @classmethod
    def fold(
        cls,
        conv: nn.Conv2d,
        conv_bn: nn.BatchNorm2d,
        expand: nn.Conv2d,
        expand_bn: nn.BatchNorm2d,
        project: nn.Conv2d,
        project_bn: nn.BatchNorm2d,
    ) -> "ConvFirstWeights":
        """Fold the layers of a block (section 5.5) into weights that share no memory with them."""
        return cls.of(LinearMap.of(conv, conv_bn), LinearMap.of(expand, expand_bn), LinearMap.of(project, project_bn))

    @classmethod
    def of(cls, conv: LinearMap, expand: LinearMap, project: LinearMap) -> "ConvFirstWeights":
        """The weights of a block of these layers, each with its batch norm folded."""
        bias = expand.bias + expand.matrix[:, -len(conv.bias) :] @ conv.bias
        return cls(conv.weight, expand.matrix, bias, project.matrix, project.bias)

    @property
    def in_channels(self) -> int:
        return self.conv.shape[0]

    @property
    def is_concatenated(self) -> bool:
        """Whether the expansion takes the block's input and the convolution's output, as with a blur-pool it does."""
        return self.expand.shape[1] == 2 * self.in_channels

    @property
    def group_width(self) -> int:
        return self.conv.shape[1]

    @property
    def hidden_channels(self) -> int:
        return self.expand.shape[0]

    @property
    def out_channels(self) -> int:
        return self.project.shape[0]

    def pack(self, tile: ConvFirstTile, dtype: torch.dtype, device: torch.device | str) -> "PackedConvFirst":
        """Round once to `dtype` and lay out for `tile`, zero wherever slabs and hidden steps are padded.

        Raises ValueError for a tile whose slabs split a group and for a block with a blur-pool.
        """
        self._refuse_concatenated(tile)
        in_slabs, out_slabs = tile.in_slabs(self.in_channels), tile.out_slabs(self.out_channels)
        if tile.splits_groups(self.in_channels, self.group_width):
            raise ValueError(
                f"weights cannot be packed for {tile!r}: slabs {in_slabs} split groups of {self.group_width} channels; "
                "use a tile with a wider conv_slab"
            )
        hidden = tile.padded_hidden(self.hidden_channels)
        expand = padded(self.expand.T, sum(in_slabs), hidden)
        project = padded(self.project.T, hidden, sum(out_slabs))
        return PackedConvFirst(
            _pack_conv(self.conv, in_slabs).to(device, dtype),
            expand.to(device, dtype),
            padded(self.expand_bias[None], 1, hidden)[0].to(device, torch.float32),
            project.to(device, dtype),
            padded(self.project_bias[None], 1, sum(out_slabs))[0].to(device, torch.float32),
        )

    def pack_hopper(self, tile: HopperTile, dtype: torch.dtype, device: torch.device | str) -> "PackedHopper":
        """Round once to `dtype` and lay out for the Hopper kernel, zero wherever slabs and hidden steps are padded.

        Raises ValueError for groups that are not 8 channels wide and for a block with a blur-pool.
        """
        self._refuse_concatenated(tile)
        if self.group_width != GROUP_WIDTH:
            raise ValueError(
                f"weights cannot be packed for {tile!r}: groups of {self.group_width} channels are not supported, "
                f"only of {GROUP_WIDTH}; use a ConvFirstTile"
            )
        return pack_rows(
            conv_taps(self.conv),
            padded(self.expand.T, sum(tile.in_slabs(self.in_channels)), self.hidden_channels),
            self,
            tile,
            dtype,
            device,
        )

    def _refuse_concatenated(self, tile: ConvFirstTile | HopperTile) -> None:
        if self.is_concatenated:
            raise ValueError(
                f"weights of a block with a blur-pool cannot be packed for {tile!r}; use a ConvFirstDownTile"
            )


def pack_rows(
    taps: Tensor,
    expand: Tensor,
    weights: ConvFirstWeights,
    tile: RowsTile,
    dtype: torch.dtype,
    device: torch.device | str,
) -> "PackedHopper":
    """`weights` rounded to `dtype` and laid out for a Hopper kernel: the matrices `taps`, then chunks of the FFN.

    `expand` is `[sum of input slabs, hidden]`, that of `weights` with zeros where slabs are padded.
    """
    in_slabs, out_slabs = tile.in_slabs(weights.in_channels), tile.out_slabs(weights.out_channels)
    ins, outs = sum(in_slabs), sum(out_slabs)
    steps, hidden = tile.steps(weights.hidden_channels), tile.padded_hidden(weights.hidden_channels)
    expand = padded(expand, ins, hidden).reshape(ins, steps, tile.hidden).transpose(0, 1)
    project = padded(weights.project.T, hidden, outs).reshape(steps, tile.hidden, outs)
    unit = tile.unit(weights.out_channels)
    chunk = (
        *expand.split(in_slabs, dim=1),
        *(_by_quads(slab, 4, unit // 8) for slab in project.split(out_slabs, dim=2)),
    )
    bias = bias_of_quads(padded(weights.expand_bias[None], 1, hidden), steps)
    chunks = torch.cat([_in_atoms(swizzled(matrix)) for matrix in chunk], dim=1)
    flat = torch.cat([taps.flatten(), chunks.flatten(), bias])
    flat = torch.cat([flat, flat.new_zeros(-len(flat) % WEIGHT_COLUMNS)])
    project_bias = padded(weights.project_bias[None], 1, outs)[0]
    # By way of the CPU: the kernel may start before the kernel ahead of it in the stream has finished, which must not
    # be one that writes weights. Copies from the CPU are none.
    flat, project_bias = flat.to("cpu", dtype).to(device), project_bias.to("cpu", torch.float32).to(device)
    return PackedHopper(flat, project_bias)


@dataclass(frozen=True)
class PackedConvFirst:
    """Weights as the ConvFirst kernel reads them, padded to slabs and to steps of the tile.

    `conv` is flat: for each input slab `[9 taps, slab in, slab out]`, zero between groups. `expand` is
    `[C padded, hidden padded]`, `project` `[hidden padded, K padded]`; the biases are fp32.
    """

    conv: Tensor
    expand: Tensor
    expand_bias: Tensor
    project: Tensor
    project_bias: Tensor

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """In the order of the kernel's and the operator's arguments."""
        return self.conv, self.expand, self.expand_bias, self.project, self.project_bias


def _pack_conv(conv: Tensor, slabs: tuple[int, ...]) -> Tensor:
    channels, width = conv.shape[:2]
    # [groups, out, in, 3, 3] -> [groups, taps, in, out]
    grouped = conv.reshape(-1, width, width, 3, 3).permute(0, 3, 4, 2, 1).reshape(-1, 9, width, width)
    dense = conv.new_zeros(9, sum(slabs), sum(slabs))
    for group, start in enumerate(range(0, channels, width)):
        dense[:, start : start + width, start : start + width] = grouped[group]
    blocks, start = [], 0
    for slab in slabs:
        blocks.append(dense[:, start : start + slab, start : start + slab].flatten())
        start += slab
    return torch.cat(blocks)


def unpack_conv(packed: Tensor, slabs: tuple[int, ...], channels: int, group_width: int) -> Tensor:
    """`[C, T, 3, 3]` convolution weight back from its packed form."""
    groups, offset = [], 0
    for slab in slabs:
        dense = packed[offset : offset + 9 * slab * slab].reshape(9, slab, slab)
        offset += 9 * slab * slab
        for start in range(0, slab, group_width):
            groups.append(dense[:, start : start + group_width, start : start + group_width])
    taps_in_out = torch.stack(groups)[: channels // group_width]
    return taps_in_out.permute(0, 3, 2, 1).reshape(channels, group_width, 3, 3)


@dataclass(frozen=True)
class PackedHopper:
    """Weights as the Hopper kernel reads them, padded to slabs and to steps of the tile.

    `weights` is flat. First the convolution's taps, for every piece of two groups `[3 columns, 3 rows, 16 out, 16 in]`,
    the last row first. Then a chunk for each step of the hidden channels: `expand` `[slab in, hidden]` of every input
    slab and `project` `[hidden, slab out]` of every output slab, as shared memory holds them, and each with zeros up to
    a multiple of 512 elements. At last the hidden bias of each step, permuted as the threads hold it, and zeros up to a
    multiple of 64 elements. `project_bias` is fp32 `[K padded]`.
    """

    weights: Tensor
    project_bias: Tensor

    def tensors(self) -> tuple[Tensor, Tensor]:
        """In the order of the kernel's and the operator's arguments."""
        return self.weights, self.project_bias


def unpack_hopper(
    packed: Tensor, tile: HopperTile, in_channels: int, hidden_channels: int, out_channels: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`conv` `[C, 8, 3, 3]`, `expand` `[hidden, C]`, `expand_bias` `[hidden]`, `project` `[K, hidden]`, back from
    `PackedHopper.weights`."""
    conv, chunks, bias, _ = packed.split(weight_sizes(tile, in_channels, hidden_channels, out_channels))
    expand, bias, project = unpack_chunks(chunks, bias, tile, in_channels, hidden_channels, out_channels)
    return conv_of_taps(conv.reshape(-1, 3, 3, 16, 16))[:in_channels], expand[:, :in_channels], bias, project


def unpack_chunks(
    chunks: Tensor, bias: Tensor, tile: RowsTile, in_channels: int, hidden_channels: int, out_channels: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`expand` `[hidden, sum of input slabs]`, `expand_bias` `[hidden]`, `project` `[K, hidden]`, back from chunks."""
    steps, in_slabs = tile.steps(hidden_channels), tile.in_slabs(in_channels)
    matrices, chunks, start = [], chunks.reshape(steps, -1), 0
    for rows, columns in tile.chunk_shapes(in_channels, out_channels):
        matrix = chunks[:, start : start + rows * columns].reshape(steps, rows, columns)
        matrices.append(swizzled(matrix))  # which undoes itself
        start += ceil(rows * columns / ATOM_ELEMENTS) * ATOM_ELEMENTS
    expand = torch.cat(matrices[: len(in_slabs)], dim=1).transpose(1, 2).flatten(0, 1)
    unit = tile.unit(out_channels)
    project = torch.cat([_by_quads(matrix, unit // 8, 4) for matrix in matrices[len(in_slabs) :]], dim=2).flatten(0, 1)
    bias = bias_in_order(bias, steps)
    return expand[:hidden_channels], bias[:hidden_channels], project[:hidden_channels, :out_channels].T


def bias_of_quads(bias: Tensor, steps: int) -> Tensor:
    """Hidden bias, flat, as threads hold it: a product's sums lie in quads of them, each with two of every eight."""
    return bias.reshape(steps, -1, 4, 2).transpose(1, 2).flatten()


def bias_in_order(bias: Tensor, steps: int) -> Tensor:
    """The inverse of `bias_of_quads`."""
    return bias.reshape(steps, 4, -1, 2).transpose(1, 2).flatten()


def conv_taps(conv: Tensor) -> Tensor:
    """`[pieces, 3 columns, 3 rows, 16 out, 16 in]`, the last row first: pieces of two groups, zero between them."""
    # [groups, out, in, dy, dx] -> [groups, dx, dy, out, in]
    taps = conv.reshape(-1, 8, 8, 3, 3).permute(0, 4, 3, 1, 2).flip(2)
    pieces = conv.new_zeros(ceil(len(taps) / 2), 3, 3, 16, 16)
    pieces[:, :, :, :8, :8] = taps[0::2]
    pieces[: len(taps) // 2, :, :, 8:, 8:] = taps[1::2]
    return pieces


def conv_of_taps(pieces: Tensor) -> Tensor:
    """What `conv_taps` was made of, `[C, 8, 3, 3]` with C padded to whole pieces."""
    groups = torch.stack([pieces[..., :8, :8], pieces[..., 8:, 8:]], dim=1).flatten(0, 1)
    return groups.flip(2).permute(0, 3, 4, 2, 1).flatten(0, 1)


def _by_quads(project: Tensor, a: int, b: int) -> Tensor:
    """`[steps, hidden, units x a x b x 2]` as `[steps, hidden, units x b x a x 2]`.

    Of a product's sums a thread of a quad has columns 2 q and 2 q + 1 of every 8. With the columns of each unit
    permuted so (a = 4, b = unit / 8) it has neighbouring channels.
    """
    steps, hidden, channels = project.shape
    return project.reshape(steps, hidden, -1, a, b, 2).transpose(3, 4).reshape(steps, hidden, channels)


def swizzled(matrices: Tensor) -> Tensor:
    """`[count, rows, columns]` as shared memory holds them for products: pieces of 8 elements in another order.

    Of 16, 32 or 64 columns, 32, 64 or 128 bytes. The pieces' order changes from one 128 bytes to the next.
    """
    count, rows, columns = matrices.shape
    pieces = columns // 8
    row = torch.arange(rows, device=matrices.device)
    order = torch.arange(pieces, device=matrices.device)[None] ^ (row * columns // 64 % pieces)[:, None]
    index = order[None, :, :, None].expand(count, -1, -1, 8)
    return matrices.reshape(count, rows, pieces, 8).gather(2, index).reshape(count, rows, columns)


def _in_atoms(matrices: Tensor) -> Tensor:
    """`[count, elements]`, a whole number of atoms."""
    flat = matrices.flatten(1)
    return torch.cat([flat, flat.new_zeros(len(flat), -flat.shape[1] % ATOM_ELEMENTS)], dim=1)


def padded(tensor: Tensor, *size: int) -> Tensor:
    """With zeros up to this size."""
    larger = tensor.new_zeros(size)
    larger[tuple(map(slice, tensor.shape))] = tensor
    return larger

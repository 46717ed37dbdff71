"""Weights of an MBConv block in the layout that the Hopper kernel reads."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fusion.mbconv_weights import MBConvWeights
from fusion.planner.mbconv_hopper_tile import CHUNK, GATES, GROUP_WIDTH, HALF, PARTITIONS, MBConvHopperTile
from fusion.planner.slabs import WIDEST
from fusion.weights import conv_of_taps, conv_taps, padded, swizzled


@dataclass(frozen=True)
class PackedMBConvHopper:
    """Weights as the Hopper kernel reads them, padded to chunks of 64 hidden channels.

    `expand` is `[chunks, C padded / 16, 128 threads, 8]`: the left operand of a product as the threads of a warpgroup
    hold it, its rows the hidden channels of a chunk, 8 of each half in turn. `weights` is `[rows, 64]`: first the
    convolution's taps, `[pieces of 16 channels, 3 columns, 3 rows, 16 out, 16 in]` with the last row first, zero
    between groups; then for each step of the projection `[step, 64]` of every slab of output channels, narrow ones
    padded; all as shared memory holds them. `biases` is `[2 partitions, elements]`: for each of a partition's chunks,
    every other one, that of the expansion in the order of its rows, and that of the convolution. `squeeze` is
    `[hidden, s padded]`, `excite` `[s padded, hidden padded to 256]`. The other biases are fp32.
    """

    expand: Tensor
    weights: Tensor
    biases: Tensor
    squeeze: Tensor
    squeeze_bias: Tensor
    excite: Tensor
    excite_bias: Tensor
    project_bias: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        """In the order of the kernel's and the operator's arguments."""
        return tuple(vars(self).values())


def pack_mbconv_hopper(
    weights: MBConvWeights, tile: MBConvHopperTile, dtype: torch.dtype, device: torch.device | str
) -> PackedMBConvHopper:
    """Round once to `dtype` and lay out for `tile`, zero wherever channels are padded.

    Raises ValueError for groups that are not 8 channels wide.
    """
    if weights.group_width != GROUP_WIDTH:
        raise ValueError(
            f"weights cannot be packed for {tile!r}: groups of {weights.group_width} channels are not supported, only "
            f"of {GROUP_WIDTH}; use an MBConvTile"
        )
    chunks = tile.chunks(weights.hidden_channels)
    hidden, gates = chunks * CHUNK, tile.gate_steps(weights.hidden_channels) * GATES
    ins, slabs = sum(tile.in_slabs(weights.in_channels)), tile.store_slabs(weights.out_channels)
    squeeze, step = tile.squeeze(weights.squeeze_channels), tile.step(weights.out_channels)
    # [chunks, 2 halves, 4 warps, 8 rows, C / 16, 2, 4, 2] -> [chunks, C / 16, 4 warps, 8 rows, 4, 2, 2 halves, 2]
    expand = padded(weights.expand, hidden, ins).reshape(chunks, 2, 4, 8, ins // 16, 2, 4, 2)
    expand = expand.permute(0, 4, 2, 3, 6, 5, 1, 7).reshape(chunks, ins // 16, 128, 8)
    taps = swizzled(conv_taps(padded(weights.conv, hidden, GROUP_WIDTH, 3, 3)).reshape(-1, 16, 16))
    # [K, hidden] -> for each slab [hidden, 64] -> [steps, slabs, step, 64]
    project = [
        padded(slab, hidden, WIDEST) for slab in padded(weights.project.T, hidden, sum(slabs)).split(slabs, dim=1)
    ]
    project = torch.stack(project).reshape(len(slabs), -1, step, WIDEST).transpose(0, 1)
    project = swizzled(project.reshape(-1, step, WIDEST))
    tensors = (
        expand.to(dtype),
        torch.cat([taps.reshape(-1, WIDEST), project.reshape(-1, WIDEST)]).to(dtype),
        _pack_biases(padded(weights.expand_bias, hidden), padded(weights.conv_bias, hidden), tile).to(dtype),
        padded(weights.squeeze.T, hidden, squeeze).to(dtype),
        padded(weights.squeeze_bias, squeeze).float(),
        padded(weights.excite.T, squeeze, gates).to(dtype),
        padded(weights.excite_bias, gates).float(),
        padded(weights.project_bias, sum(slabs)).float(),
    )
    # By way of the CPU: the kernel may start before the kernel ahead of it in the stream has finished, which must not
    # be one that writes weights. Copies from the CPU are none.
    return PackedMBConvHopper(*(tensor.contiguous().cpu().to(device) for tensor in tensors))


def packed_sizes(
    tile: MBConvHopperTile, in_channels: int, hidden_channels: int, out_channels: int, squeeze_channels: int
) -> dict[str, list[int]]:
    """Shapes of the tensors of `PackedMBConvHopper`, by name."""
    chunks = tile.chunks(hidden_channels)
    hidden, gates = chunks * CHUNK, tile.gate_steps(hidden_channels) * GATES
    slabs, squeeze = tile.store_slabs(out_channels), tile.squeeze(squeeze_channels)
    taps = hidden // 16 * 9 * 16 * 16
    return {
        "expand": [chunks, sum(tile.in_slabs(in_channels)) // 16, 128, 8],
        "weights": [taps // WIDEST + hidden * len(slabs), WIDEST],
        "biases": [PARTITIONS, tile.bias_elements(hidden_channels)],
        "squeeze": [hidden, squeeze],
        "squeeze_bias": [squeeze],
        "excite": [squeeze, gates],
        "excite_bias": [gates],
        "project_bias": [sum(slabs)],
    }


def unpack_mbconv_hopper(
    packed: PackedMBConvHopper,
    tile: MBConvHopperTile,
    in_channels: int,
    hidden_channels: int,
    out_channels: int,
    squeeze_channels: int,
) -> MBConvWeights:
    """The weights back from their packed form, in its dtypes."""
    chunks, step = tile.chunks(hidden_channels), tile.step(out_channels)
    hidden, slabs = chunks * CHUNK, tile.store_slabs(out_channels)
    expand = packed.expand.reshape(chunks, -1, 4, 8, 4, 2, 2, 2).permute(0, 6, 2, 3, 1, 5, 4, 7).reshape(hidden, -1)
    taps, project = packed.weights.flatten().split([hidden // 16 * 9 * 16 * 16, hidden * len(slabs) * WIDEST])
    conv = conv_of_taps(swizzled(taps.reshape(-1, 16, 16)).reshape(-1, 3, 3, 16, 16))  # which undoes itself
    project = swizzled(project.reshape(-1, step, WIDEST)).reshape(-1, len(slabs), step, WIDEST).transpose(0, 1)
    project = torch.cat([slab.flatten(0, 1)[:, :width] for slab, width in zip(project, slabs, strict=True)], dim=1)
    expand_bias, conv_bias = _unpack_biases(packed.biases, chunks)
    return MBConvWeights(
        expand[:hidden_channels, :in_channels],
        expand_bias[:hidden_channels],
        conv[:hidden_channels],
        conv_bias[:hidden_channels],
        packed.squeeze[:hidden_channels, :squeeze_channels].T,
        packed.squeeze_bias[:squeeze_channels],
        packed.excite[:squeeze_channels, :hidden_channels].T,
        packed.excite_bias[:hidden_channels],
        project[:hidden_channels, :out_channels].T,
        packed.project_bias[:out_channels],
    )


def _pack_biases(expand: Tensor, conv: Tensor, tile: MBConvHopperTile) -> Tensor:
    expand = expand.reshape(-1, CHUNK // HALF, 4, 8).transpose(1, 2).reshape(-1, CHUNK)
    chunks = torch.cat([expand, conv.reshape(-1, CHUNK)], dim=1)
    elements = tile.bias_elements(len(conv))
    return torch.stack([padded(chunks[p::PARTITIONS].flatten(), elements) for p in range(PARTITIONS)])


def _unpack_biases(biases: Tensor, chunks: int) -> tuple[Tensor, Tensor]:
    # [partitions, turns, 2 CHUNK] -> [chunks, 2 CHUNK]
    in_order = biases.reshape(PARTITIONS, -1, 2 * CHUNK).transpose(0, 1).flatten(0, 1)[:chunks]
    expand, conv = in_order.split(CHUNK, dim=1)
    return expand.reshape(chunks, 4, CHUNK // HALF, 8).transpose(1, 2).flatten(), conv.flatten()

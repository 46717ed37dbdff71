"""Weights of a stride-2 ConvFirst block as its portable kernel reads them.

The grouped 3x3 convolution and the blur-pool after it are one grouped 5x5 convolution of stride 2. Its taps are folded
here in float64: those of inner output pixels, and others where the blur-pool reflects.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fusion.planner.convfirst_down_tile import BORDERS, TAPS, ConvFirstDownTile
from fusion.weights import ConvFirstWeights, padded

BLURS = ((0.25, 0.5, 0.25), (0.0, 0.5, 0.5), (0.5, 0.5, 0.0))
"""Of inner output rows, the first one, and the last one of an odd number of input rows: weights of the input rows
above, at and below the pixel, those that reflection brings back among them. Columns alike."""


@dataclass(frozen=True)
class PackedConvFirstDown:
    """Weights as the stride-2 ConvFirst kernel reads them, padded to slabs and to steps of the tile.

    `conv` is flat: for each of nine kinds of border (`fusion.planner.convfirst_down_tile.regions`) and each input slab
    `[25 taps, slab in, slab of the blurred input + slab out]`, diagonal in the first columns and zero between groups in
    the others. `expand` is `[2 C padded, hidden padded]`, for each slab the blurred input's rows and then the
    convolution's, `project` `[hidden padded, K padded]`; the biases are fp32.
    """

    conv: Tensor
    expand: Tensor
    expand_bias: Tensor
    project: Tensor
    project_bias: Tensor

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """In the order of the kernel's and the operator's arguments."""
        return self.conv, self.expand, self.expand_bias, self.project, self.project_bias


def pack_convfirst_down(
    weights: ConvFirstWeights, tile: ConvFirstDownTile, dtype: torch.dtype, device: torch.device | str
) -> PackedConvFirstDown:
    """Round once to `dtype` and lay out for `tile`, zero wherever slabs and hidden steps are padded.

    Raises ValueError for weights of a block without a blur-pool and for a tile whose slabs split a group.
    """
    slabs, out_slabs = tile.in_slabs(weights.in_channels), tile.out_slabs(weights.out_channels)
    if not weights.is_concatenated:
        raise ValueError(f"weights of a block without a blur-pool cannot be packed for {tile!r}; use a ConvFirstTile")
    if tile.splits_groups(weights.in_channels, weights.group_width):
        raise ValueError(
            f"weights cannot be packed for {tile!r}: slabs {slabs} split groups of {weights.group_width} channels; use "
            "a tile with a wider conv_slab"
        )
    hidden = tile.padded_hidden(weights.hidden_channels)
    halves = [padded(half, sum(slabs), hidden) for half in weights.expand.T.chunk(2)]
    by_slab = zip(*(half.split(slabs) for half in halves), strict=True)
    expand = torch.cat([rows for slab in by_slab for rows in slab])
    return PackedConvFirstDown(
        _pack_taps(weights.conv, slabs).to(device, dtype),
        expand.to(device, dtype),
        padded(weights.expand_bias[None], 1, hidden)[0].to(device, torch.float32),
        padded(weights.project.T, hidden, sum(out_slabs)).to(device, dtype),
        padded(weights.project_bias[None], 1, sum(out_slabs))[0].to(device, torch.float32),
    )


def blurred_taps(conv: Tensor) -> Tensor:
    """`[9, C, T, 5, 5]` taps of a convolution `[C, T, 3, 3]` with the blur-pool, for each kind of border."""
    spread = conv.new_zeros(3, 5, 3)  # [kind, row of the 5x5 taps, row of the 3x3 ones]
    for row in range(3):
        spread[:, row : row + 3, row] = conv.new_tensor(BLURS)
    return torch.einsum("kud,ctde,lve->klctuv", spread, conv, spread).flatten(0, 1)


def blur_taps(dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> Tensor:
    """`[9, 5, 5]` taps of the blur-pool alone, for each kind of border; exact in 16 bits."""
    blurs = F.pad(torch.tensor(BLURS, dtype=dtype, device=device), (1, 1))
    return torch.einsum("ku,lv->kluv", blurs, blurs).flatten(0, 1)


def unpack_taps(packed: Tensor, slabs: tuple[int, ...], channels: int, group_width: int) -> Tensor:
    """`[9, C, T, 5, 5]` taps of the convolution back from their packed form."""
    groups, sizes = [], [TAPS * 2 * slab * slab for slab in slabs]
    for slab, taps in zip(slabs, packed.reshape(BORDERS, -1).split(sizes, dim=1), strict=True):
        dense = taps.reshape(BORDERS, 5, 5, slab, 2 * slab)[..., slab:]
        for start in range(0, slab, group_width):
            groups.append(dense[..., start : start + group_width, start : start + group_width])
    taps_in_out = torch.stack(groups[: channels // group_width], dim=1)  # [9, groups, 5, 5, in, out]
    return taps_in_out.permute(0, 1, 5, 4, 2, 3).flatten(1, 2)


def unpack_expand(packed: Tensor, slabs: tuple[int, ...], channels: int) -> Tensor:
    """`[2 C, hidden padded]` expansion, the blurred input's rows first, back from its packed form."""
    halves = zip(*(rows.chunk(2) for rows in packed.split([2 * slab for slab in slabs])), strict=True)
    return torch.cat([torch.cat(half)[:channels] for half in halves])


def _pack_taps(conv: Tensor, slabs: tuple[int, ...]) -> Tensor:
    channels, width = conv.shape[:2]
    taps = blurred_taps(conv).permute(0, 3, 4, 2, 1).reshape(BORDERS, TAPS, width, channels)  # in of its group, out
    blur = blur_taps(conv.dtype, conv.device).reshape(BORDERS, TAPS, 1, 1)
    packed, first = [], 0
    for slab in slabs:
        dense = conv.new_zeros(BORDERS, TAPS, slab, 2 * slab)
        dense[..., :slab] = blur * torch.eye(slab, dtype=conv.dtype, device=conv.device)
        for start in range(0, min(slab, channels - first), width):
            stop = start + width
            dense[:, :, start:stop, slab + start : slab + stop] = taps[..., first + start : first + stop]
        packed.append(dense.flatten(1))
        first += slab
    return torch.cat(packed, dim=1).flatten()

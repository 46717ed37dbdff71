"""Weights of stride-2 ConvFirst blocks as their Hopper kernel reads them."""

from math import ceil

import torch
from torch import Tensor

from fusion.planner.convfirst_down_hopper_tile import COLUMN_TAPS, ConvFirstDownHopperTile, weight_sizes
from fusion.planner.hopper_tile import GROUP_WIDTH, PIECE
from fusion.weights import ConvFirstWeights, PackedHopper, conv_of_taps, conv_taps, pack_rows, padded, unpack_chunks


def pack_convfirst_down_hopper(
    weights: ConvFirstWeights, tile: ConvFirstDownHopperTile, dtype: torch.dtype, device: torch.device | str
) -> PackedHopper:
    """Round once to `dtype` and lay out as `PackedHopper`, zero wherever slabs and hidden steps are padded.

    The taps are those of the convolution with the blur-pool down the rows folded into it, for every piece of two groups
    `[3 columns, 11 matrices, 16 out, 16 in]`, and at the end `[4, 16, 16]`, multiples of the identity, if products
    blur the input.

    Raises ValueError for groups that are not 8 channels wide and for a block without a blur-pool.
    """
    if weights.group_width != GROUP_WIDTH or not weights.is_concatenated:
        blur = "with" if weights.is_concatenated else "without"
        raise ValueError(
            f"weights cannot be packed for {tile!r}: groups of {weights.group_width} channels {blur} a blur-pool are "
            f"not supported, only of {GROUP_WIDTH} with one; use another tile"
        )
    channels, padded_channels = weights.in_channels, PIECE * ceil(weights.in_channels / PIECE)
    of_input, of_conv = weights.expand.T.split(channels)
    expand = torch.cat([padded(part, padded_channels, weights.hidden_channels) for part in (of_input, of_conv)])
    taps = torch.cat([_column_taps(weights.conv).flatten(), _input_taps(weights.conv)[: tile.input_taps].flatten()])
    return pack_rows(taps, expand, weights, tile, dtype, device)


def unpack_convfirst_down_hopper(
    packed: Tensor, tile: ConvFirstDownHopperTile, in_channels: int, hidden_channels: int, out_channels: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`conv` `[C, 8, 3, 3]`, `expand` `[hidden, 2 C]`, `expand_bias` `[hidden]`, `project` `[K, hidden]`, back."""
    taps, chunks, bias, _ = packed.split(weight_sizes(tile, in_channels, hidden_channels, out_channels))
    taps = taps[: len(taps) - tile.input_taps * PIECE * PIECE].reshape(-1, 3, COLUMN_TAPS, PIECE, PIECE)
    v4, _, v0, _, v1 = taps[:, :, :5].unbind(2)
    # Rows as `conv_taps` has them, the last first.
    conv = conv_of_taps(torch.stack([4 * v4, 4 * v1 - 8 * v0, 4 * v0], dim=2))[:in_channels]
    expand, bias, project = unpack_chunks(chunks, bias, tile, in_channels, hidden_channels, out_channels)
    of_input, of_conv = expand.chunk(2, dim=1)
    return conv, torch.cat([of_input[:, :in_channels], of_conv[:, :in_channels]], dim=1), bias, project


def _column_taps(conv: Tensor) -> Tensor:
    """`[pieces, 3 columns, 11, 16 out, 16 in]`: v4, v2, v0, v3, v1, and t4, v2, t2, v0, t3, v1 for the top edge.

    With taps w0, w1, w2 of the convolution and (1, 2, 1) / 4 of the blur, v0 to v4 are those of input rows 2 i - 2 to
    2 i + 2. In an image's first row the blur takes y[1] for y[-1], so rows 0 to 2 have t2 to t4.
    """
    w2, w1, w0 = conv_taps(conv).unbind(2)
    v0, v1, v2, v3, v4 = w0 / 4, (w1 + 2 * w0) / 4, (w2 + 2 * w1 + w0) / 4, (2 * w2 + w1) / 4, w2 / 4
    t2, t3, t4 = (w1 + w0) / 2, (w2 + w1) / 2, w2 / 2
    return torch.stack([v4, v2, v0, v3, v1, t4, v2, t2, v0, t3, v1], dim=2)


def _input_taps(like: Tensor) -> Tensor:
    """`[4, 16, 16]`: a quarter, a quarter, a half and a quarter of the identity."""
    scales = torch.tensor([0.25, 0.25, 0.5, 0.25], dtype=like.dtype, device=like.device)
    return scales[:, None, None] * torch.eye(PIECE, dtype=like.dtype, device=like.device)

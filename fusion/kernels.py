"""Which kernel a tile runs: how its weights are packed, its operator, and its bare launch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fusion import mbconv_ops, ops
from fusion.ffn_weights import FfnWeights, PackedFfn
from fusion.mbconv_hopper_weights import PackedMBConvHopper, pack_mbconv_hopper, stack_mbconv_hopper
from fusion.mbconv_weights import MBConvWeights, PackedMBConv
from fusion.planner.families import HOPPER, MBCONV_HOPPER, Tile, family_of
from fusion.planner.ffn_tile import FfnTile
from fusion.planner.hopper_tile import HopperTile
from fusion.planner.mbconv_hopper_tile import MBConvHopperTile
from fusion.planner.mbconv_tile import MBConvTile
from fusion.weights import ConvFirstWeights, PackedConvFirst, PackedHopper

Weights = ConvFirstWeights | FfnWeights | MBConvWeights
Packed = PackedConvFirst | PackedHopper | PackedFfn | PackedMBConv | PackedMBConvHopper


def pack(weights: Weights, tile: Tile, dtype: torch.dtype, device: torch.device | str) -> Packed:
    """Round weights once and lay them out for the kernel that `tile` belongs to.

    Raises ValueError if that kernel cannot run groups of this width with this tile.
    """
    if isinstance(tile, HopperTile):
        return weights.pack_hopper(tile, dtype, device)
    if isinstance(tile, MBConvHopperTile):
        return pack_mbconv_hopper(weights, tile, dtype, device)
    return weights.pack(tile, dtype, device)


def pack_stage(
    weights: Sequence[MBConvWeights], tile: MBConvHopperTile, dtype: torch.dtype, device: torch.device | str
) -> PackedMBConvHopper:
    """Weights of MBConv blocks of equal sizes that one launch of the Hopper kernel runs one after the other."""
    return stack_mbconv_hopper([pack_mbconv_hopper(each, tile, dtype, device) for each in weights])


def packing(tile: Tile) -> tuple[str | int, ...]:
    """What the layout of packed weights depends on: tiles for which it is equal share them."""
    if isinstance(tile, HopperTile):
        return family_of(tile).name, tile.hidden, tile.slab
    if isinstance(tile, FfnTile):
        return family_of(tile).name, tile.hidden
    if isinstance(tile, MBConvHopperTile):
        return family_of(tile).name, tile.step
    if isinstance(tile, MBConvTile):
        sizes = tile.hidden, tile.project_hidden, tile.channels, tile.conv_slab, tile.project_out
        return family_of(tile).name, *sizes
    return family_of(tile).name, tile.hidden, tile.conv_slab


def run_mbconv(
    kernel: str,
    x: Tensor,
    packed: tuple[Tensor, ...],
    tile: list[int],
    *,
    hidden_channels: int,
    out_channels: int,
    squeeze_channels: int,
    group_width: int,
    activation: str,
    residual: bool,
) -> Tensor:
    """Call the operator of an MBConv kernel, as `run` does that of a ConvFirst kernel."""
    if kernel == MBCONV_HOPPER.name:
        sizes = hidden_channels, out_channels, squeeze_channels
        return mbconv_ops.mbconv_hopper(x, *packed, *sizes, activation, residual, tile)
    sizes = hidden_channels, out_channels, squeeze_channels, group_width
    return mbconv_ops.mbconv(x, *packed, *sizes, activation, residual, tile)


def run_ffn(
    x: Tensor,
    packed: tuple[Tensor, ...],
    tile: list[int],
    *,
    hidden_channels: int,
    out_channels: int,
    activation: str,
    residual: bool,
) -> Tensor:
    """Call the operator of the FFN kernel, as `run` does that of a ConvFirst kernel."""
    _check_hopper_activation(activation, "run the block layer by layer")
    return ops.ffn_hopper(x, *packed, hidden_channels, out_channels, residual, tile)


def run(
    kernel: str,
    x: Tensor,
    packed: tuple[Tensor, ...],
    tile: list[int],
    *,
    hidden_channels: int,
    out_channels: int,
    group_width: int,
    activation: str,
    residual: bool,
) -> Tensor:
    """Call the operator of a ConvFirst kernel on `x` `[N, C, H, W]`: `[N, K, H, W]`, channels_last.

    `kernel` is the name of the tile's family, `packed` are `pack(...).tensors()`, and `tile` is `Tile.to_ints()`: what
    torch.compile takes as constants. Raises what the operator raises, and ValueError for an activation that the kernel
    does not have.
    """
    if kernel != HOPPER.name:
        return ops.convfirst(x, *packed, hidden_channels, out_channels, group_width, activation, residual, tile)
    _check_hopper_activation(activation, "use a ConvFirstTile")
    return ops.convfirst_hopper(x, *packed, hidden_channels, out_channels, residual, tile)


def launch(
    x: Tensor,
    packed: Packed,
    out: Tensor,
    tile: Tile,
    *,
    hidden_channels: int,
    activation: str,
    residual: bool,
) -> None:
    """Launch the kernel that `tile` belongs to on `x` `[N, C, H, W]` into `out` `[N, K, H, W]`, both channels_last.

    Runs on the current device and checks no shapes: for measurements, where `run` would cost time and hide what a
    kernel leaves unwritten. Raises ValueError for an activation that the kernel does not have.
    """
    if isinstance(tile, HopperTile):
        from fusion.triton_kernels import convfirst_hopper

        _check_hopper_activation(activation, "use a ConvFirstTile")
        convfirst_hopper.launch(
            x, *packed.tensors(), out, hidden_channels=hidden_channels, residual=residual, tile=tile
        )
    elif isinstance(tile, FfnTile):
        from fusion.triton_kernels import ffn_hopper

        _check_hopper_activation(activation, "run the block layer by layer")
        ffn_hopper.launch(x, *packed.tensors(), out, hidden_channels=hidden_channels, residual=residual, tile=tile)
    elif isinstance(tile, MBConvHopperTile):
        from fusion.triton_kernels import mbconv_hopper

        sizes = {"hidden_channels": hidden_channels, "squeeze_channels": packed.squeeze_bias.shape[1]}
        mbconv_hopper.launch(x, *packed.tensors(), out, **sizes, activation=activation, residual=residual, tile=tile)
    elif isinstance(tile, MBConvTile):
        from fusion.triton_kernels import mbconv

        mbconv.launch(x, *packed.tensors(), out, activation=activation, residual=residual, tile=tile)
    else:
        from fusion.triton_kernels import convfirst

        convfirst.launch(x, *packed.tensors(), out, activation=activation, residual=residual, tile=tile)


def _check_hopper_activation(activation: str, instead: str) -> None:
    if activation != "relu":
        raise ValueError(f"the Hopper kernel has no activation {activation!r}, only 'relu'; {instead}")

"""Which kernel a tile runs: how its weights are packed, its operator, and its bare launch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fusion import convfirst_down_ops, mbconv_down_ops, mbconv_ops, ops
from fusion.convfirst_down_hopper_op import convfirst_down_hopper
from fusion.convfirst_down_hopper_weights import pack_convfirst_down_hopper
from fusion.convfirst_down_weights import PackedConvFirstDown, pack_convfirst_down
from fusion.edge_weights import HeadWeights, PackedHead, PackedStem, StemWeights
from fusion.ffn_weights import FfnWeights, PackedFfn
from fusion.mbconv_down_hopper_op import mbconv_down_hopper
from fusion.mbconv_hopper_weights import PackedMBConvHopper, pack_mbconv_hopper, stack_mbconv_hopper
from fusion.mbconv_weights import MBConvWeights, PackedMBConv
from fusion.planner.convfirst_down_hopper_tile import ConvFirstDownHopperTile
from fusion.planner.convfirst_down_tile import ConvFirstDownTile
from fusion.planner.families import CONVFIRST_DOWN_HOPPER, HOPPER, MBCONV_DOWN_HOPPER, MBCONV_HOPPER, Tile, family_of
from fusion.planner.ffn_tile import FfnTile
from fusion.planner.head_tile import HeadTile
from fusion.planner.hopper_tile import HopperTile
from fusion.planner.mbconv_down_hopper_tile import MBConvDownHopperTile
from fusion.planner.mbconv_down_tile import MBConvDownTile
from fusion.planner.mbconv_hopper_tile import MBConvHopperTile
from fusion.planner.mbconv_tile import MBConvTile
from fusion.planner.stem_tile import StemTile
from fusion.weights import ConvFirstWeights, PackedConvFirst, PackedHopper

Weights = ConvFirstWeights | FfnWeights | MBConvWeights | StemWeights | HeadWeights
Packed = (
    PackedConvFirst
    | PackedHopper
    | PackedConvFirstDown
    | PackedFfn
    | PackedMBConv
    | PackedMBConvHopper
    | PackedStem
    | PackedHead
)


def pack(weights: Weights, tile: Tile, dtype: torch.dtype, device: torch.device | str) -> Packed:
    """Round weights once and lay them out for the kernel that `tile` belongs to.

    Raises ValueError if that kernel cannot run groups of this width with this tile.
    """
    if isinstance(tile, HopperTile):
        return weights.pack_hopper(tile, dtype, device)
    if isinstance(tile, ConvFirstDownHopperTile):
        return pack_convfirst_down_hopper(weights, tile, dtype, device)
    if isinstance(tile, ConvFirstDownTile):
        return pack_convfirst_down(weights, tile, dtype, device)
    if isinstance(tile, MBConvHopperTile | MBConvDownHopperTile):
        return pack_mbconv_hopper(weights, tile, dtype, device)
    return weights.pack(tile, dtype, device)


def pack_stage(
    weights: Sequence[MBConvWeights], tile: MBConvHopperTile, dtype: torch.dtype, device: torch.device | str
) -> PackedMBConvHopper:
    """Weights of MBConv blocks of equal sizes that one launch of the Hopper kernel runs one after the other."""
    return stack_mbconv_hopper([pack_mbconv_hopper(each, tile, dtype, device) for each in weights])


def packing(tile: Tile) -> tuple[str | int, ...]:
    """What the layout of packed weights depends on: tiles for which it is equal share them."""
    if isinstance(tile, HopperTile | ConvFirstDownHopperTile):
        return family_of(tile).name, tile.hidden, tile.slab
    if isinstance(tile, FfnTile):
        return family_of(tile).name, tile.hidden
    if isinstance(tile, MBConvHopperTile | MBConvDownHopperTile):
        return family_of(tile).name, tile.step
    if isinstance(tile, MBConvTile | MBConvDownTile):
        sizes = tile.hidden, tile.project_hidden, tile.channels, tile.conv_slab, tile.project_out
        return family_of(tile).name, *sizes
    if isinstance(tile, StemTile):
        return family_of(tile).name, tile.group
    if isinstance(tile, HeadTile):
        return family_of(tile).name, tile.channels
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


def run_mbconv_down(
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
) -> Tensor:
    """Call the operator of a stride-2 MBConv kernel, as `run_mbconv` does that of a stride-1 one."""
    if kernel == MBCONV_DOWN_HOPPER.name:
        sizes = hidden_channels, out_channels, squeeze_channels
        return mbconv_down_hopper(x, *packed, *sizes, activation, tile)
    sizes = hidden_channels, out_channels, squeeze_channels, group_width
    return mbconv_down_ops.mbconv_down(x, *packed, *sizes, activation, tile)


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


def run_convfirst_down(
    kernel: str,
    x: Tensor,
    packed: tuple[Tensor, ...],
    tile: list[int],
    *,
    hidden_channels: int,
    out_channels: int,
    group_width: int,
    activation: str,
) -> Tensor:
    """Call the operator of a stride-2 ConvFirst kernel, as `run` does that of a stride-1 one."""
    if kernel == CONVFIRST_DOWN_HOPPER.name:
        _check_hopper_activation(activation, "use a ConvFirstDownTile")
        return convfirst_down_hopper(x, *packed, hidden_channels, out_channels, tile)
    sizes = hidden_channels, out_channels, group_width
    return convfirst_down_ops.convfirst_down(x, *packed, *sizes, activation, tile)


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
    elif isinstance(tile, ConvFirstDownHopperTile):
        from fusion.triton_kernels import convfirst_down_hopper as down_kernel

        _check_hopper_activation(activation, "use a ConvFirstDownTile")
        down_kernel.launch(x, *packed.tensors(), out, hidden_channels=hidden_channels, tile=tile)
    elif isinstance(tile, ConvFirstDownTile):
        from fusion.triton_kernels import convfirst_down

        convfirst_down.launch(x, *packed.tensors(), out, activation=activation, tile=tile)
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
    elif isinstance(tile, MBConvDownTile):
        from fusion.triton_kernels import mbconv_down

        mbconv_down.launch(x, *packed.tensors(), out, activation=activation, tile=tile)
    elif isinstance(tile, MBConvDownHopperTile):
        from fusion.triton_kernels import mbconv_down_hopper as down_hopper

        sizes = {"hidden_channels": hidden_channels, "squeeze_channels": packed.squeeze_bias.shape[1]}
        down_hopper.launch(x, *packed.tensors(), out, **sizes, activation=activation, tile=tile)
    elif isinstance(tile, StemTile):
        from fusion.triton_kernels import stem

        stem.launch(x, *packed.tensors(), out, activation=activation, tile=tile)
    elif isinstance(tile, HeadTile):
        from fusion.triton_kernels import head

        head.launch(x, *packed.tensors(), out, activation=activation, tile=tile)
    else:
        from fusion.triton_kernels import convfirst

        convfirst.launch(x, *packed.tensors(), out, activation=activation, residual=residual, tile=tile)


def _check_hopper_activation(activation: str, instead: str) -> None:
    if activation != "relu":
        raise ValueError(f"the Hopper kernel has no activation {activation!r}, only 'relu'; {instead}")

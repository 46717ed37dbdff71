"""Which kernel a tile runs, in one table: how its weights are packed, its operator, and its bare launch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor

from fusion import convfirst_down_ops, edge_ops, mbconv_down_ops, mbconv_ops, ops
from fusion.convfirst_down_hopper_op import convfirst_down_hopper
from fusion.convfirst_down_hopper_weights import pack_convfirst_down_hopper
from fusion.convfirst_down_weights import PackedConvFirstDown, pack_convfirst_down
from fusion.edge_weights import HeadWeights, PackedHead, PackedStem, StemWeights
from fusion.ffn_weights import FfnWeights, PackedFfn
from fusion.mbconv_down_hopper_op import mbconv_down_hopper
from fusion.mbconv_hopper_weights import PackedMBConvHopper, pack_mbconv_hopper, stack_mbconv_hopper
from fusion.mbconv_weights import MBConvWeights, PackedMBConv
from fusion.mbconv_windows_hopper_op import mbconv_down_windows_hopper, mbconv_windows_hopper
from fusion.op_checks import any_of
from fusion.planner import mbconv_hopper_tile
from fusion.planner.families import (
    CONVFIRST_DOWN,
    CONVFIRST_DOWN_HOPPER,
    FFN,
    HEAD,
    HOPPER,
    MBCONV,
    MBCONV_DOWN,
    MBCONV_DOWN_HOPPER,
    MBCONV_DOWN_WINDOWS_HOPPER,
    MBCONV_HOPPER,
    MBCONV_WINDOWS_HOPPER,
    PORTABLE,
    STEM,
    STEM_CONVFIRST_HOPPER,
    KernelFamily,
    Tile,
    family_of,
)
from fusion.planner.match import OPTIONS
from fusion.planner.mbconv_hopper_tile import MBConvHopperTile
from fusion.stem_convfirst_op import stem_convfirst_hopper
from fusion.stem_convfirst_weights import PackedStemConvFirst, StemConvFirstWeights
from fusion.weights import ConvFirstWeights, PackedConvFirst, PackedHopper

Weights = ConvFirstWeights | FfnWeights | MBConvWeights | StemWeights | StemConvFirstWeights | HeadWeights
Packed = (
    PackedConvFirst
    | PackedHopper
    | PackedConvFirstDown
    | PackedFfn
    | PackedMBConv
    | PackedMBConvHopper
    | PackedStem
    | PackedStemConvFirst
    | PackedHead
)


@dataclass(frozen=True)
class Runner:
    """How the kernel of a family runs a block.

    `pack` rounds weights once and lays them out for a tile; its fields `packed_for` are all that the layout depends on.
    `operator` takes `x`, the packed tensors, the `operator_options` by name, and the tile as integers. `launch`, in the
    module of `fusion.triton_kernels` that has the family's name, takes `x`, the packed tensors, the output, the
    `launch_options` and the tile. An option is one of the block's (`fusion.planner.match.OPTIONS`) or a size that the
    weights have. A kernel that has ReLU only has no option "activation". `other_activations` is what to do for
    activations that the kernel lacks, if it lacks any; it then has `activations`.
    """

    family: KernelFamily
    pack: Callable[[Weights, Tile, torch.dtype, torch.device | str], Packed]
    packed_for: tuple[str, ...]
    operator: Callable[..., Tensor]
    operator_options: tuple[str, ...]
    launch_options: tuple[str, ...]
    other_activations: str | None = None
    activations: tuple[str, ...] = ("relu",)

    def check_activation(self, activation: str) -> None:
        """Raises ValueError for an activation that the kernel does not have, if it lacks any."""
        if self.other_activations and activation not in self.activations:
            supported = any_of(map(repr, self.activations))
            raise ValueError(
                f"the Hopper kernel has no activation {activation!r}, only {supported}; {self.other_activations}"
            )


RUNNERS = {
    runner.family.name: runner
    for runner in (
        Runner(
            HOPPER,
            pack=ConvFirstWeights.pack_hopper,
            packed_for=("hidden", "slab"),
            operator=ops.convfirst_hopper,
            operator_options=("hidden_channels", "out_channels", "residual"),
            launch_options=("hidden_channels", "residual"),
            other_activations="use a ConvFirstTile",
        ),
        Runner(
            PORTABLE,
            pack=ConvFirstWeights.pack,
            packed_for=("hidden", "conv_slab"),
            operator=ops.convfirst,
            operator_options=("hidden_channels", "out_channels", "group_width", "activation", "residual", "stride"),
            launch_options=("activation", "residual", "stride"),
        ),
        Runner(
            CONVFIRST_DOWN_HOPPER,
            pack=pack_convfirst_down_hopper,
            packed_for=("hidden", "slab"),
            operator=convfirst_down_hopper,
            operator_options=("hidden_channels", "out_channels"),
            launch_options=("hidden_channels",),
            other_activations="use a ConvFirstDownTile",
        ),
        Runner(
            CONVFIRST_DOWN,
            pack=pack_convfirst_down,
            packed_for=("hidden", "conv_slab"),
            operator=convfirst_down_ops.convfirst_down,
            operator_options=("hidden_channels", "out_channels", "group_width", "activation"),
            launch_options=("activation",),
        ),
        Runner(
            FFN,
            pack=FfnWeights.pack,
            packed_for=("hidden",),
            operator=ops.ffn_hopper,
            operator_options=("hidden_channels", "out_channels", "residual"),
            launch_options=("hidden_channels", "residual"),
            other_activations="run the block layer by layer",
        ),
        Runner(
            MBCONV_HOPPER,
            pack=pack_mbconv_hopper,
            packed_for=("step",),
            operator=mbconv_ops.mbconv_hopper,
            operator_options=(
                *("hidden_channels", "out_channels", "squeeze_channels"),
                *("activation", "squeeze_activation", "residual"),
            ),
            launch_options=("hidden_channels", "squeeze_channels", "activation", "squeeze_activation", "residual"),
            other_activations="use an MBConvTile",
            activations=mbconv_hopper_tile.ACTIVATIONS,
        ),
        Runner(
            MBCONV_WINDOWS_HOPPER,
            pack=pack_mbconv_hopper,
            packed_for=("step",),
            operator=mbconv_windows_hopper,
            operator_options=(
                *("hidden_channels", "out_channels", "squeeze_channels"),
                *("activation", "squeeze_activation", "residual"),
            ),
            launch_options=("hidden_channels", "squeeze_channels", "activation", "squeeze_activation", "residual"),
            other_activations="use an MBConvTile",
            activations=mbconv_hopper_tile.ACTIVATIONS,
        ),
        Runner(
            MBCONV,
            pack=MBConvWeights.pack,
            packed_for=("hidden", "project_hidden", "channels", "conv_slab", "project_out"),
            operator=mbconv_ops.mbconv,
            operator_options=(
                *("hidden_channels", "out_channels", "squeeze_channels", "group_width"),
                *("activation", "squeeze_activation", "residual"),
            ),
            launch_options=("activation", "squeeze_activation", "residual"),
        ),
        Runner(
            MBCONV_DOWN_HOPPER,
            pack=pack_mbconv_hopper,
            packed_for=("step",),
            operator=mbconv_down_hopper,
            operator_options=(
                *("hidden_channels", "out_channels", "squeeze_channels"),
                *("activation", "squeeze_activation", "blur"),
            ),
            launch_options=("hidden_channels", "squeeze_channels", "activation", "squeeze_activation", "blur"),
            other_activations="use an MBConvDownTile",
            activations=mbconv_hopper_tile.ACTIVATIONS,
        ),
        Runner(
            MBCONV_DOWN_WINDOWS_HOPPER,
            pack=pack_mbconv_hopper,
            packed_for=("step",),
            operator=mbconv_down_windows_hopper,
            operator_options=(
                *("hidden_channels", "out_channels", "squeeze_channels"),
                *("activation", "squeeze_activation", "blur"),
            ),
            launch_options=("hidden_channels", "squeeze_channels", "activation", "squeeze_activation", "blur"),
            other_activations="use an MBConvDownTile",
            activations=mbconv_hopper_tile.ACTIVATIONS,
        ),
        Runner(
            MBCONV_DOWN,
            pack=MBConvWeights.pack,
            packed_for=("hidden", "project_hidden", "channels", "conv_slab", "project_out"),
            operator=mbconv_down_ops.mbconv_down,
            operator_options=(
                *("hidden_channels", "out_channels", "squeeze_channels", "group_width"),
                *("activation", "squeeze_activation", "blur"),
            ),
            launch_options=("activation", "squeeze_activation", "blur"),
        ),
        Runner(
            STEM,
            pack=StemWeights.pack,
            packed_for=("group",),
            operator=edge_ops.stem,
            operator_options=("out_channels", "activation"),
            launch_options=("activation",),
        ),
        Runner(
            STEM_CONVFIRST_HOPPER,
            pack=StemConvFirstWeights.pack,
            packed_for=("hidden", "slab"),
            operator=stem_convfirst_hopper,
            operator_options=("stem_channels", "hidden_channels", "out_channels", "residual"),
            launch_options=("stem_channels", "hidden_channels", "residual"),
            other_activations="run the stem and the block one after the other",
        ),
        Runner(
            HEAD,
            pack=HeadWeights.pack,
            packed_for=("channels",),
            operator=edge_ops.head,
            operator_options=("out_channels", "activation"),
            launch_options=("activation",),
        ),
    )
}
"""By the family's name."""


def pack(weights: Weights, tile: Tile, dtype: torch.dtype, device: torch.device | str) -> Packed:
    """Round weights once and lay them out for the kernel that `tile` belongs to.

    Raises ValueError if that kernel cannot run groups of this width with this tile.
    """
    return RUNNERS[family_of(tile).name].pack(weights, tile, dtype, device)


def pack_stage(
    weights: Sequence[MBConvWeights], tile: MBConvHopperTile, dtype: torch.dtype, device: torch.device | str
) -> PackedMBConvHopper:
    """Weights of MBConv blocks of equal sizes that one launch of the Hopper kernel runs one after the other."""
    return stack_mbconv_hopper([pack_mbconv_hopper(each, tile, dtype, device) for each in weights])


def packing(tile: Tile) -> tuple[str | int, ...]:
    """What the layout of packed weights depends on: tiles for which it is equal share them."""
    kernel = family_of(tile).name
    return kernel, *(getattr(tile, name) for name in RUNNERS[kernel].packed_for)


def run(
    kernel: str,
    x: Tensor,
    packed: tuple[Tensor, ...],
    tile: list[int],
    weights: Weights,
    **options: object,
) -> Tensor:
    """Call the operator of a kernel on `x` `[N, C, H, W]`: `[N, K, H', W']`, channels_last, or a head's `[N, K]`.

    `kernel` is the name of the tile's family, `packed` are `pack(...).tensors()`, and `tile` is `Tile.to_ints()`: what
    torch.compile takes as constants. Of `weights` only sizes are read; `options` are those of the block, by name, of
    which the kernel takes what it has. Raises what the operator raises, and ValueError for an activation that the
    kernel does not have.
    """
    runner = RUNNERS[kernel]
    runner.check_activation(options["activation"])
    return runner.operator(x, *packed, **_taken(runner.operator_options, weights, options), tile=tile)


def launch(
    x: Tensor,
    packed: Packed,
    out: Tensor,
    tile: Tile,
    weights: Weights,
    **options: object,
) -> None:
    """Launch the kernel that `tile` belongs to on `x` into `out`, of shapes and layouts as in `run`.

    Of `weights` only sizes are read, `options` are as in `run`. Runs on the current device and checks no shapes: for
    measurements, where `run` would cost time and hide what a kernel leaves unwritten. Raises ValueError for an
    activation that the kernel does not have.
    """
    kernel = family_of(tile).name
    runner = RUNNERS[kernel]
    runner.check_activation(options["activation"])
    taken = _taken(runner.launch_options, weights, options)
    # Imported here: Triton takes a while, and a CPU needs none.
    import_module(f"fusion.triton_kernels.{kernel}").launch(x, *packed.tensors(), out, **taken, tile=tile)


def _taken(names: tuple[str, ...], weights: Weights, options: dict[str, object]) -> dict[str, object]:
    """Options of the block and sizes of its weights, by name."""
    return {name: options[name] if name in OPTIONS else getattr(weights, name) for name in names}

"""Weights of an FFN block: batch norm folded in float64, then packed once into the layout that the kernel reads."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusion.planner.ffn_tile import WEIGHT_COLUMNS, FfnTile
from fusion.weights import LinearMap, bias_in_order, bias_of_quads


@dataclass(frozen=True)
class FfnWeights:
    """Folded weights of an FFN block, float64.

    `expand` is `[hidden, C]`, `expand_bias` `[hidden]`, `project` `[K, hidden]`, `project_bias` `[K]`.
    """

    expand: Tensor
    expand_bias: Tensor
    project: Tensor
    project_bias: Tensor

    @classmethod
    def fold(
        cls, expand: nn.Conv2d, expand_bn: nn.BatchNorm2d, project: nn.Conv2d, project_bn: nn.BatchNorm2d
    ) -> "FfnWeights":
        """Fold the layers of a block (section 5.5) into weights that share no memory with them."""
        return cls.of(LinearMap.of(expand, expand_bn), LinearMap.of(project, project_bn))

    @classmethod
    def of(cls, expand: LinearMap, project: LinearMap) -> "FfnWeights":
        """The weights of a block of these layers, each with its batch norm folded."""
        return cls(expand.matrix, expand.bias, project.matrix, project.bias)

    @property
    def in_channels(self) -> int:
        return self.expand.shape[1]

    @property
    def hidden_channels(self) -> int:
        return self.expand.shape[0]

    @property
    def out_channels(self) -> int:
        return self.project.shape[0]

    def pack(self, tile: FfnTile, dtype: torch.dtype, device: torch.device | str) -> "PackedFfn":
        """Round once to `dtype` and lay out for the kernel, zero wherever slabs and hidden steps are padded."""
        in_slabs, out_slabs = tile.in_slabs(self.in_channels), tile.out_slabs(self.out_channels)
        steps, hidden = tile.steps(self.hidden_channels), tile.padded_hidden(self.hidden_channels)
        # [hidden, channels] -> for each slab [steps, tile.hidden, 64]
        slabs = [
            F.pad(slab, (0, WEIGHT_COLUMNS - slab.shape[1], 0, hidden - slab.shape[0])).reshape(steps, tile.hidden, -1)
            for matrix, widths in ((self.expand, in_slabs), (self.project.T, out_slabs))
            for slab in F.pad(matrix, (0, sum(widths) - matrix.shape[1])).split(widths, dim=1)
        ]
        weights = torch.stack(slabs, dim=1).reshape(-1, WEIGHT_COLUMNS)
        hidden_bias = bias_of_quads(F.pad(self.expand_bias, (0, hidden - len(self.expand_bias))), steps)
        project_bias = F.pad(self.project_bias, (0, sum(out_slabs) - len(self.project_bias)))
        # By way of the CPU: the kernel may start before the kernel ahead of it in the stream has finished, which must
        # not be one that writes weights. Copies from the CPU are none.
        return PackedFfn(
            weights.to("cpu", dtype).to(device),
            hidden_bias.to("cpu", dtype).to(device),
            project_bias.to("cpu", torch.float32).to(device),
        )


@dataclass(frozen=True)
class PackedFfn:
    """Weights as the FFN kernel reads them, padded to slabs and to steps of the tile.

    `weights` is `[rows, 64]`: for each step of the hidden channels, `[hidden, slab in]` of every input slab, U
    transposed, then `[hidden, slab out]` of every output slab; narrow slabs are padded. `hidden_bias`, of the same
    dtype, is that of each step, permuted as the threads hold it; `project_bias` is fp32 `[K padded]`.
    """

    weights: Tensor
    hidden_bias: Tensor
    project_bias: Tensor

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """In the order of the kernel's and the operator's arguments."""
        return self.weights, self.hidden_bias, self.project_bias


def ffn_sizes(
    tile: FfnTile, in_channels: int, hidden_channels: int, out_channels: int
) -> tuple[list[int], list[int], list[int]]:
    """Shapes of the tensors of `PackedFfn`."""
    out_slabs = tile.out_slabs(out_channels)
    hidden = tile.padded_hidden(hidden_channels)
    slabs = len(tile.in_slabs(in_channels)) + len(out_slabs)
    return [hidden * slabs, WEIGHT_COLUMNS], [hidden], [sum(out_slabs)]


def unpack_ffn(
    packed: PackedFfn, tile: FfnTile, in_channels: int, hidden_channels: int, out_channels: int
) -> FfnWeights:
    """The weights back from their packed form, in its dtypes."""
    widths = tile.in_slabs(in_channels) + tile.out_slabs(out_channels)
    steps = tile.steps(hidden_channels)
    slabs = packed.weights.reshape(steps, len(widths), tile.hidden, WEIGHT_COLUMNS)
    slabs = [slabs[:, s, :, :width].flatten(0, 1) for s, width in enumerate(widths)]
    count = len(tile.in_slabs(in_channels))
    expand, project = torch.cat(slabs[:count], dim=1), torch.cat(slabs[count:], dim=1)
    hidden_bias = bias_in_order(packed.hidden_bias, steps)
    return FfnWeights(
        expand[:hidden_channels, :in_channels],
        hidden_bias[:hidden_channels],
        project[:hidden_channels, :out_channels].T,
        packed.project_bias[:out_channels],
    )

"""Inference twins of blocks that halve height and width (see `fusion.modules`)."""

from fusion.mbconv_weights import MBConvWeights
from fusion.modules import FusedBlock, Tuner
from fusion.planner.blocks import convfirst as convfirst_graph
from fusion.planner.blocks import mbconv as mbconv_graph
from fusion.planner.graph import BlockGraph
from fusion.planner.plan import plan_block
from fusion.weights import ConvFirstWeights


class FusedConvFirstDown(FusedBlock):
    """ConvFirst block of stride 2 for inference: `[N, C, H, W] -> [N, K, ceil(H / 2), ceil(W / 2)]`, channels_last.

    H and W must be at least 2, for the blur-pool reflects its input. For the rest see `FusedBlock`.

    Raises ValueError for weights of a block of stride 1, whose expansion has C inputs and not 2C.
    """

    weights: ConvFirstWeights

    def __init__(self, weights: ConvFirstWeights, *, activation: str, tuner: Tuner = plan_block):
        if weights.stride != 2:
            raise ValueError(
                f"FusedConvFirstDown takes weights of a stride-2 block, whose expansion has {2 * weights.in_channels} "
                f"inputs, got {weights.expand.shape[1]}; use FusedConvFirst for stride 1"
            )
        super().__init__(weights, activation=activation, residual=False, tuner=tuner)

    def _graph(self, *sizes: int, **options) -> BlockGraph:
        return convfirst_graph(*sizes, stride=2, group_width=self.weights.group_width, **options)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, group_width={self.weights.group_width}"


class FusedMBConvDown(FusedBlock):
    """MBConv block of stride 2 with squeeze-and-excitation for inference.

    `[N, C, H, W] -> [N, K, ceil(H / 2), ceil(W / 2)]`, channels_last. H and W must be at least 2, for the blur-pool
    reflects its input. For the rest see `FusedBlock`.
    """

    weights: MBConvWeights

    def __init__(self, weights: MBConvWeights, *, activation: str, tuner: Tuner = plan_block):
        super().__init__(weights, activation=activation, residual=False, tuner=tuner)

    def _graph(self, *sizes: int, **options) -> BlockGraph:
        weights = self.weights
        return mbconv_graph(
            *sizes, stride=2, group_width=weights.group_width, squeeze_channels=weights.squeeze_channels, **options
        )

    def extra_repr(self) -> str:
        weights = self.weights
        return f"{super().extra_repr()}, squeeze_channels={weights.squeeze_channels}, group_width={weights.group_width}"

"""Inference twin of the MBConv block of stride 2 (see `fusion.modules`)."""

from torch import Tensor

from fusion import kernels
from fusion.mbconv_weights import MBConvWeights
from fusion.modules import FusedBlock, Tuner
from fusion.planner.blocks import mbconv as mbconv_graph
from fusion.planner.graph import BlockGraph
from fusion.planner.plan import plan_block


class FusedMBConvDown(FusedBlock):
    """MBConv block of stride 2 for inference: `[N, C, H, W] -> [N, K, ceil(H / 2), ceil(W / 2)]`, channels_last.

    H and W must be at least 2, for the blur-pool reflects its input. For the rest see `FusedBlock`.
    """

    weights: MBConvWeights

    def __init__(self, weights: MBConvWeights, *, activation: str, tuner: Tuner = plan_block):
        super().__init__(weights, activation=activation, residual=False, tuner=tuner)

    def _graph(self, *sizes: int, **options) -> BlockGraph:
        weights = self.weights
        return mbconv_graph(
            *sizes, stride=2, group_width=weights.group_width, squeeze_channels=weights.squeeze_channels, **options
        )

    def _run(self, x: Tensor, kernel: str, tile: list[int], packed: tuple[Tensor, ...]) -> Tensor:
        return kernels.run_mbconv_down(
            kernel,
            x,
            packed,
            tile,
            hidden_channels=self.weights.hidden_channels,
            out_channels=self.weights.out_channels,
            squeeze_channels=self.weights.squeeze_channels,
            group_width=self.weights.group_width,
            activation=self.activation,
        )

    def extra_repr(self) -> str:
        weights = self.weights
        return f"{super().extra_repr()}, squeeze_channels={weights.squeeze_channels}, group_width={weights.group_width}"

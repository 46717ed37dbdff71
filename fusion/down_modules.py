"""Inference twins of blocks that halve height and width (see `fusion.modules`)."""

from torch import Tensor

from fusion import reference
from fusion.mbconv_weights import MBConvWeights
from fusion.modules import FusedBlock, Tuner
from fusion.planner.blocks import convfirst as convfirst_graph
from fusion.planner.blocks import mbconv as mbconv_graph
from fusion.planner.graph import BlockGraph
from fusion.planner.plan import plan_block
from fusion.weights import ConvFirstWeights


class FusedConvFirstDown(FusedBlock):
    """ConvFirst block of stride 2 with its blur-pool for inference.

    `[N, C, H, W] -> [N, K, ceil(H / 2), ceil(W / 2)]`, channels_last. H and W must be at least 2, for the blur-pool
    reflects its input. For the rest see `FusedBlock`.

    Raises ValueError for weights of a block without a blur-pool, whose expansion has C inputs and not 2C.
    """

    stride = 2

    weights: ConvFirstWeights

    def __init__(self, weights: ConvFirstWeights, *, activation: str, tuner: Tuner = plan_block):
        if not weights.is_concatenated:
            raise ValueError(
                "FusedConvFirstDown takes weights of a block with a blur-pool, whose expansion has "
                f"{2 * weights.in_channels} inputs, got {weights.expand.shape[1]}; use FusedConvFirst without one"
            )
        super().__init__(weights, activation=activation, residual=False, tuner=tuner)

    def _graph(self, *sizes: int, **options) -> BlockGraph:
        return convfirst_graph(*sizes, stride=2, group_width=self.weights.group_width, **options)

    def layerwise(self, x: Tensor) -> Tensor:
        return reference.convfirst_down(x, *self._weights_on(x.device), self.activation)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, group_width={self.weights.group_width}"


class FusedMBConvDown(FusedBlock):
    """MBConv block of stride 2 with squeeze-and-excitation for inference.

    `[N, C, H, W] -> [N, K, ceil(H / 2), ceil(W / 2)]`, channels_last. With `blur` a blur-pool halves what the
    convolution gives: H and W must be at least 2, for it reflects its input. Else the convolution has stride 2.
    `squeeze_activation` is that inside of squeeze-and-excitation, "relu" or "silu". For the rest see `FusedBlock`.
    """

    OPTIONS = (*FusedBlock.OPTIONS, "squeeze_activation", "blur")

    stride = 2

    weights: MBConvWeights

    def __init__(
        self,
        weights: MBConvWeights,
        *,
        activation: str,
        squeeze_activation: str = "relu",
        blur: bool = True,
        tuner: Tuner = plan_block,
    ):
        super().__init__(weights, activation=activation, residual=False, tuner=tuner)
        self.squeeze_activation = squeeze_activation
        self.blur = blur

    def _graph(self, *sizes: int, **options) -> BlockGraph:
        weights = self.weights
        return mbconv_graph(
            *sizes,
            stride=2,
            group_width=weights.group_width,
            squeeze_channels=weights.squeeze_channels,
            kernel_size=weights.kernel_size,
            **options,
        )

    def layerwise(self, x: Tensor) -> Tensor:
        options = {name: value for name, value in self.options.items() if name != "residual"}
        return reference.mbconv_down(x, *self._weights_on(x.device), **options)

    def extra_repr(self) -> str:
        weights = self.weights
        return f"{super().extra_repr()}, squeeze_channels={weights.squeeze_channels}, group_width={weights.group_width}"

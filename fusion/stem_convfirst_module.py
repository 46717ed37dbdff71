"""Inference twin of a network's stem together with the ConvFirst block after it (see `fusion.modules`)."""

from torch import Tensor, nn

from fusion import reference
from fusion.edge_modules import FusedStem
from fusion.modules import FusedBlock, FusedConvFirst, Tuner
from fusion.planner.blocks import stem_convfirst as stem_convfirst_graph
from fusion.planner.graph import BlockGraph
from fusion.planner.hopper_tile import GROUP_WIDTH
from fusion.planner.plan import plan_block
from fusion.planner.stem_convfirst_hopper_tile import IN_CHANNELS, STEM_SLABS
from fusion.planner.stem_tile import STRIDE
from fusion.stem_convfirst_weights import StemConvFirstWeights


class FusedStemConvFirst(FusedBlock):
    """A stem (see `FusedStem`) and the stride-1 ConvFirst block of its output as one kernel, for inference.

    `[N, 3, H, W] -> [N, K, H / 2, W / 2]`, channels_last, for Hopper GPUs and images that the kernel takes
    (`fusion.planner.stem_convfirst_hopper_tile.why_unsupported`): for others there is a PlanError, and the two blocks
    run one after the other. The activation is that of both, ReLU. For the rest see `FusedBlock`.
    """

    weights: StemConvFirstWeights

    def __init__(self, weights: StemConvFirstWeights, *, activation: str, residual: bool, tuner: Tuner = plan_block):
        super().__init__(weights, activation=activation, residual=residual, tuner=tuner)

    stride = STRIDE

    def layerwise(self, x: Tensor) -> Tensor:
        return reference.stem_convfirst(x, *self._weights_on(x.device), **self.options)

    def _graph(self, *sizes: int, **options) -> BlockGraph:
        weights = self.weights
        return stem_convfirst_graph(
            *sizes, stem_channels=weights.stem_channels, group_width=weights.group_width, **options
        )

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, stem_channels={self.weights.stem_channels}, "
            f"group_width={self.weights.group_width}"
        )


def join_stem(stem: nn.Module, block: nn.Module) -> FusedStemConvFirst | None:
    """The twin of a network's stem and the block after it from the twins of each; None if one kernel cannot run them.

    Whether it can also depends on the GPU and the size of images, which the plan tells (`FusedBlock.plan`).
    """
    if type(stem) is not FusedStem or type(block) is not FusedConvFirst:
        return None
    fits = (
        stem.activation == block.activation == "relu"
        and stem.weights.in_channels == IN_CHANNELS
        and stem.weights.out_channels == block.weights.in_channels <= max(STEM_SLABS)
        and block.weights.group_width == GROUP_WIDTH
        and block.stride == 1
    )
    if not fits:
        return None
    weights = StemConvFirstWeights.join(stem.weights, block.weights)
    return FusedStemConvFirst(weights, activation=block.activation, residual=block.residual, tuner=block.tuner)

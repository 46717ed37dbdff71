"""The FFN block: an inverted bottleneck of two 1x1 convolutions."""

from torch import Tensor, nn

from fusion.ffn_weights import FfnWeights
from fusion.modules import FusedFfn, Tuner
from fusion.planner.plan import PlanError, plan_block


class Ffn(nn.Module):
    """Two 1x1 convolutions, each with a batch norm and no bias, and a ReLU between them.

    A. Lavin, On the Efficiency of Convolutional Neural Networks, section 5.2. `[N, C, H, W] -> [N, K, H, W]`; the
    hidden tensor has `expansion * C` channels. The residual is added iff C == K.
    """

    def __init__(self, in_channels: int, out_channels: int, *, expansion: int, activation: type[nn.Module] = nn.ReLU):
        super().__init__()
        self.has_residual = in_channels == out_channels
        self.expand = nn.Conv2d(in_channels, expansion * in_channels, 1, bias=False)
        self.expand_bn = nn.BatchNorm2d(expansion * in_channels)
        self.act = activation()
        self.project = nn.Conv2d(expansion * in_channels, out_channels, 1, bias=False)
        self.project_bn = nn.BatchNorm2d(out_channels)

    def fused(self, tuner: Tuner = plan_block) -> FusedFfn:
        """The block's inference twin: batch norm folded, one kernel, on GPUs of compute capability 9.0 only.

        `tuner` chooses the kernel's tile; `fusion.tuner.tune_block` does so by measurement.

        Raises:
            PlanError: the activation is not ReLU.
            RuntimeError: the block is in training mode.
        """
        if self.training:
            raise RuntimeError("a block in training mode cannot be fused; call eval() first")
        if not isinstance(self.act, nn.ReLU):
            raise PlanError(
                f"no fused kernel runs Ffn with {type(self.act).__name__}; supported is ReLU: run the block in eager "
                "mode"
            )
        weights = FfnWeights.fold(self.expand, self.expand_bn, self.project, self.project_bn)
        return FusedFfn(weights, activation="relu", residual=self.has_residual, tuner=tuner)

    def forward(self, x: Tensor) -> Tensor:
        y = self.project_bn(self.project(self.act(self.expand_bn(self.expand(x)))))
        return x + y if self.has_residual else y

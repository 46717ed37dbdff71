"""Convolution, batch norm and activation: the stem of the network, and what its head pools."""

from torch import Tensor, nn

from fusion.edge_modules import FusedStem
from fusion.edge_weights import StemWeights
from fusion.modules import Tuner
from fusion.planner.plan import PlanError, plan_block
from fusion.planner.stem_tile import MAX_IN_CHANNELS

from .activation_names import EDGE_ACTIVATION_NAMES, fusible_activation


class ConvBnAct(nn.Module):
    """Dense convolution without bias, zero-padded by half the kernel, then batch norm and activation.

    `[N, C, H, W] -> [N, K, ceil(H / stride), ceil(W / stride)]` for an odd `kernel_size`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        activation: type[nn.Module] = nn.ReLU,
    ):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        self.act = activation()

    def fused(self, tuner: Tuner = plan_block) -> FusedStem:
        """The inference twin of a stem, a 3x3 convolution of stride 2: batch norm folded, one kernel.

        It takes `[N, C, H, W]` in fp16 or bf16 on GPUs and any floating dtype on CPUs. `tuner` chooses the kernel's
        tile; `fusion.tuner.tune_block` does so by measurement.

        Raises:
            PlanError: no kernel runs this convolution, because of its size, its stride, its channels or its activation.
            RuntimeError: the module is in training mode.
        """
        activation = self._fusible_activation()
        conv = self.conv
        if conv.kernel_size != (3, 3) or conv.stride != (2, 2) or conv.in_channels > MAX_IN_CHANNELS:
            height, width = conv.kernel_size
            raise PlanError(
                f"no fused kernel runs a {height}x{width} convolution of stride {conv.stride[0]} and "
                f"{conv.in_channels} input channels alone; supported is a stem, 3x3 of stride 2 and at most "
                f"{MAX_IN_CHANNELS} channels: run it in eager mode"
            )
        return FusedStem(StemWeights.fold(conv, self.bn), activation=activation, tuner=tuner)

    def _fusible_activation(self) -> str:
        if self.training:
            raise RuntimeError("a block in training mode cannot be fused; call eval() first")
        return fusible_activation(type(self).__name__, self.act, EDGE_ACTIVATION_NAMES)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))

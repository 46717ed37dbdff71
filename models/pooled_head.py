"""The head of the network: what its classifier takes."""

from torch import Tensor, nn

from fusion.edge_modules import FusedHead
from fusion.edge_weights import HeadWeights
from fusion.modules import Tuner
from fusion.planner.plan import plan_block

from .conv_bn_act import ConvBnAct


class PooledHead(ConvBnAct):
    """1x1 convolution without bias, batch norm, activation, global average pool: `[N, C, H, W] -> [N, K]`.

    Parameters are named as in `ConvBnAct`. `features` gives the map that is pooled.
    """

    def __init__(self, in_channels: int, out_channels: int, *, activation: type[nn.Module] = nn.SiLU):
        super().__init__(in_channels, out_channels, 1, activation=activation)

    def features(self, x: Tensor) -> Tensor:
        """`[N, C, H, W] -> [N, K, H, W]`."""
        return super().forward(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x).mean((2, 3))

    def fused(self, tuner: Tuner = plan_block) -> FusedHead:
        """The head's inference twin: batch norm folded, one kernel, and a map that never reaches memory.

        It takes `[N, C, H, W]` in fp16 or bf16 on GPUs and any floating dtype on CPUs. `tuner` chooses the kernel's
        tile; `fusion.tuner.tune_block` does so by measurement.

        Raises:
            PlanError: no kernel has the activation.
            RuntimeError: the head is in training mode.
        """
        activation = self._fusible_activation()
        return FusedHead(HeadWeights.fold(self.conv, self.bn), activation=activation, tuner=tuner)

"""The ConvFirst block."""

import torch
from torch import Tensor, nn

from fusion.down_modules import FusedConvFirstDown
from fusion.modules import FusedConvFirst, Tuner
from fusion.planner.plan import plan_block
from fusion.weights import ConvFirstWeights

from .activation_names import fusible_activation
from .blurpool import BlurPool
from .drop_path import DropPath
from .grouped_conv import grouped_conv


class ConvFirst(nn.Module):
    """Grouped 3x3 convolution followed by an inverted bottleneck of two 1x1 convolutions.

    A. Lavin, On the Efficiency of Convolutional Neural Networks, section 5.3. Each convolution has a batch norm and no
    bias; the only activation stands between the 1x1 convolutions. With stride 2 the input and the full-resolution
    output of the grouped convolution are concatenated, and the 2C channels down-sampled by `BlurPool`; or, if not
    `blur`, the grouped convolution itself has stride 2.

    `[N, C, H, W] -> [N, K, ceil(H / stride), ceil(W / stride)]`. The hidden tensor has `expansion * C` channels for
    either stride. The residual is added iff the stride is 1 and C == K.

    Raises:
        ValueError: the stride is neither 1 nor 2, or `in_channels` is not a multiple of `group_width`.
    """

    LINEAR_CONVS = ("conv", "project")
    """Convolutions that no activation follows, for the scale of fresh weights."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        expansion: int,
        stride: int = 1,
        group_width: int = 8,
        activation: type[nn.Module] = nn.ReLU,
        drop_path: float = 0.0,
        blur: bool = True,
    ):
        super().__init__()
        if stride not in (1, 2):
            raise ValueError(f"ConvFirst has stride 1 or 2, got {stride}; chain blocks for a larger stride")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.hidden_channels = hidden_channels = expansion * in_channels
        self.stride = stride
        self.group_width = group_width
        self.has_residual = stride == 1 and in_channels == out_channels

        has_blur = blur and stride == 2
        self.conv = grouped_conv(in_channels, group_width, bias=False, stride=1 if has_blur else stride)
        self.conv_bn = nn.BatchNorm2d(in_channels)
        self.blur = BlurPool(2 * in_channels) if has_blur else None
        self.expand = nn.Conv2d(2 * in_channels if has_blur else in_channels, hidden_channels, 1, bias=False)
        self.expand_bn = nn.BatchNorm2d(hidden_channels)
        self.act = activation()
        self.project = nn.Conv2d(hidden_channels, out_channels, 1, bias=False)
        self.project_bn = nn.BatchNorm2d(out_channels)
        self.drop_path = DropPath(drop_path)

    def fused(self, tuner: Tuner = plan_block) -> FusedConvFirst | FusedConvFirstDown:
        """The block's inference twin: batch norm folded, one kernel.

        It takes `[N, C, H, W]` in fp16 or bf16 on GPUs and any floating dtype on CPUs. `tuner` chooses the kernel's
        tile; `fusion.tuner.tune_block` does so by measurement.

        Raises:
            PlanError: no kernel runs this block, because of its activation.
            RuntimeError: the block is in training mode.
        """
        if self.training:
            raise RuntimeError("a block in training mode cannot be fused; call eval() first")
        activation = fusible_activation("ConvFirst", self.act)
        weights = ConvFirstWeights.fold(
            self.conv, self.conv_bn, self.expand, self.expand_bn, self.project, self.project_bn
        )
        if self.blur is not None:
            return FusedConvFirstDown(weights, activation=activation, tuner=tuner)
        options = {"activation": activation, "residual": self.has_residual, "stride": self.stride}
        return FusedConvFirst(weights, **options, tuner=tuner)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv_bn(self.conv(x))
        if self.blur is not None:
            y = self.blur(torch.cat([x, y], dim=1))
        y = self.act(self.expand_bn(self.expand(y)))
        y = self.project_bn(self.project(y))
        return x + self.drop_path(y) if self.has_residual else y

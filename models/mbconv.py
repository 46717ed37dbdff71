"""The MBConv block with squeeze-and-excitation."""

from torch import Tensor, nn

from fusion.down_modules import FusedMBConvDown
from fusion.mbconv_weights import MBConvWeights
from fusion.modules import FusedMBConv, Tuner
from fusion.planner.plan import PlanError, plan_block

from .activation_names import SQUEEZE_ACTIVATION_NAMES, fusible_activation
from .blurpool import BlurPool
from .drop_path import DropPath
from .grouped_conv import grouped_conv
from .squeeze_excite import SqueezeExcite


class MBConv(nn.Module):
    """Inverted bottleneck with a grouped convolution and a squeeze-and-excitation gate on its hidden tensor.

    A. Lavin, On the Efficiency of Convolutional Neural Networks, section 5.4. Each convolution has a bias and a batch
    norm; the expansion and the grouped convolution are followed by the activation. With stride 2 the output of the
    grouped convolution is down-sampled by `BlurPool`, ahead of the gate; or, if not `blur`, the grouped convolution
    itself has stride 2. The grouped convolution is `kernel_size` x `kernel_size`.

    `[N, C, H, W] -> [N, K, ceil(H / stride), ceil(W / stride)]`. The hidden tensor has `expansion * C` channels, the
    squeeze vector `se_ratio * C`, activated by `squeeze_activation`. The residual is added iff the stride is 1 and
    C == K.

    Raises:
        ValueError: the stride is neither 1 nor 2, the hidden channels are not a multiple of `group_width`, the
            kernel size is even, or the squeeze width comes to less than 1.
    """

    LINEAR_CONVS = ("project",)
    """Convolutions that no activation follows, for the scale of fresh weights."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        expansion: int = 4,
        stride: int = 1,
        group_width: int = 8,
        se_ratio: float = 0.25,
        activation: type[nn.Module] = nn.SiLU,
        squeeze_activation: type[nn.Module] = nn.ReLU,
        blur: bool = True,
        kernel_size: int = 3,
        drop_path: float = 0.0,
    ):
        super().__init__()
        if stride not in (1, 2):
            raise ValueError(f"MBConv has stride 1 or 2, got {stride}; chain blocks for a larger stride")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.hidden_channels = hidden_channels = expansion * in_channels
        self.stride = stride
        self.group_width = group_width
        self.has_residual = stride == 1 and in_channels == out_channels

        self.expand = nn.Conv2d(in_channels, hidden_channels, 1)
        self.expand_bn = nn.BatchNorm2d(hidden_channels)
        has_blur = stride == 2 and blur
        conv_stride = 1 if has_blur else stride
        self.conv = grouped_conv(hidden_channels, group_width, bias=True, stride=conv_stride, kernel_size=kernel_size)
        self.conv_bn = nn.BatchNorm2d(hidden_channels)
        self.act = activation()
        self.blur = BlurPool(hidden_channels) if has_blur else None
        self.se = SqueezeExcite(hidden_channels, round(se_ratio * in_channels), squeeze_activation)
        self.project = nn.Conv2d(hidden_channels, out_channels, 1)
        self.project_bn = nn.BatchNorm2d(out_channels)
        self.drop_path = DropPath(drop_path)

    def fused(self, tuner: Tuner = plan_block) -> FusedMBConv | FusedMBConvDown:
        """The block's inference twin: batch norm folded; on Hopper one kernel for small images, else two a micro-batch.

        It takes `[N, C, H, W]` in fp16 or bf16 on GPUs and any floating dtype on CPUs. `tuner` chooses the kernels'
        tile; `fusion.tuner.tune_block` does so by measurement.

        Raises:
            PlanError: no kernel runs this block, because of its activations.
            RuntimeError: the block is in training mode.
        """
        if self.training:
            raise RuntimeError("a block in training mode cannot be fused; call eval() first")
        activation = fusible_activation("MBConv", self.act)
        squeeze_activation = SQUEEZE_ACTIVATION_NAMES.get(type(self.se.act))
        if squeeze_activation is None:
            supported = " or ".join(kind.__name__ for kind in SQUEEZE_ACTIVATION_NAMES)
            raise PlanError(
                f"no fused kernel runs MBConv with {type(self.se.act).__name__} inside of squeeze-and-excitation; "
                f"supported are {supported}: run the block in eager mode"
            )
        weights = MBConvWeights.fold(
            self.expand,
            self.expand_bn,
            self.conv,
            self.conv_bn,
            self.se.squeeze,
            self.se.excite,
            self.project,
            self.project_bn,
        )
        activations = {"activation": activation, "squeeze_activation": squeeze_activation}
        if self.stride == 2:
            return FusedMBConvDown(weights, **activations, blur=self.blur is not None, tuner=tuner)
        return FusedMBConv(weights, **activations, residual=self.has_residual, tuner=tuner)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.expand_bn(self.expand(x)))
        y = self.act(self.conv_bn(self.conv(y)))
        if self.blur is not None:
            y = self.blur(y)
        y = self.project_bn(self.project(self.se(y)))
        return x + self.drop_path(y) if self.has_residual else y

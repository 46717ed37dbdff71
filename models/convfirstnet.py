"""ConvFirstNet: A. Lavin, On the Efficiency of Convolutional Neural Networks, section 6 and Table 3."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import sqrt

import torch
from torch import Tensor, nn

from .conv_bn_act import ConvBnAct
from .convfirst import ConvFirst
from .features import FeatureExtractor, FeatureInfo
from .image_check import check_images, min_image_size
from .mbconv import MBConv
from .pooled_head import PooledHead
from .registry import register_model

# The check reads sizes, which a symbolic trace does not know: it becomes one node of the graph.
torch.fx.wrap("check_images")

STAGE_BLOCKS = (ConvFirst, ConvFirst, ConvFirst, MBConv, MBConv)


@dataclass(frozen=True, kw_only=True)
class ConvFirstNetConfig:
    """Widths, depths and regularisation of a ConvFirstNet.

    Raises:
        ValueError: `stage_channels`, `depths` or `expansions` does not have one positive entry for each stage.
    """

    stem_channels: int
    stage_channels: tuple[int, ...]
    depths: tuple[int, ...]
    expansions: tuple[int, ...] = (3, 6, 6, 4, 4)
    group_width: int = 8
    head_channels: int = 1280
    drop_rate: float = 0.3
    """Dropout probability ahead of the classifier."""
    drop_path_rate: float = 0.2
    """Drop-path probability of the last block; it grows linearly from 0 in the first."""

    def __post_init__(self):
        for name in ("stage_channels", "depths", "expansions"):
            values = getattr(self, name)
            if len(values) != len(STAGE_BLOCKS) or min(values) < 1:
                raise ValueError(f"{name}={values} must have {len(STAGE_BLOCKS)} positive entries, one for each stage")


CONFIGS = {
    "convfirstnet_pico": ConvFirstNetConfig(
        stem_channels=16, stage_channels=(16, 32, 48, 128, 128), depths=(1, 2, 3, 11, 11), drop_rate=0.2
    ),
    "convfirstnet_nano": ConvFirstNetConfig(
        stem_channels=24, stage_channels=(24, 48, 64, 160, 160), depths=(1, 3, 4, 14, 14)
    ),
    "convfirstnet_tiny": ConvFirstNetConfig(
        stem_channels=24, stage_channels=(24, 48, 72, 192, 192), depths=(2, 5, 6, 18, 18)
    ),
    "convfirstnet_small": ConvFirstNetConfig(
        stem_channels=32, stage_channels=(32, 64, 96, 256, 256), depths=(2, 5, 6, 18, 18)
    ),
}

PAPER_TOP1 = {
    "convfirstnet_pico": 79.86,
    "convfirstnet_nano": 81.83,
    "convfirstnet_tiny": 82.75,
    "convfirstnet_small": 83.31,
}
"""ImageNet-1k top-1 accuracy in percent at 256x256 that the paper reports; no weights come with this project."""


class ConvFirstNet(nn.Module):
    """Image classifier: stem, three stages of ConvFirst blocks, two of MBConv blocks, and a classification head.

    `[N, in_chans, H, W] -> [N, num_classes]`, in the dtype of the parameters and any memory format. The stem and the
    first block of stages 2 to 5 have stride 2 and round odd sizes up, so any H and W of at least 17 pixels will do.

    Args:
        config: widths, depths and regularisation.
        num_classes: width of the logits; 0 leaves the classifier out.
        in_chans: channels of the input image.
        zero_init_last: start every residual branch at zero (the scale of its last batch norm).

    Attributes:
        num_features: channels of `forward_features` and of the pre-logits.
        feature_info: one dict for each stage (`num_chs`, `reduction`, `module`).
        default_cfg: input sizes and normalisation that the named variants expect; empty for another configuration.

    Raises:
        ValueError: at construction, channels that are not a multiple of the group width; in `forward`, an input that
            is not `[N, in_chans, H, W]` or is too small.
    """

    JOINED = ("stem", "stages.0.0")
    """A stem and the block that alone takes its output: `fusion.fuse` may run them as one kernel."""

    def __init__(
        self,
        config: ConvFirstNetConfig,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        zero_init_last: bool = False,
    ):
        super().__init__()
        self.config = config
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = config.head_channels
        self.default_cfg: dict = {}

        self.stem = ConvBnAct(in_chans, config.stem_channels, 3, stride=2)
        self.stages = _build_stages(config)
        self.feature_info = FeatureInfo(
            {"num_chs": channels, "reduction": 2 ** (index + 1), "module": f"stages.{index}"}
            for index, channels in enumerate(config.stage_channels)
        )
        self.head = PooledHead(config.stage_channels[-1], self.num_features)
        self.dropout = nn.Dropout(config.drop_rate)
        self.classifier = _classifier(self.num_features, num_classes)
        self._init_weights(zero_init_last)

    def forward_features(self, x: Tensor) -> Tensor:
        """`[N, in_chans, H, W] -> [N, num_features, ceil(H / 32), ceil(W / 32)]`."""
        return self.head.features(self._trunk(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """`[N, num_features, h, w] -> [N, num_classes]`, or `[N, num_features]` with `pre_logits`."""
        x = self.dropout(x.mean((2, 3)))
        return x if pre_logits else self.classifier(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.dropout(self.head(self._trunk(x))))

    def _trunk(self, x: Tensor) -> Tensor:
        x = check_images(x, self.in_chans, min_image_size(len(self.stages) - 1))
        return self.stages(self.stem(x))

    def get_classifier(self) -> nn.Module:
        return self.classifier

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier with a fresh one of the same device and dtype; 0 classes leave the identity."""
        self.num_classes = num_classes
        self.classifier = _classifier(self.num_features, num_classes).to(self.head.conv.weight)
        self.classifier.apply(_init_layer)

    def _init_weights(self, zero_init_last: bool) -> None:
        self.apply(_init_layer)
        for stage in self.stages:
            for block in stage:
                for name in block.LINEAR_CONVS:
                    _init_conv(block.get_submodule(name), gain=1)
                if zero_init_last and block.has_residual:
                    nn.init.zeros_(block.project_bn.weight)


def _build_stages(config: ConvFirstNetConfig) -> nn.Sequential:
    last_block = max(sum(config.depths) - 1, 1)
    stages = nn.Sequential()
    in_channels = config.stem_channels
    block_index = 0
    for stage_index, block_type in enumerate(STAGE_BLOCKS):
        stage = nn.Sequential()
        for position in range(config.depths[stage_index]):
            block = block_type(
                in_channels,
                config.stage_channels[stage_index],
                expansion=config.expansions[stage_index],
                stride=2 if stage_index > 0 and position == 0 else 1,
                group_width=config.group_width,
                drop_path=config.drop_path_rate * block_index / last_block,
            )
            stage.append(block)
            in_channels = block.out_channels
            block_index += 1
        stages.append(stage)
    return stages


def _classifier(num_features: int, num_classes: int) -> nn.Module:
    return nn.Linear(num_features, num_classes) if num_classes else nn.Identity()


def _init_layer(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        _init_conv(module, gain=2)
    elif isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def _init_conv(conv: nn.Conv2d, gain: float) -> None:
    """He's rule for the fan-out; `gain` (of the variance) is 2 if a rectifier follows, 1 if nothing non-linear does.

    With gain 2 throughout, a fresh ConvFirstNet-Small in eval mode, where batch norm does not normalise yet, reaches
    3e8 and overflows fp16; told apart, its activations stay below 100.
    """
    # torch's own fan-out does not know about groups.
    fan_out = conv.out_channels // conv.groups * conv.kernel_size[0] * conv.kernel_size[1]
    nn.init.normal_(conv.weight, std=sqrt(gain / fan_out))
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)


def _build(
    variant: str,
    *,
    num_classes: int,
    in_chans: int,
    zero_init_last: bool = False,
    features_only: bool = False,
    out_indices: Sequence[int] | None = None,
    **overrides,
) -> nn.Module:
    """Build a variant; `overrides` replace fields of its `ConvFirstNetConfig`."""
    if out_indices is not None and not features_only:
        raise ValueError("out_indices selects feature maps; it needs features_only=True")
    config = replace(CONFIGS[variant], **overrides)
    model = ConvFirstNet(config, num_classes=num_classes, in_chans=in_chans, zero_init_last=zero_init_last)
    model.default_cfg = {
        "architecture": variant,
        "num_classes": num_classes,
        "input_size": (in_chans, 224, 224),
        "test_input_size": (in_chans, 256, 256),
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "stem.conv",
        "classifier": "classifier",
        "paper_top1": PAPER_TOP1[variant],
    }
    if features_only:
        return FeatureExtractor(model, range(len(STAGE_BLOCKS)) if out_indices is None else out_indices)
    return model


@register_model
def convfirstnet_pico(**kwargs) -> nn.Module:
    """ConvFirstNet Pico: 5.914 M parameters, 0.860 G multiply-accumulates at 256x256."""
    return _build("convfirstnet_pico", **kwargs)


@register_model
def convfirstnet_nano(**kwargs) -> nn.Module:
    """ConvFirstNet Nano: 10.166 M parameters, 1.812 G multiply-accumulates at 256x256."""
    return _build("convfirstnet_nano", **kwargs)


@register_model
def convfirstnet_tiny(**kwargs) -> nn.Module:
    """ConvFirstNet Tiny: 17.237 M parameters, 3.226 G multiply-accumulates at 256x256."""
    return _build("convfirstnet_tiny", **kwargs)


@register_model
def convfirstnet_small(**kwargs) -> nn.Module:
    """ConvFirstNet Small: 28.546 M parameters, 5.493 G multiply-accumulates at 256x256."""
    return _build("convfirstnet_small", **kwargs)

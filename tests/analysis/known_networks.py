"""The networks of the paper's figure 3, as their authors describe them, without what only training needs."""

import torch
from torch import Tensor, nn


def conv_norm(inputs: int, outputs: int, size: int = 1, stride: int = 1, groups: int = 1, act=None) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), *([act()] if act else []))


class Residual(nn.Module):
    def __init__(self, branch: nn.Module, shortcut: nn.Module | None = None, act: nn.Module | None = None):
        super().__init__()
        self.branch, self.shortcut, self.act = branch, shortcut or nn.Identity(), act or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.shortcut(x) + self.branch(x))


def resnet101() -> nn.Sequential:
    layers = [conv_norm(3, 64, 7, 2, act=nn.ReLU), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for stage, depth in enumerate((3, 4, 23, 3)):
        width = 64 << stage
        for block in range(depth):
            stride = 2 if stage and not block else 1
            branch = nn.Sequential(
                conv_norm(inputs, width, act=nn.ReLU),
                conv_norm(width, width, 3, stride, act=nn.ReLU),
                conv_norm(width, 4 * width),
            )
            shortcut = None if block else conv_norm(inputs, 4 * width, 1, stride)
            layers.append(Residual(branch, shortcut, nn.ReLU()))
            inputs = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000))


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int, squeezed: int):
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = x.mean((2, 3), keepdim=True)
        return x * self.excite(nn.functional.silu(self.squeeze(gate))).sigmoid()


def mbconv(inputs: int, outputs: int, expansion: int, size: int, stride: int) -> nn.Module:
    hidden = expansion * inputs
    layers = [conv_norm(inputs, hidden, act=nn.SiLU)] if expansion > 1 else []
    layers += [
        conv_norm(hidden, hidden, size, stride, hidden, nn.SiLU),
        SqueezeExcite(hidden, inputs // 4),
        conv_norm(hidden, outputs),
    ]
    branch = nn.Sequential(*layers)
    return Residual(branch) if stride == 1 and inputs == outputs else branch


def fused_mbconv(inputs: int, outputs: int, expansion: int, size: int, stride: int) -> nn.Module:
    if expansion == 1:
        branch = conv_norm(inputs, outputs, size, stride, act=nn.SiLU)
    else:
        hidden = expansion * inputs
        branch = nn.Sequential(conv_norm(inputs, hidden, size, stride, act=nn.SiLU), conv_norm(hidden, outputs))
    return Residual(branch) if stride == 1 and inputs == outputs else branch


def efficientnet(stem: int, stages: tuple[tuple, ...], head: int) -> nn.Sequential:
    layers, inputs = [conv_norm(3, stem, 3, 2, act=nn.SiLU)], stem
    for block, depth, outputs, expansion, size, stride in stages:
        for index in range(depth):
            layers.append(block(inputs, outputs, expansion, size, 1 if index else stride))
            inputs = outputs
    layers += [conv_norm(inputs, head, act=nn.SiLU), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(head, 1000)]
    return nn.Sequential(*layers)


def efficientnetv2_s() -> nn.Sequential:
    return efficientnet(
        24,
        (
            (fused_mbconv, 2, 24, 1, 3, 1),
            (fused_mbconv, 4, 48, 4, 3, 2),
            (fused_mbconv, 4, 64, 4, 3, 2),
            (mbconv, 6, 128, 4, 3, 2),
            (mbconv, 9, 160, 6, 3, 1),
            (mbconv, 15, 256, 6, 3, 2),
        ),
        1280,
    )


def efficientnet_b5() -> nn.Sequential:
    return efficientnet(
        48,
        (
            (mbconv, 3, 24, 1, 3, 1),
            (mbconv, 5, 40, 6, 3, 2),
            (mbconv, 5, 64, 6, 5, 2),
            (mbconv, 7, 128, 6, 3, 2),
            (mbconv, 7, 176, 6, 5, 1),
            (mbconv, 9, 304, 6, 5, 2),
            (mbconv, 3, 512, 6, 3, 1),
        ),
        2048,
    )


class ChannelsLastNorm(nn.LayerNorm):
    """Layer norm over the channels of `[N, C, H, W]`."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.expand, self.project = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        self.scale = nn.Parameter(torch.empty(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x).permute(0, 2, 3, 1))
        y = self.scale * self.project(nn.functional.gelu(self.expand(y)))
        return x + y.permute(0, 3, 1, 2)


def convnext_small() -> nn.Sequential:
    layers, inputs = [], 3
    for stage, (depth, channels) in enumerate(zip((3, 3, 27, 3), (96, 192, 384, 768), strict=True)):
        size = 2 if stage else 4
        down = [ChannelsLastNorm(inputs)] if stage else []
        down.append(nn.Conv2d(inputs, channels, size, size))
        layers += down if stage else [*down, ChannelsLastNorm(channels)]
        layers += [ConvNeXtBlock(channels) for _ in range(depth)]
        inputs = channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(inputs), nn.Linear(inputs, 1000))

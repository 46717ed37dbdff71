"""Convolution, batch norm and activation: the stem and the head of the network."""

from torch import Tensor, nn


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

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))

"""Squeeze-and-excitation gate."""

from torch import Tensor, nn


class SqueezeExcite(nn.Module):
    """Scale each channel by a gate computed from the mean of all channels over the image.

    `gate = sigmoid(excite(activation(squeeze(mean(x)))))`, with two fully connected layers that have biases.
    `[N, C, H, W] -> [N, C, H, W]`. A. Lavin, On the Efficiency of Convolutional Neural Networks, section 5.4.

    Raises:
        ValueError: the squeeze width is less than 1.
    """

    def __init__(self, channels: int, squeeze_channels: int, activation: type[nn.Module] = nn.ReLU):
        super().__init__()
        if squeeze_channels < 1:
            raise ValueError(f"squeeze-and-excitation needs a squeeze width of at least 1, got {squeeze_channels}")
        self.squeeze = nn.Linear(channels, squeeze_channels)
        self.act = activation()
        self.excite = nn.Linear(squeeze_channels, channels)
        self.gate = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.mean((2, 3))  # [N, C]
        gate = self.gate(self.excite(self.act(self.squeeze(pooled))))
        return x * gate[:, :, None, None]

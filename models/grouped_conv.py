"""The grouped convolution that both kinds of block share."""

from torch import nn


def grouped_conv3x3(channels: int, group_width: int, *, bias: bool) -> nn.Conv2d:
    """3x3 convolution, stride 1, zero padding 1, in groups of `group_width` input and output channels.

    Raises:
        ValueError: `channels` is not a multiple of `group_width`.
    """
    if group_width < 1 or channels % group_width:
        raise ValueError(
            f"a grouped convolution of {channels} channels cannot have group width {group_width}: "
            f"the channels must be a multiple of the group width; change the channels or the group width"
        )
    return nn.Conv2d(channels, channels, 3, padding=1, groups=channels // group_width, bias=bias)

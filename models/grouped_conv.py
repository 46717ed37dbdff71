"""The grouped convolution that both kinds of block share."""

from torch import nn


def grouped_conv(channels: int, group_width: int, *, bias: bool, stride: int = 1, kernel_size: int = 3) -> nn.Conv2d:
    """Convolution of an odd size, zero padding half of it, in groups of `group_width` input and output channels.

    Raises:
        ValueError: `channels` is not a multiple of `group_width`, or `kernel_size` is even.
    """
    if kernel_size % 2 == 0:
        raise ValueError(f"a grouped convolution with kernel size {kernel_size} has no middle; use an odd size")
    if group_width < 1 or channels % group_width:
        raise ValueError(
            f"a grouped convolution of {channels} channels cannot have group width {group_width}: "
            f"the channels must be a multiple of the group width; change the channels or the group width"
        )
    padding, groups = kernel_size // 2, channels // group_width
    return nn.Conv2d(channels, channels, kernel_size, stride, padding=padding, groups=groups, bias=bias)

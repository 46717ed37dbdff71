"""Channels as slabs of power-of-two width, the only widths that a Triton tensor can have."""

from math import ceil

NARROWEST = 16
"""Least depth of a matrix product in 16-bit types, and so of a slab."""
WIDEST = 64
"""Of the Hopper kernels' slabs: 128 bytes, the widest pattern of a swizzle."""


def slab_widths(channels: int, widest: int) -> tuple[int, ...]:
    """Widths of the slabs that cover `channels`, widest first, each a power of two from 16 to `widest`.

    The channels are rounded up to a multiple of 16 and split along their binary digits: 48 -> (32, 16), 72 -> (64, 16).
    So only the last slab reaches past the channels, by less than 16.
    """
    rest = -(-channels // NARROWEST) * NARROWEST
    widths = []
    while rest:
        widths.append(min(widest, 1 << (rest.bit_length() - 1)))
        rest -= widths[-1]
    return tuple(widths)


class HopperSlabs:
    """What the tiles of the Hopper kernels have in common, from `hidden`, their hidden channels a step."""

    def in_slabs(self, in_channels: int) -> tuple[int, ...]:
        """Slabs that the expansion contracts."""
        return slab_widths(in_channels, WIDEST)

    def out_slabs(self, out_channels: int) -> tuple[int, ...]:
        """Slabs that the projection accumulates."""
        return slab_widths(out_channels, WIDEST)

    def steps(self, hidden_channels: int) -> int:
        """Steps over the hidden channels."""
        return ceil(hidden_channels / self.hidden)

    def padded_hidden(self, hidden_channels: int) -> int:
        """Hidden channels that the kernel computes: whole steps."""
        return self.steps(hidden_channels) * self.hidden

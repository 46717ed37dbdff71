"""Channels as slabs of power-of-two width, the only widths that a Triton tensor can have."""

NARROWEST = 16
"""Least depth of a matrix product in 16-bit types, and so of a slab."""


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

"""Texts of a diagram: their size in inches before there is a figure, and lines that fit a width."""

import re
from collections.abc import Iterable, Sequence
from functools import cache

FONT_SIZE = 8.0
LINE = 0.137
"""From one line of `FONT_SIZE` to the next, in inches."""
TEXT_PAD = 0.08
"""Between a text and the frame that it stands in."""
LOOP_SYMBOL = 0.2
"""Room for the symbol ahead of a loop's text."""
HINTING = 1.04
"""How much wider than its outline a renderer may draw a text."""


@cache
def text_width(text: str, size: float = FONT_SIZE, weight: str = "normal") -> float:
    """Width in inches."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    width, _, _ = text_to_path.get_text_width_height_descent(text, FontProperties(size=size, weight=weight), False)
    return HINTING * width / 72


def widest(lines: Iterable[str], weight: str = "normal") -> float:
    """Width in inches of the widest line, 0 if there is none."""
    return max((text_width(line, weight=weight) for line in lines), default=0.0)


@cache
def wrap(text: str, width: float, weight: str = "normal", after: str = " ") -> tuple[str, ...]:
    """As few lines of at most ``width`` inches as can be, about equally long, broken after any of ``after``.

    Words that are longer are broken after ``_`` too; what is still longer stays as it is.
    """
    pieces = re.findall(rf".*?[{after}]|.+$", text)
    if widest((piece.strip() for piece in pieces), weight) > width:
        pieces = re.findall(rf".*?[{after}_]|.+$", text)
    lines = _fill(pieces, width, weight)
    narrower = width
    while len(lines) > 1 and narrower > 0.05:
        narrower -= 0.05
        balanced = _fill(pieces, narrower, weight)
        if len(balanced) > len(lines) or widest(balanced, weight) > widest(lines, weight):
            break
        lines = balanced
    return lines


def quantity(value: float, unit: str) -> str:
    """Three digits, a decimal prefix and the unit, which no line break parts from its number."""
    factor, prefix = next(((f, p) for f, p in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")) if value >= f), (1, ""))
    return f"{value / factor:.3g}\N{NO-BREAK SPACE}{prefix}{unit}"


def _fill(pieces: Sequence[str], width: float, weight: str) -> tuple[str, ...]:
    lines: list[str] = []
    for piece in pieces:
        if lines and text_width((lines[-1] + piece).strip(), weight=weight) <= width:
            lines[-1] += piece
        else:
            lines.append(piece)
    return tuple(line.strip() for line in lines)

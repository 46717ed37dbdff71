"""Where the texts of a picture are, as the renderer draws them."""

from itertools import combinations

from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

ROUNDING = 0.5
"""Pixels by which boxes may overlap."""


def text_boxes(figure: Figure) -> dict[Text, Bbox]:
    """The pixels of every text that is drawn; ticks beyond the end of their axis are not."""
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    unseen = {
        label
        for axis in figure.findobj(Axis)
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks())
        for label in (tick.label1, tick.label2)
        if not min(axis.get_view_interval()) <= tick.get_loc() <= max(axis.get_view_interval())
    }
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    return {text: Text.get_window_extent(text, renderer) for text in texts if text not in unseen}


def overlap(a: Bbox, b: Bbox) -> bool:
    return min(a.x1, b.x1) - max(a.x0, b.x0) > ROUNDING and min(a.y1, b.y1) - max(a.y0, b.y0) > ROUNDING


def check_texts(figure: Figure) -> None:
    """No text is small, covers another or leaves the page."""
    boxes = text_boxes(figure)
    assert min(text.get_fontsize() for text in boxes) >= 8.5
    for text, box in boxes.items():
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1, text
        assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1, text
    assert not [pair for pair in combinations(boxes, 2) if overlap(*(boxes[text] for text in pair))]

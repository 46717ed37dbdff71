"""Where texts may stand in a picture so that they cover neither lines, nor markers, nor each other."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Box = tuple[float, float, float, float]
"""Left, bottom, right, top in pixels."""
Point = tuple[float, float]

MARKER = 4.5
"""Half of a marker's height and width, in points."""
MARGIN = 1.0
"""Around texts, in points."""
STEPS = 14
"""How far a text may move up and down, in steps of `STEP` points."""
STEP = 2.5
FAR = 14.0
"""Points from marker to text, beyond which a thin line joins the two."""


@dataclass(frozen=True)
class Label:
    """A text for the marker at `x, y`, and for the line from there to `line_x, y` if there is one: data coordinates."""

    text: str
    x: float
    y: float
    colour: str
    line_x: float | None = None


class Place(NamedTuple):
    """Where a text may stand, and what lies between it and its marker."""

    text: Box
    tether: Box


def place_labels(axes: "Axes", labels: Sequence[Label], lines: Iterable[Sequence[Point]], size: float) -> None:
    """Write labels where they cover nothing, next to their markers if possible.

    `lines` are drawn from point to point, with a marker at each, in data coordinates. The layout of the figure must
    not change any more.
    """
    renderer = axes.figure.canvas.get_renderer()
    frame = axes.get_window_extent(renderer).extents
    point = axes.figure.dpi / 72
    drawn = [box for line in lines for box in line_boxes(axes.transData.transform(line), point)]
    places = []
    for label in labels:
        text = axes.text(label.x, label.y, label.text, size=size)
        extent = text.get_window_extent(renderer)
        text.remove()
        x, y = axes.transData.transform((label.x, label.y))
        length = 0.0 if label.line_x is None else axes.transData.transform((label.line_x, label.y))[0] - x
        offsets = _offsets(length, extent.width, extent.height, point)
        boxes = [(x + dx, y + dy, x + dx + extent.width, y + dy + extent.height) for dx, dy in offsets]
        places.append([Place(box, _tether(box, x, y, point)) for box in boxes])
    for label, (box, _) in zip(labels, choose_places(places, drawn, frame, MARGIN * point), strict=True):
        x, y = axes.transData.transform((label.x, label.y))
        away = max(box[0] - x, x - box[2], 0), max(box[1] - y, y - box[3], 0)
        leader = {"arrowstyle": "-", "color": label.colour, "linewidth": 0.6, "shrinkA": 0, "shrinkB": MARKER}
        axes.annotate(
            label.text,
            (label.x, label.y),
            ((box[0] - x) / point, (box[1] - y) / point),
            textcoords="offset points",
            size=size,
            color=label.colour,
            va="bottom",
            zorder=5,
            arrowprops=leader | {"relpos": _nearest(box, x, y)} if max(away) > FAR * point else None,
        )


def choose_places(places: Sequence[Sequence[Place]], drawn: Sequence[Box], frame: Box, margin: float) -> list[Place]:
    """One of each text's places, of which the first are the best.

    Texts choose one after another, and who comes first matters: of some orders the one counts that covers least, and
    then has the best places.
    """
    everyone = range(len(places))
    costs = [[_cost(place, drawn, frame, margin) for place in of_text] for of_text in places]
    orders = [
        sorted(everyone, key=lambda text: sign * places[text][0].text[edge]) for edge in (0, 1) for sign in (1, -1)
    ]
    best: tuple[float, int] = (float("inf"), 0)
    chosen: list[Place] = []
    for order in (list(everyone), *orders):
        taken: dict[int, Place] = {}
        covered, rank = 0.0, 0
        for text in order:
            others = [place.text for place in taken.values()]
            scores = [
                cost + sum(_shared(_grown(place.text, margin), other) for other in others)
                for cost, place in zip(costs[text], places[text], strict=True)
            ]
            index = scores.index(min(scores))
            taken[text] = places[text][index]
            covered, rank = covered + scores[index], rank + index**2
        if (covered, rank) < best:
            best, chosen = (covered, rank), [taken[text] for text in everyone]
    return chosen


def line_boxes(pixels: Sequence[Point], point: float) -> Iterator[Box]:
    """Boxes that cover a line from point to point, and its markers; `point` is how many pixels a point has."""
    for x, y in pixels:
        yield x - MARKER * point, y - MARKER * point, x + MARKER * point, y + MARKER * point
    for (x0, y0), (x1, y1) in pairwise(pixels):
        pieces = 1 + int(abs(y1 - y0) / (2 * point))
        for piece in range(pieces):
            xs = [x0 + (x1 - x0) * step / pieces for step in (piece, piece + 1)]
            ys = [y0 + (y1 - y0) * step / pieces for step in (piece, piece + 1)]
            yield min(xs) - point, min(ys) - point, max(xs) + point, max(ys) + point


def _offsets(length: float, width: float, height: float, point: float) -> Iterator[Point]:
    """Where a text may begin, from a marker with a line to a point `length` pixels away: the best places first."""
    gap = (MARKER + 2.5) * point
    right, left, middle = gap, -gap - width, -0.5 * width
    yield right, -0.5 * height
    if length:
        for lift in (2.5 * point, 5 * point):
            yield right, lift - 0.5 * height
            yield right, -lift - 0.5 * height
    else:
        yield left, -0.5 * height
    for step in range(STEPS):
        lift = (MARKER + MARGIN + 0.5 + STEP * step) * point
        for dx in (middle, right - 0.5 * gap, left + 0.5 * gap):
            yield dx, lift
            yield dx, -lift - height
        yield right, lift - 0.5 * height
        yield right, -lift - 0.5 * height
        if length and step == 1:
            yield length + left, -0.5 * height


def _nearest(box: Box, x: float, y: float) -> Point:
    """The point of a box that is nearest to `x, y`, as fractions of its width and height."""
    return (
        min(max((x - box[0]) / (box[2] - box[0]), 0), 1),
        min(max((y - box[1]) / (box[3] - box[1]), 0), 1),
    )


def _grown(box: Box, margin: float) -> Box:
    return box[0] - margin, box[1] - margin, box[2] + margin, box[3] + margin


def _tether(box: Box, x: float, y: float, point: float) -> Box:
    """From the edge of the marker at `x, y` to a text: what is there comes between the two."""
    across, up = _nearest(box, x, y)
    near_x, near_y = box[0] + across * (box[2] - box[0]), box[1] + up * (box[3] - box[1])
    reach = MARKER * point
    from_x, from_y = x + min(max(near_x - x, -reach), reach), y + min(max(near_y - y, -reach), reach)
    half = 0.5 * point
    return (
        min(from_x, near_x) - half * (from_x == near_x),
        min(from_y, near_y) - half * (from_y == near_y),
        max(from_x, near_x) + half * (from_x == near_x),
        max(from_y, near_y) + half * (from_y == near_y),
    )


def _cost(place: Place, drawn: Sequence[Box], frame: Box, margin: float) -> float:
    """Pixels of a text that cover what is drawn, or are outside the frame, and of what is between it and its marker."""
    box = _grown(place.text, margin)
    outside = (box[2] - box[0]) * (box[3] - box[1]) - _shared(box, frame)
    return round(outside + sum(_shared(box, other) + _shared(place.tether, other) for other in drawn), 6)


def _shared(a: Box, b: Box) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0) * max(height, 0)

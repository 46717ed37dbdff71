"""A diagram's arrows: straight to the next node, above a row to a later one, and around to the rows below."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import inf, sqrt

from fusion.plots.diagram.flow import Edge, Flow
from fusion.plots.diagram.page import PlacedBox, Point, Wire
from fusion.plots.diagram.rows import STACK, Row, Segment
from fusion.plots.diagram.shapes import DEPTH, RADIUS, Shapes, depth

TRACK = 0.11
"""Distance of parallel wires."""


def room_left(tracks: int) -> float:
    """What so many wires from row to row, and the frame around them, need on the left."""
    return TRACK * (tracks + 1) if tracks else 0.0


def room_right(tracks: int) -> float:
    """What they need on the right, with the frames of further processors."""
    return TRACK * (tracks + 0.5) + STACK if tracks else 0.0


@dataclass
class Lines:
    """Heights in a row: of its frames, of the wire through its nodes, of the lanes above them.

    Below ``end`` there is room for wires to the rows below.
    """

    top: float
    bottom: float
    middle: float
    lanes: dict[Edge, float]
    end: float = 0.0


def lanes_of(row: Row, skips: Iterable[Edge]) -> dict[Edge, int]:
    """Lanes, counted upwards, for the edges that pass over nodes in a row: a longer one is above all that it spans."""
    spans = {}
    for edge in skips:
        if edge.source in row.centers or edge.target in row.centers:
            spans[edge] = (row.centers.get(edge.source, -inf), row.centers.get(edge.target, inf))
    lanes: dict[Edge, int] = {}
    for edge in sorted(spans, key=lambda edge: (spans[edge][1] - spans[edge][0], *_order(edge))):
        start, end = spans[edge]
        under = [lanes[other] for other in lanes if spans[other][0] < end and start < spans[other][1]]
        lanes[edge] = max(under, default=-1) + 1
    return lanes


@dataclass
class Wiring:
    """Finds the way of each edge. ``lines`` of the rows, and ``operands`` with their nodes, are added from outside."""

    flow: Flow
    rows: list[Row]
    shapes: Shapes
    left: float
    lines: list[Lines] = field(default_factory=list)
    operands: list[tuple[PlacedBox, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.row_of = {index: number for number, row in enumerate(self.rows) for index in row.centers}
        skips = self.flow.skips
        # From the innermost to the outermost, in the order of their lanes.
        crossing = [edge for edge in skips if self.row_of[edge.source] != self.row_of[edge.target]]
        self.crossing = sorted(crossing, key=_order)
        self.skips = sorted(skips, key=lambda edge: edge.source - edge.target)

    def tracks_below(self, number: int) -> int:
        """How many wires run below a row."""
        return 1 + sum(self.row_of[edge.target] == number + 1 for edge in self.crossing)

    def wires(self) -> list[Wire]:
        """The arrows of all edges and operands."""
        wires = []
        for edge in self.flow.edges:
            points = self._skip(edge) if edge in self.skips else self._step(edge)
            wires.append(Wire(tuple(points), edge.memory))
        for placed, index in self.operands:
            x = placed.left + (placed.shape.width + depth(placed.box)) / 2
            wires.append(Wire(((x, placed.top - depth(placed.box)), self._bottom(index)), placed.box.memory))
        return wires

    def _step(self, edge: Edge) -> list[Point]:
        row, target_row = self.row_of[edge.source], self.row_of[edge.target]
        start = (self._center(edge.source) + self.shapes.half(edge.source), self.lines[row].middle)
        end = (self._center(edge.target) - self.shapes.half(edge.target), self.lines[target_row].middle)
        if row == target_row:
            return [start, end]
        return self._around(start, end, row, row + 1, 0)

    def _skip(self, edge: Edge) -> list[Point]:
        row, target_row = self.row_of[edge.source], self.row_of[edge.target]
        siblings = [other for other in self.skips if other.source == edge.source]
        start_x = self._center(edge.source) + _offset(siblings.index(edge), len(siblings))
        start = (start_x, self._top(edge.source, 0.0))
        rivals = [other for other in reversed(self.skips) if other.target == edge.target]
        shift = _offset(rivals.index(edge), len(rivals))
        end = (self._center(edge.target) + shift, self._top(edge.target, shift))
        up, down = self.lines[row].lanes[edge], self.lines[target_row].lanes[edge]
        if row == target_row:
            return [start, (start[0], up), (end[0], up), end]
        track = 1 + self.crossing.index(edge)
        return [start, *self._around((start[0], up), (end[0], down), row, target_row, track), end]

    def _around(self, start: Point, end: Point, row: int, target_row: int, track: int) -> list[Point]:
        """Down on the right, to the left above the target's row, and into it from the left."""
        right = self.turn(row) + TRACK * track
        left = self.left - TRACK * (1 + len(self.crossing) - track)
        gutter_track = 0
        if track:
            same = [edge for edge in self.crossing if self.row_of[edge.target] == target_row]
            gutter_track = 1 + same.index(self.crossing[track - 1])
        gutter = self.lines[target_row - 1].end + TRACK * (gutter_track + 1)
        return [start, (right, start[1]), (right, gutter), (left, gutter), (left, end[1]), end]

    def turn(self, number: int) -> float:
        """How far to the right wires run that leave a row: beyond it, and along the right side of its last kernel."""
        right = self.rows[number].right
        for other, segment in self._parts(self.flow.nodes[self.rows[number].last].kernel):
            is_last = segment.ends
            right = max(right, segment.right - self._corridor - TRACK if is_last else self.rows[other].right)
        return self.left + right + TRACK

    def outline(self, kernel: int) -> tuple[Point, ...]:
        """A kernel's frame, from its top left corner clockwise: around its part of each row, and the wires between."""
        parts = self._parts(kernel)
        (first, begin), (last, end) = parts[0], parts[-1]
        left, right = self.left + begin.left, self.left + end.right
        top, bottom = self.lines[first].top, self.lines[last].bottom
        if first == last:
            return ((left, top), (right, top), (right, bottom), (left, bottom))
        outer = self.turn(first) + self._corridor
        turn = self.lines[last - 1].end + TRACK * (self.tracks_below(last - 1) + 0.5)
        if abs(right - outer) < TRACK:
            down = [(outer, top), (outer, bottom)]
        else:
            turn = self.lines[last].top if right > outer else turn
            down = [(outer, top), (outer, turn), (right, turn), (right, bottom)]
        far_left, inner = self.left - room_left(1 + len(self.crossing)), self.turn(first) - TRACK / 2
        up = [(left, self.lines[first].bottom)]
        for number in range(first, last):
            lines, under = self.lines[number], self.lines[number + 1]
            gutter = lines.end + TRACK / 2
            up += [(inner, lines.bottom), (inner, gutter), (far_left, gutter), (far_left, under.bottom)]
        return ((left, top), *down, *reversed(up))

    def _parts(self, kernel: int | None) -> list[tuple[int, Segment]]:
        """The parts of a kernel's frame with the numbers of their rows."""
        return [
            (number, part) for number, row in enumerate(self.rows) for part in row.segments if part.kernel == kernel
        ]

    @property
    def _corridor(self) -> float:
        """Width of all wires from row to row, side by side."""
        return TRACK * (len(self.crossing) + 0.5)

    def _center(self, index: int) -> float:
        return self.left + self.rows[self.row_of[index]].centers[index]

    def _top(self, index: int, shift: float) -> float:
        node, middle = self.flow.nodes[index], self.lines[self.row_of[index]].middle
        if node.box is None:
            return middle - sqrt(RADIUS**2 - shift**2)
        return middle - self.shapes.box(node.box).height / 2 - DEPTH

    def _bottom(self, index: int) -> Point:
        node, middle = self.flow.nodes[index], self.lines[self.row_of[index]].middle
        half = RADIUS if node.box is None else self.shapes.box(node.box).height / 2
        return (self._center(index), middle + half)


def _order(edge: Edge) -> tuple[int, int]:
    """Of edges that go around others: outside is what arrives later, and what left earlier."""
    return (edge.target, -edge.source)


def _offset(position: int, count: int) -> float:
    """Side by side, so that wires at the same node can be told apart."""
    return (position - (count - 1) / 2) * 0.7 * TRACK

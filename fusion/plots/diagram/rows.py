"""Which nodes of a diagram share a row, and where they stand in it from left to right. Lengths are in inches."""

from dataclasses import dataclass, replace
from itertools import groupby

from fusion.plots.diagram.flow import Flow
from fusion.plots.diagram.shapes import Shapes

GAP, MOST_GAP = 0.2, 0.42
"""Length of an arrow."""
OPERANDS_GAP = 0.1
"""Between boxes that feed different operations from below."""
FRAME_PAD = 0.12
STACK = 0.1
"""How far the frames of further processors stand out to the right and below."""
ENTRY = 0.12
"""Room for an arrow that comes from the row above."""
FRAME_WIDTH = 1.35
"""A frame's texts need this much."""
ROW_COST, SPLIT_COST, LOOP_COST = 60.0, 30.0, 30.0
"""A row, the end of one within a kernel, and within a loop, next to the square of the inches that it leaves free."""


@dataclass(frozen=True)
class Segment:
    """The part of a kernel's frame that is in one row, from ``left`` to ``right``."""

    kernel: int
    left: float
    right: float
    begins: bool
    ends: bool


@dataclass(frozen=True)
class Row:
    """The centre of each node, the parts of frames around them, and the right end of all."""

    centers: dict[int, float]
    segments: tuple[Segment, ...]
    right: float

    @property
    def last(self) -> int:
        """The node on the right."""
        return max(self.centers)


class RowBreaker:
    """Breaks a flow into rows of at most ``width``."""

    def __init__(self, flow: Flow, shapes: Shapes, width: float) -> None:
        self.flow, self.shapes, self.width = flow, shapes, width

    def rows(self) -> list[Row]:
        """The rows that leave the least room free, and break no loop nor kernel where that can be helped."""
        nodes = self.flow.nodes
        best: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
        for end in range(1, len(nodes) + 1):
            options = []
            for start in range(end):
                if not best[start] or nodes[end - 1].box is None:
                    continue
                right = self._line_up(start, end, GAP).right
                if right <= self.width or all(node.box is None for node in nodes[start : end - 1]):
                    cost = best[start][0] + self._cost(end, self.width - right)
                    options.append((cost, (*best[start][1], end)))
            best.append(min(options, default=()))
        ends = best[-1][1]
        return [self._stretched(start, end) for start, end in zip((0, *ends), ends, strict=False)]

    def _cost(self, end: int, free: float) -> float:
        """Of a row that ends ahead of node ``end`` and leaves so much room free."""
        if end == len(self.flow.nodes):
            return ROW_COST
        splits = self.flow.nodes[end - 1].kernel is not None
        loops = sum(walk.first < end <= walk.last for walk in self.flow.walks)
        return ROW_COST + free**2 + SPLIT_COST * splits + LOOP_COST * loops

    def _stretched(self, start: int, end: int) -> Row:
        """The row with longer arrows, if there is room."""
        free = max(self.width - self._line_up(start, end, GAP).right, 0.0)
        return self._line_up(start, end, min(GAP + 0.95 * free / (end - start), MOST_GAP))

    def _line_up(self, start: int, end: int, gap: float) -> Row:
        """The nodes from ``start`` to ``end``, which is not among them, with arrows as long as ``gap``."""
        nodes = self.flow.nodes
        comes_from_above = any(edge.source < start <= edge.target < end for edge in self.flow.edges)
        cursor = ENTRY if comes_from_above else 0.0
        row = Row({}, (), 0.0)
        operands_right = 0.0 - OPERANDS_GAP
        for kernel, group in groupby(range(start, end), key=lambda index: nodes[index].kernel):
            left = cursor + (gap if row.centers else 0.0)
            right = left if kernel is None else left + FRAME_PAD
            centers: dict[int, float] = {}
            for index in group:
                width, operands = self.shapes.width(index), self.shapes.operands_width(nodes[index])
                center = right + (gap if centers else 0.0) + width / 2
                if operands:
                    center = max(center, operands_right + OPERANDS_GAP + operands / 2)
                    operands_right = center + operands / 2
                centers[index] = center
                right = center + width / 2
            cursor = right
            if kernel is not None:
                widened = max(FRAME_WIDTH - (right + FRAME_PAD - left), 0.0)
                centers = {index: center + widened / 2 for index, center in centers.items()}
                operands_right += widened / 2
                segment = self._segment(kernel, left, right + FRAME_PAD + widened, centers)
                row = replace(row, segments=(*row.segments, segment))
                cursor = segment.right + STACK
            row = replace(row, centers={**row.centers, **centers})
        return replace(row, right=max(cursor, operands_right))

    def _segment(self, kernel: int, left: float, right: float, centers: dict[int, float]) -> Segment:
        nodes, first, last = self.flow.nodes, min(centers), max(centers)
        begins = first == 0 or nodes[first - 1].kernel != kernel
        ends = last + 1 == len(nodes) or nodes[last + 1].kernel != kernel
        return Segment(kernel, left, right, begins, ends)

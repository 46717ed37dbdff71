"""From a program to a diagram's page: rows one below the other, each with its frames, loops and operands."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fusion.planner.program import Loop, Program
from fusion.plots.diagram.flow import Walk, flow_of
from fusion.plots.diagram.page import Area, Band, Frame, Page, PlacedBox, PlacedOp
from fusion.plots.diagram.rows import STACK, Row, RowBreaker, Segment
from fusion.plots.diagram.shapes import DEPTH, OPERAND_GAP, Shapes, depth
from fusion.plots.diagram.text import LINE, LOOP_SYMBOL, TEXT_PAD, quantity, widest, wrap
from fusion.plots.diagram.wires import TRACK, Lines, Wiring, lanes_of, room_left, room_right
from fusion.plots.style import WIDTH

MARGIN = 0.14
BAND_PAD, NESTED_PAD = 0.09, 0.025
"""By how much the band of a loop is wider than its operations, and than that of a loop inside."""
INSIDE_PAD = 0.1
"""Between a frame's bottom and what is in it."""
BELOW_FRAME = 0.2
ROW_GAP, INSIDE_GAP = 0.2, 0.05
"""Between a row's wires and the next row, and where both are in the same frame."""


def page_of(program: Program, top: float) -> Page:
    """Lay out a program below ``top`` inches; the page's height is that of its last row's bottom."""
    return _Layout(program, top).page


def cost_text(ops_count: int, num_bytes: int) -> str:
    """OPs, DRAM traffic and intensity."""
    text = f"{quantity(ops_count, 'OP')}, {quantity(num_bytes, 'B')}"
    if not num_bytes:
        return text
    intensity = ops_count / num_bytes
    return f"{text}, {intensity:{'.0f' if intensity >= 1000 else '.3g'}}\N{NO-BREAK SPACE}OP/byte"


def loop_text(loop: Loop) -> str:
    """A loop as it stands in a diagram."""
    return f"loop {loop}".replace("->", "→")


def partition_text(loop: Loop) -> str:
    """What is divided over processors, as it stands in a diagram."""
    return f"processors divide {replace(loop, streams=())}"


@dataclass(frozen=True)
class _BandPart:
    """The part of a walk that is in one row, with the walk's text if this is its widest part."""

    walk: Walk
    left: float
    right: float
    begins: bool
    ends: bool
    lines: tuple[str, ...] = ()


class _Layout:
    def __init__(self, program: Program, top: float) -> None:
        self.program, self.page = program, Page()
        self.flow = flow_of(program)
        self.shapes = Shapes(self.flow)
        for tracks in (0, 1 + len(self.flow.skips)):
            self.left = MARGIN + room_left(tracks)
            width = WIDTH - self.left - room_right(tracks) - MARGIN
            self.rows = RowBreaker(self.flow, self.shapes, width).rows()
            if len(self.rows) == 1:
                break
        self.wiring = Wiring(self.flow, self.rows, self.shapes, self.left)
        self.headers = {
            segment.kernel: self._header(number, segment)
            for number, row in enumerate(self.rows)
            for segment in row.segments
            if segment.begins
        }
        self.parts = self._band_parts()
        for number in range(len(self.rows)):
            top = self._add_row(number, top)
        self.page.height = top
        self.page.wires = self.wiring.wires()
        for kernel, lines in self.headers.items():
            divided = program.kernels[kernel].partition is not None
            self.page.frames.append(Frame(kernel, self.wiring.outline(kernel), lines, divided))

    def _add_row(self, number: int, top: float) -> float:
        """Add a row below ``top``; the top of the next one."""
        row = self.rows[number]
        inside = [index for index in row.centers if self.flow.nodes[index].kernel is not None]
        outside = [index for index in row.centers if self.flow.nodes[index].kernel is None]
        headers = {segment: self.headers[segment.kernel] for segment in row.segments if segment.begins}
        lanes = lanes_of(row, self.flow.skips)
        above = max(map(self.shapes.above, inside), default=0.0)
        below = max(map(self.shapes.below, inside), default=0.0)

        loop_tops = [TEXT_PAD / 2 + (_height(headers) if self._are_above(headers, self.parts[number]) else 0.0)]
        for level in range(1 + max((walk.level for walk in self.flow.walks), default=-1)):
            texts = {part: part.lines for part in self.parts[number] if part.walk.level == level}
            loop_tops.append(loop_tops[-1] + _height(texts))
        lane_top = max(loop_tops[-1], _height(headers)) + TEXT_PAD / 2
        to_middle = lane_top + TRACK * (max(lanes.values(), default=-1) + 1) + above if inside else 0.0
        middle = top + max([to_middle, *map(self.shapes.above, outside)])
        frame_top, bottom = middle - to_middle, middle + below + INSIDE_PAD
        lane_y = {edge: middle - above - TRACK * (lane + 0.5) for edge, lane in lanes.items()}
        lines = Lines(frame_top, bottom, middle, lane_y)
        self.wiring.lines.append(lines)
        for part in self.parts[number]:
            text_top = frame_top + loop_tops[part.walk.level]
            band_bottom = bottom - 0.05 - NESTED_PAD * part.walk.level
            area = Area(part.left, text_top, part.right, band_bottom, not part.begins, not part.ends)
            self.page.bands.append(Band(area, part.lines, text_top + TEXT_PAD / 2))
        row_bottom = self._add_nodes(row, middle, bottom + STACK + BELOW_FRAME)
        row_bottom = max([row_bottom, bottom + STACK, *(middle + self.shapes.below(index) for index in outside)])
        if number + 1 == len(self.rows):
            return row_bottom
        lines.end = row_bottom
        is_inside = all(not segment.begins and not segment.ends for segment in self.rows[number + 1].segments)
        return row_bottom + TRACK * (self.wiring.tracks_below(number) + 0.5) + (INSIDE_GAP if is_inside else ROW_GAP)

    def _are_above(self, headers: Mapping[Segment, tuple[str, ...]], parts: Sequence[_BandPart]) -> bool:
        """Whether the texts of frames and loops need room one above the other."""
        right = {
            segment: self.left + segment.left + 3 * TEXT_PAD + widest(lines[1:]) for segment, lines in headers.items()
        }
        return any(
            part.left < end and self.left + segment.left < part.right
            for part in parts
            for segment, end in right.items()
        )

    def _add_nodes(self, row: Row, middle: float, operands_top: float) -> float:
        """Add the nodes of a row and the operands under them; the bottom of the lowest operand."""
        bottom = 0.0
        for index, center in row.centers.items():
            node = self.flow.nodes[index]
            center += self.left
            if node.op is not None:
                self.page.ops.append(PlacedOp(node.op, center, middle, self.shapes.label_place(index)))
            else:
                shape = self.shapes.box(node.box)
                left = center - (shape.width + DEPTH) / 2
                self.page.boxes.append(PlacedBox(node.box, shape, left, middle - shape.height / 2))
            left = center - self.shapes.operands_width(node) / 2
            for operand in node.operands:
                shape = self.shapes.box(operand)
                placed = PlacedBox(operand, shape, left, operands_top + depth(operand))
                self.page.boxes.append(placed)
                self.wiring.operands.append((placed, index))
                left += shape.width + depth(operand) + OPERAND_GAP
                bottom = max(bottom, placed.top + shape.height)
        return bottom

    def _header(self, number: int, segment: Segment) -> tuple[str, ...]:
        kernel = self.program.kernels[segment.kernel]
        right = self.left + segment.right if segment.ends else self.wiring.turn(number)
        width = right - self.left - segment.left - 2 * TEXT_PAD
        divided = wrap(partition_text(kernel.partition), width) if kernel.partition else ()
        return (kernel.name, *wrap(cost_text(kernel.ops_count, kernel.bytes), width), *divided)

    def _band_parts(self) -> list[list[_BandPart]]:
        """Row by row, the parts of all walks."""
        parts: list[list[_BandPart]] = [[] for _ in self.rows]
        for walk in self.flow.walks:
            of_walk = [(number, part) for number, row in enumerate(self.rows) if (part := self._band_part(row, walk))]
            longest = max((part for _, part in of_walk), key=lambda part: part.right - part.left)
            for number, part in of_walk:
                if part == longest:
                    width = part.right - part.left - LOOP_SYMBOL - 2 * TEXT_PAD
                    part = replace(part, lines=wrap(loop_text(walk.loop), width))
                parts[number].append(part)
        return parts

    def _band_part(self, row: Row, walk: Walk) -> _BandPart | None:
        indices = [index for index in row.centers if walk.first <= index <= walk.last]
        if not indices:
            return None
        first, last = indices[0], indices[-1]
        begins, ends = first == walk.first, last == walk.last
        (segment,) = (segment for segment in row.segments if segment.kernel == self.flow.nodes[first].kernel)
        pad = BAND_PAD - NESTED_PAD * walk.level
        left = row.centers[first] - self.shapes.width(first) / 2 - pad if begins else segment.left
        right = row.centers[last] + self.shapes.width(last) / 2 + pad if ends else segment.right
        return _BandPart(walk, self.left + left, self.left + right, begins, ends)


def _height(texts: Mapping[object, tuple[str, ...]]) -> float:
    """Of the highest of these texts."""
    return max((LINE * len(lines) + TEXT_PAD for lines in texts.values() if lines), default=0.0)

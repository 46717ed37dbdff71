"""Sizes of a diagram's boxes and symbols, in inches."""

from dataclasses import dataclass
from enum import Enum, auto

from fusion.planner.program import Memory
from fusion.plots.diagram.flow import Box, Flow, Node, op_label
from fusion.plots.diagram.text import LINE, quantity, text_width, widest, wrap

RADIUS = 0.155
"""Of an operation's symbol."""
LABEL = LINE + 0.05
"""Room for the label of a symbol."""
BESIDE = 0.07
"""From a wire to the label to its right."""
DEPTH = 0.07
"""By how much the side and the top of an activation stand out."""
BOX_PAD = 0.05
NOTE_PAD = 0.04
NAME_WIDTH, SIZES_WIDTH = 1.0, 1.07
"""Longer texts are broken."""
LEAST_HEIGHT, MOST_HEIGHT = 0.3, 1.05
"""Of the boxes of tensors in DRAM, from none to the largest of the block's."""
OPERAND_GAP = 0.1
"""Between two boxes that feed the same operation from below."""


class Place(Enum):
    """Of a label: over its symbol, under it, or to the right of a wire that comes from above."""

    ABOVE = auto()
    BELOW = auto()
    BESIDE = auto()


@dataclass(frozen=True)
class BoxShape:
    """A box's size without what stands out, the lines in it, the name's first, and those under it."""

    width: float
    height: float
    name: tuple[str, ...]
    details: tuple[str, ...] = ()
    note: tuple[str, ...] = ()


class Shapes:
    """Sizes of the nodes of ``flow``."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self.largest = max(tensor.size for tensor in flow.program.graph.tensors())

    def box(self, box: Box) -> BoxShape:
        """The larger a tensor in DRAM, the taller its box; others are as small as their text allows."""
        name = wrap(box.tensor.name, NAME_WIDTH, "bold", after="_.")
        details = wrap("×".join(box.sizes), SIZES_WIDTH, after="×")
        if not box.is_tile:
            details += (quantity(box.tensor.size * self.flow.program.graph.element_size, "B"),)
        width = max(widest(name, "bold"), widest(details)) + 2 * BOX_PAD
        height = LINE * len(name + details) + 2 * BOX_PAD
        if box.memory is Memory.DRAM:
            share = (box.tensor.size / self.largest) ** 0.5
            height = max(height, LEAST_HEIGHT + (MOST_HEIGHT - LEAST_HEIGHT) * share)
        return BoxShape(width, height, name, details, wrap(box.note, width))

    def width(self, index: int) -> float:
        """Of a node: a box, or an operation's symbol or its label."""
        node = self.flow.nodes[index]
        if node.op is not None:
            label = text_width(op_label(node.op))
            return max(2 * RADIUS, 2 * (label + BESIDE) if self.label_place(index) is Place.BESIDE else label)
        shape = self.box(node.box)
        return max(shape.width + DEPTH, widest(shape.note))

    def half(self, index: int) -> float:
        """From the centre of a node to where wires meet its sides."""
        node = self.flow.nodes[index]
        return RADIUS if node.box is None else (self.box(node.box).width + DEPTH) / 2

    def above(self, index: int) -> float:
        """From the centre of a node to the top of all that belongs to it."""
        node = self.flow.nodes[index]
        if node.op is not None:
            return RADIUS + (0.0 if self.label_place(index) is Place.BELOW else LABEL)
        return self.box(node.box).height / 2 + DEPTH

    def below(self, index: int) -> float:
        """From the centre of a node to the bottom of all that belongs to it."""
        node = self.flow.nodes[index]
        if node.op is not None:
            return RADIUS + (LABEL if self.label_place(index) is Place.BELOW else 0.0)
        shape = self.box(node.box)
        return shape.height / 2 + (LINE * len(shape.note) + NOTE_PAD if shape.note else 0.0)

    def label_place(self, index: int) -> Place:
        """Where the label of an operation stands: out of the way of wires from above and below."""
        if not any(edge.target == index for edge in self.flow.skips):
            return Place.ABOVE
        return Place.BESIDE if self.flow.nodes[index].operands else Place.BELOW

    def operands_width(self, node: Node) -> float:
        """Of the boxes under a node, side by side."""
        widths = [self.box(box).width + depth(box) for box in node.operands]
        return sum(widths) + OPERAND_GAP * max(len(widths) - 1, 0)


def depth(box: Box) -> float:
    """By how much a box stands out."""
    return 0.0 if box.is_flat else DEPTH

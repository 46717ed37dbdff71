"""What is on a diagram's page and where, in inches from its top left corner."""

from dataclasses import dataclass, field

from fusion.planner.graph import Op
from fusion.planner.program import Memory
from fusion.plots.diagram.flow import Box
from fusion.plots.diagram.shapes import BoxShape, Place

Point = tuple[float, float]


@dataclass(frozen=True)
class PlacedBox:
    """A tensor's box, its front from (``left``, ``top``)."""

    box: Box
    shape: BoxShape
    left: float
    top: float


@dataclass(frozen=True)
class PlacedOp:
    """An operation's symbol around (``x``, ``y``), and the place of its label."""

    op: Op
    x: float
    y: float
    place: Place


@dataclass(frozen=True)
class Wire:
    """An arrow along ``points``: data that move out of or into ``memory``."""

    points: tuple[Point, ...]
    memory: Memory


@dataclass(frozen=True)
class Area:
    """A rectangle; an open side says that it goes on in another row."""

    left: float
    top: float
    right: float
    bottom: float
    is_open_left: bool = False
    is_open_right: bool = False


@dataclass(frozen=True)
class Frame:
    """A kernel's frame, in front of others if it ``is_divided`` over processors.

    ``outline`` begins at the top left corner. Of the ``lines`` at the top the first is a title.
    """

    kernel: int
    outline: tuple[Point, ...]
    lines: tuple[str, ...]
    is_divided: bool


@dataclass(frozen=True)
class Band:
    """What a loop walks. Its lines, where it has them, begin with the loop's symbol at (``left``, ``text_top``)."""

    area: Area
    lines: tuple[str, ...]
    text_top: float


@dataclass
class Page:
    """All that is drawn, on a page of ``height`` inches."""

    height: float = 0.0
    boxes: list[PlacedBox] = field(default_factory=list)
    ops: list[PlacedOp] = field(default_factory=list)
    wires: list[Wire] = field(default_factory=list)
    frames: list[Frame] = field(default_factory=list)
    bands: list[Band] = field(default_factory=list)

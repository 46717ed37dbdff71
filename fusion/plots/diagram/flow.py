"""A `Program` as what a diagram shows: boxes and operations in a row, arrows between them, loops around them.

What a kernel finds outside stands outside of its frame. A tensor that several of a kernel's operations read is loaded
once, into a box of its own: in local memory, or in global memory if one of them combines it with a sum over processors.
"""

from collections import Counter
from dataclasses import dataclass, field, replace

from fusion.planner.graph import CONV_KINDS, Op, OpKind, Role, Tensor
from fusion.planner.program import Kernel, Loop, Memory, Program
from fusion.plots.diagram.tiles import Tiling

SUM_NOTE = "sum over processors"


@dataclass(frozen=True)
class Box:
    """A tensor as one box: ``sizes`` are those of a tile if it ``is_tile``, ``note`` is a word on how it came about."""

    tensor: Tensor
    memory: Memory
    sizes: tuple[str, ...]
    is_tile: bool = False
    note: str = ""

    @property
    def is_flat(self) -> bool:
        """Whether it is drawn as a sheet, as weights are, and not as a block."""
        return self.tensor.role is Role.WEIGHT


@dataclass(frozen=True)
class Node:
    """A box or an operation of the row, with the boxes that feed it from below; outside of frames if no ``kernel``."""

    kernel: int | None
    box: Box | None = None
    op: Op | None = None
    operands: tuple[Box, ...] = ()


@dataclass(frozen=True)
class Edge:
    """Data that move from one node to another, out of or into ``memory`` if that is not local."""

    source: int
    target: int
    memory: Memory


@dataclass(frozen=True)
class Walk:
    """One walk of a loop: over the nodes from ``first`` to ``last``. Walks of outer loops have a lower ``level``."""

    loop: Loop
    first: int
    last: int
    level: int


@dataclass
class Flow:
    """A whole program."""

    program: Program
    nodes: list[Node] = field(default_factory=list)
    edges: list[Edge] = field(default_factory=list)
    walks: list[Walk] = field(default_factory=list)

    @property
    def skips(self) -> list[Edge]:
        """The edges that pass over nodes."""
        return [edge for edge in self.edges if edge.target != edge.source + 1]


def flow_of(program: Program) -> Flow:
    """Follow a program's kernels and ops in their order."""
    flow = Flow(program)
    for index, kernel in enumerate(program.kernels):
        _Follower(flow, index, kernel).follow()
    return flow


def op_label(op: Op) -> str:
    """A few words on what an operation is, to stand beside its symbol."""
    if op.kind in CONV_KINDS:
        weight = dict(op.weights[0].dims)
        words = "×".join(str(weight[dim]) for dim in ("R", "S") if dim in weight)
        if not op.is_dense:
            words += f", T={op.group_width}"
    else:
        words = _WORDS.get(op.kind, str(op.kind))
    return f"{words}, ↓{op.stride}" if op.stride > 1 else words


_WORDS = {
    OpKind.LINEAR: "linear",
    OpKind.RELU: "ReLU",
    OpKind.RELU6: "ReLU6",
    OpKind.SILU: "SiLU",
    OpKind.GELU: "GELU",
    OpKind.HARDSWISH: "hard-swish",
    OpKind.GLOBAL_AVERAGE_POOL: "avg pool",
    OpKind.BLURPOOL: "blur",
}


class _Follower:
    """Adds one kernel to a flow."""

    def __init__(self, flow: Flow, index: int, kernel: Kernel) -> None:
        self.flow, self.index, self.kernel = flow, index, kernel
        self.tiling = Tiling(kernel)
        self.uses = Counter(tensor for op in kernel.ops for tensor in op.inputs)
        self.at: dict[Tensor, int] = {}
        self.positions: list[int] = []

    def follow(self) -> None:
        for op in self.kernel.ops:
            self._follow_op(op)
        for level, loop in enumerate(self.kernel.loops):
            for first, last in self.tiling.loop_spans(loop):
                ops = self.kernel.ops[first : last + 1]
                used = {tensor.name for op in ops for tensor in (*op.inputs, *op.weights)}
                streams = tuple(name for name in loop.streams if name in used)
                span = (self.positions[first], self.positions[last])
                self.flow.walks.append(Walk(replace(loop, streams=streams), *span, level))

    def _follow_op(self, op: Op) -> None:
        outside = [tensor for tensor in dict.fromkeys(op.inputs) if tensor not in self.at]
        if not self.positions and outside:
            self._enter(outside)
        operands = []
        for tensor in outside:
            if self.uses[tensor] > 1:
                self._copy(tensor, (self._whole(tensor),))
            else:
                operands.append(self._whole(tensor))
        operands += [self._whole(weight) for weight in op.weights]
        position = self._add(Node(self.index, op=op, operands=tuple(operands)))
        self.positions.append(position)
        for tensor in dict.fromkeys(op.inputs):
            if tensor in self.at:
                source = self.at[tensor]
                self._connect(source, position, self.flow.nodes[source].box.memory)
        self._leave(op, position)

    def _enter(self, outside: list[Tensor]) -> None:
        """Put the tensor that the kernel begins with ahead of its frame, unless the kernel before left it there."""
        nodes = self.flow.nodes
        tensor = next((tensor for tensor in outside if nodes and nodes[-1].box.tensor == tensor), outside[0])
        if not nodes or nodes[-1].box.tensor != tensor:
            self._add(Node(None, self._whole(tensor)))
        position = len(nodes) - 1
        outside.remove(tensor)
        if self.uses[tensor] > 1:
            copy = self._copy(tensor)
            self._connect(position, copy, self.kernel.memory(tensor))
        else:
            self.at[tensor] = position

    def _copy(self, tensor: Tensor, operands: tuple[Box, ...] = ()) -> int:
        sums = {op.output for op in self.tiling.sums}
        meets = any(tensor in op.inputs and not sums.isdisjoint(op.inputs) for op in self.kernel.ops)
        box = Box(tensor, Memory.GLOBAL if meets else Memory.LOCAL, self.tiling.sizes(tensor), is_tile=True)
        self.at[tensor] = self._add(Node(self.index, box, operands=operands))
        return self.at[tensor]

    def _leave(self, op: Op, position: int) -> None:
        memory = self.kernel.memory(op.output)
        note = SUM_NOTE if op in self.tiling.sums else ""
        if memory is Memory.DRAM or any(op.output in kernel.consumed for kernel in self.flow.program.kernels):
            box = replace(self._whole(op.output), note=note)
        else:
            box = Box(op.output, memory, self.tiling.sizes(op.output), is_tile=True, note=note)
        is_last = op is self.kernel.ops[-1]
        self.at[op.output] = self._add(Node(None if is_last and memory is not Memory.LOCAL else self.index, box))
        self._connect(position, self.at[op.output], memory)

    def _whole(self, tensor: Tensor) -> Box:
        sizes = tuple(str(size) for dim, size in tensor.dims if dim not in ("R", "S") or size > 1)
        return Box(tensor, self.kernel.memory(tensor), sizes)

    def _add(self, node: Node) -> int:
        self.flow.nodes.append(node)
        return len(self.flow.nodes) - 1

    def _connect(self, source: int, target: int, memory: Memory) -> None:
        self.flow.edges.append(Edge(source, target, memory))

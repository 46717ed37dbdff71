"""Tensor-machine programs (paper section 5.1): which kernel runs which op, where tensors live, which loops walk them.

OPs and DRAM bytes are not stated anywhere, they follow from a program's ops and placements.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from fusion.planner.graph import BlockGraph, Op, Tensor
from fusion.planner.layer_kind import LayerKind, layer_kind


class Memory(StrEnum):
    """Where a tensor lives. On a GPU: device memory, the L2 cache, and a processor's registers and shared memory."""

    DRAM = "DRAM"
    GLOBAL = "global"
    LOCAL = "local"


@dataclass(frozen=True)
class Loop:
    """A walk over tiles of ``tensor``.

    ``dims`` are (dimension, tile size) pairs, with None for a size that the tile choice has yet to make. Each step
    moves a tile of every tensor in ``streams`` out of DRAM through the memories in ``through``.
    """

    tensor: str
    dims: tuple[tuple[str, int | None], ...]
    streams: tuple[str, ...] = ()
    through: tuple[Memory, ...] = (Memory.GLOBAL, Memory.LOCAL)

    def __post_init__(self) -> None:
        for dim, tile in self.dims:
            if tile is not None and tile < 1:
                raise ValueError(f"loop over {self.tensor!r}: the tile of {dim} must be positive, got {tile}")

    def __str__(self) -> str:
        tiles = " ".join(dim if tile is None else f"{dim} by {tile}" for dim, tile in self.dims)
        text = f"{self.tensor} over {tiles}"
        if self.streams:
            text += f", streaming {', '.join(self.streams)} via {' -> '.join(self.through)}"
        return text


@dataclass(frozen=True)
class Kernel:
    """Ops that run together, in order, with a memory for every tensor that they touch.

    ``partition`` divides the work over processors, ``loops`` run inside one processor, outermost first.
    ``element_size`` is in bytes. Raises ValueError when a touched tensor has no placement, a placement belongs to no
    touched tensor, or an op consumes a LOCAL tensor that this kernel did not produce before.
    """

    name: str
    ops: tuple[Op, ...]
    placement: tuple[tuple[Tensor, Memory], ...]
    element_size: int
    partition: Loop | None = None
    loops: tuple[Loop, ...] = ()

    def __post_init__(self) -> None:
        if not self.ops:
            raise ValueError(f"kernel {self.name!r} has no ops")
        placed = {tensor for tensor, _ in self.placement}
        touched = {tensor for op in self.ops for tensor in (*op.inputs, *op.weights, op.output)}
        if len(self.placement) != len(placed) or placed != touched:
            wrong = ", ".join(sorted(tensor.name for tensor in placed ^ touched)) or "for one placed twice"
            raise ValueError(f"kernel {self.name!r} must place each tensor that it touches once; check {wrong}")
        for tensor in self.consumed:
            if self.memory(tensor) is Memory.LOCAL:
                raise ValueError(
                    f"kernel {self.name!r} consumes {tensor.name!r} from local memory but did not produce it; local "
                    "tensors do not cross kernels, place it in DRAM or global memory"
                )
        names = {tensor.name for tensor in touched}
        for loop in (*self.loops, *([self.partition] if self.partition else [])):
            unknown = {loop.tensor, *loop.streams} - names
            if unknown:
                raise ValueError(f"kernel {self.name!r} loops over {sorted(unknown)}, which it does not touch")

    def memory(self, tensor: Tensor) -> Memory:
        """Where this kernel finds or leaves ``tensor``. Raises KeyError."""
        return dict(self.placement)[tensor]

    @property
    def consumed(self) -> tuple[Tensor, ...]:
        """Activations and weights from outside the kernel, each once, in order of first use."""
        produced: set[Tensor] = set()
        consumed: dict[Tensor, None] = {}
        for op in self.ops:
            consumed.update((t, None) for t in (*op.inputs, *op.weights) if t not in produced)
            produced.add(op.output)
        return tuple(consumed)

    @property
    def reads(self) -> tuple[Tensor, ...]:
        """Tensors read from DRAM, each once however many ops use it."""
        return tuple(tensor for tensor in self.consumed if self.memory(tensor) is Memory.DRAM)

    @property
    def writes(self) -> tuple[Tensor, ...]:
        """Tensors written to DRAM."""
        return tuple(op.output for op in self.ops if self.memory(op.output) is Memory.DRAM)

    @property
    def ops_count(self) -> int:
        """Arithmetic operations, in OPs."""
        return sum(op.ops_count for op in self.ops)

    @property
    def bytes(self) -> int:
        """DRAM traffic, in bytes."""
        return self.element_size * sum(tensor.size for tensor in (*self.reads, *self.writes))

    @property
    def layer_kind(self) -> LayerKind:
        """What kind of layer this is, or a fused block."""
        return layer_kind(self.ops)

    def describe(self) -> str:
        """Several lines: cost, division over processors, loops, ops and where each result goes."""
        lines = [f"kernel {self.name}: {_cost(self.ops_count, self.bytes)}"]
        if self.partition:
            lines.append(f"  processors divide {self.partition}")
        lines += [f"  loop {loop}" for loop in self.loops]
        lines.append(f"  read from DRAM: {_tensors(self.reads)}")
        lines += [f"  {op} in {self.memory(op.output)}" for op in self.ops]
        return "\n".join(lines)


@dataclass(frozen=True)
class Program:
    """A block's kernels, run one after another.

    Raises ValueError when an op of the graph never runs, runs out of order or comes from elsewhere; when an op runs
    again other than to recompute a LOCAL tensor; when a kernel looks for a tensor where nothing before it left it; or
    when an output of the graph does not end in DRAM.
    """

    name: str
    graph: BlockGraph
    kernels: tuple[Kernel, ...]

    def __post_init__(self) -> None:
        first_runs: list[Op] = []
        home = {tensor: Memory.DRAM for tensor in (*self.graph.inputs, *self.graph.weights())}
        for kernel in self.kernels:
            if kernel.element_size != self.graph.element_size:
                self._fail(f"kernel {kernel.name!r} has {kernel.element_size}-byte elements, not {self.graph.dtype}")
            for tensor in kernel.consumed:
                memory = kernel.memory(tensor)
                if home.get(tensor) is not memory:
                    self._fail(
                        f"kernel {kernel.name!r} expects {tensor.name!r} in {memory}, where no earlier kernel left it"
                    )
            for op in kernel.ops:
                memory = kernel.memory(op.output)
                if op not in first_runs:
                    first_runs.append(op)
                elif memory is not Memory.LOCAL:
                    self._fail(f"op {op.name!r} runs twice; only a tensor in local memory may be recomputed")
                if memory is not Memory.LOCAL:
                    home[op.output] = memory
        if tuple(first_runs) != self.graph.ops:
            ran = ", ".join(op.name for op in first_runs)
            wanted = ", ".join(op.name for op in self.graph.ops)
            self._fail(f"the kernels run {ran}; they must run the graph's ops in its order: {wanted}")
        for tensor in self.graph.outputs:
            if home.get(tensor) is not Memory.DRAM:
                self._fail(f"output {tensor.name!r} does not end in DRAM")

    def _fail(self, problem: str) -> None:
        raise ValueError(f"program {self.name!r} of {self.graph.name!r}: {problem}")

    @property
    def ops_count(self) -> int:
        """Arithmetic operations of all kernels, in OPs."""
        return sum(kernel.ops_count for kernel in self.kernels)

    @property
    def bytes(self) -> int:
        """DRAM traffic of all kernels, in bytes."""
        return sum(kernel.bytes for kernel in self.kernels)

    def describe(self) -> str:
        """The whole program as text; also ``str(program)``."""
        count = f"{len(self.kernels)} kernel{'s' if len(self.kernels) > 1 else ''}"
        head = f"{self.name} {self.graph.name} ({self.graph.dtype}), {count}: {_cost(self.ops_count, self.bytes)}"
        return "\n".join([head, *("  " + line for k in self.kernels for line in k.describe().splitlines())])

    def __str__(self) -> str:
        return self.describe()


def _cost(ops_count: int, num_bytes: int) -> str:
    text = f"{ops_count / 1e9:.4g} GOP, {num_bytes / 1e6:.4g} MB"
    return f"{text}, {ops_count / num_bytes:.4g} OP/byte" if num_bytes else text


def _tensors(tensors: Iterable[Tensor]) -> str:
    return ", ".join(str(tensor) for tensor in tensors) or "nothing"

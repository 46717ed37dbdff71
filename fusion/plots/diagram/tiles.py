"""What follows from how a kernel divides and walks its tensors: sums over processors, a loop's ops, sizes of tiles."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from fusion.planner.graph import ACTIVATION_KINDS, Op, OpKind, Tensor
from fusion.planner.program import Kernel, Loop, Memory

BLUR_TAPS = 3

_CHANNELWISE = (
    *ACTIVATION_KINDS,
    OpKind.CONV,
    OpKind.SIGMOID,
    OpKind.GLOBAL_AVERAGE_POOL,
    OpKind.MULTIPLY,
    OpKind.ADD,
    OpKind.BLURPOOL,
    OpKind.CONCAT,
    OpKind.POOL,
    OpKind.ELEMENTWISE,
)
"""Kinds that keep channels, or groups of channels, apart unless they are dense."""


@dataclass(frozen=True, order=True)
class Extent:
    """Rows or columns of a tile: ``scale`` times a size that is open, named by ``symbol``, plus ``offset``."""

    scale: int
    offset: int
    symbol: str = ""

    def ahead_of(self, op: Op) -> "Extent":
        """What ``op`` needs of its input for this much of its output."""
        taps = BLUR_TAPS if op.kind is OpKind.BLURPOOL else op.kernel_size if op.kind is OpKind.CONV else 1
        return Extent(op.stride * self.scale, op.stride * self.offset + taps - op.stride, self.symbol)

    def text(self, size: int) -> str:
        """As it stands in a diagram; no more than ``size`` if the tile's size is known."""
        if not self.scale:
            return str(min(self.offset, size))
        multiple = f"{self.scale if self.scale > 1 else ''}{self.symbol}"
        return f"({multiple}+{self.offset})" if self.offset else multiple


@dataclass(frozen=True)
class Tiling:
    """The partition and the loops of ``kernel``, followed through its ops."""

    kernel: Kernel

    @cached_property
    def sums(self) -> tuple[Op, ...]:
        """The ops whose output is a sum over processors, each of which has but a part of its channels."""
        partition = self.kernel.partition
        if partition is None or not self._divides_channels(partition):
            return ()
        divided = self._channel_group({self._tensor(partition.tensor)})
        sums = []
        for op in self.kernel.ops:
            memory = self.kernel.memory(op.output)
            is_shared = memory is Memory.GLOBAL or (memory is Memory.DRAM and not divided.isdisjoint(op.inputs))
            if op.is_dense and is_shared and op.output not in divided:
                sums.append(op)
        return tuple(sums)

    def loop_spans(self, loop: Loop) -> list[tuple[int, int]]:
        """First and last position among the kernel's ops of each walk that ``loop`` stands for.

        Where something is summed over all tiles and then applied to each, like a squeeze vector, there are two walks.
        """
        ops = self.kernel.ops
        if not self._divides_channels(loop):
            inside = [i for i, op in enumerate(ops) if any(t.layout == "NHWC" for t in (*op.inputs, op.output))]
            return [(min(inside), max(inside))]
        group, phases = self._walk(loop)
        spans: dict[int, list[int]] = {}
        for position, op in enumerate(ops):
            if not group.isdisjoint((*op.inputs, op.output)):
                spans.setdefault(self._phase(op, phases), []).append(position)
        return [(min(span), max(span)) for _, span in sorted(spans.items())]

    def sizes(self, tensor: Tensor) -> tuple[str, ...]:
        """What a processor has of ``tensor`` at a time, one text a dimension: an open size by its letter."""
        sizes = {dim: str(size) for dim, size in tensor.dims}
        for loop in self._divisions:
            dims = dict(loop.dims)
            if "N" in dims and "N" in sizes:
                sizes["N"] = str(dims["N"] or "n")
        for dim in ("H", "W"):
            extent = self._extents(dim).get(tensor)
            if extent is not None:
                sizes[dim] = extent.text(tensor[dim])
        for loop in self._divisions:
            if self._divides_channels(loop) and tensor in self._tiled(loop):
                tile, channels = dict(loop.dims)["C"], self._tensor(loop.tensor)["C"]
                sizes["C"] = "c" if tile is None else str(max(tensor["C"] * tile // channels, 1))
        return tuple(sizes.values())

    @property
    def _divisions(self) -> tuple[Loop, ...]:
        partition = self.kernel.partition
        return (*([partition] if partition else []), *self.kernel.loops)

    def _tiled(self, loop: Loop) -> set[Tensor]:
        """The tensors of whose channels there is only a share at a time."""
        if loop is self.kernel.partition:
            parts = {tensor for op in self.sums for tensor in op.inputs}
            return self._channel_group({self._tensor(loop.tensor), *parts})
        group, phases = self._walk(loop)
        held = {t for op in self.kernel.ops for t in op.inputs if self._phase(op, phases) > phases.get(t, 0)}
        return group - held

    def _walk(self, loop: Loop) -> tuple[set[Tensor], dict[Tensor, int]]:
        """The tensors whose channels a loop walks, and how many sums over all of its tiles are behind each tensor."""
        group = self._channel_group({self._tensor(loop.tensor)})
        phases: dict[Tensor, int] = {}
        for op in self.kernel.ops:
            phases[op.output] = self._phase(op, phases) + (op.is_dense and not group.isdisjoint(op.inputs))
        return group, phases

    @staticmethod
    def _phase(op: Op, phases: dict[Tensor, int]) -> int:
        return max(phases.get(tensor, 0) for tensor in op.inputs)

    def _channel_group(self, tensors: Iterable[Tensor]) -> set[Tensor]:
        """These, and all tensors of the kernel with the same channels: no op between them mixes channels."""
        group = set(tensors)
        linked = [{*op.inputs, op.output} for op in self.kernel.ops if op.kind in _CHANNELWISE and not op.is_dense]
        size = 0
        while size != len(group):
            size = len(group)
            for link in linked:
                if not group.isdisjoint(link):
                    group |= link
        return group

    def _divides_channels(self, loop: Loop) -> bool:
        dims = dict(loop.dims)
        return "C" in dims and (dims["C"] is None or dims["C"] < self._tensor(loop.tensor)["C"])

    def _extents(self, dim: str) -> dict[Tensor, Extent]:
        """Rows, or columns, of each tensor that the tiles of the partition and the loops call for, with their halo."""
        extents: dict[Tensor, Extent] = {}
        for loop in self._divisions:
            if dim in dict(loop.dims):
                tile = dict(loop.dims)[dim]
                extents[self._tensor(loop.tensor)] = Extent(1, 0, dim.lower()) if tile is None else Extent(0, tile)
        for op in reversed(self.kernel.ops):
            if op.output in extents:
                needed = extents[op.output].ahead_of(op)
                for tensor in op.inputs:
                    if dim in dict(tensor.dims):
                        extents[tensor] = max(extents.get(tensor, needed), needed)
        return extents

    def _tensor(self, name: str) -> Tensor:
        return next(tensor for tensor, _ in self.kernel.placement if tensor.name == name)

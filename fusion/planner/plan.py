"""The plan of a block: which program runs it, with which kernel and tile, and why."""

from dataclasses import dataclass, field
from functools import cache

from fusion.planner.families import KernelFamily, Tile, families_of, family_named, family_of
from fusion.planner.graph import ACTIVATION_KINDS, BlockGraph
from fusion.planner.lower import layerwise
from fusion.planner.match import (
    BlockShape,
    match_convfirst,
    match_convfirst_down,
    match_ffn,
    match_head,
    match_mbconv,
    match_mbconv_down,
    match_stem,
    match_stem_convfirst,
)
from fusion.planner.processor import Processor, get_processor
from fusion.planner.program import Program
from fusion.planner.waterline import analyze

RUNNERS_UP = 3
MUCH_FASTER = 0.75
"""Share of a preferred kernel's predicted time below which another one is chosen: predictions are rough across
kernels."""


class PlanError(ValueError):
    """No kernel runs the block as asked; the message says what was asked, what is supported and what to do instead."""


@dataclass(frozen=True)
class Rejection:
    """A program, kernel or tile that was not chosen."""

    what: str
    why: str


@dataclass(frozen=True)
class Plan:
    """How a block runs on a processor.

    The type of `tile` says which kernel runs. Times are in microseconds: `predicted_us` is the planner's estimate for
    the block with a launch of its own, `measured_us` what a tuner measured, if it did. `why` and `rejected` say how the
    choice came about. `str(plan)` is the whole of it; `repr(plan.tile)` can be pasted back as the `tile` of
    `plan_block`.
    """

    program: Program
    shape: BlockShape
    tile: Tile
    processor: Processor
    why: str
    rejected: tuple[Rejection, ...] = field(default=(), repr=False)
    measured_us: float | None = None

    @property
    def family(self) -> KernelFamily:
        """The kernel and what is known about its tiles."""
        return family_of(self.tile)

    @property
    def kernel(self) -> str:
        """Name of the kernel family, for example "convfirst_hopper"."""
        return self.family.name

    @property
    def ops_count(self) -> int:
        """Arithmetic operations of the block, in OPs."""
        return self.program.ops_count

    @property
    def bytes(self) -> int:
        """DRAM traffic of the program, in bytes."""
        return self.program.bytes

    @property
    def local_memory_bytes(self) -> int:
        """Shared memory of one program, in bytes."""
        return self.family.local_memory_bytes(self.tile, self.shape, self.processor)

    @property
    def predicted_us(self) -> float:
        """Predicted duration in microseconds of the block with a launch of its own."""
        return self.family.predicted_us(self.tile, self.shape, self.processor)

    def predicted_stage_us(self, blocks: int) -> float:
        """Predicted microseconds of one of so many equal blocks that follow each other: in one launch if the kernel
        can take them, else as `predicted_us`. A kernel takes several only if they have residuals."""
        if self.family.stage_us is None or not self.shape.residual:
            return self.predicted_us
        return self.family.stage_us(self.tile, self.shape, self.processor, blocks)

    @property
    def limit_us(self) -> float:
        """Minimum latency of the program on the processor (section 4), in microseconds."""
        return analyze(self.program, self.processor).min_latency * 1e6

    def describe(self) -> str:
        """The plan as text, one fact a line."""
        registers = self.family.estimated_registers(self.tile, self.shape)
        occupancy = self.family.programs_per_processor(self.tile, self.shape, self.processor)
        measured = "" if self.measured_us is None else f", measured {self.measured_us:.1f} us"
        lines = [
            str(self.program),
            f"  kernel {self.kernel} on {self.processor}",
            f"  {self.tile!r}",
            f"  local memory {self.local_memory_bytes / 1024:.0f} KB, about "
            f"{registers:.0f} registers a thread, {occupancy} programs a processor",
            f"  predicted {self.predicted_us:.1f} us{measured}, limit {self.limit_us:.1f} us",
            f"  chosen: {self.why}",
            *(f"  rejected {rejection.what}: {rejection.why}" for rejection in self.rejected),
        ]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.describe()


def ranked_tiles(
    shape: BlockShape, processor: Processor, kernel: str | None = None, portable: bool = False
) -> dict[KernelFamily, list[Tile]]:
    """The kernels that run a block, in order of preference, and all their valid tiles, the best prediction first.

    `kernel` leaves only the kernel family of that name, `portable` only portable ones. Raises PlanError if nothing is
    left, and ValueError for an unknown name.
    """
    families = families_of(shape)
    if portable:
        families = tuple(family for family in families if family.is_portable)
        if not families:
            raise PlanError(f"no portable kernel runs {shape}; run the block layer by layer, or leave out portable")
    if kernel is not None:
        named = tuple(family for family in families if family is family_named(kernel))
        if not named:
            supported = " or ".join(repr(family.name) for family in families)
            raise PlanError(f"kernel {kernel!r} does not run {shape}; use {supported}")
        families = named
    ranked = {family: family.ranked_tiles(shape, processor) for family in families}
    ranked = {family: tiles for family, tiles in ranked.items() if tiles}
    if not ranked:
        reasons = "; ".join(f"{family.title}: {family.why_none(shape, processor)}" for family in families)
        raise PlanError(f"no tile fits {shape} on {processor.title}: {reasons}; run the block layer by layer")
    return ranked


def block_shape(graph: BlockGraph) -> BlockShape:
    """The shape of a block that a fused kernel runs. Raises PlanError if none does."""
    shape = (
        match_convfirst(graph)
        or match_convfirst_down(graph)
        or match_ffn(graph)
        or match_mbconv(graph)
        or match_mbconv_down(graph)
        or match_stem(graph)
        or match_stem_convfirst(graph)
        or match_head(graph)
    )
    if shape is None:
        raise PlanError(
            f"no fused kernel runs the block {graph.name!r} ({', '.join(op.name for op in graph.ops)}); supported is "
            "ConvFirst: a grouped 3x3 convolution of stride 1 or 2, or of stride 1, concatenated to its input and "
            "blur-pooled, expand, an activation, project; FFN: expand, ReLU, project; "
            "MBConv: expand, an activation, a grouped 3x3 or 5x5 convolution of stride 1 or 2, the same activation, "
            "maybe, after a 3x3 one of stride 1, a blur-pool, squeeze-and-excitation with ReLU or SiLU, project; a "
            "stem: a dense 3x3 convolution of stride 2, maybe an activation; and a head: a 1x1 convolution, maybe an "
            f"activation, global average pool; with activations {', '.join(ACTIVATION_KINDS)}; run it layer by layer"
        )
    reasons = [family.why_unsupported(shape) for family in families_of(shape)]
    if all(reasons):
        raise PlanError(f"no fused kernel runs {shape}: {reasons[-1]}; run it layer by layer")
    return shape


def plan_block(
    graph: BlockGraph,
    processor: str | Processor = "h200",
    tile: Tile | None = None,
    *,
    kernel: str | None = None,
    portable: bool = False,
) -> Plan:
    """Choose program, kernel and tile for a block on a processor, from shapes alone.

    `tile` overrides the planner's choice, of the kernel too; `kernel` names the kernel family that it chooses a tile
    of, and with `portable` that is a portable one (`KernelFamily.is_portable`). Raises PlanError when no fused kernel
    runs the block or the given tile is not valid for it, and ValueError for an unknown processor or kernel.
    """
    processor = get_processor(processor)
    shape = block_shape(graph)
    rejected = [_layerwise_rejection(graph, processor), *_impossible_kernels(shape, processor)]
    if tile is not None:
        if family_of(tile) not in families_of(shape):
            raise PlanError(f"{tile!r} is for other blocks than {shape}; leave the tile to the planner")
        invalid = family_of(tile).why_invalid(tile, shape, processor)
        if invalid:
            raise PlanError(f"{tile!r} cannot run {shape}: {invalid}; leave the tile to the planner or change it")
        why = "the tile was given"
    else:
        tile, why, others = _choice(shape, processor, kernel, portable)
        rejected += others
    family = family_of(tile)
    program = family.lower(graph, tile, shape)
    return Plan(program, shape, tile, processor, why, tuple(rejected))


@cache
def _choice(
    shape: BlockShape, processor: Processor, kernel: str | None, portable: bool
) -> tuple[Tile, str, tuple[Rejection, ...]]:
    """The tile with the lowest predicted time, why, and what was not chosen.

    Remembered, as it takes thousands of predictions, and the blocks of a network are few that differ.
    """
    ranked = ranked_tiles(shape, processor, kernel, portable)
    family = _preferred(ranked, shape, processor)
    tile, *slower = ranked.pop(family)
    why = f"lowest predicted time of {1 + len(slower)} valid tiles of the {family.title}"
    rejected = [Rejection(repr(other), _prediction(other, shape, processor)) for other in slower[:RUNNERS_UP]]
    rejected += [
        Rejection(other.title, f"{_prediction(best, shape, processor)} at best") for other, (best, *_) in ranked.items()
    ]
    if portable:
        opaque = [other for other in families_of(shape) if not other.is_portable]
        rejected += [Rejection(other.title, "it is not portable, as was asked for") for other in opaque]
    return tile, why, tuple(rejected)


def _preferred(ranked: dict[KernelFamily, list[Tile]], shape: BlockShape, processor: Processor) -> KernelFamily:
    """The first kernel, unless a later one should be much faster, for example as it divides few images more finely."""
    best, *others = ranked
    for other in others:
        us, best_us = (family.predicted_us(ranked[family][0], shape, processor) for family in (other, best))
        if us < MUCH_FASTER * best_us:
            best = other
    return best


def _layerwise_rejection(graph: BlockGraph, processor: Processor) -> Rejection:
    program = layerwise(graph)
    limit = analyze(program, processor).min_latency * 1e6
    return Rejection(
        "layerwise program",
        f"{len(program.kernels)} kernels move {program.bytes / 1e6:.0f} MB, at least {limit:.1f} us",
    )


def _impossible_kernels(shape: BlockShape, processor: Processor) -> list[Rejection]:
    reasons = {family.title: family.why_none(shape, processor) for family in families_of(shape)}
    return [Rejection(title, reason) for title, reason in reasons.items() if reason]


def _prediction(tile: Tile, shape: BlockShape, processor: Processor) -> str:
    return f"predicted {family_of(tile).predicted_us(tile, shape, processor):.1f} us"

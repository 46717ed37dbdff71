"""The plan of a block: which program runs it, with which kernel and tile, and why."""

from dataclasses import dataclass, field

from fusion.planner.graph import BlockGraph
from fusion.planner.lower import block_fused, layerwise
from fusion.planner.match import ConvFirstShape, match_convfirst
from fusion.planner.processor import Processor, get_processor
from fusion.planner.program import Program
from fusion.planner.tile import (
    ConvFirstTile,
    candidate_tiles,
    estimated_registers,
    local_memory_bytes,
    predicted_us,
    programs_per_processor,
    why_invalid,
    why_unsupported,
)
from fusion.planner.waterline import analyze

RUNNERS_UP = 3


class PlanError(ValueError):
    """No kernel runs the block as asked; the message says what was asked, what is supported and what to do instead."""


@dataclass(frozen=True)
class Rejection:
    """A program or tile that was not chosen."""

    what: str
    why: str


@dataclass(frozen=True)
class Plan:
    """How a block runs on a processor.

    `kernel` names the kernel family. Times are in microseconds: `predicted_us` is the planner's estimate, `measured_us`
    what a tuner measured, if it did. `why` and `rejected` say how the choice came about. `str(plan)` is the whole of
    it; `repr(plan.tile)` can be pasted back as the `tile` of `plan_block`.
    """

    program: Program
    kernel: str
    shape: ConvFirstShape
    tile: ConvFirstTile
    processor: Processor
    why: str
    rejected: tuple[Rejection, ...] = field(default=(), repr=False)
    measured_us: float | None = None

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
        return local_memory_bytes(self.tile, self.shape, self.processor)

    @property
    def predicted_us(self) -> float:
        """Predicted duration in microseconds."""
        return predicted_us(self.tile, self.shape, self.processor)

    @property
    def limit_us(self) -> float:
        """Minimum latency of the program on the processor (section 4), in microseconds."""
        return analyze(self.program, self.processor).min_latency * 1e6

    def describe(self) -> str:
        """The plan as text, one fact a line."""
        occupancy = programs_per_processor(self.tile, self.shape, self.processor)
        measured = "" if self.measured_us is None else f", measured {self.measured_us:.1f} us"
        lines = [
            str(self.program),
            f"  kernel {self.kernel} on {self.processor}",
            f"  {self.tile!r}",
            f"  local memory {self.local_memory_bytes / 1024:.0f} KB, about "
            f"{estimated_registers(self.tile, self.shape):.0f} registers a thread, {occupancy} programs a processor",
            f"  predicted {self.predicted_us:.1f} us{measured}, limit {self.limit_us:.1f} us",
            f"  chosen: {self.why}",
            *(f"  rejected {rejection.what}: {rejection.why}" for rejection in self.rejected),
        ]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.describe()


def ranked_tiles(shape: ConvFirstShape, processor: Processor) -> list[ConvFirstTile]:
    """All valid candidates, the best prediction first. Raises PlanError if there are none."""
    tiles = list(candidate_tiles(shape, processor))
    if not tiles:
        raise PlanError(
            f"no tile of the ConvFirst kernel fits {shape} on {processor.title}: its channels need more registers or "
            "shared memory than a processor has; run the block layer by layer"
        )
    return sorted(tiles, key=lambda tile: round(predicted_us(tile, shape, processor), 2))


def convfirst_shape(graph: BlockGraph) -> ConvFirstShape:
    """The shape of a block that a fused kernel runs. Raises PlanError if none does."""
    shape = match_convfirst(graph)
    if shape is None:
        raise PlanError(
            f"no fused kernel runs the block {graph.name!r} ({', '.join(op.name for op in graph.ops)}); supported is "
            "ConvFirst with stride 1: a grouped 3x3 convolution, expand, ReLU or SiLU, project; run it layer by layer"
        )
    unsupported = why_unsupported(shape)
    if unsupported:
        raise PlanError(f"no fused kernel runs {shape}: {unsupported}")
    return shape


def plan_block(graph: BlockGraph, processor: str | Processor = "h200", tile: ConvFirstTile | None = None) -> Plan:
    """Choose program and tile for a block on a processor, from shapes alone.

    `tile` overrides the planner's choice. Raises PlanError when no fused kernel runs the block or the given tile is
    not valid for it, and ValueError for an unknown processor.
    """
    processor = get_processor(processor)
    shape = convfirst_shape(graph)
    rejected = [_layerwise_rejection(graph, processor)]
    if tile is not None:
        invalid = why_invalid(tile, shape, processor)
        if invalid:
            raise PlanError(f"{tile!r} cannot run {shape}: {invalid}; leave the tile to the planner or change it")
        why = "the tile was given"
    else:
        tiles = ranked_tiles(shape, processor)
        tile = tiles[0]
        why = f"lowest predicted time of {len(tiles)} valid tiles"
        rejected += [
            Rejection(repr(other), f"predicted {predicted_us(other, shape, processor):.1f} us")
            for other in tiles[1 : 1 + RUNNERS_UP]
        ]
    program = block_fused(graph, (tile.height, tile.width), tile.hidden)
    return Plan(program, "convfirst", shape, tile, processor, why, tuple(rejected))


def _layerwise_rejection(graph: BlockGraph, processor: Processor) -> Rejection:
    program = layerwise(graph)
    limit = analyze(program, processor).min_latency * 1e6
    return Rejection(
        "layerwise program",
        f"{len(program.kernels)} kernels move {program.bytes / 1e6:.0f} MB, at least {limit:.1f} us",
    )

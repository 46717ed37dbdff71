"""Whether a block runs faster fused than as Inductor would run it, by measurement.

Inductor runs each convolution as a kernel of its own, and others around them. So a fused block that is faster than the
block's convolutions alone is faster than Inductor's code for it, and to know that takes no compilation. Only where it
is not, Inductor compiles the block, and that is measured.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, fx

from fusion.backend.region import as_in_model, convolutions, input_kind, region_of
from fusion.disk_cache import BlockKey, Entries
from fusion.frontend.find import FoundBlock
from fusion.launch_record import InputKind
from fusion.modules import FusedBlock
from fusion.planner.plan import Plan
from fusion.timing import graph_us

VERDICTS = Entries("verdicts", format=1, what="measurement", again="measuring again")

TOLERANCE = 0.05
"""Relative L2 distance between a fused block and the model's own layers in 16 bits, from which on one of them is
broken: rounding errors of either are ten times less."""

REPEATS = 8
"""Calls in a measured graph: a single kernel is too short to time."""

CONVOLUTIONS = "its convolutions alone"
INDUCTOR = "Inductor"


class WrongResult(RuntimeError):
    """A fused block does not give what the model's layers give."""


@dataclass(frozen=True)
class Verdict:
    """Microseconds of a block, fused and otherwise; `other` says what was measured: "its convolutions alone", a lower
    bound of Inductor's time, or "Inductor"."""

    fused_us: float
    other_us: float
    other: str

    @property
    def speedup(self) -> float:
        """How many times as fast the block is fused; at least, if its convolutions alone were measured."""
        return self.other_us / self.fused_us


def judge(
    graph_module: fx.GraphModule,
    found: FoundBlock,
    plan: Plan,
    constants: Mapping[fx.Node, Tensor],
    min_speedup: float,
) -> Verdict:
    """Time a block on its GPU, on random inputs of the shape at hand, or recall what was measured before.

    Inductor is measured only if the block is not `min_speedup` times as fast as its convolutions alone. Raises
    WrongResult if the fused block gives something else than the model's layers, and what those raise.
    """
    kind = input_kind(found)
    key = _key(plan, kind)
    verdict = _remembered(key)
    if verdict is None or (verdict.other == CONVOLUTIONS and verdict.speedup < min_speedup):
        with torch.cuda.device(kind.device), torch.random.fork_rng([kind.device]):
            verdict = _measure(region_of(graph_module, found, constants), found.block, kind, min_speedup)
        VERDICTS.store(key, asdict(verdict))
    return verdict


def is_known_slow(plan: Plan, kind: InputKind, min_speedup: float) -> bool:
    """Whether `judge` would only recall that a block is not `min_speedup` times as fast as Inductor's code."""
    verdict = _remembered(_key(plan, kind))
    return verdict is not None and verdict.other == INDUCTOR and verdict.speedup < min_speedup


def _remembered(key: BlockKey) -> Verdict | None:
    return VERDICTS.load(key, lambda entry: Verdict(entry["fused_us"], entry["other_us"], entry["other"]))


def _key(plan: Plan, kind: InputKind) -> BlockKey:
    from fusion.tuner.tune import cache_key

    key = cache_key(plan.shape, kind.device)
    versions = f"{key.triton}, torch {torch.__version__}"
    return replace(key, triton=versions, kernel_hash=f"{key.kernel_hash}, {plan.tile!r}")


def _measure(region: fx.GraphModule, block: FusedBlock, kind: InputKind, min_speedup: float) -> Verdict:
    x = kind.random()
    with as_in_model(kind):
        _compare(block(x), region(x))
        fused_us = _us(lambda: block(x))
        calls = convolutions(region, x)
        bound_us = _us(lambda: [call() for call in calls])
        if bound_us >= min_speedup * fused_us:
            return Verdict(fused_us, bound_us, CONVOLUTIONS)
        compiled = compile_region(region, x)
        return Verdict(fused_us, _us(lambda: compiled(x)), INDUCTOR)


def compile_region(region: fx.GraphModule, x: Tensor) -> Callable[[Tensor], object]:
    """Inductor's code for a region, compiled aside from the model that is being compiled."""
    from torch._guards import tracing
    from torch._inductor.compile_fx import compile_fx

    with tracing(None):
        return compile_fx(region, [x])


def _us(run: Callable[[], object]) -> float:
    """Microseconds of a call, of several in a CUDA graph."""
    return graph_us(lambda: [run() for _ in range(REPEATS)]) / REPEATS


def _compare(ours: Tensor, theirs: Tensor) -> None:
    theirs = theirs.double()
    distance = ((ours.double() - theirs).norm() / theirs.norm()).item()
    if not distance <= TOLERANCE:
        raise WrongResult(f"its result differs from that of the model's layers by {distance:.2g} of the norm")

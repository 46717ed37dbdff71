"""The search: which tiles are tried, in which order, and what becomes of the results."""

import hashlib
import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import triton

from fusion.planner.graph import BlockGraph
from fusion.planner.match import ConvFirstShape
from fusion.planner.plan import RUNNERS_UP, Plan, Rejection, convfirst_shape, plan_block, ranked_tiles
from fusion.planner.processor import Processor, get_processor
from fusion.planner.tile import ConvFirstTile, why_invalid
from fusion.probe import cuda_device, processor_of
from fusion.progress import progress_bar
from fusion.triton_kernels import convfirst
from fusion.tuner import cache
from fusion.tuner.pool import WorkerPool

FIRST_ROUND = 24
"""Tiles of the first round: the best predictions among those that differ in more than aspect and pipelines."""
SECOND_ROUND_SEEDS = 3
"""Winners of the first round whose aspects and pipelines the second round tries."""


@dataclass
class Results:
    """What a search found: microseconds of the tiles that work, and how many failed for which reason."""

    measured: dict[ConvFirstTile, float] = field(default_factory=dict)
    failures: Counter[str] = field(default_factory=Counter)

    def ranking(self) -> list[ConvFirstTile]:
        """Tiles that work, the fastest first."""
        return sorted(self.measured, key=self.measured.__getitem__)


def tune_block(graph: BlockGraph, processor: str | Processor | None = None, **options) -> Plan:
    """Plan one block by measurement; `options` and errors as for `tune_blocks`."""
    return tune_blocks([graph], processor, **options)[0]


def tune_blocks(
    graphs: Sequence[BlockGraph],
    processor: str | Processor | None = None,
    *,
    device: int | str | None = None,
    refresh: bool = False,
    progress: bool = True,
) -> list[Plan]:
    """Plan blocks by measurement: for each the fastest tile whose results are right, from the cache or from a search.

    The search times some 50 tiles a block, each in a worker process, on random weights and inputs: a stage of eight
    blocks in a CUDA graph. It shows a progress bar on standard error unless `progress` is False and keeps the winners
    (`fusion.tuner.cache`); `refresh` searches even if the cache knows. `device` is a GPU (default: the current one);
    `processor` (default: that GPU) only orders the candidates.

    Raises RuntimeError without a CUDA GPU or if no tile of a block gives right results, and PlanError for a block that
    has no kernel.
    """
    device = cuda_device(device)
    processor = processor_of(device) if processor is None else get_processor(processor)
    shapes = [convfirst_shape(graph) for graph in graphs]
    keys = [cache_key(shape, device) for shape in shapes]
    known = [None if refresh else _usable(cache.load(key), key.shape, processor) for key in keys]
    unknown = list(dict.fromkeys(shape for shape, tile in zip(shapes, known, strict=True) if tile is None))
    results = search(unknown, processor, device, progress) if unknown else {}
    plans = []
    for graph, key, cached in zip(graphs, keys, known, strict=True):
        if cached is not None:
            plans.append(_plan(graph, processor, *cached, f"measured fastest before on {key.device}"))
            continue
        found = results[key.shape]
        if not found.measured:
            raise RuntimeError(
                f"no tile of the ConvFirst kernel gives right results for {key.shape} on {key.device}: "
                + "; ".join(f"{count} tiles: {reason}" for reason, count in found.failures.most_common(3))
            )
        best, *others = found.ranking()
        cache.store(key, best, found.measured[best])
        rejected = [Rejection(repr(tile), f"measured {found.measured[tile]:.1f} us") for tile in others[:RUNNERS_UP]]
        rejected += [Rejection(f"{count} tiles", reason) for reason, count in found.failures.most_common()]
        why = f"measured fastest of {len(found.measured)} tiles on {key.device}"
        plans.append(_plan(graph, processor, best, found.measured[best], why, rejected))
    return plans


def cache_key(shape: ConvFirstShape, device: torch.device) -> cache.CacheKey:
    """What a measurement of this block on this GPU, with this compiler and this kernel, is kept under."""
    source = Path(inspect.getfile(convfirst)).read_bytes()
    name = torch.cuda.get_device_name(device)
    return cache.CacheKey(name, triton.__version__, hashlib.sha256(source).hexdigest()[:16], shape)


def search(
    shapes: Sequence[ConvFirstShape], processor: Processor, device: torch.device, progress: bool
) -> dict[ConvFirstShape, Results]:
    """Time candidates of every shape in two rounds. Raises PlanError for a shape that no tile fits."""
    ranked = {shape: ranked_tiles(shape, processor) for shape in shapes}
    results = {shape: Results() for shape in shapes}
    title = f"tuning {len(shapes)} block{'s' if len(shapes) > 1 else ''}"
    with progress_bar(title, show=progress) as bar, WorkerPool(device) as pool:

        def run_round(choose: Callable[[ConvFirstShape], Sequence[ConvFirstTile]]) -> None:
            jobs = [(shape, tile) for shape in shapes for tile in choose(shape)]
            bar.extend(2 * len(jobs))
            pool.compile(jobs, bar.advance)
            for shape, tile in jobs:
                reply = pool.measure(shape, tile)
                if "us" in reply:
                    results[shape].measured[tile] = reply["us"]
                else:
                    results[shape].failures[reply["failed"]] += 1
                bar.advance()

        first = {shape: first_round(tiles) for shape, tiles in ranked.items()}
        run_round(lambda shape: first[shape])
        run_round(lambda shape: second_round(ranked[shape], results[shape].ranking(), first[shape]))
    return results


def first_round(ranked: Sequence[ConvFirstTile]) -> list[ConvFirstTile]:
    """The best of each design (pixels, hidden step, slab, warps), up to `FIRST_ROUND`."""
    best: dict[tuple, ConvFirstTile] = {}
    for tile in ranked:
        best.setdefault(_design(tile), tile)
    return list(best.values())[:FIRST_ROUND]


def second_round(
    ranked: Sequence[ConvFirstTile], winners: Sequence[ConvFirstTile], tried: Sequence[ConvFirstTile]
) -> list[ConvFirstTile]:
    """Other aspects and pipelines of the fastest designs."""
    fastest = {_design(tile) for tile in winners[:SECOND_ROUND_SEEDS]}
    return [tile for tile in ranked if _design(tile) in fastest and tile not in tried]


def _design(tile: ConvFirstTile) -> tuple:
    return tile.pixels, tile.hidden, tile.conv_slab, tile.warps


def _usable(
    cached: tuple[ConvFirstTile, float] | None, shape: ConvFirstShape, processor: Processor
) -> tuple[ConvFirstTile, float] | None:
    return cached if cached is not None and why_invalid(cached[0], shape, processor) is None else None


def _plan(
    graph: BlockGraph,
    processor: Processor,
    tile: ConvFirstTile,
    us: float,
    why: str,
    rejected: Sequence[Rejection] = (),
) -> Plan:
    plan = plan_block(graph, processor, tile)
    return replace(plan, why=why, rejected=(*plan.rejected, *rejected), measured_us=us)

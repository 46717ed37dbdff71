"""The search: which tiles are tried, in which order, and what becomes of the results."""

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import triton

from fusion import triton_kernels
from fusion.disk_cache import BlockKey
from fusion.planner.families import KernelFamily, Tile, family_of
from fusion.planner.graph import BlockGraph
from fusion.planner.match import BlockShape
from fusion.planner.plan import RUNNERS_UP, Plan, Rejection, block_shape, plan_block, ranked_tiles
from fusion.planner.processor import Processor, get_processor
from fusion.probe import cuda_device, processor_of
from fusion.progress import progress_bar
from fusion.tuner import cache
from fusion.tuner.pool import WorkerPool

FIRST_ROUND = 24
"""Tiles of the first round: the best predictions among those of different designs."""
ALTERNATIVES = 8
"""How many of them are of a kernel family that the planner would not choose."""
NO_KERNELS = ("ahead", "__")
"""Files beside the kernels that change nothing in them."""
SECOND_ROUND_SEEDS = 3
"""Winners of the first round of whose designs the second round tries all tiles."""


@dataclass
class Results:
    """What a search found: microseconds of the tiles that work, and how many failed for which reason."""

    measured: dict[Tile, float] = field(default_factory=dict)
    failures: Counter[str] = field(default_factory=Counter)

    def ranking(self) -> list[Tile]:
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
    portable: bool = False,
) -> list[Plan]:
    """Plan blocks by measurement: for each the fastest tile whose results are right, from the cache or from a search.

    Tiles of all kernels that can run a block compete, so that none is slower than what runs everywhere.
    The search times some 50 tiles a block, each in a worker process, on random weights and inputs: a stage of eight
    blocks in a CUDA graph. It shows a progress bar on standard error unless `progress` is False and keeps the winners
    (`fusion.tuner.cache`); `refresh` searches even if the cache knows. `device` is a GPU (default: the current one);
    `processor` (default: that GPU) says which tiles are valid and in which order they are tried. With `portable` only
    portable kernels compete (`KernelFamily.is_portable`); their winners are kept apart.

    Raises RuntimeError without a CUDA GPU or if no tile of a block gives right results, and PlanError for a block that
    has no kernel.
    """
    device = cuda_device(device)
    processor = processor_of(device) if processor is None else get_processor(processor)
    shapes = [block_shape(graph) for graph in graphs]
    keys = [cache_key(shape, device) for shape in shapes]
    known = [None if refresh else _usable(cache.load(key, portable), key.shape, processor) for key in keys]
    unknown = list(dict.fromkeys(shape for shape, tile in zip(shapes, known, strict=True) if tile is None))
    results = search(unknown, processor, device, progress, portable) if unknown else {}
    plans = []
    for graph, key, cached in zip(graphs, keys, known, strict=True):
        if cached is not None:
            plans.append(_plan(graph, processor, *cached, f"measured fastest before on {key.device}"))
            continue
        found = results[key.shape]
        if not found.measured:
            raise RuntimeError(
                f"no tile gives right results for {key.shape} on {key.device}: "
                + "; ".join(f"{count} tiles: {reason}" for reason, count in found.failures.most_common(3))
            )
        best, *others = found.ranking()
        cache.store(key, best, found.measured[best], portable)
        rejected = [Rejection(repr(tile), f"measured {found.measured[tile]:.1f} us") for tile in others[:RUNNERS_UP]]
        rejected += _slower_kernels(found)
        rejected += [Rejection(f"{count} tiles", reason) for reason, count in found.failures.most_common()]
        why = f"measured fastest of {len(found.measured)} tiles on {key.device}"
        plans.append(_plan(graph, processor, best, found.measured[best], why, rejected))
    return plans


def cache_key(shape: BlockShape, device: torch.device) -> BlockKey:
    """What a measurement of this block on this GPU, with this compiler and these kernels, is kept under."""
    source = b"".join(path.read_bytes() for path in kernel_sources())
    name = torch.cuda.get_device_name(device)
    return BlockKey(name, triton.__version__, hashlib.sha256(source).hexdigest()[:16], shape)


def kernel_sources() -> list[Path]:
    """The files that hold the kernels of all families, and what they share."""
    folder = Path(triton_kernels.__file__).parent
    return sorted(path for path in folder.glob("*.py") if not path.name.startswith(NO_KERNELS))


def search(
    shapes: Sequence[BlockShape], processor: Processor, device: torch.device, progress: bool, portable: bool = False
) -> dict[BlockShape, Results]:
    """Time candidates of every shape in two rounds. Raises PlanError for a shape that no tile fits."""
    ranked = {shape: ranked_tiles(shape, processor, portable=portable) for shape in shapes}
    results = {shape: Results() for shape in shapes}
    title = f"tuning {len(shapes)} block{'s' if len(shapes) > 1 else ''}"
    with progress_bar(title, show=progress) as bar, WorkerPool(device) as pool:

        def run_round(choose: Callable[[BlockShape], Sequence[Tile]]) -> None:
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


def first_round(ranked: Mapping[KernelFamily, Sequence[Tile]]) -> list[Tile]:
    """The best of each design, up to `FIRST_ROUND`: `ALTERNATIVES` of each kernel but the first, which has the rest."""
    preferred, *others = (_best_of_designs(family, tiles) for family, tiles in ranked.items())
    alternatives = [tile for tiles in others for tile in tiles[:ALTERNATIVES]]
    return preferred[: FIRST_ROUND - len(alternatives)] + alternatives


def second_round(
    ranked: Mapping[KernelFamily, Sequence[Tile]], winners: Sequence[Tile], tried: Sequence[Tile]
) -> list[Tile]:
    """Tiles not tried yet of the fastest designs."""
    fastest = {(family_of(tile), family_of(tile).design(tile)) for tile in winners[:SECOND_ROUND_SEEDS]}
    return [
        tile
        for family, tiles in ranked.items()
        for tile in tiles
        if (family, family.design(tile)) in fastest and tile not in tried
    ]


def _best_of_designs(family: KernelFamily, ranked: Sequence[Tile]) -> list[Tile]:
    best: dict[tuple[int, ...], Tile] = {}
    for tile in ranked:
        best.setdefault(family.design(tile), tile)
    return list(best.values())


def _slower_kernels(found: Results) -> list[Rejection]:
    """Each kernel family that was measured, but the fastest, with its best time."""
    best: dict[KernelFamily, float] = {}
    for tile in found.ranking():
        best.setdefault(family_of(tile), found.measured[tile])
    return [Rejection(family.title, f"measured {us:.1f} us at best") for family, us in list(best.items())[1:]]


def _usable(cached: tuple[Tile, float] | None, shape: BlockShape, processor: Processor) -> tuple[Tile, float] | None:
    if cached is None or family_of(cached[0]).why_invalid(cached[0], shape, processor):
        return None
    return cached


def _plan(
    graph: BlockGraph,
    processor: Processor,
    tile: Tile,
    us: float,
    why: str,
    rejected: Sequence[Rejection] = (),
) -> Plan:
    plan = plan_block(graph, processor, tile)
    return replace(plan, why=why, rejected=(*plan.rejected, *rejected), measured_us=us)

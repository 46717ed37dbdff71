"""Networks timed on a GPU: they are compiled side by side, each in a process of its own, and timed one by one."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict

import torch

from fusion.bench.case_worker import CaseWorker, network_worker
from fusion.bench.network_case import NetworkCase
from fusion.bench.network_limit import Part, network_parts
from fusion.bench.network_row import Row, network_row
from fusion.planner.graph import BlockGraph
from fusion.planner.plan import PlanError, block_shape
from fusion.planner.processor import Processor
from fusion.probe import probe_processor
from fusion.progress import progress_bar
from fusion.tuner import tune_blocks
from models.convfirstnet import CONFIGS


def measured_processor() -> Processor:
    """The GPU at hand, with ceilings measured now; nothing is left on it."""
    processor = probe_processor()
    torch.cuda.empty_cache()
    return processor


def measure_networks(
    cases: Sequence[NetworkCase], args: argparse.Namespace, processor: Processor, keep: Callable[[Row], None]
) -> None:
    """Give `keep` a row for each case, as soon as there is one."""
    parts = {case: case_parts(case) for case in cases}
    tune = not args.no_tune
    if tune:
        tune_parts([part for case in cases for part in parts[case]], processor)
    workers = args.workers or max(1, min(len(cases), os.cpu_count() or 1))
    threads = max(1, (os.cpu_count() or 1) // workers)
    run_cases(
        cases,
        lambda case: network_worker(threads),
        lambda case: {"case": asdict(case), "tune": tune, "by_block": args.by_block and not case.is_rival},
        workers,
        args.timeout,
        lambda case, found: keep(network_row(case, processor, parts[case], found, found.get("failed"))),
    )


def run_cases(
    cases: Sequence[NetworkCase],
    start: Callable[[NetworkCase], CaseWorker],
    request: Callable[[NetworkCase], dict],
    at_once: int,
    seconds: float,
    keep: Callable[[NetworkCase, dict], None],
) -> None:
    """Prepare all cases, `at_once` at a time, then measure one by one and `keep` what was found.

    A worker that fails, or takes more than `seconds` for either, leaves `failed` in what was found of its case. All
    workers have ended on return, also by an exception such as KeyboardInterrupt.
    """
    workers = {case: start(case) for case in cases}
    try:
        found = _prepare(workers, request, at_once, seconds)
        with progress_bar("timing networks", len(cases)) as bar:
            for case, worker in workers.items():
                if found[case].get("ops") is not None:
                    reply = worker.ask({**request(case), "do": "measure"}, seconds)
                    failed = list(filter(None, dict.fromkeys(r.get("failed") for r in (found[case], reply))))
                    found[case] |= reply | ({"failed": "; ".join(failed)} if failed else {})
                worker.close()
                if "failed" in found[case]:
                    print(f"fusion.bench: {case} failed, its process said:\n{worker.log}", file=sys.stderr)
                keep(case, found[case])
                bar.advance()
    finally:
        for worker in workers.values():
            worker.close()


def _prepare(
    workers: dict[NetworkCase, CaseWorker], request: Callable[[NetworkCase], dict], at_once: int, seconds: float
) -> dict[NetworkCase, dict]:
    pool = ThreadPoolExecutor(at_once)
    try:
        futures = {
            pool.submit(worker.ask, {**request(case), "do": "prepare"}, seconds): case
            for case, worker in workers.items()
        }
        found = {}
        with progress_bar("compiling networks", len(workers)) as bar:
            for future in as_completed(futures):
                found[futures[future]] = future.result()
                bar.advance()
        return found
    except BaseException:
        for worker in workers.values():
            worker.close()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def case_parts(case: NetworkCase) -> list[Part]:
    """The parts of a ConvFirstNet; none for another network."""
    return [] if case.is_rival else network_parts(CONFIGS[case.model], case.batch, case.size, case.dtype)


def tune_parts(parts: Sequence[Part], processor: Processor) -> None:
    """Tune all blocks that have a kernel and are not in the cache, while nothing else runs on the GPU."""
    graphs: dict[object, BlockGraph] = {}
    for part in parts:
        try:
            graphs[block_shape(part.graph)] = part.graph
        except PlanError:
            continue
    try:
        tune_blocks(list(graphs.values()), processor)
    except RuntimeError as error:
        print(f"fusion.bench: not all blocks are tuned: {error}", file=sys.stderr)

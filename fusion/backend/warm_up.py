"""Kernels compiled side by side, before blocks are measured one after the other.

A kernel takes seconds to compile and a network has a dozen. Triton holds Python's lock for a third of that time, while
it reads the kernel; compiler passes and ptxas run without it, so threads share the work.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait

import torch

from fusion.backend.judge import is_known_slow
from fusion.backend.region import as_in_model, input_kind
from fusion.frontend.find import FoundBlock
from fusion.launch_record import InputKind
from fusion.planner.plan import Plan

WORKERS = min(8, os.cpu_count() or 1)


def warm_up(planned: Sequence[tuple[FoundBlock, Plan]], min_speedup: float) -> None:
    """Run one block of each plan on a GPU, in threads, unless it is known to be left to Inductor.

    What fails here is not raised: it fails again, with its reason, when the block is measured or runs.
    """
    distinct: dict[tuple, tuple[FoundBlock, Plan, InputKind]] = {}
    for found, plan in planned:
        kind = input_kind(found)
        if kind.device.type == "cuda":
            distinct.setdefault((kind.device, plan.shape, plan.tile), (found, plan, kind))
    if distinct:
        with ThreadPoolExecutor(min(WORKERS, len(distinct))) as pool:
            wait([pool.submit(_run, *each, min_speedup) for each in distinct.values()])


def _run(found: FoundBlock, plan: Plan, kind: InputKind, min_speedup: float) -> None:
    """In a thread, whose modes, current device and stream are its own."""
    if is_known_slow(plan, kind, min_speedup):
        return
    with torch.cuda.device(kind.device), as_in_model(kind):
        # Any values will do, and random ones take three times the memory while they are made.
        x = torch.empty(kind.shape, dtype=kind.dtype, device=kind.device, memory_format=torch.channels_last)
        found.block(x)
        torch.cuda.current_stream().synchronize()

"""Networks without a GPU: what can be checked on a CPU on two small images, nothing timed."""

import argparse
import copy
from collections.abc import Callable, Sequence

import torch

from fusion.bench.calibrate import image_batches
from fusion.bench.network_build import build_network, fuse_network
from fusion.bench.network_case import NetworkCase
from fusion.bench.network_check import compare_logits
from fusion.bench.network_limit import network_parts
from fusion.bench.network_row import Row, network_row
from fusion.planner.processor import Processor
from fusion.progress import progress_bar
from models.convfirstnet import CONFIGS

CHECKED_BATCH, CHECKED_PIXELS = 2, 64
CHECKED_BATCHES = 8
CALIBRATION_IMAGES = 8


def check_networks(
    cases: Sequence[NetworkCase], args: argparse.Namespace, processor: Processor, keep: Callable[[Row], None]
) -> None:
    """Give `keep` a row for each case; everything that needs a clock is None.

    A fused network on a CPU computes with the folded weights what its kernels would. It runs on images of at most
    `CHECKED_PIXELS`, once for a model.
    """
    checked: dict[tuple[str, int], dict] = {}
    with torch.no_grad(), progress_bar("checking networks", len(cases)) as bar:
        for case in cases:
            size = min(case.size, CHECKED_PIXELS)
            if (case.model, size) not in checked:
                checked[case.model, size] = check_network(NetworkCase(case.model, CHECKED_BATCH, size, case.dtype))
            found = checked[case.model, size]
            parts = network_parts(CONFIGS[case.model], case.batch, case.size, case.dtype)
            keep({**network_row(case, processor, parts, found), "checked": [CHECKED_BATCH, 3, size, size]})
            bar.advance()


def check_network(case: NetworkCase) -> dict:
    """What `fusion.bench.network_row` takes of a network that was compared with float64 on a CPU."""
    dtype = getattr(torch, case.dtype)
    model = build_network(case, "cpu", CALIBRATION_IMAGES)
    batches = list(image_batches(CHECKED_BATCHES * case.batch, case.batch, case.size))
    fused = fuse_network(model, batches[0].to(dtype), tune=False)
    eager, exact = copy.deepcopy(model).to(dtype), copy.deepcopy(model).double()
    logits = [
        torch.cat([engine(images.to(kind)) for images in batches])
        for engine, kind in ((fused, dtype), (eager, dtype), (model, torch.float32), (exact, torch.float64))
    ]
    return {**compare_logits(*logits), "left_eager": dict(fused.left_eager)}

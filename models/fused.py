"""Networks with their blocks replaced by inference twins."""

import copy
import logging

from torch import nn

from fusion.modules import Tuner
from fusion.planner.plan import PlanError, plan_block

from .convfirst import ConvFirst
from .mbconv import MBConv

logger = logging.getLogger(__name__)


def fuse_blocks(model: nn.Module, tuner: Tuner = plan_block) -> nn.Module:
    """A copy of `model` in eval mode in which every block that has a kernel runs as its inference twin.

    The other blocks stay eager: `left_eager` of the result maps their names to the reason, and one warning is logged
    that names them. Twins keep no link to the weights that they were folded from: fuse again after loading others.
    """
    model = copy.deepcopy(model).eval()
    left_eager: dict[str, str] = {}
    fused = 0
    for name, block in list(model.named_modules()):
        if not isinstance(block, ConvFirst | MBConv):
            continue
        try:
            model.set_submodule(name, block.fused(tuner))
            fused += 1
        except PlanError as error:
            left_eager[name] = str(error)
    model.left_eager = left_eager
    if left_eager:
        logger.warning(
            "%d blocks are fused, %d have no kernel and stay eager: %s (reasons in left_eager)",
            fused,
            len(left_eager),
            ", ".join(left_eager),
        )
    return model

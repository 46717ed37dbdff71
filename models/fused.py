"""Networks with their blocks replaced by inference twins."""

import copy

from torch import nn

import fusion
from fusion.fused_module import FusedModule


def fuse_blocks(model: nn.Module, **options) -> FusedModule:
    """`fusion.fuse` of a copy of `model` in eval mode: the model itself may be in training mode and stays so.

    `options` are those of `fusion.fuse`, `example_input` and `tune` for example.
    """
    return fusion.fuse(copy.deepcopy(model).eval(), **options)

"""A stage of fused blocks that runs a micro-batch of images at a time."""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from fusion.modules import FusedBlock, processor_of_device
from fusion.planner.micro_batch import micro_batch_images
from fusion.planner.processor import get_processor

MicroBatch = int | Literal["auto"] | None


class FusedStage(nn.Module):
    """Consecutive fused blocks (section 5.5.2): `[N, C, H, W] -> [N, K, H, W]`, channels_last.

    `micro_batch` is the number of images that run through all blocks before the next ones, so that activations and
    weights stay in the L2 cache; None stands for the whole batch, and with "auto" the planner chooses for every shape
    of the input. The micro-batches' outputs are joined at the cost of a copy. Blocks are planned for the size of a
    micro-batch.

    Raises ValueError for another `micro_batch` or no blocks, TypeError for blocks that are not fused, and (in
    `forward`) what the blocks raise.
    """

    def __init__(self, blocks: Iterable[FusedBlock], micro_batch: MicroBatch = None):
        super().__init__()
        blocks = list(blocks)
        if not blocks:
            raise ValueError("a stage needs at least one block")
        for block in blocks:
            if not isinstance(block, FusedBlock):
                raise TypeError(f"a stage takes fused blocks, got a {type(block).__name__}; call its fused() first")
        is_count = isinstance(micro_batch, int) and not isinstance(micro_batch, bool) and micro_batch > 0
        if not (micro_batch is None or micro_batch == "auto" or is_count):
            raise ValueError(f"micro_batch={micro_batch!r} is not supported, use a number of images, 'auto' or None")
        self.blocks = nn.ModuleList(blocks)
        self.micro_batch = micro_batch

    @torch.compiler.assume_constant_result
    def images(self, x: Tensor) -> int:
        """Images of a micro-batch for inputs like `x`."""
        batch = max(len(x), 1)
        if self.micro_batch is None:
            return batch
        if self.micro_batch != "auto":
            return min(self.micro_batch, batch)
        graphs, channels = [], x.shape[1]
        for block in self.blocks:
            graphs.append(block.graph(batch, *x.shape[2:], channels, x.dtype))
            channels = block.weights.out_channels
        return micro_batch_images(graphs, get_processor(processor_of_device(x.device)))

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4:
            raise ValueError(f"FusedStage: the input must be [N, C, H, W], got {list(x.shape)}")
        outs = []
        for part in x.split(self.images(x)):
            for block in self.blocks:
                part = block(part)
            outs.append(part)
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def extra_repr(self) -> str:
        return f"micro_batch={self.micro_batch!r}"

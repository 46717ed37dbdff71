"""Micro-batches of a stage (paper section 5.5.2): few images through all of its blocks, before the next few."""

from collections.abc import Sequence
from math import ceil

from fusion.planner.graph import BlockGraph, Tensor
from fusion.planner.processor import Processor

CACHE_SHARE = 0.5
"""Of the L2 cache that weights, inputs and outputs may fill: the blocks' own workspace needs room too."""
PIXELS_PER_PROCESSOR = 128
"""That keep its tensor cores busy: rows of a matrix product."""


def micro_batch_images(graphs: Sequence[BlockGraph], processor: Processor, whole_images: bool = False) -> int:
    """Images of a micro-batch for consecutive blocks that have no stride.

    They are as many as leave room in L2 for the weights of all blocks, and the input and output of any one. Where that
    is too few to fill the processors, micro-batches win nothing, and the whole batch is returned; it is divided into
    micro-batches of nearly equal size otherwise. With `whole_images` each keeps a processor to itself, as in the Hopper
    kernel of the MBConv block. Raises ValueError without blocks and for blocks of several batch sizes.
    """
    batches = {tensor["N"] for graph in graphs for tensor in (*graph.inputs, *graph.outputs)}
    if len(batches) != 1:
        raise ValueError(f"a stage needs blocks of one batch size, got {sorted(batches)}; plan all for the same input")
    (batch,) = batches
    weights = sum(graph.element_size * _size(graph.weights()) for graph in graphs)
    image = max(graph.element_size * _size((*graph.inputs, *graph.outputs)) // batch for graph in graphs)
    pixels = min(tensor["H"] * tensor["W"] for graph in graphs for tensor in graph.outputs)
    fitting = int((CACHE_SHARE * processor.global_memory_bytes - weights) // image)
    filling = processor.processors
    if not whole_images:
        filling = ceil(filling * PIXELS_PER_PROCESSOR / pixels)
    if fitting < min(filling, batch):
        return batch
    return ceil(batch / ceil(batch / fitting))


def _size(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.size for tensor in tensors)

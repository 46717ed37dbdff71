"""The waterline of a single block, which needs no PyTorch."""

from fusion.analysis.network_waterline import BlockGain, NetworkWaterline
from fusion.planner.graph import BlockGraph
from fusion.planner.lower import block_fused, layerwise
from fusion.planner.plan import PlanError, plan_block
from fusion.planner.processor import Processor, get_processor
from fusion.planner.waterline import analyze


def block_waterline(graph: BlockGraph, processor: str | Processor, name: str) -> NetworkWaterline:
    """A block as a network of its own: its layers as one kernel each, and fused as the planner would, or, if it has no
    kernel for the block on this processor, as one kernel.

    Raises ValueError for an unknown processor, or a block that cannot be one kernel.
    """
    processor = get_processor(processor)
    layers, fused = analyze(layerwise(graph), processor), analyze(block_fused(graph), processor)
    try:
        plan = plan_block(graph, processor)
    except PlanError as error:
        gain = BlockGain(name, graph.name, None, str(error), layers.min_latency, fused.min_latency, layers.min_latency)
        return NetworkWaterline(name, processor, graph.dtype, layers, layers, fused, (gain,))
    planned = analyze(plan.program, processor)
    latencies = (layers.min_latency, planned.min_latency, layers.min_latency)
    gain = BlockGain(name, graph.name, plan.kernel, "", *latencies, plan.predicted_us / 1e6)
    return NetworkWaterline(name, processor, graph.dtype, layers, planned, planned, (gain,))

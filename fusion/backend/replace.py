"""Blocks of a graph replaced by chains."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx

from fusion.backend.chain import Chain, run_chain
from fusion.backend.formats import dim_order, in_order, outputs_after, sees_formats
from fusion.frontend.find import FoundBlock


def chained(found: Sequence[FoundBlock]) -> list[list[FoundBlock]]:
    """Blocks in graph order, divided into runs of which each takes what the one before it gives, and alone does."""
    runs: list[list[FoundBlock]] = []
    for block in found:
        previous = runs[-1][-1] if runs else None
        follows = (
            previous is not None
            and block.input is previous.output
            and compute_dtype(block) == compute_dtype(previous)
            and all(user in block.nodes for user in previous.output.users)
        )
        if follows:
            runs[-1].append(block)
        else:
            runs.append([block])
    return runs


def replace_blocks(
    graph_module: fx.GraphModule,
    runs: Sequence[Sequence[FoundBlock]],
    chains: Sequence[Chain],
    anchors: Sequence[fx.Node],
) -> None:
    """Put a node for each chain, with its anchor, in the place of the blocks of its run, in `graph_module`.

    Memory formats that the model sees stay as they were: those of the graph's outputs, and all of them if it can tell
    (`fusion.backend.formats`).
    """
    graph = graph_module.graph
    is_seen = sees_formats(graph_module, runs)
    orders = {} if is_seen else {node: dim_order(_value(node)) for node in outputs_after(graph, runs)}
    done: dict[fx.Node, fx.Node] = {}
    for run, chain, anchor in zip(runs, chains, anchors, strict=True):
        first, last = run[0], run[-1]
        with graph.inserting_before(last.output):
            x = _prepared(graph, first, done.get(first.input, first.input), chain)
            y = graph.call_function(run_chain._opoverload, (x, anchor, chain.handle))
            y.meta = {
                name: last.output.meta[name]
                for name in ("nn_module_stack", "stack_trace", "example_value")
                if name in last.output.meta
            }
            if is_seen and (order := dim_order(_value(last.output))) is not None:
                y = in_order(graph, y, order)
        last.output.replace_all_uses_with(y)
        done[last.output] = y
        orders = {(y if node is last.output else node): order for node, order in orders.items()}
        for block in reversed(run):
            for node in reversed(block.nodes):
                graph.erase_node(node)
    _keep_orders(graph, orders)
    graph.lint()
    graph_module.recompile()


def drop_unused(graph_module: fx.GraphModule, constants: Mapping[fx.Node, Tensor]) -> list[int]:
    """Remove the constants' placeholders that nothing uses any more; the places of those that are left."""
    graph = graph_module.graph
    kept: list[int] = []
    for index, node in enumerate([node for node in graph.nodes if node.op == "placeholder"]):
        if node in constants and not node.users:
            graph.erase_node(node)
        else:
            kept.append(index)
    graph_module.recompile()
    return kept


def compute_dtype(block: FoundBlock) -> torch.dtype:
    """The dtype that a block gives, under autocast that of its convolutions."""
    return _value(block.output).dtype


def _prepared(graph: fx.Graph, block: FoundBlock, x: fx.Node, chain: Chain) -> fx.Node:
    """The input of a chain that begins with a block, `x`: in the chain's dtype, channels_last."""
    dtype = compute_dtype(block)
    if _value(block.input).dtype != dtype:
        x = graph.call_method("to", (x, dtype))
    if not chain.reads_any_format:
        # What made it writes it so: a copy here is one with its last kernel.
        x = graph.call_method("contiguous", (x,), {"memory_format": torch.channels_last})
    return x


def _value(node: fx.Node) -> Tensor:
    """Dynamo's fake tensor for a node."""
    return node.meta["example_value"]


def _keep_orders(graph: fx.Graph, orders: Mapping[fx.Node, Sequence[int]]) -> None:
    """Give outputs with their dimensions in these orders in memory."""
    (output,) = graph.find_nodes(op="output")
    for node, order in orders.items():
        with graph.inserting_before(output):
            kept = in_order(graph, node, order)
        output.replace_input_with(node, kept)

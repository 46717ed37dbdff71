"""Blocks of a graph replaced by chains."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx

from fusion.backend.chain import Chain, run_chain
from fusion.frontend.find import FoundBlock

VIEWS = ("view", "as_strided", "stride", "is_contiguous")
"""Methods whose result, or success, depends on the memory format."""


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

    Memory formats that the model sees stay as they were: those of the graph's outputs, and all of them if the graph
    looks at any.
    """
    graph = graph_module.graph
    inside = {node for run in runs for block in run for node in block.nodes}
    sees_format = any(node.op == "call_method" and node.target in VIEWS for node in graph.nodes if node not in inside)
    formats = {node: _memory_format(node) for node in _outputs(graph)}
    done: dict[fx.Node, fx.Node] = {}
    for run, chain, anchor in zip(runs, chains, anchors, strict=True):
        first, last = run[0], run[-1]
        with graph.inserting_before(last.output):
            x = _prepared(graph, done.get(first.input, first.input), compute_dtype(first), chain)
            y = graph.call_function(run_chain._opoverload, (x, anchor, chain.handle))
            y.meta = {
                name: last.output.meta[name]
                for name in ("nn_module_stack", "stack_trace", "example_value")
                if name in last.output.meta
            }
            if sees_format and _memory_format(last.output) is not None:
                y = graph.call_method("contiguous", (y,), {"memory_format": _memory_format(last.output)})
        last.output.replace_all_uses_with(y)
        done[last.output] = y
        formats = {(y if node is last.output else node): kept for node, kept in formats.items()}
        for block in reversed(run):
            for node in reversed(block.nodes):
                graph.erase_node(node)
    if not sees_format:
        _keep_formats(graph, formats)
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
    return block.output.meta["example_value"].dtype


def _prepared(graph: fx.Graph, x: fx.Node, dtype: torch.dtype, chain: Chain) -> fx.Node:
    """The input of a chain: in its dtype, channels_last."""
    if x.meta["example_value"].dtype != dtype:
        x = graph.call_method("to", (x, dtype))
    if not chain.reads_any_format:
        # What made it writes it so: a copy here is one with its last kernel.
        x = graph.call_method("contiguous", (x,), {"memory_format": torch.channels_last})
    return x


def _outputs(graph: fx.Graph) -> list[fx.Node]:
    (output,) = graph.find_nodes(op="output")
    return list(output.all_input_nodes)


def _memory_format(node: fx.Node) -> torch.memory_format | None:
    value = node.meta.get("example_value")
    if not isinstance(value, Tensor) or value.dim() != 4:
        return None
    for memory_format in (torch.contiguous_format, torch.channels_last):
        if value.is_contiguous(memory_format=memory_format):
            return memory_format
    return None


def _keep_formats(graph: fx.Graph, formats: Mapping[fx.Node, torch.memory_format | None]) -> None:
    (output,) = graph.find_nodes(op="output")
    for node, memory_format in formats.items():
        if memory_format is None or node.op == "placeholder":
            continue
        with graph.inserting_before(output):
            kept = graph.call_method("contiguous", (node,), {"memory_format": memory_format})
        output.replace_input_with(node, kept)

"""A Dynamo graph a second time: one to change, and one to fall back on."""

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx, nn

GRAPH_ATTRIBUTES = ("_param_name_to_source", "_source_to_user_stacks")
NODE_ATTRIBUTES = ("_dynamo_source",)
"""What Dynamo tells Inductor beside the metadata."""


def copy_graph(graph_module: fx.GraphModule) -> fx.GraphModule:
    """The same graph with nodes of its own; parameters, buffers and submodules are shared."""
    copied = fx.GraphModule(graph_module, copy.deepcopy(graph_module.graph))
    copied.meta.update(graph_module.meta)
    for name in GRAPH_ATTRIBUTES:
        if hasattr(graph_module, name):
            setattr(copied, name, getattr(graph_module, name))
    for ours, theirs in zip(copied.graph.nodes, graph_module.graph.nodes, strict=True):
        for name in NODE_ATTRIBUTES:
            if hasattr(theirs, name):
                setattr(ours, name, getattr(theirs, name))
    return copied


def placeholders_of(graph_module: fx.GraphModule) -> list[fx.Node]:
    """The inputs of a graph, in order."""
    return [node for node in graph_module.graph.nodes if node.op == "placeholder"]


def constants_of(graph_module: fx.GraphModule, inputs: Sequence[object]) -> Mapping[fx.Node, Tensor]:
    """The `model_tensors` that have values (fake tensors have none), and are of no class that computes in ways of its
    own."""
    return {node: value for node, value in model_tensors(graph_module, inputs).items() if _has_values(value)}


def model_tensors(graph_module: fx.GraphModule, inputs: Sequence[object]) -> Mapping[fx.Node, Tensor]:
    """Nodes that stand for the model's parameters and buffers, and those tensors.

    `inputs` are the graph's, in order: Dynamo passes parameters with them.
    """
    tensors: dict[fx.Node, Tensor] = {}
    for node, value in zip(placeholders_of(graph_module), inputs, strict=True):
        is_static = node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type")
        if isinstance(value, nn.Parameter) or (isinstance(value, Tensor) and is_static):
            tensors[node] = value
    for node in graph_module.graph.nodes:
        if node.op == "get_attr":
            owner, _, name = node.target.rpartition(".")
            value = getattr(graph_module.get_submodule(owner), name, None)
            if isinstance(value, Tensor):
                tensors[node] = value
    return tensors


def _has_values(value: Tensor) -> bool:
    return type(value) in (Tensor, nn.Parameter) and value.device.type != "meta" and value.layout == torch.strided

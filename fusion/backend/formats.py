"""Memory formats that a model sees: fused blocks write channels_last, whatever the model's own layers write.

That shows in the strides of what a graph gives. Within a graph it mostly does not, for layers take any strides. It does
where strides are read, and where a view becomes a copy, or a copy a view, and one of both is changed in place.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from fusion.backend.region import concrete
from fusion.frontend.find import FoundBlock
from fusion.frontend.layer_graph import LayerGraph
from fusion.frontend.memory import KNOWN_PACKAGES

READERS = {
    *("as_strided", "as_strided_", "as_strided_scatter", "data_ptr", "is_contiguous", "is_non_overlapping_and_dense"),
    *("resize_", "resize_as_", "set_", "storage", "storage_offset", "stride", "untyped_storage"),
    *("view", "view_as", "_unsafe_view", "view_as_complex", "view_as_real"),
}
"""Functions and methods whose result, or success, depends on strides."""

MAYBE_COPIES = {"contiguous", "flatten", "ravel", "reshape", "reshape_as", "to"}
"""Those whose result is a view or a copy, by strides."""

OPERATORS = {"aten", "prims"}
"""Namespaces of operators that do not depend on strides, apart from the above. Others may."""

NHWC = (0, 2, 3, 1)


def sees_formats(graph_module: fx.GraphModule, runs: Sequence[Sequence[FoundBlock]]) -> bool:
    """Whether fused blocks have to give what they are put in the place of in its memory format.

    If not, it is enough that the graph's outputs have theirs.
    """
    inside = {node for run in runs for block in run for node in block.nodes}
    reached = _reached([run[-1].output for run in runs])
    outside = [node for node in graph_module.graph.nodes if node in reached and node not in inside]
    outputs = outputs_after(graph_module.graph, runs)
    if any(dim_order(node.meta["example_value"]) is None for node in outputs):
        return True
    if any(_reads_strides(node, graph_module) for node in outside if node.op != "output"):
        return True
    given = [storage for node in _outputs(graph_module.graph) for storage in _storages(node)]
    shared = {storage for storage in given if given.count(storage) > 1}
    if any(shared & _storages(node) for node in outputs):
        return True
    memory = LayerGraph(graph_module, {}).memory
    changed = {each for node in graph_module.graph.nodes for of in memory.changes(node) for each in _storages(of)}
    for node in outside:
        if node.op != "output" and _name(node) in MAYBE_COPIES:
            before, after = {each for x in node.all_input_nodes for each in _storages(x)}, _storages(node)
            is_given_copy = len(outputs) > 1 and not after <= before and not after.isdisjoint(given)
            if is_given_copy or not changed.isdisjoint(before | after):
                return True
    return False


def outputs_after(graph: fx.Graph, runs: Sequence[Sequence[FoundBlock]]) -> list[fx.Node]:
    """The tensors among a graph's outputs that fused blocks have a part in, if they are in memory of their own."""
    reached = _reached([run[-1].output for run in runs])
    taken = {each for node in graph.nodes if node.op in ("placeholder", "get_attr") for each in _storages(node)}
    return [
        node
        for node in _outputs(graph)
        if node in reached and isinstance(node.meta.get("example_value"), Tensor) and taken.isdisjoint(_storages(node))
    ]


def dim_order(x: Tensor) -> tuple[int, ...] | None:
    """The dimensions of a tensor from the outermost in memory to the innermost; None if there are gaps in memory."""
    if x.is_contiguous():
        return tuple(range(x.dim()))
    if x.dim() == len(NHWC) and x.is_contiguous(memory_format=torch.channels_last):
        return NHWC
    strides = list(map(concrete, x.stride()))
    if None in strides:
        return None
    order = tuple(sorted(range(x.dim()), key=lambda dim: -strides[dim]))
    return order if x.permute(order).is_contiguous() else None


def in_order(graph: fx.Graph, node: fx.Node, order: Sequence[int]) -> fx.Node:
    """A node's value with its dimensions in this order in memory: as it is, if they are."""
    order = tuple(order)
    if order == NHWC:
        return graph.call_method("contiguous", (node,), {"memory_format": torch.channels_last})
    if order == tuple(range(len(order))):
        return graph.call_method("contiguous", (node,), {"memory_format": torch.contiguous_format})
    back = tuple(order.index(dim) for dim in range(len(order)))
    permuted = graph.call_method("permute", (node, *order))
    return graph.call_method("permute", (graph.call_method("contiguous", (permuted,)), *back))


def _reached(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """All that is computed from nodes, themselves among them."""
    found = set(nodes)
    left = list(found)
    while left:
        new = [user for user in left.pop().users if user not in found]
        found.update(new)
        left += new
    return found


def _outputs(graph: fx.Graph) -> list[fx.Node]:
    (output,) = graph.find_nodes(op="output")
    return list(output.all_input_nodes)


def _storages(node: fx.Node) -> set[int]:
    """What memory a node's tensors are in, as Dynamo's fake tensors tell it."""
    leaves = tree_leaves(node.meta.get("example_value"))
    return {each.untyped_storage()._cdata for each in leaves if isinstance(each, Tensor)}


def _reads_strides(node: fx.Node, graph_module: fx.GraphModule) -> bool:
    if _name(node) in READERS:
        return not all(map(_is_single_pixel, node.all_input_nodes))
    if node.op == "call_method":
        return False
    if node.op == "call_module":
        return not type(graph_module.get_submodule(node.target)).__module__.startswith("torch.nn.")
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return True  # of a user's kernel, say, which is given strides as numbers
    if isinstance(node.target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return _operator_name(node.target)[0] not in OPERATORS
    return (getattr(node.target, "__module__", None) or "torch").split(".")[0] not in KNOWN_PACKAGES


def _name(node: fx.Node) -> str:
    if isinstance(node.target, str):
        return node.target if node.op == "call_method" else ""
    if isinstance(node.target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return _operator_name(node.target)[1]
    return getattr(node.target, "__name__", "")


def _operator_name(operator: torch._ops.OpOverload | torch._ops.OpOverloadPacket) -> tuple[str, str]:
    """Its namespace, and its name there."""
    packet = getattr(operator, "overloadpacket", operator)
    namespace, _, name = packet._qualified_op_name.partition("::")
    return namespace, name


def _is_single_pixel(node: fx.Node) -> bool:
    """Whether a node's value is `[N, C, 1, 1]`, whose strides tell nothing, or no tensor."""
    value = node.meta.get("example_value")
    if not isinstance(value, Tensor):
        return value is not None
    return value.dim() == 4 and all(type(size) is int and size == 1 for size in value.shape[2:])

"""Which nodes of a graph may share memory, and which change it in place."""

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from inspect import signature

import torch
from torch import fx, nn

from fusion.frontend.layers import COMPUTED, Activation, Add, Alias, BatchNorm, Layer, Multiply, Query, Reshape

IN_PLACE_OPERATORS = {
    operator.iadd,
    operator.isub,
    operator.imul,
    operator.itruediv,
    operator.ifloordiv,
    operator.imod,
    operator.ipow,
    operator.imatmul,
    operator.iand,
    operator.ior,
    operator.ixor,
    operator.setitem,
    operator.delitem,
}
KNOWN_PACKAGES = {"torch", "_operator", "builtins", "math"}
"""Whose functions say by their name or arguments that they work in place. Others may do so unsaid."""


class Memory:
    """Sharing and changes of memory among nodes: in case of doubt they share, and change it.

    `layers` are those of the nodes, as far as they are known.
    """

    def __init__(self, root: nn.Module, nodes: Sequence[fx.Node], layers: Mapping[fx.Node, Layer | None]):
        self._layers = layers
        self._changes = {node: self._changes_of(node, root) for node in nodes}
        self._sources = {node: self._sources_of(node) for node in nodes}
        self._views: dict[fx.Node, list[fx.Node]] = {node: [] for node in nodes}
        for node, sources in self._sources.items():
            for source in sources:
                self._views[source].append(node)

    def changes(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """The arguments of a node that it changes in place."""
        return self._changes[node]

    def sharing(self, node: fx.Node, without: fx.Node | None = None) -> set[fx.Node]:
        """Nodes that may share memory with a node, itself among them; not by way of the node `without`."""
        found, left = {node}, [node]
        while left:
            current = left.pop()
            for other in (*self._sources[current], *self._views[current]):
                if other not in found and other is not without:
                    found.add(other)
                    left.append(other)
        return found

    @cached_property
    def changed(self) -> frozenset[fx.Node]:
        """Nodes whose values are changed in place somewhere in the graph."""
        return frozenset().union(*(self.sharing(node) for nodes in self._changes.values() for node in nodes))

    def _sources_of(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """The arguments whose memory the value of a node may be in."""
        layer = self._layers[node]
        if node.op == "output" or isinstance(layer, Query):
            return ()
        if isinstance(layer, Alias | Reshape):
            return (layer.x,)
        if isinstance(layer, COMPUTED):
            return () if isinstance(layer, BatchNorm) else self._changes[node]
        if isinstance(node.target, torch._ops.OpOverload):
            schema = node.target._schema
            if not any(each.alias_info for each in schema.returns):
                return ()
            return tuple(_arguments(node, lambda argument: argument.alias_info is not None))
        return tuple(filter(_may_be_tensor, node.all_input_nodes))

    def _changes_of(self, node: fx.Node, root: nn.Module) -> tuple[fx.Node, ...]:
        layer = self._layers[node]
        if node.op not in ("call_function", "call_method", "call_module") or isinstance(layer, Alias | Reshape | Query):
            return ()
        if isinstance(layer, Activation | Multiply | Add):
            return (layer.x,) if layer.in_place else ()
        if isinstance(layer, BatchNorm):
            statistics = (layer.mean, layer.variance) if layer.training else ()
            return tuple(each for each in statistics if isinstance(each, fx.Node))
        if isinstance(layer, COMPUTED):
            return ()
        if isinstance(node.target, torch._ops.OpOverload):
            return tuple(_arguments(node, lambda argument: argument.is_write))
        if _is_known_pure(node, root):
            return ()
        return tuple(filter(_may_be_tensor, node.all_input_nodes))


def _is_known_pure(node: fx.Node, root: nn.Module) -> bool:
    """Whether a node that is no operator overload is known to change nothing in place."""
    if node.op == "call_method":
        is_dunder = node.target.startswith("__") and node.target.endswith("__")
        is_in_place_dunder = is_dunder and (node.target.startswith("__i") or node.target == "__setitem__")
        return not is_in_place_dunder and (is_dunder or not node.target.endswith("_"))
    if node.kwargs.get("out") is not None:
        return False
    if node.op == "call_module":
        try:
            module = root.get_submodule(node.target)
        except AttributeError:
            return False
        is_known = type(module).__module__.split(".")[0] == "torch" and not isinstance(module, fx.GraphModule)
        return is_known and not getattr(module, "inplace", False)
    name, module = getattr(node.target, "__name__", ""), getattr(node.target, "__module__", None) or "torch"
    if isinstance(node.target, torch._ops.HigherOrderOperator) or module.split(".")[0] not in KNOWN_PACKAGES:
        return False
    if node.target in IN_PLACE_OPERATORS or name.endswith("_"):
        return False
    return not _is_told_in_place(node)


def _is_told_in_place(node: fx.Node) -> bool:
    try:
        arguments = signature(node.target).bind(*node.args, **node.kwargs).arguments
    except (TypeError, ValueError):
        arguments = node.kwargs  # of a builtin, whose signature is not known
    return bool(arguments.get("inplace"))


def _arguments(node: fx.Node, is_wanted) -> Iterator[fx.Node]:
    """Nodes in the arguments of an operator overload whose declarations are wanted."""
    declared = node.target._schema.arguments
    given = {each.name: value for each, value in zip(declared, node.args, strict=False)} | dict(node.kwargs)
    for argument in declared:
        if is_wanted(argument):
            yield from _nodes_in(given.get(argument.name))


def _nodes_in(value: object) -> Iterable[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(value, found.append)
    return found


def _may_be_tensor(node: fx.Node) -> bool:
    value = node.meta.get("example_value", node.meta.get("val"))
    return not isinstance(value, int | float | torch.SymInt | torch.SymFloat | torch.SymBool)

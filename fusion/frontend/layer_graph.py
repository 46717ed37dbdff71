"""A graph as layers: what each node computes, who uses it, and which constants it takes."""

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, fx

from fusion.frontend.layers import Alias, Conv, Layer, Operand, Pad, Query, Reshape
from fusion.frontend.memory import Memory
from fusion.frontend.readers import read, weight_shape

BLUR_FILTER = torch.tensor([1.0, 2.0, 1.0]).outer(torch.tensor([1.0, 2.0, 1.0])) / 16


class Unsupported(ValueError):
    """Why something that looks like a block cannot be fused."""


@dataclass(frozen=True)
class Use:
    """A node that takes a value, and the aliases of the value that lead to it."""

    node: fx.Node
    aliases: tuple[fx.Node, ...]


class LayerGraph:
    """The layers of a graph module; `constants` as in `fusion.frontend.find.find_blocks`."""

    def __init__(self, graph_module: fx.GraphModule, constants: Mapping[fx.Node, Tensor]):
        self.root_module = graph_module
        self.nodes = tuple(graph_module.graph.nodes)
        self.position = {node: index for index, node in enumerate(self.nodes)}
        self.constants = constants
        self._layers: dict[fx.Node, Layer | None] = {}
        for node in self.nodes:
            self._layers[node] = self._resolved(node, read(node, graph_module))

    def _resolved(self, node: fx.Node, layer: Layer | None) -> Layer | None:
        """Items of a shape are sizes, those of anything else are tensors; questions about sizes are such again."""
        if not isinstance(layer, Query) or layer.is_shape or node.op != "call_function":
            return layer
        of = self._layers[layer.x]
        if node.target is operator.getitem:
            is_size = isinstance(of, Query) and of.is_shape
            return Query(of.x, layer.dim) if is_size else None
        if node.target is torch._assert:
            return layer
        is_comparison = getattr(node.target, "__module__", None) == "_operator"
        return layer if isinstance(of, Query) or not is_comparison else None

    def layer(self, node: object) -> Layer | None:
        """What a node computes; None if it is no layer that blocks are made of."""
        return self._layers.get(node)

    @cached_property
    def memory(self) -> Memory:
        """Which nodes share memory, and which change it."""
        return Memory(self.root_module, self.nodes, self._layers)

    def origin(self, node: fx.Node) -> fx.Node:
        """Where a value comes from, seen through aliases."""
        return self.aliases(node)[-1]

    def aliases(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """A node, what it is an alias of, and so on to the origin."""
        chain = [node]
        while isinstance(layer := self.layer(chain[-1]), Alias):
            chain.append(layer.x)
        return tuple(chain)

    def uses(self, node: fx.Node) -> list[Use]:
        """Who takes a value, seen through aliases, in graph order. Questions about its shape are no uses."""
        found = []
        for user in node.users:
            layer = self.layer(user)
            if isinstance(layer, Alias):
                found += [Use(use.node, (user, *use.aliases)) for use in self.uses(user)]
            elif not isinstance(layer, Query):
                found.append(Use(user, ()))
        return sorted(found, key=lambda use: self.position[use.node])

    def shape(self, node: fx.Node) -> tuple | None:
        """The sizes of a node's tensor, symbolic ones among them; None without metadata."""
        value = node.meta.get("example_value", node.meta.get("val"))
        return tuple(value.shape) if isinstance(value, Tensor) else None

    def weight_shape(self, weight: Operand) -> tuple[int, ...] | None:
        """The sizes of a constant, or of a weight that is none; None if they are not known."""
        try:
            return tuple(self.constant(weight, "the weight").shape)
        except Unsupported:
            return weight_shape(weight)

    def constant(self, operand: Operand, what: str) -> Tensor:
        """The values of a parameter or buffer, or of a view of one; `what` is what messages call it.

        Raises Unsupported if it is none, has no values, or is changed by the graph.
        """
        if isinstance(operand, fx.Node):
            if operand in self.memory.changed:
                raise Unsupported(f"{what} may be changed in place by the graph")
            operand = self._constant_of(operand, what)
        if not isinstance(operand, Tensor):
            raise Unsupported(f"{what} is missing")
        if operand.is_meta or isinstance(operand, torch._subclasses.FakeTensor):
            raise Unsupported(f"{what} has no values (meta device)")
        if not operand.is_floating_point() or operand.layout != torch.strided:
            raise Unsupported(f"{what} is of {operand.dtype}, {operand.layout}, use a dense tensor of a floating dtype")
        return operand

    def _constant_of(self, node: fx.Node, what: str) -> Tensor:
        if node in self.constants:
            return self.constants[node]
        if node.op == "placeholder":
            raise Unsupported(f"{what} is an input of the graph and no parameter of the model")
        layer = self.layer(node)
        if not isinstance(layer, Alias | Reshape) or node.op == "call_module":
            raise Unsupported(f"{what} is computed by the graph ({node.name}) and no parameter of the model")
        x = self._constant_of(layer.x, what)
        if node.all_input_nodes != [layer.x]:
            raise Unsupported(f"{what} is computed by the graph ({node.name}) from sizes of its input")
        if node.op == "call_method":
            return getattr(x, node.target)(*node.args[1:], **node.kwargs)
        return node.target(x, *node.args[1:], **node.kwargs)

    def derivation(self, operand: Operand) -> tuple[fx.Node, ...]:
        """The nodes that make a constant of a parameter, if it is a view of one."""
        nodes = []
        while isinstance(operand, fx.Node) and isinstance(layer := self.layer(operand), Alias | Reshape):
            nodes.append(operand)
            operand = layer.x
        return tuple(nodes)

    def is_pointwise(self, node: fx.Node) -> bool:
        """Whether a node is a dense 1x1 convolution."""
        conv = self.layer(node)
        if not isinstance(conv, Conv) or conv.groups != 1:
            return False
        shape = self.weight_shape(conv.weight)
        return shape is not None and len(shape) == 4 and shape[2:] == (1, 1)

    def is_blur(self, node: fx.Node) -> bool:
        """Whether a node is the convolution of a blur-pool: by [1, 2, 1] / 4 in each direction, stride 2, after one
        pixel of reflection padding."""
        conv = self.layer(node)
        if not isinstance(conv, Conv):
            return False
        pad = self.layer(self.origin(conv.x))
        if not isinstance(pad, Pad) or (pad.sizes, pad.mode) != ((1, 1, 1, 1), "reflect"):
            return False
        if conv.bias is not None or (conv.stride, conv.padding, conv.dilation) != ((2, 2), (0, 0), (1, 1)):
            return False
        try:
            weight = self.constant(conv.weight, "the filter")
        except Unsupported:
            return False
        if tuple(weight.shape) != (conv.groups, 1, 3, 3):
            return False
        return bool((weight.detach() == BLUR_FILTER.to(weight)).all())

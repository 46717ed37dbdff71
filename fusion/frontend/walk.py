"""A way through the layers of a graph along what may be a block."""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fusion.frontend.layer_graph import LayerGraph, Unsupported, Use
from fusion.frontend.layers import Add, BatchNorm, Concat, Conv, Layer, Linear, Multiply, Operand, Query
from fusion.weights import LinearMap, Statistics


@dataclass(frozen=True)
class Affine:
    """A convolution or linear layer in a graph and what is folded into it."""

    node: fx.Node
    layer: Conv | Linear
    norm: BatchNorm | None
    scale: Operand | float
    """That the result is multiplied with, None for none."""
    value: fx.Node
    """Node of the result, with batch norm and scale."""
    part: str
    """What messages call the layer."""

    def scaled(self, value: fx.Node, scale: Operand | float) -> "Affine":
        """With a product after it."""
        return Affine(self.node, self.layer, self.norm, scale, value, self.part)


class Walk:
    """Collects the nodes of what may be a block, and what stands against fusing it.

    Methods that go on to another layer return None where there is none of its kind: then it is no such block. What is
    not supported about a layer that is there is noted as a problem, and the walk goes on.
    """

    def __init__(self, graph: LayerGraph):
        self.graph = graph
        self.parts: dict[fx.Node, str] = {}
        """Nodes of the block, and what messages call the layer that each belongs to."""
        self.affine_nodes: list[fx.Node] = []
        self.problems: list[str] = []

    def take(self, part: str, *nodes: fx.Node) -> None:
        """Count nodes among those of the block."""
        for node in nodes:
            self.parts.setdefault(node, part)

    def follow(self, value: fx.Node, part: str, *kinds: type[Layer], alone: bool = False) -> fx.Node | None:
        """The first user of a value that is one of these layers; if `alone`, only if there is no other user."""
        uses = self.graph.uses(value)
        if alone and len(uses) != 1:
            return None
        uses = [use for use in uses if isinstance(self.graph.layer(use.node), kinds)]
        use = next((use for use in uses if self._is_input(value, use)), None)
        return None if use is None else self.take_use(value, part, use)

    def _is_input(self, value: fx.Node, use: Use) -> bool:
        """Whether a layer takes a value as its input, and not as a weight."""
        layer = self.graph.layer(use.node)
        return isinstance(layer, Add | Multiply | Concat) or layer.x is (value, *use.aliases)[-1]

    def take_use(self, value: fx.Node, part: str, use: Use) -> fx.Node:
        """Take a user of a value, and the aliases on the way to it."""
        self.take(self.parts.get(value, "input"), *use.aliases)
        self.take(part, use.node)
        return use.node

    def affine(self, node: fx.Node, part: str, alone: bool = False) -> Affine:
        """Take a convolution or linear layer and a batch norm after it; if `alone`, only one that is the sole user."""
        layer = self.graph.layer(node)
        self.take(part, node)
        self.affine_nodes.append(node)
        for operand in (layer.weight, layer.bias):
            self.take(part, *self.graph.derivation(operand))
        norm_node = self.follow(node, part, BatchNorm, alone=alone)
        norm = self.graph.layer(norm_node)
        if norm is not None and (norm.training or norm.mean is None or norm.variance is None):
            self.problems.append(
                f"the batch norm of its {part} normalises by the batch's own statistics; call eval() on the model"
            )
        return Affine(node, layer, norm, None, norm_node or node, part)

    def pointwise(self, value: fx.Node, part: str, alone: bool = False) -> Affine | None:
        """Take a dense 1x1 convolution of a value, with its batch norm."""
        uses = [use for use in self.graph.uses(value) if self.graph.is_pointwise(use.node)]
        use = next((use for use in uses if self._is_input(value, use)), None)
        return None if use is None else self.pointwise_at(self.take_use(value, part, use), part, alone)

    def pointwise_at(self, node: fx.Node, part: str, alone: bool = False) -> Affine:
        """Take this 1x1 convolution, with its batch norm."""
        affine = self.affine(node, part, alone)
        conv = affine.layer
        if (conv.stride, conv.padding) != ((1, 1), (0, 0)):
            self.problems.append(
                f"its {part}, a 1x1 convolution, has stride {_pair(conv.stride)} and padding {_pair(conv.padding)}; "
                "supported are stride 1 and no padding"
            )
        return affine

    def activation(self, node: fx.Node, part: str, supported: Collection[str]) -> str:
        """The name of an activation that kernels have."""
        name = self.graph.layer(node).name
        if name.startswith("gelu_"):
            self.problems.append(
                f"the activation of its {part} is GELU by {name.removeprefix('gelu_')}; supported is the exact one, "
                "nn.GELU(approximate='none')"
            )
        elif name not in supported:
            self.problems.append(
                f"the activation {name!r} of its {part} is not supported, use one of {', '.join(supported)}"
            )
        return name

    def scale(self, affine: Affine) -> Affine:
        """Take a product with a constant for each channel of a result (layer scale), if that is its sole user."""
        uses = self.graph.uses(affine.value)
        if len(uses) != 1:
            return affine
        layer = self.graph.layer(uses[0].node)
        if not isinstance(layer, Multiply):
            return affine
        path = (affine.value, *uses[0].aliases)
        scale = layer.other if layer.x in path else layer.x
        if scale in path or not self._is_scale(scale, affine):
            return affine
        self.take_use(affine.value, affine.part, uses[0])
        self.take(affine.part, *self.graph.derivation(scale))
        return affine.scaled(uses[0].node, scale)

    def _is_scale(self, scale: Operand | float, affine: Affine) -> bool:
        if isinstance(scale, int | float):
            return True
        try:
            shape = self.graph.constant(scale, "scale").shape
        except Unsupported:
            return False
        channels = self.graph.weight_shape(affine.layer.weight)[0]
        return shape.numel() == 1 or (shape[-3:] == (channels, 1, 1) and shape.numel() == channels)

    def fold(self, affine: Affine) -> LinearMap:
        """The layer with its batch norm and scale, on the CPU. Raises Unsupported if they are no constants."""
        part = affine.part

        def constant(operand: Operand, what: str) -> Tensor | None:
            if operand is None:
                return None
            return self.graph.constant(operand, f"the {what} of its {part}").detach().cpu()

        weight = constant(affine.layer.weight, "weight")
        bias = constant(affine.layer.bias, "bias")
        statistics, scale = None, affine.scale
        if affine.norm is not None:
            norm = affine.norm
            named = {"mean": norm.mean, "variance": norm.variance, "gamma": norm.gamma, "beta": norm.beta}
            tensors = {name: constant(operand, f"batch norm's {name}") for name, operand in named.items()}
            statistics = Statistics(**tensors, eps=norm.eps)
        if isinstance(scale, int | float):
            scale = torch.tensor(scale, dtype=torch.float64)
        return LinearMap.fold(weight, bias, statistics, constant(scale, "scale"))

    def take_questions(self, output: fx.Node) -> None:
        """Take what asks for shapes for the block alone, and note which inner values have users outside."""
        near = [each for node in self.parts for each in node.all_input_nodes]
        near += [each for node in self.parts if node is not output for each in node.users]
        pending = [node for node in near if node not in self.parts]
        while pending:
            node = pending.pop()
            if isinstance(self.graph.layer(node), Query) and (closed := self._closed_question(node)):
                pending += [each for one in closed for each in one.all_input_nodes if each not in self.parts]
                self.take("sizes", *closed)
        for node in sorted(self.parts, key=self.graph.position.__getitem__):
            outside = [user for user in node.users if user not in self.parts]
            if node is output or not outside:
                continue
            is_output = outside[0].op == "output"
            by = "is an output of the graph" if is_output else f"is used outside of it, by {outside[0].name!r}"
            self.problems.append(f"the result of its {self.parts[node]} ({node.name}) {by}")

    def _closed_question(self, node: fx.Node) -> set[fx.Node] | None:
        """A question and what else depends on it, if that is questions too and the block's nodes."""
        closed, left = {node}, [node]
        while left:
            for user in left.pop().users:
                if user in self.parts or user in closed:
                    continue
                if not isinstance(self.graph.layer(user), Query):
                    return None
                closed.add(user)
                left.append(user)
        return closed


def _pair(values: tuple[int, int]) -> str:
    return f"{values[0]}x{values[1]}" if values[0] != values[1] else str(values[0])

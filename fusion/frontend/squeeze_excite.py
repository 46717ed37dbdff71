"""The gate of squeeze-and-excitation in a graph, in its many spellings.

Pooled channels are `[N, C]` or `[N, C, 1, 1]`: linear layers take the former, 1x1 convolutions the latter, and views
lead from one to the other.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from fusion.frontend.layers import (
    Activation,
    Alias,
    BatchNorm,
    Conv,
    Expand,
    Flatten,
    GlobalPool,
    Index,
    Layer,
    Linear,
    Multiply,
    Query,
    Reshape,
    Squeeze,
    Unsqueeze,
    View,
)
from fusion.frontend.walk import Affine, Walk

FULL = -1
"""Instead of trailing ones: expanded to the size of the map."""


@dataclass(frozen=True)
class Gate:
    """What is between a map and its product with the gate."""

    squeeze: Affine
    squeeze_activation: fx.Node
    excite: Affine
    gate_activation: fx.Node
    product: fx.Node


@dataclass(frozen=True)
class Vector:
    """A node of pooled channels `[N, channels]` with `trailing` dimensions of size 1, or `FULL`."""

    node: fx.Node
    channels: int
    trailing: int


def take_gate(walk: Walk, value: fx.Node, channels: int) -> Gate | None:
    """Take the gate of a map `[N, channels, H, W]`, whatever its activations are; None if there is none."""
    pool = walk.follow(value, "squeeze-and-excitation", GlobalPool)
    if pool is None:
        return None
    vectors = VectorWalk(walk, value, channels)
    pooled = Vector(pool, channels, 2 if walk.graph.layer(pool).keepdim else 0)
    squeezed = vectors.affine(pooled, "squeeze layer")
    if squeezed is None:
        return None
    squeeze, vector = squeezed
    activated = vectors.follow(vector, "squeeze layer", Activation)
    excited = None if activated is None else vectors.affine(activated, "excitation layer")
    if excited is None:
        return None
    excite, vector = excited
    gate = None if vector.channels != channels else vectors.follow(vector, "gate", Activation)
    product = None if gate is None else vectors.follow(gate, "gate", Multiply)
    if product is None or product.trailing not in (2, FULL):
        return None
    layer = walk.graph.layer(product.node)
    chains = [walk.graph.aliases(side) for side in (layer.x, layer.other) if isinstance(side, fx.Node)]
    of_map = [chain for chain in chains if chain[-1] is value]
    if len(of_map) != 1 or (layer.in_place and layer.x is not of_map[0][0]):
        return None
    walk.take("gate", *of_map[0][:-1])
    return Gate(squeeze, activated.node, excite, gate.node, product.node)


@dataclass(frozen=True)
class VectorWalk:
    """Follows pooled channels of the map `value`, `[N, channels, H, W]`, through views and layers."""

    walk: Walk
    value: fx.Node
    channels: int

    def follow(self, vector: Vector, part: str, *kinds: type[Layer]) -> Vector | None:
        """Take the way to the next layer of these kinds; None if there is none that the shape is right for."""
        for path, trailing in self._ways(vector.node, vector, kinds):
            self.walk.take(part, *path)
            return Vector(path[-1], vector.channels, trailing)
        return None

    def affine(self, vector: Vector, part: str) -> tuple[Affine, Vector] | None:
        """Take a linear layer or 1x1 convolution and a batch norm after it."""
        found = self.follow(vector, part, Linear, Conv)
        if found is None:
            return None
        graph = self.walk.graph
        if isinstance(graph.layer(found.node), Conv):
            if not graph.is_pointwise(found.node):
                return None
            affine = self.walk.pointwise_at(found.node, part)
        else:
            affine = self.walk.affine(found.node, part)
        shape = graph.weight_shape(affine.layer.weight)
        if shape is None or shape[1] != vector.channels:
            return None
        return affine, Vector(affine.value, shape[0], found.trailing)

    def flattened(self, vector: Vector) -> Vector | None:
        """Take the views that make `[N, channels]` of it, if nothing else takes what is between."""
        graph, taken = self.walk.graph, []
        while vector.trailing:
            users = [user for user in vector.node.users if not isinstance(graph.layer(user), Query)]
            layer = graph.layer(users[0]) if len(users) == 1 else None
            if not isinstance(layer, Alias | Reshape):
                return None
            trailing = vector.trailing if isinstance(layer, Alias) else self._reshaped(users[0], layer, vector)
            if trailing is None or trailing == FULL:
                return None
            vector = Vector(users[0], vector.channels, trailing)
            taken.append(users[0])
        self.walk.take("pool", *taken)
        return vector

    def _ways(
        self, node: fx.Node, vector: Vector, kinds: tuple[type[Layer], ...]
    ) -> Iterator[tuple[tuple[fx.Node, ...], int]]:
        """Nodes on the way to a layer of these kinds, and the trailing dimensions of what it takes."""
        graph = self.walk.graph
        for user in node.users:
            layer = graph.layer(user)
            if isinstance(layer, kinds):
                if self._takes(layer, vector.trailing) and (layer.x is node or isinstance(layer, Multiply)):
                    yield (user,), vector.trailing
                continue
            trailing = vector.trailing if isinstance(layer, Alias) else None
            if isinstance(layer, Reshape) and layer.x is node:
                trailing = self._reshaped(user, layer, vector)
            if trailing is not None:
                seen = Vector(user, vector.channels, trailing)
                yield from (((user, *path), end) for path, end in self._ways(user, seen, kinds))

    def _takes(self, layer: Layer, trailing: int) -> bool:
        if isinstance(layer, Linear | Conv):
            return trailing == (0 if isinstance(layer, Linear) else 2)
        return not isinstance(layer, BatchNorm) or trailing != FULL

    def _reshaped(self, node: fx.Node, layer: Reshape, vector: Vector) -> int | None:
        """Trailing dimensions after a view; None if it may be of another shape."""
        if vector.trailing == FULL:
            return None
        shape, before = self.walk.graph.shape(node), self.walk.graph.shape(layer.x)
        if shape is not None and before is not None:
            return self._trailing_of_shape(shape, before, layer, vector.channels)
        return self._trailing_of_layer(layer, vector)

    def _trailing_of_shape(self, shape: tuple, before: tuple, layer: Reshape, channels: int) -> int | None:
        if len(shape) < 2 or not _is_same_size(shape[0], before[0]) or not _is_same_size(shape[1], channels):
            return None
        if all(_is_same_size(size, 1) for size in shape[2:]):
            return len(shape) - 2
        return FULL if isinstance(layer, Expand) and len(shape) == 4 else None

    def _trailing_of_layer(self, layer: Reshape, vector: Vector) -> int | None:
        """Of a graph that does not tell shapes."""
        trailing, dims = vector.trailing, vector.trailing + 2
        match layer:
            case Flatten(start=start, end=end):
                start, end = start % dims, end % dims
                return start - 1 if start >= 1 and end == dims - 1 else None
            case Unsqueeze(dim=dim):
                return trailing + 1 if dim % (dims + 1) >= 2 else None
            case Squeeze(dims=squeezed):
                is_known = squeezed is not None and all(dim % dims >= 2 for dim in squeezed)
                return trailing - len({dim % dims for dim in squeezed}) if is_known else None
            case Index(items=items):
                return _trailing_of_items(items, dims)
            case View(sizes=sizes):
                return len(sizes) - 2 if self._is_view_of_channels(sizes, vector.channels) else None
            case Expand(like=like) if like is not None:
                is_map = self.value in self.walk.graph.aliases(like)
                return FULL if is_map and trailing == 2 else None
            case Expand(sizes=sizes):
                return FULL if sizes[:2] == (-1, -1) and len(sizes) == 4 and trailing == 2 else None
        return None

    def _is_view_of_channels(self, sizes: tuple, channels: int) -> bool:
        """Whether a view of `[N, channels, 1, ...]` to these sizes keeps the first two: that of channels is told, or
        the batch, and the other follows."""
        if len(sizes) < 2 or any(size != 1 for size in sizes[2:]):
            return False
        batch, told = sizes[:2]
        if told == -1:
            return self._is_size(batch, 0)
        return told == channels or (channels == self.channels and self._is_size(told, 1))

    def _is_size(self, size: object, dim: int) -> bool:
        """Whether a node is the batch (`dim` 0) or the channels (`dim` 1) of the map or its mean."""
        graph = self.walk.graph
        query = graph.layer(size) if isinstance(size, fx.Node) else None
        if not isinstance(query, Query) or query.dim != dim:
            return False
        of = graph.origin(query.x)
        return of is self.value or (of in self.walk.parts and isinstance(graph.layer(of), GlobalPool))


def _trailing_of_items(items: tuple, dims: int) -> int | None:
    """Trailing dimensions of `[N, C, 1, ...]`, of so many dimensions, indexed by slices, None and an ellipsis."""
    if Ellipsis in items:
        at = items.index(Ellipsis)
        given = sum(item is not None for item in items) - 1
        items = (*items[:at], *[slice(None)] * (dims - given), *items[at + 1 :])
    return None if None in items[:2] else dims + items.count(None) - 2


def _is_same_size(a: object, b: object) -> bool:
    """Whether two sizes are the same by what they are, without a guard on a symbolic one."""
    if isinstance(a, torch.SymInt) and isinstance(b, torch.SymInt):
        return a.node.expr == b.node.expr
    return type(a) is int and type(b) is int and a == b

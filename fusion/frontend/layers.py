"""Layers of a network as the frontend sees them, whatever a graph calls them (`fusion.frontend.readers`)."""

from dataclasses import dataclass

from torch import Tensor, fx

Operand = fx.Node | Tensor | None
"""A parameter or buffer: what stands for it in the graph, or that of a module, or none."""


@dataclass(frozen=True, eq=False)
class Layer:
    """What a node computes, from `x` in the first place."""

    x: fx.Node


@dataclass(frozen=True, eq=False)
class Conv(Layer):
    """Two-dimensional convolution of `x` `[N, C, H, W]`; `padding` in pixels is that of rows and of columns."""

    weight: Operand
    bias: Operand
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    padding_mode: str = "zeros"


@dataclass(frozen=True, eq=False)
class Linear(Layer):
    """Product of the last dimension of `x` with a weight `[K, C]`."""

    weight: Operand
    bias: Operand


@dataclass(frozen=True, eq=False)
class BatchNorm(Layer):
    """Batch norm over dimension 1 of `x`; by the batch's own statistics if `training`."""

    mean: Operand
    variance: Operand
    gamma: Operand
    beta: Operand
    training: bool
    eps: float


@dataclass(frozen=True, eq=False)
class Activation(Layer):
    """Function of each element; "gelu" is the exact one, "gelu_tanh" its approximation."""

    name: str
    in_place: bool = False


@dataclass(frozen=True, eq=False)
class GlobalPool(Layer):
    """Mean over height and width: `[N, C, 1, 1]` if `keepdim`, else `[N, C]`."""

    keepdim: bool


@dataclass(frozen=True, eq=False)
class Pad(Layer):
    """Padding in pixels at the left, right, top and bottom; `mode` as in `torch.nn.functional.pad`."""

    sizes: tuple[int, ...]
    mode: str


@dataclass(frozen=True, eq=False)
class Concat(Layer):
    """Concatenation of `tensors`, of which `x` is the first."""

    tensors: tuple[fx.Node, ...]
    dim: int


@dataclass(frozen=True, eq=False)
class Multiply(Layer):
    """Product of `x`, which it overwrites if `in_place`, and `other`."""

    other: fx.Node | float
    in_place: bool = False


@dataclass(frozen=True, eq=False)
class Add(Layer):
    """Sum of `x`, which it overwrites if `in_place`, and `other`."""

    other: fx.Node
    in_place: bool = False


@dataclass(frozen=True, eq=False)
class Alias(Layer):
    """The values of `x` in its shape: an identity, a dropout in eval mode, another memory format, a copy."""


@dataclass(frozen=True, eq=False)
class Reshape(Layer):
    """The values of `x`, in their order, in another shape."""


@dataclass(frozen=True, eq=False)
class Flatten(Reshape):
    start: int
    end: int


@dataclass(frozen=True, eq=False)
class Unsqueeze(Reshape):
    dim: int


@dataclass(frozen=True, eq=False)
class Squeeze(Reshape):
    """All dimensions of size 1 if `dims` is None."""

    dims: tuple[int, ...] | None


@dataclass(frozen=True, eq=False)
class Index(Reshape):
    """Indexing by whole slices, None and an ellipsis only."""

    items: tuple[object, ...]


@dataclass(frozen=True, eq=False)
class View(Reshape):
    sizes: tuple[object, ...]


@dataclass(frozen=True, eq=False)
class Expand(Reshape):
    """Repetition along dimensions of size 1: to `sizes`, or to the shape of `like`."""

    sizes: tuple[object, ...] = ()
    like: fx.Node | None = None


@dataclass(frozen=True, eq=False)
class Query(Layer):
    """Something about `x` that is no tensor: its size `dim`, all its sizes if `is_shape`, or a check."""

    dim: int | None = None
    is_shape: bool = False


COMPUTED = (Conv, Linear, BatchNorm, Activation, GlobalPool, Pad, Concat, Multiply, Add)
"""Layers that give a new tensor, unless they are in place."""

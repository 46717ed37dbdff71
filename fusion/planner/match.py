"""Which block a graph is, read off its structure and not its name."""

from collections.abc import Sequence
from dataclasses import dataclass

from fusion.planner.graph import ELEMENT_SIZE, BlockGraph, Op, OpKind, Tensor


class Activations:
    """What follows from a shape's batch, height, width, channels and dtype."""

    @property
    def pixels(self) -> int:
        """Pixels of all images."""
        return self.batch * self.height * self.width

    @property
    def pixel_bytes(self) -> int:
        """Input and output of a pixel."""
        return ELEMENT_SIZE[self.dtype] * (self.in_channels + self.out_channels)


@dataclass(frozen=True)
class ConvFirstShape(Activations):
    """Parameters of a stride-1 ConvFirst block; ``height`` and ``width`` in pixels, channels C, hidden and K."""

    batch: int
    height: int
    width: int
    in_channels: int
    hidden_channels: int
    out_channels: int
    group_width: int
    activation: str
    residual: bool
    dtype: str
    kernel_size: int = 3


@dataclass(frozen=True)
class FfnShape(Activations):
    """Parameters of an FFN block; ``height`` and ``width`` in pixels, channels C, hidden and K."""

    batch: int
    height: int
    width: int
    in_channels: int
    hidden_channels: int
    out_channels: int
    activation: str
    residual: bool
    dtype: str


@dataclass(frozen=True)
class MBConvShape(Activations):
    """Parameters of a stride-1 MBConv block with squeeze-and-excitation.

    ``height`` and ``width`` are in pixels; channels are C, hidden, K, and those of the squeeze vector. ``activation``
    follows both the expansion and the grouped convolution.
    """

    batch: int
    height: int
    width: int
    in_channels: int
    hidden_channels: int
    out_channels: int
    squeeze_channels: int
    group_width: int
    activation: str
    residual: bool
    dtype: str
    kernel_size: int = 3


BlockShape = ConvFirstShape | FfnShape | MBConvShape


def match_convfirst(graph: BlockGraph) -> ConvFirstShape | None:
    """The shape of a stride-1 ConvFirst block: spatial convolution, expand, activation, project, maybe a residual.

    Returns None when the graph is anything else.
    """
    if len(graph.inputs) != 1 or len(graph.outputs) != 1 or len(graph.ops) not in (4, 5):
        return None
    (x,) = graph.inputs
    conv, *ffn = graph.ops
    has_residual = len(ffn) == 4
    is_convfirst = (
        conv.inputs == (x,)
        and _is_ffn(graph, ffn, conv.output, residual=x)
        and conv.is_spatial_conv
        and conv.stride == 1
        and conv.output.dims == x.dims
    )
    if not is_convfirst:
        return None
    return ConvFirstShape(
        batch=x["N"],
        height=x["H"],
        width=x["W"],
        in_channels=x["C"],
        hidden_channels=ffn[0].output["C"],
        out_channels=ffn[2].output["C"],
        group_width=conv.group_width,
        activation=str(ffn[1].kind),
        residual=has_residual,
        dtype=graph.dtype,
        kernel_size=conv.kernel_size,
    )


def match_ffn(graph: BlockGraph) -> FfnShape | None:
    """The shape of an FFN block: point-wise expand, activation, point-wise project, maybe a residual.

    Returns None when the graph is anything else.
    """
    if len(graph.inputs) != 1 or len(graph.outputs) != 1 or len(graph.ops) not in (3, 4):
        return None
    (x,) = graph.inputs
    if not _is_ffn(graph, graph.ops, x, residual=x):
        return None
    expand, activation, project, *rest = graph.ops
    return FfnShape(
        batch=x["N"],
        height=x["H"],
        width=x["W"],
        in_channels=x["C"],
        hidden_channels=expand.output["C"],
        out_channels=project.output["C"],
        activation=str(activation.kind),
        residual=bool(rest),
        dtype=graph.dtype,
    )


def match_mbconv(graph: BlockGraph) -> MBConvShape | None:
    """The shape of a stride-1 MBConv block: expand, activation, spatial convolution, the same activation, a gate of
    squeeze-and-excitation, project, maybe a residual.

    Returns None when the graph is anything else.
    """
    if len(graph.inputs) != 1 or len(graph.outputs) != 1 or len(graph.ops) not in (11, 12):
        return None
    (x,) = graph.inputs
    expand, expand_activation, conv, activation, pool, squeeze, relu, excite, sigmoid, gate, project, *rest = graph.ops
    y = activation.output
    is_mbconv = (
        _is_chain(x, (expand, expand_activation, conv, activation, pool, squeeze, relu, excite, sigmoid))
        and expand.is_pointwise
        and expand_activation.kind in (OpKind.RELU, OpKind.SILU)
        and conv.is_spatial_conv
        and conv.stride == 1
        and conv.output.dims == expand.output.dims
        and activation.kind == expand_activation.kind
        and pool.kind is OpKind.GLOBAL_AVERAGE_POOL
        and (squeeze.kind, relu.kind, excite.kind) == (OpKind.LINEAR, OpKind.RELU, OpKind.LINEAR)
        and (sigmoid.kind, gate.kind) == (OpKind.SIGMOID, OpKind.MULTIPLY)
        and gate.inputs == (y, sigmoid.output)
        and _is_chain(gate.output, (project,))
        and project.is_pointwise
        and _ends_with_residual(graph, project.output, rest, residual=x)
    )
    if not is_mbconv:
        return None
    return MBConvShape(
        batch=x["N"],
        height=x["H"],
        width=x["W"],
        in_channels=x["C"],
        hidden_channels=expand.output["C"],
        out_channels=project.output["C"],
        squeeze_channels=squeeze.output["C"],
        group_width=conv.group_width,
        activation=str(activation.kind),
        residual=bool(rest),
        dtype=graph.dtype,
        kernel_size=conv.kernel_size,
    )


def _is_ffn(graph: BlockGraph, ops: Sequence[Op], x: Tensor, residual: Tensor) -> bool:
    """Whether the last ops of a graph are an FFN of `x`, to which nothing or `residual` is added."""
    expand, activation, project, *rest = ops
    return (
        _is_chain(x, (expand, activation, project))
        and _ends_with_residual(graph, project.output, rest, residual)
        and expand.is_pointwise
        and activation.kind in (OpKind.RELU, OpKind.SILU)
        and project.is_pointwise
    )


def _is_chain(x: Tensor, ops: Sequence[Op]) -> bool:
    """Whether the first op takes `x` alone, and each of the others what the one before it gives."""
    return all(op.inputs == (tensor,) for op, tensor in zip(ops, (x, *(op.output for op in ops[:-1])), strict=True))


def _ends_with_residual(graph: BlockGraph, z: Tensor, rest: Sequence[Op], residual: Tensor) -> bool:
    """Whether the graph gives `z`, or, with one op in `rest`, the sum of `z` and `residual`."""
    has_residual = [(op.kind, set(op.inputs)) for op in rest] == [(OpKind.ADD, {residual, z})]
    output = rest[-1].output if rest else z
    return (has_residual or not rest) and graph.outputs == (output,)

"""Which block a graph is, read off its structure and not its name."""

from dataclasses import dataclass

from fusion.planner.graph import BlockGraph, OpKind


@dataclass(frozen=True)
class ConvFirstShape:
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


def match_convfirst(graph: BlockGraph) -> ConvFirstShape | None:
    """The shape of a stride-1 ConvFirst block: spatial convolution, expand, activation, project, maybe a residual.

    Returns None when the graph is anything else.
    """
    if len(graph.inputs) != 1 or len(graph.outputs) != 1:
        return None
    (x,) = graph.inputs
    if len(graph.ops) not in (4, 5):
        return None
    conv, expand, activation, project, *rest = graph.ops
    is_chain = all(
        op.inputs == (tensor,)
        for op, tensor in (
            (conv, x),
            (expand, conv.output),
            (activation, expand.output),
            (project, activation.output),
        )
    )
    has_residual = [(op.kind, set(op.inputs)) for op in rest] == [(OpKind.ADD, {x, project.output})]
    is_convfirst = (
        is_chain
        and (has_residual or not rest)
        and graph.outputs == (graph.ops[-1].output,)
        and conv.is_spatial_conv
        and conv.stride == 1
        and conv.output.dims == x.dims
        and expand.is_pointwise
        and activation.kind in (OpKind.RELU, OpKind.SILU)
        and project.is_pointwise
    )
    if not is_convfirst:
        return None
    return ConvFirstShape(
        batch=x["N"],
        height=x["H"],
        width=x["W"],
        in_channels=x["C"],
        hidden_channels=expand.output["C"],
        out_channels=project.output["C"],
        group_width=conv.group_width,
        activation=str(activation.kind),
        residual=has_residual,
        dtype=graph.dtype,
        kernel_size=conv.kernel_size,
    )

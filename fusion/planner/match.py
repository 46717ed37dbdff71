"""Which block a graph is, read off its structure and not its name."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from fusion.planner.graph import ACTIVATION_KINDS, ELEMENT_SIZE, BlockGraph, Op, OpKind, Tensor


class Activations:
    """What follows from a shape's batch, height, width, channels and dtype."""

    @property
    def pixels(self) -> int:
        """Pixels of all images."""
        return self.batch * self.height * self.width

    @property
    def out_height(self) -> int:
        """Rows of the output, in pixels."""
        return self.height

    @property
    def out_width(self) -> int:
        """Columns of the output, in pixels."""
        return self.width

    @property
    def pixel_bytes(self) -> int:
        """Input and output of a pixel."""
        return ELEMENT_SIZE[self.dtype] * (self.in_channels + self.out_channels)


class ResizedActivations:
    """What follows from batch, height, width, channels and dtype of a shape whose output has another size than its
    input. ``height`` and ``width`` are those of the input."""

    @property
    def activation_bytes(self) -> int:
        """Input and output of all images."""
        inputs = self.height * self.width * self.in_channels
        outputs = self.out_height * self.out_width * self.out_channels
        return ELEMENT_SIZE[self.dtype] * self.batch * (inputs + outputs)


class HalvedActivations(ResizedActivations):
    """Those of a shape whose output has half as many rows and columns as its input, rounded up."""

    @property
    def out_height(self) -> int:
        """Rows of the output, in pixels."""
        return ceil(self.height / 2)

    @property
    def out_width(self) -> int:
        """Columns of the output, in pixels."""
        return ceil(self.width / 2)


@dataclass(frozen=True)
class ConvFirstShape(ResizedActivations):
    """Parameters of a ConvFirst block without a blur-pool; ``height`` and ``width`` of the input in pixels, channels C,
    hidden and K.

    ``stride`` is that of the convolution, 1 or 2. A block of stride 2 has no residual.
    """

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
    stride: int = 1

    @property
    def out_height(self) -> int:
        """Rows of the output, in pixels."""
        return ceil(self.height / self.stride)

    @property
    def out_width(self) -> int:
        """Columns of the output, in pixels."""
        return ceil(self.width / self.stride)


@dataclass(frozen=True)
class ConvFirstDownShape(HalvedActivations):
    """Parameters of a stride-2 ConvFirst block with a blur-pool; ``height`` and ``width`` of the input in pixels,
    channels C, hidden, K.

    The expansion has 2C input channels. Such a block has no residual.
    """

    batch: int
    height: int
    width: int
    in_channels: int
    hidden_channels: int
    out_channels: int
    group_width: int
    activation: str
    dtype: str
    kernel_size: int = 3


@dataclass(frozen=True)
class StemShape:
    """Parameters of a dense 3x3 convolution of stride 2; ``height`` and ``width`` of the input in pixels, C, K.

    ``activation`` is "none" where there is none.
    """

    batch: int
    height: int
    width: int
    in_channels: int
    out_channels: int
    activation: str
    dtype: str

    @property
    def out_height(self) -> int:
        """Rows of the output, in pixels."""
        return ceil(self.height / 2)

    @property
    def out_width(self) -> int:
        """Columns of the output, in pixels."""
        return ceil(self.width / 2)

    @property
    def activation_bytes(self) -> int:
        """Input and output of all images."""
        inputs = self.height * self.width * self.in_channels
        outputs = self.out_height * self.out_width * self.out_channels
        return ELEMENT_SIZE[self.dtype] * self.batch * (inputs + outputs)


@dataclass(frozen=True)
class StemConvFirstShape(HalvedActivations):
    """Parameters of a stem (`StemShape`) and the stride-1 ConvFirst block after it, as one block.

    ``height`` and ``width`` are those of the images, in pixels; channels are C, those between stem and block, hidden
    and K. ``activation`` follows both the stem and the expansion.
    """

    batch: int
    height: int
    width: int
    in_channels: int
    stem_channels: int
    hidden_channels: int
    out_channels: int
    group_width: int
    activation: str
    residual: bool
    dtype: str
    kernel_size: int = 3


@dataclass(frozen=True)
class HeadShape:
    """Parameters of a 1x1 convolution ahead of a global average pool; ``height`` and ``width`` in pixels, C and K.

    ``activation`` stands between the two and is "none" where there is none.
    """

    batch: int
    height: int
    width: int
    in_channels: int
    out_channels: int
    activation: str
    dtype: str


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
    follows both the expansion and the grouped convolution, ``squeeze_activation`` the squeeze layer.
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
    squeeze_activation: str = "relu"


@dataclass(frozen=True)
class MBConvDownShape(HalvedActivations):
    """Parameters of a stride-2 MBConv block with squeeze-and-excitation.

    ``height`` and ``width`` are those of the input, in pixels; channels are C, hidden, K, and those of the squeeze
    vector. ``activation`` follows both the expansion and the grouped convolution, ``squeeze_activation`` the squeeze
    layer. With ``blur`` the convolution is followed by a blur-pool, else it has stride 2 itself. Such a block has no
    residual.
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
    dtype: str
    kernel_size: int = 3
    squeeze_activation: str = "relu"
    blur: bool = True


BlockShape = (
    ConvFirstShape
    | ConvFirstDownShape
    | FfnShape
    | MBConvShape
    | MBConvDownShape
    | StemShape
    | StemConvFirstShape
    | HeadShape
)

OPTIONS = ("activation", "residual", "stride", "squeeze_activation", "blur")
"""Fields of shapes that are neither sizes nor the dtype, but say what a block computes."""


def options_of(shape: BlockShape) -> dict[str, object]:
    """Those of the `OPTIONS` that a shape has, by name."""
    return {name: getattr(shape, name) for name in OPTIONS if hasattr(shape, name)}


def match_convfirst(graph: BlockGraph) -> ConvFirstShape | None:
    """The shape of a ConvFirst block without a blur-pool: spatial convolution of stride 1 or 2, expand, activation,
    project, maybe, with stride 1, a residual.

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
        and (conv.stride == 1 or (conv.stride == 2 and not has_residual))
        and conv.output["C"] == x["C"]
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
        stride=conv.stride,
    )


def match_convfirst_down(graph: BlockGraph) -> ConvFirstDownShape | None:
    """The shape of a stride-2 ConvFirst block with a blur-pool: spatial convolution at full resolution, its input
    and output concatenated in this order, blur-pool of stride 2, expand, activation, project.

    Returns None when the graph is anything else.
    """
    if len(graph.inputs) != 1 or len(graph.outputs) != 1 or len(graph.ops) != 6:
        return None
    (x,) = graph.inputs
    conv, concat, blur, expand, activation, project = graph.ops
    is_convfirst_down = (
        _is_chain(x, (conv,))
        and conv.is_spatial_conv
        and conv.stride == 1
        and conv.output.dims == x.dims
        and concat.kind is OpKind.CONCAT
        and concat.inputs == (x, conv.output)
        and _is_chain(concat.output, (blur,))
        and (blur.kind, blur.stride) == (OpKind.BLURPOOL, 2)
        and _is_ffn(graph, (expand, activation, project), blur.output, residual=x)
    )
    if not is_convfirst_down:
        return None
    return ConvFirstDownShape(
        batch=x["N"],
        height=x["H"],
        width=x["W"],
        in_channels=x["C"],
        hidden_channels=expand.output["C"],
        out_channels=project.output["C"],
        group_width=conv.group_width,
        activation=str(activation.kind),
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
    expand, _, conv, activation, *gated = graph.ops[:10]
    project, *rest = graph.ops[10:]
    is_mbconv = (
        _is_expanded_conv(x, graph.ops[:4])
        and _is_gated(activation.output, gated)
        and _is_chain(gated[-1].output, (project,))
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
        squeeze_channels=gated[1].output["C"],
        group_width=conv.group_width,
        activation=str(activation.kind),
        residual=bool(rest),
        dtype=graph.dtype,
        kernel_size=conv.kernel_size,
        squeeze_activation=str(gated[2].kind),
    )


def match_mbconv_down(graph: BlockGraph) -> MBConvDownShape | None:
    """The shape of a stride-2 MBConv block: expand, activation, spatial convolution, the same activation, a gate of
    squeeze-and-excitation, project. The convolution has stride 2, or stride 1 and a blur-pool of stride 2 after its
    activation.

    Returns None when the graph is anything else.
    """
    if len(graph.inputs) != 1 or len(graph.outputs) != 1 or len(graph.ops) not in (11, 12):
        return None
    (x,) = graph.inputs
    expand, _, conv, activation, *blur = graph.ops[:-7]
    *gated, project = graph.ops[-7:]
    is_mbconv_down = (
        _is_expanded_conv(x, graph.ops[:4], stride=1 if blur else 2)
        and _is_chain(x, graph.ops[:-7])
        and all((op.kind, op.stride) == (OpKind.BLURPOOL, 2) for op in blur)
        and _is_gated(graph.ops[-8].output, gated)
        and _is_chain(gated[-1].output, (project,))
        and project.is_pointwise
        and graph.outputs == (project.output,)
    )
    if not is_mbconv_down:
        return None
    return MBConvDownShape(
        batch=x["N"],
        height=x["H"],
        width=x["W"],
        in_channels=x["C"],
        hidden_channels=expand.output["C"],
        out_channels=project.output["C"],
        squeeze_channels=gated[1].output["C"],
        group_width=conv.group_width,
        activation=str(activation.kind),
        dtype=graph.dtype,
        kernel_size=conv.kernel_size,
        squeeze_activation=str(gated[2].kind),
        blur=bool(blur),
    )


def match_stem(graph: BlockGraph) -> StemShape | None:
    """The shape of a dense 3x3 convolution of stride 2, maybe with an activation. None when it is anything else."""
    if len(graph.inputs) != 1 or len(graph.outputs) != 1 or len(graph.ops) not in (1, 2):
        return None
    (x,) = graph.inputs
    conv, *rest = graph.ops
    is_stem = (
        _is_chain(x, graph.ops)
        and graph.outputs == (graph.ops[-1].output,)
        and conv.is_spatial_conv
        and conv.is_dense
        and (conv.kernel_size, conv.stride) == (3, 2)
        and all(op.kind in ACTIVATION_KINDS for op in rest)
    )
    if not is_stem:
        return None
    return StemShape(
        batch=x["N"],
        height=x["H"],
        width=x["W"],
        in_channels=x["C"],
        out_channels=conv.output["C"],
        activation=str(rest[0].kind) if rest else "none",
        dtype=graph.dtype,
    )


def match_stem_convfirst(graph: BlockGraph) -> StemConvFirstShape | None:
    """The shape of a stem (`match_stem`) and a ConvFirst block of stride 1 of its output, with the same activation.

    Returns None when the graph is anything else.
    """
    stem, block = graph.ops[:2], graph.ops[2:]
    y = stem[-1].output
    after = {y, *(op.output for op in block)}
    if not block or any(tensor not in after for op in block for tensor in op.inputs) or y in graph.outputs:
        return None
    stem = match_stem(BlockGraph(graph.name, stem, graph.inputs, (y,), graph.dtype))
    block = match_convfirst(BlockGraph(graph.name, block, (y,), graph.outputs, graph.dtype))
    if stem is None or block is None or stem.activation != block.activation or block.stride != 1:
        return None
    return StemConvFirstShape(
        batch=stem.batch,
        height=stem.height,
        width=stem.width,
        in_channels=stem.in_channels,
        stem_channels=stem.out_channels,
        hidden_channels=block.hidden_channels,
        out_channels=block.out_channels,
        group_width=block.group_width,
        activation=block.activation,
        residual=block.residual,
        dtype=graph.dtype,
        kernel_size=block.kernel_size,
    )


def match_head(graph: BlockGraph) -> HeadShape | None:
    """The shape of a 1x1 convolution, maybe an activation, and a global average pool. None when it is anything else."""
    if len(graph.inputs) != 1 or len(graph.outputs) != 1 or len(graph.ops) not in (2, 3):
        return None
    (x,) = graph.inputs
    conv, *rest, pool = graph.ops
    is_head = (
        _is_chain(x, graph.ops)
        and graph.outputs == (pool.output,)
        and conv.is_pointwise
        and all(op.kind in ACTIVATION_KINDS for op in rest)
        and pool.kind is OpKind.GLOBAL_AVERAGE_POOL
    )
    if not is_head:
        return None
    return HeadShape(
        batch=x["N"],
        height=x["H"],
        width=x["W"],
        in_channels=x["C"],
        out_channels=conv.output["C"],
        activation=str(rest[0].kind) if rest else "none",
        dtype=graph.dtype,
    )


def _is_ffn(graph: BlockGraph, ops: Sequence[Op], x: Tensor, residual: Tensor) -> bool:
    """Whether the last ops of a graph are an FFN of `x`, to which nothing or `residual` is added."""
    expand, activation, project, *rest = ops
    return (
        _is_chain(x, (expand, activation, project))
        and _ends_with_residual(graph, project.output, rest, residual)
        and expand.is_pointwise
        and activation.kind in ACTIVATION_KINDS
        and project.is_pointwise
    )


def _is_expanded_conv(x: Tensor, ops: Sequence[Op], stride: int = 1) -> bool:
    """Whether ops are the expansion of `x`, an activation, a spatial convolution of this stride with as many outputs as
    inputs, and the same activation."""
    expand, expand_activation, conv, activation = ops
    return (
        _is_chain(x, ops)
        and expand.is_pointwise
        and expand_activation.kind in ACTIVATION_KINDS
        and conv.is_spatial_conv
        and conv.stride == stride
        and conv.output["C"] == expand.output["C"]
        and activation.kind == expand_activation.kind
    )


def _is_gated(y: Tensor, ops: Sequence[Op]) -> bool:
    """Whether ops are `y` times the gate of its squeeze-and-excitation."""
    pool, squeeze, activation, excite, sigmoid, gate = ops
    return (
        _is_chain(y, (pool, squeeze, activation, excite, sigmoid))
        and pool.kind is OpKind.GLOBAL_AVERAGE_POOL
        and (squeeze.kind, excite.kind) == (OpKind.LINEAR, OpKind.LINEAR)
        and activation.kind in (OpKind.RELU, OpKind.SILU)
        and (sigmoid.kind, gate.kind) == (OpKind.SIGMOID, OpKind.MULTIPLY)
        and gate.inputs == (y, sigmoid.output)
    )


def _is_chain(x: Tensor, ops: Sequence[Op]) -> bool:
    """Whether the first op takes `x` alone, and each of the others what the one before it gives."""
    return all(op.inputs == (tensor,) for op, tensor in zip(ops, (x, *(op.output for op in ops[:-1])), strict=True))


def _ends_with_residual(graph: BlockGraph, z: Tensor, rest: Sequence[Op], residual: Tensor) -> bool:
    """Whether the graph gives `z`, or, with one op in `rest`, the sum of `z` and `residual`."""
    has_residual = [(op.kind, set(op.inputs)) for op in rest] == [(OpKind.ADD, {residual, z})]
    output = rest[-1].output if rest else z
    return (has_residual or not rest) and graph.outputs == (output,)

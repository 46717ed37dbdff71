"""The paper's blocks as graphs (section 5). A block is data: its analysis, programs and diagrams follow from the graph.

``n, h, w`` are the batch and the input's height and width; ``channels`` are the input channels C, ``out_channels`` the
output channels K (default C), ``expansion`` is the ratio of hidden to input channels, which ``hidden_channels``
overrides. All constructors raise ValueError for sizes that do not fit together.
"""

from fusion.planner.graph import ACTIVATION_KINDS, BlockGraph, Op, OpKind, Role, Tensor, make_op

ACTIVATIONS = {str(kind): kind for kind in ACTIVATION_KINDS}


def ffn(
    n: int,
    h: int,
    w: int,
    channels: int,
    expansion: int | None = None,
    hidden_channels: int | None = None,
    out_channels: int | None = None,
    activation: str = "relu",
    residual: bool | None = None,
    dtype: str = "float16",
) -> BlockGraph:
    """Point-wise expand, activation, point-wise project (section 5.2).

    The residual defaults to what the shape allows, K == C.
    """
    _positive(n=n, h=h, w=w, channels=channels)
    hidden = _hidden_channels(channels, expansion, hidden_channels)
    out_channels = _default_channels(out_channels, channels)
    x = _input(n, h, w, channels)
    ops = _ffn_ops(x, hidden, out_channels, activation)
    return _finish("ffn", x, ops, residual, dtype, stride=1)


def convfirst(
    n: int,
    h: int,
    w: int,
    channels: int,
    expansion: int | None = None,
    hidden_channels: int | None = None,
    out_channels: int | None = None,
    stride: int = 1,
    group_width: int = 8,
    activation: str = "relu",
    residual: bool | None = None,
    dtype: str = "float16",
    kernel_size: int = 3,
    blur: bool = True,
) -> BlockGraph:
    """Grouped convolution without an activation, then an FFN (section 5.3).

    With stride 2 (figure 6c) the convolution runs at full resolution, its input and output are concatenated to 2C
    channels and blur-pooled, and the FFN takes those; its hidden channels are still ``expansion * channels``. Or, if
    not ``blur``, the convolution itself has stride 2, and the FFN takes its C channels. The residual defaults to what
    the shape allows: stride 1 and K == C.
    """
    _positive(n=n, h=h, w=w, channels=channels)
    _supported_stride(stride)
    hidden = _hidden_channels(channels, expansion, hidden_channels)
    out_channels = _default_channels(out_channels, channels)
    x = _input(n, h, w, channels)
    ops = [_conv("conv", x, channels, kernel_size, group_width, 1 if blur else stride)]
    if stride == 2 and blur:
        ops.append(make_op(OpKind.CONCAT, "concat", (x, ops[-1].output)))
        ops.append(make_op(OpKind.BLURPOOL, "blurpool", (ops[-1].output,), stride=2))
    ops += _ffn_ops(ops[-1].output, hidden, out_channels, activation)
    return _finish("convfirst", x, ops, residual, dtype, stride)


def mbconv(
    n: int,
    h: int,
    w: int,
    channels: int,
    expansion: int | None = None,
    hidden_channels: int | None = None,
    out_channels: int | None = None,
    stride: int = 1,
    group_width: int = 8,
    squeeze_channels: int | None = None,
    activation: str = "silu",
    residual: bool | None = None,
    dtype: str = "float16",
    kernel_size: int = 3,
    squeeze_activation: str = "relu",
    blur: bool = True,
) -> BlockGraph:
    """Point-wise expand, grouped convolution, squeeze-and-excitation, point-wise project (section 5.4).

    With stride 2 the convolution runs at full resolution and a blur-pool follows its activation; or, if not ``blur``,
    the convolution itself has stride 2. ``squeeze_channels`` defaults to C // 4, ``squeeze_activation`` follows the
    squeeze layer. The residual defaults to what the shape allows: stride 1 and K == C.
    """
    _positive(n=n, h=h, w=w, channels=channels)
    _supported_stride(stride)
    hidden = _hidden_channels(channels, expansion, hidden_channels)
    out_channels = _default_channels(out_channels, channels)
    squeeze = _default_channels(squeeze_channels, max(channels // 4, 1), "squeeze_channels")
    x = _input(n, h, w, channels)
    ops = [_conv("expand", x, hidden)]
    ops.append(_activation("expand_activation", ops[-1].output, activation))
    ops.append(_conv("conv", ops[-1].output, hidden, kernel_size, group_width, 1 if blur else stride))
    ops.append(_activation("conv_activation", ops[-1].output, activation))
    if stride == 2 and blur:
        ops.append(make_op(OpKind.BLURPOOL, "blurpool", (ops[-1].output,), stride=2))
    y = ops[-1].output
    ops.append(make_op(OpKind.GLOBAL_AVERAGE_POOL, "pool", (y,)))
    ops.append(_linear("squeeze", ops[-1].output, squeeze))
    ops.append(_activation("squeeze_activation", ops[-1].output, squeeze_activation))
    ops.append(_linear("excite", ops[-1].output, hidden))
    ops.append(make_op(OpKind.SIGMOID, "excite_activation", (ops[-1].output,)))
    ops.append(make_op(OpKind.MULTIPLY, "gate", (y, ops[-1].output)))
    ops.append(_conv("project", ops[-1].output, out_channels))
    return _finish("mbconv", x, ops, residual, dtype, stride)


def conv(
    n: int,
    h: int,
    w: int,
    channels: int,
    out_channels: int | None = None,
    kernel_size: int = 3,
    stride: int = 1,
    group_width: int | None = None,
    activation: str | None = None,
    dtype: str = "float16",
) -> BlockGraph:
    """One convolution, dense unless ``group_width`` is given, with an optional activation: a network's stem or head."""
    _positive(n=n, h=h, w=w, channels=channels, stride=stride)
    out_channels = _default_channels(out_channels, channels)
    x = _input(n, h, w, channels)
    ops = [_conv("conv", x, out_channels, kernel_size, group_width, stride)]
    if activation is not None:
        ops.append(_activation("activation", ops[-1].output, activation))
    return _finish("conv", x, ops, False, dtype, stride)


def stem_convfirst(
    n: int,
    h: int,
    w: int,
    channels: int,
    stem_channels: int,
    expansion: int | None = None,
    hidden_channels: int | None = None,
    out_channels: int | None = None,
    group_width: int = 8,
    activation: str = "relu",
    residual: bool | None = None,
    dtype: str = "float16",
) -> BlockGraph:
    """A network's stem and the stride-1 ConvFirst block after it: a dense 3x3 convolution of stride 2 to
    ``stem_channels``, the activation, and `convfirst` of what they give.

    ``expansion`` is the ratio of hidden to stem channels, ``out_channels`` default to the latter.
    """
    _positive(n=n, h=h, w=w, channels=channels, stem_channels=stem_channels)
    hidden = _hidden_channels(stem_channels, expansion, hidden_channels)
    x = _input(n, h, w, channels)
    stem = _conv("stem", x, stem_channels, kernel_size=3, stride=2)
    activate = _activation("stem_activation", stem.output, activation)
    conv = _conv("conv", activate.output, stem_channels, 3, group_width)
    ffn = _ffn_ops(conv.output, hidden, _default_channels(out_channels, stem_channels), activation)
    block = _finish("convfirst", activate.output, [conv, *ffn], residual, dtype, stride=1)
    return BlockGraph("stem_convfirst", (stem, activate, *block.ops), (x,), block.outputs, dtype)


def head(
    n: int,
    h: int,
    w: int,
    channels: int,
    out_channels: int,
    activation: str | None = "silu",
    dtype: str = "float16",
) -> BlockGraph:
    """Point-wise convolution, an optional activation, global average pool: what a classifier takes, ``[N, K]``."""
    _positive(n=n, h=h, w=w, channels=channels, out_channels=out_channels)
    x = _input(n, h, w, channels)
    ops = [_conv("conv", x, out_channels)]
    if activation is not None:
        ops.append(_activation("activation", ops[-1].output, activation))
    ops.append(make_op(OpKind.GLOBAL_AVERAGE_POOL, "pool", (ops[-1].output,)))
    return _finish("head", x, ops, False, dtype, stride=1)


def _ffn_ops(x: Tensor, hidden: int, out_channels: int, activation: str) -> list[Op]:
    expand = _conv("expand", x, hidden)
    activate = _activation("activation", expand.output, activation)
    return [expand, activate, _conv("project", activate.output, out_channels)]


def _finish(name: str, x: Tensor, ops: list[Op], residual: bool | None, dtype: str, stride: int) -> BlockGraph:
    z = ops[-1].output
    if residual is None:
        residual = stride == 1 and z.dims == x.dims
    if residual:
        if z.dims != x.dims:
            raise ValueError(
                f"{name} with a residual was asked for {x['C']} input channels, {z['C']} output channels and stride "
                f"{stride}; a residual needs equal channels and stride 1: change those, or pass residual=False"
            )
        ops = [*ops, make_op(OpKind.ADD, "residual", (x, z))]
    return BlockGraph(name, tuple(ops), (x,), (ops[-1].output,), dtype)


def _input(n: int, h: int, w: int, channels: int) -> Tensor:
    return Tensor("x", {"N": n, "H": h, "W": w, "C": channels})


def _conv(
    name: str, x: Tensor, out_channels: int, kernel_size: int = 1, group_width: int | None = None, stride: int = 1
) -> Op:
    if group_width is None:
        group_width = x["C"]
    _positive(kernel_size=kernel_size, group_width=group_width)
    if x["C"] % group_width:
        raise ValueError(
            f"{name}: {x['C']} channels do not divide into groups of {group_width}; use a multiple of {group_width} "
            "or another group_width"
        )
    dims = {"K": out_channels, "T": group_width, "R": kernel_size, "S": kernel_size}
    return make_op(OpKind.CONV, name, (x,), (Tensor(f"{name}.weight", dims, Role.WEIGHT),), stride)


def _linear(name: str, x: Tensor, out_channels: int) -> Op:
    weight = Tensor(f"{name}.weight", {"K": out_channels, "C": x["C"]}, Role.WEIGHT)
    return make_op(OpKind.LINEAR, name, (x,), (weight,))


def _activation(name: str, x: Tensor, activation: str) -> Op:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is not supported, use one of {', '.join(ACTIVATIONS)}")
    return make_op(ACTIVATIONS[activation], name, (x,))


def _hidden_channels(channels: int, expansion: int | None, hidden_channels: int | None) -> int:
    if (expansion is None) == (hidden_channels is None):
        raise ValueError(
            f"got expansion={expansion} and hidden_channels={hidden_channels}; give exactly one of the two"
        )
    if hidden_channels is None:
        _positive(expansion=expansion)
        return expansion * channels
    _positive(hidden_channels=hidden_channels)
    return hidden_channels


def _default_channels(value: int | None, default: int, name: str = "out_channels") -> int:
    if value is None:
        return default
    _positive(**{name: value})
    return value


def _supported_stride(stride: int) -> None:
    if stride not in (1, 2):
        raise ValueError(f"stride {stride} is not supported, use 1 or 2")


def _positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{name} must be a positive integer, got {size!r}")

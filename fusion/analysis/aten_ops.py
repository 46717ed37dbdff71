"""ATen operators as operations of a block graph: how much each costs, and which tensors it touches.

Data that ATen does not name as a convolution, a product, a pool, a norm or an element-wise function are counted by the
bytes that they move: copies (concatenation, resizing, gathering) as such, and all else as unknown.
"""

from collections.abc import Callable, Mapping
from math import prod

import torch

from fusion.analysis.recorder import ATTENTION, Call, Operand
from fusion.planner.graph import Op, OpKind, Role, Tensor, make_op, output_dims

TensorOf = Callable[[Operand, tuple[str, ...] | None], Tensor]
"""The planner's tensor of an operand; the second argument names the dimensions of a view that is read as a matrix."""

LAYOUTS: Mapping[int, tuple[str, ...]] = {
    2: ("N", "C"),
    3: ("N", "C", "L"),
    4: ("N", "C", "H", "W"),
    5: ("N", "C", "D", "H", "W"),
}
"""Names of dimensions in PyTorch's order, by their number."""

WINDOWS: Mapping[int, tuple[str, ...]] = {3: ("R",), 4: ("R", "S"), 5: ("Q", "R", "S")}
"""Names of a convolution's window, by the number of its weight's dimensions."""

NORMS = frozenset(
    {
        "_fused_rms_norm",
        "_native_batch_norm_legit",
        "linalg_vector_norm",
        "native_group_norm",
        "native_layer_norm",
        "rms_norm",
    }
)
SOFTMAXES = frozenset({"_log_softmax", "_safe_softmax", "_softmax"})
POOLS = frozenset(
    {
        "_adaptive_avg_pool2d",
        "_adaptive_avg_pool3d",
        "adaptive_avg_pool1d",
        "adaptive_max_pool1d",
        "adaptive_max_pool2d",
        "all",
        "amax",
        "amin",
        "any",
        "argmax",
        "argmin",
        "avg_pool1d",
        "avg_pool2d",
        "avg_pool3d",
        "logsumexp",
        "max",
        "max_pool2d_with_indices",
        "max_pool3d_with_indices",
        "mean",
        "min",
        "prod",
        "std",
        "std_mean",
        "sum",
        "var",
        "var_mean",
    }
)
COPIES = frozenset(
    {
        "_upsample_bicubic2d_aa",
        "_upsample_bilinear2d_aa",
        "_upsample_nearest_exact2d",
        "as_strided_copy",
        "cat",
        "channel_shuffle",
        "col2im",
        "embedding",
        "flip",
        "gather",
        "grid_sampler_2d",
        "im2col",
        "index",
        "index_select",
        "pixel_shuffle",
        "pixel_unshuffle",
        "repeat",
        "roll",
        "select_scatter",
        "slice_scatter",
        "split_with_sizes_copy",
        "stack",
        "unfold_copy",
        "upsample_bicubic2d",
        "upsample_bilinear2d",
        "upsample_nearest1d",
        "upsample_nearest2d",
        "upsample_nearest3d",
    }
)
ELEMENTWISE = frozenset(
    {
        "_native_batch_norm_legit_no_training",
        "_prelu_kernel",
        "_to_copy",
        "_unsafe_view",
        "celu",
        "celu_",
        "clone",
        "contiguous",
        "copy",
        "copy_",
        "cudnn_batch_norm",
        "dropout",
        "elu_",
        "fill_",
        "glu",
        "hardshrink",
        "hardsigmoid",
        "hardsigmoid_",
        "hardswish",
        "hardswish_",
        "hardtanh_",
        "leaky_relu_",
        "log_sigmoid_forward",
        "masked_fill_",
        "mish",
        "mish_",
        "native_batch_norm",
        "native_dropout",
        "prelu",
        "relu6",
        "relu6_",
        "rrelu_with_noise",
        "selu",
        "selu_",
        "softplus",
        "softshrink",
        "tril",
        "triu",
        "zero_",
    }
)
"""Besides those that PyTorch tags as point-wise."""


def ops_of(call: Call, tensor: TensorOf, name: str) -> tuple[Op, ...]:
    """The operations of a call, in order, named after `name`. Only what an unknown one writes besides its first output
    is an operation of its own."""
    if call.operator == ATTENTION:
        return _attention(call, tensor, name)
    reader = _READERS.get(call.name)
    op = None if reader is None else reader(call, tensor, name)
    if op is not None:
        return (op,)
    kind = _kind(call)
    first, *others = call.outputs if kind is OpKind.UNKNOWN else call.outputs[:1]
    inputs = tuple(dict.fromkeys(tensor(operand, None) for operand in _moved(call, kind)))
    ops = [Op(kind, name, inputs, tensor(first, None))]
    ops += [Op(kind, f"{name}.{index}", (), tensor(each, None)) for index, each in enumerate(others, 1)]
    return tuple(ops)


def is_elementwise(call: Call) -> bool:
    """Whether a call computes each element of its output from one of each operand, and so may be a part of the kernel
    that makes an operand."""
    if isinstance(call.operator, str):
        return False
    if call.name in ELEMENTWISE:
        return not (call.name == "native_batch_norm" and call.arguments.get("training"))
    return torch.Tag.pointwise in call.operator.tags


def _kind(call: Call) -> OpKind:
    if call.name in NORMS or (call.name == "native_batch_norm" and call.arguments.get("training")):
        return OpKind.NORM
    if call.name in SOFTMAXES:
        return OpKind.SOFTMAX
    if call.name in POOLS:
        return OpKind.POOL
    if call.name in COPIES:
        return OpKind.COPY
    return OpKind.ELEMENTWISE if is_elementwise(call) else OpKind.UNKNOWN


def _moved(call: Call, kind: OpKind) -> tuple[Operand, ...]:
    """What a call reads, but for the parameters of norms and element-wise functions, which are free like a bias; and
    for what it reads only to overwrite it."""
    operands = call.inputs
    if call.name in ("copy_", "zero_", "fill_"):
        operands = operands[1:]
    if kind in (OpKind.NORM, OpKind.ELEMENTWISE, OpKind.SOFTMAX):
        return tuple(operand for operand in operands if not operand.is_constant)
    return operands


def _convolution(call: Call, tensor: TensorOf, name: str) -> Op:
    arguments = call.arguments
    x, weight = arguments["input"], arguments["weight"]
    window = WINDOWS[len(weight.shape)]
    image, output = tensor(x, None), tensor(call.outputs[0], None)
    if arguments["transposed"]:
        channels = ("T", "K")  # as many inputs as there are, and the outputs of one group
        filters = Tensor(f"{name}.weight", dict(zip((*channels, *window), weight.shape, strict=True)), Role.WEIGHT)
        return Op(OpKind.TRANSPOSED_CONV, name, (image,), output, (filters,), max(arguments["stride"]))
    dims = dict(zip(("K", "T", *window), weight.shape, strict=True))
    if len(window) == 2:
        filters = Tensor(f"{name}.weight", {key: dims[key] for key in ("K", "T", "R", "S")}, Role.WEIGHT)
        stride = arguments["stride"][0]
        if _is_plain(image, filters, stride, output):
            return Op(OpKind.CONV, name, (image,), output, (filters,), stride)
    filters = Tensor(f"{name}.weight", dims, Role.WEIGHT)
    return Op(OpKind.GENERAL_CONV, name, (image,), output, (filters,), max(arguments["stride"]))


def _is_plain(image: Tensor, weight: Tensor, stride: int, output: Tensor) -> bool:
    """Whether a convolution is one that blocks are made of."""
    try:
        return output_dims(OpKind.CONV, "", (image,), (weight,), stride) == output.dims
    except ValueError:
        return False


def _product(left: str, right: str) -> Callable[[Call, TensorOf, str], Op | None]:
    """A reader of the product of the matrices `left` and `right`: a linear layer if the latter is constant."""

    def read(call: Call, tensor: TensorOf, name: str) -> Op | None:
        a, b = _batched(call.arguments[left]), _batched(call.arguments[right])
        if b.is_constant and b.shape[0] == 1 and a.size == prod(a.shape):
            channels, features = b.shape[1:]
            weight = Tensor(f"{name}.weight", {"K": features, "C": channels}, Role.WEIGHT)
            rows = _reshaped(a, (a.size // channels, channels))
            output = _reshaped(call.outputs[0], (rows.shape[0], features))
            return Op(OpKind.LINEAR, name, (tensor(rows, ("N", "C")),), tensor(output, ("N", "C")), (weight,))
        return _matmul(call, tensor, name, a, b)

    return read


def _matmul(call: Call, tensor: TensorOf, name: str, a: Operand, b: Operand) -> Op | None:
    """The product of two batches of matrices. One that is broadcast is moved once, and multiplied as a single one."""
    batch, rows, columns = _batched(call.outputs[0]).shape
    if batch > 1 and b.shape[0] == 1:
        batch, rows, a = 1, batch * rows, _reshaped(a, (1, batch * rows, a.shape[2]))
    elif batch > 1 and a.shape[0] == 1:
        batch, columns, b = 1, batch * columns, _reshaped(b, (1, b.shape[1], batch * columns))
    inner = a.shape[2]
    if a.shape != (batch, rows, inner) or b.shape != (batch, inner, columns):
        return None
    left = tensor(a, ("B", "M", "K"))
    right = tensor(_reshaped(b, (batch, columns, inner)), ("B", "N", "K"))
    output = tensor(_reshaped(call.outputs[0], (batch, rows, columns)), ("B", "M", "N"))
    return Op(OpKind.MATMUL, name, (left, right), output)


def _attention(call: Call, tensor: TensorOf, name: str) -> tuple[Op, ...]:
    """Both products of an attention and the softmax between them; a backend keeps the scores in local memory."""
    query, key, value = (call.arguments[each] for each in ("query", "key", "value"))
    (*batch, queries, channels), (*_, keys, _) = query.shape, key.shape
    size = prod(batch)
    heads = call.outputs[0].shape[-1]
    q, k, v = (
        tensor(_reshaped(operand, shape), ("B", letter, "K"))
        for operand, shape, letter in (
            (query, (size, queries, channels), "M"),
            (key, (size, keys, channels), "N"),
            (value, (size, heads, keys), "N"),
        )
    )
    scores = make_op(OpKind.MATMUL, f"{name}.scores", (q, k))
    weights = Op(
        OpKind.SOFTMAX,
        f"{name}.softmax",
        (scores.output,),
        Tensor(f"{name}.softmax.out", {"B": size, "M": queries, "K": keys}),
    )
    output = tensor(_reshaped(call.outputs[0], (size, queries, heads)), ("B", "M", "N"))
    return scores, weights, Op(OpKind.MATMUL, f"{name}.values", (weights.output, v), output)


def _multiply(call: Call, tensor: TensorOf, name: str) -> Op | None:
    """A gate of each channel: the product of images and of vectors that the network computes."""
    operands = [operand for operand in call.inputs if not operand.is_constant]
    if len(operands) != 2:
        return None
    image, gate = sorted(operands, key=lambda operand: -operand.size)
    if len(image.shape) != 4 or image.shape != call.outputs[0].shape or gate.size == image.size:
        return None
    batch, channels = image.shape[:2]
    if gate.shape != (batch, channels, 1, 1):
        return None
    inputs = tensor(image, None), tensor(_reshaped(gate, (batch, channels)), ("N", "C"))
    return Op(OpKind.MULTIPLY, name, inputs, tensor(call.outputs[0], None))


def _batched(operand: Operand) -> Operand:
    return operand if len(operand.shape) == 3 else _reshaped(operand, (1, *operand.shape))


def _reshaped(operand: Operand, shape: tuple[int, ...]) -> Operand:
    return Operand(operand.value, shape, operand.is_constant)


_READERS: Mapping[str, Callable[[Call, TensorOf, str], Op | None]] = {
    "convolution": _convolution,
    "mm": _product("self", "mat2"),
    "addmm": _product("mat1", "mat2"),
    "bmm": _product("self", "mat2"),
    "baddbmm": _product("batch1", "batch2"),
    "mul": _multiply,
    "mul_": _multiply,
}

"""What nodes of a graph compute: tables of operators, functions, methods and modules, and how each is read.

Three spellings of a network come out alike: the functions that a Dynamo backend is given, the operators of
`torch.export`, and the modules and functions of `torch.fx.symbolic_trace`. A reader has the signature of what it reads
and returns a layer, or None for what is no layer of a block in this form; arguments that it cannot take apart do not
make it fail (`read`).
"""

import builtins
import operator
from collections.abc import Callable, Sequence
from functools import cache, partial
from inspect import Signature, signature

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fusion.frontend.layers import (
    Activation,
    Add,
    Alias,
    BatchNorm,
    Concat,
    Conv,
    Expand,
    Flatten,
    GlobalPool,
    Index,
    Layer,
    Linear,
    Multiply,
    Operand,
    Pad,
    Query,
    Squeeze,
    Unsqueeze,
    View,
)

aten = torch.ops.aten

Reader = Callable[..., Layer | None]

WHOLE = torch.iinfo(torch.int64).max
"""The end of a slice that has none."""


class Unreadable(Exception):
    """An argument is not what the reader knows."""


def read(node: fx.Node, root: nn.Module) -> Layer | None:
    """The layer of a node in the graph of `root`; None if it is none that blocks are made of."""
    reader, args = _reader(node, root)
    if reader is None:
        return None
    try:
        bound = _signature(reader).bind(*args, **node.kwargs)
    except TypeError:
        return None
    try:
        layer = reader(*bound.args, **bound.kwargs)
    except Unreadable:
        return None
    return layer if layer is not None and isinstance(layer.x, fx.Node) else None


def _reader(node: fx.Node, root: nn.Module) -> tuple[Reader | None, tuple]:
    if node.op == "call_function":
        return FUNCTIONS.get(node.target) or FOREIGN_FUNCTIONS.get(_full_name(node.target)), node.args
    if node.op == "call_method":
        return METHODS.get(node.target), node.args
    if node.op == "call_module":
        module = module_of(node, root)
        return MODULES.get(type(module)), (module, *node.args)
    return None, ()


def module_of(node: fx.Node, root: nn.Module) -> nn.Module | None:
    """The module that a node calls; None if there is none of its name, or it has hooks, which would be lost."""
    try:
        module = root.get_submodule(node.target)
    except AttributeError:
        return None
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return None if any(hooks) else module


@cache
def _signature(reader: Reader) -> Signature:
    return signature(reader)


def _full_name(target: object) -> str:
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', '')}"


def _node(value: object) -> fx.Node:
    if not isinstance(value, fx.Node):
        raise Unreadable
    return value


def _int(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise Unreadable
    return value


def _bool(value: object) -> bool:
    if not isinstance(value, bool):
        raise Unreadable
    return value


def _number(value: object) -> float:
    """A number, or the node of one that is fixed: with dynamic shapes Dynamo takes epsilons from tensors."""
    if isinstance(value, fx.Node):
        value = value.meta.get("example_value", value.meta.get("val"))
    if isinstance(value, torch.SymFloat) and value.node.expr.is_number:
        return float(value.node.expr)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Unreadable
    return float(value)


def _ints(value: object) -> tuple[int, ...]:
    return tuple(map(_int, value)) if isinstance(value, Sequence) else (_int(value),)


def _pair(value: object) -> tuple[int, int]:
    values = _ints(value)
    if len(values) not in (1, 2):
        raise Unreadable
    return values[0], values[-1]


def _operand(value: object) -> Operand:
    if not isinstance(value, fx.Node | Tensor | None):
        raise Unreadable
    return value


def _sizes(sizes: tuple) -> tuple:
    """Sizes given one by one or as one sequence."""
    return tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], Sequence) else sizes


def _same_padding(dilation: tuple[int, int], weight: Operand) -> tuple[int, int]:
    """Of a convolution with padding="same", if it is the same on both sides."""
    shape = weight_shape(weight)
    if shape is None or len(shape) != 4:
        raise Unreadable
    total = [step * (size - 1) for step, size in zip(dilation, shape[2:], strict=True)]
    if any(each % 2 for each in total):
        raise Unreadable
    return total[0] // 2, total[1] // 2


def weight_shape(weight: Operand) -> tuple[int, ...] | None:
    """The sizes of a weight, by its metadata if it is a node; None if they are not known, or not constant."""
    tensor = weight
    if isinstance(weight, fx.Node):
        tensor = weight.meta.get("example_value", weight.meta.get("val"))
    if not isinstance(tensor, Tensor) or not all(type(size) is int for size in tensor.shape):
        return None
    return tuple(tensor.shape)


# Convolutions, linear layers and batch norms.


def _conv2d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, padding_mode="zeros"):
    stride, dilation, weight = _pair(stride), _pair(dilation), _operand(weight)
    if isinstance(padding, str):
        padding = {"valid": (0, 0), "same": None}.get(padding, padding) or _same_padding(dilation, weight)
    return Conv(_node(input), weight, _operand(bias), stride, _pair(padding), dilation, _int(groups), padding_mode)


def _convolution(input, weight, bias, stride, padding, dilation, transposed, output_padding, groups):
    if transposed or len(stride) != 2:
        return None
    return _conv2d(input, weight, bias, stride, padding, dilation, groups)


def _conv2d_module(module, input):
    return _conv2d(
        input,
        module.weight,
        module.bias,
        module.stride,
        module.padding,
        module.dilation,
        module.groups,
        module.padding_mode,
    )


def _linear(input, weight, bias=None):
    return Linear(_node(input), _operand(weight), _operand(bias))


def _linear_module(module, input):
    return _linear(input, module.weight, module.bias)


def _batch_norm(input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    operands = map(_operand, (running_mean, running_var, weight, bias))
    return BatchNorm(_node(input), *operands, _bool(training), _number(eps))


def _aten_batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps, cudnn_enabled):
    return _batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


def _batch_norm_module(module, input):
    training = module.training or module.running_mean is None
    return _batch_norm(
        input, module.running_mean, module.running_var, module.weight, module.bias, training, eps=module.eps
    )


# Activations.


def _activation(name: str, in_place: bool = False) -> Reader:
    def reader(input, *args, inplace=in_place, **kwargs):
        return Activation(_node(input), name, in_place or bool(inplace) or any(arg is True for arg in args))

    return reader


def _hardtanh(input, min_val=-1.0, max_val=1.0, inplace=False):
    name = "relu6" if (min_val, max_val) == (0, 6) else "hardtanh"
    return Activation(_node(input), name, bool(inplace))


def _gelu(input, *, approximate="none"):
    name = "gelu" if approximate == "none" else f"gelu_{approximate}"
    return Activation(_node(input), name)


def _activation_module(name: str) -> Reader:
    def reader(module, input):
        return Activation(_node(input), name, bool(getattr(module, "inplace", False)))

    return reader


def _hardtanh_module(module, input):
    return _hardtanh(input, module.min_val, module.max_val, module.inplace)


def _gelu_module(module, input):
    return _gelu(input, approximate=module.approximate)


# Pools, padding, concatenation, arithmetic.


def _mean(input, dim=None, keepdim=False, *, dtype=None):
    if dim is None or dtype is not None:
        return None
    if sorted(each % 4 for each in _ints(dim)) != [2, 3]:
        return None
    return GlobalPool(_node(input), _bool(keepdim))


def _adaptive_avg_pool2d(input, output_size):
    size = output_size if isinstance(output_size, Sequence) else [output_size]
    return GlobalPool(_node(input), True) if _ints(size) in ((1,), (1, 1)) else None


def _adaptive_avg_pool2d_module(module, input):
    return _adaptive_avg_pool2d(input, module.output_size)


def _pad(input, pad, mode="constant", value=None):
    sizes = _ints(pad)
    if len(sizes) != 4 or (mode == "constant" and value):
        return None
    return Pad(_node(input), sizes, mode)


def _constant_pad(input, pad, value=0):
    return _pad(input, pad, "constant", value)


def _reflection_pad(input, padding):
    return _pad(input, padding, "reflect")


def _reflection_pad_module(module, input):
    return _pad(input, module.padding, "reflect")


def _constant_pad_module(module, input):
    return _pad(input, module.padding, "constant", module.value)


def _cat(tensors, dim=0):
    if not isinstance(tensors, Sequence) or not tensors:
        return None
    nodes = tuple(map(_node, tensors))
    return Concat(nodes[0], nodes, _int(dim))


def _multiply(in_place: bool) -> Reader:
    def reader(input, other):
        if isinstance(input, int | float) and not in_place:
            input, other = other, input
        if not isinstance(other, fx.Node | int | float):
            return None
        return Multiply(_node(input), other, in_place)

    return reader


def _add(in_place: bool) -> Reader:
    def reader(input, other, *, alpha=1):
        return Add(_node(input), _node(other), in_place) if alpha == 1 else None

    return reader


# The same values, in the same or in another shape.


def _alias(input):
    return Alias(_node(input))


def _in_memory_format(input, *, memory_format=None):
    return Alias(_node(input))


def _slice(input, dim=0, start=None, end=None, step=1):
    is_whole = start in (None, 0) and (end is None or end == WHOLE) and step == 1
    return Alias(_node(input)) if is_whole else None


def _to(input, *, memory_format):
    return Alias(_node(input))


def _dropout(input, p=0.5, training=True, inplace=False):
    return Alias(_node(input)) if training is False else None


def _aten_dropout(input, p, train):
    return Alias(_node(input)) if train is False else None


def _dropout_module(module, input):
    return None if module.training else Alias(_node(input))


def _stochastic_depth(input, p, mode, training=True):
    return _dropout(input, p, training)


def _identity_module(module, input):
    return Alias(_node(input))


def _flatten(input, start_dim=0, end_dim=-1):
    return Flatten(_node(input), _int(start_dim), _int(end_dim))


def _flatten_module(module, input):
    return _flatten(input, module.start_dim, module.end_dim)


def _unsqueeze(input, dim):
    return Unsqueeze(_node(input), _int(dim))


def _squeeze(input, dim=None):
    return Squeeze(_node(input), None if dim is None else _ints(dim))


def _view(input, *sizes):
    sizes = _sizes(sizes)
    if not all(isinstance(size, fx.Node) or type(size) is int for size in sizes):
        return None
    return View(_node(input), sizes)


def _reshape(input, shape):
    return _view(input, shape)


def _expand(input, *sizes):
    return Expand(_node(input), _sizes(sizes))


def _expand_as(input, other):
    return Expand(_node(input), like=_node(other))


def _getitem(input, index):
    if type(index) is int:
        return Query(_node(input), index)
    items = index if isinstance(index, tuple) else (index,)
    is_whole = all(item is None or item is Ellipsis or item == slice(None) for item in items if not _is_node(item))
    return Index(_node(input), items) if is_whole and not any(map(_is_node, items)) else None


def _is_node(value: object) -> bool:
    return isinstance(value, fx.Node)


# What is no tensor.

ATTRIBUTES = {"device", "dtype", "is_cuda", "is_quantized", "is_sparse", "itemsize", "layout", "ndim", "requires_grad"}


def _getattr(input, name):
    if name == "shape":
        return Query(_node(input), is_shape=True)
    return Query(_node(input)) if name in ATTRIBUTES else None


def _size(input, dim=None):
    return Query(_node(input), is_shape=True) if dim is None else Query(_node(input), _int(dim))


def _question(input, *args, **kwargs):
    return Query(_node(input))


def _comparison(a, b):
    return Query(a if _is_node(a) else _node(b))


def _table(*rows: tuple[Reader, Sequence[object]]) -> dict[object, Reader]:
    return {target: reader for reader, targets in rows for target in targets}


FUNCTIONS = _table(
    (_conv2d, [torch.conv2d, F.conv2d, aten.conv2d.default, aten.conv2d.padding]),
    (_convolution, [aten.convolution.default]),
    (_linear, [F.linear, torch._C._nn.linear, aten.linear.default]),
    (_batch_norm, [F.batch_norm]),
    (_aten_batch_norm, [torch.batch_norm, aten.batch_norm.default]),
    (_activation("relu"), [F.relu, torch.relu, aten.relu.default]),
    (_activation("relu", in_place=True), [F.relu_, torch.relu_, aten.relu_.default]),
    (_activation("relu6"), [F.relu6, aten.relu6.default]),
    (_activation("relu6", in_place=True), [aten.relu6_.default]),
    (_activation("silu"), [F.silu, torch._C._nn.silu, aten.silu.default]),
    (_activation("silu", in_place=True), [torch._C._nn.silu_, aten.silu_.default]),
    (_activation("hardswish"), [F.hardswish, torch._C._nn.hardswish, aten.hardswish.default]),
    (_activation("hardswish", in_place=True), [torch._C._nn.hardswish_, aten.hardswish_.default]),
    (_activation("sigmoid"), [F.sigmoid, torch.sigmoid, torch.special.expit, aten.sigmoid.default]),
    (_activation("sigmoid", in_place=True), [torch.sigmoid_, aten.sigmoid_.default]),
    (_activation("hardsigmoid"), [F.hardsigmoid, torch._C._nn.hardsigmoid, aten.hardsigmoid.default]),
    (_activation("hardsigmoid", in_place=True), [torch._C._nn.hardsigmoid_, aten.hardsigmoid_.default]),
    (_activation("leaky_relu"), [F.leaky_relu, aten.leaky_relu.default]),
    (_activation("leaky_relu", in_place=True), [F.leaky_relu_, aten.leaky_relu_.default]),
    (_activation("elu"), [F.elu, aten.elu.default]),
    (_activation("elu", in_place=True), [F.elu_, aten.elu_.default]),
    (_activation("mish"), [F.mish, aten.mish.default]),
    (_activation("mish", in_place=True), [aten.mish_.default]),
    (_activation("tanh"), [F.tanh, torch.tanh, aten.tanh.default]),
    (_activation("tanh", in_place=True), [torch.tanh_, aten.tanh_.default]),
    (_hardtanh, [F.hardtanh, aten.hardtanh.default]),
    (partial(_hardtanh, inplace=True), [aten.hardtanh_.default]),
    (_gelu, [F.gelu, aten.gelu.default]),
    (_mean, [torch.mean, aten.mean.dim]),
    (
        _adaptive_avg_pool2d,
        [F.adaptive_avg_pool2d, torch._C._nn.adaptive_avg_pool2d, aten.adaptive_avg_pool2d.default],
    ),
    (_pad, [F.pad, torch._C._nn.pad, aten.pad.default]),
    (_constant_pad, [torch.constant_pad_nd, aten.constant_pad_nd.default]),
    (_reflection_pad, [aten.reflection_pad2d.default]),
    (_cat, [torch.cat, torch.concat, torch.concatenate, aten.cat.default]),
    (_multiply(False), [operator.mul, torch.mul, torch.multiply, aten.mul.Tensor, aten.mul.Scalar]),
    (_multiply(True), [operator.imul, aten.mul_.Tensor, aten.mul_.Scalar]),
    (_add(False), [operator.add, torch.add, aten.add.Tensor]),
    (_add(True), [operator.iadd, aten.add_.Tensor]),
    (_alias, [aten.alias.default, aten.detach.default, aten.detach_.default, torch.detach]),
    (_in_memory_format, [torch.clone, aten.clone.default, aten.contiguous.default]),
    (
        _dropout,
        [F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout],
    ),
    (
        _aten_dropout,
        [
            torch.dropout,
            torch.dropout_,
            torch.feature_dropout,
            aten.dropout.default,
            aten.dropout_.default,
            aten.feature_dropout.default,
            aten.feature_dropout_.default,
            aten.alpha_dropout.default,
            aten.feature_alpha_dropout.default,
        ],
    ),
    (_slice, [aten.slice.Tensor]),
    (_flatten, [torch.flatten, aten.flatten.using_ints]),
    (_unsqueeze, [torch.unsqueeze, aten.unsqueeze.default]),
    (_squeeze, [torch.squeeze, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims]),
    (_reshape, [torch.reshape, aten.reshape.default, aten.view.default, aten._unsafe_view.default]),
    (_expand, [aten.expand.default]),
    (_expand_as, [aten.expand_as.default]),
    (_getitem, [operator.getitem]),
    (_getattr, [builtins.getattr]),
    (_size, [aten.sym_size.int]),
    (_question, [torch._assert, torch.numel, aten._assert_tensor_metadata.default, aten.sym_numel.default]),
    (
        _comparison,
        [operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge, operator.floordiv],
    ),
)

FOREIGN_FUNCTIONS = {"torchvision.ops.stochastic_depth.stochastic_depth": _stochastic_depth}
"""By full name, of packages that need not be installed."""

METHODS = _table(
    (_activation("relu"), ["relu"]),
    (_activation("relu", in_place=True), ["relu_"]),
    (_activation("sigmoid"), ["sigmoid"]),
    (_activation("sigmoid", in_place=True), ["sigmoid_"]),
    (_activation("tanh"), ["tanh"]),
    (_activation("tanh", in_place=True), ["tanh_"]),
    (_mean, ["mean"]),
    (_multiply(False), ["mul", "multiply", "__mul__", "__rmul__"]),
    (_multiply(True), ["mul_", "multiply_", "__imul__"]),
    (_add(False), ["add", "__add__", "__radd__"]),
    (_add(True), ["add_", "__iadd__"]),
    (_alias, ["detach"]),
    (_in_memory_format, ["contiguous", "clone"]),
    (_to, ["to"]),
    (_flatten, ["flatten"]),
    (_unsqueeze, ["unsqueeze"]),
    (_squeeze, ["squeeze"]),
    (_view, ["view", "reshape"]),
    (_expand, ["expand"]),
    (_expand_as, ["expand_as"]),
    (_size, ["size"]),
    (_question, ["dim", "ndimension", "numel", "is_contiguous", "stride"]),
)

MODULES = _table(
    (_conv2d_module, [nn.Conv2d]),
    (_linear_module, [nn.Linear]),
    (_batch_norm_module, [nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm]),
    (_activation_module("relu"), [nn.ReLU]),
    (_activation_module("relu6"), [nn.ReLU6]),
    (_activation_module("silu"), [nn.SiLU]),
    (_activation_module("hardswish"), [nn.Hardswish]),
    (_activation_module("sigmoid"), [nn.Sigmoid]),
    (_activation_module("hardsigmoid"), [nn.Hardsigmoid]),
    (_activation_module("leaky_relu"), [nn.LeakyReLU]),
    (_activation_module("elu"), [nn.ELU]),
    (_activation_module("mish"), [nn.Mish]),
    (_activation_module("tanh"), [nn.Tanh]),
    (_hardtanh_module, [nn.Hardtanh]),
    (_gelu_module, [nn.GELU]),
    (_adaptive_avg_pool2d_module, [nn.AdaptiveAvgPool2d]),
    (_reflection_pad_module, [nn.ReflectionPad2d]),
    (_constant_pad_module, [nn.ZeroPad2d, nn.ConstantPad2d]),
    (_identity_module, [nn.Identity]),
    (
        _dropout_module,
        [nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout],
    ),
    (_flatten_module, [nn.Flatten]),
)

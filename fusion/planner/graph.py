"""A block of a network as a graph of tensor-machine operations (paper section 5.1): shapes only, no data.

Counting convention, the one place where it is written down. One multiply-accumulate is two OPs.

- a convolution costs ``2*N*H*W*K*T*R*S`` OPs with the H and W of its output; a linear layer ``2*N*K*C``;
- global average pooling costs one OP per input element, multiplying by a gate one OP per element;
- bias, (folded) batch norm, activations, residual add, blur-pool and concatenation are free. Every convolution and
  linear layer may have a bias; its K elements are not counted as traffic, so a graph does not list it.

Activations are NHWC (or NC once pooled), convolution weights KTRS with T the channels per group, linear weights KC.
Spatial operations pad by half their kernel, so an output has ``ceil(H / stride)`` rows.

Layers of other networks than the paper's may have any shape. There are kinds for those whose output cannot be told from
their operands (``GIVEN_OUTPUT_KINDS``); no kernel of this project runs them, but they are counted in the same way: a
general or transposed convolution as a convolution, a product of two activations ``2*B*M*N*K``, any pool one OP per
input element; norms, softmax, element-wise functions, copies and unknown operations are free.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

ELEMENT_SIZE = {"float16": 2, "bfloat16": 2, "float32": 4}

Dims = tuple[tuple[str, int], ...]


class Role(StrEnum):
    ACTIVATION = "activation"
    WEIGHT = "weight"


@dataclass(frozen=True)
class Tensor:
    """A named tensor with named dimensions, e.g. ``Tensor("x", {"N": 1, "H": 8, "W": 8, "C": 16})``.

    ``dims`` takes a mapping or (name, size) pairs, in memory order, and is stored as pairs. A tensor has no element
    type of its own: that is the graph's.
    """

    name: str
    dims: Dims
    role: Role = Role.ACTIVATION

    def __post_init__(self) -> None:
        dims = tuple(dict(self.dims).items())
        for dim, size in dims:
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"tensor {self.name!r}: dimension {dim} must be a positive integer, got {size!r}")
        object.__setattr__(self, "dims", dims)

    def __getitem__(self, dim: str) -> int:
        for name, size in self.dims:
            if name == dim:
                return size
        raise KeyError(f"tensor {self} has no dimension {dim!r}")

    @property
    def layout(self) -> str:
        """The dimensions' names in memory order, e.g. ``"NHWC"``."""
        return "".join(name for name, _ in self.dims)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(size for _, size in self.dims)

    def __str__(self) -> str:
        return f"{self.name}[{' '.join(f'{dim}={size}' for dim, size in self.dims)}]"


class OpKind(StrEnum):
    CONV = "conv"
    LINEAR = "linear"
    RELU = "relu"
    SILU = "silu"
    RELU6 = "relu6"
    GELU = "gelu"
    HARDSWISH = "hardswish"
    SIGMOID = "sigmoid"
    GLOBAL_AVERAGE_POOL = "global_average_pool"
    MULTIPLY = "multiply"
    ADD = "add"
    BLURPOOL = "blurpool"
    CONCAT = "concat"
    MATMUL = "matmul"
    GENERAL_CONV = "general conv"
    TRANSPOSED_CONV = "transposed conv"
    POOL = "pool"
    NORM = "norm"
    SOFTMAX = "softmax"
    ELEMENTWISE = "element-wise"
    COPY = "copy"
    UNKNOWN = "unknown"


GIVEN_OUTPUT_KINDS = (
    OpKind.GENERAL_CONV,
    OpKind.TRANSPOSED_CONV,
    OpKind.POOL,
    OpKind.NORM,
    OpKind.SOFTMAX,
    OpKind.ELEMENTWISE,
    OpKind.COPY,
    OpKind.UNKNOWN,
)
"""Kinds that take tensors of any layout, and whose output is what it is said to be."""

CONV_KINDS = (OpKind.CONV, OpKind.GENERAL_CONV, OpKind.TRANSPOSED_CONV)
"""Convolutions; the weight of each has dimensions K and T, and those of its window."""

ACTIVATION_KINDS = (OpKind.RELU, OpKind.SILU, OpKind.RELU6, OpKind.GELU, OpKind.HARDSWISH)
"""What may follow a convolution of a block; GELU is the exact one, by the error function."""


@dataclass(frozen=True)
class Op:
    """One operation. Kernel size, group width and groups of a convolution are those of its weight tensor.

    Raises ValueError when inputs, weights and output do not fit together.
    """

    kind: OpKind
    name: str
    inputs: tuple[Tensor, ...]
    output: Tensor
    weights: tuple[Tensor, ...] = ()
    stride: int = 1

    def __post_init__(self) -> None:
        if self.kind in GIVEN_OUTPUT_KINDS:
            _check_operands(self.kind, self.name, self.inputs, self.weights, self.stride)
            return
        expected = output_dims(self.kind, self.name, self.inputs, self.weights, self.stride)
        if self.output.dims != expected:
            raise ValueError(f"op {self.name!r} ({self.kind}): output is {self.output}, its inputs give {expected}")

    @property
    def ops_count(self) -> int:
        """Arithmetic operations, in OPs."""
        return _RULES[self.kind].ops_count(self)

    @property
    def kernel_size(self) -> int:
        """Side R = S of a convolution's square filter."""
        return self.weights[0]["R"]

    @property
    def group_width(self) -> int:
        """Input channels per group T: 1 is depth-wise, all the channels is dense."""
        return self.weights[0]["T"]

    @property
    def is_dense(self) -> bool:
        """Whether every output channel depends on every input channel (a linear layer, an ungrouped convolution)."""
        if self.kind in CONV_KINDS:
            return self.group_width == self.inputs[0]["C"]
        return self.kind is OpKind.LINEAR

    @property
    def is_pointwise(self) -> bool:
        """Whether this is the tensor machine's channels-mode product: a dense 1x1 convolution of stride 1."""
        return self.kind is OpKind.CONV and self.is_dense and self.kernel_size == 1 and self.stride == 1

    @property
    def is_spatial_conv(self) -> bool:
        """Whether this is a convolution that looks at more than one pixel."""
        return self.kind is OpKind.CONV and self.kernel_size > 1

    def __str__(self) -> str:
        attributes = ""
        if self.kind is OpKind.CONV:
            attributes = f" {self.kernel_size}x{self.kernel_size}"
            attributes += ", dense" if self.is_dense else f", group width {self.group_width}"
        if self.stride > 1:
            attributes += f", stride {self.stride}"
        operands = ", ".join(tensor.name for tensor in (*self.inputs, *self.weights))
        return f"{self.name}: {self.kind}{attributes} ({operands}) -> {self.output}"


@dataclass(frozen=True)
class BlockGraph:
    """Operations in execution order, from ``inputs`` to ``outputs``; every tensor has ``dtype`` elements.

    Raises ValueError when an op consumes a tensor that nothing before it produced, a name is used twice, an output is
    never produced, or the dtype is not one of ``ELEMENT_SIZE``.
    """

    name: str
    ops: tuple[Op, ...]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    dtype: str = "float16"

    def __post_init__(self) -> None:
        if self.dtype not in ELEMENT_SIZE:
            raise ValueError(f"graph {self.name!r}: dtype {self.dtype!r} is not supported, use {_names(ELEMENT_SIZE)}")
        if not self.ops:
            raise ValueError(f"graph {self.name!r} has no ops")
        available: dict[str, Tensor] = {}
        op_names: set[str] = set()
        for tensor in self.inputs:
            self._define(tensor, available)
        for op in self.ops:
            if op.name in op_names:
                raise ValueError(f"graph {self.name!r}: two ops are named {op.name!r}, names must be unique")
            op_names.add(op.name)
            for tensor in op.inputs:
                if available.get(tensor.name) != tensor:
                    raise ValueError(
                        f"graph {self.name!r}: op {op.name!r} consumes {tensor}, which is neither an input nor the "
                        "output of an earlier op; list the ops in execution order"
                    )
            for tensor in (*op.weights, op.output):
                self._define(tensor, available)
        for tensor in self.outputs:
            if available.get(tensor.name) != tensor:
                raise ValueError(f"graph {self.name!r}: output {tensor} is never produced")

    def _define(self, tensor: Tensor, available: dict[str, Tensor]) -> None:
        if tensor.name in available:
            raise ValueError(f"graph {self.name!r}: two tensors are named {tensor.name!r}, names must be unique")
        available[tensor.name] = tensor

    @property
    def element_size(self) -> int:
        """Bytes per element."""
        return ELEMENT_SIZE[self.dtype]

    @property
    def ops_count(self) -> int:
        """Arithmetic operations of the whole block, in OPs."""
        return sum(op.ops_count for op in self.ops)

    def op(self, name: str) -> Op:
        """The op of this name. Raises KeyError."""
        for op in self.ops:
            if op.name == name:
                return op
        raise KeyError(f"graph {self.name!r} has no op {name!r}, it has {_names(op.name for op in self.ops)}")

    def producer(self, tensor: Tensor) -> Op | None:
        """The op whose output ``tensor`` is; None for an input or a weight."""
        return next((op for op in self.ops if op.output == tensor), None)

    def consumers(self, tensor: Tensor) -> tuple[Op, ...]:
        """The ops that read ``tensor``, in execution order."""
        return tuple(op for op in self.ops if tensor in op.inputs or tensor in op.weights)

    def weights(self) -> tuple[Tensor, ...]:
        """All weight tensors, in execution order."""
        return tuple(weight for op in self.ops for weight in op.weights)

    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors: inputs, then each op's weights and output."""
        return (*self.inputs, *(tensor for op in self.ops for tensor in (*op.weights, op.output)))

    def __str__(self) -> str:
        return "\n".join([f"{self.name} ({self.dtype})", *(f"  {op}" for op in self.ops)])


def make_op(
    kind: OpKind, name: str, inputs: tuple[Tensor, ...], weights: tuple[Tensor, ...] = (), stride: int = 1
) -> Op:
    """An op whose output, named ``<name>.out``, has the shape that its inputs and weights give."""
    output = Tensor(f"{name}.out", output_dims(kind, name, inputs, weights, stride))
    return Op(kind, name, inputs, output, weights, stride)


def output_dims(
    kind: OpKind, name: str, inputs: tuple[Tensor, ...], weights: tuple[Tensor, ...] = (), stride: int = 1
) -> Dims:
    """Shape of the output of an op of this kind, which is none of ``GIVEN_OUTPUT_KINDS``.

    Raises ValueError when the operands do not suit the kind.
    """
    _check_operands(kind, name, inputs, weights, stride)
    return tuple(_RULES[kind].output(inputs, weights, stride).items())


def _check_operands(
    kind: OpKind, name: str, inputs: tuple[Tensor, ...], weights: tuple[Tensor, ...], stride: int
) -> None:
    rule = _RULES[kind]
    layouts = tuple(tensor.layout for tensor in inputs)
    weight_layouts = tuple(tensor.layout for tensor in weights)
    roles_fit = all(t.role is Role.ACTIVATION for t in inputs) and all(t.role is Role.WEIGHT for t in weights)
    weights_fit = rule.weight_layouts is None or weight_layouts == rule.weight_layouts
    if not (rule.accepts(layouts) and weights_fit and roles_fit):
        raise ValueError(
            f"op {name!r} ({kind}): cannot take inputs {layouts} and weights {weight_layouts}; it takes "
            f"{rule.operands} and weights {'of any layout' if rule.weight_layouts is None else rule.weight_layouts}"
        )
    if stride < 1 or (stride > 1 and not rule.strided):
        raise ValueError(f"op {name!r} ({kind}): stride {stride} is not supported")
    problem = rule.check(inputs, weights)
    if problem:
        raise ValueError(f"op {name!r} ({kind}): {problem}")


@dataclass(frozen=True)
class _Rule:
    """What an op kind accepts, the shape it produces (None if that is given) and what it costs."""

    operands: str
    accepts: Callable[[tuple[str, ...]], bool]
    output: Callable[[tuple[Tensor, ...], tuple[Tensor, ...], int], Mapping[str, int]] | None
    ops_count: Callable[[Op], int] = lambda op: 0
    check: Callable[[tuple[Tensor, ...], tuple[Tensor, ...]], str | None] = lambda inputs, weights: None
    weight_layouts: tuple[str, ...] | None = ()
    strided: bool = False


def _check_conv(inputs: tuple[Tensor, ...], weights: tuple[Tensor, ...]) -> str | None:
    (x,), (weight,) = inputs, weights
    if weight["R"] != weight["S"] or weight["R"] % 2 == 0:
        return f"the filter must be square and odd-sized, got {weight['R']}x{weight['S']}"
    if x["C"] % weight["T"] or weight["K"] % (x["C"] // weight["T"]):
        return f"group width {weight['T']} does not divide {x['C']} input and {weight['K']} output channels into groups"
    return None


def _check_linear(inputs: tuple[Tensor, ...], weights: tuple[Tensor, ...]) -> str | None:
    (x,), (weight,) = inputs, weights
    return None if x["C"] == weight["C"] else f"{x} and {weight} differ in C"


def _check_gate(inputs: tuple[Tensor, ...], weights: tuple[Tensor, ...]) -> str | None:
    x, gate = inputs
    return None if (x["N"], x["C"]) == (gate["N"], gate["C"]) else f"{x} and its gate {gate} differ in N or C"


def _check_add(inputs: tuple[Tensor, ...], weights: tuple[Tensor, ...]) -> str | None:
    a, b = inputs
    return None if a.dims == b.dims else f"{a} and {b} differ in shape"


def _check_concat(inputs: tuple[Tensor, ...], weights: tuple[Tensor, ...]) -> str | None:
    pixels = {tensor.dims[:-1] for tensor in inputs}
    return None if len(pixels) == 1 else "the inputs must agree in N, H and W"


def _check_matmul(inputs: tuple[Tensor, ...], weights: tuple[Tensor, ...]) -> str | None:
    a, b = inputs
    return None if (a["B"], a["K"]) == (b["B"], b["K"]) else f"{a} and {b} differ in B or K"


def _check_any_conv(inputs: tuple[Tensor, ...], weights: tuple[Tensor, ...]) -> str | None:
    return None if {"K", "T"} <= set(dict(weights[0].dims)) else f"its weight {weights[0]} must have dimensions K and T"


def _strided_dims(x: Tensor, stride: int, channels: int) -> Mapping[str, int]:
    return {"N": x["N"], "H": -(-x["H"] // stride), "W": -(-x["W"] // stride), "C": channels}


_ELEMENTWISE = _Rule(
    "one tensor", lambda layouts: len(layouts) == 1, lambda inputs, weights, stride: dict(inputs[0].dims)
)

_ANY = _Rule("any tensors", lambda layouts: True, None, weight_layouts=None)
_ANY_CONV = replace(_ANY, operands="one tensor", accepts=lambda layouts: len(layouts) == 1, check=_check_any_conv)

_RULES: Mapping[OpKind, _Rule] = {
    OpKind.CONV: _Rule(
        "one NHWC tensor",
        lambda layouts: layouts == ("NHWC",),
        lambda inputs, weights, stride: _strided_dims(inputs[0], stride, weights[0]["K"]),
        lambda op: 2 * (op.output.size // op.output["C"]) * op.weights[0].size,
        _check_conv,
        weight_layouts=("KTRS",),
        strided=True,
    ),
    OpKind.LINEAR: _Rule(
        "one NC tensor",
        lambda layouts: layouts == ("NC",),
        lambda inputs, weights, stride: {"N": inputs[0]["N"], "C": weights[0]["K"]},
        lambda op: 2 * op.output["N"] * op.weights[0].size,
        _check_linear,
        weight_layouts=("KC",),
    ),
    **dict.fromkeys(ACTIVATION_KINDS, _ELEMENTWISE),
    OpKind.SIGMOID: _ELEMENTWISE,
    OpKind.GLOBAL_AVERAGE_POOL: _Rule(
        "one NHWC tensor",
        lambda layouts: layouts == ("NHWC",),
        lambda inputs, weights, stride: {"N": inputs[0]["N"], "C": inputs[0]["C"]},
        lambda op: op.inputs[0].size,
    ),
    OpKind.MULTIPLY: _Rule(
        "an NHWC tensor and its NC gate",
        lambda layouts: layouts == ("NHWC", "NC"),
        lambda inputs, weights, stride: dict(inputs[0].dims),
        lambda op: op.output.size,
        _check_gate,
    ),
    OpKind.ADD: _Rule(
        "two tensors of one shape",
        lambda layouts: len(layouts) == 2,
        lambda inputs, weights, stride: dict(inputs[0].dims),
        check=_check_add,
    ),
    OpKind.BLURPOOL: _Rule(
        "one NHWC tensor",
        lambda layouts: layouts == ("NHWC",),
        lambda inputs, weights, stride: _strided_dims(inputs[0], stride, inputs[0]["C"]),
        strided=True,
    ),
    OpKind.CONCAT: _Rule(
        "two or more NHWC tensors",
        lambda layouts: len(layouts) >= 2 and set(layouts) == {"NHWC"},
        lambda inputs, weights, stride: {**dict(inputs[0].dims), "C": sum(tensor["C"] for tensor in inputs)},
        check=_check_concat,
    ),
    OpKind.MATMUL: _Rule(
        "tensors BMK and BNK",
        lambda layouts: layouts == ("BMK", "BNK"),
        lambda inputs, weights, stride: {"B": inputs[0]["B"], "M": inputs[0]["M"], "N": inputs[1]["N"]},
        lambda op: 2 * op.output.size * op.inputs[0]["K"],
        _check_matmul,
    ),
    OpKind.GENERAL_CONV: replace(
        _ANY_CONV, strided=True, ops_count=lambda op: 2 * (op.output.size // op.output["C"]) * op.weights[0].size
    ),
    OpKind.TRANSPOSED_CONV: replace(
        _ANY_CONV, strided=True, ops_count=lambda op: 2 * (op.inputs[0].size // op.inputs[0]["C"]) * op.weights[0].size
    ),
    OpKind.POOL: replace(_ANY, strided=True, ops_count=lambda op: op.inputs[0].size),
    **dict.fromkeys((OpKind.NORM, OpKind.SOFTMAX, OpKind.ELEMENTWISE, OpKind.COPY, OpKind.UNKNOWN), _ANY),
}


def _names(names: Iterable[str]) -> str:
    return ", ".join(names)

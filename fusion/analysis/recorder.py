"""What a network calls while it runs on the meta device: ATen operators, and which values they read and write.

A value is what a storage holds between two writes to it, so that views and in-place operators are told from data that
moves. Nothing is computed: only shapes are looked at.
"""

from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ATTENTION = "scaled_dot_product_attention"
"""The name of the one call that is recorded whole: backends run it as one kernel, ATen on this device as several."""


@dataclass(frozen=True)
class Value:
    """What a storage holds after its `version`-th write; 0 is what it held when it was first seen."""

    storage: int
    version: int


@dataclass(frozen=True)
class Operand:
    """A value as an operator reads or writes it: sizes of the view, where what is broadcast has size 1.

    `is_constant` says that it depends on no input of the network: a parameter, a buffer, or computed of such.
    """

    value: Value
    shape: tuple[int, ...]
    is_constant: bool = False

    @property
    def size(self) -> int:
        """Number of elements that are moved."""
        return prod(self.shape)


@dataclass(frozen=True)
class Call:
    """An operator, such as `torch.ops.aten.convolution.default`, or `ATTENTION`, that reads data of the network.

    `arguments` are the call's by name, with an `Operand` for each tensor. `path` is the module that made it, `node` the
    graph's node, if it is one of a graph.
    """

    operator: torch._ops.OpOverload | str
    arguments: dict[str, object]
    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    path: str
    node: fx.Node | None

    @property
    def name(self) -> str:
        """The operator's name without namespace and overload, such as "convolution"."""
        if isinstance(self.operator, str):
            return self.operator
        return self.operator.name().split("::")[-1].split(".")[0]


class Recorder(TorchDispatchMode):
    """Records calls while it is entered, see `recording`; `constants` are the network's parameters and buffers."""

    def __init__(self, constants: Iterable[Tensor]):
        super().__init__()
        self.calls: list[Call] = []
        self.path: Callable[[], str] = lambda: ""
        self.node: fx.Node | None = None
        self._versions: dict[int, int] = {}
        self._padded: dict[Value, tuple[Operand, tuple[int, ...]]] = {}
        self._constants = {Value(_storage(tensor), 0) for tensor in constants}
        self._alive: list[Tensor] = []  # so that no storage takes the place of another one

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        arguments = _named(operator._schema.arguments, args, kwargs)
        operands = {name: self._read(value) for name, value in arguments.items()}
        written = [
            arguments[argument.name]
            for argument in operator._schema.arguments
            if argument.is_write and isinstance(arguments.get(argument.name), Tensor)
        ]
        out = operator(*args, **kwargs)
        if operator._schema.name not in VIEWS_IN_PLACE:
            sources = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
            self.record(operator, operands, sources, written, out)
        return out

    def record(
        self,
        operator: torch._ops.OpOverload | str,
        operands: dict[str, object],
        sources: list[Tensor],
        written: list[Tensor],
        out: object,
    ) -> None:
        """Note a call by its operands, of the tensors `sources`; those that are `written` it changes in place."""
        inputs = tuple(leaf for leaf in tree_leaves(operands) if isinstance(leaf, Operand))
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self._alive += results
        known = {_storage(tensor) for tensor in sources}
        fresh = [tensor for tensor in results if _storage(tensor) not in known]
        if not fresh and not written:
            return  # a view, or a question
        # A call without operands that change makes a constant: a mask, a table, a folded weight.
        is_constant = all(operand.is_constant for operand in inputs)
        outputs = tuple(self._write(tensor, is_constant) for tensor in (*written, *fresh) if tensor.numel())
        if is_constant or not outputs:
            return
        call = Call(operator, operands, inputs, outputs, self.path(), self.node)
        if call.name in PADS and not written:
            # Where a kernel reads beyond the border is its own affair: it moves what is there.
            self._padded[outputs[0].value] = inputs[0], outputs[0].shape
            return
        self.calls.append(call)

    def operand(self, tensor: Tensor) -> Operand:
        """A tensor as it is now."""
        storage = _storage(tensor)
        value = Value(storage, self._versions.setdefault(storage, 0))
        self._alive.append(tensor)
        shape = tuple(
            1 if stride == 0 and size > 1 else size for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        )
        if value in self._padded:
            source, padded = self._padded[value]
            return source if shape == padded else Operand(source.value, shape)
        return Operand(value, shape, value in self._constants)

    def _read(self, value: object) -> object:
        if isinstance(value, Tensor):
            return self.operand(value)
        if isinstance(value, list | tuple):
            return [self._read(item) for item in value]
        return value

    def _write(self, tensor: Tensor, is_constant: bool) -> Operand:
        storage = _storage(tensor)
        self._versions[storage] = self._versions.get(storage, -1) + 1
        if is_constant:
            self._constants.add(Value(storage, self._versions[storage]))
        return self.operand(tensor)


class _WholeAttention(TorchFunctionMode):
    """Hands attention to the recorder as one call; what it is made of on this device is not recorded."""

    def __init__(self, recorder: Recorder):
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is not torch.nn.functional.scaled_dot_product_attention:
            return function(*args, **kwargs)
        names = ("query", "key", "value", "attn_mask")
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        operands = {
            name: self._recorder.operand(arguments[name]) for name in names if isinstance(arguments.get(name), Tensor)
        }
        with torch.utils._python_dispatch._disable_current_modes():
            out = function(*args, **kwargs)
        self._recorder.record(ATTENTION, operands, [], [], out)
        return out


@contextmanager
def recording(recorder: Recorder):
    """Record what is called meanwhile."""
    with torch.no_grad(), _WholeAttention(recorder), recorder:
        yield


VIEWS_IN_PLACE = frozenset(
    f"aten::{name}_" for name in ("as_strided", "t", "transpose", "squeeze", "unsqueeze", "swapaxes", "detach")
)
"""Operators that change what a tensor looks at, and no data, though their schemas say that they write."""

PADS = frozenset(f"{kind}_pad{dims}" for kind in ("reflection", "replication") for dims in ("1d", "2d", "3d")) | {
    "constant_pad_nd"
}


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _named(schema_arguments, args: tuple, kwargs: dict) -> dict[str, object]:
    named = {argument.name: value for argument, value in zip(schema_arguments, args, strict=False)}
    defaults = {argument.name: argument.default_value for argument in schema_arguments if argument.has_default_value()}
    return {**defaults, **named, **kwargs}

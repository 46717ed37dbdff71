"""A network as the calls that it makes on an input, and the blocks in it, from shapes alone.

The network is copied to the meta device, which holds no values, and Dynamo makes one graph of it. In that graph the
blocks are found that `torch.compile` would be given; the graph is run to see its calls. A network that is no single
graph is run as it is, and no blocks are looked for.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._pytree import tree_leaves, tree_map

from fusion.analysis.recorder import Call, Recorder, Value, recording
from fusion.backend.compiled_once import compiled_for_once, fresh_function
from fusion.backend.graph_copy import copy_graph, model_tensors
from fusion.frontend.find import Findings, find_blocks
from fusion.frontend.layer_graph import BLUR_FILTER
from fusion.frontend.names import module_path


@dataclass(frozen=True)
class Captured:
    """The calls of a network, in order, the values that it returns, and its blocks.

    `why_no_blocks` says why no blocks were looked for; empty if they were.
    """

    calls: tuple[Call, ...]
    results: tuple[Value, ...]
    findings: Findings
    why_no_blocks: str = ""


def capture(model: nn.Module, args: tuple, kwargs: Mapping[str, object]) -> Captured:
    """Capture a network in eval mode on these arguments. Nothing is computed, and `model` stays as it is.

    Raises what the model itself raises, on the meta device.
    """
    stand_in, buffers = _meta_copy(model)
    args, kwargs = tree_map(_to_meta, (args, dict(kwargs)))
    try:
        graph_module, inputs = _graph(stand_in, args, kwargs)
    except Exception as error:  # whatever Dynamo cannot trace; the network may run without it
        captured = _run(stand_in, args, kwargs)
        return Captured(*captured, Findings((), ()), f"it is no single graph ({_first_line(error)})")
    return _run_graph(graph_module, inputs, buffers)


def _graph(model: nn.Module, args: tuple, kwargs: dict) -> tuple[fx.GraphModule, Sequence[object]]:
    """The one graph of a network, and the inputs that it is called with."""
    graphs: list[tuple[fx.GraphModule, Sequence[object]]] = []

    def keep(graph_module: fx.GraphModule, inputs: Sequence[object]) -> Callable:
        graphs.append((copy_graph(graph_module), inputs))
        return graph_module.forward

    with torch.no_grad(), compiled_for_once():
        call = torch.compile(fresh_function(_call), backend=keep, fullgraph=True, dynamic=False)
        call(model, args, kwargs)
    ((graph_module, inputs),) = graphs  # none if the network computes nothing
    return graph_module, inputs


def _run_graph(graph_module: fx.GraphModule, inputs: Sequence[object], buffers: Mapping[int, Tensor]) -> Captured:
    tensors = model_tensors(graph_module, inputs)
    findings = find_blocks(graph_module, {node: _with_values(each, buffers) for node, each in tensors.items()})
    recorder = Recorder(tensors.values())
    interpreter = _Interpreter(graph_module, recorder)
    with recording(recorder):
        out = interpreter.run(*inputs)
    return Captured(tuple(recorder.calls), _values(recorder, out), findings)


def _run(model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple[Call, ...], tuple[Value, ...]]:
    """The calls of a network that runs as it is, and the values that it returns."""
    recorder = Recorder((*model.parameters(), *model.buffers()))
    names = {module: name for name, module in model.named_modules()}
    stack: list[str] = [""]
    recorder.path = lambda: stack[-1]

    def enter(module: nn.Module, _: object) -> None:
        stack.append(names.get(module, stack[-1]))

    def leave(*_: object) -> None:  # what a hook returns would take the place of the output
        stack.pop()

    with ExitStack() as hooks:
        for handle in (register_module_forward_pre_hook(enter), register_module_forward_hook(leave)):
            hooks.callback(handle.remove)
        with recording(recorder):
            out = model(*args, **kwargs)
    return tuple(recorder.calls), _values(recorder, out)


def _call(model: nn.Module, args: tuple, kwargs: dict) -> object:
    return model(*args, **kwargs)


def _values(recorder: Recorder, out: object) -> tuple[Value, ...]:
    return tuple(recorder.operand(leaf).value for leaf in tree_leaves(out) if isinstance(leaf, Tensor))


def _meta_copy(model: nn.Module) -> tuple[nn.Module, dict[int, Tensor]]:
    """A copy of a network without values, and the buffers that have some, by the identity of what stands for them."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    stand_ins = {key: _to_meta(tensor) for key, tensor in tensors.items()}
    copied = copy.deepcopy(model, dict(stand_ins))
    buffers = {
        id(stand_ins[key]): tensor
        for key, tensor in tensors.items()
        if not isinstance(tensor, nn.Parameter) and not tensor.is_meta
    }
    return copied.requires_grad_(False), buffers


def _to_meta(value: object) -> object:
    if not isinstance(value, Tensor):
        return value
    empty = torch.empty_like(value, device="meta", requires_grad=False)
    return nn.Parameter(empty, requires_grad=False) if isinstance(value, nn.Parameter) else empty


def _with_values(tensor: Tensor, buffers: Mapping[int, Tensor]) -> Tensor:
    """What stands for a parameter or buffer where blocks are looked for: shapes matter there, and the filters of
    blur-pools, which are buffers. One that has no values is taken for such a filter if it has its shape."""
    if id(tensor) in buffers:
        return buffers[id(tensor)]
    if not isinstance(tensor, nn.Parameter) and tensor.shape[1:] == (1, *BLUR_FILTER.shape):
        return BLUR_FILTER.expand(tensor.shape)
    return torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class _Interpreter(fx.Interpreter):
    """Tells the recorder which node runs."""

    def __init__(self, graph_module: fx.GraphModule, recorder: Recorder):
        super().__init__(graph_module)
        self._recorder = recorder
        recorder.path = lambda: "" if recorder.node is None else module_path(recorder.node)

    def run_node(self, node: fx.Node) -> object:
        self._recorder.node = node
        return super().run_node(node)

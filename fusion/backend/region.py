"""A block of a graph as a module of its own, as the model runs it: to be measured, and compared with."""

from collections.abc import Callable, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, fx, nn

from fusion.frontend.find import FoundBlock
from fusion.launch_record import InputKind

SYMBOLIC = torch.SymInt | torch.SymFloat


def concrete(number: int | float | SYMBOLIC) -> int | float:
    """A number, or the hint of a symbolic one: that of the input at hand."""
    return number.node.hint if isinstance(number, SYMBOLIC) else number


def input_kind(found: FoundBlock) -> InputKind:
    """What a block takes: shape, the dtype that it computes in, device."""
    x, out = found.input.meta["example_value"], found.output.meta["example_value"]
    return InputKind(tuple(map(concrete, x.shape)), out.dtype, x.device)


def region_of(graph_module: fx.GraphModule, found: FoundBlock, constants: Mapping[fx.Node, Tensor]) -> fx.GraphModule:
    """The nodes of a block as a module of one input, with the model's own weights.

    Raises ValueError if the nodes take anything else than the block's input, constants and numbers.
    """
    root = nn.Module()
    graph = fx.Graph()
    copies = {found.input: graph.placeholder("x")}

    def argument(node: fx.Node) -> object:
        if node in copies:
            return copies[node]
        if node in constants:
            if not hasattr(root, node.name):
                root.register_buffer(node.name, constants[node].detach())
            copies[node] = graph.get_attr(node.name)
            return copies[node]
        value = node.meta.get("example_value")
        if isinstance(value, int | float | SYMBOLIC):
            return concrete(value)
        raise ValueError(f"it takes {node.name!r} besides its input")

    for node in found.nodes:
        # Arguments first: what they add to the graph has to stand ahead of the node.
        arguments = {each: argument(each) for each in node.all_input_nodes}
        if node.op == "call_module":
            root.add_module(node.name, graph_module.get_submodule(node.target))
            copies[node] = graph.call_module(
                node.name, fx.map_arg(node.args, arguments.get), fx.map_arg(node.kwargs, arguments.get)
            )
        else:
            copies[node] = graph.node_copy(node, arguments.get)
    graph.output(copies[found.output])
    return fx.GraphModule(root, graph)


@contextmanager
def as_in_model(kind: InputKind):
    """No gradients, and autocast to the dtype of `kind`: what is in it already stays as it is."""
    with torch.no_grad(), torch.autocast(kind.device.type, kind.dtype):
        yield


def convolutions(region: fx.GraphModule, x: Tensor) -> list[Callable[[], Tensor]]:
    """The convolutions and linear layers of a region at input `x`, each as a call on random inputs, channels_last."""
    recorder = _Recorder(region)
    recorder.run(x)
    return recorder.calls


class _Recorder(fx.Interpreter):
    """Runs a region and keeps a call of each convolution and linear layer in it."""

    FUNCTIONS = (torch.conv2d, torch.nn.functional.linear, torch.nn.functional.conv2d)

    def __init__(self, region: fx.GraphModule):
        super().__init__(region)
        self.calls: list[Callable[[], Tensor]] = []

    def call_function(self, target, args, kwargs):
        if target in self.FUNCTIONS:
            x, weight, *rest = args
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = (_random_like(each, dtype) for each in (x, weight))
            rest = [each.to(dtype) if isinstance(each, Tensor) else each for each in rest]
            self.calls.append(lambda: target(x, weight, *rest, **kwargs))
        return super().call_function(target, args, kwargs)


def _random_like(x: Tensor, dtype: torch.dtype) -> Tensor:
    like = torch.randn_like(x, dtype=dtype)
    return like.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else like

"""Graphs of modules in three spellings, and blocks in them replaced by their twins."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from fusion.frontend.find import Findings, find_blocks
from fusion.reference import relative_error

TOLERANCE = 1e-6
"""Relative error of a twin in float64: its biases are rounded to fp32."""


@dataclass
class Graph:
    """A model's graph, the tensors that its nodes stand for, and how to run such a graph on an input."""

    module: fx.GraphModule
    constants: dict[fx.Node, Tensor]
    run: Callable[[fx.GraphModule, Tensor], object]


def dynamo_graph(model: nn.Module, x: Tensor, **options) -> Graph:
    """What a backend of torch.compile is given."""
    calls = []

    def backend(module, inputs):
        calls.append((module, inputs))
        return module

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True, **options)(x.clone())
    ((module, inputs),) = calls
    own = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    values = list(zip(placeholders, inputs, strict=True))
    constants = {node: value for node, value in values if isinstance(value, Tensor) and value.data_ptr() in own}

    def run(module, other):
        is_input = [isinstance(value, Tensor) and value.shape == x.shape for value in inputs]
        return module(*(other if mine else value for mine, value in zip(is_input, inputs, strict=True)))

    return Graph(module, constants | attributes(module), run)


def exported_graph(model: nn.Module, x: Tensor, **options) -> Graph:
    """The module of an exported program."""
    with torch.no_grad():
        module = torch.export.export(model, (x.clone(),), **options).module()
    return Graph(module, attributes(module), lambda module, x: module(x))


def symbolic_graph(model: nn.Module, x: Tensor, metadata: bool = True) -> Graph:
    """A symbolic trace, of which nothing is known about shapes."""
    module = fx.symbolic_trace(model)
    if not metadata:
        for node in module.graph.nodes:
            node.meta.clear()
    return Graph(module, attributes(module), lambda module, x: module(x))


SPELLINGS = {"dynamo": dynamo_graph, "export": exported_graph, "symbolic": symbolic_graph}


def attributes(module: fx.GraphModule) -> dict[fx.Node, Tensor]:
    """Tensors of get_attr nodes."""
    found = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            owner, _, name = node.target.rpartition(".")
            value = getattr(module.get_submodule(owner), name)
            if isinstance(value, Tensor):
                found[node] = value
    return found


def find(graph: Graph) -> Findings:
    """The findings in a graph, which stays as it is."""
    before = str(graph.module.graph)
    findings = find_blocks(graph.module, graph.constants)
    assert str(graph.module.graph) == before
    position = {node: index for index, node in enumerate(graph.module.graph.nodes)}
    taken = set()
    for block in findings.found:
        inside = set(block.nodes)
        assert taken.isdisjoint(inside) and block.input not in inside and block.output in inside
        assert all(node.op not in ("placeholder", "get_attr", "output") for node in inside)
        assert [position[node] for node in block.nodes] == sorted(position[node] for node in block.nodes)
        assert all(user in inside for node in inside - {block.output} for user in node.users)
        taken |= inside
        tensors = (*graph.constants.values(), *graph.module.parameters(), *graph.module.buffers())
        model_memory = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        assert not block.block.training
        for tensor in vars(block.block.weights).values():
            assert tensor.dtype == torch.float64 and tensor.device.type == "cpu" and not tensor.requires_grad
            assert tensor.untyped_storage().data_ptr() not in model_memory
    for findings_of in (findings.found, findings.left):
        nodes = [getattr(each, "output", getattr(each, "node", None)) for each in findings_of]
        assert [position[node] for node in nodes] == sorted(position[node] for node in nodes)
    return findings


def replaced(graph: Graph, findings: Findings) -> fx.GraphModule:
    """A graph with calls of the twins in place of what they replace."""
    module, twins = graph.module, {}
    for number, block in enumerate(findings.found):
        module.add_module(f"twin_{number}", block.block)
        with module.graph.inserting_after(block.output):
            twin = module.graph.call_module(f"twin_{number}", (twins.get(block.input, block.input),))
        twins[block.output] = twin
        block.output.replace_all_uses_with(twin)
        for node in reversed(block.nodes):
            module.graph.erase_node(node)
    module.graph.lint()
    module.recompile()
    return module


@torch.no_grad()
def check(model: nn.Module, x: Tensor, spelling: str, expected: list[str], **options) -> Findings:
    """The blocks of these kinds are found, and the graph with their twins computes what the model does."""
    model, x = with_random_statistics(model).eval().double(), x.double()
    eager = model(x.clone())
    graph = SPELLINGS[spelling](model, x, **options)
    findings = find(graph)
    assert [block.kind for block in findings.found] == expected, findings.left
    out = graph.run(replaced(graph, findings), x.clone())
    out = out[0] if isinstance(out, tuple | list) else out
    assert out.shape == eager.shape
    assert relative_error(out, eager) < TOLERANCE
    return findings


def with_random_statistics(model: nn.Module) -> nn.Module:
    """Batch norms as after training."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for bn in model.modules():
            if isinstance(bn, nn.modules.batchnorm._BatchNorm):
                if bn.running_mean is not None:
                    bn.running_mean.normal_(generator=generator)
                    bn.running_var.uniform_(0.5, 2.0, generator=generator)
                if bn.affine:
                    bn.weight.uniform_(0.5, 1.5, generator=generator)
                    bn.bias.normal_(generator=generator)
    return model


class Function(nn.Module):
    """A module of layers and a function that takes it and an input."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor], **layers):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)

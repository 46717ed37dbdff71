"""The paper's blocks in a graph of any PyTorch model, by their structure."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fusion.frontend.layer_graph import LayerGraph
from fusion.frontend.layers import Conv
from fusion.frontend.names import block_name
from fusion.frontend.patterns import PATTERNS, Candidate
from fusion.modules import FusedBlock, Tuner
from fusion.planner.plan import plan_block
from fusion.real_tensors import real_tensors

AUTOCAST = (torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast)
"""What enters an autocast context in a graph, and what leaves it."""


@dataclass(frozen=True)
class FoundBlock:
    """A block in a graph and its inference twin.

    Attributes:
        name: path of the block in the model, such as "blocks.1.0"; the name of `output` if the graph does not tell it.
        kind: "ConvFirst", "MBConv", "FFN", "stem" or "head".
        input: what the block takes, `[N, C, H, W]`.
        output: the node whose value the block gives, `[N, K, H, W]`, or `[N, K]` of a head.
        nodes: what the block replaces, in graph order. Of these only `output` is used outside, and of other nodes they
            use `input`, constants, sizes and fixed numbers only.
        block: the twin, in eval mode, its weights float64 on the CPU and its own.
    """

    name: str
    kind: str
    input: fx.Node
    output: fx.Node
    nodes: tuple[fx.Node, ...]
    block: FusedBlock


@dataclass(frozen=True)
class LeftBlock:
    """What looks like a block and is left alone, and why. `node` is its output."""

    name: str
    kind: str
    node: fx.Node
    reason: str


@dataclass(frozen=True)
class Findings:
    """Blocks of a graph, in graph order. Found blocks do not overlap."""

    found: tuple[FoundBlock, ...]
    left: tuple[LeftBlock, ...]


def find_blocks(
    graph_module: fx.GraphModule, constants: Mapping[fx.Node, Tensor], tuner: Tuner = plan_block
) -> Findings:
    """Find the blocks that have an inference twin, and fold their weights, batch norm included, in float64.

    The graph is what a Dynamo backend is given, that of an exported program's module, or a symbolic trace, and stays as
    it is. A graph without blocks, or one that nothing is known about, gives no findings.

    Args:
        graph_module: the graph, of a model in eval mode.
        constants: the tensors that placeholders and get_attr nodes stand for, if they do not change: parameters and
            buffers. A convolution of any other weight is left alone.
        tuner: makes the twins' plans (`fusion.modules.FusedBlock`).
    """
    with real_tensors():
        graph = LayerGraph(graph_module, constants)
        return _findings(graph, tuner)


def _findings(graph: LayerGraph, tuner: Tuner) -> Findings:
    convolutions = [node for node in graph.nodes if isinstance(graph.layer(node), Conv)]
    kept: dict[type, list[FoundBlock | LeftBlock]] = {FoundBlock: [], LeftBlock: []}
    claimed: set[fx.Node] = set()
    for row in PATTERNS:
        candidates = [each for node in convolutions for pattern in row if (each := pattern(graph, node)) is not None]
        outcomes = [
            (each.walk, _outcome(graph, each, tuner)) for each in candidates if claimed.isdisjoint(each.walk.parts)
        ]
        for kind in kept:  # found blocks first: what is left alone gives way to them
            for walk, outcome in outcomes:
                if isinstance(outcome, kind) and claimed.isdisjoint(walk.parts):
                    kept[kind].append(outcome)
                    claimed.update(walk.parts)
    position = graph.position.__getitem__
    return Findings(
        tuple(sorted(kept[FoundBlock], key=lambda block: position(block.output))),
        tuple(sorted(kept[LeftBlock], key=lambda block: position(block.node))),
    )


def _outcome(graph: LayerGraph, candidate: Candidate, tuner: Tuner) -> FoundBlock | LeftBlock:
    walk, output = candidate.walk, candidate.output
    walk.take_questions(output)
    walk.problems.extend(_hazards(graph, candidate))
    nodes = tuple(sorted(walk.parts, key=graph.position.__getitem__))
    name = block_name(walk.affine_nodes, nodes, output)
    if not walk.problems:
        try:
            block = candidate.build(tuner).eval()
        except (ValueError, RuntimeError) as error:  # Unsupported is a ValueError; others come of sizes at odds
            walk.problems.append(str(error))
    if walk.problems:
        return LeftBlock(name, candidate.kind, output, walk.problems[0])
    return FoundBlock(name, candidate.kind, candidate.input, output, nodes, block)


def _hazards(graph: LayerGraph, candidate: Candidate) -> Iterator[str]:
    """What stands against running a block at the place of its output, apart from its layers."""
    x, parts = candidate.input, candidate.walk.parts
    shape = graph.shape(x)
    if shape is not None and len(shape) != 4:
        yield f"its input has {len(shape)} dimensions, supported is [N, C, H, W]"
    start, stop = min(map(graph.position.__getitem__, parts)), graph.position[candidate.output]
    shared = graph.memory.sharing(x)
    for node in graph.nodes[start:stop]:
        if node not in parts and any(changed in shared for changed in graph.memory.changes(node)):
            yield f"its input may be changed in place by {node.name!r} before its output is there"
    entered = _autocast_depth(graph.nodes[:start]) > 0
    if entered or any(node.target in AUTOCAST for node in graph.nodes[start:stop]):
        yield (
            "it runs under torch.autocast, which chooses a dtype for each layer; convert the model to 16 bits instead, "
            "or call it under autocast from outside"
        )


def _autocast_depth(nodes: Sequence[fx.Node]) -> int:
    """How many autocast contexts are entered, and not left again, in these nodes."""
    targets = [node.target for node in nodes if node.op == "call_function"]
    enter, leave = AUTOCAST
    return targets.count(enter) - targets.count(leave)

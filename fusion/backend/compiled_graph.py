"""A graph of a model as it runs: chains of fused blocks, and Inductor's code for what is between them."""

import logging
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter

import torch
from torch import Tensor, fx

from fusion.backend.chain import Chain
from fusion.backend.examine import Examined, examine, find_again
from fusion.backend.graph_copy import copy_graph, placeholders_of
from fusion.backend.options import BackendOptions
from fusion.backend.region import input_kind
from fusion.backend.replace import chained, drop_unused, replace_blocks
from fusion.backend.report import CompileReport
from fusion.backend.watch import Watch
from fusion.frontend.find import FoundBlock

logger = logging.getLogger("fusion.backend")


class CompiledGraph:
    """What Dynamo calls in place of a graph: `(*inputs) -> outputs`, parameters among the inputs.

    Weights of fused blocks are folded when the graph is compiled. Every call looks whether the parameters are still
    the same tensors with the same version. If they are not, after `load_state_dict`, say, or because another module of
    the same class runs the graph, weights are folded from what they are now. Changes by way of `.data` go unnoticed
    (`fusion.backend.watch`), and with Inductor's option "freezing" all of them do.

    Attributes:
        report: which blocks are fused, and why others are not.
    """

    def __init__(self, graph_module: fx.GraphModule, inputs: Sequence[object], options: BackendOptions):
        self._options = options
        self._original = copy_graph(graph_module)
        self._folded: _Folded | None = None
        run = None
        try:
            examined = examine(graph_module, inputs, options)
            self.report = examined.report
            if examined.fused:
                self._folded = _Folded(self._original, examined, options)
                run = self._folded.compile(inputs)
        except Exception as error:
            if options.strict:
                raise
            self._folded = None
            failure = f"the graph is left to Inductor ({type(error).__name__}: {error})"
            self.report = CompileReport((), errors=(failure,))
        self._run = run or inductor(graph_module, inputs, options)
        for error in self.report.errors:
            warnings.warn(f"fusion: {error}", RuntimeWarning, stacklevel=2)
        logger.info("%s", self.report)

    def __call__(self, *inputs):
        if self._folded is not None:
            self._folded.refresh(inputs)
        return self._run(*inputs)


class _Folded:
    """The chains of a graph, and the parameters that their weights were folded from."""

    def __init__(self, original: fx.GraphModule, examined: Examined, options: BackendOptions):
        self._original = original
        self._examined = examined
        self._options = options
        found = examined.findings.found
        place = {id(block): index for index, block in enumerate(found)}
        self._runs = chained(examined.fused)
        self._found = [[place[id(block)] for block in run] for run in self._runs]
        self._chains = [_chain(run, options) for run in self._runs]
        inputs = {node: index for index, node in enumerate(placeholders_of(examined.graph_module))}
        constants = [_constants(run, examined.constants) for run in self._runs]
        self._anchors = [_anchor(nodes, examined.constants) for nodes in constants]
        self._anchor_inputs = [inputs.get(node) for node in self._anchors]
        watched = [inputs[node] for nodes in constants for node in nodes if node in inputs]
        self._is_watching = bool(watched) and not options.inductor.get("freezing")
        self._watched = itemgetter(*watched, *watched[:1]) if watched else None  # of two, so that it gives a tuple
        self._watches: dict[int, Watch] = {}
        self._lock = threading.Lock()

    def compile(self, inputs: Sequence[object]) -> Callable[..., object]:
        """The graph with its blocks replaced, compiled by Inductor."""
        graph_module, constants = self._examined.graph_module, self._examined.constants
        for chain, run, anchor in zip(self._chains, self._runs, self._anchors, strict=True):
            chain.fold(constants[anchor], [block.block for block in run])
            _warm_up(run[0], chain, constants[anchor])
        self._watch(inputs)
        replace_blocks(graph_module, self._runs, self._chains, self._anchors)
        kept = drop_unused(graph_module, constants)
        compiled = inductor(graph_module, [inputs[index] for index in kept], self._options)
        # Weights and nodes of the first module: they are not to outlive it.
        del self._examined, self._runs, self._anchors
        return lambda *inputs: compiled(*[inputs[index] for index in kept])

    def refresh(self, inputs: Sequence[object]) -> None:
        """Fold weights if the parameters among the inputs are others than before."""
        if not self._is_watching:
            return
        tensors = self._watched(inputs)
        watch = self._watches.get(id(tensors[0]))
        if watch is None or watch.sees_change(tensors):
            with self._lock:
                self._fold(inputs)

    def _fold(self, inputs: Sequence[object]) -> None:
        logger.info("folding weights again, for parameters are new or changed")
        found = find_again(self._original, inputs, self._options).found
        for chain, anchor, places in zip(self._chains, self._anchor_inputs, self._found, strict=True):
            if anchor is not None:
                chain.fold(inputs[anchor], [found[place].block for place in places])
        self._watch(inputs)

    def _watch(self, inputs: Sequence[object]) -> None:
        if self._is_watching:
            tensors = self._watched(inputs)
            self._watches[id(tensors[0])] = Watch(tensors)


def inductor(graph_module: fx.GraphModule, inputs: Sequence[object], options: BackendOptions) -> Callable[..., object]:
    """Inductor's code for a graph."""
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(graph_module, list(inputs), config_patches=dict(options.inductor) or None)


def _chain(run: Sequence[FoundBlock], options: BackendOptions) -> Chain:
    names, blocks = [block.name for block in run], [block.block for block in run]
    return Chain(names, blocks, options.micro_batch, options.strict)


def _constants(run: Sequence[FoundBlock], constants: Mapping[fx.Node, Tensor]) -> list[fx.Node]:
    """The parameters that a chain's weights are folded from."""
    nodes = (each for block in run for node in block.nodes for each in node.all_input_nodes)
    return [node for node in dict.fromkeys(nodes) if node in constants]


def _anchor(nodes: Sequence[fx.Node], constants: Mapping[fx.Node, Tensor]) -> fx.Node:
    """One of a chain's parameters, at an address of 16 bytes: others are copied before they reach an operator."""
    aligned = [node for node in nodes if constants[node].data_ptr() % 16 == 0 and constants[node].numel()]
    if not aligned:
        raise ValueError("no parameter of its blocks is at an address that is a multiple of 16 bytes")
    return min(aligned, key=lambda node: (node.op != "placeholder", constants[node].numel()))


def _warm_up(first: FoundBlock, chain: Chain, anchor: Tensor) -> None:
    """Compile a chain's kernels and pack its weights, for the shape at hand."""
    kind = input_kind(first)
    if kind.device.type == "cuda":
        with torch.cuda.device(kind.device), torch.no_grad(), torch.random.fork_rng([kind.device]):
            chain(kind.random(), anchor)

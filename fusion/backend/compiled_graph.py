"""A graph of a model as it runs: chains of fused blocks, and Inductor's code for what is between them."""

import logging
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter

import torch
from torch import Tensor, fx
from torch._dynamo.exc import RestartAnalysis
from torch._inductor import config as inductor_config

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
    the same class runs the graph, weights are folded from what they are now; where they make no such block any more,
    the graph runs as Dynamo passed it. Changes in place by way of `.data` go unnoticed (`fusion.backend.watch`). With
    Inductor's option "freezing" all changes of a parameter do, but not another parameter in its place.

    Attributes:
        report: which blocks are fused, and why others are not.
    """

    def __init__(self, graph_module: fx.GraphModule, inputs: Sequence[object], options: BackendOptions):
        self._options = options
        self._folded: _Folded | None = None
        run = None
        try:
            self._original = copy_graph(graph_module)
            examined = examine(graph_module, inputs, options)
            self.report = examined.report
            if examined.fused:
                self._folded = _Folded(self._original, examined, options)
                run = self._folded.compile(inputs)
        except RestartAnalysis:
            raise  # no failure: Dynamo is to trace the model again, and comes back with another graph
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
        if (folded := self._folded) is not None:
            try:
                folded.refresh(inputs)
            except Exception as error:
                if self._options.strict or isinstance(error, torch.OutOfMemoryError):
                    raise
                self._give_up(error)
        return self._run(*inputs)

    def _give_up(self, error: Exception) -> None:
        """Run the graph as Dynamo passed it from now on: Inductor compiles it no more, for Dynamo's guards are made."""
        warnings.warn(
            "fusion: weights have changed and cannot be folded again, and the graph runs layer by layer "
            f"({type(error).__name__}: {error})",
            RuntimeWarning,
            stacklevel=3,
        )
        self._run, self._folded = self._original.forward, None


class _Folded:
    """The chains of a graph, and the parameters that their weights were folded from."""

    def __init__(self, original: fx.GraphModule, examined: Examined, options: BackendOptions):
        self._original = original
        self._examined = examined
        self._options = options
        self._runs = chained(examined.fused)
        place = _places(examined.graph_module)
        self._outputs = [[place[block.output] for block in run] for run in self._runs]
        self._chains = [_chain(run, options) for run in self._runs]
        inputs = {node: index for index, node in enumerate(placeholders_of(examined.graph_module))}
        nodes = [_constants(run, examined.constants) for run in self._runs]
        self._anchors = [_anchor(of_run, examined.constants) for of_run in nodes]
        self._anchor_inputs = [inputs.get(node) for node in self._anchors]
        self._fixed_anchors = [None if node in inputs else examined.constants[node] for node in self._anchors]
        watched = [inputs[node] for of_run in nodes for node in of_run if node in inputs]
        self._fixed = tuple(examined.constants[node] for of_run in nodes for node in of_run if node not in inputs)
        # Then Inductor makes constants of parameters, and Dynamo compiles anew for others.
        self._is_frozen = inductor_config.freezing and not torch.is_grad_enabled()
        self._watched = itemgetter(*watched, *watched[:1]) if watched else None  # of two, so that it gives a tuple
        self._watches: dict[int, _Watched] = {}
        self._lock = threading.Lock()

    def compile(self, inputs: Sequence[object]) -> Callable[..., object]:
        """The graph with its blocks replaced, compiled by Inductor."""
        graph_module, constants = self._examined.graph_module, self._examined.constants
        for chain, run, anchor in zip(self._chains, self._runs, self._anchors, strict=True):
            chain.fold(constants[anchor], [block.block for block in run], self._is_frozen)
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
        if not self._is_frozen and self._sees_change(self._tensors(inputs)):
            with self._lock:
                if self._sees_change(self._tensors(inputs)):
                    self._fold(inputs)

    def _tensors(self, inputs: Sequence[object]) -> tuple[Tensor, ...]:
        """What the weights of all chains are folded from."""
        tensors = () if self._watched is None else self._watched(inputs)
        return (*tensors, *self._fixed) if self._fixed else tensors

    def _sees_change(self, tensors: Sequence[Tensor]) -> bool:
        watched = self._watches.get(id(tensors[0]))
        return watched is None or watched.watch.sees_change(tensors)

    def _fold(self, inputs: Sequence[object]) -> None:
        logger.info("folding weights again, for parameters are new or changed")
        again, findings = find_again(self._original, inputs, self._options)
        place = _places(again)
        found = {place[block.output]: block.block for block in findings.found}
        for chain, anchor, outputs in zip(self._chains, self._anchors_in(inputs), self._outputs, strict=True):
            chain.fold(anchor, [found.get(output) for output in outputs])
        self._watch(inputs)

    def _anchors_in(self, inputs: Sequence[object]) -> list[Tensor]:
        places = zip(self._anchor_inputs, self._fixed_anchors, strict=True)
        return [fixed if index is None else inputs[index] for index, fixed in places]

    def _watch(self, inputs: Sequence[object]) -> None:
        if self._is_frozen:
            return
        tensors = self._tensors(inputs)
        watch = Watch(tensors, values=not self._options.inductor.get("freezing"))
        addresses = frozenset(anchor.data_ptr() for anchor in self._anchors_in(inputs))
        # Modules may share an anchor, and then their weights have taken the place of others.
        kept = {
            key: watched
            for key, watched in self._watches.items()
            if watched.watch.is_alive and addresses.isdisjoint(watched.anchors)
        }
        self._watches = {**kept, id(tensors[0]): _Watched(watch, addresses)}


@dataclass(frozen=True)
class _Watched:
    """The parameters of a module that runs a graph, and the addresses of its anchors."""

    watch: Watch
    anchors: frozenset[int]


def inductor(graph_module: fx.GraphModule, inputs: Sequence[object], options: BackendOptions) -> Callable[..., object]:
    """Inductor's code for a graph."""
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(graph_module, list(inputs), config_patches=dict(options.inductor) or None)


def _places(graph_module: fx.GraphModule) -> dict[fx.Node, int]:
    """Nodes and their places: copies of a graph have them in common."""
    return {node: index for index, node in enumerate(graph_module.graph.nodes)}


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

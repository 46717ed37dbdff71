"""Fused blocks of a compiled graph that follow each other, as one operator.

A graph holds `fusion::chain(x, anchor, handle)`: one node for as many blocks as follow each other, so that the blocks
may run as a stage, and the plan is made for the input that comes, whatever its batch.

Dynamo runs equal modules with one graph, each with its own parameters. So a chain has packed weights for each set of
parameters, and the anchor, one of the parameters, tells by its address which to take. That also tells CUDA graphs,
which keep addresses, to be made anew.
"""

import hashlib
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.library import custom_op

from fusion.edge_modules import FusedStem
from fusion.fused_sequential import FusedSequential
from fusion.joined_stem import JoinedStem
from fusion.launch_record import InputKind
from fusion.modules import FusedBlock
from fusion.op_checks import gradient_refusal
from fusion.stage import MicroBatch
from fusion.stem_convfirst_module import join_stem


class Chain:
    """Blocks that run one after the other: `[N, C, H, W] -> [N, K, H', W']`, or what the last one gives.

    An input for which a block has no kernel, or whose kernel fails, is computed layer by layer, with one warning; with
    `strict` that is an error.

    Attributes:
        names, blocks: the blocks in order, and what the model calls them. Of their weights only sizes count.
        handle: the name of this chain in graphs. It tells the blocks' sizes, for graphs are cached by what they hold.
    """

    def __init__(
        self, names: Sequence[str], blocks: Sequence[FusedBlock], micro_batch: MicroBatch = None, strict: bool = False
    ):
        self.names = tuple(names)
        self.blocks = tuple(blocks)
        self.micro_batch = micro_batch
        self.strict = strict
        self._runners: dict[int, FusedSequential] = {}
        self._anchors: dict[int, weakref.ref] = {}
        self._frozen: FusedSequential | None = None
        self._failed: set[InputKind] = set()
        self.handle = _register(self)

    def fold(self, anchor: Tensor, blocks: Sequence[FusedBlock | None], is_frozen: bool = False) -> None:
        """Take blocks with the weights that go with an anchor, and keep them as long as it lives; if they are frozen,
        for all anchors and as long as the chain lives.

        If there are some already they are overwritten, in place: CUDA graphs that run the chain see the new ones.
        Raises ValueError if a block is none, or another than that of the chain apart from its weights.
        """
        for name, block, new in zip(self.names, self.blocks, blocks, strict=True):
            if new is None or _described(new) != _described(block):
                raise ValueError(f"with its weights of now {name!r} is not the block that it was")
        if is_frozen:
            self._frozen = _runner(blocks, self.micro_batch)
            return
        address = anchor.data_ptr()
        if address in self._runners:
            _overwrite(self._runners[address], blocks)
        else:
            self._runners[address] = _runner(blocks, self.micro_batch)
        # One reference for an address: of two tensors in the same memory the one that was folded for last counts.
        self._anchors[address] = weakref.ref(anchor, _forgetting(weakref.ref(self), address))

    def forget(self, address: int, anchor: weakref.ref) -> None:
        """Drop the weights that go with an address, if this is the anchor that they were folded for."""
        if self._anchors.get(address) is anchor:
            del self._anchors[address], self._runners[address]

    def __call__(self, x: Tensor, anchor: Tensor) -> Tensor:
        runner = self._runners[anchor.data_ptr()] if self._frozen is None else self._frozen
        kind = InputKind.of(x)
        if kind in self._failed:
            return _layerwise(runner, x)
        try:
            return runner(x)
        except Exception as error:
            if self.strict or isinstance(error, torch.OutOfMemoryError):
                raise
            self._failed.add(kind)
            warnings.warn(
                f"fused block {self.names[0]!r} to {self.names[-1]!r} cannot run an input of {list(x.shape)}, "
                f"{x.dtype}, and is computed layer by layer ({type(error).__name__}: {error})",
                RuntimeWarning,
                stacklevel=2,
            )
            return _layerwise(runner, x)

    def empty_output(self, x: Tensor) -> Tensor:
        """What the chain gives for inputs like `x`, not initialised."""
        for block in self.blocks:
            x = block.empty_output(x)
        return x

    @property
    def reads_any_format(self) -> bool:
        """Whether an input that is not channels_last costs no copy."""
        return isinstance(self.blocks[0], FusedStem)


def _forgetting(chain: weakref.ref, address: int) -> Callable[[weakref.ref], None]:
    """What to do when an anchor dies. It keeps no chain alive, for models live longer than their graphs."""

    def forget(anchor: weakref.ref) -> None:
        if (alive := chain()) is not None:
            alive.forget(address, anchor)

    return forget


def _runner(blocks: Sequence[FusedBlock], micro_batch: MicroBatch) -> FusedSequential:
    layers: OrderedDict[str, nn.Module] = OrderedDict((str(index), block) for index, block in enumerate(blocks))
    together = join_stem(*blocks[:2]) if len(blocks) > 1 else None
    if together is not None:
        del layers["0"]
        layers["1"] = JoinedStem(*blocks[:2], together)
        layers.move_to_end("1", last=False)
    return FusedSequential(layers, micro_batch).eval()


def _blocks_of(runner: FusedSequential) -> Iterator[FusedBlock]:
    for layer in runner:
        yield from (layer.stem, layer.block) if isinstance(layer, JoinedStem) else (layer,)


def _layerwise(runner: FusedSequential, x: Tensor) -> Tensor:
    """What a chain computes, in plain PyTorch."""
    for block in _blocks_of(runner):
        x = block.layerwise(x)
    return x


def _overwrite(runner: FusedSequential, blocks: Sequence[FusedBlock]) -> None:
    for block, new in zip(_blocks_of(runner), blocks, strict=True):
        block.weights = new.weights
    runner.repack()


_chains: WeakValueDictionary[str, Chain] = WeakValueDictionary()
_lock = threading.Lock()


def _described(block: FusedBlock) -> tuple[str, str]:
    """A block apart from its weights."""
    return type(block).__name__, repr(block)


def _register(chain: Chain) -> str:
    digest = hashlib.sha256(repr(list(map(_described, chain.blocks))).encode()).hexdigest()[:16]
    with _lock:
        number = next(n for n in range(len(_chains) + 1) if f"{digest}:{n}" not in _chains)
        handle = f"{digest}:{number}"
        _chains[handle] = chain
    return handle


@custom_op("fusion::chain", mutates_args=())
def run_chain(x: Tensor, anchor: Tensor, handle: str) -> Tensor:
    """The chain of fused blocks of this name: `[N, C, H, W] -> [N, K, H', W']`, channels_last, or a head's `[N, K]`.

    Raises KeyError if the compiled graph that the chain belongs to is gone, or weights that go with the anchor have not
    been folded; and RuntimeError where a gradient would be needed.
    """
    return _chains[handle](x, anchor)


@run_chain.register_fake
def _(x: Tensor, anchor: Tensor, handle: str) -> Tensor:
    return _chains[handle].empty_output(x)


run_chain.register_autograd(lambda ctx, grad: None, setup_context=gradient_refusal("fusion::chain"))

"""Whether parameters are still those that weights were folded from."""

import gc
import weakref
from collections.abc import Sequence
from operator import attrgetter

from torch import Tensor, nn

VERSION = attrgetter("_version")
ADDRESS = Tensor.data_ptr


class Watch:
    """Remembers tensors, where they are in memory, and their versions, without keeping them alive.

    What changes the values of a tensor's `.data` in place goes unnoticed, for PyTorch keeps no version of that. A
    `.data` that is put in the place of another is noticed. The tensors must have versions: those that are made in
    inference mode have none. Without `values` only other tensors count, and none has to have a version.
    """

    def __init__(self, tensors: Sequence[Tensor], values: bool = True):
        self._values = values
        self._ids = list(map(id, tensors))
        self._addresses = list(map(ADDRESS, tensors))
        self._counters = _batch_counters(tensors) if values else []
        self._versions = self._versions_of(tensors)
        self._alive = True
        # An id may be used again by another tensor.
        self._references = [weakref.ref(tensor, self._forget) for tensor in tensors]

    @property
    def is_alive(self) -> bool:
        """Whether all of the tensors are."""
        return self._alive

    def sees_change(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are other tensors, or have been changed."""
        return not (
            self._alive
            and list(map(id, tensors)) == self._ids
            and list(map(ADDRESS, tensors)) == self._addresses
            and self._versions_of(tensors) == self._versions
        )

    def _versions_of(self, tensors: Sequence[Tensor]) -> list[int]:
        return list(map(VERSION, (*tensors, *self._counters))) if self._values else []

    def _forget(self, _: object) -> None:
        self._alive = False


def _batch_counters(tensors: Sequence[Tensor]) -> list[Tensor]:
    """What counts the batches that batch norms were trained with, of those whose statistics are among the tensors.

    In train mode batch norm changes its statistics without counting versions, outside of compiled graphs. The module
    adds one to a counter then, and that has a version. Nothing leads from a tensor to its module but a search.
    """
    # Statistics are vectors. Only what refers to them is asked for: objects that other threads are making stay theirs.
    vectors = {id(each): each for each in tensors if each.dim() == 1 and not isinstance(each, nn.Parameter)}
    buffers = [each for each in gc.get_referrers(*vectors.values()) if type(each) is dict]
    counters = [each.get("num_batches_tracked") for each in buffers if id(each.get("running_mean")) in vectors]
    return [counter for counter in counters if isinstance(counter, Tensor) and not counter.is_inference()]

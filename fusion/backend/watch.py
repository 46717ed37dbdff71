"""Whether parameters are still those that weights were folded from."""

import weakref
from collections.abc import Sequence
from operator import attrgetter

from torch import Tensor

VERSION = attrgetter("_version")


class Watch:
    """Remembers tensors and their versions, without keeping them alive.

    What changes a tensor by way of its `.data` goes unnoticed, for PyTorch keeps no version of that.
    """

    def __init__(self, tensors: Sequence[Tensor]):
        self._ids = list(map(id, tensors))
        self._versions = _versions(tensors)
        self._alive = True
        # An address may be used again by another tensor.
        self._references = [weakref.ref(tensor, self._forget) for tensor in tensors]

    def sees_change(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are other tensors, or have been changed in place."""
        return not (self._alive and list(map(id, tensors)) == self._ids and _versions(tensors) == self._versions)

    def _forget(self, _: object) -> None:
        self._alive = False


def _versions(tensors: Sequence[Tensor]) -> list[int] | None:
    try:
        return list(map(VERSION, tensors))
    except RuntimeError:  # tensors made in inference mode have none
        return None

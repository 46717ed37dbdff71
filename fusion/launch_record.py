"""What ran: the launches of fused blocks, in order, for those who explain or measure a network."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fusion.planner.plan import Plan


@dataclass(frozen=True)
class InputKind:
    """What a plan is made for: an input without its values.

    A symbolic size, of an input that torch.export traces, stands for many; plans are made for that of the example, and
    no guard holds the exported program to it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, x: Tensor) -> "InputKind":
        return cls(tuple(map(_example_size, x.shape)), x.dtype, x.device)

    def random(self) -> Tensor:
        """Such an input, normally distributed, images channels_last. Raises ValueError for dtypes that do not float."""
        if not self.dtype.is_floating_point:
            raise ValueError(f"random inputs of dtype {self.dtype} are not supported, only floating ones")
        x = torch.randn(self.shape, device=self.device).to(self.dtype)
        return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


@dataclass(frozen=True)
class Launch:
    """Fused blocks that ran together, one after the other, by the plan that all of them have, on such an input."""

    blocks: tuple[nn.Module, ...]
    plan: Plan
    input: InputKind


def _example_size(size: int | torch.SymInt) -> int:
    if not isinstance(size, torch.SymInt):
        return size
    if size.node.hint is None:
        raise ValueError(f"no kernel can be planned for the size {size}, of which no example is known")
    return int(size.node.hint)


_recording: ContextVar[list | None] = ContextVar("recording", default=None)


@contextmanager
def recording() -> Iterator[list]:
    """Collects a `Launch` for everything fused that this thread runs while the context is open."""
    record: list = []
    token = _recording.set(record)
    try:
        yield record
    finally:
        _recording.reset(token)


def is_recording() -> bool:
    """Whether anyone collects what this thread runs."""
    return _recording.get() is not None


def record_launch(blocks: Sequence[nn.Module], plan: Plan, x: Tensor) -> None:
    """Tell who records, if anyone does, that `blocks` run on `x` by `plan`."""
    record = _recording.get()
    if record is not None:
        record.append(Launch(tuple(blocks), plan, InputKind.of(x)))

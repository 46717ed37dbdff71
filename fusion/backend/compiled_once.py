"""Dynamo for a single look at a model, which leaves nothing behind."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType, FunctionType

import torch
from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list, reset_code
from torch._dynamo.convert_frame import register_bytecode_hook


def fresh_function(function: FunctionType) -> FunctionType:
    """A function like this one with code of its own: what Dynamo compiles it to goes when it does."""
    return FunctionType(function.__code__.replace(), function.__globals__, function.__name__)


@contextmanager
def compiled_for_once() -> Iterator[None]:
    """What Dynamo compiles here does not count among the few times that it compiles a function.

    That of functions which it has compiled before stays: those of a model with graph breaks that is compiled already.
    """
    fresh: list[CodeType] = []
    seen: set[int] = set()

    def note(code: CodeType, _: CodeType) -> None:
        if id(code) not in seen and not _debug_get_cache_entry_list(code):
            fresh.append(code)
        seen.add(id(code))

    limits = torch._dynamo.config.patch(recompile_limit=1000, accumulated_recompile_limit=10_000)
    hook = register_bytecode_hook(note)
    try:
        with limits:
            yield
    finally:
        hook.remove()
        for code in fresh:
            reset_code(code)

"""What a fused network runs on an input: launches of fused blocks and layers that are not fused, in order."""

from collections.abc import Container, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fusion.launch_record import InputKind, Launch, recording
from fusion.modules import FusedBlock


@dataclass(frozen=True)
class LayerRun:
    """A layer that is not fused ran; `input` is None unless it took one tensor alone."""

    layer: nn.Module
    input: InputKind | None


@dataclass(frozen=True)
class Trace:
    """What ran, and the network's positional inputs; None unless all inputs were such tensors."""

    runs: tuple[Launch | LayerRun, ...]
    inputs: tuple[InputKind, ...] | None


def trace(network: nn.Module, left_eager: Container[str], args: tuple, kwargs: dict) -> Trace:
    """Run a network once, and note what runs; `left_eager` are names of blocks to be seen as wholes."""
    with recording() as runs, torch.no_grad():

        def note(layer: nn.Module, args: tuple, kwargs: dict) -> None:
            is_one = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
            runs.append(LayerRun(layer, InputKind.of(args[0]) if is_one else None))

        layers = [layer for _, layer in unfused_layers(network, left_eager)]
        handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
        try:
            network(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
    are_tensors = not kwargs and all(isinstance(x, Tensor) for x in args)
    return Trace(tuple(runs), tuple(map(InputKind.of, args)) if are_tensors else None)


def unfused_layers(network: nn.Module, left_eager: Container[str]) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules that are not fused: blocks as wholes, else what has parameters or nothing in it, each once."""
    seen: set[nn.Module] = set()

    def walk(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
        if module in seen or isinstance(module, FusedBlock):
            return
        seen.add(module)
        is_block = name in left_eager
        holds_tensors = any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False)))
        if is_block or holds_tensors or not module._modules:
            yield name, module
        if not is_block:
            for child_name, child in module.named_children():
                yield from walk(child, f"{name}.{child_name}" if name else child_name)

    return walk(network, "")

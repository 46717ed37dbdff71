"""`fusion.package`: a network with fused kernels as a file that runs without this package, and without Python."""

import os
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.utils._pytree import tree_leaves

from fusion.fused_module import FusedModule, call_arguments
from fusion.fusing import fuse
from fusion.planner.families import FAMILIES
from fusion.planner.stem_tile import MAX_GRID

SUFFIX = ".pt2"
OPAQUE_OPERATORS = frozenset(f"fusion::{family.name}" for family in FAMILIES if not family.is_portable)
"""Operators that compilers call and cannot look into, so that a program with them needs this package."""


def package(
    module: nn.Module,
    example_input: Tensor | tuple | dict,
    path: str | os.PathLike[str],
    *,
    dynamic_batch: bool = False,
    inductor_configs: Mapping[str, object] | None = None,
    **fuse_options,
) -> str:
    """Compile a network by AOTInductor, with its blocks fused, and write it to a file; returns the file's path.

    `torch._inductor.aoti_load_package(path)` reads it, in Python or in C++, on a machine like this one: the code is for
    the GPU, or the CPU, that the example is on. There the program needs neither this package nor Triton.

    Kernels are portable ones (`fuse(portable=True)`), whose code the file can hold. On Hopper GPUs they take more time
    than those that are made for Hopper, and a stem is not joined with the block after it, nor do several blocks run in
    one launch: a whole network takes several times as long. So where Python is at hand, a `FusedModule` is faster.
    Blocks without a portable kernel, and all other layers, are compiled by Inductor.

    Args:
        module: the network, in eval mode, for `fuse(module, example_input, portable=True, **fuse_options)`; or what
            that has returned.
        example_input: as for `fuse`. The file's program takes inputs of its sizes, dtypes, device and memory format,
            which it does not check, and plans are made for it.
        path: where to write; ends with ".pt2".
        dynamic_batch: let the first dimension of all inputs, the batch, have any size from 1 up to 65535. Tiles are
            those of the example's batch, which must be at least 2; blocks that run in micro-batches, the MBConv blocks,
            run the whole batch at once.
        inductor_configs: options of Inductor, for `torch._inductor.aoti_compile_and_package`.
        **fuse_options: `tune`, `dtype` or `device`, as for `fuse`.

    Raises:
        RuntimeError: part of the module is in training mode, or an input requires a gradient. And what the compilers
            raise, for example without a C++ compiler.
        ValueError: the path ends with something else; a `FusedModule` has kernels that are not portable, or comes with
            options for `fuse`; the example has no batch that could be dynamic. And what `fuse` raises.
        TypeError: what `fuse` raises.
    """
    path = os.fspath(path)
    if not path.endswith(SUFFIX):
        raise ValueError(f"a package is a file that ends with {SUFFIX!r}, got {path!r}; append that")
    args, kwargs = call_arguments(example_input)
    inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if any(x.requires_grad for x in inputs):
        raise RuntimeError(
            "a package is for inference and has no gradient, but an example input requires one; pass its detach()"
        )
    shapes = _dynamic_batch(inputs) if dynamic_batch else None
    exported = _exported(_fused(module, example_input, fuse_options), args, kwargs, shapes)
    return torch._inductor.aoti_compile_and_package(
        exported, package_path=path, inductor_configs=dict(inductor_configs or {})
    )


def _fused(module: nn.Module, example_input: Tensor | tuple | dict, options: dict[str, object]) -> FusedModule:
    if not isinstance(module, FusedModule):
        return fuse(module, example_input, portable=True, **options)
    if options:
        raise ValueError(
            f"the module is fused already, and {', '.join(options)} would have no effect: pass the original module, or "
            "fuse it with these options and portable=True"
        )
    return module


def _dynamic_batch(inputs: list[Tensor]) -> ShapesCollection:
    batches = {x.shape[0] if x.dim() else None for x in inputs}
    if len(batches) != 1 or None in batches:
        raise ValueError(
            f"dynamic_batch needs inputs that have the batch as their first dimension, got {_shapes(inputs)}; leave it "
            "out for a fixed batch"
        )
    (batch,) = batches
    if batch < 2:
        raise ValueError(
            f"dynamic_batch needs an example of 2 images or more, got {_shapes(inputs)}: a size of 1 is taken for a "
            "constant; the program takes single images all the same"
        )
    shapes = ShapesCollection()
    for x in inputs:
        shapes[x] = {0: Dim("batch", min=1, max=MAX_GRID)}
    return shapes


def _exported(fused: FusedModule, args: tuple, kwargs: dict, shapes: ShapesCollection | None) -> ExportedProgram:
    with torch.no_grad():
        # Of the network itself, whose arguments have names.
        exported = torch.export.export(fused.module, args, kwargs, dynamic_shapes=shapes, strict=False)
    opaque = OPAQUE_OPERATORS.intersection(_operators(exported))
    if opaque:
        raise ValueError(
            f"the fused module runs {', '.join(sorted(opaque))}, whose kernels cannot be written to a package; pass "
            "the original module, or fuse it with portable=True"
        )
    return exported


def _operators(exported: ExportedProgram) -> Iterator[str]:
    for module in exported.graph_module.modules():
        for node in getattr(module, "graph", torch.fx.Graph()).nodes:
            if isinstance(node.target, torch._ops.OpOverload):
                yield node.target.name()


def _shapes(inputs: list[Tensor]) -> str:
    return ", ".join(str(list(x.shape)) for x in inputs) or "none"

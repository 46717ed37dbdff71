"""Inductor's code for a network, compiled at one time and run first at another."""

from collections.abc import Callable
from contextlib import suppress

import torch
import torch._inductor.config as inductor_config
from torch import Tensor, nn
from torch._inductor.compile_fx import compile_fx


class _CompiledOnly(Exception):
    """Stops a call ahead of the compiled code."""


class DeferredInductor:
    """What `torch.compile` in its default mode makes of a module with frozen weights, for inputs of the shape of `x`.

    The constructor compiles. The first call runs the code: then Triton and cuDNN choose among algorithms by timing
    them, which is right on a quiet GPU only. So several processes can compile side by side, and run one by one.
    The module must be in eval mode, and gradients off for constructor and calls.
    """

    def __init__(self, module: nn.Module, x: Tensor):
        self._may_run = False
        torch.compiler.reset()
        self._module = torch.compile(module, backend=self._compile, dynamic=False)
        with suppress(_CompiledOnly), inductor_config.patch(freezing=True):
            self._module(x)
        self._may_run = True

    def __call__(self, x: Tensor) -> Tensor:
        # What comes after a graph break is compiled in the first call.
        with inductor_config.patch(freezing=True):
            return self._module(x)

    def _compile(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        compiled = compile_fx(graph, inputs)

        def run(*args: object) -> object:
            if not self._may_run:
                raise _CompiledOnly
            return compiled(*args)

        return run

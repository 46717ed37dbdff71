"""What `fusion.fuse` returns."""

import os
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fusion.cuda_graphs import MAX_GRAPHS, CudaGraphs
from fusion.explanation import Explanation, explain_trace, explain_without_trace
from fusion.op_checks import any_of
from fusion.planner.plan import PlanError
from fusion.trace import Trace, trace


class FusedModule(nn.Module):
    """A network for inference whose blocks run as fused kernels. `fusion.fuse` makes it, `fusion.load` reads it back.

    Takes and returns what the original did, without gradients; attributes and methods of the original that this class
    lacks are found too (`fused.feature_info`, `fused.forward_features(x)`). Inputs of fused blocks may be channels_last
    or contiguous, in fp16 or bf16 on GPUs and in any floating dtype on CPUs. `to()`, `half()` and `cuda()` convert what
    is not fused; fused blocks follow their input.

    Weights of fused blocks are no parameters: a `state_dict` holds only what is not fused, and `load_state_dict` is
    refused. Load into the original and fuse again; `save()` stores the whole.

    `torch.export.export` takes it too, with `dynamic_shapes={"args": ({0: Dim("batch")},)}` for any batch: tiles are
    then those of the example's batch. Weights become constants of the program. Whoever loads a program that
    `torch.export.save` wrote imports `fusion.kernels` before, which has its operators; what `fusion.package` writes
    needs nothing.

    Attributes:
        module: the network with its blocks replaced.
        left_eager: blocks that are not fused, by name, and the reasons why.
        tune: whether plans for inputs of new shapes are made by measurement.
        portable: whether all kernels are plain Triton, as `fusion.package` needs them.
        cuda_graphs, max_graphs: whether calls on GPUs run as CUDA graphs, and how many at most are kept.

    Raises (in `forward`):
        RuntimeError: a gradient would be needed, or input and layers are on different devices.
        TypeError: a dtype is not supported, or another one than that of the layers which are not fused.
        PlanError: a block has no kernel for the input's shape.
        What the network itself raises.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        left_eager: Mapping[str, str] | None = None,
        tune: bool = False,
        portable: bool = False,
        cuda_graphs: bool = False,
        max_graphs: int = MAX_GRAPHS,
    ):
        super().__init__()
        self.module = module
        self.left_eager = dict(left_eager or {})
        self.tune = tune
        self.portable = portable
        self.cuda_graphs = cuda_graphs
        self.max_graphs = max_graphs
        # In a tuple: the module is registered once, under its own name.
        self._runner = (CudaGraphs(module, max_graphs=max_graphs) if cuda_graphs else module,)
        self._trace: Trace | None = None
        super().train(False)

    @property
    def graphs(self) -> CudaGraphs | None:
        """The graphs that run calls on GPUs, if they do; `graphs.clear()` forgets them."""
        (runner,) = self._runner
        return runner if isinstance(runner, CudaGraphs) else None

    def forward(self, *args, **kwargs):
        if torch.compiler.is_compiling():
            return self.module(*args, **kwargs)
        _refuse_gradients(args, kwargs)
        try:
            return self._runner[0](*args, **kwargs)
        except PlanError as error:
            error.add_note(
                "Pass an input of this shape to fusion.fuse as its example_input: blocks that have no kernel for it "
                "then stay as they are."
            )
            raise
        except (RuntimeError, TypeError, ValueError) as error:
            self._explain_mismatch(error, args, kwargs)
            raise

    def trace(self, *args, **kwargs) -> Trace:
        """Run the network, without CUDA graphs, and return what ran; `explain()` tells of it from then on."""
        _refuse_gradients(args, kwargs)
        try:
            self._trace = trace(self.module, self.left_eager, args, kwargs)
        except (RuntimeError, TypeError, ValueError) as error:
            self._explain_mismatch(error, args, kwargs)
            raise
        return self._trace

    def explain(self, x: Tensor | tuple | dict | None = None, *, measure: bool = False) -> Explanation:
        """How each block runs: program, kernel, tile, OPs, bytes, times; and why others are left as they are.

        `str()` of the result is a table, its `rows` are the data. `x` is an input as for `fusion.fuse`, and the network
        runs on it once; by default the explanation is about the input that was explained, or passed to `fusion.fuse`,
        last, or else about the plans made so far. With `measure` every launch and every other layer is timed by itself,
        on random inputs, and the network as a whole on a random input like `x`: on a GPU, in CUDA graphs.

        Raises RuntimeError for `measure` without an input on a GPU, and what calling the module raises.
        """
        if x is not None:
            args, kwargs = call_arguments(x)
            self.trace(*args, **kwargs)
        if self._trace is not None:
            return explain_trace(self.module, self.left_eager, self._trace, measure)
        if measure:
            raise RuntimeError("measuring needs an input on a CUDA GPU: pass one to explain()")
        return explain_without_trace(self.module, self.left_eager)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the module to a file for `fusion.load`: plans, packed weights and all layers (see `fusion.fused_file`).

        Raises ValueError for a network that holds what cannot be written as data, and OSError.
        """
        from fusion.fused_file import save

        save(self, path)

    def train(self, mode: bool = True) -> "FusedModule":
        """Refuse training mode; `train(False)` and `eval()` are allowed."""
        if mode:
            raise RuntimeError("a fused module is for inference: train the original module, and fuse it again")
        return super().train(False)

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            module = vars(self).get("_modules", {}).get("module")
            if module is None or not hasattr(module, name):
                raise
            return getattr(module, name)

    def _apply(self, *args, **kwargs) -> "FusedModule":
        if self.graphs is not None:
            self.graphs.clear()
        self._trace = None
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        raise RuntimeError(
            "a fused module has folded weights instead of the original's parameters, and loads no state_dict: load it "
            "into the original module and call fusion.fuse on that again; to store a fused module use its save() and "
            "fusion.load()"
        )

    def _explain_mismatch(self, error: Exception, args: tuple, kwargs: dict) -> None:
        """Raise an error that says so, if the input differs in device or dtype from layers that are not fused."""
        inputs = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point()]
        layers = [p for p in (*self.module.parameters(), *self.module.buffers()) if p.is_floating_point()]
        if not inputs or not layers:
            return
        x = inputs[0]
        devices, dtypes = ({getattr(layer, what) for layer in layers} for what in ("device", "dtype"))
        if x.device not in devices:
            raise RuntimeError(
                f"the input is on {x.device}, the layers that are not fused are on {any_of(devices)}: move one of "
                "them, the fused module with its to(), or by the device of fusion.fuse"
            ) from error
        if x.dtype not in dtypes and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(
                f"the input has dtype {x.dtype}, the layers that are not fused have {any_of(dtypes)}: convert one of "
                "them, the fused module with its to(), or by the dtype of fusion.fuse; GPUs need fp16 or bf16"
            ) from error


def call_arguments(example_input: Tensor | tuple | dict) -> tuple[tuple, dict]:
    """Positional and keyword arguments of a call: a tuple holds the former, a dict the latter, all else is one."""
    if isinstance(example_input, dict):
        return (), example_input
    return (example_input if isinstance(example_input, tuple) else (example_input,)), {}


def _refuse_gradients(args: tuple, kwargs: dict) -> None:
    needs_grad = any(isinstance(x, Tensor) and x.requires_grad for x in (*args, *kwargs.values()))
    if needs_grad and torch.is_grad_enabled():
        raise RuntimeError(
            "a fused module has no gradient, but its input requires one; call it under torch.no_grad() or "
            "torch.inference_mode(), and train the original module"
        )

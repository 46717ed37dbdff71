"""Inference twins of blocks: modules with folded weights that run a block as one operator."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from fusion import kernels, reference
from fusion.ffn_weights import FfnWeights
from fusion.identity import Identified
from fusion.kernels import Packed, Weights
from fusion.launch_record import InputKind, record_launch
from fusion.mbconv_weights import MBConvWeights
from fusion.op_checks import empty_output
from fusion.planner.blocks import convfirst as convfirst_graph
from fusion.planner.blocks import ffn as ffn_graph
from fusion.planner.blocks import mbconv as mbconv_graph
from fusion.planner.families import Tile
from fusion.planner.graph import BlockGraph
from fusion.planner.plan import Plan, plan_block
from fusion.planner.processor import Processor
from fusion.real_tensors import make_for_all, real_tensors
from fusion.relaunch import Relaunch, Relaunches, launch_key
from fusion.weights import ConvFirstWeights

Tuner = Callable[[BlockGraph, str | Processor], Plan]
"""Makes the plan of a block on a processor: `plan_block` from shapes, `fusion.tuner.tune_block` by measurement."""

REFERENCE_PROCESSOR = "h200"
"""Whose plan lays out the weights where no kernel runs, on CPUs."""


class FusedBlock(Identified):
    """A block for inference: `[N, C, H, W] -> [N, K, H, W]`, channels_last.

    Takes fp16 and bf16 on GPUs and any floating dtype on CPUs, where it computes the reference. The plan is made at the
    first input of each shape, by `tuner`; its tile says which kernel runs. Weights are packed at the first use of a
    layout; from the second input of a kind on, a call only launches kernels (`fusion.relaunch`). The module has no
    parameters and keeps no link to the block that it was folded from: fold again after training or loading. Every
    argument of a subclass's constructor is an attribute of the same name (`fusion.fused_file` relies on it).

    Attributes:
        adopted: how many plans came from elsewhere: who depends on the plans looks whether it has changed.

    Raises (in `forward`): what the operator raises, and PlanError when no tile fits the input's shape.
    """

    OPTIONS = ("activation", "residual")
    """Attributes that are neither sizes nor weights, but say what the block computes: its graph and kernels take them
    (`fusion.planner.match.OPTIONS`)."""

    stride = 1
    """Height and width of the input as multiples of the output's."""

    def __init__(self, weights: Weights, *, activation: str, residual: bool, tuner: Tuner = plan_block):
        super().__init__()
        self.weights = weights
        self.activation = activation
        self.residual = residual
        self.tuner = tuner
        self._plans: dict[tuple, Plan] = {}
        self._packed: dict[tuple, Packed] = {}
        self._relaunches = Relaunches()
        self.adopted = 0

    def plan(self, x: Tensor | InputKind) -> Plan:
        """The plan for inputs like `x`."""
        if isinstance(x, Tensor):
            x = InputKind.of(x)
        key = (x.device, kernel_dtype(x.dtype), *x.shape)
        if key not in self._plans:
            batch, channels, height, width = x.shape
            graph = self.graph(max(batch, 1), height, width, channels, x.dtype)
            self._plans[key] = self.tuner(graph, processor_of_device(x.device))
        return self._plans[key]

    @property
    def options(self) -> dict[str, object]:
        """What the block computes, besides sizes, by name."""
        return {name: getattr(self, name) for name in self.OPTIONS}

    @property
    def plans(self) -> list[tuple[torch.device, Plan]]:
        """The plans made so far, and for inputs on which device, in the order in which they were made."""
        return [(device, plan) for (device, *_), plan in self._plans.items()]

    def adopt_plan(self, device: torch.device, plan: Plan) -> None:
        """Run inputs of the plan's shape and dtype on a device by this plan, which is for this block."""
        shape = plan.shape
        key = (device, shape.dtype, shape.batch, shape.in_channels, shape.height, shape.width)
        self._plans[key] = plan
        self.adopted += 1
        self._relaunches.clear()

    @property
    def layouts(self) -> dict[tuple, Packed]:
        """Packed weights by device, dtype and layout (`fusion.kernels.packing`)."""
        return self._packed

    def graph(self, batch: int, height: int, width: int, channels: int, dtype: torch.dtype) -> BlockGraph:
        """The block as a graph, for inputs of this shape and dtype."""
        return self._graph(
            batch,
            height,
            width,
            channels,
            hidden_channels=self.weights.hidden_channels,
            out_channels=self.weights.out_channels,
            dtype=kernel_dtype(dtype),
            **self.options,
        )

    def forward(self, x: Tensor) -> Tensor:
        relaunch = self.relaunch(x)
        if relaunch is not None:
            return relaunch(x)
        if x.dim() != 4 or x.shape[1] != self.weights.in_channels:
            raise ValueError(
                f"{type(self).__name__}: the input must be [N, {self.weights.in_channels}, H, W], got {list(x.shape)}"
            )
        self.guard_identity()
        kernel, tile, packed = self._layout(x)
        run = partial(self.run, x, kernel, tile, packed)
        key = launch_key(x)
        return run() if key is None else self._relaunches.record(key, x, packed, run)

    def relaunch(self, x: Tensor) -> Relaunch | None:
        """What makes the launches for inputs like `x` again, if it can and they have been made before."""
        key = launch_key(x)
        return None if key is None else self._relaunches.get(key)

    def run(self, x: Tensor, kernel: str, tile: list[int], packed: tuple[Tensor, ...]) -> Tensor:
        """Run the block with these packed weights, or several blocks of its sizes with theirs, where a kernel can."""
        return kernels.run(kernel, x, packed, tile, self.weights, **self.options)

    def layerwise(self, x: Tensor) -> Tensor:
        """What the block computes, layer by layer in plain PyTorch, in the dtype of `x`."""
        raise NotImplementedError

    def empty_output(self, x: Tensor) -> Tensor:
        """What the block gives for inputs like `x`, not initialised."""
        return empty_output(x, self.weights.out_channels, self.stride)

    def repack(self) -> None:
        """Pack the weights again, into the tensors that hold them, after others were put in their place."""
        tiles = {kernels.packing(plan.tile): plan.tile for _, plan in self.plans}
        for (device, dtype, *layout), packed in self._packed.items():
            copy_packed(packed, kernels.pack(self.weights, tiles[tuple(layout)], dtype, device))

    def extra_repr(self) -> str:
        weights = self.weights
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        return f"{weights.in_channels}, {weights.out_channels}, hidden_channels={weights.hidden_channels}, {options}"

    def _graph(self, *sizes: int, **options) -> BlockGraph:
        raise NotImplementedError

    def _weights_on(self, device: torch.device) -> Iterator[Tensor]:
        return (tensor.to(device) for tensor in vars(self.weights).values())

    @torch.compiler.assume_constant_result
    def _layout(self, x: Tensor) -> tuple[str, list[int], tuple[Tensor, ...]]:
        """Kernel, tile and packed weights for inputs like `x`: constants to torch.compile, which cannot trace the
        planner."""
        plan = self.plan(x)
        record_launch([self], plan, x)
        return plan.kernel, plan.tile.to_ints(), self._pack(plan.tile, x).tensors()

    def _pack(self, tile: Tile, x: Tensor) -> Packed:
        key = (x.device, x.dtype, *kernels.packing(tile))
        if key not in self._packed:
            dtype, device = x.dtype, x.device
            self._packed[key] = make_for_all(lambda: kernels.pack(self.weights, tile, dtype, device), device)
        return self._packed[key]

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        if any(key.startswith(prefix) for key in state_dict):
            raise RuntimeError(
                f"{prefix.removesuffix('.') or 'this module'} is a {type(self).__name__}, whose weights are folded and "
                "are no parameters: load the state_dict into the original module, and fuse that again"
            )


class FusedConvFirst(FusedBlock):
    """ConvFirst block without a blur-pool for inference: `[N, C, H, W] -> [N, K, ceil(H / stride), ceil(W / stride)]`,
    channels_last.

    `stride` is that of the grouped convolution, 1 or 2; with 2 there is no residual. For the rest see `FusedBlock`.
    """

    OPTIONS = (*FusedBlock.OPTIONS, "stride")

    weights: ConvFirstWeights

    def __init__(
        self,
        weights: ConvFirstWeights,
        *,
        activation: str,
        residual: bool,
        stride: int = 1,
        tuner: Tuner = plan_block,
    ):
        super().__init__(weights, activation=activation, residual=residual, tuner=tuner)
        self.stride = stride

    def _graph(self, *sizes: int, **options) -> BlockGraph:
        return convfirst_graph(*sizes, group_width=self.weights.group_width, blur=False, **options)

    def layerwise(self, x: Tensor) -> Tensor:
        return reference.convfirst(x, *self._weights_on(x.device), **self.options)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, group_width={self.weights.group_width}"


class FusedFfn(FusedBlock):
    """FFN block for inference (see `FusedBlock`); on GPUs for ReLU and Hopper only."""

    weights: FfnWeights

    def _graph(self, *sizes: int, **options) -> BlockGraph:
        return ffn_graph(*sizes, **options)

    def layerwise(self, x: Tensor) -> Tensor:
        return reference.ffn(x, *self._weights_on(x.device), **self.options)


class FusedMBConv(FusedBlock):
    """MBConv block of stride 1 with squeeze-and-excitation for inference (see `FusedBlock`).

    `squeeze_activation` is that inside of squeeze-and-excitation, "relu" or "silu".
    """

    OPTIONS = (*FusedBlock.OPTIONS, "squeeze_activation")

    weights: MBConvWeights

    def __init__(
        self,
        weights: MBConvWeights,
        *,
        activation: str,
        residual: bool,
        squeeze_activation: str = "relu",
        tuner: Tuner = plan_block,
    ):
        super().__init__(weights, activation=activation, residual=residual, tuner=tuner)
        self.squeeze_activation = squeeze_activation

    @property
    def sizes(self) -> tuple[object, ...]:
        """What blocks must have in common to run in one launch."""
        shapes = tuple(tensor.shape for tensor in vars(self.weights).values())
        return *shapes, *self.options.values()

    def _graph(self, *sizes: int, **options) -> BlockGraph:
        weights = self.weights
        return mbconv_graph(
            *sizes,
            group_width=weights.group_width,
            squeeze_channels=weights.squeeze_channels,
            kernel_size=weights.kernel_size,
            **options,
        )

    def layerwise(self, x: Tensor) -> Tensor:
        return reference.mbconv(x, *self._weights_on(x.device), **self.options)

    def extra_repr(self) -> str:
        weights = self.weights
        return f"{super().extra_repr()}, squeeze_channels={weights.squeeze_channels}, group_width={weights.group_width}"


def kernel_dtype(dtype: torch.dtype) -> str:
    """Of the kernels that plans are made for: that of the input, or fp16 where none runs, on CPUs."""
    return "bfloat16" if dtype == torch.bfloat16 else "float16"


def copy_packed(packed: Packed, new: Packed) -> None:
    """Overwrite packed weights with others of their layout. Whatever runs with them sees the others."""
    with torch.no_grad():
        for old_tensor, new_tensor in zip(packed.tensors(), new.tensors(), strict=True):
            old_tensor.copy_(new_tensor)
    device = packed.tensors()[0].device
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # a kernel may read its weights before the one ahead of it has finished


def processor_of_device(device: torch.device) -> str | Processor:
    """Whose plans run on a device: a GPU, or `REFERENCE_PROCESSOR` for CPUs."""
    if device.type != "cuda":
        return REFERENCE_PROCESSOR
    from fusion.probe import processor_of

    with real_tensors():  # a GPU that is not known is measured
        return processor_of(device)

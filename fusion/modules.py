"""Inference twins of blocks: modules with folded weights that run a block as one operator."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fusion import kernels
from fusion.ffn_weights import FfnWeights
from fusion.kernels import Packed, Weights
from fusion.launch_record import record_launch
from fusion.mbconv_weights import MBConvWeights
from fusion.planner.blocks import convfirst as convfirst_graph
from fusion.planner.blocks import ffn as ffn_graph
from fusion.planner.blocks import mbconv as mbconv_graph
from fusion.planner.families import Tile
from fusion.planner.graph import BlockGraph
from fusion.planner.plan import Plan, plan_block
from fusion.planner.processor import Processor
from fusion.weights import ConvFirstWeights

Tuner = Callable[[BlockGraph, str | Processor], Plan]
"""Makes the plan of a block on a processor: `plan_block` from shapes, `fusion.tuner.tune_block` by measurement."""

REFERENCE_PROCESSOR = "h200"
"""Whose plan lays out the weights where no kernel runs, on CPUs."""


class FusedBlock(nn.Module):
    """A block for inference: `[N, C, H, W] -> [N, K, H, W]`, channels_last.

    Takes fp16 and bf16 on GPUs and any floating dtype on CPUs, where it computes the reference. The plan is made at the
    first input of each shape, by `tuner`; its tile says which kernel runs. Weights are packed at the first use of a
    layout. The module has no parameters and keeps no link to the block that it was folded from: fold again after
    training or loading. Every argument of a subclass's constructor is an attribute of the same name
    (`fusion.fused_file` relies on it).

    Raises (in `forward`): what the operator raises, and PlanError when no tile fits the input's shape.
    """

    def __init__(self, weights: Weights, *, activation: str, residual: bool, tuner: Tuner = plan_block):
        super().__init__()
        self.weights = weights
        self.activation = activation
        self.residual = residual
        self.tuner = tuner
        self._plans: dict[tuple, Plan] = {}
        self._packed: dict[tuple, Packed] = {}

    def plan(self, x: Tensor) -> Plan:
        """The plan for inputs like `x`."""
        key = (x.device, kernel_dtype(x.dtype), *x.shape)
        if key not in self._plans:
            batch, channels, height, width = x.shape
            graph = self.graph(max(batch, 1), height, width, channels, x.dtype)
            self._plans[key] = self.tuner(graph, processor_of_device(x.device))
        return self._plans[key]

    @property
    def plans(self) -> list[tuple[torch.device, Plan]]:
        """The plans made so far, and for inputs on which device, in the order in which they were made."""
        return [(device, plan) for (device, *_), plan in self._plans.items()]

    def adopt_plan(self, device: torch.device, plan: Plan) -> None:
        """Run inputs of the plan's shape and dtype on a device by this plan, which is for this block."""
        shape = plan.shape
        key = (device, shape.dtype, shape.batch, shape.in_channels, shape.height, shape.width)
        self._plans[key] = plan

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
            activation=self.activation,
            residual=self.residual,
            dtype=kernel_dtype(dtype),
        )

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != self.weights.in_channels:
            raise ValueError(
                f"{type(self).__name__}: the input must be [N, {self.weights.in_channels}, H, W], got {list(x.shape)}"
            )
        return self.run(x, *self._layout(x))

    def run(self, x: Tensor, kernel: str, tile: list[int], packed: tuple[Tensor, ...]) -> Tensor:
        """Run the block with these packed weights, or several blocks of its sizes with theirs, where a kernel can."""
        return kernels.run(kernel, x, packed, tile, self.weights, activation=self.activation, residual=self.residual)

    def extra_repr(self) -> str:
        weights = self.weights
        return (
            f"{weights.in_channels}, {weights.out_channels}, hidden_channels={weights.hidden_channels}, "
            f"activation={self.activation!r}, residual={self.residual}"
        )

    def _graph(self, *sizes: int, **options) -> BlockGraph:
        raise NotImplementedError

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
            # Ordinary tensors, whatever mode the first caller is in: they are kept for all.
            with torch.inference_mode(False), torch.no_grad():
                packed = kernels.pack(self.weights, tile, x.dtype, x.device)
            finish_packing(x.device)
            self._packed[key] = packed
        return self._packed[key]

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        if any(key.startswith(prefix) for key in state_dict):
            raise RuntimeError(
                f"{prefix.removesuffix('.') or 'this module'} is a {type(self).__name__}, whose weights are folded and "
                "are no parameters: load the state_dict into the original module, and fuse that again"
            )


class FusedConvFirst(FusedBlock):
    """ConvFirst block of stride 1 for inference (see `FusedBlock`)."""

    weights: ConvFirstWeights

    def _graph(self, *sizes: int, **options) -> BlockGraph:
        return convfirst_graph(*sizes, group_width=self.weights.group_width, **options)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, group_width={self.weights.group_width}"


class FusedFfn(FusedBlock):
    """FFN block for inference (see `FusedBlock`); on GPUs for ReLU and Hopper only."""

    weights: FfnWeights

    def _graph(self, *sizes: int, **options) -> BlockGraph:
        return ffn_graph(*sizes, **options)


class FusedMBConv(FusedBlock):
    """MBConv block of stride 1 with squeeze-and-excitation for inference (see `FusedBlock`)."""

    weights: MBConvWeights

    @property
    def sizes(self) -> tuple[object, ...]:
        """What blocks must have in common to run in one launch."""
        shapes = tuple(tensor.shape for tensor in vars(self.weights).values())
        return *shapes, self.activation, self.residual

    def _graph(self, *sizes: int, **options) -> BlockGraph:
        weights = self.weights
        return mbconv_graph(
            *sizes, group_width=weights.group_width, squeeze_channels=weights.squeeze_channels, **options
        )

    def extra_repr(self) -> str:
        weights = self.weights
        return f"{super().extra_repr()}, squeeze_channels={weights.squeeze_channels}, group_width={weights.group_width}"


def kernel_dtype(dtype: torch.dtype) -> str:
    """Of the kernels that plans are made for: that of the input, or fp16 where none runs, on CPUs."""
    return "bfloat16" if dtype == torch.bfloat16 else "float16"


def finish_packing(device: torch.device) -> None:
    """Wait for weights being packed on a device: they serve all streams."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def processor_of_device(device: torch.device) -> str | Processor:
    """Whose plans run on a device: a GPU, or `REFERENCE_PROCESSOR` for CPUs."""
    if device.type != "cuda":
        return REFERENCE_PROCESSOR
    from fusion.probe import processor_of

    return processor_of(device)

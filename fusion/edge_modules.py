"""Inference twins of a network's first and last convolution (see `fusion.modules`)."""

import torch
from torch import Tensor

from fusion import reference
from fusion.edge_weights import HeadWeights, StemWeights
from fusion.modules import FusedBlock, Tuner, kernel_dtype
from fusion.planner.blocks import conv as conv_graph
from fusion.planner.blocks import head as head_graph
from fusion.planner.graph import BlockGraph
from fusion.planner.plan import plan_block
from fusion.planner.stem_tile import KERNEL_SIZE, STRIDE
from fusion.real_tensors import make_for_all


class FusedEdge(FusedBlock):
    """What the twins of stem and head have in common: one convolution, and an activation that may be "none"."""

    weights: StemWeights | HeadWeights

    def __init__(self, weights: StemWeights | HeadWeights, *, activation: str, tuner: Tuner = plan_block):
        super().__init__(weights, activation=activation, residual=False, tuner=tuner)

    def graph(self, batch: int, height: int, width: int, channels: int, dtype: torch.dtype) -> BlockGraph:
        """The block as a graph, for inputs of this shape and dtype."""
        return self._graph(
            batch,
            height,
            width,
            channels,
            out_channels=self.weights.out_channels,
            activation=None if self.activation == "none" else self.activation,
            dtype=kernel_dtype(dtype),
        )

    def extra_repr(self) -> str:
        return f"{self.weights.in_channels}, {self.weights.out_channels}, activation={self.activation!r}"


class FusedStem(FusedEdge):
    """Dense 3x3 convolution of stride 2, zero padding 1, batch norm and activation, for inference.

    `[N, C, H, W] -> [N, K, ceil(H / 2), ceil(W / 2)]`, channels_last, for images of up to 4 channels. A channels_last
    and a contiguous input are both read as they are. `activation` is one of `fusion.reference.EDGE_ACTIVATIONS`. For
    the rest see `FusedBlock`.
    """

    weights: StemWeights

    stride = STRIDE

    def _graph(self, *sizes: int, **options) -> BlockGraph:
        return conv_graph(*sizes, kernel_size=KERNEL_SIZE, stride=STRIDE, **options)

    def layerwise(self, x: Tensor) -> Tensor:
        return reference.stem(x, *self._weights_on(x.device), self.activation)


class FusedHead(FusedEdge):
    """1x1 convolution, batch norm, activation and global average pool, for inference: `[N, C, H, W] -> [N, K]`.

    `activation` is one of `fusion.reference.EDGE_ACTIVATIONS`. For the rest see `FusedBlock`.
    """

    weights: HeadWeights

    def __init__(self, weights: HeadWeights, *, activation: str, tuner: Tuner = plan_block):
        super().__init__(weights, activation=activation, tuner=tuner)
        self._unpacked: dict[tuple, tuple[Tensor, Tensor]] = {}

    def layerwise(self, x: Tensor) -> Tensor:
        return reference.head(x, *self._weights_on(x.device), self.activation)

    def empty_output(self, x: Tensor) -> Tensor:
        """`[N, K]` for inputs like `x`, not initialised."""
        return x.new_empty((x.shape[0], self.weights.out_channels))

    def features(self, x: Tensor) -> Tensor:
        """The map ahead of the pool, `[N, K, H, W]`, layer by layer in the dtype of `x`."""
        self.guard_identity()
        return reference.head_features(x, *self._rounded(x), self.activation)

    def _graph(self, *sizes: int, **options) -> BlockGraph:
        return head_graph(*sizes, **options)

    @torch.compiler.assume_constant_result
    def _rounded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Unpacked weights for inputs like `x`, kept after their first use."""
        key = (x.device, x.dtype)
        if key not in self._unpacked:
            weights, dtype, device = (self.weights.conv, self.weights.bias), x.dtype, x.device
            self._unpacked[key] = make_for_all(lambda: tuple(each.to(device, dtype) for each in weights), device)
        return self._unpacked[key]

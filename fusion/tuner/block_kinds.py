"""Blocks that can be tuned, in one table: random weights of a shape, and what a kernel's result is judged by."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fusion import reference
from fusion.edge_weights import HeadWeights, StemWeights
from fusion.ffn_weights import FfnWeights
from fusion.kernels import Weights
from fusion.mbconv_weights import MBConvWeights
from fusion.planner.match import (
    BlockShape,
    ConvFirstDownShape,
    ConvFirstShape,
    FfnShape,
    HeadShape,
    MBConvDownShape,
    MBConvShape,
    StemConvFirstShape,
    StemShape,
    options_of,
)
from fusion.planner.stem_convfirst_hopper_tile import convfirst_shape
from fusion.stem_convfirst_weights import StemConvFirstWeights
from fusion.weights import ConvFirstWeights


@dataclass(frozen=True)
class BlockKind:
    """What is needed to check kernels of a kind of block.

    `random_weights(shape, generator)` keep the scale of the activations from block to block. `reference` takes `x`, the
    weights' tensors, and the shape's options (`fusion.planner.match.options_of`) by name.
    """

    random_weights: Callable[[BlockShape, torch.Generator], Weights]
    reference: Callable[..., Tensor]


def random_weights(shape: BlockShape, generator: torch.Generator) -> Weights:
    """Weights that keep the scale of the activations from block to block."""
    return BLOCK_KINDS[type(shape)].random_weights(shape, generator)


def apply_reference(x: Tensor, weights: Weights, shape: BlockShape) -> Tensor:
    """The block in plain PyTorch, in the dtype and on the device of `x` `[N, C, H, W]` (see `fusion.reference`)."""
    tensors = (tensor.to(x.device) for tensor in vars(weights).values())
    return BLOCK_KINDS[type(shape)].reference(x, *tensors, **options_of(shape))


def _stem(shape: StemShape, generator: torch.Generator) -> StemWeights:
    conv = _normal(generator, shape.out_channels, shape.in_channels, 3, 3, fan_in=9 * shape.in_channels)
    return StemWeights(conv, _normal(generator, shape.out_channels, fan_in=10))


def _stem_convfirst(shape: StemConvFirstShape, generator: torch.Generator) -> StemConvFirstWeights:
    stem = StemShape(
        shape.batch, shape.height, shape.width, shape.in_channels, shape.stem_channels, shape.activation, shape.dtype
    )
    return StemConvFirstWeights.join(_stem(stem, generator), _convfirst(convfirst_shape(shape), generator))


def _head(shape: HeadShape, generator: torch.Generator) -> HeadWeights:
    conv = _normal(generator, shape.out_channels, shape.in_channels, fan_in=shape.in_channels)
    return HeadWeights(conv, _normal(generator, shape.out_channels, fan_in=10))


def _ffn(
    shape: FfnShape | ConvFirstShape | ConvFirstDownShape | MBConvShape | MBConvDownShape,
    generator: torch.Generator,
    times: int = 1,
) -> FfnWeights:
    """Of a block whose expansion takes so many times the input's channels."""
    hidden, in_channels = shape.hidden_channels, times * shape.in_channels
    return FfnWeights(
        expand=_normal(generator, hidden, in_channels, fan_in=in_channels),
        expand_bias=_normal(generator, hidden, fan_in=10),
        # A small share of the sum: eight residual blocks in a row should not grow.
        project=_normal(generator, shape.out_channels, hidden, fan_in=8 * hidden),
        project_bias=_normal(generator, shape.out_channels, fan_in=100),
    )


def _convfirst(shape: ConvFirstShape, generator: torch.Generator) -> ConvFirstWeights:
    ffn = _ffn(shape, generator)
    return ConvFirstWeights(_conv(shape, shape.in_channels, generator), **vars(ffn))


def _convfirst_down(shape: ConvFirstDownShape, generator: torch.Generator) -> ConvFirstWeights:
    ffn = _ffn(shape, generator, times=2)
    return ConvFirstWeights(_conv(shape, shape.in_channels, generator), **vars(ffn))


def _mbconv(shape: MBConvShape | MBConvDownShape, generator: torch.Generator) -> MBConvWeights:
    hidden, squeezed = shape.hidden_channels, shape.squeeze_channels
    return MBConvWeights(
        **vars(_ffn(shape, generator)),
        conv=_conv(shape, hidden, generator),
        conv_bias=_normal(generator, hidden, fan_in=10),
        squeeze=_normal(generator, squeezed, hidden, fan_in=hidden),
        squeeze_bias=_normal(generator, squeezed, fan_in=10),
        excite=_normal(generator, hidden, squeezed, fan_in=squeezed),
        excite_bias=_normal(generator, hidden, fan_in=10),
    )


def _conv(
    shape: ConvFirstShape | ConvFirstDownShape | MBConvShape | MBConvDownShape,
    channels: int,
    generator: torch.Generator,
) -> Tensor:
    """Of a grouped convolution of so many channels."""
    size = shape.kernel_size
    return _normal(generator, channels, shape.group_width, size, size, fan_in=size**2 * shape.group_width)


def _normal(generator: torch.Generator, *size: int, fan_in: int) -> Tensor:
    return torch.randn(*size, generator=generator, dtype=torch.float64) / fan_in**0.5


BLOCK_KINDS = {
    ConvFirstShape: BlockKind(_convfirst, reference.convfirst),
    ConvFirstDownShape: BlockKind(_convfirst_down, reference.convfirst_down),
    FfnShape: BlockKind(_ffn, reference.ffn),
    MBConvShape: BlockKind(_mbconv, reference.mbconv),
    MBConvDownShape: BlockKind(_mbconv, reference.mbconv_down),
    StemShape: BlockKind(_stem, reference.stem),
    StemConvFirstShape: BlockKind(_stem_convfirst, reference.stem_convfirst),
    HeadShape: BlockKind(_head, reference.head),
}
"""By the type of the shape."""

"""Kernels to draw: made up by hand, and layer-wise programs as long as those of whole networks."""

from dataclasses import dataclass

from fusion.planner.blocks import conv, mbconv
from fusion.planner.layer_kind import LayerKind
from fusion.planner.lower import layerwise
from fusion.planner.waterline import HasCost


@dataclass(frozen=True)
class Cost:
    """A kernel."""

    ops_count: int
    bytes: int
    layer_kind: LayerKind = LayerKind.OTHER
    name: str = "kernel"


@dataclass(frozen=True)
class Kernels:
    """A program."""

    kernels: tuple[HasCost, ...]


def bottlenecks(batch: int = 128) -> Kernels:
    """The 99 convolutions of a ResNet-101's blocks, some of them far above any waterline."""
    kernels = []
    for channels, hw, depth in ((64, 56, 3), (128, 28, 4), (256, 14, 23), (512, 7, 3)):
        for _ in range(depth):
            kernels += layerwise(conv(batch, hw, hw, 4 * channels, channels, 1)).kernels
            kernels += layerwise(conv(batch, hw, hw, channels)).kernels
            kernels += layerwise(conv(batch, hw, hw, channels, 4 * channels, 1)).kernels
    return Kernels(tuple(kernels))


def depthwise_blocks(batch: int = 128) -> Kernels:
    """600 kernels of MBConv blocks with depth-wise convolutions: about those of a large EfficientNet."""
    kernels = []
    for channels, hw, depth in ((24, 112, 6), (40, 56, 12), (112, 28, 30), (192, 14, 38)):
        for _ in range(depth):
            kernels += layerwise(mbconv(batch, hw, hw, channels, 6, group_width=1)).kernels
    return Kernels(tuple(kernels[:600]))

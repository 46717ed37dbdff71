"""Operational intensity of single convolutions over their number of channels (paper figure 2e).

OPs and bytes are those of the layer-wise program: the input and the weights are read once, the output is written once.
In fp16 that makes TRS / (1 + C/K + TRS/NHW) OP per byte (the paper's equation 24; a bias is free here).
"""

from collections.abc import Iterable
from dataclasses import dataclass

from fusion.planner import blocks
from fusion.planner.layer_kind import LayerKind
from fusion.planner.lower import layerwise


@dataclass(frozen=True)
class ConvType:
    """A convolution of stride 1 with ``expansion`` times as many output as input channels.

    ``group_width`` are the input channels of a group, None if there is but one group.
    """

    name: str
    label: str
    kernel_size: int
    group_width: int | None = None
    expansion: int = 1

    def fits(self, channels: int) -> bool:
        """Whether this many channels divide into groups."""
        return self.group_width is None or channels % self.group_width == 0


CONV_TYPES = (
    ConvType("dense", "dense 3×3", 3),
    ConvType("pointwise", "point-wise, K = 4C", 1, expansion=4),
    ConvType("grouped32", "grouped 3×3, T = 32", 3, group_width=32),
    ConvType("grouped8", "grouped 3×3, T = 8", 3, group_width=8),
    ConvType("depthwise", "depth-wise 3×3", 3, group_width=1),
)
"""Those of the figure, and the groups of 8 channels of the paper's own blocks."""


@dataclass(frozen=True)
class IntensityPoint:
    """Cost of a convolution that has ``channels`` input channels: OPs, and bytes of DRAM traffic."""

    conv_type: ConvType
    channels: int
    layer_kind: LayerKind
    ops_count: int
    bytes: int

    @property
    def intensity(self) -> float:
        """Operational intensity, in OP/byte."""
        return self.ops_count / self.bytes


def conv_intensity(
    conv_type: ConvType, channels: int, batch: int = 128, hw: int = 28, dtype: str = "float16"
) -> IntensityPoint:
    """Cost of one convolution of ``batch`` images of ``hw`` x ``hw`` pixels.

    Raises ValueError for sizes that are not positive, and for channels that do not divide into groups.
    """
    graph = blocks.conv(
        batch,
        hw,
        hw,
        channels,
        conv_type.expansion * channels,
        conv_type.kernel_size,
        group_width=conv_type.group_width,
        dtype=dtype,
    )
    (kernel,) = layerwise(graph).kernels
    return IntensityPoint(conv_type, channels, kernel.layer_kind, kernel.ops_count, kernel.bytes)


def intensity_curve(
    conv_type: ConvType, channels: Iterable[int], batch: int = 128, hw: int = 28, dtype: str = "float16"
) -> tuple[IntensityPoint, ...]:
    """`conv_intensity` at each number of channels that divides into groups.

    Raises ValueError for sizes that are not positive.
    """
    return tuple(conv_intensity(conv_type, c, batch, hw, dtype) for c in channels if conv_type.fits(c))

import pytest
import torch

from fusion.planner.families import FAMILIES
from fusion.planner.match import (
    ConvFirstDownShape,
    ConvFirstShape,
    FfnShape,
    HeadShape,
    MBConvDownShape,
    MBConvShape,
    StemConvFirstShape,
    StemShape,
)
from fusion.tuner.block_kinds import BLOCK_KINDS, apply_reference, random_weights

SHAPES = [
    ConvFirstShape(2, 8, 6, 24, 72, 24, 8, "relu", True, "float16"),
    ConvFirstShape(2, 7, 6, 24, 72, 40, 8, "gelu", False, "float16", stride=2),
    ConvFirstDownShape(2, 8, 6, 24, 72, 40, 8, "silu", "float16"),
    FfnShape(2, 8, 6, 24, 72, 24, "relu", True, "float16"),
    MBConvShape(2, 8, 6, 24, 72, 24, 6, 8, "silu", True, "float16"),
    MBConvDownShape(2, 8, 6, 24, 72, 40, 6, 8, "silu", "float16", squeeze_activation="silu"),
    MBConvDownShape(2, 7, 1, 24, 72, 40, 6, 8, "silu", "float16", blur=False),
    MBConvShape(2, 8, 6, 24, 72, 24, 6, 8, "silu", True, "float16", kernel_size=5),
    MBConvDownShape(2, 7, 3, 24, 72, 40, 6, 8, "silu", "float16", kernel_size=5, blur=False),
    StemShape(2, 8, 6, 3, 24, "relu", "float16"),
    StemConvFirstShape(2, 8, 12, 3, 24, 72, 24, 8, "relu", True, "float16"),
    HeadShape(2, 8, 6, 24, 72, "silu", "float16"),
]


def test_every_shape_that_a_kernel_runs_has_a_kind():
    assert set(BLOCK_KINDS) == {family.shape_type for family in FAMILIES}


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: type(shape).__name__)
def test_weights_fit_the_shape_and_keep_the_scale(shape):
    weights = random_weights(shape, torch.Generator().manual_seed(0))
    for name in ("in_channels", "hidden_channels", "out_channels", "squeeze_channels", "group_width"):
        assert getattr(weights, name, None) == getattr(shape, name, None), name
    if hasattr(weights, "kernel_size"):
        assert weights.kernel_size == shape.kernel_size
    torch.manual_seed(0)
    x = torch.randn(shape.batch, shape.in_channels, shape.height, shape.width, dtype=torch.float64)
    out = apply_reference(x, weights, shape)
    size = (shape.out_height, shape.out_width) if hasattr(shape, "out_height") else ()
    assert out.shape == (shape.batch, shape.out_channels, *size)
    assert 0.03 < out.std() < 3

import pytest

from fusion.planner.intensity import CONV_TYPES, ConvType, conv_intensity, intensity_curve
from fusion.planner.layer_kind import LayerKind

TYPES = {conv_type.name: conv_type for conv_type in CONV_TYPES}
DENSE, POINTWISE, GROUPED32, GROUPED8, DEPTHWISE = CONV_TYPES


def closed_form(conv_type, channels, pixels):
    """The paper's equation 24, in fp16."""
    filter_size = (conv_type.group_width or channels) * conv_type.kernel_size**2
    return filter_size / (1 + 1 / conv_type.expansion + filter_size / pixels)


@pytest.mark.parametrize("batch, hw", [(128, 28), (1, 14), (2, 1)])
@pytest.mark.parametrize("conv_type", CONV_TYPES, ids=lambda conv_type: conv_type.name)
def test_closed_form(conv_type, batch, hw):
    points = intensity_curve(conv_type, (16, 32, 64, 128, 256, 512), batch, hw)
    assert len(points) == (5 if conv_type is GROUPED32 else 6)
    for point in points:
        assert point.intensity == pytest.approx(closed_form(conv_type, point.channels, batch * hw * hw))


def test_ops_and_bytes_by_hand():
    point = conv_intensity(POINTWISE, 64, batch=2, hw=4)
    assert point.ops_count == 2 * 32 * 64 * 256
    assert point.bytes == 2 * (32 * 64 + 64 * 256 + 32 * 256)
    assert conv_intensity(POINTWISE, 64, batch=2, hw=4, dtype="float32").bytes == 2 * point.bytes


@pytest.mark.parametrize(
    "conv_type, channels, expected",
    [
        (DENSE, 16, 9 * 16 / 2),
        (DENSE, 64, 9 * 64 / 2),
        (POINTWISE, 64, 64 / 1.25),
        (POINTWISE, 256, 256 / 1.25),
        (GROUPED32, 32, 144),
        (GROUPED32, 512, 144),
        (GROUPED8, 256, 36),
        (DEPTHWISE, 16, 4.5),
        (DEPTHWISE, 512, 4.5),
    ],
)
def test_limits_of_many_pixels(conv_type, channels, expected):
    assert conv_intensity(conv_type, channels).intensity == pytest.approx(expected, rel=0.005)


def test_a_layer_of_many_weights_and_few_pixels_approaches_the_pixels():
    assert conv_intensity(DENSE, 2048, batch=1, hw=4).intensity == pytest.approx(16, rel=0.01)


def test_kinds():
    kinds = {name: conv_intensity(conv_type, 64).layer_kind for name, conv_type in TYPES.items()}
    assert kinds == {
        "dense": LayerKind.CONVOLUTION,
        "pointwise": LayerKind.POINTWISE,
        "grouped32": LayerKind.GROUPED,
        "grouped8": LayerKind.GROUPED,
        "depthwise": LayerKind.DEPTHWISE,
    }


def test_channels_that_do_not_divide_into_groups():
    assert [point.channels for point in intensity_curve(GROUPED32, (16, 32, 48, 64))] == [32, 64]
    assert DENSE.fits(7) and not ConvType("grouped", "grouped", 3, group_width=2).fits(7)
    with pytest.raises(ValueError, match="do not divide into groups of 32"):
        conv_intensity(GROUPED32, 16)


@pytest.mark.parametrize("sizes", [{"channels": 0}, {"channels": 16, "batch": 0}, {"channels": 16, "hw": -1}])
def test_sizes_that_are_not_positive(sizes):
    with pytest.raises(ValueError, match="positive integer"):
        conv_intensity(DENSE, **sizes)

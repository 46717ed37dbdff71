from itertools import product

import pytest
import torch
import torch.nn.functional as F

from fusion.convfirst_down_weights import (
    blur_taps,
    blurred_taps,
    pack_convfirst_down,
    unpack_expand,
    unpack_taps,
)
from fusion.planner.convfirst_down_tile import ConvFirstDownTile, regions
from fusion.planner.hopper_tile import HopperTile
from fusion.planner.tile import ConvFirstTile
from fusion.reference import blur_pool, convfirst_down
from models.blurpool import BlurPool

TILE = ConvFirstDownTile(16, 32, 32, 2)


@torch.no_grad()
@pytest.mark.parametrize("group_width", [4, 8])
def test_folding_a_block_is_exact(group_width, random_block, fold):
    block = random_block(24, 40, expansion=3, stride=2, group_width=group_width).double()
    weights = fold(block)
    sizes = weights.in_channels, weights.hidden_channels, weights.out_channels, weights.group_width
    assert sizes == (24, 72, 40, group_width) and weights.is_concatenated
    assert weights.expand.shape == (72, 48)
    x = torch.randn(2, 24, 5, 8, dtype=torch.float64)
    out = convfirst_down(x, *vars(weights).values(), "relu")
    torch.testing.assert_close(out, block(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [(2, 2), (5, 8)])
def test_the_reference_blurs_as_the_model_does(size):
    x = torch.randn(2, 24, *size, dtype=torch.float64)
    torch.testing.assert_close(blur_pool(x), BlurPool(24).double()(x), rtol=1e-15, atol=1e-15)


def by_region(x, taps):
    """A 5x5 convolution of stride 2 with zero padding 2, by taps `[9, C, T, 5, 5]` of the kind of border."""
    _, channels, height, width = x.shape
    out = torch.full((len(x), channels, (height + 1) // 2, (width + 1) // 2), float("nan"), dtype=x.dtype)
    for weight, (top, rows, left, columns) in zip(taps, regions(height, width), strict=True):
        region = ..., slice(top, top + rows), slice(left, left + columns)
        out[region] = F.conv2d(x, weight, stride=2, padding=2, groups=channels // weight.shape[1])[region]
    return out


@pytest.mark.parametrize("height, width", list(product(range(2, 8), repeat=2)))
def test_taps_are_the_convolution_and_its_blur(height, width):
    torch.manual_seed(0)
    conv = torch.randn(6, 3, 3, 3, dtype=torch.float64)
    x = torch.randn(2, 6, height, width, dtype=torch.float64)
    expected = blur_pool(F.conv2d(x, conv, padding=1, groups=2))
    torch.testing.assert_close(by_region(x, blurred_taps(conv)), expected, rtol=1e-12, atol=1e-12)
    blur = blur_taps()[:, None, None].expand(9, 6, 1, 5, 5)
    torch.testing.assert_close(by_region(x, blur), blur_pool(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_blurs_are_exact_in_16_bits(dtype):
    assert torch.equal(blur_taps(dtype).double(), blur_taps())


@pytest.mark.parametrize(
    "channels, group_width, slab", [(24, 8, 16), (24, 8, 32), (72, 4, 64), (48, 16, 16), (8, 1, 16)]
)
def test_packed_weights_by_element(channels, group_width, slab, random_weights):
    weights = random_weights(channels, 40, 16, group_width, stride=2)
    tile = ConvFirstDownTile(16, 32, slab, 2)
    packed = pack_convfirst_down(weights, tile, torch.float64, "cpu")
    slabs = tile.in_slabs(channels)
    assert packed.expand.shape == (2 * sum(slabs), 64) and packed.project.shape == (64, 16)
    assert torch.equal(unpack_expand(packed.expand, slabs, channels)[:, :40].T, weights.expand)
    taps = blurred_taps(weights.conv)
    assert torch.equal(unpack_taps(packed.conv, slabs, channels, group_width), taps)
    # As the kernel finds them: kind of border, slab, tap, input channel, and the slab's channels twice.
    blur, start, row = blur_taps(), 0, 0
    by_border = packed.conv.reshape(9, -1)
    for slab in slabs:
        dense = by_border[:, start : start + 50 * slab * slab].reshape(9, 5, 5, slab, 2 * slab)
        first = row // 2
        for out_channel in range(slab):
            for in_channel in range(slab):
                expected = blur if in_channel == out_channel else torch.zeros_like(blur)
                assert torch.equal(dense[..., in_channel, out_channel], expected)
                expected = torch.zeros_like(blur)
                group = first + out_channel - (first + out_channel) % group_width
                if group <= first + in_channel < group + group_width and first + out_channel < channels:
                    expected = taps[:, first + out_channel, first + in_channel - group]
                assert torch.equal(dense[..., in_channel, slab + out_channel], expected)
        real = min(slab, channels - first)
        assert torch.equal(packed.expand[row : row + real, :40], weights.expand[:, first : first + real].T)
        of_conv = packed.expand[row + slab : row + slab + real, :40]
        assert torch.equal(of_conv, weights.expand[:, channels + first : channels + first + real].T)
        assert not packed.expand[row + real : row + slab].any()
        assert not packed.expand[row + slab + real : row + 2 * slab].any()
        start, row = start + 50 * slab * slab, row + 2 * slab
    assert not packed.expand[:, 40:].any() and not packed.project[40:].any()
    assert torch.equal(packed.project[:40], weights.project.T)
    assert packed.expand_bias.dtype == packed.project_bias.dtype == torch.float32
    assert torch.equal(packed.expand_bias[:40], weights.expand_bias.float()) and not packed.expand_bias[40:].any()


def test_weights_are_rounded_once(random_weights):
    weights = random_weights(24, 40, stride=2)
    exact, rounded = (pack_convfirst_down(weights, TILE, dtype, "cpu") for dtype in (torch.float64, torch.float16))
    for name in ("conv", "expand", "project"):
        assert torch.equal(getattr(rounded, name), getattr(exact, name).half())


def test_slabs_that_split_groups_are_refused(random_weights):
    weights = random_weights(64, 40, group_width=32, stride=2)
    with pytest.raises(ValueError, match=r"split groups of 32 channels; use a tile with a wider conv_slab"):
        pack_convfirst_down(weights, ConvFirstDownTile(16, 32, 16, 2), torch.float16, "cpu")


def test_weights_of_the_other_stride_are_refused(random_weights):
    with pytest.raises(
        ValueError, match=r"of a block without a blur-pool cannot be packed for .*; use a ConvFirstTile"
    ):
        pack_convfirst_down(random_weights(24, 40), TILE, torch.float16, "cpu")
    weights = random_weights(24, 40, stride=2)
    for pack, tile in (
        (weights.pack, ConvFirstTile(4, 8, 32, 32, 2)),
        (weights.pack_hopper, HopperTile(64, 32, 3, 1, 1, 32, 0)),
    ):
        with pytest.raises(
            ValueError, match=r"of a block with a blur-pool cannot be packed for .*; use a ConvFirstDownTile"
        ):
            pack(tile, torch.float16, "cpu")

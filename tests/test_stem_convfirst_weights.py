import pytest
import torch
from torch.nn import functional as F

from fusion.edge_weights import StemWeights
from fusion.planner.stem_convfirst_hopper_tile import StemConvFirstHopperTile
from fusion.stem_convfirst_weights import StemConvFirstWeights, stem_sizes, unpack_stem_convfirst

SIZES = [(8, 16), (16, 16), (16, 32), (24, 32), (32, 32)]
"""Channels of the stem, and of the ring."""


def stem_weights(channels, in_channels=3):
    generator = torch.Generator().manual_seed(channels)
    conv = torch.randn(channels, in_channels, 3, 3, generator=generator, dtype=torch.float64)
    return StemWeights(conv, torch.randn(channels, generator=generator, dtype=torch.float64))


def joined(random_weights, channels, **options):
    return StemConvFirstWeights.join(stem_weights(channels), random_weights(channels, 2 * channels, **options))


def test_joining(random_weights):
    weights = joined(random_weights, 24, out_channels=40)
    assert (weights.in_channels, weights.stem_channels, weights.hidden_channels) == (3, 24, 48)
    assert (weights.out_channels, weights.group_width) == (40, 8)
    again = StemConvFirstWeights.join(weights.stem, weights.block)
    assert all(map(torch.equal, vars(weights).values(), vars(again).values()))
    with pytest.raises(ValueError, match="a stem of 16 output channels and a block of 24 input channels cannot run"):
        StemConvFirstWeights.join(stem_weights(16), random_weights(24, 48))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("channels, slab", SIZES)
def test_packed_weights_hold_both(channels, slab, dtype, random_weights):
    weights, tile = joined(random_weights, channels), StemConvFirstHopperTile(16, 1, slab)
    packed = weights.pack(tile, dtype, "cpu")
    assert list(packed.stem.shape) == stem_sizes(tile) == [3, 16, 2 * slab]
    assert packed.stem.dtype == packed.weights.dtype == dtype
    alone = weights.block.pack_hopper(tile.block, dtype, "cpu")
    assert torch.equal(packed.weights, alone.weights) and torch.equal(packed.project_bias, alone.project_bias)
    sizes = channels, weights.hidden_channels, weights.out_channels
    stem, (conv, expand, expand_bias, project) = unpack_stem_convfirst(packed.stem, packed.weights, tile, *sizes)
    assert torch.equal(stem.conv, weights.stem_conv.to(dtype))
    tolerance = 4 * (torch.finfo(dtype).eps ** 2 + torch.finfo(torch.float32).eps * (dtype != torch.float64))
    torch.testing.assert_close(stem.bias.double(), weights.stem_bias, rtol=tolerance, atol=tolerance)
    for name, tensor in (("conv", conv), ("expand", expand), ("expand_bias", expand_bias), ("project", project)):
        assert torch.equal(tensor, getattr(weights, name).to(dtype)), name


def swap_quads(z, units, a, b):
    """As the kernel's."""
    return z.reshape(z.shape[0], units, a, b, 2).permute(0, 1, 3, 2, 4).reshape(z.shape)


@pytest.mark.parametrize("channels, slab", SIZES)
def test_the_product_of_windows_is_the_stem(channels, slab, random_weights):
    """What the kernel does with a row: windows from memory, a one in place of their first element, two permutations."""
    height, width = 3, 12
    packed = joined(random_weights, channels).pack(StemConvFirstHopperTile(16, 1, slab), torch.float64, "cpu")
    x = torch.randn(3, 2 * height, 2 * width, dtype=torch.float64)
    weights = stem_weights(channels)
    expected = F.relu(F.conv2d(x[None], weights.conv, weights.bias, stride=2, padding=1))[0]
    rows = F.pad(x.permute(1, 2, 0).reshape(2 * height, -1), (4, 12 * (64 - width // 2), 1, 0))
    for y in range(height):
        windows = rows[2 * y : 2 * y + 3].unfold(1, 16, 12).clone()  # [3, 64 groups, 16]
        windows[:, : width // 2, 0] = 1
        windows[:, width // 2 :] = 0
        product = sum(swap_quads(window, 1, 4, 2) @ packed.stem[i] for i, window in enumerate(windows))
        ring = swap_quads(F.relu(product), slab // 16, 4, 4).reshape(128, slab)
        torch.testing.assert_close(ring[:width, :channels], expected[:, y].T)
        assert not ring[width:].any() and not ring[:, channels:].any()


def test_a_bias_beyond_the_largest_number_keeps_its_value(random_weights):
    weights, tile = joined(random_weights, 16), StemConvFirstHopperTile(16, 1, 16)
    weights.stem_bias.fill_(1e5)
    packed = weights.pack(tile, torch.float16, "cpu")
    stem, _ = unpack_stem_convfirst(packed.stem, packed.weights, tile, 16, 32, 16)
    torch.testing.assert_close(stem.bias.double(), weights.stem_bias, rtol=1e-3, atol=0)


def test_what_cannot_be_packed(random_weights):
    tile = StemConvFirstHopperTile(16, 1, 16)
    four = StemConvFirstWeights.join(stem_weights(16, in_channels=4), random_weights(16, 32))
    with pytest.raises(ValueError, match=r"a stem of 4 input channels cannot be packed for .* only of 3"):
        four.pack(tile, torch.float16, "cpu")
    wide = StemConvFirstWeights.join(stem_weights(16), random_weights(16, 32, group_width=16))
    with pytest.raises(ValueError, match="groups of 16 channels are not supported"):
        wide.pack(tile, torch.float16, "cpu")

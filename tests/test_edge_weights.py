import pytest
import torch
from torch import nn

from fusion.edge_weights import HeadWeights, StemWeights, head_sizes, stem_sizes, unpack_stem
from fusion.planner.head_tile import HeadTile
from fusion.planner.stem_tile import BIAS_TERMS, StemTile, window

TILE, HEAD_TILE = StemTile(2, 32, 2, 2), HeadTile(16, 32, 2, 2, 2)


def random_bn(channels):
    bn = nn.BatchNorm2d(channels).eval()
    nn.init.uniform_(bn.weight, 0.5, 1.5)
    nn.init.normal_(bn.bias)
    bn.running_mean.normal_()
    bn.running_var.uniform_(0.5, 2.0)
    return bn


def stem_weights(channels=3, out_channels=24):
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    return StemWeights(normal(out_channels, channels, 3, 3), normal(out_channels))


def test_folding():
    torch.manual_seed(0)
    conv, bn = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False).double(), random_bn(8).double()
    weights = StemWeights.fold(conv, bn)
    x = torch.randn(1, 3, 7, 9, dtype=torch.float64)
    folded = nn.functional.conv2d(x, weights.conv, weights.bias, stride=2, padding=1)
    torch.testing.assert_close(folded, bn(conv(x)))
    assert (weights.in_channels, weights.out_channels) == (3, 8)

    conv, bn = nn.Conv2d(16, 24, 1).double(), random_bn(24).double()
    weights = HeadWeights.fold(conv, bn)
    x = torch.randn(1, 16, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(nn.functional.conv2d(x, weights.conv[:, :, None, None], weights.bias), bn(conv(x)))
    assert (weights.in_channels, weights.out_channels) == (16, 24)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("channels, out_channels, group", [(3, 24, 2), (3, 16, 4), (1, 8, 2), (4, 8, 4)])
def test_a_packed_stem_holds_its_weights(channels, out_channels, group, dtype):
    weights, tile = stem_weights(channels, out_channels), StemTile(2, 64, group, 2)
    packed = weights.pack(tile, dtype, "cpu")
    for name, tensor in vars(packed).items():
        assert list(tensor.shape) == stem_sizes(tile, channels, out_channels)[name]
        assert tensor.dtype == dtype
    unpacked = unpack_stem(packed, tile, channels, out_channels)
    assert torch.equal(unpacked.conv, weights.conv.to(dtype))
    tolerance = torch.finfo(dtype).eps ** 2 + torch.finfo(torch.float32).eps * (dtype != torch.float64)
    torch.testing.assert_close(unpacked.bias.double(), weights.bias, rtol=4 * tolerance, atol=4 * tolerance)


def test_a_bias_beyond_the_largest_number_keeps_its_value():
    weights = stem_weights()
    weights.bias[0] = 100_000.0
    bias = unpack_stem(weights.pack(TILE, torch.float16, "cpu"), TILE, 3, 24).bias
    assert bias[0] == pytest.approx(100_000, rel=1e-3)


@pytest.mark.parametrize("planar", [False, True], ids=["interleaved", "planar"])
@pytest.mark.parametrize("group", [2, 4])
def test_a_packed_stem_has_the_filter_where_each_pixel_looks(group, planar):
    weights = stem_weights()
    packed = weights.pack(StemTile(2, 64, group, 2), torch.float64, "cpu")
    elements = window(3, group, planar)
    operand = (packed.planar if planar else packed.interleaved)[:, : group * 24]
    operand = operand.reshape(4, elements.columns, group, 24)
    expected = torch.zeros_like(operand)
    for pixel in range(group):
        for dy in range(3):
            for dx in range(3):
                for channel in range(3):
                    column = elements.column(2 * pixel + dx - 1, channel)
                    expected[dy, column, pixel] = weights.conv[:, channel, dy, dx]
    expected[3, 0] = weights.bias
    assert torch.equal(operand, expected)
    assert operand[3, BIAS_TERMS:].count_nonzero() == 0


def test_a_packed_head_is_padded_with_zeros():
    generator = torch.Generator().manual_seed(0)
    weights = HeadWeights(
        torch.randn(40, 24, generator=generator, dtype=torch.float64),
        torch.randn(40, generator=generator, dtype=torch.float64),
    )
    packed = weights.pack(HEAD_TILE, torch.float16, "cpu")
    assert head_sizes(HEAD_TILE, 24, 40) == {"conv": [64, 32], "bias": [64]}
    assert (packed.conv.shape, packed.bias.shape) == ((64, 32), (64,))
    assert (packed.conv.dtype, packed.bias.dtype) == (torch.float16, torch.float32)
    assert torch.equal(packed.conv[:40, :24], weights.conv.half())
    assert torch.equal(packed.bias[:40], weights.bias.float())
    assert packed.conv.count_nonzero() <= 40 * 24
    assert packed.bias[40:].count_nonzero() == packed.conv[40:].count_nonzero() == 0

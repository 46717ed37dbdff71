from dataclasses import replace

import pytest
import torch
from torch import nn

from fusion.mbconv_weights import mbconv_sizes, packed_kernel_size, unpack_mbconv
from fusion.planner.mbconv_down_tile import MBConvDownTile
from fusion.planner.plan import PlanError
from fusion.reference import mbconv_down
from models import MBConv

TILE = MBConvDownTile(2, 3, 2, 4, 32, 16, 16, 16, 2, 2, 16, 32, 16, 64, 2, 2)


def random_block(channels, out_channels, **options):
    """Of stride 2, in eval mode, with random batch norm statistics, float64."""
    torch.manual_seed(channels)
    block = MBConv(channels, out_channels, stride=2, **options).eval().double()
    for bn in (block.expand_bn, block.conv_bn, block.project_bn):
        nn.init.uniform_(bn.weight, 0.5, 1.5)
        nn.init.normal_(bn.bias)
        bn.running_mean.normal_()
        bn.running_var.uniform_(0.5, 2.0)
    return block.requires_grad_(False)


@pytest.mark.parametrize("size", [(5, 7), (6, 8), (2, 2), (3, 2)], ids=str)
@pytest.mark.parametrize(
    "out_channels, options",
    [
        (24, {}),
        (40, {"activation": nn.ReLU, "group_width": 16, "expansion": 2}),
        (48, {"group_width": 1, "se_ratio": 0.125, "squeeze_activation": nn.SiLU}),
        (40, {"blur": False}),
        (40, {"blur": False, "kernel_size": 5}),
    ],
    ids=str,
)
def test_folded_weights_compute_the_block(out_channels, options, size):
    block = random_block(24, out_channels, **options)
    x = torch.randn(2, 24, *size, dtype=torch.float64)
    fused = block.fused()
    folded = mbconv_down(x, *vars(fused.weights).values(), fused.activation, fused.squeeze_activation, fused.blur)
    torch.testing.assert_close(folded, block(x))
    torch.testing.assert_close(fused(x), block(x), rtol=0, atol=1e-5)  # biases are packed in fp32
    assert fused(x).is_contiguous(memory_format=torch.channels_last)
    assert fused.plan(x).shape.kernel_size == options.get("kernel_size", 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_error_in_16_bits(dtype, device, assert_within_rule):
    block = random_block(24, 48, squeeze_activation=nn.SiLU).to(device)
    fused = block.fused()
    x = torch.randn(2, 24, 9, 12).to(device, dtype)
    exact = block(x.double())
    assert_within_rule(fused(x), block.to(dtype)(x), exact)


def test_compiles_as_one_graph_and_prints_its_sizes():
    block = random_block(24, 48, expansion=3, squeeze_activation=nn.SiLU).float()
    fused = block.fused()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    for size in ((2, 24, 5, 7), (3, 24, 6, 6)):
        x = torch.randn(*size)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), block(x), rtol=1e-4, atol=1e-4)
    assert repr(fused) == (
        "FusedMBConvDown(24, 48, hidden_channels=72, activation='silu', residual=False, squeeze_activation='silu', "
        "blur=True, squeeze_channels=6, group_width=8)"
    )


def test_images_that_cannot_be_blurred_are_refused():
    fused = random_block(16, 16).float().fused()
    x = torch.randn(1, 16, 1, 8)
    with pytest.raises(PlanError, match="images of 1x8 pixels are too small: a blur-pool reflects its input"):
        fused(x)
    block = random_block(16, 16, blur=False).float()
    assert block.conv.stride == (2, 2) and block.blur is None
    torch.testing.assert_close(block.fused()(x), block(x), rtol=1e-4, atol=1e-4)


def test_a_blur_pool_after_another_than_a_3x3_convolution_is_refused():
    fused = random_block(16, 16, kernel_size=5).float().fused()
    with pytest.raises(PlanError, match="kernel size 5 with a blur-pool is not supported, use 3, or let the conv"):
        fused(torch.randn(1, 16, 8, 8))


@pytest.mark.parametrize("tile", [TILE, replace(TILE, hidden=128, conv_slab=64, project_out=16)], ids=str)
@pytest.mark.parametrize(
    "channels, hidden, out_channels, squeeze, group_width, kernel_size",
    [(24, 40, 24, 6, 8, 3), (144, 64, 200, 3, 1, 3), (8, 96, 72, 18, 16, 3), (24, 40, 24, 6, 8, 5)],
    ids=str,
)
def test_packing_is_undone(
    channels, hidden, out_channels, squeeze, group_width, kernel_size, tile, random_mbconv_weights
):
    weights = random_mbconv_weights(channels, hidden, out_channels, squeeze, group_width, kernel_size)
    packed = weights.pack(tile, torch.float64, "cpu")
    assert packed_kernel_size(packed.conv) == kernel_size
    sizes = mbconv_sizes(tile, channels, hidden, out_channels, squeeze, kernel_size)
    assert {name: list(tensor.shape) for name, tensor in vars(packed).items()} == sizes
    unpacked = unpack_mbconv(packed, channels, hidden, out_channels, squeeze, group_width)
    for name, tensor in vars(unpacked).items():
        expected = getattr(weights, name)
        assert torch.equal(tensor, expected.float() if name.endswith("bias") else expected), name


def test_layout_of_the_convolution(random_mbconv_weights):
    """The matrix of a slab convolves quads: rows are neighbours times channels, columns pixels times channels."""
    weights = random_mbconv_weights(24, 40, squeeze=3)
    packed = weights.pack(TILE, torch.float64, "cpu")
    assert packed.conv.shape == (4, 16 * 16, 4 * 16)
    slab = packed.conv[1].reshape(4, 4, 16, 2, 2, 16)
    channel, group = 27, slice(24 - 16, 32 - 16)  # in slab 1 (16 to 31), group 3 (24 to 31)
    for row in range(2):
        for column in range(2):
            taps = slab[:, :, :, row, column, channel - 16]  # [4, 4, slab in]
            expected = torch.zeros(4, 4, 16, dtype=torch.float64)
            expected[row : row + 3, column : column + 3, group] = weights.conv[channel].permute(1, 2, 0)
            assert torch.equal(taps, expected)
    assert not packed.conv[3].any() and not packed.conv[2, :, 8:16].any(), "padding"

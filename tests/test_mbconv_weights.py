from dataclasses import replace

import pytest
import torch
from torch import nn

from fusion.mbconv_weights import mbconv_sizes, packed_kernel_size, unpack_mbconv
from fusion.planner.mbconv_tile import MBConvTile
from fusion.reference import mbconv
from models import MBConv

TILE = MBConvTile(2, 4, 8, 32, 16, 16, 2, 2, 32, 16, 64, 2, 2)


def random_block(channels, out_channels, **options):
    """In eval mode, with random batch norm statistics, float64."""
    torch.manual_seed(channels)
    block = MBConv(channels, out_channels, **options).eval().double()
    for bn in (block.expand_bn, block.conv_bn, block.project_bn):
        nn.init.uniform_(bn.weight, 0.5, 1.5)
        nn.init.normal_(bn.bias)
        bn.running_mean.normal_()
        bn.running_var.uniform_(0.5, 2.0)
    return block.requires_grad_(False)


@pytest.mark.parametrize(
    "out_channels, options",
    [
        (24, {}),
        (40, {"activation": nn.ReLU, "group_width": 16, "expansion": 2}),
        (24, {"group_width": 1, "se_ratio": 0.125, "squeeze_activation": nn.SiLU}),
        (24, {"kernel_size": 5}),
    ],
    ids=str,
)
def test_folded_weights_compute_the_block(out_channels, options):
    block = random_block(24, out_channels, **options)
    x = torch.randn(2, 24, 5, 7, dtype=torch.float64)
    fused = block.fused()
    folded = mbconv(x, *vars(fused.weights).values(), **fused.options)
    torch.testing.assert_close(folded, block(x))
    torch.testing.assert_close(fused(x), block(x), rtol=0, atol=1e-5)  # biases are packed in fp32
    assert fused.residual == (out_channels == 24)
    assert fused.plan(x).shape.kernel_size == options.get("kernel_size", 3)


def test_folded_weights_share_no_memory_with_the_block():
    block = random_block(16, 16)
    fused = block.fused()
    x = torch.randn(1, 16, 3, 3, dtype=torch.float64)
    before = fused(x)
    fused._packed.clear()
    for tensor in (*block.parameters(), *block.buffers()):
        if tensor.is_floating_point():
            tensor.zero_()
    assert torch.equal(fused(x), before)


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
    assert packed_kernel_size(packed.conv) == weights.kernel_size == kernel_size
    sizes = mbconv_sizes(tile, channels, hidden, out_channels, squeeze, kernel_size)
    assert {name: list(tensor.shape) for name, tensor in vars(packed).items()} == sizes
    unpacked = unpack_mbconv(packed, channels, hidden, out_channels, squeeze, group_width)
    for name, tensor in vars(unpacked).items():
        expected = getattr(weights, name)
        assert torch.equal(tensor, expected.float() if name.endswith("bias") else expected), name


def test_layout(random_mbconv_weights):
    """A slab's taps as [in, out], zero between its groups; padding is zero."""
    weights = random_mbconv_weights(24, 40, squeeze=3)
    packed = weights.pack(TILE, torch.float64, "cpu")
    channel, tap = 27, (2, 1)  # in slab 1 (16 to 31), group 3 (24 to 31)
    column = packed.conv[1, 3 * tap[0] + tap[1], :, channel - 16]
    assert torch.equal(column[8:], weights.conv[channel, :, *tap])
    assert not column[:8].any()
    assert torch.equal(packed.squeeze[5, :3], weights.squeeze[:, 5])
    assert torch.equal(packed.excite[5, :3], weights.excite[5])
    assert not packed.conv[3:].any() and not packed.conv_bias[40:].any()
    assert not packed.squeeze[:, 3:].any() and not packed.squeeze[40:].any() and not packed.excite[:, 3:].any()
    assert not packed.expand[24:].any() and not packed.expand[:, 40:].any()
    assert not packed.project[40:].any() and not packed.project[:, 24:].any()


def test_slabs_that_split_groups_are_refused(random_mbconv_weights):
    weights = random_mbconv_weights(16, 64, group_width=32)
    with pytest.raises(ValueError, match=r"slabs of 16 channels split groups of 32; use a tile with a wider conv_slab"):
        weights.pack(TILE, torch.float16, "cpu")


def test_a_linear_layer_may_have_no_bias():
    block = random_block(16, 16)
    block.se.squeeze.bias = None
    block.se.excite.bias = None
    x = torch.randn(2, 16, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(block.fused()(x), block(x), rtol=0, atol=1e-5)

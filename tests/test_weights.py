import pytest
import torch
from torch import nn

from fusion.planner.tile import ConvFirstTile
from fusion.weights import ConvFirstWeights, fold_batch_norm, unpack_conv


def random_batch_norm(channels, **options):
    bn = nn.BatchNorm2d(channels, **options).double().eval()
    bn.running_mean.normal_()
    bn.running_var.uniform_(0.1, 2.0)
    if bn.affine:
        nn.init.normal_(bn.weight)
        nn.init.normal_(bn.bias)
    return bn


@torch.no_grad()
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_folding_batch_norm_is_exact(bias, affine):
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 24, 3, padding=1, groups=4, bias=bias).double()
    bn = random_batch_norm(24, affine=affine, eps=1e-2)
    weight, folded_bias = fold_batch_norm(conv, bn)
    x = torch.randn(2, 16, 5, 7, dtype=torch.float64)
    y = nn.functional.conv2d(x, weight, folded_bias, padding=1, groups=4)
    torch.testing.assert_close(y, bn(conv(x)), rtol=1e-12, atol=1e-12)


def test_folding_is_done_in_float64_and_shares_no_memory():
    conv, bn = nn.Conv2d(8, 8, 1, bias=True), nn.BatchNorm2d(8)
    tensors = fold_batch_norm(conv.half(), bn.half())
    before = [tensor.clone() for tensor in tensors]
    for tensor in (*conv.parameters(), *bn.parameters(), *bn.buffers()):
        tensor.detach().fill_(2)
    for tensor, copy in zip(tensors, before, strict=True):
        assert tensor.dtype == torch.float64 and not tensor.requires_grad
        assert torch.equal(tensor, copy)


def test_batch_norm_without_statistics_is_refused():
    with pytest.raises(ValueError, match=r"without running statistics cannot be folded.*track_running_stats=True"):
        fold_batch_norm(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8, track_running_stats=False))


@pytest.mark.parametrize("out_channels", [24, 32])
def test_folding_a_block_is_exact(out_channels, random_block, fold):
    block = random_block(24, out_channels, expansion=3, group_width=4).double()
    weights = fold(block)
    sizes = weights.in_channels, weights.hidden_channels, weights.out_channels, weights.group_width
    assert sizes == (24, 72, out_channels, 4)
    x = torch.randn(2, 24, 5, 7, dtype=torch.float64)
    y = nn.functional.conv2d(x, weights.conv, padding=1, groups=6)
    h = torch.relu(torch.einsum("hc,ncyx->nhyx", weights.expand, y) + weights.expand_bias[:, None, None])
    z = torch.einsum("kh,nhyx->nkyx", weights.project, h) + weights.project_bias[:, None, None]
    torch.testing.assert_close(x + z if out_channels == 24 else z, block(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("group_width", [1, 8, 16])
@pytest.mark.parametrize("slab", [16, 32, 64])
@pytest.mark.parametrize("channels", [8, 16, 24, 40, 48, 72, 96, 144])
def test_packing_can_be_undone(channels, slab, group_width, random_weights):
    if channels % group_width:
        channels += 8
    tile = ConvFirstTile(4, 8, 32, slab, 1)
    weights = random_weights(channels, 40, 24, group_width)
    packed = weights.pack(tile, torch.float64, "cpu")
    slabs = tile.in_slabs(channels)
    assert packed.conv.shape == (9 * sum(slab * slab for slab in slabs),)
    assert torch.equal(unpack_conv(packed.conv, slabs, channels, group_width), weights.conv)
    assert packed.conv.count_nonzero() == weights.conv.count_nonzero(), "zero between groups and in the padding"
    for matrix, original in (
        (packed.expand, weights.expand.T),
        (packed.expand_bias[None], weights.expand_bias[None].float()),
        (packed.project, weights.project.T),
        (packed.project_bias[None], weights.project_bias[None].float()),
    ):
        rows, columns = original.shape
        assert torch.equal(matrix[:rows, :columns], original)
        assert matrix.count_nonzero() == original.count_nonzero()
    assert packed.expand.shape == (sum(slabs), 64)
    assert packed.project.shape == (64, 32)


def test_packed_convolution_by_hand():
    """Slab, tap, input channel, output channel: in that order."""
    conv = torch.arange(24 * 8 * 9, dtype=torch.float64).reshape(24, 8, 3, 3) + 1
    weights = ConvFirstWeights(conv, torch.zeros(16, 24), torch.zeros(16), torch.zeros(8, 16), torch.zeros(8))
    first, second = weights.pack(ConvFirstTile(4, 8, 16, 16, 1), torch.float64, "cpu").conv.reshape(2, 9, 16, 16)
    assert first[5, 8 + 3, 8 + 6] == conv[8 + 6, 3, 1, 2]
    assert second[7, 3, 6] == conv[16 + 6, 3, 2, 1]
    assert not first[:, :8, 8:].any() and not first[:, 8:, :8].any()
    assert not second[:, 8:].any() and not second[:, :, 8:].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_are_rounded_once(dtype, random_weights):
    weights = random_weights(24, 40)
    tile = ConvFirstTile(4, 8, 32, 32, 1)
    packed = weights.pack(tile, dtype, "cpu")
    assert [tensor.dtype for tensor in packed.tensors()] == [dtype, dtype, torch.float32, dtype, torch.float32]
    assert all(tensor.is_contiguous() for tensor in packed.tensors())
    assert torch.equal(unpack_conv(packed.conv, (32,), 24, 8), weights.conv.to(dtype))
    assert torch.equal(packed.expand[:24, :40], weights.expand.T.to(dtype))
    assert torch.equal(packed.expand_bias[:40], weights.expand_bias.float())
    assert torch.equal(packed.project[:40, :24], weights.project.T.to(dtype))


def test_slabs_that_split_groups_are_refused(random_weights):
    with pytest.raises(ValueError, match=r"slabs \(16, 16\).*split groups of 32 channels"):
        random_weights(32, 64, group_width=32).pack(ConvFirstTile(4, 8, 32, 16, 1), torch.float16, "cpu")

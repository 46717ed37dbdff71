import pytest
import torch
from torch import nn

from fusion.planner.hopper_tile import HopperTile, weight_bytes, weight_sizes
from fusion.planner.match import ConvFirstShape
from fusion.planner.tile import ConvFirstTile
from fusion.weights import ConvFirstWeights, LinearMap, Statistics, unpack_conv, unpack_hopper


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
    folded = LinearMap.of(conv, bn)
    x = torch.randn(2, 16, 5, 7, dtype=torch.float64)
    y = nn.functional.conv2d(x, folded.weight, folded.bias, padding=1, groups=4)
    torch.testing.assert_close(y, bn(conv(x)), rtol=1e-12, atol=1e-12)


def test_folding_is_done_in_float64_and_shares_no_memory():
    conv, bn = nn.Conv2d(8, 8, 1, bias=True), nn.BatchNorm2d(8)
    maps = LinearMap.of(conv.half(), bn.half()), LinearMap.of(conv), LinearMap.of(conv.double())
    tensors = [tensor for each in maps for tensor in (each.weight, each.bias)]
    before = [tensor.clone() for tensor in tensors]
    for tensor in (*conv.parameters(), *bn.parameters(), *bn.buffers()):
        tensor.detach().fill_(2)
    for tensor, copy in zip(tensors, before, strict=True):
        assert tensor.dtype == torch.float64 and not tensor.requires_grad
        assert torch.equal(tensor, copy)


@pytest.mark.parametrize("scale", [torch.rand(24, 1, 1), torch.tensor(0.3)], ids=["channels", "number"])
def test_folding_a_scale_after_batch_norm_is_exact(scale):
    conv, bn, x = nn.Conv2d(16, 24, 1).double(), random_batch_norm(24), torch.randn(2, 16, 5, 7, dtype=torch.float64)
    folded = LinearMap.fold(conv.weight, conv.bias, Statistics.of(bn), scale)
    y = nn.functional.conv2d(x, folded.weight, folded.bias)
    torch.testing.assert_close(y, scale * bn(conv(x)), rtol=1e-12, atol=1e-12)
    linear, vector = nn.Linear(16, 24).double(), torch.randn(2, 16, dtype=torch.float64)
    folded = LinearMap.fold(linear.weight, linear.bias, scale=scale)
    y = nn.functional.linear(vector, folded.matrix, folded.bias)
    torch.testing.assert_close(y, scale.flatten() * linear(vector), rtol=1e-12, atol=1e-12)


def test_batch_norm_without_statistics_is_refused():
    with pytest.raises(ValueError, match=r"without running statistics cannot be folded.*track_running_stats=True"):
        LinearMap.of(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8, track_running_stats=False))


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


HOPPER_TILES = [HopperTile(64, hidden, 3, 1, 1, slab, 0) for hidden in (16, 32, 64) for slab in (16, 64)]


@pytest.mark.parametrize("tile", HOPPER_TILES, ids=str)
@pytest.mark.parametrize("out_channels", [None, 40])
@pytest.mark.parametrize("channels", [8, 16, 24, 48, 72, 96, 144])
def test_packing_for_hopper_can_be_undone(channels, out_channels, tile, random_weights):
    weights = random_weights(channels, 40, out_channels)
    packed = weights.pack_hopper(tile, torch.float64, "cpu")
    sizes = channels, 40, weights.out_channels
    assert packed.weights.shape == (sum(weight_sizes(tile, *sizes)),)
    assert packed.weights.numel() % 64 == 0, "rows that TMA reads"
    conv, expand, expand_bias, project = unpack_hopper(packed.weights, tile, *sizes)
    assert torch.equal(conv, weights.conv)
    assert torch.equal(expand, weights.expand)
    assert torch.equal(expand_bias, weights.expand_bias)
    assert torch.equal(project, weights.project)
    # Nothing is there twice; all else is zero.
    tensors = (weights.conv, weights.expand, weights.expand_bias, weights.project)
    assert packed.weights.count_nonzero() == sum(tensor.count_nonzero() for tensor in tensors)
    assert packed.project_bias.shape == (sum(tile.out_slabs(weights.out_channels)),)
    assert torch.equal(packed.project_bias[: weights.out_channels], weights.project_bias.float())
    assert not packed.project_bias[weights.out_channels :].any()


@pytest.mark.parametrize("tile", HOPPER_TILES, ids=str)
def test_the_planner_counts_the_bytes_that_are_packed(tile, random_weights):
    """The kernel keeps the output's bias in 16 bits, and not what pads the weights."""
    shape = ConvFirstShape(1, 8, 8, 72, 100, 40, 8, "relu", False, "float16")
    packed = random_weights(72, 100, 40).pack_hopper(tile, torch.float16, "cpu")
    padding = 2 * weight_sizes(tile, 72, 100, 40)[-1]
    assert packed.weights.nbytes - padding + packed.project_bias.nbytes // 2 == weight_bytes(tile, shape)


def test_packed_taps_are_products_of_shifted_rows(random_weights):
    """Pieces of two groups, three columns, three rows from the last to the first, against F.conv2d."""
    weights, pieces = random_weights(24, 16), 2
    packed = weights.pack_hopper(HOPPER_TILES[0], torch.float64, "cpu")
    taps = packed.weights[: pieces * 9 * 16 * 16].reshape(pieces, 3, 3, 16, 16)
    torch.manual_seed(0)
    x = torch.randn(1, 24, 3, 9, dtype=torch.float64)
    y = nn.functional.conv2d(x, weights.conv, padding=(0, 1), groups=3)[0, :, 0]  # [24, 9]
    padded = nn.functional.pad(x[0], (1, 1, 0, 0, 0, 8)).reshape(pieces, 16, 3, 11)
    found = sum(
        taps[:, dx, 2 - dy] @ padded[:, :, dy, dx : dx + 9] for dx in range(3) for dy in range(3)
    )  # [pieces, 16, 9]
    torch.testing.assert_close(found.reshape(32, 9)[:24], y, rtol=1e-12, atol=1e-12)


def test_matrices_packed_for_hopper_by_hand():
    """Steps of hidden channels, in each the slabs of expand, then of project; the bias as quads of threads hold it."""
    expand = torch.arange(40 * 24, dtype=torch.float64).reshape(40, 24) + 1
    project = -torch.arange(48 * 40, dtype=torch.float64).reshape(48, 40) - 1
    bias = torch.arange(40, dtype=torch.float64) + 0.5
    weights = ConvFirstWeights(torch.zeros(24, 8, 3, 3), expand, bias, project, torch.zeros(48))
    tile = HopperTile(64, 32, 3, 1, 1, 32, 0)
    packed = weights.pack_hopper(tile, torch.float64, "cpu").weights[2 * 9 * 16 * 16 :]
    step = packed[: 2 * 32 * (32 + 48)].reshape(2, -1)[1]  # hidden channels 32 to 63
    u, v0, v1 = (part.reshape(32, -1) for part in step.split([32 * 32, 32 * 32, 32 * 16]))
    # Eight neighbours stay together. In rows of 64 bytes their place is xored by half of the row, in those of 32 bytes
    # by a fourth.
    assert u[5, (0 ^ 5 // 2 % 4) * 8 + 7] == expand[32 + 7, 5]
    assert u[:24].count_nonzero() == u.count_nonzero() == 24 * 8
    # Output channels in units of 16, 4 x 2 x 2 of them as 2 x 4 x 2.
    assert tile.unit(48) == 16
    channel, column = 16 + 4 * 3 + 2 * 1 + 1, 16 + 8 * 1 + 2 * 3 + 1
    assert v0[7, (column // 8 ^ 7 // 2 % 4) * 8 + column % 8] == project[channel, 32 + 7]
    assert v1[5, (1 ^ 5 // 4 % 2) * 8 + 7] == project[32 + 15, 32 + 5]
    assert not v0[8:].any() and not v1[8:].any()
    # [thread of a quad, eight columns, neighbours] of hidden channels 0 to 31
    threads = packed[2 * 32 * (32 + 48) :][:32].reshape(4, 4, 2)
    assert threads[2, 3].tolist() == [8 * 3 + 2 * 2 + 0.5, 8 * 3 + 2 * 2 + 1.5]


@pytest.mark.parametrize("columns", [16, 32, 64])
def test_chunks_are_swizzled_as_products_read_them(columns):
    """16 bytes at address a of a matrix are where a has bits 4 and up xored by bits 7 and up."""
    weights = ConvFirstWeights(
        torch.zeros(64, 8, 3, 3),
        torch.arange(columns * 64.0).reshape(columns, 64),
        *map(torch.zeros, (columns, (8, columns), 8)),
    )
    packed = weights.pack_hopper(HopperTile(64, columns, 2, 1, 1, 16, 0), torch.float64, "cpu").weights
    chunk = packed[4 * 9 * 16 * 16 :][: 64 * columns]
    for row, column in ((0, 0), (3, 9), (21, columns - 1), (63, 5)):
        address = 2 * (row * columns + column)
        address ^= (address >> 7) % (columns // 8) << 4
        assert chunk[address // 2] == weights.expand[column, row]


def test_short_matrices_are_padded_to_atoms(random_weights):
    """16 x 16 elements of each of expand and project take 512."""
    tile = HopperTile(64, 16, 3, 1, 1, 16, 0)
    weights = random_weights(16, 16)
    packed = weights.pack_hopper(tile, torch.float64, "cpu").weights
    assert weight_sizes(tile, 16, 16, 16) == (9 * 16 * 16, 2 * 512, 16, 48)
    expand, project = packed[9 * 16 * 16 :][:1024].reshape(2, 512)
    assert expand[:256].all() and not expand[256:].any()
    assert project[:256].all() and not project[256:].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_are_rounded_once_for_hopper(dtype, random_weights):
    weights, tile = random_weights(24, 40), HOPPER_TILES[1]
    packed = weights.pack_hopper(tile, dtype, "cpu")
    assert [tensor.dtype for tensor in packed.tensors()] == [dtype, torch.float32]
    assert all(tensor.is_contiguous() for tensor in packed.tensors())
    exact = (weights.conv, weights.expand, weights.expand_bias, weights.project)
    for tensor, original in zip(unpack_hopper(packed.weights, tile, 24, 40, 24), exact, strict=True):
        assert torch.equal(tensor, original.to(dtype))


def test_other_groups_than_of_8_are_refused_for_hopper(random_weights):
    with pytest.raises(ValueError, match=r"groups of 16 channels are not supported, only of 8; use a ConvFirstTile"):
        random_weights(32, 64, group_width=16).pack_hopper(HOPPER_TILES[0], torch.float16, "cpu")

from itertools import product

import pytest
import torch

from fusion import kernels
from fusion.mbconv_hopper_weights import PackedMBConvHopper, pack_mbconv_hopper, packed_sizes, unpack_mbconv_hopper
from fusion.planner.mbconv_hopper_tile import MBConvHopperTile

TILES = [MBConvHopperTile(1, 1, 8, 8), MBConvHopperTile(1, 4, 4, 16)]
TILE = TILES[1]
SIZES = [
    # C, hidden, K, squeeze
    (24, 96, 24, 6),
    (40, 160, 112, 3),
    (72, 288, 40, 18),
    (128, 512, 256, 32),
    (8, 8, 8, 1),
    (16, 328, 200, 33),
]
FP32 = ("squeeze_bias", "excite_bias", "project_bias")


@pytest.fixture
def pack(random_mbconv_weights):
    """`(C, hidden, K, squeeze) -> weights, packed`, both in float64 but for biases in fp32."""

    def packed_weights(channels, hidden, out_channels, squeeze):
        weights = random_mbconv_weights(channels, hidden, out_channels, squeeze)
        return weights, pack_mbconv_hopper(weights, TILE, torch.float64, "cpu")

    return packed_weights


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_packing_is_undone(tile, sizes, random_mbconv_weights):
    weights = random_mbconv_weights(*sizes)
    packed = pack_mbconv_hopper(weights, tile, torch.float64, "cpu")
    assert {name: list(tensor.shape) for name, tensor in vars(packed).items()} == packed_sizes(tile, *sizes)
    assert all(tensor.is_contiguous() for tensor in packed.tensors())
    for name, tensor in vars(unpack_mbconv_hopper(packed, tile, *sizes)).items():
        expected = getattr(weights, name)
        assert torch.equal(tensor, expected.float() if name in FP32 else expected), name


def test_all_tiles_share_weights(random_mbconv_weights):
    weights = random_mbconv_weights(40, 160, 112, 3)
    packed = [kernels.pack(weights, tile, torch.float16, "cpu") for tile in TILES]
    assert all(isinstance(each, PackedMBConvHopper) for each in packed)
    assert kernels.packing(TILES[0]) == kernels.packing(TILES[1])
    assert all(map(torch.equal, packed[0].tensors(), packed[1].tensors()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_are_rounded_once(dtype, random_mbconv_weights):
    sizes = 24, 96, 40, 6
    weights = random_mbconv_weights(*sizes)
    packed = pack_mbconv_hopper(weights, TILE, dtype, "cpu")
    for name, tensor in vars(packed).items():
        assert tensor.dtype == (torch.float32 if name in FP32 else dtype), name
    for name, tensor in vars(unpack_mbconv_hopper(packed, TILE, *sizes)).items():
        expected = getattr(weights, name)
        assert torch.equal(tensor, expected.float() if name in FP32 else expected.to(dtype)), name


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_padding_is_zero(sizes, pack):
    """There are as many elements that are not zero as there are weights."""
    channels, hidden, out_channels, squeeze = sizes
    weights, packed = pack(*sizes)
    count = {name: int(tensor.count_nonzero()) for name, tensor in vars(packed).items()}
    assert count == {
        "expand": hidden * channels,
        "weights": hidden * 8 * 9 + hidden * out_channels,
        "biases": 2 * hidden,
        "squeeze": hidden * squeeze,
        "squeeze_bias": squeeze,
        "excite": hidden * squeeze,
        "excite_bias": hidden,
        "project_bias": out_channels,
    }
    assert all(tensor.count_nonzero() == tensor.numel() for tensor in vars(weights).values())


def test_expand_is_as_threads_hold_the_left_operand(pack):
    """Fragments of mma: thread 32 warp + 4 row + pair has 8 elements, [column + 8][row + 8][2 columns].

    Row m = 16 warp + 8 half + row of the product is hidden channel 32 half + 8 warp + row of its chunk.
    """
    weights, packed = pack(40, 160, 112, 3)
    assert list(packed.expand.shape) == [3, 3, 128, 8]
    for chunk, k in product(range(3), range(3)):
        for warp, row, pair, half, second, odd in product((0, 1, 3), (0, 5), range(4), (0, 1), (0, 1), (0, 1)):
            hidden = 64 * chunk + 32 * half + 8 * warp + row
            channel = 16 * k + 8 * second + 2 * pair + odd
            found = packed.expand[chunk, k, 32 * warp + 4 * row + pair, 4 * second + 2 * half + odd]
            expected = weights.expand[hidden, channel] if hidden < 160 and channel < 40 else 0
            assert found == expected, (chunk, k, warp, row, pair, half, second, odd)


def test_taps_are_dense_pieces_of_two_groups(pack):
    """[pieces, 3 columns, 3 rows, 16 out, 16 in], the last row first, as shared memory holds rows of 32 bytes."""
    weights, packed = pack(24, 72, 40, 3)
    taps = packed.weights.flatten()[: 8 * 9 * 256].reshape(8, 3, 3, 16, 2, 8)
    for channel, dx, dy, ins in product((0, 7, 8, 29, 45, 63, 71), range(3), range(3), range(16)):
        piece, out = divmod(channel, 16)
        place = ins // 8 ^ out // 4 % 2
        expected = weights.conv[channel, ins % 8, dy, dx] if ins // 8 == out // 8 else 0
        assert taps[piece, dx, 2 - dy, out, place, ins % 8] == expected, (channel, dx, dy, ins)
    assert not taps[5:].any()


@pytest.mark.parametrize("sizes, step", [((8, 72, 200, 3), 32), ((8, 72, 112, 3), 64)], ids=str)
def test_the_projection_is_steps_of_slabs(sizes, step, pack):
    """[steps, slabs, step, 64] as shared memory holds rows of 128 bytes."""
    weights, packed = pack(*sizes)
    channels = sizes[2]
    slabs = -(-channels // 64)
    project = packed.weights.flatten()[8 * 9 * 256 :].reshape(128 // step, -1, step, 8, 8)
    widths = TILE.store_slabs(channels)
    assert project.shape[1] == len(widths)
    assert len(widths) >= slabs
    starts = [sum(widths[:index]) for index in range(len(widths))]
    for hidden, (slab, start), column in product((0, 9, 31, 47, 71, 72), enumerate(starts), (0, 8, 15)):
        row = hidden % step
        found = project[hidden // step, slab, row, column // 8 ^ row % 8, column % 8]
        channel = start + column
        expected = weights.project[channel, hidden] if hidden < 72 and channel < channels else 0
        assert found == expected, (hidden, slab, column)


def test_biases_are_of_a_partitions_chunks(pack):
    """Every other chunk: the expansion's in the order of the product's rows, then the convolution's."""
    weights, packed = pack(24, 328, 24, 3)
    assert list(packed.biases.shape) == [2, 512]
    for hidden in (0, 8, 31, 32, 63, 64, 127, 200, 327):
        chunk, channel = divmod(hidden, 64)
        half, warp, row = channel // 32, channel % 32 // 8, channel % 8
        place = packed.biases[chunk % 2, 128 * (chunk // 2) :]
        assert place[16 * warp + 8 * half + row] == weights.expand_bias[hidden]
        assert place[64 + channel] == weights.conv_bias[hidden]


def test_other_weights_are_transposed(pack):
    weights, packed = pack(24, 328, 40, 18)
    assert list(packed.squeeze.shape) == [384, 32] and list(packed.excite.shape) == [32, 512]
    assert torch.equal(packed.squeeze[:328, :18], weights.squeeze.T)
    assert torch.equal(packed.excite[:18, :328], weights.excite.T)


@pytest.mark.parametrize("group_width", [4, 16])
def test_other_groups_are_refused(group_width, random_mbconv_weights):
    weights = random_mbconv_weights(16, 64, group_width=group_width)
    message = (
        rf"weights cannot be packed for MBConvHopperTile\(.*groups of {group_width} channels are not supported, only"
    )
    for pack in (pack_mbconv_hopper, kernels.pack):
        with pytest.raises(ValueError, match=f"{message} of 8; use an MBConvTile"):
            pack(weights, TILE, torch.float16, "cpu")

from itertools import product

import pytest
import torch

from fusion import kernels
from fusion.mbconv_hopper_weights import (
    PackedMBConvHopper,
    pack_mbconv_hopper,
    packed_sizes,
    stack_mbconv_hopper,
    unpack_mbconv_hopper,
)
from fusion.mbconv_weights import MBConvWeights
from fusion.planner.mbconv_hopper_tile import MBConvHopperTile

TILES = [MBConvHopperTile(2, 4, 32, 3), MBConvHopperTile(1, 4, 64, 2)]
TILE = TILES[0]
SIZES = [
    # C, hidden, K, squeeze
    (24, 96, 24, 6),
    (40, 160, 112, 3),
    (72, 288, 40, 18),
    (128, 512, 256, 32),
    (8, 8, 8, 1),
    (16, 328, 200, 33),
    (144, 576, 208, 36),
    (48, 192, 240, 48),
    (24, 136, 24, 100),
]
FP32 = ("conv_bias", "squeeze_bias", "excite_bias", "project_bias")
HALVED = ("expand", "expand_bias", "conv", "conv_bias")


@pytest.fixture
def pack(random_mbconv_weights):
    """`(C, hidden, K, squeeze) -> weights, packed`, both in float64 but for biases in fp32; of one block."""

    def packed_weights(channels, hidden, out_channels, squeeze, tile=TILE):
        weights = random_mbconv_weights(channels, hidden, out_channels, squeeze)
        return weights, pack_mbconv_hopper(weights, tile, torch.float64, "cpu")

    return packed_weights


def fragment_start(depth, depths, thread):
    """First of a thread's 8 elements for a product of depth 16, in a sweep of the left operands of `depths` of them.

    Two products that follow each other lie side by side, 16 elements a thread; an odd last one is alone.
    """
    if depth == depths - 1 and depths % 2:
        return depth * 256 * 8 + thread * 8
    return depth // 2 * 256 * 16 + thread * 16 + depth % 2 * 8


def fragment_elements(packed, depths):
    """Some of left operands `[1, 2 sweeps, elements]`: sweep, depth, warp, row and column of 16, element."""
    assert list(packed.shape) == [1, 2, depths * 256 * 8]
    for sweep, depth, warp, row, pair in product((0, 1), range(depths), (0, 1, 2, 7), (0, 5), range(4)):
        start = fragment_start(depth, depths, 32 * warp + 4 * row + pair)
        for half, group, odd in product((0, 1), (0, 1), (0, 1)):
            element = packed[0, sweep, start + 4 * half + 2 * group + odd]
            yield sweep, depth, warp, 8 * group + row, 8 * half + 2 * pair + odd, element


def assert_unpacked(unpacked, weights):
    """Of weights packed in float64."""
    for name, tensor in vars(unpacked).items():
        expected = getattr(weights, name)
        assert torch.equal(tensor, expected.float() if name in FP32 else expected), name


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_packing_is_undone(tile, sizes, pack):
    weights, packed = pack(*sizes, tile)
    assert {name: list(tensor.shape) for name, tensor in vars(packed).items()} == packed_sizes(tile, *sizes)
    assert all(tensor.is_contiguous() for tensor in packed.tensors())
    (unpacked,) = unpack_mbconv_hopper(packed, tile, *sizes)
    assert_unpacked(unpacked, weights)


@pytest.mark.parametrize("sizes", SIZES[:2], ids=str)
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_blocks_are_stacked_in_order(tile, sizes, pack):
    weights, first = pack(*sizes, tile)
    others = MBConvWeights(*(tensor.flip(0) for tensor in vars(weights).values()))
    second = pack_mbconv_hopper(others, tile, torch.float64, "cpu")
    stacked = stack_mbconv_hopper([first, second])
    assert {name: list(tensor.shape) for name, tensor in vars(stacked).items()} == packed_sizes(tile, *sizes, blocks=2)
    assert all(tensor.is_contiguous() for tensor in stacked.tensors())
    for both, *each in zip(stacked.tensors(), first.tensors(), second.tensors(), strict=True):
        assert both.dtype == each[0].dtype
        assert torch.equal(both[:1], each[0]) and torch.equal(both[1:], each[1])
    for unpacked, expected in zip(unpack_mbconv_hopper(stacked, tile, *sizes), (weights, others), strict=True):
        assert_unpacked(unpacked, expected)


def test_tiles_of_equal_step_share_weights(random_mbconv_weights):
    """Only the projection knows the step."""
    weights = random_mbconv_weights(40, 160, 112, 3)
    tiles = [TILE, MBConvHopperTile(1, 1, 32, 8), MBConvHopperTile(2, 4, 64, 3)]
    packed = [kernels.pack(weights, tile, torch.float16, "cpu") for tile in tiles]
    assert all(isinstance(each, PackedMBConvHopper) for each in packed)
    assert kernels.packing(tiles[0]) == kernels.packing(tiles[1]) != kernels.packing(tiles[2])
    assert all(map(torch.equal, packed[0].tensors(), packed[1].tensors()))
    names = vars(packed[0])
    differ = [name for name in names if not torch.equal(getattr(packed[0], name), getattr(packed[2], name))]
    assert differ == ["project"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_are_rounded_once(dtype, random_mbconv_weights):
    sizes = 24, 96, 40, 6
    weights = random_mbconv_weights(*sizes)
    packed = pack_mbconv_hopper(weights, TILE, dtype, "cpu")
    for name, tensor in vars(packed).items():
        assert tensor.dtype == (torch.float32 if name in FP32 else dtype), name
    (unpacked,) = unpack_mbconv_hopper(packed, TILE, *sizes)
    for name, tensor in vars(unpacked).items():
        scale = 2 if name in HALVED else 1
        expected = (getattr(weights, name) / scale).to(torch.float32 if name in FP32 else dtype) * scale
        assert torch.equal(tensor, expected), name


@pytest.mark.parametrize("dtype, error", [(torch.float16, 2**-21), (torch.bfloat16, 2**-16)], ids=str)
def test_the_expansions_bias_is_nearly_exact(dtype, error, random_mbconv_weights):
    """What its rounding lost is packed as well: the channel after it, of the third product, the last and an odd one."""
    weights = random_mbconv_weights(24, 96, 40, 6)
    expand = pack_mbconv_hopper(weights, TILE, dtype, "cpu").expand
    threads = expand[0, 0, 2 * 8 * 256 :].reshape(8, 8, 4, 2, 2, 2)  # warp, row, pair, half, group, 2 channels
    rounded, lost = (threads[:, :, 0, 0, :, i].transpose(1, 2).flatten()[:96].double() for i in (0, 1))
    half = weights.expand_bias / 2
    assert torch.equal(rounded, half.to(dtype).double())
    assert torch.equal(lost, (half - rounded).to(dtype).double()) and lost.any()
    torch.testing.assert_close(rounded + lost, half, rtol=error, atol=2**-24)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_padding_is_zero(sizes, pack):
    """There are as many elements that are not zero as there are weights.

    In float64 rounding loses nothing of the expansion's bias. That of the convolution is there for both rows of pixels.
    """
    channels, hidden, out_channels, squeeze = sizes
    weights, packed = pack(*sizes)
    count = {name: int(tensor.count_nonzero()) for name, tensor in vars(packed).items()}
    assert count == {
        "expand": hidden * (channels + 1),
        "taps": hidden * 8 * 9,
        "conv_bias": 2 * hidden,
        "squeeze": hidden * squeeze,
        "squeeze_bias": squeeze,
        "excite": hidden * squeeze,
        "excite_bias": hidden,
        "project": hidden * out_channels,
        "project_bias": out_channels,
    }
    assert all(tensor.count_nonzero() == tensor.numel() for tensor in vars(weights).values())


@pytest.mark.parametrize("channels, ins", [(24, 32), (40, 48), (8, 16)], ids=str)
def test_expand_is_as_threads_hold_the_left_operand(channels, ins, pack):
    """Fragments of mma: thread 32 warp + 4 row + pair has 8 elements, [column + 8][row + 8][2 columns].

    Row + 8 is the warp's second group of channels. After the input's channels comes the bias.
    """
    weights, packed = pack(channels, 160, 112, 3)
    for sweep, depth, warp, row, column, found in fragment_elements(packed.expand, ins // 16 + 1):
        hidden, channel = 128 * sweep + 16 * warp + row, 16 * depth + column
        expected = 0
        if hidden < 160 and channel < channels:
            expected = weights.expand[hidden, channel] / 2
        elif hidden < 160 and channel == ins:
            expected = weights.expand_bias[hidden] / 2
        assert found == expected, (hidden, channel)


def test_taps_are_as_threads_hold_the_right_operand(pack):
    """Lane 4 out + pair has 8 elements of each piece, of two groups and two input channels.

    Three pieces are [group][above, below], one for each column; then [left, middle][group] and [right, none][group].
    """
    weights, packed = pack(24, 136, 40, 3)
    assert list(packed.taps.shape) == [1, 2, 5, 8, 32, 8]
    taps = packed.taps[0]
    for channel, ins, dx in product((0, 7, 8, 29, 45, 63, 71, 127, 128, 135), range(8), range(3)):
        sweep, warp, group, out = channel // 128, channel % 128 // 16, channel % 16 // 8, channel % 8
        lane, odd = 4 * out + ins // 2, ins % 2
        above, below = (taps[sweep, dx, warp, lane, 4 * group + 2 * row + odd] for row in (0, 1))
        same = taps[sweep, 3 + dx // 2, warp, lane, 4 * (dx % 2) + 2 * group + odd]
        assert torch.equal(torch.stack([above, same, below]), weights.conv[channel, ins, :, dx] / 2), (channel, ins, dx)
    assert not taps[:, 4, :, :, 4:].any()


def test_the_convolutions_bias_is_as_lanes_add_it(pack):
    """A lane of four has two channels of each group, the same for both rows of pixels: [group][row][2 channels]."""
    weights, packed = pack(24, 328, 24, 3)
    assert list(packed.conv_bias.shape) == [1, 3, 8, 4, 8]
    for hidden, row in product((0, 1, 8, 31, 32, 63, 64, 127, 200, 327), (0, 1)):
        sweep, warp, group, pair = hidden // 128, hidden % 128 // 16, hidden % 16 // 8, hidden % 8 // 2
        found = packed.conv_bias[0, sweep, warp, pair, 4 * group + 2 * row + hidden % 2]
        assert found == (weights.conv_bias[hidden] / 2).float(), (hidden, row)


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("out_channels, widths", [(200, (64, 64, 64, 16)), (112, (64, 32, 16)), (24, (32,))], ids=str)
def test_the_projection_is_steps_of_slabs(out_channels, widths, tile, pack):
    """[steps, slabs, step, slab]: pieces of 8 channels are swizzled as in shared memory, by 128 bytes."""
    weights, packed = pack(8, 72, out_channels, 3, tile)
    step, outs = tile.step, sum(widths)
    assert list(packed.project.shape) == [1, 128 * outs // 64, 64]
    project = packed.project.flatten()
    starts = [sum(widths[:index]) for index in range(len(widths))]
    for hidden, (start, width) in product((0, 9, 31, 47, 63, 64, 71, 72, 127), zip(starts, widths, strict=True)):
        row = hidden % step
        order = {64: row % 8, 32: row // 2 % 4, 16: row // 4 % 2}[width]
        slab = hidden // step * step * outs + step * start
        for column in (0, 8, 15, width - 1):
            channel = start + column
            expected = weights.project[channel, hidden] if hidden < 72 and channel < out_channels else 0
            found = project[slab + row * width + (column // 8 ^ order) * 8 + column % 8]
            assert found == expected, (hidden, start, column)


SQUEEZE_DEPTHS = [(3, 1), (18, 2), (36, 3), (48, 3), (100, 7)]


@pytest.mark.parametrize("squeeze, depths", SQUEEZE_DEPTHS, ids=str)
def test_excite_is_as_threads_hold_the_left_operand(squeeze, depths, pack):
    """As of the expansion: rows are hidden channels, columns squeeze channels, up to a multiple of 16."""
    weights, packed = pack(24, 160, 40, squeeze)
    for sweep, depth, warp, row, column, found in fragment_elements(packed.excite, depths):
        hidden, channel = 128 * sweep + 16 * warp + row, 16 * depth + column
        expected = weights.excite[hidden, channel] if hidden < 160 and channel < squeeze else 0
        assert found == expected, (hidden, channel)


@pytest.mark.parametrize("squeeze, depths", SQUEEZE_DEPTHS, ids=str)
def test_squeeze_is_as_threads_hold_the_left_operand(squeeze, depths, pack):
    """Of a product of depth 16 rows are squeeze channels, and columns the hidden channels of a warp.

    So all warps have the same squeeze channels, each its own part of the sum, and the next product has the next 16.
    """
    weights, packed = pack(24, 160, 40, squeeze)
    for sweep, depth, warp, row, column, found in fragment_elements(packed.squeeze, depths):
        channel, hidden = 16 * depth + row, 128 * sweep + 16 * warp + column
        expected = weights.squeeze[channel, hidden] if hidden < 160 and channel < squeeze else 0
        assert found == expected, (channel, hidden)


def test_single_weights_of_squeeze_and_excite_have_their_places(pack):
    """Worked out by hand for 328 hidden and 36 squeeze channels: three sweeps, a pair of products and a single one."""
    weights, packed = pack(24, 328, 40, 36)
    squeeze, excite = packed.squeeze[0], packed.excite[0]
    for hidden, channel, sweep, place in (
        (0, 0, 0, 0),
        (0, 1, 0, 1),
        (0, 35, 0, 2 * 256 * 8 + 8 * 1 + 1),  # the single product: lane 1 has columns 2 and 3
        (9, 0, 0, 16 * 4 + 2),  # row 8 + 1
        (141, 17, 1, 16 * 20 + 8 + 2 + 1),  # the pair's second product, row 8 + 5, column 1
        (327, 26, 2, 16 * (4 * 32 + 4 * 7 + 1) + 8 + 4),  # warp 4, row 7, column 8 + 2
    ):
        assert excite[sweep, place] == weights.excite[hidden, channel] != 0, (hidden, channel)
    for channel, hidden, sweep, place in (
        (0, 0, 0, 0),
        (0, 1, 0, 1),
        (1, 0, 0, 16 * 4),
        (0, 9, 0, 4 + 1),  # column 8 + 1
        (0, 16, 0, 16 * 32),  # warp 1
        (35, 0, 0, 2 * 256 * 8 + 8 * 12),  # the single product, row 3
        (17, 141, 1, 16 * 6 + 8 + 4 + 1),  # the pair's second product, row 1, column 8 + 5
        (26, 327, 2, 16 * (4 * 32 + 4 * 2 + 3) + 8 + 2 + 1),  # warp 4, row 8 + 2, column 7
    ):
        assert squeeze[sweep, place] == weights.squeeze[channel, hidden] != 0, (channel, hidden)


def test_the_other_biases_are_rows(pack):
    """Padded with zeros: to depths of 16, to sweeps of 128, to slabs."""
    weights, packed = pack(24, 328, 40, 18)
    assert [list(getattr(packed, name).shape) for name in FP32[1:]] == [[1, 32], [1, 384], [1, 48]]
    for name, channels in zip(FP32[1:], (18, 328, 40), strict=True):
        row = getattr(packed, name)[0]
        assert torch.equal(row[:channels], getattr(weights, name).float()) and not row[channels:].any(), name


@pytest.mark.parametrize("group_width", [4, 16])
def test_other_groups_are_refused(group_width, random_mbconv_weights):
    weights = random_mbconv_weights(16, 64, group_width=group_width)
    message = (
        rf"weights cannot be packed for MBConvHopperTile\(.*groups of {group_width} channels are not supported, only"
    )
    for pack in (pack_mbconv_hopper, kernels.pack):
        with pytest.raises(ValueError, match=f"{message} of 8; use an MBConvTile"):
            pack(weights, TILE, torch.float16, "cpu")


def test_other_than_3x3_convolutions_are_refused(random_mbconv_weights):
    tile = MBConvHopperTile(bands=1, piece=4, step=32, stages=2)
    weights = random_mbconv_weights(16, 64, kernel_size=5)
    with pytest.raises(
        ValueError, match=r"for MBConvHopperTile\(.*kernel size 5 is not supported, use 3, or an MBConvTile"
    ):
        pack_mbconv_hopper(weights, tile, torch.float16, "cpu")

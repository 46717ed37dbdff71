"""Packed weights of the stride-2 Hopper kernel, and what its operator computes from them on a CPU."""

from dataclasses import replace

import pytest
import torch

from fusion.convfirst_down_hopper_op import convfirst_down_hopper
from fusion.convfirst_down_hopper_weights import pack_convfirst_down_hopper, unpack_convfirst_down_hopper
from fusion.planner.convfirst_down_hopper_tile import ConvFirstDownHopperTile, weight_sizes
from fusion.reference import convfirst_down

TILE = ConvFirstDownHopperTile(pixels=64, hidden=32, stages=2, partitions=1, programs=1, slab=16, weight_chunks=0)
BY_PIECE = replace(TILE, partitions=2, by_piece=1)


@pytest.fixture
def weights(random_weights):
    """`(channels, hidden, out_channels)`: of a stride-2 block."""

    def make(channels, hidden, out_channels):
        weights = random_weights(channels, hidden, out_channels)
        return replace(weights, expand=torch.cat([weights.expand.flip(0), weights.expand], dim=1))

    return make


@pytest.mark.parametrize("channels, hidden, out_channels", [(16, 96, 32), (24, 72, 48), (8, 40, 72), (48, 64, 144)])
@pytest.mark.parametrize("tile", [TILE, replace(TILE, hidden=64, slab=64), BY_PIECE], ids=str)
def test_unpacking_gives_back_what_was_packed(weights, channels, hidden, out_channels, tile):
    packed = pack_convfirst_down_hopper(weights(channels, hidden, out_channels), tile, torch.float64, "cpu")
    assert len(packed.weights) == sum(weight_sizes(tile, channels, hidden, out_channels))
    unpacked = unpack_convfirst_down_hopper(packed.weights, tile, channels, hidden, out_channels)
    expected = weights(channels, hidden, out_channels)
    for tensor, name in zip(unpacked, ("conv", "expand", "expand_bias", "project"), strict=True):
        torch.testing.assert_close(tensor, getattr(expected, name))


def test_the_operator_computes_the_reference_on_a_cpu(weights):
    made, x = weights(24, 72, 48), torch.randn(2, 24, 6, 10, dtype=torch.float64)
    packed = pack_convfirst_down_hopper(made, TILE, torch.float64, "cpu").tensors()
    out = convfirst_down_hopper(x, *packed, 72, 48, TILE.to_ints())
    exact = convfirst_down(x, made.conv, made.expand, made.expand_bias, made.project, made.project_bias.float(), "relu")
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, exact)


def test_the_operator_has_a_fake(weights):
    packed = pack_convfirst_down_hopper(weights(16, 32, 24), TILE, torch.float16, "cpu").tensors()
    torch.library.opcheck(
        torch.ops.fusion.convfirst_down_hopper.default,
        (torch.zeros(2, 16, 6, 10, dtype=torch.float16), *packed, 32, 24, TILE.to_ints()),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_errors(weights):
    made = weights(16, 32, 24)
    packed = pack_convfirst_down_hopper(made, TILE, torch.float32, "cpu").tensors()
    x = torch.zeros(1, 16, 6, 10)
    with pytest.raises(
        ValueError, match="images of 7x10 pixels must have even sizes; pack the weights for a ConvFirstDownT"
    ):
        convfirst_down_hopper(torch.zeros(1, 16, 7, 10), *packed, 32, 24, TILE.to_ints())
    with pytest.raises(ValueError, match="weights must be a contiguous"):
        convfirst_down_hopper(x, packed[0][1:], packed[1], 32, 24, TILE.to_ints())
    with pytest.raises(RuntimeError, match="is an inference operator"):
        convfirst_down_hopper(x.requires_grad_(), *packed, 32, 24, TILE.to_ints())
    of_stride_1 = replace(made, expand=made.expand[:, :16])
    with pytest.raises(ValueError, match="channels without a blur-pool are not supported, only of 8 with one"):
        pack_convfirst_down_hopper(of_stride_1, TILE, torch.float32, "cpu")

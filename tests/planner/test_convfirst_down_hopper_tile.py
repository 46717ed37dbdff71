"""Tiles of the Hopper kernel of stride-2 ConvFirst blocks."""

from dataclasses import replace

import pytest

from fusion.planner.convfirst_down_hopper_tile import (
    ConvFirstDownHopperTile,
    candidate_tiles,
    local_memory_bytes,
    predicted_us,
    why_invalid,
    why_malformed,
    why_none,
)
from fusion.planner.match import ConvFirstDownShape
from fusion.planner.processor import PROCESSORS

H200 = PROCESSORS["h200"]
RING = ConvFirstDownHopperTile(pixels=64, hidden=32, stages=2, partitions=2, programs=1, slab=16, weight_chunks=0)
BY_PIECE = replace(RING, by_piece=1)
# Blocks of the networks: input, hidden and output channels, size of the image.
BLOCKS = [
    (16, 96, 32, 128),
    (24, 144, 48, 128),
    (32, 192, 48, 64),
    (32, 192, 64, 128),
    (48, 288, 64, 64),
    (48, 288, 72, 64),
    (64, 384, 96, 64),
]


def block(channels, hidden, out_channels, size):
    return ConvFirstDownShape(128, size, size, channels, hidden, out_channels, 8, "relu", "float16")


@pytest.mark.parametrize("sizes", BLOCKS, ids=str)
def test_every_block_of_the_networks_has_a_tile_that_streams_pieces(sizes):
    shape = block(*sizes)
    assert why_none(shape, H200) is None
    tiles = list(candidate_tiles(shape, H200))
    assert len(set(tiles)) == len(tiles)
    assert any(tile.by_piece for tile in tiles)
    for tile in tiles:
        assert local_memory_bytes(tile, shape, H200) <= H200.local_memory_bytes
        assert predicted_us(tile, shape, H200) > 0


def test_channels_cost_pieces_nothing_but_weights():
    """A ring holds all channels, buffers of pieces 16 of them."""
    few, many = (block(channels, 96, 24, 64) for channels in (32, 64))
    streamed = replace(BY_PIECE, weight_chunks=2)
    ring = replace(RING, weight_chunks=2)
    of_pieces, of_rings = (
        local_memory_bytes(t, many, H200) - local_memory_bytes(t, few, H200) for t in (streamed, ring)
    )
    assert of_rings > of_pieces + 100_000


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"by_piece": 2}, "by_piece=2 is not one of 0, 1"),
        ({"pixels": 128}, "by_piece=1 does not go with pixels=128, use pixels=64"),
        ({"partitions": 1}, "by_piece=1 does not go with partitions=1, use partitions=2"),
        ({"slab": 32}, "by_piece=1 does not go with slab=32, use slab=16"),
        ({"programs": 2}, "2 partitions take all registers of a processor, use programs=1, not 2"),
        ({"hidden": 8}, "hidden=8 is not one of 16, 32, 64"),
    ],
    ids=str,
)
def test_malformed_tiles_are_refused(changes, reason):
    assert why_malformed(BY_PIECE, 96) is None
    assert why_malformed(replace(BY_PIECE, **changes), 96) == reason
    assert why_invalid(replace(BY_PIECE, **changes), block(24, 96, 24, 64), H200) == reason


def test_what_takes_too_much_memory_is_invalid():
    reason = why_invalid(replace(BY_PIECE, stages=4), block(16, 96, 32, 128), H200)
    assert "do not fit the 227 KB of local memory" in reason
    assert "do not fit" in why_none(block(96, 576, 96, 64), H200)


def test_integers_of_a_tile_give_it_back():
    assert ConvFirstDownHopperTile(*BY_PIECE.to_ints()) == BY_PIECE
    assert ConvFirstDownHopperTile(*RING.to_ints()[:-1]) == RING


def test_fields_are_checked():
    with pytest.raises(ValueError, match="by_piece must be an integer of 0 or more, got -1"):
        replace(RING, by_piece=-1)

from dataclasses import replace

import pytest

from fusion.planner.blocks import mbconv
from fusion.planner.match import match_mbconv
from fusion.planner.mbconv_tile import (
    LAUNCH_US,
    WORKSPACE_SHARE,
    MBConvTile,
    candidate_tiles,
    design,
    images_that_fit,
    local_memory_bytes,
    predicted_us,
    programs_per_processor,
    why_invalid,
    why_none,
    workspace_elements,
)
from fusion.planner.processor import PROCESSORS

H200 = PROCESSORS["h200"]
TILE = MBConvTile(
    images=16,
    height=16,
    width=16,
    hidden=64,
    channels=32,
    conv_slab=32,
    warps=8,
    stages=3,
    project_pixels=64,
    project_hidden=32,
    project_out=128,
    project_warps=4,
    project_stages=3,
)


def shape(channels=128, hw=16, batch=128, expansion=4, **options):
    return match_mbconv(mbconv(batch, hw, hw, channels, expansion, **options))


def test_the_fields_must_be_positive_integers_and_travel_as_integers():
    assert MBConvTile(*TILE.to_ints()) == TILE
    for value in (0, -1, 1.5, None):
        with pytest.raises(ValueError, match="MBConvTile: hidden must be a positive integer"):
            replace(TILE, hidden=value)


@pytest.mark.parametrize(
    "size, kernel_size, window",
    [
        ((16, 16), 3, (16, 16)),
        ((17, 8), 3, (17, 8)),
        ((18, 19), 3, (18, 18)),
        ((64, 9), 3, (18, 9)),
        ((64, 3), 5, (20, 3)),
        ((20, 21), 5, (20, 20)),
    ],
    ids=str,
)
def test_the_window_has_the_neighbours_within_the_image(size, kernel_size, window):
    assert TILE.window(*size, kernel_size) == window


@pytest.mark.parametrize(
    "in_channels, hidden, squeeze, padded",
    [(8, 8, 1, (64, 64, 16)), (64, 64, 16, (64, 64, 16)), (72, 72, 17, (96, 128, 32)), (144, 576, 36, (160, 576, 64))],
    ids=str,
)
def test_channels_are_padded_to_whole_steps(in_channels, hidden, squeeze, padded):
    assert (TILE.padded_in(in_channels), TILE.padded_hidden(hidden), TILE.padded_squeeze(squeeze)) == padded
    assert TILE.padded_hidden(padded[1]) == padded[1] and TILE.padded_squeeze(padded[2]) == padded[2]
    assert replace(TILE, project_hidden=64).padded_hidden(hidden) % 128 == 0, "two steps at least"


@pytest.mark.parametrize(
    "out_channels, programs, slabs",
    [(8, 1, (16,)), (128, 1, (128,)), (136, 2, (64, 16)), (192, 2, (64, 32)), (256, 2, (128,)), (1000, 8, (128,))],
    ids=str,
)
def test_programs_share_output_channels_evenly(out_channels, programs, slabs):
    assert (TILE.out_programs(out_channels), TILE.out_slabs(out_channels)) == (programs, slabs)
    assert TILE.padded_out(out_channels) == programs * sum(slabs) >= out_channels


def test_programs_of_an_image():
    assert TILE.parts(16, 16, 512) == 8
    assert TILE.parts(17, 16, 512) == 16
    assert TILE.project_programs(16, 16, 256) == 4 * 2
    assert TILE.project_programs(5, 13, 128) == 2


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"height": 12}, "height=12 is not a power of two"),
        ({"project_out": 96}, "project_out=96 is not a power of two"),
        ({"height": 2, "width": 4}, "a matrix product needs at least 16 pixels, hidden channels"),
        ({"channels": 8}, "a matrix product needs at least 16 pixels, hidden channels"),
        ({"project_hidden": 8}, "a matrix product needs at least 16 pixels, hidden channels and output"),
        ({"conv_slab": 128}, "slabs of 128 channels are wider than the 64 hidden channels"),
        ({"stages": 1}, "loops must be pipelined, in 2 stages at least"),
        ({"project_stages": 1}, "loops must be pipelined, in 2 stages at least"),
        ({"project_warps": 32, "project_pixels": 256}, "32 warps are more than a program may have, 16"),
        ({"height": 8, "width": 8, "warps": 16}, "16 warps are too many for 64 pixels"),
        ({"hidden": 512, "channels": 128}, "of local memory are more than h200 has"),
        ({"warps": 2}, "128 sums of the expansion a thread would spill, 64 do not"),
        ({"project_pixels": 128, "project_out": 512}, "registers a thread would spill, 255 are available"),
    ],
    ids=str,
)
def test_tiles_that_are_not_valid(changes, reason):
    assert why_invalid(TILE, shape(1024), H200) is None
    assert reason in why_invalid(replace(TILE, **changes), shape(1024), H200)


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"dtype": "float32"}, "dtype float32 is not supported, use one of float16, bfloat16"),
        ({"kernel_size": 7}, "kernel size 7 is not supported, use 3 or 5"),
        ({"channels": 12, "group_width": 4}, "in_channels=12 is not supported, use a multiple of 8"),
        ({"out_channels": 12}, "out_channels=12 is not supported, use a multiple of 8"),
        ({"channels": 24, "group_width": 24}, "group width 24 is not supported, use a power of two up to 64"),
        ({"group_width": 128}, "group width 128 is not supported, use a power of two up to 64"),
        ({"hw": 2**11}, "images of 2048x2048 pixels are too large, split them: 2**31 elements"),
    ],
    ids=str,
)
def test_blocks_that_are_not_supported(options, reason):
    assert reason in why_none(shape(**options), H200)
    assert not list(candidate_tiles(shape(**options), H200))
    assert reason in why_invalid(TILE, shape(**options), H200)


def test_slabs_must_not_split_groups_and_padding_counts():
    assert why_invalid(TILE, shape(group_width=64), H200) == "slabs of 32 channels split groups of 64"
    large = shape(8, hw=2**12, hidden_channels=64, expansion=None)
    assert why_invalid(TILE, large, H200) is None
    assert "too large" in why_invalid(replace(TILE, project_hidden=64), large, H200)


@pytest.mark.parametrize("processor", ["h200", "a5000", "b200"])
@pytest.mark.parametrize(
    "block",
    [
        shape(),
        shape(256, hw=8),
        shape(24, hw=5, batch=1, expansion=1, squeeze_channels=3),
        shape(144, hw=32, batch=3, expansion=2, out_channels=1000),
        shape(64, hw=1, group_width=64, squeeze_channels=200),
        shape(2048, hw=7, batch=1000),
        shape(40, hw=28, expansion=6, squeeze_channels=10, kernel_size=5),
        shape(192, hw=3, expansion=6, kernel_size=5),
    ],
    ids=lambda block: f"{block.in_channels}-{block.height}",
)
def test_candidates_are_valid_and_their_workspace_fits(block, processor):
    processor = PROCESSORS[processor]
    tiles = list(candidate_tiles(block, processor))
    assert tiles and len(set(tiles)) == len(tiles) and why_none(block, processor) is None
    for tile in tiles[::97]:
        assert why_invalid(tile, block, processor) is None
        assert 1 <= tile.images <= block.batch
        bytes_of_image = 2 * sum(workspace_elements(tile, block))
        fits = tile.images * bytes_of_image <= WORKSPACE_SHARE * processor.global_memory_bytes
        assert fits or tile.images == 1
        assert local_memory_bytes(tile, block, processor) <= processor.local_memory_bytes
        assert programs_per_processor(tile, block, processor) >= 1
    assert len({design(tile) for tile in tiles}) > 1


def test_micro_batches_are_as_large_as_l2_allows_and_equal():
    block = shape(256)
    hidden, scratch = workspace_elements(TILE, block)
    assert (hidden, scratch) == (256 * 1024, 16 * 256 * 64)
    fitting = int(WORKSPACE_SHARE * H200.global_memory_bytes / (2 * (hidden + scratch)))
    assert fitting == 30
    assert images_that_fit(TILE, block, H200) == 26, "five micro-batches of 26 rather than four of 30 and one of 8"
    assert images_that_fit(TILE, shape(256, batch=30), H200) == 30
    assert images_that_fit(TILE, shape(256, batch=31), H200) == 16
    assert images_that_fit(TILE, shape(256, hw=1000, batch=3), H200) == 1


def test_predictions():
    block = shape()
    us = predicted_us(TILE, block, H200)
    assert us > 8 * LAUNCH_US, "eight micro-batches"
    assert predicted_us(replace(TILE, images=1), block, H200) > 128 * LAUNCH_US
    assert predicted_us(TILE, shape(batch=256), H200) == pytest.approx(2 * us)
    assert predicted_us(replace(TILE, images=128), shape(batch=1), H200) < us
    assert predicted_us(TILE, shape(256), H200) > us
    assert predicted_us(TILE, block, PROCESSORS["a5000"]) > us
    assert us < predicted_us(TILE, shape(kernel_size=5), H200) < 25 / 9 * us

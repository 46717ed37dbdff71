from dataclasses import replace

import pytest

from fusion.planner.blocks import mbconv
from fusion.planner.match import match_mbconv_down
from fusion.planner.mbconv_down_tile import (
    HIDDEN_SHARE,
    SCRATCH_SHARE,
    MBConvDownTile,
    candidate_tiles,
    design,
    images_that_fit,
    local_memory_bytes,
    predicted_us,
    programs_per_processor,
    programs_that_fit,
    projected_shape,
    why_invalid,
    why_none,
)
from fusion.planner.mbconv_project import LAUNCH_US
from fusion.planner.processor import PROCESSORS

H200 = PROCESSORS["h200"]
TILE = MBConvDownTile(
    images=128,
    programs=264,
    height=8,
    width=8,
    hidden=64,
    channels=32,
    conv_slab=16,
    quads=64,
    warps=4,
    stages=3,
    copy_bytes=16,
    project_pixels=64,
    project_hidden=32,
    project_out=128,
    project_warps=4,
    project_stages=3,
)


def shape(channels=128, hw=16, batch=128, expansion=4, **options):
    return match_mbconv_down(mbconv(batch, hw, hw, channels, expansion, stride=2, **options))


def test_the_fields_must_be_positive_integers_and_travel_as_integers():
    assert MBConvDownTile(*TILE.to_ints()) == TILE
    for value in (0, -1, 1.5, None):
        with pytest.raises(ValueError, match="MBConvDownTile: quads must be a positive integer"):
            replace(TILE, quads=value)


@pytest.mark.parametrize(
    "size, quads, window",
    [
        ((2, 3), (1, 2), (2, 3)),
        ((16, 16), (8, 8), (16, 16)),
        ((17, 18), (9, 9), (17, 18)),
        ((19, 20), (9, 9), (19, 20)),
        ((64, 9), (9, 5), (20, 9)),
    ],
    ids=str,
)
def test_quads_have_those_before_them_and_the_window_has_their_neighbours_within_the_image(size, quads, window):
    height, width = size
    assert TILE.quad_window(-(-height // 2), -(-width // 2), True) == quads
    assert TILE.window(*size, True, 3) == window
    elements = TILE.scratch_elements(*size, True, 3)
    assert elements == (window[0] * window[1] * 64, 4 * quads[0] * quads[1] * 64)


@pytest.mark.parametrize(
    "size, kernel_size, quads, window",
    [
        ((1, 1), 3, (1, 1), (1, 1)),
        ((2, 3), 3, (1, 2), (2, 3)),
        ((15, 16), 3, (8, 8), (15, 16)),
        ((17, 18), 3, (8, 8), (17, 17)),
        ((64, 9), 3, (8, 5), (17, 9)),
        ((3, 64), 5, (2, 8), (3, 19)),
        ((19, 20), 5, (8, 8), (19, 19)),
    ],
    ids=str,
)
def test_without_a_blur_there_is_a_pixel_for_each_of_the_output_and_the_window_has_their_neighbours(
    size, kernel_size, quads, window
):
    height, width = size
    assert TILE.quad_window(-(-height // 2), -(-width // 2), False) == quads
    assert TILE.window(*size, False, kernel_size) == window
    assert TILE.scratch_elements(*size, False, kernel_size) == (window[0] * window[1] * 64, 0)


@pytest.mark.parametrize(
    "changes, pixels",
    [({}, 64), ({"hidden": 32}, 128), ({"hidden": 128}, 64), ({"warps": 8}, 128), ({"quads": 16, "warps": 2}, 32)],
    ids=str,
)
def test_pixels_that_are_expanded_together(changes, pixels):
    assert replace(TILE, **changes).window_pixels == pixels


def test_steps_of_wide_slabs_have_fewer_neighbours():
    tiles = [replace(TILE, conv_slab=slab) for slab in (16, 32, 64, 128)]
    assert [tile.step_pixels for tile in tiles] == [4, 2, 1, 1]
    assert [tile.row_steps(blur=True) for tile in tiles] == [1, 2, 4, 4]
    assert [tile.row_steps(blur=False) for tile in tiles] == [1, 2, 3, 3]
    assert [tile.tap_steps(5) for tile in tiles] == [7, 13, 25, 25]


def test_wide_squeeze_layers_blur_fewer_channels():
    assert (TILE.blur_channels(32), TILE.blur_pixels(32)) == (64, 32)
    assert (TILE.blur_channels(200), TILE.blur_pixels(200)) == (16, 64)
    assert TILE.blur_channels(2**13) == 1
    assert replace(TILE, height=1, width=2).blur_pixels(32) == 2


def test_parts_of_an_image():
    assert TILE.parts(8, 8, 512) == 8
    assert TILE.parts(9, 8, 512) == 16
    assert TILE.parts(1, 2, 40) == 1


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"height": 12}, "height=12 is not a power of two"),
        ({"quads": 96}, "quads=96 is not a power of two"),
        ({"quads": 8}, "a matrix product needs at least 16 quads, hidden channels, channels"),
        ({"channels": 8}, "a matrix product needs at least 16 quads, hidden channels, channels"),
        ({"project_hidden": 8}, "a matrix product needs at least 16 pixels, hidden channels and output"),
        ({"conv_slab": 128}, "slabs of 128 channels are wider than the 64 hidden channels of a part"),
        ({"copy_bytes": 4}, "copies of 4 bytes are not supported, use 16 or 8"),
        ({"stages": 1}, "loops must be pipelined, in 2 stages at least"),
        ({"project_stages": 1}, "loops must be pipelined, in 2 stages at least"),
        ({"project_warps": 32, "project_pixels": 256}, "32 warps are more than a program may have, 16"),
        ({"warps": 16}, "16 warps are too many for 64 rows of a product"),
        ({"conv_slab": 64, "stages": 6}, "of local memory are more than h200 has"),
        ({"quads": 256}, "registers a thread would spill, 255 are available"),
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
        ({"kernel_size": 5}, "kernel size 5 with a blur-pool is not supported, use 3, or let the convolution have"),
        ({"kernel_size": 7, "blur": False}, "kernel size 7 is not supported, use 3 or 5"),
        ({"channels": 12, "group_width": 4}, "in_channels=12 is not supported, use a multiple of 8"),
        ({"out_channels": 12}, "out_channels=12 is not supported, use a multiple of 8"),
        ({"channels": 24, "group_width": 24}, "group width 24 is not supported, use a power of two up to 64"),
        ({"hw": 1}, "images of 1x1 pixels are too small: a blur-pool reflects its input, use 2x2 pixels at least"),
        ({"hw": 2**13}, "images of 8192x8192 pixels are too large, split them: 2**31 elements"),
    ],
    ids=str,
)
def test_blocks_that_are_not_supported(options, reason):
    assert reason in why_none(shape(**options), H200)
    assert not list(candidate_tiles(shape(**options), H200))
    assert reason in why_invalid(TILE, shape(**options), H200)


def test_slabs_must_not_split_groups_and_padding_counts():
    assert why_invalid(TILE, shape(group_width=32), H200) == "slabs of 16 channels split groups of 32"
    large = shape(8, hw=2**13, hidden_channels=64, expansion=None)
    assert why_invalid(TILE, large, H200) is None
    assert "too large" in why_invalid(replace(TILE, project_hidden=128), large, H200)


@pytest.mark.parametrize("processor", ["h200", "a5000", "b200"])
@pytest.mark.parametrize(
    "block",
    [
        shape(48, hw=32, out_channels=128),
        shape(256),
        shape(24, hw=5, batch=1, expansion=1, squeeze_channels=3),
        shape(144, hw=33, batch=3, expansion=2, out_channels=1000),
        shape(64, hw=3, group_width=64, squeeze_channels=200),
        shape(2048, hw=7, batch=1000),
        shape(16, hw=112, expansion=6, out_channels=24, squeeze_channels=4, blur=False),
        shape(104, hw=18, expansion=6, out_channels=208, squeeze_channels=26, blur=False),
        shape(24, hw=1, expansion=1, blur=False),
        shape(24, hw=56, expansion=6, out_channels=40, squeeze_channels=6, blur=False, kernel_size=5),
        shape(112, hw=3, expansion=6, blur=False, kernel_size=5),
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
        scratch = 2 * sum(tile.scratch_elements(block.height, block.width, block.blur, block.kernel_size))
        assert tile.programs == 1 or tile.programs * scratch <= SCRATCH_SHARE * processor.global_memory_bytes
        hidden = 2 * block.out_height * block.out_width * tile.padded_hidden(block.hidden_channels)
        assert tile.images == 1 or tile.images * hidden <= HIDDEN_SHARE * processor.global_memory_bytes
        assert local_memory_bytes(tile, block, processor) <= processor.local_memory_bytes
        assert programs_per_processor(tile, block, processor) >= 1
    assert len({design(tile) for tile in tiles}) > 1


def test_the_second_kernel_sees_a_block_of_the_output_size():
    projected = projected_shape(shape(144, hw=33, out_channels=40))
    assert (projected.height, projected.width, projected.hidden_channels, projected.out_channels) == (17, 17, 576, 40)
    assert not projected.residual


def test_micro_batches_and_programs_are_as_large_as_l2_allows():
    block = shape(256)
    assert images_that_fit(TILE, block, H200) == 128, "all images: 16 MB"
    assert images_that_fit(TILE, shape(256, batch=256), H200) == 128, "two micro-batches"
    assert images_that_fit(TILE, shape(256, hw=2000, batch=3), H200) == 1
    assert programs_that_fit(TILE, block, H200) == 3 * H200.processors
    large = replace(TILE, height=16, width=16)
    assert programs_that_fit(large, shape(256, hw=32), H200) == int(30 * 2**20 / (2 * 2 * 1024 * 64)) == 120
    assert programs_that_fit(replace(TILE, height=256, width=256), shape(hw=1024), H200) == 1


def test_predictions():
    block = shape()
    us = predicted_us(TILE, block, H200)
    assert us > 2 * LAUNCH_US, "two kernels"
    assert predicted_us(replace(TILE, images=1), block, H200) > 2 * 128 * LAUNCH_US
    assert predicted_us(replace(TILE, programs=66), block, H200) > 1.5 * us, "half of the processors are idle"
    assert predicted_us(replace(TILE, programs=10_000), block, H200) < 1.2 * us, "they wait for each other"
    assert predicted_us(TILE, shape(batch=256), H200) == pytest.approx(2 * us)
    assert predicted_us(TILE, shape(batch=1), H200) < us
    assert predicted_us(TILE, shape(256), H200) > us
    assert predicted_us(TILE, block, PROCESSORS["a5000"]) > us
    strided = predicted_us(TILE, shape(blur=False), H200)
    assert strided < us
    assert strided < predicted_us(TILE, shape(blur=False, kernel_size=5), H200) < 25 / 9 * strided

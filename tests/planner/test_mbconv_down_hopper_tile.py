from dataclasses import replace
from itertools import product

import pytest

from fusion.planner.blocks import mbconv
from fusion.planner.families import (
    MBCONV_DOWN,
    MBCONV_DOWN_HOPPER,
    MBCONV_DOWN_WINDOWS_HOPPER,
    families_of,
    family_of,
)
from fusion.planner.match import match_mbconv_down
from fusion.planner.mbconv_down_hopper_tile import (
    MAX_COLUMNS,
    MAX_ROWS,
    PIECE,
    MBConvDownHopperTile,
    candidate_tiles,
    local_memory_bytes,
    why_invalid,
    why_malformed,
    why_none,
    why_not_covering,
)
from fusion.planner.mbconv_hopper_tile import (
    LOCAL_MEMORY_BYTES,
    MAX_IMAGES,
    MAX_STAGES,
    MAX_TILES,
    MIN_STAGES,
    PASS_REGISTERS,
    SWEEP,
    TILE_PIXELS,
    TRIED_STAGES,
)
from fusion.planner.plan import PlanError, plan_block
from fusion.planner.processor import PROCESSORS

H200 = PROCESSORS["h200"]
TILE = MBConvDownHopperTile(step=32, stages=4, resident=1)
STREAMED = replace(TILE, resident=0)
SIZES = list(product(range(2, MAX_ROWS + 1, 2), range(2, MAX_COLUMNS + 1, 2)))
BLOCKS = [
    # C, K, H = W of the networks' blocks of stride 2.
    *((channels, channels, 16) for channels in (128, 160, 192, 256)),
    (48, 128, 32),
    (64, 160, 32),
    (72, 192, 32),
    (96, 256, 32),
]


def graph(channels=128, out_channels=128, size=(16, 16), batch=128, expansion=4, **options):
    return mbconv(batch, *size, channels, expansion, out_channels=out_channels, stride=2, **options)


def shape(*arguments, **options):
    return match_mbconv_down(graph(*arguments, **options))


def test_the_fields_must_be_positive_integers_and_travel_as_integers():
    assert TILE.to_ints() == [32, 4, 1]
    assert MBConvDownHopperTile(*TILE.to_ints()) == TILE
    for name in ("step", "stages"):
        for value in (0, -1, 1.5, None):
            with pytest.raises(ValueError, match=f"MBConvDownHopperTile: {name} must be an integer of 1 or more, got"):
                replace(TILE, **{name: value})
    with pytest.raises(ValueError, match="MBConvDownHopperTile: resident must be an integer of 0 or more, got -1"):
        replace(TILE, resident=-1)


def test_images_have_room():
    """Lanes for all rows, and whole pieces of tiles for all columns, two at least; powers of two in shared memory."""
    for height, width in SIZES:
        tiles = TILE.tiles_of_column(height)
        assert 16 * (tiles - 1) < height <= 16 * tiles
        columns, pieces = TILE.columns(height, width), TILE.pieces(height, width)
        assert columns * tiles == pieces * PIECE and pieces >= 2
        assert width <= columns < max(width + PIECE, 2 * PIECE + 1)
        pixels = TILE.in_pixels(height, width)
        assert pixels & (pixels - 1) == 0 and columns * tiles * TILE_PIXELS <= pixels
        out = TILE.out_pixels(height, width)
        assert out & (out - 1) == 0 and 64 <= out <= MAX_TILES * TILE_PIXELS
        assert columns // 2 * 8 * tiles <= out


@pytest.mark.parametrize(
    "size, columns, in_pixels, out_pixels",
    [
        ((16, 16), 16, 256, 64),
        ((32, 32), 32, 1024, 256),
        ((14, 10), 12, 256, 64),
        ((2, 2), 8, 128, 64),
        ((18, 6), 6, 256, 64),
    ],
)
def test_sizes(size, columns, in_pixels, out_pixels):
    assert (TILE.columns(*size), TILE.in_pixels(*size), TILE.out_pixels(*size)) == (columns, in_pixels, out_pixels)


def test_a_last_sweep_of_few_hidden_channels_is_split_where_columns_are():
    """If a column has two tiles, there is an even number of pieces, and hidden channels do not stay."""
    for (height, width), hidden, tile in product(SIZES, (8, 64, 72, 128, 192, 256, 288, 384), (TILE, STREAMED)):
        splits = tile.splits_last(height, width, hidden)
        divisible = height > 16 and tile.pieces(height, width) % 2 == 0 and tile == STREAMED
        assert splits == (divisible and hidden % SWEEP in range(1, 65))
        assert tile.padded_hidden(hidden) - tile.computed_hidden(height, width, hidden) == (64 if splits else 0)


def test_sums_of_a_pass_fit_in_registers():
    for height, width in ((16, 16), (32, 32)):
        for channels in range(8, 257, 8):
            assert TILE.sum_registers(height, width, channels) <= PASS_REGISTERS
    assert [TILE.passes(32, 32, channels) for channels in (128, 160, 168, 256)] == [1, 1, 2, 2]
    assert TILE.passes(16, 16, 256) == 1


def test_hidden_channels_stay_where_they_have_room():
    for block in BLOCKS:
        channels, out_channels, size = block
        plan = plan_block(graph(channels, out_channels, (size, size)), "h200", kernel="mbconv_down_hopper")
        assert plan.tile.resident == (block in BLOCKS[:3])
        assert why_invalid(STREAMED, plan.shape, H200) is None
        if not plan.tile.resident:
            assert "do not fit" in why_invalid(replace(plan.tile, resident=1), plan.shape, H200)


def test_the_place_of_the_input_is_used_again():
    """The output and stages of weights take no memory of their own as long as the input has more."""
    sizes = 16, 16, 128, 512, 128, 32
    few, more = (replace(TILE, stages=stages).memory_bytes(*sizes) for stages in (2, 6))
    assert few == more
    assert TILE.room_bytes(16, 16, 128, 128) == TILE.input_bytes(16, 16, 128) == 64 * 1024
    assert replace(TILE, step=64, stages=8).memory_bytes(*sizes) > few


def test_stages_of_streamed_hidden_channels_fill_the_memory():
    for step, stages in product((32, 64), range(MIN_STAGES, MAX_STAGES + 1)):
        tile = MBConvDownHopperTile(step, stages, resident=0)
        for channels, out_channels, size in BLOCKS:
            sizes = size, size, channels, 4 * channels, out_channels, channels // 4
            if tile.memory_bytes(*sizes) > LOCAL_MEMORY_BYTES:
                continue
            count = tile.hidden_stages(*sizes)
            assert MIN_STAGES <= count <= MAX_STAGES
            steps = tile.computed_hidden(size, size, 4 * channels) // step * tile.passes(size, size, out_channels)
            assert count < steps
            if count < min(MAX_STAGES, steps - 1):
                more = tile.hidden_stage_bytes(size, size, out_channels)
                assert tile.memory_bytes(*sizes) + more > LOCAL_MEMORY_BYTES
            if tile.reads_ahead(*sizes):
                assert count > MIN_STAGES


@pytest.mark.parametrize(
    "block, processor", [*((block, "h200") for block in BLOCKS), (BLOCKS[0], "h100"), (BLOCKS[-1], "h100")], ids=str
)
def test_the_networks_blocks_are_planned(block, processor):
    channels, out_channels, size = block
    plan = plan_block(graph(channels, out_channels, (size, size)), processor)
    assert plan.kernel == "mbconv_down_hopper" and family_of(plan.tile) is MBCONV_DOWN_HOPPER
    assert why_invalid(plan.tile, plan.shape, PROCESSORS[processor]) is None
    assert local_memory_bytes(plan.tile, plan.shape, H200) <= LOCAL_MEMORY_BYTES


def test_the_portable_kernels_take_the_rest():
    assert families_of(shape()) == (MBCONV_DOWN_HOPPER, MBCONV_DOWN_WINDOWS_HOPPER, MBCONV_DOWN)
    for options in ({"size": (15, 16)}, {"size": (34, 16)}, {"size": (16, 34)}, {"group_width": 16}):
        assert plan_block(graph(**options), "h200").kernel == "mbconv_down"
    assert plan_block(graph(), "a100").kernel == "mbconv_down"
    with pytest.raises(PlanError, match="height and width must be even"):
        plan_block(graph(size=(15, 16)), "h200", kernel="mbconv_down_hopper")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dtype": "float32"}, "dtype float32 is not supported, use one of float16"),
        ({"group_width": 16}, "kernel size 3 with group width 16 is not supported, use 3 and 8"),
        ({"channels": 36, "group_width": 8}, "in_channels=36 is not supported, use a multiple of 8"),
        ({"out_channels": 20}, "out_channels=20 is not supported, use a multiple of 8"),
        ({"batch": MAX_IMAGES + 1}, "1048577 images are too many for a launch, split the batch"),
        ({"size": (16, 15)}, "images of 16x15 pixels are not supported: height and width must be even"),
        ({"size": (34, 2)}, "images of 34x2 pixels are too large: up to 32x32 are supported"),
        ({"channels": 512}, "registers a thread would spill, .*: expansion weights of 512 channels"),
        ({"channels": 160, "out_channels": 512, "size": (32, 32)}, "registers a thread would spill"),
        ({"channels": 128, "size": (32, 32)}, "do not fit the .* of local memory that h200 has"),
    ],
    ids=str,
)
def test_why_none(options, message):
    options = {"channels": 128, "out_channels": 128, **options}
    with pytest.raises(AssertionError, match=message):
        reason = why_none(shape(**options), H200)
        assert reason is None, reason


@pytest.mark.parametrize("channels, out_channels, size", [(40, 80, 28), (24, 40, 15), (128, 200, 16), (48, 104, 31)])
def test_blocks_without_a_blur_are_planned(channels, out_channels, size):
    """At odd sizes too; the same tiles run them as with a blur, in less time."""
    plan = plan_block(graph(channels, out_channels, (size, size), blur=False), "h200")
    assert plan.kernel == "mbconv_down_hopper" and not plan.shape.blur
    even = graph(channels, out_channels, (size + size % 2,) * 2)
    blurred = plan_block(even, "h200", kernel="mbconv_down_hopper")
    assert plan.predicted_us < blurred.predicted_us


def test_why_invalid_of_other_processors_and_malformed_tiles():
    assert why_invalid(TILE, shape(), H200) is None
    message = "it is for compute capability 9.0, a100 has 8.0"
    assert why_invalid(TILE, shape(), PROCESSORS["a100"]) == message
    assert why_malformed(replace(TILE, step=16)) == "step=16 is not one of 32, 64"
    assert why_malformed(replace(TILE, resident=2)) == "resident=2 is not one of 0, 1"
    assert why_malformed(replace(TILE, stages=1)) == "stages=1 is not between 2 and 8"
    assert why_invalid(replace(TILE, stages=9), shape(), H200) == "stages=9 is not between 2 and 8"
    assert all(why_not_covering(*size, blur) is None for size in SIZES for blur in (True, False))
    assert why_not_covering(15, 1, blur=False) is None
    assert "height and width must be even for a blur-pool" in why_not_covering(15, 16, blur=True)
    assert "are too large: up to 32x32" in why_not_covering(33, 16, blur=False)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_candidates_are_valid_and_the_plan_takes_one(block):
    channels, out_channels, size = block
    block_graph = graph(channels, out_channels, (size, size))
    block_shape = match_mbconv_down(block_graph)
    tiles = list(candidate_tiles(block_shape, H200))
    assert tiles and len(set(tiles)) == len(tiles)
    for tile in tiles:
        assert why_invalid(tile, block_shape, H200) is None
    for step, resident in {(tile.step, tile.resident) for tile in tiles}:
        stages = [tile.stages for tile in tiles if (tile.step, tile.resident) == (step, resident)]
        assert set(stages[1:]) <= set(TRIED_STAGES) and stages[0] == max(stages)
    assert plan_block(block_graph, "h200", kernel="mbconv_down_hopper").tile in tiles

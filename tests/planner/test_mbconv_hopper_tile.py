import json
from dataclasses import replace
from pathlib import Path

import pytest

from fusion.planner.blocks import mbconv
from fusion.planner.families import MBCONV, MBCONV_HOPPER
from fusion.planner.match import match_mbconv
from fusion.planner.mbconv_hopper_tile import (
    COMPILER_BYTES,
    FEW_STAGES,
    LANES,
    LOCAL_MEMORY_BYTES,
    MAX_IMAGES,
    MAX_STAGES,
    MAX_TILES,
    SWEEP,
    MBConvHopperTile,
    candidate_tiles,
    is_resident,
    local_memory_bytes,
    programs_per_processor,
    why_invalid,
    why_malformed,
    why_none,
    why_not_covering,
    why_unsupported,
)
from fusion.planner.plan import PlanError, plan_block
from fusion.planner.processor import PROCESSORS

H200 = PROCESSORS["h200"]
TILE = MBConvHopperTile(bands=1, piece=4, step=32, stages=6)
"""For images of 16x16 pixels."""
SMALL = MBConvHopperTile(bands=2, piece=4, step=32, stages=3)
"""For images of 8x8 pixels."""
SIZES = [
    (16, 16),
    (8, 8),
    (14, 14),
    (7, 7),
    (9, 13),
    (5, 5),
    (4, 4),
    (12, 12),
    (1, 1),
    (2, 32),
    (4, 16),
    (16, 1),
    (1, 3),
]
CHANNELS = [
    # C, hidden, K, squeeze
    (8, 8, 8, 1),
    (24, 96, 24, 6),
    (40, 160, 112, 3),
    (128, 512, 128, 32),
    (144, 576, 144, 36),
    (256, 1024, 256, 64),
    (512, 2048, 512, 128),
]


def shape(channels=128, size=(16, 16), batch=128, expansion=4, **options):
    return match_mbconv(mbconv(batch, *size, channels, expansion, **options))


def shapes(size, batch=3):
    return [
        shape(c, size, batch, None, hidden_channels=hidden, out_channels=k, squeeze_channels=squeeze)
        for c, hidden, k, squeeze in CHANNELS
    ]


def test_the_fields_must_be_positive_integers_and_travel_as_integers():
    assert TILE.to_ints() == [1, 4, 32, 6]
    assert MBConvHopperTile(*TILE.to_ints()) == TILE
    for name in ("bands", "piece", "step", "stages"):
        for value in (0, -1, 1.5, None):
            with pytest.raises(ValueError, match=f"MBConvHopperTile: {name} must be a positive integer, got {value}"):
                replace(TILE, **{name: value})


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_candidates_are_valid_or_there_is_a_reason(size):
    """What a processor cannot hold is refused, and small blocks always have a tile."""
    for block in shapes(size):
        tiles = list(candidate_tiles(block, H200))
        assert len(set(tiles)) == len(tiles)
        assert bool(tiles) != bool(why_none(block, H200))
        assert tiles or block.in_channels > 256
        for tile in tiles:
            assert why_invalid(tile, block, H200) is None
            assert local_memory_bytes(tile, block, H200) <= H200.local_memory_bytes
            assert programs_per_processor(tile, block, H200) == 1
            assert MBConvHopperTile(*tile.to_ints()) == tile


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_candidates_have_the_most_stages_or_few(size):
    """Another stage would not fit, or take the room of hidden channels, which then do not stay in shared memory."""
    for block in shapes(size):
        tiles = list(candidate_tiles(block, H200))
        most = [tile for tile in tiles if tile.stages != FEW_STAGES]
        for tile in most:
            if tile.stages < MAX_STAGES:
                more = replace(tile, stages=tile.stages + 1)
                fits = why_invalid(more, block, H200) is None
                assert not fits or (is_resident(tile, block) and not is_resident(more, block))
        designs = [(tile.bands, tile.piece, tile.step, is_resident(tile, block)) for tile in most]
        assert len(set(designs)) == len(designs)
        for tile in most:
            few = replace(tile, stages=FEW_STAGES)
            assert (few in tiles) == (why_invalid(few, block, H200) is None)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_pixel_of_an_image_has_its_place(size):
    """Bands lie in different lanes, a band's columns in different tiles, and a lane has both rows of a pair."""
    height, width = size
    tiles = list(candidate_tiles(shape(8, size), H200))
    assert tiles
    for tile in tiles:
        columns, lanes = tile.columns(width), LANES // tile.bands
        places = {
            (x % columns, x // columns * lanes + y // 2, y % 2)
            for y, x in ((y, x) for y in range(height) for x in range(width))
        }
        assert len(places) == height * width
        assert all(x // columns < tile.bands for x in range(width))
        assert all(y // 2 < lanes for y in range(height))
        assert all(place < tile.tiles(width) and lane < LANES for place, lane, _ in places)
        assert tile.tiles(width) in (4, 8, 16) and tile.tiles(width) <= MAX_TILES
        assert tile.pixels(width) == 2 * LANES * tile.tiles(width)
        assert columns % tile.piece == 0, "pieces have no columns that are none"


def test_how_images_are_divided():
    def divisions(size):
        return {(tile.bands, tile.piece) for tile in candidate_tiles(shape(24, size), H200)}

    assert divisions((16, 16)) == {(1, 4), (1, 2), (1, 1)}
    assert divisions((14, 14)) == {(1, 2), (1, 1)}, "4 does not divide 14"
    assert divisions((8, 8)) == {(1, 4), (1, 2), (1, 1), (2, 4)}
    assert divisions((7, 7)) == {(1, 1), (2, 4)}
    assert divisions((4, 4)) == {(1, 4), (1, 2), (1, 1), (2, 2), (4, 1)}
    assert divisions((4, 16)) == {(1, 4), (1, 2), (1, 1), (4, 4)}
    assert divisions((2, 32)) == {(8, 4)}


def test_bands_have_a_power_of_two_of_columns():
    assert [SMALL.columns(width) for width in (1, 2, 3, 4, 5, 7, 8)] == [1, 1, 2, 2, 4, 4, 4]
    assert [TILE.columns(width) for width in (1, 3, 13, 16)] == [1, 3, 13, 16]
    assert [TILE.tiles(width) for width in (1, 3, 5, 8, 9, 16)] == [4, 4, 8, 8, 16, 16]
    assert (TILE.pixels(16), TILE.pixels(14), TILE.pixels(8), SMALL.pixels(8), SMALL.pixels(1)) == (
        256,
        256,
        128,
        64,
        64,
    )
    assert [replace(TILE, bands=bands).rows for bands in (1, 2, 4, 8)] == [16, 8, 4, 2]


def test_channels_are_padded_to_sweeps_and_slabs():
    assert TILE.hidden == SWEEP
    assert [TILE.sweeps(hidden) for hidden in (8, 128, 136, 576)] == [1, 1, 2, 5]
    assert [TILE.padded_hidden(hidden) for hidden in (8, 128, 136, 576)] == [128, 128, 256, 640]
    assert [TILE.squeeze(channels) for channels in (1, 3, 16, 17, 33, 64)] == [16, 16, 16, 32, 64, 64]
    assert [TILE.gates(hidden) for hidden in (8, 256, 264)] == [256, 256, 512]
    assert (TILE.in_slabs(24), TILE.in_slabs(144)) == ((32,), (64, 64, 16))
    assert (TILE.out_slabs(24), TILE.out_slabs(144)) == ((32,), (64, 64, 16))
    assert [TILE.depths(channels) for channels in (8, 24, 40, 128, 144)] == [2, 3, 4, 9, 10], "one is of the bias"


def test_how_the_projection_is_divided():
    """All 256 pixels have two passes where a thread cannot hold their sums; few pixels have narrow products."""
    channels = 8, 128, 136, 192, 200, 256
    assert [TILE.passes(16, out) for out in channels] == [1, 1, 1, 1, 2, 2]
    assert [SMALL.passes(8, out) for out in (*channels, 512)] == [1] * 7
    assert [TILE.passes(8, out) for out in (256, 512)] == [1, 1], "128 pixels cannot be divided"
    assert TILE.products(16, 24) == (32,)
    assert TILE.products(16, 144) == (128, 16)
    assert TILE.products(16, 256) == TILE.products(8, 256) == (128, 128)
    assert SMALL.products(8, 144) == (64, 64, 16)
    for tile, width in ((TILE, 16), (TILE, 8), (SMALL, 8)):
        for out in (8, 24, 40, 128, 144, 200, 256, 512):
            assert sum(tile.products(width, out)) == sum(tile.out_slabs(out)) == -(-out // 16) * 16


def test_how_many_steps_follow_each_other():
    """Four if a thread has room for their operands next to its sums."""
    assert [TILE.group(16, out) for out in (8, 128, 144, 192, 256)] == [4, 4, 2, 2, 4], "two passes halve the sums"
    assert [TILE.group(8, out) for out in (128, 256, 264)] == [4, 4, 2]
    assert [SMALL.group(8, out) for out in (128, 256, 512, 520)] == [4, 4, 4, 2]
    for tile, width in ((TILE, 16), (TILE, 8), (SMALL, 8)):
        for out in (8, 24, 40, 128, 144, 200, 256, 512):
            assert replace(tile, step=64).group(width, out) == 2
            for step in (32, 64):
                assert SWEEP // step % replace(tile, step=step).group(width, out) == 0


@pytest.mark.parametrize("channels, stages, step", [(128, 8, 64), (144, 8, 64), (192, 8, 64), (256, 3, 32)], ids=str)
def test_hidden_channels_of_small_images_stay_in_shared_memory(channels, stages, step):
    """As long as stages of weights leave them room; the planner prefers long steps, whose products are short here."""
    block = shape(channels, (8, 8))
    for count in range(2, MAX_STAGES + 1):
        assert is_resident(replace(SMALL, stages=count), block) == (count <= stages)
    plan = plan_block(mbconv(128, 8, 8, channels, 4), "h200")
    assert is_resident(plan.tile, block) and plan.tile.step == step


def test_hidden_channels_of_larger_images_do_not_stay():
    assert not any(is_resident(tile, shape()) for tile in candidate_tiles(shape(), H200))
    assert is_resident(TILE, shape(24, expansion=4)), "but a few do"


def test_shared_memory():
    """Each in bytes: input and constant one, output unless it takes the input's place, weights, hidden, gates.

    The squeeze vector is there nine times: of all, and each warp's share.
    """
    stages = 6 * 32 * 128 * 2
    streamed = 6 * 32 * 256 * 2
    expected = 256 * (128 + 16) * 2 + stages + streamed + (512 * 2 + 9 * 32 * 4) + COMPILER_BYTES
    assert TILE.memory_bytes(16, 128, 512, 128, 32, resident=False) == expected
    assert local_memory_bytes(TILE, shape(), H200) == expected <= LOCAL_MEMORY_BYTES
    hidden = 256 * 512 * 2
    assert TILE.memory_bytes(16, 128, 512, 128, 32, resident=True) == expected - streamed + hidden > LOCAL_MEMORY_BYTES
    output = 256 * 112 * 2
    narrower = expected - 6 * 32 * 16 * 2 + output
    assert TILE.memory_bytes(16, 128, 512, 112, 32, resident=False) == narrower, "slabs differ from the input's"
    two_passes = 256 * (256 + 16) * 2 + 6 * 32 * (256 + 128) * 2 + (1024 * 2 + 9 * 64 * 4) + COMPILER_BYTES
    assert TILE.memory_bytes(16, 256, 1024, 256, 64, resident=False) == two_passes, "hidden of half of the pixels"
    small = 64 * (256 + 16) * 2 + 3 * 32 * 256 * 2 + 64 * 1024 * 2 + (1024 * 2 + 9 * 64 * 4) + COMPILER_BYTES
    assert local_memory_bytes(SMALL, shape(256, (8, 8)), H200) == small


def test_workspace():
    """Hidden channels with their padding, of all pixels that there is room for."""
    assert TILE.workspace_elements(16, 512) == 512 * 256
    assert TILE.workspace_elements(14, 576) == 640 * 256
    assert SMALL.workspace_elements(7, 72) == 128 * 64


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"bands": 3}, "bands=3 is not one of 1, 2, 4, 8"),
        ({"bands": 16}, "bands=16 is not one of 1, 2, 4, 8"),
        ({"piece": 3}, "piece=3 is not one of 1, 2, 4"),
        ({"piece": 8}, "piece=8 is not one of 1, 2, 4"),
        ({"step": 16}, "step=16 is not one of 32, 64"),
        ({"step": 128}, "step=128 is not one of 32, 64"),
        ({"stages": 1}, "stages=1 is not between 2 and 8"),
        ({"stages": 9}, "stages=9 is not between 2 and 8"),
    ],
    ids=str,
)
def test_malformed_tiles(changes, reason):
    assert why_malformed(TILE) is None
    assert why_malformed(replace(TILE, **changes)) == reason
    assert why_invalid(replace(TILE, **changes), shape(), H200) == reason


@pytest.mark.parametrize(
    "tile, size, reason",
    [
        (TILE, (17, 16), "1 bands of 16 rows and up to 16 columns do not cover images of 17x16 pixels"),
        (TILE, (16, 17), "1 bands of 16 rows and up to 16 columns do not cover images of 16x17 pixels"),
        (SMALL, (9, 8), "2 bands of 8 rows and up to 4 columns do not cover images of 9x8 pixels"),
        (SMALL, (8, 33), "2 bands of 8 rows and up to 4 columns do not cover images of 8x33 pixels"),
        (
            TILE,
            (14, 14),
            "14 columns of each of 1 bands cannot be computed 4 at a time: that must divide them",
        ),
        (
            SMALL,
            (8, 9),
            "2 bands of 8 rows and up to 4 columns do not cover images of 8x9 pixels",
        ),
        (
            SMALL,
            (8, 4),
            "2 columns of each of 2 bands cannot be computed 4 at a time: that must be all of them",
        ),
        (
            replace(SMALL, piece=2),
            (8, 8),
            "4 columns of each of 2 bands cannot be computed 2 at a time: that must be all of them",
        ),
    ],
    ids=str,
)
def test_tiles_that_do_not_cover_an_image(tile, size, reason):
    assert why_not_covering(TILE, 16, 16) is None and why_not_covering(TILE, 1, 4) is None
    assert why_not_covering(SMALL, 8, 8) is None and why_not_covering(SMALL, 1, 5) is None
    assert why_not_covering(tile, *size) == reason
    if not why_unsupported(shape(size=size)):
        assert why_invalid(tile, shape(size=size), H200) == reason


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"dtype": "float32"}, "dtype float32 is not supported, use one of float16, bfloat16"),
        ({"kernel_size": 5}, "kernel size 5 with group width 8 is not supported, use 3 and 8"),
        ({"group_width": 16}, "kernel size 3 with group width 16 is not supported, use 3 and 8"),
        ({"channels": 12}, "in_channels=12 is not supported, use a multiple of 8"),
        ({"out_channels": 12}, "out_channels=12 is not supported, use a multiple of 8"),
        (
            {"batch": MAX_IMAGES + 1},
            "1048577 images are too many for a launch, split the batch: 1048576 are the limit",
        ),
        *(
            (
                {"size": size},
                f"images of {size[0]}x{size[1]} pixels are too large: up to 16x16 are supported, and 2 rows of up to "
                "32 columns",
            )
            for size in ((32, 32), (17, 16), (16, 17), (8, 17), (4, 17), (2, 33), (1, 256))
        ),
    ],
    ids=str,
)
def test_blocks_that_are_not_supported(options, reason):
    block = shape(**options)
    assert why_unsupported(shape()) is None
    assert why_unsupported(block) == reason
    assert why_none(block, H200) == reason
    assert why_invalid(TILE, block, H200) == reason
    assert not list(candidate_tiles(block, H200))


@pytest.mark.parametrize(
    "block, processor, reason",
    [
        (shape(), "a100", "it is for compute capability 9.0, a100 has 8.0"),
        (shape(), "b200", "it is for compute capability 9.0, b200 has 10.0"),
        (
            shape(512),
            "h200",
            "about 294 registers a thread would spill, 255 are available: expansion weights of 512 channels, sums of "
            "512 output channels and weights of 128 squeeze channels stay in registers",
        ),
        (
            shape(256),
            "h200",
            "input, hidden channels and weights of .* KB do not fit the 227 KB of local memory that h200 has",
        ),
    ],
    ids=["a100", "b200", "registers", "memory"],
)
def test_tiles_that_a_processor_cannot_run(block, processor, reason):
    assert why_invalid(TILE, shape(), H200) is None
    with pytest.raises(PlanError, match=f"cannot run .*{reason}.*; leave the tile to the planner"):
        plan_block(mbconv(block.batch, block.height, block.width, block.in_channels, 4), processor=processor, tile=TILE)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("channels, size, squeeze", [(128, 16, 32), (256, 16, 64), (144, 8, 36)])
def test_the_planner_takes_one_kernel_for_small_images(channels, size, squeeze, dtype):
    plan = plan_block(mbconv(128, size, size, channels, 4, dtype=dtype), "h200")
    assert plan.family is MBCONV_HOPPER and plan.kernel == "mbconv_hopper"
    assert plan.program.name == "fused" and len(plan.program.kernels) == 1
    hidden = 4 * channels
    weights = hidden * (2 * channels + 9 * 8 + 2 * squeeze)
    activations = 2 * 128 * size * size * channels
    assert plan.bytes == 2 * (activations + weights), "the input, the output and the weights, once each"
    assert "mbconv_hopper" in str(plan) and repr(plan.tile) in str(plan)
    assert "rejected portable kernels: predicted" in str(plan)
    again = plan_block(mbconv(128, size, size, channels, 4, dtype=dtype), "h200", tile=plan.tile)
    assert (again.tile, again.bytes) == (plan.tile, plan.bytes)


@pytest.mark.parametrize(
    "options, processor, reason",
    [
        ({"size": (32, 32)}, "h200", "images of 32x32 pixels are too large"),
        ({"group_width": 16}, "h200", "kernel size 3 with group width 16 is not supported"),
        ({"channels": 512}, "h200", "registers a thread would spill"),
        ({}, "a100", "it is for compute capability 9.0, a100 has 8.0"),
    ],
    ids=str,
)
def test_other_blocks_and_processors_take_the_portable_kernels(options, processor, reason):
    options = {"channels": 128, "size": (16, 16), **options}
    channels, size = options.pop("channels"), options.pop("size")
    plan = plan_block(mbconv(128, *size, channels, 4, **options), processor)
    assert plan.family is MBCONV and plan.kernel == "mbconv"
    assert plan.program.name == "two-pass"
    assert any(rejection.what == "Hopper kernel" and reason in rejection.why for rejection in plan.rejected)
    with pytest.raises(PlanError, match=reason):
        plan_block(mbconv(128, *size, channels, 4, **options), processor, kernel="mbconv_hopper")


def test_the_portable_kernels_can_be_asked_for():
    plan = plan_block(mbconv(128, 16, 16, 128, 4), "h200", kernel="mbconv")
    assert plan.family is MBCONV
    assert len(plan.program.kernels) == 2


MEASURED = json.loads((Path(__file__).parents[2] / "bench/results/h200/mbconv.json").read_text())


@pytest.mark.parametrize("row", MEASURED["rows"], ids=lambda row: f"{row['channels']},{row['hw']}")
def test_predictions_of_the_measured_blocks(row):
    """The model was fitted to these blocks, each in a launch of its own: it tells big from small, and no more."""
    graph = mbconv(row["batch"], row["hw"], row["hw"], row["channels"], row["alpha"])
    plan = plan_block(graph, "h200", eval(row["plan"]))
    assert abs(plan.predicted_us / row["apart_us"] - 1) < 0.2

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from fusion.planner.blocks import mbconv
from fusion.planner.families import MBCONV, MBCONV_HOPPER, MBCONV_WINDOWS_HOPPER
from fusion.planner.match import match_mbconv
from fusion.planner.mbconv_hopper_tile import (
    BANDS,
    COMPILER_BYTES,
    LANES,
    LOCAL_MEMORY_BYTES,
    MAX_IMAGES,
    MAX_STAGES,
    MAX_TILES,
    MIN_STAGES,
    PASS_REGISTERS,
    PIECES,
    PRODUCT_CHANNELS,
    STEPS,
    SWEEP,
    TRIED_STAGES,
    MBConvHopperTile,
    candidate_tiles,
    is_resident,
    local_memory_bytes,
    predicted_us,
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
def test_candidates_have_the_most_stages_or_others_that_are_tried(size):
    """Another stage would not fit; of fewer there are eight, six, four and three."""
    assert TRIED_STAGES == (8, 6, 4, 3)
    for block in shapes(size):
        stages = {}
        for tile in candidate_tiles(block, H200):
            stages.setdefault((tile.bands, tile.piece, tile.step), []).append(tile.stages)
        for design, found in stages.items():
            most = found[0]
            if most < MAX_STAGES:
                assert why_invalid(MBConvHopperTile(*design, most + 1), block, H200)
            assert found == [most, *(tried for tried in (8, 6, 4, 3) if tried < most)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_candidates_have_the_fewest_columns_and_the_widest_pieces(size):
    """Of what a processor can hold, both steps; of pieces half of the widest, too."""
    for block in shapes(size):
        valid = [
            tile
            for values in product(BANDS, PIECES, STEPS, range(MIN_STAGES, MAX_STAGES + 1))
            if why_invalid(tile := MBConvHopperTile(*values), block, H200) is None
        ]
        tiles = list(candidate_tiles(block, H200))
        assert bool(valid) == bool(tiles)
        fewest = min((tile.columns(size[1]) for tile in valid), default=0)
        of_fewest = [tile for tile in valid if tile.columns(size[1]) == fewest]
        widest = max((tile.piece for tile in of_fewest), default=0)
        expected = {(tile.bands, tile.piece, tile.step) for tile in of_fewest if tile.piece in (widest, widest / 2)}
        assert {(tile.bands, tile.piece, tile.step) for tile in tiles} == expected


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

    assert divisions((16, 16)) == {(1, 4), (1, 2)}
    assert divisions((14, 14)) == {(1, 2), (1, 1)}, "4 does not divide 14"
    assert divisions((12, 12)) == {(1, 4), (1, 2)}
    assert divisions((9, 13)) == {(1, 1)}
    assert divisions((8, 8)) == {(2, 4)}, "two bands have fewer columns than one"
    assert divisions((7, 7)) == {(2, 4)}
    assert divisions((4, 4)) == {(4, 1)}
    assert divisions((4, 16)) == {(4, 4)}
    assert divisions((2, 32)) == {(8, 4)}
    assert divisions((1, 3)) == {(4, 1), (8, 1)}, "as few columns"


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
    assert [TILE.padded_hidden(hidden) for hidden in (8, 128, 136, 256, 264, 576)] == [128, 128, 256, 256, 384, 640]
    assert [TILE.squeeze_depths(channels) for channels in (1, 3, 16, 17, 33, 36, 64, 100)] == [1, 1, 1, 2, 3, 3, 4, 7]
    assert (TILE.in_slabs(24), TILE.in_slabs(144)) == ((32,), (64, 64, 16))
    assert (TILE.out_slabs(24), TILE.out_slabs(144)) == ((32,), (64, 64, 16))
    assert [TILE.depths(channels) for channels in (8, 24, 40, 128, 144)] == [2, 3, 4, 9, 10], "one is of the bias"


@pytest.mark.parametrize("channels", [48, 80, 144])
def test_a_last_sweep_of_few_hidden_channels_is_split(channels):
    """By columns, for 16 columns in pieces of 4: 192, 320 and 576 hidden channels are 64 more than whole sweeps."""
    hidden = 4 * channels
    assert TILE.splits_last(16, hidden)
    assert TILE.computed_hidden(16, hidden) == hidden
    assert TILE.padded_hidden(hidden) == hidden + 64, "there are weights for a whole sweep"
    for step, stages in product(STEPS, (2, 8)):
        assert MBConvHopperTile(1, 4, step, stages).splits_last(16, hidden)
    for tile, width in (
        (replace(TILE, piece=2), 16),
        (replace(TILE, piece=1), 16),
        (TILE, 15),
        (TILE, 12),
        (TILE, 8),
        (SMALL, 8),
        (replace(SMALL, bands=4), 16),
    ):
        assert not tile.splits_last(width, hidden)
        assert tile.computed_hidden(width, hidden) == hidden + 64


def test_only_up_to_64_hidden_channels_of_a_last_sweep_are_split():
    split = [hidden for hidden in range(8, 648, 8) if TILE.splits_last(16, hidden)]
    assert split == [128 * sweep + more for sweep in range(5) for more in range(8, 72, 8)]
    assert [TILE.computed_hidden(16, hidden) for hidden in (8, 64, 72, 128, 136, 192, 200, 512)] == [
        64,
        64,
        128,
        128,
        192,
        192,
        256,
        512,
    ]


def test_hidden_channels_of_a_split_sweep_do_not_stay():
    """Even if there is room, whatever the planner is asked for."""
    sizes = 8, 64, 8, 2
    assert TILE.memory_bytes(16, *sizes, resident=True) < LOCAL_MEMORY_BYTES
    assert not TILE.is_resident(16, *sizes)
    assert replace(TILE, piece=2).is_resident(16, *sizes)
    assert TILE.is_resident(16, 8, 72, 8, 2), "as many as 128 are not split"


def test_how_the_projection_is_divided():
    """All 256 pixels have two passes where a thread cannot hold their sums; products are up to 256 channels wide."""
    assert (PASS_REGISTERS, PRODUCT_CHANNELS) == (160, 256)
    channels = 8, 128, 136, 144, 160, 168, 176, 192, 200, 208, 256
    assert [TILE.passes(16, out) for out in channels] == [1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2]
    assert [TILE.passes(14, out) for out in channels] == [1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2], "there is room for 16"
    assert [SMALL.passes(8, out) for out in (*channels, 512)] == [1] * 12
    assert [TILE.passes(8, out) for out in (256, 512)] == [1, 1], "128 pixels cannot be divided"
    for tile, width in ((TILE, 16), (TILE, 8), (SMALL, 8)):
        assert tile.products(width, 24) == (32,)
        assert tile.products(width, 128) == (128,)
        assert tile.products(width, 144) == (128, 16)
        assert tile.products(width, 192) == (128, 64)
        assert tile.products(width, 208) == (128, 64, 16)
        assert tile.products(width, 240) == (128, 64, 32, 16)
        assert tile.products(width, 256) == (256,)
        assert tile.products(width, 264) == (256, 16)
        assert tile.products(width, 512) == (256, 256)
        for out in (8, 24, 40, 128, 144, 200, 256, 512):
            assert sum(tile.products(width, out)) == sum(tile.out_slabs(out)) == -(-out // 16) * 16


def test_how_many_steps_follow_each_other():
    """Four if a thread has room for their operands next to its sums."""
    outs = 8, 128, 136, 144, 160, 168, 192, 256, 264
    assert [TILE.group(16, out) for out in outs] == [4, 4, 2, 2, 2, 4, 4, 4, 2], "two passes halve the sums"
    assert [TILE.group(8, out) for out in (128, 256, 264)] == [4, 4, 2]
    assert [SMALL.group(8, out) for out in (128, 256, 512, 520)] == [4, 4, 4, 2]
    for tile, width in ((TILE, 16), (TILE, 8), (SMALL, 8)):
        for out in (8, 24, 40, 128, 144, 200, 256, 512):
            assert replace(tile, step=64).group(width, out) == 2
            for step in (32, 64):
                assert SWEEP // step % replace(tile, step=step).group(width, out) == 0


def test_steps_are_read_ahead_where_there_is_room():
    outs = 8, 128, 136, 144, 160, 168, 192
    ahead = [True, True, False, False, False, True, True]
    few = replace(TILE, stages=2)
    assert [few.reads_ahead(16, 64, 256, out, 16) for out in outs] == ahead, "two passes halve the sums"
    outs = 128, 256, 512, 520
    assert [SMALL.reads_ahead(8, 64, 256, out, 16) for out in outs] == [True, True, True, False]


@pytest.mark.parametrize("size", [(16, 16), (14, 14), (12, 12), (8, 8), (7, 7), (4, 4)], ids=str)
def test_no_step_is_read_ahead_with_two_stages(size):
    """Its stage would be filled only after the step before has left it: the kernel would wait forever."""
    found = 0
    for channels, expansion in product(range(8, 392, 16), (4, 6)):
        block = shape(channels, size, expansion=expansion)
        for tile, stages in product(candidate_tiles(block, H200), range(MIN_STAGES, MAX_STAGES + 1)):
            tile = replace(tile, stages=stages)
            sizes = size[1], channels, block.hidden_channels, channels, block.squeeze_channels
            if not tile.is_resident(*sizes) and tile.hidden_stages(*sizes) == MIN_STAGES:
                assert not tile.reads_ahead(*sizes), (channels, tile)
                found += 1
    assert found


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

    The constant one has the pixels of a piece. Next to the gates are the output's bias and the squeeze vector, which is
    there nine times: of all, and each warp's share.
    """
    stages = 6 * 32 * 128 * 2
    gates = 512 * 2 + 128 * 4 + 9 * 32 * 4
    fixed = 256 * 128 * 2 + 4 * 16 * 16 * 2 + stages + gates + COMPILER_BYTES
    assert TILE.fixed_bytes(16, 128, 512, 128, 32) == fixed
    streamed = 6 * 32 * 256 * 2
    expected = fixed + streamed
    assert TILE.memory_bytes(16, 128, 512, 128, 32, resident=False) == expected
    assert local_memory_bytes(TILE, shape(), H200) == expected <= LOCAL_MEMORY_BYTES
    hidden = 256 * 512 * 2
    assert TILE.memory_bytes(16, 128, 512, 128, 32, resident=True) == fixed + hidden > LOCAL_MEMORY_BYTES
    output = 256 * 112 * 2
    narrower = fixed - 6 * 32 * 16 * 2 + output + 3 * 32 * 256 * 2
    assert TILE.memory_bytes(16, 128, 512, 112, 32, resident=False) == narrower, "slabs differ from the input's"
    gates = 1024 * 2 + 256 * 4 + 9 * 64 * 4
    two_passes = 256 * 256 * 2 + 4 * 16 * 16 * 2 + 4 * 32 * 256 * 2 + 3 * 32 * 128 * 2 + gates + COMPILER_BYTES
    few = replace(TILE, stages=4)
    assert few.memory_bytes(16, 256, 1024, 256, 64, resident=False) == two_passes, "hidden of half of the pixels"
    small = 64 * (256 + 16) * 2 + 3 * 32 * 256 * 2 + 64 * 1024 * 2 + gates + COMPILER_BYTES
    assert local_memory_bytes(SMALL, shape(256, (8, 8)), H200) == small


def test_shared_memory_of_a_split_sweep():
    """Two pieces of the constant one. There are gates for whole sweeps, 640, so 1024; 36 squeeze channels take 64."""
    gates = 1024 * 2 + 256 * 4 + 9 * 64 * 4
    fixed = 256 * 144 * 2 + 2 * 4 * 16 * 16 * 2 + 6 * 32 * 144 * 2 + gates + COMPILER_BYTES
    assert TILE.fixed_bytes(16, 144, 576, 144, 36) == fixed
    assert local_memory_bytes(TILE, shape(144), H200) == fixed + 5 * 32 * 256 * 2
    narrow = replace(TILE, piece=2)
    assert narrow.fixed_bytes(16, 144, 576, 144, 36) == fixed - 3 * 2 * 16 * 16 * 2, "not split: a piece, of two tiles"


def test_gates_biases_and_the_squeeze_vector_have_powers_of_two():
    for hidden, gates in ((8, 128), (128, 128), (136, 256), (264, 512), (512, 512), (576, 1024)):
        assert TILE.gate_bytes(hidden, 16, 1) == gates * 2 + 16 * 4 + 9 * 32 * 4
    for out, biases in ((8, 16), (24, 32), (40, 64), (128, 128), (136, 256), (256, 256), (264, 512)):
        assert TILE.gate_bytes(128, out, 1) == 128 * 2 + biases * 4 + 9 * 32 * 4
    for channels, squeeze in ((1, 32), (16, 32), (32, 32), (33, 64), (36, 64), (65, 128), (100, 128)):
        assert TILE.gate_bytes(128, 16, channels) == 128 * 2 + 16 * 4 + 9 * squeeze * 4


@pytest.mark.parametrize(
    "tile, width, channels, count",
    [
        (TILE, 16, (128, 512, 128, 32), 6),  # 119936 bytes are fixed, of 232448: 6.9 stages of 16384
        (replace(TILE, stages=8), 16, (128, 512, 128, 32), 5),  # 136320: 5.9
        (replace(TILE, stages=4), 16, (128, 512, 128, 32), 7),  # 103552: 7.9
        (replace(TILE, stages=2), 16, (128, 512, 128, 32), MAX_STAGES),  # 87168: 8.9
        (replace(TILE, step=64, stages=3), 16, (128, 512, 128, 32), 3),  # 119936: 3.4 of 32768
        (TILE, 16, (24, 96, 24, 6), MAX_STAGES),
        (TILE, 16, (144, 576, 144, 36), 5),  # 139008, split: 5.7
        (TILE, 16, (256, 1024, 256, 64), MIN_STAGES),  # 237312: none has room
        (replace(TILE, stages=4), 16, (256, 1024, 256, 64), 3),  # 204544: 3.4 of 8192, of half of the pixels
        (replace(TILE, stages=3), 16, (256, 1024, 256, 64), 5),  # 188160: 5.4
        (replace(TILE, stages=2), 16, (256, 1024, 256, 64), 7),  # 171776: 7.4
        (SMALL, 8, (256, 1024, 256, 64), MAX_STAGES),
        (MBConvHopperTile(2, 4, 64, 5), 8, (256, 512, 256, 64), 3),  # 203520: 3.5
    ],
    ids=str,
)
def test_how_many_steps_of_hidden_channels_are_on_their_way(tile, width, channels, count):
    """As many as have room, but no fewer than two and no more than eight."""
    assert (MIN_STAGES, MAX_STAGES) == (2, 8)
    assert tile.hidden_stages(width, *channels) == count


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_another_stage_of_hidden_channels_would_not_fit(size):
    for block, (_, hidden, out, _) in zip(shapes(size), CHANNELS, strict=True):
        width, channels = size[1], (block.in_channels, hidden, out, block.squeeze_channels)
        for tile in candidate_tiles(block, H200):
            count, stage = tile.hidden_stages(width, *channels), tile.hidden_stage_bytes(width, out)
            assert MIN_STAGES <= count <= MAX_STAGES
            assert stage == tile.step * tile.pixels(width) // tile.passes(width, out) * 2
            total = tile.fixed_bytes(width, *channels) + count * stage
            assert tile.memory_bytes(width, *channels, resident=False) == total
            if not is_resident(tile, block):
                assert total <= LOCAL_MEMORY_BYTES
            assert count in (MIN_STAGES, MAX_STAGES) or total <= LOCAL_MEMORY_BYTES < total + stage
            assert count == MAX_STAGES or total + stage > LOCAL_MEMORY_BYTES


def test_workspace():
    """Hidden channels that are computed, with their padding, of all pixels that there is room for."""
    assert TILE.workspace_elements(16, 512) == 512 * 256
    assert TILE.workspace_elements(14, 576) == 640 * 256
    assert SMALL.workspace_elements(7, 72) == 128 * 64
    assert TILE.workspace_elements(16, 576) == 576 * 256, "the last sweep is split"
    assert TILE.workspace_elements(16, 552) == 576 * 256
    assert TILE.workspace_elements(16, 584) == 640 * 256
    assert replace(TILE, piece=2).workspace_elements(16, 576) == 640 * 256
    for width, hidden in product((8, 14, 15, 16), (8, 64, 72, 128, 192, 320, 512, 576)):
        assert TILE.workspace_elements(width, hidden) == TILE.computed_hidden(width, hidden) * TILE.pixels(width)


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


def test_larger_images_have_a_kernel_of_their_own():
    graph, reason = mbconv(128, 32, 32, 128, 4), "images of 32x32 pixels are too large"
    plan = plan_block(graph, "h200")
    assert plan.family is MBCONV_WINDOWS_HOPPER and plan.kernel == "mbconv_windows_hopper"
    assert plan.program.name == "fused"
    assert any(rejection.what == "Hopper kernel" and reason in rejection.why for rejection in plan.rejected)
    with pytest.raises(PlanError, match=reason):
        plan_block(graph, "h200", kernel="mbconv_hopper")


def test_the_portable_kernels_can_be_asked_for():
    plan = plan_block(mbconv(128, 16, 16, 128, 4), "h200", kernel="mbconv")
    assert plan.family is MBCONV
    assert len(plan.program.kernels) == 2


MEASURED = json.loads((Path(__file__).parents[2] / "bench/results/h200/mbconv.json").read_text())


@pytest.mark.parametrize("row", MEASURED["rows"], ids=lambda row: f"{row['channels']},{row['hw']}")
def test_predictions_of_the_measured_blocks(row):
    """The model was fitted to these blocks, in launches of their own and eight in one."""
    graph = mbconv(row["batch"], row["hw"], row["hw"], row["channels"], row["alpha"])
    plan = plan_block(graph, "h200", eval(row["plan"]))
    assert abs(plan.predicted_us / row["apart_us"] - 1) < 0.1
    assert abs(plan.predicted_stage_us(8) / row["fused_us"] - 1) < 0.1


def test_a_stage_of_other_blocks_is_predicted_as_blocks_by_themselves():
    """There is no launch for several without residuals, or of another kernel."""
    for graph in (mbconv(128, 16, 16, 128, 4, out_channels=160), mbconv(128, 18, 18, 128, 4)):
        plan = plan_block(graph, "h200")
        assert plan.predicted_stage_us(8) == plan.predicted_us


def test_what_nothing_hides_is_predicted():
    """A short ring, hidden channels for which L2 has no room, images on their way through DRAM."""
    tile, block = MBConvHopperTile(bands=1, piece=4, step=32, stages=6), shape(256)
    us = predicted_us(tile, block, H200)
    assert predicted_us(replace(tile, stages=2), block, H200) > us + 5
    assert predicted_us(replace(tile, stages=8), block, H200) == pytest.approx(us, abs=0.1), "long enough"
    roomy = replace(H200, global_memory_bytes=4 * H200.global_memory_bytes)
    spilled = 2 * (128 * 1024 * 256 * 2 - 30 * 2**20) / H200.bandwidth * 1e6
    assert us - predicted_us(tile, block, roomy) == pytest.approx(spilled)
    one = replace(block, batch=1)
    assert predicted_us(tile, one, H200) < us - spilled, "one image leaves L2 room"
    assert predicted_us(tile, replace(block, batch=133), H200) > 1.7 * us, "a second round for the last image"

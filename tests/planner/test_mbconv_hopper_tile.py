import json
from dataclasses import replace
from pathlib import Path

import pytest

from fusion.planner.blocks import mbconv
from fusion.planner.families import MBCONV, MBCONV_HOPPER
from fusion.planner.match import match_mbconv
from fusion.planner.mbconv_hopper_tile import (
    ARENA_ATOM,
    BLOCK_PIXELS,
    CHUNK,
    MAX_IMAGES,
    MAX_PIXELS,
    PARTITIONS,
    MBConvHopperTile,
    candidate_tiles,
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
TILE = MBConvHopperTile(images=1, rows=2, bands=8, columns=16)
SIZES = [(16, 16), (8, 8), (14, 14), (7, 7), (9, 13), (5, 5), (4, 4), (12, 12), (1, 1), (2, 33), (33, 2), (1, 256)]
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
    assert TILE.to_ints() == [1, 2, 8, 16]
    assert MBConvHopperTile(*TILE.to_ints()) == TILE
    for name in ("images", "rows", "bands", "columns"):
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
        assert tiles or block.in_channels > 144 or block.out_channels > 144
        for tile in tiles:
            assert why_invalid(tile, block, H200) is None
            assert local_memory_bytes(tile, block, H200) <= H200.local_memory_bytes
            assert programs_per_processor(tile, block, H200) == 1
            assert MBConvHopperTile(*tile.to_ints()) == tile


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_pixel_of_an_image_has_its_place(size):
    """Row y is row y % rows of band y // rows; of a row buffer, pixels lie column by column, bands in turn."""
    height, width = size
    tiles = list(candidate_tiles(shape(8, size), H200))
    assert tiles
    for tile in tiles:
        assert tile.pixels in (64, 128, 256) and tile.pixels <= MAX_PIXELS
        assert tile.blocks * BLOCK_PIXELS == tile.pixels
        assert tile.row_pixels % BLOCK_PIXELS == 0
        places = {
            (y % tile.rows, x * tile.bands + y // tile.rows)
            for y, x in ((y, x) for y in range(height) for x in range(width))
        }
        assert len(places) == height * width
        assert all(row < tile.rows and pixel < tile.row_pixels for row, pixel in places)


def test_small_images_share_a_program_and_large_ones_do_not():
    assert {tile.images for tile in candidate_tiles(shape(24, (7, 7)), H200)} == {1, 2, 4}
    assert {tile.images for tile in candidate_tiles(shape(24, (2, 33)), H200)} == {1, 2}
    assert {tile.images for tile in candidate_tiles(shape(24, (16, 16)), H200)} == {1}
    rows = [tile.rows for tile in candidate_tiles(shape(24, (16, 16)), H200)]
    assert sorted(rows) == [1, 2, 4]
    assert {tile.rows for tile in candidate_tiles(shape(24, (14, 14)), H200)} == {1, 2}, "4 does not divide 14"


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_row_buffers_have_zeros_for_every_shifted_view(size):
    """A view starts a column and a band before or after a row buffer, and each image has two more than its rows."""
    for tile in candidate_tiles(shape(8, size), H200):
        assert tile.pad >= tile.bands + 1 and tile.pad % 8 == 0
        last = tile.images * (tile.rows + 2) - 1
        end = tile.pad + last * (tile.row_pixels + tile.pad) + tile.row_pixels
        assert end + tile.bands + 1 <= tile.buffer_pixels
        assert tile.buffer_pixels % 8 == 0
        assert tile.buffer_bytes() % 512 == 0 and tile.partition_bytes() % 512 == 0


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_what_takes_the_place_of_row_buffers_fits(size):
    """The arena first holds row buffers and taps, then stages of weights, and shares of squeeze vectors after them."""
    for block in shapes(size):
        for tile in candidate_tiles(block, H200):
            out, squeeze = block.out_channels, block.squeeze_channels
            arena = tile.arena_atoms(out, squeeze) * ARENA_ATOM
            assert PARTITIONS * tile.partition_bytes() <= arena
            assert tile.stages(out, squeeze) >= 2
            shares = tile.shares_atom(out, squeeze) * ARENA_ATOM
            assert tile.stages(out, squeeze) * tile.step_bytes(out) <= shares
            assert shares + tile.share_bytes(squeeze) <= arena


def test_channels_are_padded_to_chunks_and_slabs():
    assert (TILE.hidden, TILE.chunks(8), TILE.chunks(64), TILE.chunks(72)) == (CHUNK, 1, 1, 2)
    assert [TILE.squeeze(channels) for channels in (1, 3, 16, 17, 33, 64)] == [16, 16, 16, 32, 64, 64]
    assert [TILE.gate_steps(hidden) for hidden in (8, 256, 264)] == [1, 1, 2]
    assert [TILE.bias_elements(hidden) for hidden in (8, 128, 136, 576)] == [128, 128, 256, 1024]
    assert (TILE.in_slabs(24), TILE.in_slabs(144)) == ((32,), (64, 64, 16))
    assert (TILE.out_slabs(144), TILE.store_slabs(144), TILE.out_tiles(144)) == ((128, 16), (64, 64, 16), 3)
    for channels in (8, 24, 40, 256, 512):
        assert sum(TILE.out_slabs(channels)) == sum(TILE.store_slabs(channels)) >= channels


def test_how_the_projection_is_divided():
    four_blocks, one_block = MBConvHopperTile(1, 4, 4, 16), MBConvHopperTile(1, 1, 8, 8)
    assert (four_blocks.blocks, four_blocks.splits_columns) == (4, False)
    assert (one_block.blocks, one_block.splits_columns) == (1, True)
    assert [four_blocks.passes(channels) for channels in (128, 136, 256)] == [1, 2, 2]
    assert [one_block.passes(channels) for channels in (128, 136, 256)] == [1, 1, 1]
    assert [TILE.step(channels) for channels in (8, 192, 200, 512)] == [64, 64, 32, 32]


def test_workspace():
    """Hidden channels in 16 bits, and for each and each image the fp32 sums of four warps."""
    assert TILE.workspace_elements(512) == 512 * 256 + 512 * 4 * 2
    assert MBConvHopperTile(2, 1, 8, 8).workspace_elements(72) == 128 * 128 + 128 * 4 * 2 * 2


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"rows": 3}, "rows=3 is not one of 1, 2, 4"),
        ({"rows": 8}, "rows=8 is not one of 1, 2, 4"),
        ({"bands": 12}, "bands=12 is not a power of two"),
        ({"columns": 14}, "columns=14 is not a power of two"),
        ({"bands": 2}, "rows of 32 pixels of all bands are no multiple of 64"),
        ({"images": 2}, "512 pixels of a program are not 64, 128 or 256"),
        ({"images": 3, "rows": 1, "bands": 4}, "192 pixels of a program are not 64, 128 or 256"),
    ],
    ids=str,
)
def test_malformed_tiles(changes, reason):
    assert why_malformed(TILE) is None
    assert why_malformed(replace(TILE, **changes)) == reason
    assert why_invalid(replace(TILE, **changes), shape(), H200) == reason


@pytest.mark.parametrize("size", [(15, 16), (18, 16), (16, 17), (9, 13)], ids=str)
def test_tiles_that_do_not_cover_an_image(size):
    assert why_not_covering(TILE, 16, 16) is None and why_not_covering(TILE, 2, 1) is None
    reason = "8 bands of 2 rows and 16 columns do not cover images of {}x{} pixels evenly".format(*size)
    assert why_not_covering(TILE, *size) == reason
    if size[0] <= 16 and size[1] <= 16:
        assert why_invalid(TILE, shape(size=size), H200) == reason


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
                "images of {}x{} pixels are too large: a program holds up to 256, in columns and bands of rows that "
                "are powers of two".format(*size),
            )
            for size in ((32, 32), (17, 16), (16, 17), (6, 40), (1, 257))
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
        (shape(512), "h200", "332 registers a thread would spill, 255 are available: the sums of 512 output channels"),
        (shape(256), "h200", "input, row buffers and weights of .* KB do not fit the 227 KB of local memory that h200"),
    ],
    ids=["a100", "b200", "registers", "memory"],
)
def test_tiles_that_a_processor_cannot_run(block, processor, reason):
    assert why_invalid(TILE, shape(), H200) is None
    with pytest.raises(PlanError, match=f"cannot run .*{reason}.*; leave the tile to the planner"):
        plan_block(mbconv(block.batch, block.height, block.width, block.in_channels, 4), processor=processor, tile=TILE)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("channels, size, squeeze", [(128, 16, 32), (144, 8, 36)])
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
    """The model was fitted to an earlier run of the same blocks: it tells big from small, and no more is claimed."""
    graph = mbconv(row["batch"], row["hw"], row["hw"], row["channels"], row["alpha"])
    plan = plan_block(graph, "h200", eval(row["plan"]))
    assert abs(plan.predicted_us / row["fused_us"] - 1) < 0.25

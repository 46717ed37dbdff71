from dataclasses import FrozenInstanceError, replace

import pytest

from fusion.planner.convfirst_down_tile import (
    BORDERS,
    ConvFirstDownTile,
    candidate_tiles,
    estimated_registers,
    local_memory_bytes,
    predicted_us,
    programs_per_processor,
    regions,
    tensor_memory_columns,
    why_invalid,
    why_unsupported,
)
from fusion.planner.match import ConvFirstDownShape
from fusion.planner.processor import PROCESSORS

TILE = ConvFirstDownTile(128, 32, 32, 4)
SHAPE = ConvFirstDownShape(128, 64, 64, 64, 384, 96, 8, "relu", "float16")
H200 = PROCESSORS["h200"]


def test_tile_by_hand():
    assert TILE.in_slabs(72) == (32, 32, 16)
    assert TILE.out_slabs(200) == (128, 64, 16)
    assert [TILE.padded_hidden(hidden) for hidden in (1, 32, 33, 65)] == [64, 64, 64, 96]
    with pytest.raises(FrozenInstanceError):
        TILE.pixels = 64


def test_tile_survives_text_and_integers():
    tile = ConvFirstDownTile(64, 16, 32, 2, 5, 4, 8)
    assert eval(repr(tile)) == tile
    assert tile.to_ints() == [64, 16, 32, 2, 5, 4, 8]
    assert ConvFirstDownTile(*tile.to_ints()) == tile


FIELDS = ["pixels", "hidden", "conv_slab", "warps", "conv_stages", "ffn_stages", "copy_bytes"]


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("value", [0, -16, 16.0, "16"])
def test_tile_fields_are_positive_integers(field, value):
    with pytest.raises(ValueError, match=f"{field} must be a positive integer, got {value!r}"):
        replace(TILE, **{field: value})


@pytest.mark.parametrize("height, width", [(2, 2), (3, 2), (3, 3), (4, 7), (8, 8), (9, 12)])
def test_regions_cover_every_output_pixel_once(height, width):
    count = {}
    for border, (top, rows, left, columns) in enumerate(regions(height, width)):
        for row in range(top, top + rows):
            for column in range(left, left + columns):
                kind = tuple(
                    1 if i == 0 else 2 if 2 * i == size - 1 else 0 for i, size in ((row, height), (column, width))
                )
                assert border == 3 * kind[0] + kind[1]
                count[row, column] = count.get((row, column), 0) + 1
    assert count == {(row, column): 1 for row in range((height + 1) // 2) for column in range((width + 1) // 2)}


def test_programs_by_hand():
    assert len(regions(5, 9)) == BORDERS
    # 31 rows and columns of inner pixels, the first row, the first column, and the corner.
    assert TILE.programs(128, 64, 64) == 31 * 31 + 31 + 31 + 1
    # Pixels of all images share programs: 2 x 3 inner ones of three images are 18.
    assert replace(TILE, pixels=16).programs(3, 7, 9) == 2 + 8
    assert TILE.programs(1, 2, 2) == 1


UNSUPPORTED = [
    ({"height": 1}, "1x64 pixels cannot be blur-pooled: reflection needs 2 each way"),
    ({"width": 1}, "64x1 pixels cannot be blur-pooled"),
    ({"dtype": "float32"}, "dtype float32 is not supported, use one of float16, bfloat16"),
    ({"kernel_size": 5}, "kernel size 5 is not supported, use 3"),
    ({"in_channels": 60}, "in_channels=60 is not supported, use a multiple of 8"),
    ({"out_channels": 4}, "out_channels=4 is not supported, use a multiple of 8"),
    ({"in_channels": 48, "group_width": 24}, "group width 24 is not supported, use a power of two up to 64"),
    ({"height": 8192, "width": 4096}, "images of 8192x4096 pixels are too large, split them"),
]


@pytest.mark.parametrize("changes, message", UNSUPPORTED)
def test_unsupported_blocks(changes, message):
    shape = replace(SHAPE, **changes)
    assert why_unsupported(shape).startswith(message)
    assert why_invalid(TILE, shape, H200) == why_unsupported(shape)
    assert list(candidate_tiles(shape, H200)) == []


@pytest.mark.parametrize("changes", [{}, {"dtype": "bfloat16"}, {"height": 2, "width": 2}, {"activation": "silu"}])
def test_supported_blocks(changes):
    assert why_unsupported(replace(SHAPE, **changes)) is None


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"pixels": 96}, "pixels=96 is not a power of two"),
        ({"hidden": 48}, "hidden=48 is not a power of two"),
        ({"conv_slab": 96}, "conv_slab=96 is not a power of two"),
        ({"warps": 3}, "warps=3 is not a power of two"),
        ({"pixels": 8, "warps": 1}, "at least 16 pixels"),
        ({"hidden": 8}, "16 hidden channels"),
        ({"conv_slab": 8}, "slabs of 16 channels"),
        ({"pixels": 256, "warps": 32}, "32 warps are more than a program may have, 16"),
        ({"warps": 16, "pixels": 64}, "16 warps are too many for 64 pixels"),
        ({"conv_stages": 9}, "110592 bytes of local memory are more than rtx4090 has, 101376"),
        ({"conv_stages": 1}, "loops must be pipelined, in 2 stages at least"),
        ({"ffn_stages": 1}, "loops must be pipelined, in 2 stages at least"),
        ({"copy_bytes": 4}, "copies of 4 bytes are not supported, use 16 or 8"),
        ({"warps": 2}, "about 456 registers a thread would spill, 255 are available"),
    ],
)
def test_invalid_tiles(changes, message):
    assert message in why_invalid(replace(TILE, **changes), SHAPE, PROCESSORS["rtx4090"])


def test_slabs_must_not_split_groups():
    shape = replace(SHAPE, group_width=32)
    assert why_invalid(TILE, shape, H200) is None
    assert why_invalid(replace(TILE, conv_slab=16), shape, H200) == (
        "slabs (16, 16, 16, 16) split groups of 32 channels"
    )


def test_memories_by_hand():
    """Two bytes a value: three stages of pixels and of a tap's two matrices, or of a step of expand and project."""
    assert local_memory_bytes(TILE, SHAPE, H200) == 2 * 3 * 32 * (2 * 64 + 96)
    assert local_memory_bytes(replace(TILE, conv_stages=6), SHAPE, H200) == 2 * 6 * 32 * (128 + 2 * 32)
    assert estimated_registers(TILE, SHAPE) == 96 + 64 + 1.5 * 32 + 40
    assert programs_per_processor(TILE, SHAPE, H200) == 65536 // (248 * 128)
    assert programs_per_processor(replace(TILE, conv_stages=16), SHAPE, H200) == 1


def test_operands_where_warpgroups_share_rows():
    """64 pixels are the rows of one of Hopper's warpgroups: with two of them blurred input and convolution are in
    shared memory."""
    shape = ConvFirstDownShape(8, 14, 14, 144, 288, 96, 8, "relu", "float16")
    one, two = ConvFirstDownTile(64, 128, 64, 4, 4, 2), ConvFirstDownTile(64, 128, 64, 8, 4, 2)
    assert local_memory_bytes(two, shape, H200) == local_memory_bytes(one, shape, H200) + 2 * 64 * 2 * 144
    assert why_invalid(one, shape, H200) is None
    assert why_invalid(two, shape, H200) == "233472 bytes of local memory are more than h200 has, 232448"


def test_tensor_memory():
    """Where sums are in tensor memory, operands are in shared memory."""
    b200, wide = PROCESSORS["b200"], ConvFirstDownTile(256, 32, 32, 8)
    assert local_memory_bytes(TILE, SHAPE, b200) == local_memory_bytes(TILE, SHAPE, H200) + 2 * 128 * (2 * 64 + 32)
    assert tensor_memory_columns(TILE, SHAPE, b200) == 2 * 64 + 96 + 2 * 32
    assert tensor_memory_columns(TILE, SHAPE, H200) == 0
    assert why_invalid(wide, SHAPE, H200) is None
    assert "columns of tensor memory are more than there are, 512" in why_invalid(wide, SHAPE, b200)


@pytest.mark.parametrize("processor", PROCESSORS.values(), ids=lambda processor: processor.name)
@pytest.mark.parametrize(
    "shape",
    [SHAPE, replace(SHAPE, in_channels=48, group_width=16), replace(SHAPE, in_channels=16, hidden_channels=96)],
    ids=str,
)
def test_candidates_are_valid_and_differ(shape, processor):
    tiles = list(candidate_tiles(shape, processor))
    assert len(tiles) > 100
    assert all(why_invalid(tile, shape, processor) is None for tile in tiles)
    layouts = {(replace(tile, conv_slab=16), tile.in_slabs(shape.in_channels)) for tile in tiles}
    assert len(layouts) == len(tiles), "no two candidates are the same kernel"


def test_predictions_grow_with_the_work():
    us = predicted_us(TILE, SHAPE, H200)
    assert predicted_us(TILE, replace(SHAPE, batch=256), H200) == pytest.approx(2 * us, rel=0.1)
    assert predicted_us(TILE, replace(SHAPE, hidden_channels=768), H200) > 1.2 * us
    assert predicted_us(replace(TILE, hidden=256), replace(SHAPE, hidden_channels=257), H200) > us
    assert predicted_us(TILE, SHAPE, PROCESSORS["a5000"]) > 2 * us


def test_registers_that_are_not_there_cost_time():
    """Half as many warps have twice the pixels a thread, for which there are not enough registers."""
    wide, narrow = replace(TILE, pixels=256, warps=8), replace(TILE, pixels=256, warps=4)
    assert estimated_registers(narrow, SHAPE) > 255 > estimated_registers(wide, SHAPE)
    assert predicted_us(narrow, SHAPE, H200) > predicted_us(wide, SHAPE, H200)

from dataclasses import FrozenInstanceError, replace
from math import ceil

import pytest

from fusion.planner.hopper_tile import (
    HopperTile,
    HopperWork,
    estimated_registers,
    local_memory_bytes,
    programs_in_local_memory,
    programs_per_processor,
    weight_bytes,
    why_invalid,
    why_malformed,
    why_none,
    why_unsupported,
)
from fusion.planner.match import ConvFirstShape
from fusion.planner.processor import PROCESSORS

TILE = HopperTile(pixels=64, hidden=64, stages=3, partitions=2, programs=1, warp_products=0, bulk_loads=1)
SHAPE = ConvFirstShape(128, 64, 64, 64, 384, 64, 8, "relu", True, "float16")
H200 = PROCESSORS["h200"]


def block(channels, hidden_channels):
    return replace(SHAPE, in_channels=channels, hidden_channels=hidden_channels, out_channels=channels)


def test_tile_by_hand():
    assert TILE.in_slabs(72) == TILE.out_slabs(72) == (64, 16)
    assert TILE.in_slabs(200) == (64, 64, 64, 16)
    assert [TILE.steps(hidden) for hidden in (1, 64, 65, 384)] == [1, 1, 2, 6]
    assert [TILE.padded_hidden(hidden) for hidden in (1, 64, 65, 384)] == [64, 64, 128, 384]
    with pytest.raises(FrozenInstanceError):
        TILE.hidden = 32


def test_tile_survives_text_and_integers():
    tile = HopperTile(128, 16, 4, 1, 3, 1, 1)
    assert eval(repr(tile)) == tile
    assert tile.to_ints() == [128, 16, 4, 1, 3, 1, 1]
    assert HopperTile(*tile.to_ints()) == tile


@pytest.mark.parametrize(
    "field", ["pixels", "hidden", "stages", "partitions", "programs", "warp_products", "bulk_loads"]
)
@pytest.mark.parametrize("value", [-16, 16.0, "16"])
def test_tile_fields_are_integers(field, value):
    with pytest.raises(ValueError, match=f"HopperTile: {field} must be an integer of . or more, got {value!r}"):
        replace(TILE, **{field: value})


def test_only_switches_may_be_zero():
    for field in ("pixels", "hidden", "stages", "partitions", "programs"):
        with pytest.raises(ValueError, match=f"{field} must be an integer of 1 or more, got 0"):
            replace(TILE, **{field: 0})
    switched_off = replace(TILE, warp_products=0, bulk_loads=0)
    assert (switched_off.warp_products, switched_off.bulk_loads) == (0, 0)


@pytest.mark.parametrize(
    "pixels, width, streams, tile_width, strips",
    [
        (64, 1, 8, 8, 1),
        (64, 8, 8, 8, 1),
        (64, 9, 4, 16, 1),
        (64, 32, 2, 32, 1),
        (64, 33, 1, 64, 1),
        (64, 64, 1, 64, 1),
        (64, 65, 1, 64, 2),
        (64, 124, 1, 64, 2),
        (64, 125, 1, 64, 3),
        (128, 7, 16, 8, 1),
        (128, 56, 2, 64, 1),
        (128, 128, 1, 128, 1),
        (128, 129, 1, 128, 2),
    ],
)
def test_division_of_a_row(pixels, width, streams, tile_width, strips):
    tile = replace(TILE, pixels=pixels)
    assert (tile.streams(width), tile.tile_width(width), tile.strips(width)) == (streams, tile_width, strips)


@pytest.mark.parametrize(
    "pixels, width", [(64, 65), (64, 124), (64, 125), (64, 1000), (128, 129), (128, 252), (128, 253)]
)
def test_strips_compute_every_column_once(pixels, width):
    """A strip computes all of its columns but the first and the last; the first strip starts a column early."""
    tile = replace(TILE, pixels=pixels)
    inner = pixels - 2
    computed = [strip * inner - 1 + column for strip in range(tile.strips(width)) for column in range(1, inner + 1)]
    assert [column for column in computed if column < width] == list(range(width))
    assert computed[-inner] < width, "the last strip has a column"


@pytest.mark.parametrize(
    "tile, image, work",
    [
        (TILE, (128, 64, 64), HopperWork(rows=128 * 65, jobs=16, grid=130)),
        (TILE, (128, 32, 32), HopperWork(rows=128 * 33, jobs=4, grid=132)),
        (HopperTile(128, 16, 3, 1, 3, 1, 1), (128, 128, 128), HopperWork(rows=128 * 129, jobs=21, grid=394)),
        (HopperTile(64, 16, 3, 1, 1, 0, 1), (1, 1, 1), HopperWork(rows=2, jobs=1, grid=1)),
        # 132 programs make 44 runs of three strips: 8256 rows in runs of 2 * 94, of which 44 are needed.
        (HopperTile(64, 16, 3, 1, 1, 0, 1), (64, 128, 128), HopperWork(rows=64 * 129, jobs=94, grid=132)),
    ],
)
def test_work_by_hand(tile, image, work):
    assert tile.work(*image, processors=132) == work


@pytest.mark.parametrize("image", [(1, 1, 1), (1, 7, 5), (3, 19, 23), (128, 64, 64), (7, 33, 130), (5, 100, 1001)])
@pytest.mark.parametrize("processors", [1, 7, 132])
@pytest.mark.parametrize("tile", [TILE, HopperTile(128, 16, 3, 1, 5, 1, 1), HopperTile(64, 16, 4, 1, 1, 0, 1)], ids=str)
def test_programs_compute_all_rows_and_none_is_idle(tile, processors, image):
    batch, height, width = image
    work = tile.work(*image, processors)
    assert work.rows == batch * (height + 1)
    lanes, strips = tile.partitions * tile.streams(width), tile.strips(width)
    runs = ceil(work.rows / (2 * work.jobs))
    assert (work.grid - 1) * lanes < runs * strips <= work.grid * lanes
    most_lanes = max(strips, processors * tile.programs * lanes)
    assert runs * strips <= most_lanes
    if work.jobs > 1:
        assert ceil(work.rows / (2 * (work.jobs - 1))) * strips > most_lanes - most_lanes % strips


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"group_width": 16}, "group width 16 is not supported, use 8"),
        ({"activation": "silu"}, "activation silu is not supported, use relu"),
        ({"dtype": "float32"}, "dtype float32 is not supported, use one of float16, bfloat16"),
        ({"kernel_size": 5}, "kernel size 5 is not supported, use 3"),
        ({"in_channels": 60}, "in_channels=60 is not supported, use a multiple of 8"),
        ({"height": 8192, "width": 4096}, "images of 8192x4096 pixels are too large, split them"),
    ],
)
def test_unsupported_blocks(changes, message):
    shape = replace(SHAPE, **changes)
    assert why_unsupported(shape).startswith(message)
    assert why_invalid(TILE, shape, H200) == why_none(shape, H200) == why_unsupported(shape)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dtype": "bfloat16"},
        {"out_channels": 8, "residual": False},
        {"in_channels": 40, "out_channels": 24, "hidden_channels": 77, "residual": False},
        {"batch": 1, "height": 1, "width": 1},
        {"width": 1001, "height": 3},
    ],
    ids=str,
)
def test_supported_blocks(changes):
    shape = replace(SHAPE, **changes)
    assert why_invalid(TILE, shape, H200) is None
    assert why_none(shape, H200) is None


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"pixels": 32}, "pixels=32 is not one of 64, 128"),
        ({"hidden": 48}, "hidden=48 is not one of 16, 32, 64"),
        ({"partitions": 3}, "partitions=3 is not one of 1, 2"),
        ({"warp_products": 2}, "warp_products=2 is not one of 0, 1"),
        ({"bulk_loads": 2}, "bulk_loads=2 is not one of 0, 1"),
        ({"stages": 2}, "2 pairs of rows are too few, 3 are needed"),
        ({"stages": 1, "bulk_loads": 0}, "1 pairs of rows are too few, 2 are needed"),
    ],
)
def test_malformed_tiles(changes, message):
    tile = replace(TILE, **changes)
    assert why_malformed(tile).startswith(message)
    assert why_invalid(tile, SHAPE, H200) == why_malformed(tile)
    assert why_malformed(TILE) is None


@pytest.mark.parametrize("processor", PROCESSORS.values(), ids=lambda processor: processor.name)
def test_only_compute_capability_9_0_will_do(processor):
    reason = why_invalid(TILE, SHAPE, processor)
    if processor.name in ("h100", "h200"):
        assert reason is None
    else:
        major, minor = processor.compute_capability
        assert reason == f"it is for compute capability 9.0, {processor.name} has {major}.{minor}"
        assert why_none(SHAPE, processor) == reason


def test_more_rows_than_the_kernel_counts():
    assert "128 images of 9000000x1 pixels are too many rows" in why_invalid(
        TILE, replace(block(8, 8), height=9_000_000, width=1), H200
    )
    few_processors = replace(H200, processors=1)
    assert "pixels are too many rows" in why_invalid(
        TILE, replace(block(8, 8), height=50_000, width=64), few_processors
    )


def test_local_memory_by_hand():
    """Two bytes a value: 96 x 16 a group, expand, project, biases; then rows, margins, barriers and scratch."""
    weights = 2 * (8 * 96 * 16 + 384 * (64 + 64) + 384 + 64)
    assert weight_bytes(TILE, SHAPE) == weights
    ring = 2 * (3 * 2 * 64 * 64 + 16 * 8) + 3 * 8 + 4864
    assert local_memory_bytes(TILE, SHAPE, H200) == weights + 2 * ring
    assert local_memory_bytes(replace(TILE, partitions=1), SHAPE, H200) == weights + ring
    assert local_memory_bytes(replace(TILE, partitions=1, bulk_loads=0), SHAPE, H200) == weights + ring - 3 * 8
    # 72 channels are slabs of 64 + 16, 40 are 32 + 16, and 77 hidden channels two steps of 64; the groups stay 9.
    odd = replace(SHAPE, in_channels=72, hidden_channels=77, out_channels=40, residual=False)
    assert weight_bytes(TILE, odd) == 2 * (9 * 96 * 16 + 128 * (80 + 48) + 128 + 48)


def test_weights_that_do_not_fit():
    assert why_invalid(TILE, SHAPE, H200) is None
    assert why_invalid(replace(TILE, stages=4), SHAPE, H200) == (
        "weights of 121 KB and rows of 138 KB do not fit the 227 KB of local memory that h200 has"
    )
    assert why_none(block(96, 576), H200) == (
        "weights of 253 KB and rows of 53 KB do not fit the 227 KB of local memory that h200 has"
    )


@pytest.mark.parametrize(
    "channels, pixels, hidden, registers, programs",
    [(64, 64, 64, 232, 2), (32, 64, 64, 184, 2), (32, 64, 32, 136, 3), (32, 128, 32, 160, 3), (16, 128, 16, 112, 4)],
)
def test_registers_and_programs(channels, pixels, hidden, registers, programs):
    """65536 registers for 128 threads a program; two partitions take all of them."""
    tile, shape = HopperTile(pixels, hidden, 3, 1, 5, 0, 1), block(channels, 48)
    assert estimated_registers(tile, shape) == registers
    assert programs_per_processor(tile, shape, H200) == programs
    assert programs_per_processor(replace(tile, programs=1), shape, H200) == 1
    assert programs_per_processor(replace(tile, partitions=2), shape, H200) == 1


def test_programs_share_the_local_memory():
    """228 KB, of which every program takes 1 KB more than it may use."""
    tile, shape = HopperTile(128, 32, 3, 1, 5, 0, 1), block(32, 96)
    assert local_memory_bytes(tile, shape, H200) == 76568
    assert programs_in_local_memory(tile, shape, H200) == 228 * 1024 // (76568 + 1024) == 3
    assert programs_in_local_memory(replace(tile, stages=4), shape, H200) == 2
    assert programs_per_processor(replace(tile, stages=4), shape, H200) == 2


def test_tiles_that_would_spill_too_much():
    shape = replace(SHAPE, in_channels=8, hidden_channels=64, out_channels=512, residual=False)
    assert why_invalid(TILE, shape, H200) == "about 656 registers a thread would spill, 255 are available"
    assert why_invalid(TILE, replace(shape, out_channels=256), H200) is None

from dataclasses import FrozenInstanceError, fields, replace
from math import ceil

import pytest

from fusion.planner.hopper_tile import (
    PARTITION_BYTES,
    HopperTile,
    HopperWork,
    available_registers,
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

TILE = HopperTile(pixels=64, hidden=64, stages=2, partitions=2, programs=1, slab=64, weight_chunks=0)
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
    tile = HopperTile(128, 16, 4, 1, 3, 32, 0)
    assert eval(repr(tile)) == tile
    assert tile.to_ints() == [128, 16, 4, 1, 3, 32, 0]
    assert HopperTile(*tile.to_ints()) == tile


@pytest.mark.parametrize("field", [field.name for field in fields(HopperTile)])
@pytest.mark.parametrize("value", [-16, 16.0, "16"])
def test_tile_fields_are_integers(field, value):
    with pytest.raises(ValueError, match=f"HopperTile: {field} must be an integer of . or more, got {value!r}"):
        replace(TILE, **{field: value})


def test_only_the_chunks_may_be_none():
    assert TILE.weight_chunks == 0
    for field in ("pixels", "hidden", "stages", "partitions", "programs", "slab"):
        with pytest.raises(ValueError, match=f"{field} must be an integer of 1 or more, got 0"):
            replace(TILE, **{field: 0})


def test_chunks_by_hand():
    """Matrices of a step, rounded up to 512 elements each."""
    assert TILE.chunk_shapes(72, 40) == ((64, 64), (16, 64), (64, 32), (64, 16))
    assert TILE.chunk_elements(72, 40) == 64 * (64 + 16 + 32 + 16)
    assert replace(TILE, hidden=16).chunk_elements(72, 40) == 1024 + 512 + 512 + 512


@pytest.mark.parametrize(
    "out_channels, slab, unit", [(64, 64, 32), (64, 16, 16), (48, 64, 16), (8, 32, 16), (96, 32, 32)]
)
def test_unit_of_output_channels(out_channels, slab, unit):
    assert replace(TILE, slab=slab).unit(out_channels) == unit


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
        (128, 7, 8, 16, 1),
        (128, 9, 8, 16, 1),
        (128, 17, 4, 32, 1),
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
        (TILE, (128, 64, 64), HopperWork(rows=128 * 65, jobs=16, grid=130, images=128, streams=1)),
        # Two streams of 64 images, and of 4 and 3 of 7 images: the second starts with the first one's last.
        (TILE, (128, 32, 32), HopperWork(rows=64 * 33, jobs=4, grid=132, images=64, streams=2)),
        (TILE, (7, 20, 32), HopperWork(rows=4 * 21, jobs=1, grid=21, images=3, streams=2)),
        # Of five images as many streams, though there is room for eight.
        (TILE, (5, 6, 8), HopperWork(rows=7, jobs=1, grid=2, images=1, streams=5)),
        (
            HopperTile(128, 16, 3, 1, 3, 16, 0),
            (128, 128, 128),
            HopperWork(rows=128 * 129, jobs=21, grid=394, images=128, streams=1),
        ),
        (HopperTile(64, 16, 3, 1, 1, 16, 0), (1, 1, 1), HopperWork(rows=2, jobs=1, grid=1, images=1, streams=1)),
        # 132 programs make 44 runs of three strips: 8256 rows in runs of 2 * 94, of which 44 are needed.
        (
            HopperTile(64, 16, 3, 1, 1, 16, 0),
            (64, 128, 128),
            HopperWork(rows=64 * 129, jobs=94, grid=132, images=64, streams=1),
        ),
    ],
)
def test_work_by_hand(tile, image, work):
    assert tile.work(*image, processors=132) == work


@pytest.mark.parametrize("batch", [1, 2, 3, 7, 8, 9, 15, 100])
@pytest.mark.parametrize("width", [1, 8, 9, 30, 64, 100])
@pytest.mark.parametrize("pixels", [64, 128])
def test_streams_have_every_image(pixels, width, batch):
    """The first has its own, each other one those after the last of the stream before: what the kernel stores."""
    tile = replace(TILE, pixels=pixels)
    work = tile.work(batch, 5, width, processors=7)
    length = work.rows // 6
    assert work.streams <= min(batch, tile.streams(width)) and work.streams * tile.tile_width(width) <= pixels
    stored = list(range(length))
    for stream in range(1, work.streams):
        stored += [stream * work.images + image for image in range(length - work.images, length)]
    assert stored == list(range(batch))


@pytest.mark.parametrize("image", [(1, 1, 1), (1, 7, 5), (3, 19, 23), (128, 64, 64), (7, 33, 130), (5, 100, 1001)])
@pytest.mark.parametrize("processors", [1, 7, 132])
@pytest.mark.parametrize(
    "tile", [TILE, HopperTile(128, 16, 3, 1, 5, 16, 0), HopperTile(64, 16, 4, 1, 1, 16, 0)], ids=str
)
def test_programs_compute_all_rows_and_none_is_idle(tile, processors, image):
    work, strips = tile.work(*image, processors), tile.strips(image[2])
    runs = ceil(work.rows / (2 * work.jobs))
    assert (work.grid - 1) * tile.partitions < runs * strips <= work.grid * tile.partitions
    most_runs = max(1, processors * tile.programs * tile.partitions // strips)
    assert runs <= most_runs
    if work.jobs > 1:
        assert ceil(work.rows / (2 * (work.jobs - 1))) > most_runs


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


STREAMED = HopperTile(64, 32, 2, 2, 1, 16, 3)


@pytest.mark.parametrize(
    "tile, message",
    [
        (replace(TILE, pixels=32), "pixels=32 is not one of 64, 128"),
        (replace(TILE, hidden=48), "hidden=48 is not one of 16, 32, 64"),
        (replace(TILE, stages=1), "stages=1 is not one of 2, 3, 4"),
        (replace(TILE, stages=5), "stages=5 is not one of 2, 3, 4"),
        (replace(TILE, partitions=3), "partitions=3 is not one of 1, 2"),
        (replace(TILE, slab=8), "slab=8 is not one of 16, 32, 64"),
        (replace(TILE, programs=2), "2 partitions take all registers of a processor, use programs=1, not 2"),
        (
            replace(STREAMED, partitions=1),
            "weight_chunks=3 does not go with partitions=1, use partitions=2, or weight_",
        ),
        (replace(STREAMED, hidden=16), "weight_chunks=3 does not go with hidden=16, use hidden=32 or 64"),
        (replace(STREAMED, pixels=128), "weight_chunks=3 does not go with pixels=128, use pixels=64"),
        (
            replace(STREAMED, weight_chunks=1),
            "weight_chunks=1 does not go with 12 steps over the hidden channels, use 2 to 12, or 0 for weights that",
        ),
        (replace(STREAMED, weight_chunks=13), "weight_chunks=13 does not go with 12 steps"),
    ],
)
def test_malformed_tiles(tile, message):
    assert why_malformed(tile, SHAPE.hidden_channels).startswith(message)
    assert why_invalid(tile, SHAPE, H200) == why_malformed(tile, SHAPE.hidden_channels)


@pytest.mark.parametrize("tile", [TILE, STREAMED, replace(STREAMED, hidden=64), replace(STREAMED, weight_chunks=12)])
def test_well_formed_tiles(tile):
    assert why_malformed(tile, SHAPE.hidden_channels) is None


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
    assert "128 images of 8000000x33 pixels are too many rows" in why_invalid(
        TILE, replace(block(8, 8), height=8_000_000, width=33), H200
    )
    few_processors = replace(H200, processors=1)
    many_rows = replace(block(8, 8), height=50_000, width=64)
    assert why_invalid(TILE, many_rows, H200) is None
    assert "pixels are too many rows" in why_invalid(TILE, many_rows, few_processors)


def test_local_memory_by_hand():
    """Two bytes a value: nine taps of each piece, expand, project, biases; then rows with zeros between, barriers."""
    weights = 2 * (4 * 9 * 16 * 16 + 384 * (64 + 64) + 384 + 64)
    assert weight_bytes(TILE, SHAPE) == weights
    ring = 2 * (2 * 2 * (8 + 64) + 8) * 64 + 2 * 8
    assert local_memory_bytes(TILE, SHAPE, H200) == weights + 2 * ring + 8 + PARTITION_BYTES
    assert local_memory_bytes(replace(TILE, partitions=1), SHAPE, H200) == weights + ring + 8
    # Two chunks of the six, and two barriers for each.
    streamed = replace(TILE, weight_chunks=2)
    assert weight_bytes(streamed, SHAPE) == weights - 2 * 4 * 64 * (64 + 64)
    rows = local_memory_bytes(streamed, SHAPE, H200) - weight_bytes(streamed, SHAPE)
    assert rows == 2 * ring + 4 * 8 + PARTITION_BYTES
    # 72 channels are slabs of 64 + 16, 40 are 32 + 16, and 77 hidden channels two steps of 64; pieces of two groups.
    odd = replace(SHAPE, in_channels=72, hidden_channels=77, out_channels=40, residual=False)
    assert weight_bytes(TILE, odd) == 2 * (5 * 9 * 16 * 16 + 128 * (80 + 48) + 128 + 48)


@pytest.mark.parametrize(
    "channels, alpha, width, tile, shared",
    [
        (16, 3, 128, (64, 16, 2, 1, 1, 16, 0), 21144),
        (16, 3, 128, (128, 16, 3, 1, 1, 16, 0), 37544),
        (16, 3, 128, (128, 64, 2, 1, 1, 16, 0), 26808),
        (24, 3, 128, (128, 32, 2, 1, 1, 16, 0), 57624),
        (32, 3, 128, (128, 32, 3, 1, 1, 32, 0), 75048),
        (32, 6, 64, (64, 64, 3, 1, 1, 32, 0), 62952),
        (40, 3, 32, (64, 32, 2, 1, 1, 64, 0), 76664),
        (48, 6, 64, (64, 64, 2, 1, 1, 64, 0), 113912),
        (72, 6, 32, (64, 32, 2, 1, 1, 16, 0), 214840),
        (48, 6, 64, (64, 32, 2, 2, 1, 64, 0), 145772),
        (64, 6, 64, (64, 64, 2, 2, 1, 64, 3), 144532),
        (96, 6, 32, (64, 32, 2, 2, 1, 32, 6), 216740),
    ],
)
def test_local_memory_is_what_the_compiler_takes(channels, alpha, width, tile, shared):
    """The compiler places the largest buffers first, each at a multiple of the pattern of its swizzle."""
    tile, shape = HopperTile(*tile), replace(block(channels, alpha * channels), width=width)
    assert 0 <= local_memory_bytes(tile, shape, H200) - shared <= (tile.partitions - 1) * PARTITION_BYTES


@pytest.mark.parametrize(
    "channels, slab, padded", [(72, 64, 128), (72, 32, 96), (72, 16, 80), (64, 64, 64), (8, 64, 64)]
)
def test_slabs_of_the_ring_are_padded(channels, slab, padded):
    tile, shape = replace(TILE, slab=slab, partitions=1, hidden=64), block(channels, 384)
    rows = local_memory_bytes(tile, shape, H200) - weight_bytes(tile, shape)
    assert 0 <= rows - (2 * (2 * 2 * (8 + 64) + 8) * padded + 3 * 8) < 1024


def test_weights_that_do_not_fit():
    """They are streamed, unless not even the rows fit."""
    assert why_invalid(TILE, SHAPE, H200) is None
    assert why_invalid(replace(TILE, stages=4), SHAPE, H200) == (
        "weights of 115 KB and rows of 146 KB do not fit the 227 KB of local memory that h200 has"
    )
    assert why_invalid(replace(TILE, stages=4, weight_chunks=3), SHAPE, H200) is None
    assert why_none(block(96, 576), H200) is None
    assert why_invalid(HopperTile(64, 32, 2, 1, 1, 32, 0), block(96, 576), H200).startswith("weights of 244 KB and ")
    assert why_none(block(144, 576), H200) == (
        "weights of 78 KB and rows of 167 KB do not fit the 227 KB of local memory that h200 has"
    )


COMPILED = [
    (16, 16, 128, 74),
    (16, 64, 128, 105),
    (32, 16, 64, 98),
    (32, 32, 64, 122),
    (32, 64, 64, 170),
    (48, 32, 64, 146),
    (48, 64, 64, 196),
    (64, 16, 37, 154),
    (64, 64, 64, 218),
    (72, 32, 32, 200),
    (96, 32, 32, 222),
    (112, 16, 32, 254),
]


@pytest.mark.parametrize("channels, hidden, width, registers", COMPILED)
def test_registers_are_estimated_as_the_compiler_needs_them(channels, hidden, width, registers):
    """One partition, without a limit; the blocks have three or six times as many hidden channels."""
    shape = replace(block(channels, (3 if channels == 16 else 6) * channels), width=width)
    tile = HopperTile(64, hidden, 2, 1, 1, 16, 0)
    assert estimated_registers(tile, shape) == pytest.approx(registers, rel=0.13)


@pytest.mark.parametrize(
    "partitions, programs, limit, available",
    [(1, 1, None, 255), (1, 2, None, 255), (1, 3, 168, 168), (1, 4, 128, 128), (1, 6, 80, 80), (2, 1, None, 240)],
)
def test_programs_divide_the_registers(partitions, programs, limit, available):
    tile = replace(TILE, partitions=partitions, programs=programs)
    assert (tile.register_limit, available_registers(tile)) == (limit, available)


def test_programs_share_the_local_memory():
    """228 KB, of which every program takes 1 KB more than it may use."""
    tile, shape = HopperTile(128, 32, 3, 1, 4, 32, 0), block(32, 96)
    assert local_memory_bytes(tile, shape, H200) == 75048
    assert programs_in_local_memory(tile, shape, H200) == 228 * 1024 // (75048 + 1024) == 3
    assert programs_per_processor(tile, shape, H200) == 3
    assert programs_per_processor(replace(tile, programs=2), shape, H200) == 2
    assert programs_in_local_memory(replace(tile, pixels=64), shape, H200) == 4


def test_tiles_that_would_spill():
    wide = replace(SHAPE, in_channels=8, hidden_channels=64, out_channels=512, residual=False)
    assert why_invalid(TILE, wide, H200) == "about 610 registers a thread would spill, 240 are available"
    assert why_invalid(TILE, replace(wide, out_channels=128), H200) is None
    three = HopperTile(64, 64, 2, 1, 3, 32, 0)
    assert why_invalid(three, block(32, 192), H200) == (
        "about 170 registers a thread would spill, 168 are available to each of 3 programs"
    )
    assert why_invalid(replace(three, programs=2), block(32, 192), H200) is None
    assert why_invalid(replace(three, hidden=32), block(32, 192), H200) is None

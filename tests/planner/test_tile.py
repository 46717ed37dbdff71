from dataclasses import FrozenInstanceError, replace

import pytest

from fusion.planner.match import ConvFirstShape
from fusion.planner.processor import PROCESSORS
from fusion.planner.tile import (
    ConvFirstTile,
    candidate_tiles,
    estimated_registers,
    local_memory_bytes,
    predicted_us,
    programs_per_processor,
    tensor_memory_columns,
    why_invalid,
    why_unsupported,
)

TILE = ConvFirstTile(8, 16, 64, 64, 4)
SHAPE = ConvFirstShape(128, 64, 64, 64, 384, 64, 8, "relu", True, "float16")
H200 = PROCESSORS["h200"]


def block(channels, expansion, size):
    return replace(
        SHAPE,
        height=size,
        width=size,
        in_channels=channels,
        hidden_channels=expansion * channels,
        out_channels=channels,
    )


def test_tile_by_hand():
    assert TILE.pixels == 128
    assert TILE.in_slabs(72) == (64, 16)
    assert TILE.out_slabs(200) == (128, 64, 16)
    assert [TILE.padded_hidden(hidden) for hidden in (1, 64, 65, 129)] == [128, 128, 128, 192]
    assert TILE.programs(3, 8, 16) == 3
    assert TILE.programs(3, 9, 17) == 3 * 4
    with pytest.raises(FrozenInstanceError):
        TILE.height = 4


def test_tile_survives_text_and_integers():
    tile = ConvFirstTile(4, 32, 16, 32, 2, 5, 1)
    assert eval(repr(tile)) == tile
    assert tile.to_ints() == [4, 32, 16, 32, 2, 5, 1]
    assert ConvFirstTile(*tile.to_ints()) == tile


@pytest.mark.parametrize("field", ["height", "width", "hidden", "conv_slab", "warps", "conv_stages", "ffn_stages"])
@pytest.mark.parametrize("value", [0, -16, 16.0, "16"])
def test_tile_fields_are_positive_integers(field, value):
    with pytest.raises(ValueError, match=f"{field} must be a positive integer, got {value!r}"):
        replace(TILE, **{field: value})


UNSUPPORTED = [
    ({"dtype": "float32"}, "dtype float32 is not supported, use one of float16, bfloat16"),
    ({"kernel_size": 5}, "kernel size 5 is not supported, use 3"),
    ({"in_channels": 60}, "in_channels=60 is not supported, use a multiple of 8"),
    ({"out_channels": 4}, "out_channels=4 is not supported, use a multiple of 8"),
    ({"in_channels": 48, "group_width": 24}, "group width 24 is not supported, use a power of two up to 64"),
    ({"in_channels": 128, "group_width": 128}, "group width 128 is not supported"),
    ({"height": 8192, "width": 4096}, "images of 8192x4096 pixels are too large, split them"),
]


@pytest.mark.parametrize("changes, message", UNSUPPORTED)
def test_unsupported_blocks(changes, message):
    shape = replace(SHAPE, **changes)
    assert why_unsupported(shape).startswith(message)
    assert why_invalid(TILE, shape, H200) == why_unsupported(shape)
    assert list(candidate_tiles(shape, H200)) == []


@pytest.mark.parametrize("changes", [{}, {"dtype": "bfloat16"}, {"height": 8191, "width": 4096}, {"out_channels": 8}])
def test_supported_blocks(changes):
    assert why_unsupported(replace(SHAPE, **changes)) is None


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"height": 6}, "height=6 is not a power of two"),
        ({"width": 12}, "width=12 is not a power of two"),
        ({"hidden": 48}, "hidden=48 is not a power of two"),
        ({"conv_slab": 96}, "conv_slab=96 is not a power of two"),
        ({"warps": 3}, "warps=3 is not a power of two"),
        ({"height": 2, "width": 4, "warps": 1}, "at least 16 pixels"),
        ({"hidden": 8}, "16 hidden channels"),
        ({"conv_slab": 8}, "slabs of 16 channels"),
        ({"height": 32, "warps": 32}, "32 warps are more than a program may have, 16"),
        ({"warps": 16, "height": 4}, "16 warps are too many for 64 pixels"),
        ({"conv_stages": 9}, "221184 bytes of local memory are more than rtx4090 has, 101376"),
        ({"ffn_stages": 1}, "loops must be pipelined, in 2 stages at least"),
        ({"warps": 2}, "about 424 registers a thread would spill, 255 are available"),
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
    """Two bytes a value: three stages of pixels and weights of a tap, or of a step's expand and project matrices."""
    assert local_memory_bytes(TILE, SHAPE, H200) == 2 * 3 * 64 * (128 + 64)
    assert local_memory_bytes(replace(TILE, conv_stages=1), SHAPE, H200) == 2 * 3 * 64 * (64 + 64)
    assert estimated_registers(TILE, SHAPE) == 64 + 64 / 2 + 1.5 * 64 + 40
    assert programs_per_processor(TILE, SHAPE, H200) == 65536 // (232 * 128)
    assert programs_per_processor(replace(TILE, conv_stages=9), SHAPE, H200) == 1


def test_operands_where_warpgroups_share_rows():
    """64 pixels are the rows of one of Hopper's warpgroups: with two of them the convolution's result is in shared
    memory, for which 256 channels in steps of 64 leave no room with pipelines of four stages."""
    one, two, h100 = ConvFirstTile(8, 8, 64, 64, 4), ConvFirstTile(8, 8, 64, 64, 8), PROCESSORS["h100"]
    for processor in (H200, h100):
        assert local_memory_bytes(two, SHAPE, processor) == local_memory_bytes(one, SHAPE, processor) + 2 * 64 * 64
    for tile, processor in ((replace(two, height=16), H200), (replace(two, height=4), H200), (two, PROCESSORS["a100"])):
        assert local_memory_bytes(tile, SHAPE, processor) == local_memory_bytes(
            replace(tile, warps=4), SHAPE, processor
        )
    wide = block(208, 2, 14)
    assert why_invalid(replace(one, ffn_stages=4), wide, H200) is None
    assert "bytes of local memory are more than" in why_invalid(replace(two, ffn_stages=4), wide, H200)


def test_tensor_memory():
    """Where sums are in tensor memory, operands are in shared memory. 704 columns were asked for by the wide tile."""
    b200, wide = PROCESSORS["b200"], ConvFirstTile(16, 16, 64, 16, 8)
    assert local_memory_bytes(TILE, SHAPE, b200) == local_memory_bytes(TILE, SHAPE, H200) + 2 * 128 * (64 + 64)
    assert tensor_memory_columns(TILE, SHAPE, b200) == 64 + 64 + 64
    assert tensor_memory_columns(TILE, SHAPE, H200) == 0
    assert why_invalid(wide, SHAPE, H200) is None
    assert "columns of tensor memory are more than there are, 512" in why_invalid(wide, SHAPE, b200)


@pytest.mark.parametrize("processor", PROCESSORS.values(), ids=lambda processor: processor.name)
@pytest.mark.parametrize("shape", [SHAPE, replace(block(48, 6, 32), group_width=16), block(16, 3, 128)], ids=str)
def test_candidates_are_valid_and_differ(shape, processor):
    tiles = list(candidate_tiles(shape, processor))
    assert len(tiles) > 100
    assert all(why_invalid(tile, shape, processor) is None for tile in tiles)
    powers = [(tile.height, tile.width, tile.hidden, tile.conv_slab, tile.warps) for tile in tiles]
    assert all(size & (size - 1) == 0 for sizes in powers for size in sizes)
    layouts = {(replace(tile, conv_slab=16), tile.in_slabs(shape.in_channels)) for tile in tiles}
    assert len(layouts) == len(tiles), "no two candidates are the same kernel"


MEASURED_ON_AN_H200 = [
    ((64, 6, 64), (8, 16, 64, 64, 4, 3, 3), 208),
    ((32, 3, 128), (8, 16, 32, 32, 4, 4, 2), 272),
    ((32, 6, 64), (8, 16, 32, 32, 4, 3, 3), 86.6),
    ((96, 6, 32), (8, 16, 32, 64, 4, 3, 3), 97),
    ((16, 3, 128), (8, 16, 16, 16, 2, 4, 2), 118),
]


@pytest.mark.parametrize("sizes, tile, measured_us", MEASURED_ON_AN_H200)
def test_predictions_against_measurements(sizes, tile, measured_us):
    """Batch 128 in fp16, in microseconds."""
    assert predicted_us(ConvFirstTile(*tile), block(*sizes), H200) == pytest.approx(measured_us, rel=0.25)


def test_a_convolution_of_stride_2_has_tiles_of_the_output():
    strided = replace(SHAPE, residual=False, stride=2)
    assert (strided.out_height, strided.out_width) == (32, 32)
    half = replace(strided, height=32, width=32, stride=1)
    for resource in (local_memory_bytes, tensor_memory_columns, programs_per_processor, why_invalid):
        assert resource(TILE, strided, H200) == resource(TILE, half, H200)
    assert estimated_registers(TILE, strided) == estimated_registers(TILE, half)
    assert predicted_us(TILE, strided, H200) == predicted_us(TILE, half, H200)
    odd = replace(strided, height=63, width=63)
    assert predicted_us(TILE, odd, H200) == predicted_us(TILE, strided, H200)


def test_predictions_grow_with_the_work():
    us = predicted_us(TILE, SHAPE, H200)
    assert predicted_us(TILE, replace(SHAPE, batch=256), H200) == pytest.approx(2 * us, rel=0.1)
    assert predicted_us(TILE, replace(SHAPE, hidden_channels=768), H200) > 1.2 * us
    assert predicted_us(replace(TILE, hidden=256), replace(SHAPE, hidden_channels=257), H200) > us
    assert predicted_us(TILE, SHAPE, PROCESSORS["a5000"]) > 2 * us


def test_small_tiles_pay_for_weights_and_lone_warps_for_their_steps():
    """Measured on an H200 with 32, 3, 128: 301 us with 128 pixels, 401 with 64, 665 with 32, which is predicted to take
    less; with 16, 3, 128: 115 with two warps, 133 with one."""
    shape, tile = block(32, 3, 128), ConvFirstTile(16, 16, 16, 32, 2)
    us = [predicted_us(replace(tile, height=height, width=8, warps=1), shape, H200) for height in (16, 8, 4)]
    assert us == sorted(us) and us[-1] > 1.3 * us[0]
    slow = replace(H200, global_bandwidth=H200.global_bandwidth / 2)
    assert predicted_us(tile, shape, slow) > 1.5 * predicted_us(tile, shape, H200)
    lone = ConvFirstTile(8, 16, 16, 16, 1)
    assert predicted_us(lone, block(16, 3, 128), H200) > predicted_us(replace(lone, warps=2), block(16, 3, 128), H200)


def test_products_of_single_warps_are_slow_where_the_peak_is_that_of_warpgroups():
    """On an A100 they are all that there is."""
    shape, warpgroup = replace(SHAPE, hidden_channels=4096), ConvFirstTile(8, 16, 32, 64, 4)
    warps = replace(warpgroup, warps=2)
    assert predicted_us(warps, shape, H200) > 1.3 * predicted_us(warpgroup, shape, H200)
    a100 = PROCESSORS["a100"]
    assert predicted_us(warps, shape, a100) < 1.3 * predicted_us(warpgroup, shape, a100)


def test_pixels_that_straddle_sectors_take_longer():
    """24 channels are 48 bytes; they took 353 us on an H200 where 32 channels took 272."""
    tile = ConvFirstTile(16, 16, 16, 32, 2)
    assert predicted_us(tile, block(24, 3, 128), H200) > 1.2 * predicted_us(tile, block(32, 3, 128), H200)


def test_one_program_leaves_a_processor_idle_at_times():
    """As many pixels a thread: 203 us with two programs of 128 pixels on an H200, 249 with one of 256."""
    two, one = ConvFirstTile(8, 16, 64, 64, 4), ConvFirstTile(16, 16, 64, 64, 8)
    assert programs_per_processor(two, SHAPE, H200) == 2 and programs_per_processor(one, SHAPE, H200) == 1
    assert predicted_us(one, SHAPE, H200) > predicted_us(two, SHAPE, H200)

from dataclasses import replace

import pytest

from fusion.planner.blocks import convfirst
from fusion.planner.hopper_tile import HopperTile, programs_in_local_memory, why_invalid
from fusion.planner.hopper_time import candidate_tiles, predicted_us
from fusion.planner.match import match_convfirst
from fusion.planner.processor import PROCESSORS

H200 = PROCESSORS["h200"]


def block(channels, expansion, size, batch=128):
    return match_convfirst(convfirst(batch, size, size, channels, expansion))


MEASURED_ON_AN_H200 = [
    ((16, 3, 128), (128, 16, 3, 1, 3, 16, 0), 53.3),
    ((16, 3, 128), (128, 16, 3, 1, 2, 16, 0), 58.0),
    ((16, 3, 128), (128, 16, 2, 1, 6, 16, 0), 54.7),
    ((16, 3, 128), (128, 64, 2, 1, 4, 16, 0), 56.6),
    ((24, 3, 128), (128, 16, 2, 1, 4, 32, 0), 100.1),
    ((24, 3, 128), (128, 32, 2, 1, 3, 32, 0), 104.5),
    ((32, 3, 128), (128, 32, 3, 1, 3, 32, 0), 97.6),
    ((32, 3, 128), (128, 32, 2, 1, 3, 32, 0), 102.2),
    ((32, 6, 64), (64, 32, 2, 1, 4, 32, 0), 34.5),
    ((32, 6, 64), (64, 64, 3, 1, 2, 32, 0), 36.2),
    ((32, 6, 64), (64, 32, 3, 1, 3, 32, 0), 36.4),
    ((32, 6, 64), (64, 16, 2, 1, 4, 32, 0), 39.8),
    ((48, 6, 64), (64, 32, 2, 1, 2, 64, 0), 70.9),
    ((48, 6, 64), (64, 64, 2, 1, 2, 64, 0), 71.1),
    ((48, 6, 64), (64, 32, 2, 1, 2, 16, 0), 72.9),
    ((48, 6, 64), (64, 32, 2, 2, 1, 64, 0), 75.9),
    ((64, 6, 64), (64, 64, 2, 2, 1, 64, 0), 93.0),
    ((48, 6, 32), (64, 32, 2, 1, 2, 16, 0), 21.05),
    ((64, 6, 32), (64, 64, 2, 2, 1, 64, 0), 26.5),
    ((72, 6, 32), (64, 32, 2, 1, 1, 16, 0), 53.5),
]


@pytest.mark.parametrize("sizes, tile, measured_us", MEASURED_ON_AN_H200)
def test_predictions_against_measurements(sizes, tile, measured_us):
    """Batch 128 in fp16, in microseconds."""
    tile, shape = HopperTile(*tile), block(*sizes)
    assert why_invalid(tile, shape, H200) is None
    assert predicted_us(tile, shape, H200) == pytest.approx(measured_us, rel=0.2)


def test_streamed_weights_take_their_time_through_l2():
    streamed, shape = HopperTile(64, 32, 2, 2, 1, 32, 6), block(96, 6, 32)
    us = predicted_us(streamed, shape, H200)
    slow = replace(H200, global_bandwidth=H200.global_bandwidth / 20)
    assert predicted_us(streamed, shape, slow) > 2 * us
    stays = replace(streamed, weight_chunks=0)
    assert predicted_us(stays, shape, slow) == predicted_us(stays, shape, H200)


def test_predictions_grow_with_the_work():
    tile, shape = HopperTile(64, 64, 2, 2, 1, 64, 0), block(64, 6, 64)
    us = predicted_us(tile, shape, H200)
    assert predicted_us(tile, replace(shape, batch=256), H200) == pytest.approx(2 * us, rel=0.1)
    assert predicted_us(tile, replace(shape, hidden_channels=192), H200) < 0.85 * us
    assert predicted_us(tile, shape, replace(H200, processors=66, peak_ops=H200.peak_ops / 2)) > 1.9 * us


@pytest.mark.parametrize("sizes", [(8, 1, 256), (16, 3, 128), (64, 6, 64), (96, 6, 32)])
@pytest.mark.parametrize("processor", ["h100", "h200"])
def test_no_prediction_beats_tensor_cores_or_dram(sizes, processor):
    shape, processor = block(*sizes), PROCESSORS[processor]
    pixels = shape.batch * shape.height * shape.width
    ops = 2 * pixels * (72 * shape.in_channels + 2 * shape.in_channels * shape.hidden_channels)
    limit_us = 1e6 * max(ops / processor.peak_ops, 4 * pixels * shape.in_channels / processor.bandwidth)
    tiles = list(candidate_tiles(shape, processor))
    assert tiles
    assert all(predicted_us(tile, shape, processor) > limit_us for tile in tiles)


@pytest.mark.parametrize(
    "sizes", [(16, 3, 128), (24, 3, 128), (40, 3, 32), (48, 6, 32), (64, 6, 64), (72, 3, 32), (96, 6, 32), (8, 1, 1)]
)
def test_candidates_are_valid_few_and_differ(sizes):
    shape = block(*sizes)
    tiles = list(candidate_tiles(shape, H200))
    assert 0 < len(tiles) < 80
    assert len(set(tiles)) == len(tiles)
    for tile in tiles:
        assert why_invalid(tile, shape, H200) is None
        assert tile.programs <= programs_in_local_memory(tile, shape, H200)


def test_candidates_have_work_for_all_of_their_programs():
    """One small image has no rows for a second program on a processor, a large batch has."""
    assert {tile.programs for tile in candidate_tiles(block(16, 3, 32, batch=1), H200)} == {1}
    assert {tile.programs for tile in candidate_tiles(block(16, 3, 128), H200)} == {2, 3, 4, 6}


@pytest.mark.parametrize(
    "channels, slabs", [(8, {16}), (16, {16}), (24, {32}), (40, {16, 64}), (48, {16, 64}), (64, {64}), (96, {32, 64})]
)
def test_candidates_have_slabs_that_pad_little(channels, slabs):
    assert {tile.slab for tile in candidate_tiles(block(channels, 2, 32), H200)} == slabs


def test_weights_are_streamed_where_they_do_not_fit():
    """Every number of chunks from 3 on that divides the steps; where none does, the most that fit."""
    assert {tile.weight_chunks for tile in candidate_tiles(block(48, 6, 64), H200)} == {0}
    # 18 steps of 32 channels
    assert {tile.weight_chunks for tile in candidate_tiles(block(96, 6, 32), H200)} == {2, 3, 6}, (
        "two where no more fit"
    )
    # 14 steps of 32 channels, of which 7 have room with the slabs that pad least
    tiles = [tile for tile in candidate_tiles(block(72, 6, 32), H200) if tile.weight_chunks and tile.slab == 16]
    assert {tile.stages: tile.weight_chunks for tile in tiles if tile.hidden == 32}[2] == 7


@pytest.mark.parametrize("processor", ["a100", "b200", "rtx4090"])
def test_there_are_no_candidates_for_other_processors(processor):
    assert list(candidate_tiles(block(64, 6, 64), PROCESSORS[processor])) == []

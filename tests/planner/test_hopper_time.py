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
    ((64, 6, 64), (64, 64, 3, 2, 1, 0, 1), 99.6),
    ((64, 6, 32), (64, 64, 3, 2, 1, 0, 1), 29.6),
    ((48, 6, 64), (64, 32, 3, 1, 2, 0, 0), 69.6),
    ((48, 6, 32), (64, 32, 2, 1, 2, 0, 0), 20.3),
    ((32, 6, 64), (64, 64, 3, 1, 2, 0, 0), 39.0),
    ((32, 6, 64), (64, 32, 3, 1, 3, 0, 0), 40.7),
    ((32, 3, 128), (128, 32, 3, 1, 3, 0, 1), 104.8),
    ((16, 3, 128), (128, 16, 3, 1, 3, 1, 1), 50.7),
    ((16, 3, 128), (128, 16, 3, 1, 4, 0, 1), 55.3),
    ((24, 3, 128), (128, 32, 3, 1, 3, 0, 1), 91.5),
    ((72, 6, 32), (64, 32, 2, 1, 1, 0, 0), 42.6),
]


@pytest.mark.parametrize("sizes, tile, measured_us", MEASURED_ON_AN_H200)
def test_predictions_against_measurements(sizes, tile, measured_us):
    """Batch 128 in fp16, in microseconds; from bench/results/h200/convfirst_hopper_exploration.json."""
    assert predicted_us(HopperTile(*tile), block(*sizes), H200) == pytest.approx(measured_us, rel=0.3)


def test_predictions_grow_with_the_work():
    tile, shape = HopperTile(64, 64, 3, 2, 1, 0, 1), block(64, 6, 64)
    us = predicted_us(tile, shape, H200)
    assert predicted_us(tile, replace(shape, batch=256), H200) == pytest.approx(2 * us, rel=0.1)
    assert predicted_us(tile, replace(shape, hidden_channels=192), H200) < 0.85 * us
    assert predicted_us(tile, shape, replace(H200, processors=66, peak_ops=H200.peak_ops / 2)) > 1.9 * us


@pytest.mark.parametrize("sizes", [(8, 1, 256), (16, 3, 128), (64, 6, 64), (128, 1, 32)])
@pytest.mark.parametrize("processor", ["h100", "h200"])
def test_no_prediction_beats_tensor_cores_or_dram(sizes, processor):
    shape, processor = block(*sizes), PROCESSORS[processor]
    pixels = shape.batch * shape.height * shape.width
    ops = 2 * pixels * (72 * shape.in_channels + 2 * shape.in_channels * shape.hidden_channels)
    limit_us = 1e6 * max(ops / processor.peak_ops, 4 * pixels * shape.in_channels / processor.bandwidth)
    tiles = list(candidate_tiles(shape, processor))
    assert tiles
    assert all(predicted_us(tile, shape, processor) > limit_us for tile in tiles)


@pytest.mark.parametrize("sizes", [(16, 3, 128), (24, 3, 128), (48, 6, 32), (64, 6, 64), (72, 3, 32), (8, 1, 1)])
def test_candidates_are_valid_and_differ(sizes):
    shape = block(*sizes)
    tiles = list(candidate_tiles(shape, H200))
    assert len(set(tiles)) == len(tiles) > 0
    for tile in tiles:
        assert why_invalid(tile, shape, H200) is None
        assert tile.programs <= programs_in_local_memory(tile, shape, H200)
        assert tile.partitions == 1 or tile.programs == 1
        assert shape.in_channels <= 32 or not tile.warp_products


def test_candidates_have_work_for_all_of_their_programs():
    """One small image has no rows for a second program on a processor, a large batch has."""
    assert {tile.programs for tile in candidate_tiles(block(16, 3, 32, batch=1), H200)} == {1}
    assert {tile.programs for tile in candidate_tiles(block(16, 3, 128), H200)} == {1, 2, 3, 4, 5}


@pytest.mark.parametrize("processor", ["a100", "b200", "rtx4090"])
def test_there_are_no_candidates_for_other_processors(processor):
    assert list(candidate_tiles(block(64, 6, 64), PROCESSORS[processor])) == []

from dataclasses import replace

import pytest

from fusion.planner.blocks import convfirst, ffn
from fusion.planner.families import FFN
from fusion.planner.ffn_tile import (
    BLOCK_PIXELS,
    PARTITIONS,
    FfnTile,
    candidate_tiles,
    local_memory_bytes,
    predicted_us,
    why_invalid,
    why_none,
)
from fusion.planner.hopper_tile import HopperTile
from fusion.planner.match import FfnShape, match_ffn
from fusion.planner.plan import PlanError, plan_block
from fusion.planner.processor import PROCESSORS

H200 = PROCESSORS["h200"]
TILE = FfnTile(blocks=2, hidden=64, stages=2, expand_chunks=4, project_chunks=4, x_in_registers=1)
MEASURED = [
    # (C, alpha, H = W), tile, microseconds on an H200 at batch 128
    ((64, 4, 64), (2, 64, 2, 4, 4, 1), 55.1),
    ((64, 6, 64), (2, 64, 2, 6, 6, 1), 75.3),
    ((64, 6, 64), (1, 64, 4, 6, 6, 1), 80.6),
    ((128, 4, 32), (2, 64, 2, 3, 3, 0), 53.6),
    ((128, 4, 32), (1, 64, 2, 4, 5, 0), 55.0),
    ((128, 4, 32), (1, 64, 2, 4, 5, 1), 52.8),
    ((256, 4, 16), (1, 64, 1, 2, 3, 0), 68.3),
    ((72, 4, 64), (2, 64, 2, 5, 5, 0), 97.1),
    ((32, 6, 64), (2, 64, 2, 3, 3, 1), 28.5),
]


def shape(channels, alpha, size, batch=128, **options):
    return match_ffn(ffn(batch, size, size, channels, alpha, **options))


def test_an_ffn_is_matched_by_its_structure():
    graph = ffn(2, 9, 7, 24, 3, out_channels=32, activation="silu", dtype="bfloat16")
    assert match_ffn(graph) == FfnShape(2, 9, 7, 24, 72, 32, "silu", False, "bfloat16")
    assert match_ffn(ffn(1, 8, 8, 16, 2)).residual
    assert match_ffn(ffn(1, 8, 8, 16, 2)).pixels == 64
    assert match_ffn(convfirst(1, 8, 8, 16, 2)) is None


@pytest.mark.parametrize("block, tile, us", MEASURED, ids=str)
def test_predictions_are_near_measurements(block, tile, us):
    tile = FfnTile(*tile)
    assert why_invalid(tile, shape(*block), H200) is None
    assert predicted_us(tile, shape(*block), H200) == pytest.approx(us, rel=0.13)


@pytest.mark.parametrize("block", [(64, 4, 64), (64, 6, 64), (128, 4, 32), (256, 4, 16)], ids=str)
def test_the_planner_takes_one_of_the_fastest_designs(block):
    plan = plan_block(ffn(128, block[2], block[2], *block[:2]))
    assert plan.family is FFN
    assert plan.tile.hidden == 64
    assert plan.limit_us / plan.predicted_us > 0.6
    assert plan.local_memory_bytes <= H200.local_memory_bytes
    assert "ffn_hopper" in str(plan) and repr(plan.tile) in str(plan)
    assert plan_block(ffn(128, block[2], block[2], *block[:2]), tile=plan.tile).tile == plan.tile


@pytest.mark.parametrize("pixels", [1, 255, 256, 257, 100_000, 524_288])
@pytest.mark.parametrize("blocks", [1, 2])
def test_every_pixel_has_a_tile_and_no_processor_two_programs(pixels, blocks):
    work = replace(TILE, blocks=blocks).work(pixels, 132)
    program = PARTITIONS * blocks * BLOCK_PIXELS
    assert work.grid <= 132
    assert (work.grid * work.tiles - work.tiles) * program < pixels <= work.grid * work.tiles * program


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"blocks": 3}, "blocks=3 is not one of 1, 2"),
        ({"hidden": 128}, "hidden=128 is not one of 16, 32, 64"),
        ({"x_in_registers": 2}, "x_in_registers=2 is not one of 0, 1"),
        (
            {"expand_chunks": 1},
            "1 and 4 chunks of weights do not go with 4 steps over 256 hidden channels; use 4 and 4",
        ),
        ({"expand_chunks": 5}, "5 and 4 chunks"),
        ({"project_chunks": 3}, "4 and 3 chunks"),
        ({"expand_chunks": 3, "project_chunks": 5}, "3 and 5 chunks"),
        ({"stages": 7}, "do not fit the 227 KB of local memory that h200 has"),
    ],
)
def test_invalid_tiles_have_a_reason(changes, reason):
    assert why_invalid(TILE, shape(64, 4, 64), H200) is None
    assert reason in why_invalid(replace(TILE, **changes), shape(64, 4, 64), H200)


@pytest.mark.parametrize("changes", [{"blocks": 0}, {"stages": -1}, {"hidden": 64.0}])
def test_tiles_are_checked(changes):
    with pytest.raises(ValueError, match=f"FfnTile: {next(iter(changes))} must be an integer of 1 or more"):
        replace(TILE, **changes)


def test_sums_that_do_not_fit_in_registers_are_refused():
    assert "registers a thread would spill" in why_none(shape(512, 4, 16), H200)
    assert not list(candidate_tiles(shape(512, 4, 16), H200))


@pytest.mark.parametrize("channels, alpha", [(8, 1), (24, 3), (64, 6), (96, 4), (128, 4), (144, 6), (256, 4)])
def test_candidates_are_valid_and_cover_blocks_of_any_width(channels, alpha):
    block = shape(channels, alpha, 7, batch=1)
    tiles = list(candidate_tiles(block, H200))
    assert tiles and len(set(tiles)) == len(tiles)
    for tile in tiles:
        assert why_invalid(tile, block, H200) is None
        assert local_memory_bytes(tile, block, H200) <= H200.local_memory_bytes


@pytest.mark.parametrize(
    "graph, options, message",
    [
        (
            ffn(1, 8, 8, 16, 2, activation="silu"),
            {},
            r"activation silu is not supported, use relu; run it layer by layer",
        ),
        (ffn(1, 8, 8, 12, 2), {}, "in_channels=12 is not supported, use a multiple of 8"),
        (ffn(1, 8, 8, 16, 2, dtype="float32"), {}, "dtype float32 is not supported, use one of float16"),
        (ffn(2**15, 256, 256, 16, 2), {}, "2147483648 pixels are too many for a launch, split the batch"),
        (
            ffn(1, 8, 8, 16, 2),
            {"processor": "a5000"},
            r"it is for compute capability 9.0, a5000 has 8.6; run the block",
        ),
        (ffn(1, 8, 8, 16, 2), {"kernel": "convfirst"}, "kernel 'convfirst' does not run FfnShape.*use 'ffn_hopper'"),
        (ffn(1, 8, 8, 16, 2), {"tile": HopperTile(64, 64, 2, 2, 1, 64, 0)}, "is for other blocks than FfnShape"),
        (convfirst(1, 8, 8, 16, 2), {"tile": TILE}, "is for other blocks than ConvFirstShape"),
        (ffn(1, 8, 8, 16, 2), {"tile": TILE}, r"4 and 4 chunks of weights do not go with 1 steps"),
    ],
)
def test_what_no_kernel_runs_is_refused(graph, options, message):
    with pytest.raises(PlanError, match=message):
        plan_block(graph, **options)

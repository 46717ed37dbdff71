import csv
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest

from fusion.planner.blocks import convfirst, mbconv
from fusion.planner.plan import PlanError, plan_block, ranked_tiles
from fusion.planner.processor import PROCESSORS
from fusion.planner.tile import ConvFirstTile, predicted_us
from fusion.planner.waterline import analyze

GRAPH = convfirst(128, 64, 64, 32, 6)
TABLE_1 = Path(__file__).parents[2] / "bench" / "paper" / "table1_convfirst.csv"


def blocks_of_table_1():
    with TABLE_1.open() as file:
        return [
            tuple(int(row[key]) for key in ("channels", "alpha", "height", "width")) for row in csv.DictReader(file)
        ]


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("sizes", blocks_of_table_1(), ids=str)
def test_no_prediction_beats_the_limit(sizes, processor):
    channels, expansion, height, width = sizes
    plan = plan_block(convfirst(128, height, width, channels, expansion), processor)
    assert plan.predicted_us >= plan.limit_us
    assert plan.limit_us == pytest.approx(1e6 * analyze(plan.program, processor).min_latency)
    assert plan.local_memory_bytes <= PROCESSORS[processor].local_memory_bytes


def test_the_best_prediction_is_chosen_and_the_runners_up_are_told():
    plan = plan_block(GRAPH, "h200")
    tiles = ranked_tiles(plan.shape, plan.processor)
    assert plan.tile == tiles[0]
    assert plan.predicted_us == pytest.approx(min(predicted_us(t, plan.shape, plan.processor) for t in tiles), abs=0.01)
    assert plan.why == f"lowest predicted time of {len(tiles)} valid tiles"
    assert [rejection.what for rejection in plan.rejected] == ["layerwise program", *map(repr, tiles[1:4])]
    assert plan.rejected[0].why.startswith("3 kernels move ")
    assert all(rejection.why.startswith("predicted ") for rejection in plan.rejected[1:])


def test_the_program_has_the_tile_and_the_costs_of_the_block():
    plan = plan_block(GRAPH, "h200")
    (kernel,) = plan.program.kernels
    assert set(kernel.partition.dims) >= {("H", plan.tile.height), ("W", plan.tile.width)}
    assert plan.ops_count == GRAPH.ops_count
    assert plan.bytes == 2 * sum(tensor.size for tensor in (*GRAPH.inputs, *GRAPH.weights(), *GRAPH.outputs))


def test_a_given_tile_is_kept():
    tile = ConvFirstTile(4, 8, 16, 16, 1)
    plan = plan_block(GRAPH, "a5000", tile)
    assert (plan.tile, plan.why, plan.processor.name) == (tile, "the tile was given", "a5000")
    assert [rejection.what for rejection in plan.rejected] == ["layerwise program"]


def test_planning_is_reproducible_and_the_plan_frozen():
    plan = plan_block(GRAPH)
    assert plan == plan_block(GRAPH, PROCESSORS["h200"])
    with pytest.raises(FrozenInstanceError):
        plan.tile = None


def test_a_plan_prints_itself_and_its_tile_can_be_pasted_back():
    plan = plan_block(GRAPH, "h200")
    text = str(plan)
    for fact in (
        "fused convfirst (float16), 1 kernel",
        "kernel convfirst on NVIDIA H200",
        f"limit {plan.limit_us:.1f} us",
        f"predicted {plan.predicted_us:.1f} us, limit",
        "rejected layerwise program: 3 kernels move",
    ):
        assert fact in text
    (line,) = (line.strip() for line in text.splitlines() if line.startswith("  ConvFirstTile("))
    assert plan_block(GRAPH, "h200", eval(line)).tile == plan.tile
    assert f"predicted {plan.predicted_us:.1f} us, measured 86.6 us" in str(replace(plan, measured_us=86.6))


@pytest.mark.parametrize(
    "graph, message",
    [
        (
            mbconv(1, 8, 8, 16, 2),
            r"no fused kernel runs the block 'mbconv' .*supported is ConvFirst with stride 1.*run it",
        ),
        (convfirst(1, 8, 8, 16, 2, stride=2), r"no fused kernel runs the block 'convfirst' .*blurpool.*stride 1"),
        (convfirst(1, 8, 8, 16, 2, dtype="float32"), "dtype float32 is not supported, use one of float16, bfloat16"),
        (convfirst(1, 8, 8, 16, 2, kernel_size=5), "kernel size 5 is not supported, use 3"),
        (convfirst(1, 8, 8, 12, 2, group_width=4), "in_channels=12 is not supported, use a multiple of 8"),
        (convfirst(1, 8, 8, 4096, 1), "no tile of the ConvFirst kernel fits .*run the block layer by layer"),
    ],
    ids=["mbconv", "stride", "dtype", "kernel", "channels", "huge"],
)
def test_blocks_that_no_kernel_runs(graph, message):
    with pytest.raises(PlanError, match=message):
        plan_block(graph)


def test_errors_of_arguments():
    tile = ConvFirstTile(6, 16, 64, 64, 4)
    with pytest.raises(PlanError, match=r"ConvFirstTile\(height=6, .*height=6 is not a power of two; leave the tile"):
        plan_block(GRAPH, tile=tile)
    with pytest.raises(ValueError, match="processor 'tpu' is unknown; use one of a5000, "):
        plan_block(GRAPH, "tpu")

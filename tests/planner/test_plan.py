import csv
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest

from fusion.planner.blocks import conv, convfirst, mbconv
from fusion.planner.families import HOPPER, MBCONV, PORTABLE
from fusion.planner.hopper_tile import HopperTile
from fusion.planner.lower import block_fused
from fusion.planner.mbconv_down_tile import MBConvDownTile
from fusion.planner.mbconv_tile import MBConvTile
from fusion.planner.plan import PlanError, plan_block, ranked_tiles
from fusion.planner.processor import PROCESSORS
from fusion.planner.tile import ConvFirstTile
from fusion.planner.waterline import analyze

GRAPH = convfirst(128, 64, 64, 32, 6)
TOO_WIDE_FOR_HOPPER = convfirst(128, 32, 32, 144, 4)
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


@pytest.mark.parametrize("processor", ["h200", "a100"])
def test_the_best_prediction_is_chosen_and_the_runners_up_are_told(processor):
    plan = plan_block(GRAPH, processor)
    family, tiles = next(iter(ranked_tiles(plan.shape, plan.processor).items()))
    predictions = {tile: family.predicted_us(tile, plan.shape, plan.processor) for tile in tiles}
    assert (plan.family, plan.tile) == (family, tiles[0])
    assert plan.predicted_us == pytest.approx(min(predictions.values()), abs=0.01)
    assert plan.why == f"lowest predicted time of {len(tiles)} valid tiles of the {family.title}"
    rejected = {rejection.what: rejection.why for rejection in plan.rejected}
    assert rejected["layerwise program"].startswith("3 kernels move ")
    assert [rejected[repr(tile)] for tile in tiles[1:4]] == [
        f"predicted {predictions[tile]:.1f} us" for tile in tiles[1:4]
    ]
    assert len(rejected) == 1 + 3 + 1, "the program, the tiles and the other kernel"


@pytest.mark.parametrize(
    "processor, kernel",
    [("h100", HOPPER), ("h200", HOPPER), *((name, PORTABLE) for name in ("a5000", "a100", "b200", "rtx4090"))],
)
def test_the_hopper_kernel_is_preferred_where_it_runs(processor, kernel):
    plan = plan_block(GRAPH, processor)
    assert (plan.kernel, type(plan.tile)) == (kernel.name, kernel.tile_type)
    rejected = {rejection.what: rejection.why for rejection in plan.rejected}
    if kernel is HOPPER:
        best = PORTABLE.ranked_tiles(plan.shape, plan.processor)[0]
        us = PORTABLE.predicted_us(best, plan.shape, plan.processor)
        assert rejected["portable kernel"] == f"predicted {us:.1f} us at best"
    else:
        assert rejected["Hopper kernel"].startswith(f"it is for compute capability 9.0, {processor} has ")


@pytest.mark.parametrize(
    "graph, reason",
    [
        (
            TOO_WIDE_FOR_HOPPER,
            "weights of 78 KB and rows of 167 KB do not fit the 227 KB of local memory that h200 has",
        ),
        (convfirst(1, 8, 8, 16, 2, activation="silu"), "activation silu is not supported, use relu"),
        (convfirst(1, 8, 8, 16, 2, activation="gelu"), "activation gelu is not supported, use relu"),
        (convfirst(1, 8, 8, 16, 2, group_width=16), "group width 16 is not supported, use 8"),
        (
            convfirst(1, 8, 8, 16, 2, stride=2, blur=False),
            "stride 2 of the convolution is not supported, use 1",
        ),
    ],
    ids=["local memory", "silu", "gelu", "group width", "stride"],
)
def test_the_portable_kernel_runs_what_the_hopper_kernel_does_not(graph, reason):
    plan = plan_block(graph, "h200")
    assert plan.kernel == "convfirst"
    assert f"  rejected Hopper kernel: {reason}" in str(plan).splitlines()


def test_a_kernel_can_be_asked_for():
    plan = plan_block(GRAPH, "h200", kernel="convfirst")
    assert plan.tile == PORTABLE.ranked_tiles(plan.shape, plan.processor)[0]
    assert plan_block(GRAPH, "h200", kernel="convfirst_hopper").tile == plan_block(GRAPH, "h200").tile
    with pytest.raises(PlanError, match=r"no tile fits .*: Hopper kernel: weights of 78 KB .*layer by layer"):
        plan_block(TOO_WIDE_FOR_HOPPER, "h200", kernel="convfirst_hopper")
    with pytest.raises(ValueError, match="kernel 'fast' is unknown; use one of convfirst_hopper, convfirst"):
        plan_block(GRAPH, "h200", kernel="fast")
    with pytest.raises(PlanError, match=r"kernel 'ffn_hopper' does not run .*use 'convfirst_hopper' or 'convfirst'"):
        plan_block(GRAPH, "h200", kernel="ffn_hopper")


@pytest.mark.parametrize(
    "tile, pixels", [(ConvFirstTile(4, 8, 16, 16, 1), (4, 8)), (HopperTile(128, 32, 3, 1, 1, 64, 0), (2, 64))]
)
def test_the_program_has_the_tile_and_the_costs_of_the_block(tile, pixels):
    plan = plan_block(GRAPH, "h200", tile)
    (kernel,) = plan.program.kernels
    assert kernel.partition.dims[1:] == (("H", pixels[0]), ("W", pixels[1]))
    assert kernel.loops[0].dims == (("C", tile.hidden),)
    assert plan.ops_count == GRAPH.ops_count
    assert plan.bytes == 2 * sum(tensor.size for tensor in (*GRAPH.inputs, *GRAPH.weights(), *GRAPH.outputs))


@pytest.mark.parametrize("tile", [ConvFirstTile(4, 8, 16, 16, 1), HopperTile(64, 16, 4, 1, 1, 32, 0)])
def test_a_given_tile_is_kept_and_says_which_kernel(tile):
    plan = plan_block(GRAPH, "h200", tile)
    assert (plan.tile, plan.why, plan.processor.name) == (tile, "the tile was given", "h200")
    assert isinstance(tile, plan.family.tile_type)
    assert [rejection.what for rejection in plan.rejected] == ["layerwise program"]


@pytest.mark.parametrize("tile", [ConvFirstTile(8, 16, 32, 32, 4), HopperTile(64, 32, 2, 2, 1, 64, 0)])
def test_a_plan_describes_the_resources_of_its_tile(tile):
    plan = plan_block(GRAPH, "h200", tile)
    arguments = tile, plan.shape, plan.processor
    assert plan.local_memory_bytes == plan.family.local_memory_bytes(*arguments)
    assert plan.predicted_us == plan.family.predicted_us(*arguments)
    assert (
        f"  local memory {plan.local_memory_bytes / 1024:.0f} KB, about "
        f"{plan.family.estimated_registers(tile, plan.shape):.0f} registers a thread, "
        f"{plan.family.programs_per_processor(*arguments)} programs a processor"
    ) in str(plan).splitlines()


def test_planning_is_reproducible_and_the_plan_frozen():
    plan = plan_block(GRAPH)
    assert plan == plan_block(GRAPH, PROCESSORS["h200"])
    with pytest.raises(FrozenInstanceError):
        plan.tile = None


@pytest.mark.parametrize("kernel", [HOPPER, PORTABLE], ids=lambda kernel: kernel.name)
def test_a_plan_prints_itself_and_its_tile_can_be_pasted_back(kernel):
    plan = plan_block(GRAPH, "h200", kernel=kernel.name)
    text = str(plan)
    for fact in (
        "fused convfirst (float16), 1 kernel",
        f"kernel {kernel.name} on NVIDIA H200",
        f"limit {plan.limit_us:.1f} us",
        f"predicted {plan.predicted_us:.1f} us, limit",
        "rejected layerwise program: 3 kernels move",
    ):
        assert fact in text
    (line,) = (line.strip() for line in text.splitlines() if line.startswith(f"  {kernel.tile_type.__name__}("))
    assert plan_block(GRAPH, "h200", eval(line)).tile == plan.tile
    assert f"predicted {plan.predicted_us:.1f} us, measured 86.6 us" in str(replace(plan, measured_us=86.6))


@pytest.mark.parametrize(
    "graph, message",
    [
        (conv(1, 8, 8, 16), r"no fused kernel runs the block 'conv' \(conv\); supported is ConvFirst.*MBConv: .*run"),
        (convfirst(1, 8, 1, 16, 2, stride=2), "8x1 pixels cannot be blur-pooled: reflection needs 2 each way"),
        (convfirst(1, 8, 8, 16, 2, dtype="float32"), "dtype float32 is not supported, use one of float16, bfloat16"),
        (convfirst(1, 8, 8, 16, 2, kernel_size=5), "kernel size 5 is not supported, use 3"),
        (convfirst(1, 8, 8, 12, 2, group_width=4), "in_channels=12 is not supported, use a multiple of 8"),
        (mbconv(1, 8, 8, 12, 2, group_width=4), "in_channels=12 is not supported, use a multiple of 8"),
        (mbconv(1, 8, 8, 24, 1, group_width=24), "group width 24 is not supported, use a power of two up to 64"),
        (mbconv(1, 8, 1, 16, 2, stride=2), "images of 8x1 pixels are too small: a blur-pool reflects its input"),
        (convfirst(1, 8, 8, 4096, 1), "no tile fits .*run the block layer by layer"),
    ],
    ids=["conv", "reflection", "dtype", "kernel", "channels", "mbconv-channels", "mbconv-groups", "blur", "huge"],
)
def test_blocks_that_no_kernel_runs(graph, message):
    with pytest.raises(PlanError, match=message):
        plan_block(graph)


@pytest.mark.parametrize("stride", [1, 2])
def test_the_hopper_kernels_of_mbconv_have_two_activations(stride):
    graphs = [mbconv(128, 16, 16, 64, 4, stride=stride, activation=name) for name in ("silu", "hardswish")]
    hopper, portable = (plan_block(graph, "h200") for graph in graphs)
    assert hopper.kernel == f"{portable.kernel}_hopper"
    reason = "rejected Hopper kernel: activation hardswish is not supported, use relu or silu"
    assert reason in str(portable) and reason not in str(hopper)


@pytest.mark.parametrize("processor", ["a5000", "h200"])
@pytest.mark.parametrize("channels, size", [(64, 56), (16, 128)])
def test_a_convolution_of_stride_2(channels, size, processor):
    options = {"out_channels": 2 * channels, "activation": "silu"}
    plan = plan_block(convfirst(128, size, size, channels, 4, stride=2, blur=False, **options), processor)
    half = plan_block(convfirst(128, size // 2, size // 2, channels, 4, **options), processor)
    whole = plan_block(convfirst(128, size, size, channels, 4, **options), processor)
    assert plan.kernel == "convfirst"
    assert plan.predicted_us >= plan.limit_us
    assert half.predicted_us <= plan.predicted_us < whole.predicted_us


@pytest.mark.parametrize("processor", ["a5000", "a100", "b200"])
def test_mbconv_runs_as_two_kernels(processor):
    graph = mbconv(128, 16, 16, 128, 4)
    plan = plan_block(graph, processor, kernel="mbconv")
    assert (plan.family, type(plan.tile)) == (MBCONV, MBConvTile)
    assert [kernel.name for kernel in plan.program.kernels] == ["produce", "project"]
    produce = plan.program.kernels[0].partition
    assert produce.dims[1:] == (("H", plan.tile.height), ("W", plan.tile.width), ("C", plan.tile.hidden))
    assert plan.predicted_us >= plan.limit_us
    text = str(plan)
    assert "two-pass mbconv (float16), 2 kernels" in text
    assert "rejected layerwise program: 7 kernels move" in text
    (line,) = (line.strip() for line in text.splitlines() if line.startswith("  MBConvTile("))
    assert plan_block(graph, processor, eval(line)).tile == plan.tile
    with pytest.raises(PlanError, match="is for other blocks than MBConvShape"):
        plan_block(graph, processor, ConvFirstTile(4, 8, 16, 16, 1))


def test_mbconv_of_stride_2_runs_as_two_kernels():
    graph = mbconv(128, 32, 32, 48, 4, out_channels=128, stride=2)
    plan = plan_block(graph, "a100")
    assert (plan.kernel, type(plan.tile)) == ("mbconv_down", MBConvDownTile)
    assert [kernel.name for kernel in plan.program.kernels] == ["produce", "project"]
    produce = plan.program.kernels[0].partition
    assert (produce.tensor, produce.dims[1:3]) == ("blurpool.out", (("H", plan.tile.height), ("W", plan.tile.width)))
    assert plan.predicted_us >= plan.limit_us
    assert (plan.ops_count, plan.program.bytes) == (graph.ops_count, block_fused(graph).bytes)
    assert plan_block(graph, "a100", plan.tile).tile == plan.tile
    with pytest.raises(PlanError, match="is for other blocks than MBConvShape"):
        plan_block(mbconv(1, 8, 8, 16, 2), "a100", plan.tile)


def test_errors_of_arguments():
    tile = ConvFirstTile(6, 16, 64, 64, 4)
    with pytest.raises(PlanError, match=r"ConvFirstTile\(height=6, .*height=6 is not a power of two; leave the tile"):
        plan_block(GRAPH, tile=tile)
    with pytest.raises(
        PlanError, match=r"HopperTile\(pixels=64, .*compute capability 9.0, a100 has 8.0; leave the tile"
    ):
        plan_block(GRAPH, "a100", HopperTile(64, 32, 2, 2, 1, 64, 0))
    with pytest.raises(TypeError, match=r"\(8, 16\) is not a tile; use a HopperTile or a ConvFirstTile"):
        plan_block(GRAPH, tile=(8, 16))
    with pytest.raises(ValueError, match="processor 'tpu' is unknown; use one of a5000, "):
        plan_block(GRAPH, "tpu")

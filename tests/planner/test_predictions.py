"""Predictions against what was measured, as `bench/results` has it: for the tiles that were timed, on the GPU and with
the ceilings of each report."""

import json
from pathlib import Path

import pytest

from fusion.bench.blocks import BlockConfig
from fusion.bench.predicted_row import parse_tile, predicted_rows
from fusion.planner.blocks import mbconv
from fusion.planner.families import family_of
from fusion.planner.mbconv_hopper_tile import MBConvHopperTile
from fusion.planner.mbconv_windows_hopper_tile import MBConvDownWindowsHopperTile, MBConvWindowsHopperTile
from fusion.planner.plan import block_shape
from fusion.planner.processor import PROCESSORS

RESULTS = Path(__file__).parents[2] / "bench" / "results"
H200, H100 = PROCESSORS["h200"], PROCESSORS["h100"].with_ceilings(756e12, 3.0e12)
CONVFIRST_REPORTS = ("convfirst", "convfirst_more", "convfirst_bf16", "convfirst_portable")
BLOCK_REPORTS = (*CONVFIRST_REPORTS, "mbconv", "mbconv_windows", "ffn")
"""Of the commands for blocks, with the kernels as they are: reports of kernels that were replaced are left out."""
LATER_REPORTS = (
    *(f"h200/{name}_planned" for name in ("convfirst", "convfirst_portable", "mbconv", "mbconv_windows")),
    *(f"h100/{name}_planned" for name in ("convfirst", "convfirst_portable", "mbconv", "mbconv_windows")),
    *("h100/ffn_planned", "h100/mbconv_portable_planned"),
)
"""Measured when all constants were fitted, with the tiles that the planner then chose."""
NETWORK_REPORTS = ("h200/compile_pico", "h200/compile_small", "h200/network", "h100/network")
"""Reports that do not tell tiles: those are assumed that the planner chooses, as they were when it was measured."""


def read(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


def rows_of(name):
    report = read(name)
    rows = predicted_rows(name, report["meta"], report["rows"])
    return [pytest.param(row, id=f"{name}: {row['block']}, {row['launch']}") for row in rows]


@pytest.mark.parametrize("row", [row for name in BLOCK_REPORTS for row in rows_of(f"h200/{name}")])
def test_blocks(row):
    """Each with a launch of its own, and MBConv blocks in one launch for eight, too."""
    assert row["predicted_by"] == "planner" and row["plan"]
    assert row["minimum_us"] < row["predicted_us"] == pytest.approx(row["measured_us"], rel=0.25)


@pytest.mark.parametrize("row", [row for name in LATER_REPORTS for row in rows_of(name)])
def test_what_was_measured_later(row):
    assert row["predicted_by"] == "planner"
    assert row["minimum_us"] < row["predicted_us"] == pytest.approx(row["measured_us"], rel=0.25)


@pytest.mark.parametrize("row", [row for name in NETWORK_REPORTS for row in rows_of(name)])
def test_parts_of_networks(row):
    """Stems, heads and blocks of stride 2 among them."""
    assert row["predicted_by"] == "planner's tile"
    assert row["minimum_us"] < row["predicted_us"] == pytest.approx(row["measured_us"], rel=0.25)


def test_every_kernel_of_the_blocks_is_compared():
    kernels = {row.values[0]["kernel"] for name in BLOCK_REPORTS for row in rows_of(f"h200/{name}")}
    assert kernels == {"convfirst_hopper", "convfirst", "ffn_hopper", "mbconv_hopper", "mbconv_windows_hopper"}
    parts = {row.values[0]["kernel"] for name in NETWORK_REPORTS for row in rows_of(name)}
    assert parts >= {"convfirst_down_hopper", "mbconv_down_hopper", "stem", "stem_convfirst_hopper", "head"}


def regret(measured, predicted):
    """How many times as long the tile takes that is predicted best, of those that were measured, as the best one."""
    chosen = min(measured, key=lambda tile: round(predicted[tile], 2))
    return measured[chosen] / min(measured.values())


def tiles_by_block():
    """Of 9 blocks on the portable ConvFirst kernel, of 10 on that of MBConv, of 18 on those for larger images: shape,
    processor, and microseconds of each tile that was measured, in a stage of so many blocks a launch."""
    found = {}
    for row in read("h200/tiles")["rows"]:
        config = BlockConfig(row["block"], row["channels"], row["alpha"], row["hw"])
        tiles = found.setdefault(str(config), (config.graph(row["batch"]), H200, 1, {}))[-1]
        tiles[parse_tile(row["tile"])] = row["measured_us"]
    for row in read("h100/mbconv_exploration")["tiles"]:
        config = BlockConfig("mbconv", row["channels"], 4, row["hw"])
        tiles = found.setdefault(str(config), (config.graph(128), H100, 8, {}))[-1]
        tiles[MBConvHopperTile(*row["tile"])] = row["us"]
    for row in read("mbconv_windows_exploration")["rows"]:
        sizes = {name: row[name] for name in ("hidden_channels", "out_channels", "squeeze_channels", "kernel_size")}
        stride, size = row["stride"], (row["batch"], row["height"], row["width"], row["in_channels"])
        graph = mbconv(*size, **sizes, stride=stride, blur=stride == 1)
        tile_type = MBConvWindowsHopperTile if stride == 1 else MBConvDownWindowsHopperTile
        tiles = {tile_type(*each["tile"]): each["us"] for each in row["tiles"]}
        name = f"stride {stride}, {row['kernel_size']}x{row['kernel_size']}, {sizes}, {row['height']}"
        found[name] = graph, H200 if "H200" in row["device"] else H100, 1, tiles
    return found


@pytest.mark.parametrize("graph, processor, stage, measured", tiles_by_block().values(), ids=tiles_by_block())
def test_the_tile_predicted_best_is_among_the_fastest(graph, processor, stage, measured):
    """Within 5 % of the best that was measured, which is itself within 20 % of its prediction."""
    shape = block_shape(graph)
    predicted = {}
    for tile in measured:
        family = family_of(tile)
        one = family.predicted_us(tile, shape, processor)
        predicted[tile] = one if stage == 1 else family.stage_us(tile, shape, processor, stage)
    assert regret(measured, predicted) < 1.05
    best = min(measured, key=measured.__getitem__)
    assert predicted[best] == pytest.approx(measured[best], rel=0.2)


@pytest.mark.parametrize("blocks", [1, 2, 8, 100])
def test_blocks_of_a_launch_share_what_it_costs(blocks):
    tile, graph = MBConvHopperTile(bands=1, piece=4, step=32, stages=6), mbconv(128, 16, 16, 128, 4)
    family, shape = family_of(tile), block_shape(graph)
    alone, share = family.predicted_us(tile, shape, H200), family.stage_us(tile, shape, H200, blocks)
    assert share == alone if blocks == 1 else share < alone < blocks * share

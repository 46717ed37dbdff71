"""What the compiler makes of a network's stem and head, on a machine with or without a GPU."""

import json

import pytest

from fusion.planner import head_tile, stem_tile
from fusion.planner.blocks import conv, head
from fusion.planner.head_tile import HeadTile
from fusion.planner.match import match_head, match_stem
from fusion.planner.processor import PROCESSORS
from fusion.planner.stem_tile import StemTile
from fusion.planner.tile import MAX_REGISTERS
from tests.triton_kernels.compiling_process import ahead_output

CAPABILITIES = ("8.0", "9.0", "10.0", "12.0")
PRODUCT = {"8.0": "hmma", "9.0": "hgmma", "10.0": "utchmma", "12.0": "hmma"}
ALIGNMENT_BYTES = 1024


def compiled(*arguments):
    """What the command line tells as JSON."""
    return json.loads(ahead_output("--json", *arguments))


def check_row(row, capability, registers, local):
    assert {name for name in ("hmma", "hgmma", "utchmma") if row[name]} == {PRODUCT[capability]}, row
    assert row["stack_bytes"] == 0, row
    if capability == "9.0":
        assert 0.6 * registers <= row["registers"] <= min(1.3 * registers, MAX_REGISTERS), row
        assert row["shared_bytes"] <= local + ALIGNMENT_BYTES, row


@pytest.mark.parametrize(
    "tile, outs, capabilities",
    [(StemTile(2, 128, 2, 4), (24,), CAPABILITIES), (StemTile(2, 128, 4, 4), (16, 32), ("9.0",))],
    ids=str,
)
def test_resources_of_a_stem(tile, outs, capabilities):
    options = ["--capability", *capabilities, "--stem-tile", ",".join(map(str, tile.to_ints()))]
    rows = compiled("--block", *(f"stem:3,{out},256" for out in outs), *options)
    cases = [(out, capability) for out in outs for capability in capabilities]
    for row, (out, capability) in zip(rows, cases, strict=True):
        shape = match_stem(conv(128, 256, 256, 3, out, stride=2, activation="relu"))
        registers = stem_tile.estimated_registers(tile, shape)
        local = stem_tile.local_memory_bytes(tile, shape, PROCESSORS["h200"])
        assert row["kernel"] == "stem"
        check_row(row, capability, registers, local)
        assert row["narrow_loads"] == 0, "images and weights are loaded several elements at a time"


@pytest.mark.parametrize("width, is_narrow", [(252, False), (250, False), (251, True)])
def test_rows_of_an_even_number_of_pixels_are_not_loaded_one_element_at_a_time(width, is_narrow):
    (row,) = compiled("--block", f"stem:3,24,{width}", "--stem-tile", "2,128,2,4")
    assert (row["narrow_loads"] > 0) == is_narrow, row


@pytest.mark.parametrize("channels, capabilities", [((160,), CAPABILITIES), ((128, 256), ("9.0",))], ids=str)
def test_resources_of_a_head(channels, capabilities):
    tile = HeadTile(64, 128, 5, 4)
    options = ["--capability", *capabilities, "--head-tile", ",".join(map(str, tile.to_ints()))]
    rows = compiled("--block", *(f"head:{width},1280,8" for width in channels), *options)
    cases = [(width, capability) for width in channels for capability in capabilities]
    for row, (width, capability) in zip(rows, cases, strict=True):
        shape = match_head(head(128, 8, 8, width, 1280))
        registers = head_tile.estimated_registers(tile, shape)
        local = head_tile.local_memory_bytes(tile, shape, PROCESSORS["h200"])
        assert row["kernel"] == "head"
        check_row(row, capability, registers, local)
        assert row["wide_copies"] > 0 and row["narrow_loads"] == 0, row


def test_the_planner_chooses_tiles():
    rows = compiled("--block", "stem:3,32,256", "head:192,1280,8")
    assert [row["kernel"] for row in rows] == ["stem", "head"]
    assert [len(row["tile"]) for row in rows] == [4, 5]

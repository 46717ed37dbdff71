"""What the compiler makes of the kernel of stem and block on Hopper, ahead of time."""

import json

import pytest

from fusion.planner.blocks import stem_convfirst
from fusion.planner.match import match_stem_convfirst
from fusion.planner.processor import PROCESSORS
from fusion.planner.stem_convfirst_hopper_tile import (
    JOB_INPUT_ROWS,
    StemConvFirstHopperTile,
    local_memory_bytes,
    why_invalid,
)
from tests.triton_kernels.compiling_process import ahead_output


def products(tile, shape):
    """Of the rows ahead of the first job and of one in the loop, and of a block of two rows."""
    stem = 3 * (JOB_INPUT_ROWS + 1)
    pieces, rows = sum(tile.block.in_slabs(shape.stem_channels)) // 16, tile.block
    steps = rows.steps(shape.hidden_channels)
    ffn = steps * (pieces + tile.hidden // 16 * len(rows.out_slabs(shape.out_channels)))
    return stem + 12 * pieces + 2 * ffn


@pytest.mark.parametrize(
    "channels, size, tile, dtype",
    [
        (16, 256, (16, 5, 16), "float16"),
        (24, 256, (32, 3, 32), "float16"),
        (32, 256, (32, 3, 32), "bfloat16"),
        # Masks.
        (16, 200, (16, 5, 16), "bfloat16"),
        (32, 200, (32, 3, 32), "float16"),
    ],
    ids=str,
)
def test_resources(channels, size, tile, dtype):
    """Products are neither serialised nor repeated, nothing is spilled, and the planner knows the shared memory."""
    tile = StemConvFirstHopperTile(*tile)
    shape = match_stem_convfirst(stem_convfirst(128, size, size, 3, channels, 3, dtype=dtype))
    assert why_invalid(tile, shape, PROCESSORS["h200"]) is None
    options = ["--stem-convfirst-hopper-tile", ",".join(map(str, tile.to_ints())), "--dtype", dtype]
    (row,) = json.loads(ahead_output("--json", "--block", f"{channels},3,{size}", *options))
    assert row["kernel"] == "stem_convfirst_hopper"
    assert (row["hgmma"], row["hmma"]) == (products(tile, shape), 0), row
    assert row["warpgroup"] < 1.5 * row["hgmma"], "two fences and waits for each would be products one by one"
    assert row["stack_bytes"] == 0, row
    assert row["shared_bytes"] == local_memory_bytes(tile, shape, PROCESSORS["h200"])
    assert row["narrow_loads"] <= 4, "only biases are loaded one by one"

from dataclasses import replace

import pytest

from fusion.planner.blocks import conv, convfirst, stem_convfirst
from fusion.planner.families import STEM_CONVFIRST_HOPPER, families_of, family_of
from fusion.planner.graph import BlockGraph, OpKind, make_op
from fusion.planner.match import StemConvFirstShape, match_convfirst, match_stem, match_stem_convfirst
from fusion.planner.plan import PlanError, block_shape, plan_block
from fusion.planner.processor import PROCESSORS
from fusion.planner.program import Memory
from fusion.planner.stem_convfirst_hopper_tile import (
    RING_ROWS,
    StemConvFirstHopperTile,
    candidate_tiles,
    convfirst_shape,
    estimated_registers,
    local_memory_bytes,
    predicted_us,
    why_invalid,
    why_malformed,
    why_none,
    why_unsupported,
)

H200 = PROCESSORS["h200"]
SHAPE = StemConvFirstShape(128, 256, 256, 3, 24, 72, 24, 8, "relu", True, "float16")
TILE = StemConvFirstHopperTile(32, 3, 32)


def test_the_graph_is_that_of_both():
    graph = stem_convfirst(128, 256, 256, 3, 24, 3)
    assert match_stem_convfirst(graph) == SHAPE == block_shape(graph)
    alone = conv(128, 256, 256, 3, 24, stride=2, activation="relu"), convfirst(128, 128, 128, 24, 3)
    assert graph.ops_count == sum(part.ops_count for part in alone)
    assert convfirst_shape(SHAPE) == match_convfirst(alone[1])
    narrower = stem_convfirst(1, 8, 8, 3, 16, hidden_channels=40, out_channels=24, activation="silu", dtype="bfloat16")
    expected = StemConvFirstShape(1, 8, 8, 3, 16, 40, 24, 8, "silu", False, "bfloat16")
    assert match_stem_convfirst(narrower) == expected
    assert not match_stem_convfirst(stem_convfirst(1, 8, 8, 3, 16, 3, residual=False)).residual


def test_only_a_stem_and_a_block_of_its_output_match():
    graph = stem_convfirst(2, 8, 8, 3, 16, 3)
    for alone in (conv(2, 8, 8, 3, 16, stride=2, activation="relu"), convfirst(2, 8, 8, 16, 3)):
        assert match_stem_convfirst(alone) is None
    assert match_stem(graph) is None and match_convfirst(graph) is None
    y = graph.ops[1].output
    both = replace(graph, outputs=(y, *graph.outputs))
    assert match_stem_convfirst(both) is None, "the stem's output is needed"
    silu = replace(graph.ops[1], kind=OpKind.SILU)
    assert match_stem_convfirst(replace(graph, ops=(graph.ops[0], silu, *graph.ops[2:]))) is None
    x = graph.inputs[0]
    residual = make_op(OpKind.ADD, "residual", (graph.ops[0].output, graph.ops[-2].output))
    before_activation = BlockGraph("x", (*graph.ops[:-1], residual), (x,), (residual.output,))
    assert match_stem_convfirst(before_activation) is None
    assert match_stem_convfirst(BlockGraph("x", (graph.ops[0],), (x,), (graph.ops[0].output,))) is None


def test_nothing_between_stem_and_block_is_in_dram():
    plan = plan_block(stem_convfirst(128, 256, 256, 3, 24, 3), "h200")
    (kernel,) = plan.program.kernels
    placed = {tensor.name: memory for tensor, memory in kernel.placement}
    in_dram = {name for name, memory in placed.items() if memory is Memory.DRAM}
    assert "stem_activation.out" in placed and "stem_activation.out" not in in_dram
    assert plan.kernel == "stem_convfirst_hopper" and plan.tile == TILE
    alone = [
        plan_block(graph, "h200")
        for graph in (conv(128, 256, 256, 3, 24, stride=2, activation="relu"), convfirst(128, 128, 128, 24, 3))
    ]
    assert plan.bytes == sum(part.bytes for part in alone) - 2 * 2 * 128 * 128 * 128 * 24
    assert plan.limit_us < sum(part.limit_us for part in alone)


@pytest.mark.parametrize("channels, programs", [(16, 5), (24, 3), (32, 3)])
def test_candidates(channels, programs):
    shape = replace(SHAPE, stem_channels=channels, hidden_channels=3 * channels, out_channels=channels)
    tiles = list(candidate_tiles(shape, H200))
    assert len(set(tiles)) == len(tiles) > 4
    for tile in tiles:
        assert why_invalid(tile, shape, H200) is None
        assert family_of(tile) is STEM_CONVFIRST_HOPPER and StemConvFirstHopperTile(*tile.to_ints()) == tile
        assert tile.programs * (local_memory_bytes(tile, shape, H200) + 1024) <= H200.local_memory_bytes + 1024
        assert 0 < predicted_us(tile, shape, H200) < 300
    assert {tile.slab for tile in tiles} == {16 if channels == 16 else 32}
    best = min(tiles, key=lambda tile: predicted_us(tile, shape, H200))
    assert best.programs == programs
    assert families_of(shape) == (STEM_CONVFIRST_HOPPER,)


def test_memory_is_weights_and_a_ring():
    """Counted by hand: taps, chunks of three steps, the stem's filters, the ring, biases and a barrier."""
    taps, chunks, stem = 9 * 2 * 256, 3 * (32 * 32 + 32 * 32), 3 * 16 * 64
    ring = RING_ROWS * (8 + 128) * 32 + 8 * 32
    assert local_memory_bytes(TILE, SHAPE, H200) == 2 * (taps + chunks + stem + ring + 3 * 32 + 32) + 8


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"in_channels": 4}, "images of 4 channels are not supported, only of 3; run the stem and the block one"),
        ({"stem_channels": 40}, "a stem of 40 channels is not supported, 32 at most; run the stem and the block one"),
        ({"activation": "silu"}, "activation silu is not supported, use relu"),
        ({"height": 255}, "images of 255x256 pixels are not supported, only of an even height and a width that is a "),
        ({"width": 254}, "images of 256x254 pixels are not supported"),
        ({"width": 260}, "a multiple of 4 up to 256; run the stem and the block one after the other"),
        ({"group_width": 4}, "group width 4 is not supported, use 8"),
        ({"out_channels": 20}, "out_channels=20 is not supported, use a multiple of 8"),
        ({"kernel_size": 5}, "kernel size 5 is not supported, use 3"),
        ({"dtype": "float32"}, "dtype float32 is not supported"),
    ],
    ids=str,
)
def test_what_is_not_supported(changes, reason):
    shape = replace(SHAPE, **changes)
    assert reason in why_unsupported(shape)
    assert why_invalid(TILE, shape, H200) == why_unsupported(shape) == why_none(shape, H200)
    assert not list(candidate_tiles(shape, H200))


@pytest.mark.parametrize(
    "tile, reason",
    [
        (replace(TILE, slab=64), "slab=64 is not one of 16, 32"),
        (replace(TILE, slab=16), "slab=16 is less than the 24 channels of the stem, use one that holds them all"),
        (replace(TILE, hidden=48), "hidden=48 is not one of 16, 32, 64"),
    ],
    ids=str,
)
def test_malformed_tiles(tile, reason):
    assert reason in why_malformed(tile, 24, 72)
    assert why_invalid(tile, SHAPE, H200) == why_malformed(tile, 24, 72)


def test_tiles_that_do_not_fit():
    assert "it is for compute capability 9.0, a100 has 8.0" in why_invalid(TILE, SHAPE, PROCESSORS["a100"])
    assert "registers a thread would spill, 128 are available to each of 4 programs" in why_invalid(
        replace(TILE, programs=4), SHAPE, H200
    )
    assert "local memory" in why_invalid(TILE, replace(SHAPE, hidden_channels=2400), H200)
    assert "too many rows for a launch" in why_invalid(TILE, replace(SHAPE, batch=2**24), H200)
    assert why_none(SHAPE, H200) is None
    assert "local memory" in why_none(replace(SHAPE, hidden_channels=2400), H200)
    for field in ("hidden", "programs", "slab"):
        with pytest.raises(ValueError, match=f"{field} must be a positive integer, got 0"):
            replace(TILE, **{field: 0})
    with pytest.raises(PlanError, match="images of 256x258 pixels are not supported"):
        plan_block(stem_convfirst(128, 256, 258, 3, 24, 3), "h200")


def test_windows_of_the_stem_and_its_sums_cost_registers():
    """What the compiler needed: 95 and 143."""
    narrow = replace(SHAPE, stem_channels=16, hidden_channels=48, out_channels=16)
    assert 85 < estimated_registers(StemConvFirstHopperTile(16, 5, 16), narrow) <= 96
    assert 135 < estimated_registers(TILE, SHAPE) <= 168

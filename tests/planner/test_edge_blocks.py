"""A network's stem and head: graphs, OPs and bytes, programs, plans."""

import pytest

from fusion.planner.blocks import conv, convfirst, ffn, head
from fusion.planner.families import HEAD, STEM, families_of, family_named, family_of
from fusion.planner.graph import BlockGraph, OpKind, make_op
from fusion.planner.head_tile import HeadTile
from fusion.planner.lower import block_fused, layerwise, pool_fused
from fusion.planner.match import HeadShape, StemShape, match_head, match_stem
from fusion.planner.plan import PlanError, plan_block
from fusion.planner.program import Memory
from fusion.planner.stem_tile import StemTile


def stem(*sizes, **options):
    return conv(*sizes, stride=2, **{"activation": "relu", **options})


def test_ops_and_bytes_of_a_head():
    graph = head(128, 8, 8, 256, 1280)
    assert graph.ops_count == 2 * 128 * 64 * 256 * 1280 + 128 * 64 * 1280
    program = pool_fused(graph, images=5, channel_tile=128)
    assert program.bytes == 2 * (128 * 64 * 256 + 1280 * 256 + 128 * 1280)
    (kernel,) = program.kernels
    assert kernel.memory(graph.op("pool").inputs[0]) is Memory.LOCAL
    assert "pool.out over N by 5 C by 128, streaming conv.weight" in str(program)
    assert "loop activation.out over N by 1 H W, streaming x" in str(program)
    assert layerwise(graph).bytes > 8 * program.bytes, "the map goes to DRAM and back"


def test_ops_and_bytes_of_a_stem():
    graph = stem(128, 256, 256, 3, 16)
    assert graph.ops_count == 2 * 128 * 128 * 128 * 27 * 16
    assert block_fused(graph, (2, 128)).bytes == 2 * (128 * 256 * 256 * 3 + 128 * 128 * 128 * 16 + 27 * 16)


@pytest.mark.parametrize("activation", [None, "relu", "silu", "gelu"])
def test_matching(activation):
    name = activation or "none"
    assert match_stem(stem(2, 9, 13, 3, 24, activation=activation)) == StemShape(2, 9, 13, 3, 24, name, "float16")
    expected = HeadShape(2, 9, 13, 24, 40, name, "bfloat16")
    assert match_head(head(2, 9, 13, 24, 40, activation=activation, dtype="bfloat16")) == expected


def test_the_output_of_a_stem_is_half_its_input_rounded_up():
    shape = match_stem(stem(2, 9, 13, 3, 24))
    assert (shape.out_height, shape.out_width) == (5, 7)
    assert shape.activation_bytes == 2 * 2 * (9 * 13 * 3 + 5 * 7 * 24)


NO_STEMS = [
    conv(1, 8, 8, 3, 16),
    conv(1, 8, 8, 3, 16, stride=4),
    conv(1, 8, 8, 3, 16, stride=2, kernel_size=5),
    conv(1, 8, 8, 3, 16, stride=2, kernel_size=1),
    conv(1, 8, 8, 4, 16, stride=2, group_width=2),
    convfirst(1, 8, 8, 16, 3),
    head(1, 8, 8, 16, 32),
]


@pytest.mark.parametrize("graph", NO_STEMS, ids=str)
def test_other_blocks_are_no_stem(graph):
    assert match_stem(graph) is None


def test_other_blocks_are_no_head():
    for graph in (conv(1, 8, 8, 16, 32, kernel_size=1), ffn(1, 8, 8, 16, 4), stem(1, 8, 8, 3, 16)):
        assert match_head(graph) is None
    spatial = conv(1, 8, 8, 16, 32)
    pool = make_op(OpKind.GLOBAL_AVERAGE_POOL, "pool", spatial.outputs)
    assert match_head(BlockGraph("head", (*spatial.ops, pool), spatial.inputs, (pool.output,))) is None
    graph = head(1, 8, 8, 16, 32)
    both = BlockGraph("head", graph.ops, graph.inputs, (*graph.outputs, graph.op("activation").output))
    assert match_head(both) is None, "the map is wanted too"


def test_only_blocks_that_end_in_a_pool_have_a_pooled_program():
    with pytest.raises(ValueError, match="'conv' does not end in a global average pool; use the fused program"):
        pool_fused(conv(1, 8, 8, 16, 32, kernel_size=1))
    spatial = conv(1, 8, 8, 16, 32)
    pool = make_op(OpKind.GLOBAL_AVERAGE_POOL, "pool", spatial.outputs)
    graph = BlockGraph("head", (*spatial.ops, pool), spatial.inputs, (pool.output,))
    with pytest.raises(ValueError, match="'head' looks across pixels ahead of its pool; use the layerwise program"):
        pool_fused(graph)


def test_plans():
    plan = plan_block(stem(128, 256, 256, 3, 32), "h200")
    assert (plan.kernel, plan.program.name) == ("stem", "fused")
    assert plan.limit_us < plan.predicted_us < 1.5 * plan.limit_us
    assert plan_block(stem(128, 256, 256, 3, 32), "h200", plan.tile).tile == plan.tile
    plan = plan_block(head(128, 8, 8, 128, 1280), "h200")
    assert plan.kernel == "head"
    assert plan.limit_us < plan.predicted_us < 12
    assert "HeadTile(" in str(plan)
    assert repr(plan.tile) in repr(plan)


def test_blocks_that_no_kernel_runs():
    with pytest.raises(
        PlanError, match="in_channels=16 is not supported, the kernel is for images of up to 4 channels"
    ):
        plan_block(stem(1, 8, 8, 16, 32))
    with pytest.raises(PlanError, match="out_channels=100 is not supported, use a multiple of 8"):
        plan_block(head(1, 8, 8, 16, 100))
    with pytest.raises(PlanError, match=r"a stem: a dense 3x3 convolution of stride 2.*and a head: a 1x1 convolution"):
        plan_block(conv(1, 8, 8, 3, 16))
    with pytest.raises(PlanError, match="is for other blocks than"):
        plan_block(head(1, 8, 8, 16, 32), tile=StemTile(2, 128, 2, 4))
    with pytest.raises(PlanError, match=r"HeadTile\(.*cannot run .*warps are too many"):
        plan_block(head(1, 8, 8, 16, 32), tile=HeadTile(16, 16, 1, 2))


def test_tiles_belong_to_families():
    assert family_of(StemTile(2, 128, 2, 4)) is STEM is family_named("stem")
    assert family_of(HeadTile(64, 128, 5, 4)) is HEAD is family_named("head")
    assert families_of(match_stem(stem(1, 8, 8, 3, 16))) == (STEM,)
    assert families_of(match_head(head(1, 8, 8, 16, 32))) == (HEAD,)
    assert STEM.is_repeatable and HEAD.is_repeatable

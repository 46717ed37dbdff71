import pytest

from fusion.planner.blocks import conv, convfirst, ffn, mbconv
from fusion.planner.graph import ELEMENT_SIZE, BlockGraph, OpKind, make_op
from fusion.planner.lower import block_fused, layerwise
from fusion.planner.match import ConvFirstDownShape, match_convfirst, match_convfirst_down
from fusion.planner.plan import PlanError, block_shape, plan_block


def test_the_shape_by_hand():
    graph = convfirst(3, 9, 14, 24, 4, out_channels=40, stride=2, group_width=4, activation="silu", dtype="bfloat16")
    shape = ConvFirstDownShape(3, 9, 14, 24, 96, 40, 4, "silu", "bfloat16")
    assert match_convfirst_down(graph) == shape == block_shape(graph)
    assert (shape.out_height, shape.out_width) == (5, 7)
    assert shape.activation_bytes == 2 * 3 * (9 * 14 * 24 + 5 * 7 * 40)
    assert match_convfirst_down(convfirst(1, 8, 8, 16, 2, stride=2, kernel_size=5)).kernel_size == 5


@pytest.mark.parametrize("size", [(8, 8), (9, 13), (2, 3)])
def test_activations_are_what_the_fused_program_moves_besides_weights(size):
    graph = convfirst(3, *size, 24, 4, out_channels=48, stride=2)
    weights = sum(weight.size for weight in graph.weights()) * ELEMENT_SIZE[graph.dtype]
    assert block_shape(graph).activation_bytes + weights == block_fused(graph).bytes


def test_operations_and_bytes_by_hand():
    """The convolution is counted at full resolution, the expansion with 2C inputs at half of it."""
    graph = convfirst(2, 8, 6, 16, 3, out_channels=32, stride=2)
    weights = 16 * 8 * 9 + 32 * 48 + 48 * 32
    conv_ops, ffn_ops = 2 * (2 * 8 * 6) * 16 * 8 * 9, 2 * (2 * 4 * 3) * (32 * 48 + 48 * 32)
    assert graph.ops_count == conv_ops + ffn_ops
    assert block_fused(graph).bytes == 2 * (2 * 8 * 6 * 16 + 2 * 4 * 3 * 32 + weights)
    assert [kernel.name for kernel in layerwise(graph).kernels] == ["conv", "expand", "project"]


@pytest.mark.parametrize(
    "graph",
    [
        convfirst(1, 8, 8, 16, 4),
        ffn(1, 8, 8, 16, 4),
        mbconv(1, 8, 8, 16, 4, stride=2),
        conv(1, 8, 8, 16, stride=2),
    ],
    ids=lambda graph: graph.name,
)
def test_other_blocks_are_none(graph):
    assert match_convfirst_down(graph) is None


def rebuilt(blur_stride=2, swapped=False, of_conv=False, activation=OpKind.RELU):
    """A stride-2 ConvFirst block with changes: the stride, the halves swapped or both the same, another activation."""
    graph = convfirst(1, 8, 8, 16, 4, stride=2)
    (x,), (conv_weight, expand_weight, project_weight) = graph.inputs, graph.weights()
    ops = [make_op(OpKind.CONV, "conv", (x,), (conv_weight,))]
    y = ops[0].output
    ops.append(make_op(OpKind.CONCAT, "concat", (y, y) if of_conv else (y, x) if swapped else (x, y)))
    ops.append(make_op(OpKind.BLURPOOL, "blurpool", (ops[-1].output,), stride=blur_stride))
    ops.append(make_op(OpKind.CONV, "expand", (ops[-1].output,), (expand_weight,)))
    ops.append(make_op(activation, "activation", (ops[-1].output,)))
    ops.append(make_op(OpKind.CONV, "project", (ops[-1].output,), (project_weight,)))
    return BlockGraph("convfirst", tuple(ops), (x,), (ops[-1].output,))


@pytest.mark.parametrize(
    "changes", [{"blur_stride": 1}, {"swapped": True}, {"of_conv": True}, {"activation": OpKind.SIGMOID}], ids=str
)
def test_blocks_that_differ_a_little_are_none(changes):
    assert match_convfirst_down(rebuilt()) is not None
    assert match_convfirst_down(rebuilt(**changes)) is None


def test_a_convolution_that_something_else_takes_too_is_none():
    graph = convfirst(1, 8, 8, 16, 4, stride=2)
    assert (
        match_convfirst_down(BlockGraph("two", graph.ops, graph.inputs, (graph.ops[0].output, *graph.outputs))) is None
    )
    assert match_convfirst(graph) is None


def test_images_that_cannot_be_reflected_have_no_plan():
    with pytest.raises(PlanError, match="1x8 pixels cannot be blur-pooled: reflection needs 2 each way; run it layer"):
        plan_block(convfirst(1, 1, 8, 16, 4, stride=2))


def test_a_plan_of_the_portable_kernel():
    graph = convfirst(128, 64, 64, 64, 6, out_channels=96, stride=2)
    plan = plan_block(graph, "a5000")
    assert plan.kernel == "convfirst_down"
    assert len(plan.program.kernels) == 1 and plan.bytes == block_fused(graph).bytes
    assert plan.limit_us < plan.predicted_us
    assert plan_block(graph, "a5000", plan.tile).tile == plan.tile

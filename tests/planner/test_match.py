from dataclasses import replace

import pytest

from fusion.planner.blocks import conv, convfirst, ffn, mbconv
from fusion.planner.graph import ELEMENT_SIZE, BlockGraph, OpKind, make_op
from fusion.planner.lower import block_fused
from fusion.planner.match import MBConvDownShape, MBConvShape, match_mbconv, match_mbconv_down, options_of
from fusion.planner.plan import block_shape


@pytest.mark.parametrize(
    "graph",
    [
        ffn(3, 9, 13, 72, 2),
        mbconv(3, 9, 13, 24, 2, out_channels=40),
    ],
    ids=lambda graph: graph.name,
)
def test_activations_are_what_the_fused_program_moves_besides_weights(graph):
    shape = block_shape(graph)
    weights = sum(weight.size for op in graph.ops for weight in op.weights) * ELEMENT_SIZE[graph.dtype]
    moved = block_fused(graph).bytes
    assert shape.pixels * shape.pixel_bytes + weights == moved


@pytest.mark.parametrize(
    "graph",
    [
        convfirst(3, 9, 13, 24, 4),
        convfirst(2, 8, 8, 16, 3, out_channels=40),
        convfirst(2, 9, 8, 16, 3, out_channels=40, stride=2, blur=False),
        convfirst(2, 9, 8, 16, 3, stride=2),
    ],
    ids=str,
)
def test_activations_of_blocks_that_may_change_the_size(graph):
    shape = block_shape(graph)
    weights = sum(weight.size for weight in graph.weights()) * ELEMENT_SIZE[graph.dtype]
    assert shape.activation_bytes + weights == block_fused(graph).bytes


def test_mbconv():
    graph = mbconv(
        2, 5, 7, 24, 3, out_channels=40, group_width=4, squeeze_channels=3, activation="relu", dtype="bfloat16"
    )
    shape = MBConvShape(2, 5, 7, 24, 72, 40, 3, 4, "relu", residual=False, dtype="bfloat16")
    assert match_mbconv(graph) == shape
    assert match_mbconv(mbconv(1, 8, 8, 16, 4)) == MBConvShape(1, 8, 8, 16, 64, 16, 4, 8, "silu", True, "float16")
    assert match_mbconv(mbconv(1, 8, 8, 16, 4, kernel_size=5)).kernel_size == 5
    assert match_mbconv(mbconv(1, 8, 8, 16, 4, squeeze_activation="silu")).squeeze_activation == "silu"
    assert (shape.pixels, shape.pixel_bytes) == (2 * 5 * 7, 2 * (24 + 40))


@pytest.mark.parametrize(
    "graph",
    [
        mbconv(1, 8, 8, 16, 4, stride=2),
        mbconv(1, 8, 8, 16, 4, stride=2, blur=False),
        convfirst(1, 8, 8, 16, 4),
        ffn(1, 8, 8, 16, 4),
        conv(1, 8, 8, 16),
    ],
    ids=lambda graph: f"{graph.name}-{len(graph.ops)}",
)
def test_other_blocks_are_no_mbconv(graph):
    assert match_mbconv(graph) is None


def test_mbconv_of_stride_2():
    options = {"out_channels": 40, "group_width": 4, "squeeze_channels": 3, "activation": "relu", "dtype": "bfloat16"}
    graph = mbconv(2, 5, 8, 24, 3, stride=2, **options)
    shape = MBConvDownShape(2, 5, 8, 24, 72, 40, 3, 4, "relu", "bfloat16")
    assert match_mbconv_down(graph) == shape
    assert (shape.out_height, shape.out_width) == (3, 4)
    assert match_mbconv_down(mbconv(1, 8, 8, 16, 4, stride=2, kernel_size=5)).kernel_size == 5
    graph_of_silu = mbconv(2, 5, 8, 24, 3, stride=2, squeeze_activation="silu", **options)
    assert match_mbconv_down(graph_of_silu) == replace(shape, squeeze_activation="silu")
    strided = mbconv(2, 5, 8, 24, 3, stride=2, blur=False, **options)
    assert block_shape(strided) == match_mbconv_down(strided) == replace(shape, blur=False)
    assert block_fused(strided).bytes == block_fused(graph).bytes
    weights = sum(weight.size for weight in graph.weights()) * ELEMENT_SIZE[graph.dtype]
    assert shape.activation_bytes + weights == block_fused(graph).bytes


@pytest.mark.parametrize(
    "graph",
    [
        mbconv(1, 8, 8, 16, 4),
        mbconv(1, 8, 8, 16, 4, residual=False),
        mbconv(1, 1, 1, 16, 4, stride=2, residual=True),
        mbconv(1, 1, 1, 16, 4, stride=2, residual=True, blur=False),
        convfirst(1, 8, 8, 16, 4, stride=2),
        conv(1, 8, 8, 16),
    ],
    ids=lambda graph: f"{graph.name}-{len(graph.ops)}",
)
def test_other_blocks_are_no_mbconv_of_stride_2(graph):
    assert match_mbconv_down(graph) is None


def edited(graph, **replacements):
    """The graph with ops of other kinds, by name."""
    tensors = {tensor: tensor for tensor in graph.inputs}
    ops = []
    for op in graph.ops:
        kind = replacements.get(op.name, op.kind)
        ops.append(make_op(kind, op.name, tuple(tensors[tensor] for tensor in op.inputs), op.weights, op.stride))
        tensors[op.output] = ops[-1].output
    return BlockGraph(graph.name, tuple(ops), graph.inputs, (ops[-1].output,), graph.dtype)


@pytest.mark.parametrize(
    "name, kind",
    [
        ("expand_activation", OpKind.RELU),
        ("conv_activation", OpKind.SIGMOID),
        ("squeeze_activation", OpKind.SIGMOID),
        ("excite_activation", OpKind.RELU),
    ],
)
def test_mbconv_has_certain_activations(name, kind):
    for match, stride in ((match_mbconv, 1), (match_mbconv_down, 2)):
        graph = mbconv(1, 8, 8, 16, 4, stride=stride)
        assert edited(graph) == graph and match(graph)
        assert match(edited(graph, **{name: kind})) is None


def test_options_are_what_a_block_computes_besides_sizes():
    options = {"activation": "relu", "residual": False, "squeeze_activation": "silu"}
    assert options_of(match_mbconv(mbconv(1, 8, 8, 16, 4, **options))) == options
    assert options_of(block_shape(ffn(1, 8, 8, 16, 4))) == {"activation": "relu", "residual": True}


def test_the_gate_is_of_the_convolution_and_the_residual_of_the_input():
    graph = mbconv(1, 8, 8, 16, 1)
    h, gate = graph.op("expand_activation").output, graph.op("excite_activation").output
    *before, _, project, _ = graph.ops
    wrong_gate = make_op(OpKind.MULTIPLY, "gate", (h, gate))
    wrong_residual = make_op(OpKind.ADD, "residual", (h, project.output))
    ops = (*before, wrong_gate, *graph.ops[-2:])
    assert match_mbconv(BlockGraph("mbconv", ops, graph.inputs, graph.outputs)) is None
    ops = (*graph.ops[:-1], wrong_residual)
    assert match_mbconv(BlockGraph("mbconv", ops, graph.inputs, (wrong_residual.output,))) is None

import csv
from pathlib import Path

import pytest

from fusion.planner.blocks import ACTIVATIONS, conv, convfirst, ffn, head, mbconv
from fusion.planner.graph import OpKind
from fusion.planner.lower import block_fused
from fusion.planner.match import ConvFirstShape, match_convfirst
from fusion.planner.plan import block_shape

PAPER = Path(__file__).parents[2] / "bench" / "paper"


def read_rows(name):
    with open(PAPER / name, newline="") as file:
        return list(csv.DictReader(file))


def build(row):
    height, width, stride = int(row["height"]), int(row["width"]), int(row["stride"])
    channels, out_channels, kernel_size = int(row["in_channels"]), int(row["out_channels"]), int(row["kernel"])
    if row["block"] == "Stem":
        return conv(1, height, width, channels, out_channels, kernel_size, stride, activation="relu")
    block = {"ConvFirst": convfirst, "MBConv": mbconv}[row["block"]]
    return block(
        1,
        height,
        width,
        channels,
        hidden_channels=int(row["hidden_channels"]),
        out_channels=out_channels,
        stride=stride,
        group_width=int(row["group_width"]),
        kernel_size=kernel_size,
    )


def mops(graph, *names):
    return sum(op.ops_count for op in graph.ops if op.name in names) / 1e6


@pytest.mark.parametrize(
    "row", read_rows("tables5to8_layers.csv"), ids=lambda r: "-".join([*list(r.values())[:4], r["in_channels"]])
)
def test_ops_of_every_layer_of_the_paper(row):
    graph = build(row)
    columns = {
        "conv_mops": mops(graph, "conv"),
        "expand_mops": mops(graph, "expand"),
        "project_mops": mops(graph, "project"),
        "se_mops": mops(graph, "squeeze", "excite"),
    }
    for column, value in columns.items():
        assert value == pytest.approx(float(row[column]), abs=0.005 + 1e-9), column
    total = int(row["depth"]) * sum(columns.values())
    assert total == pytest.approx(float(row["total_mops"]), abs=0.005 + 1e-9)
    assert graph.outputs[0]["H"] * int(row["stride"]) == int(row["height"])


@pytest.mark.parametrize("row", read_rows("tables5to8_layers.csv"))
def test_expansion_is_relative_to_the_input_channels(row):
    if row["alpha"]:
        assert int(row["hidden_channels"]) == int(row["alpha"]) * int(row["in_channels"])
        block = {"ConvFirst": convfirst, "MBConv": mbconv}[row["block"]]
        graph = block(1, 8, 8, int(row["in_channels"]), int(row["alpha"]), stride=int(row["stride"]))
        assert graph.op("expand").output["C"] == int(row["hidden_channels"])


def test_convfirst_stride_2_feeds_the_ffn_with_input_and_convolution():
    graph = convfirst(2, 9, 8, 16, 6, out_channels=32, stride=2)
    assert [op.kind for op in graph.ops] == [
        OpKind.CONV,
        OpKind.CONCAT,
        OpKind.BLURPOOL,
        OpKind.CONV,
        OpKind.RELU,
        OpKind.CONV,
    ]
    assert graph.op("conv").output["H"] == 9
    assert graph.op("expand").inputs[0].dims == (("N", 2), ("H", 5), ("W", 4), ("C", 32))
    assert graph.op("expand").output["C"] == 96
    assert graph.outputs[0]["C"] == 32


def test_mbconv_stride_2_pools_the_blurred_convolution():
    graph = mbconv(1, 32, 32, 48, 4, out_channels=128, stride=2)
    assert graph.op("conv").output["H"] == 32
    assert graph.op("pool").inputs == (graph.op("blurpool").output,)
    assert graph.op("squeeze").output["C"] == 12
    assert graph.ops[-1].name == "project"


def test_mbconv_stride_2_without_a_blur_convolves_at_half_the_resolution():
    blurred, graph = (mbconv(2, 7, 9, 16, 4, out_channels=24, stride=2, blur=blur) for blur in (True, False))
    assert [op.kind for op in graph.ops] == [op.kind for op in blurred.ops if op.kind is not OpKind.BLURPOOL]
    assert graph.op("conv").output.dims == (("N", 2), ("H", 4), ("W", 5), ("C", 64))
    assert graph.op("conv").ops_count == 2 * 2 * 4 * 5 * 64 * 8 * 9
    assert graph.op("pool").inputs == (graph.op("conv_activation").output,)
    assert graph.outputs == blurred.outputs
    assert blurred.ops_count - graph.ops_count == 2 * 2 * (7 * 9 - 4 * 5) * 64 * 8 * 9
    assert mbconv(1, 8, 8, 16, 4, blur=False) == mbconv(1, 8, 8, 16, 4)


@pytest.mark.parametrize("stride", [1, 2])
def test_mbconv_has_an_activation_inside_of_squeeze_and_excitation(stride):
    assert mbconv(1, 8, 8, 16, 4, stride=stride).op("squeeze_activation").kind is OpKind.RELU
    graph = mbconv(1, 8, 8, 16, 4, stride=stride, activation="relu", squeeze_activation="silu")
    kinds = [graph.op(f"{name}_activation").kind for name in ("expand", "conv", "squeeze", "excite")]
    assert kinds == [OpKind.RELU, OpKind.RELU, OpKind.SILU, OpKind.SIGMOID]
    with pytest.raises(ValueError, match="activation 'swish' is not supported, use one of relu"):
        mbconv(1, 8, 8, 16, 4, stride=stride, squeeze_activation="swish")


def test_residual_defaults_to_what_the_shape_allows():
    for block in (ffn, convfirst, mbconv):
        assert block(1, 8, 8, 16, 2).ops[-1].kind is OpKind.ADD
        assert block(1, 8, 8, 16, 2, out_channels=24).ops[-1].name == "project"
        assert block(1, 8, 8, 16, 2, residual=False).ops[-1].name == "project"
        with pytest.raises(ValueError, match="asked for 16 input channels, 24 output channels"):
            block(1, 8, 8, 16, 2, out_channels=24, residual=True)
    with pytest.raises(ValueError, match="stride 2; a residual needs equal channels and stride 1"):
        convfirst(1, 8, 8, 16, 2, stride=2, residual=True)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"n": 0, "expansion": 2}, "n must be a positive integer, got 0"),
        ({"h": 2.5, "expansion": 2}, "h must be a positive integer, got 2.5"),
        ({"expansion": 0}, "expansion must be a positive integer"),
        ({"hidden_channels": -8}, "hidden_channels must be a positive integer"),
        ({}, "give exactly one of the two"),
        ({"expansion": 2, "hidden_channels": 32}, "give exactly one of the two"),
        ({"expansion": 2, "out_channels": 0}, "out_channels must be a positive integer"),
        ({"channels": 20, "expansion": 2}, "20 channels do not divide into groups of 8; use a multiple of 8"),
        ({"expansion": 2, "stride": 3}, "stride 3 is not supported, use 1 or 2"),
        (
            {"expansion": 2, "activation": "elu"},
            "'elu' is not supported, use one of relu, silu, relu6, gelu, hardswish",
        ),
        ({"expansion": 2, "kernel_size": 4}, "odd-sized, got 4x4"),
        ({"expansion": 2, "dtype": "float64"}, "'float64' is not supported"),
    ],
)
def test_parameters_are_validated(arguments, message):
    with pytest.raises(ValueError, match=message):
        convfirst(**{"n": 1, "h": 8, "w": 8, "channels": 16, **arguments})


def test_convfirst_is_recovered_from_its_structure():
    graph = convfirst(2, 9, 7, 24, 3, out_channels=32, group_width=12, activation="silu", dtype="bfloat16")
    assert match_convfirst(graph) == ConvFirstShape(2, 9, 7, 24, 72, 32, 12, "silu", False, "bfloat16", 3)
    shape = match_convfirst(convfirst(1, 8, 8, 16, hidden_channels=40, kernel_size=5))
    assert (shape.hidden_channels, shape.residual, shape.kernel_size) == (40, True, 5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_recovered(activation):
    options = {"activation": activation}
    graphs = [convfirst(1, 8, 8, 16, 2, **options), convfirst(1, 8, 8, 16, 2, stride=2, **options)]
    graphs += [mbconv(1, 8, 8, 16, 2, **options), mbconv(1, 8, 8, 16, 2, stride=2, **options)]
    graphs += [conv(1, 8, 8, 3, 16, stride=2, **options), head(1, 8, 8, 16, 32, **options)]
    for graph in graphs:
        assert block_shape(graph).activation == activation


def test_convfirst_of_stride_2_without_a_blur_pool():
    graph = convfirst(2, 9, 6, 24, 3, out_channels=32, stride=2, blur=False)
    assert [op.name for op in graph.ops] == ["conv", "expand", "activation", "project"]
    assert graph.op("conv").output.dims == (("N", 2), ("H", 5), ("W", 3), ("C", 24))
    assert graph.ops_count == 2 * 2 * 5 * 3 * (9 * 8 * 24 + 24 * 72 + 72 * 32)
    shape = match_convfirst(graph)
    assert shape == ConvFirstShape(2, 9, 6, 24, 72, 32, 8, "relu", False, "float16", stride=2)
    assert (shape.out_height, shape.out_width) == (5, 3)
    assert shape.activation_bytes == 2 * 2 * (9 * 6 * 24 + 5 * 3 * 32)
    assert block_fused(graph).bytes == shape.activation_bytes + 2 * sum(weight.size for weight in graph.weights())
    assert convfirst(1, 8, 8, 16, 2, blur=False) == convfirst(1, 8, 8, 16, 2)
    assert match_convfirst(convfirst(1, 1, 1, 16, 2, stride=2, blur=False, residual=True)) is None


@pytest.mark.parametrize(
    "graph",
    [
        ffn(1, 8, 8, 16, 2),
        convfirst(1, 8, 8, 16, 2, stride=2),
        mbconv(1, 8, 8, 16, 2),
        conv(1, 8, 8, 16),
        convfirst(1, 8, 8, 16, 2, kernel_size=1),
    ],
    ids=["ffn", "stride-2", "mbconv", "conv", "1x1"],
)
def test_other_blocks_are_not_convfirst(graph):
    assert match_convfirst(graph) is None

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from fusion.modules import FusedConvFirst
from fusion.planner.hopper_tile import HopperTile
from fusion.planner.plan import PlanError, plan_block
from fusion.planner.tile import ConvFirstTile
from models import MBConv


@pytest.fixture
def block(random_block):
    return random_block(24, 24, expansion=3)


@pytest.fixture
def fused(block, fold):
    return FusedConvFirst(fold(block), activation="relu", residual=True)


@pytest.mark.parametrize(
    "out_channels, activation, stride",
    [(24, nn.ReLU, 1), (40, nn.SiLU, 1), (24, nn.ReLU6, 1), (24, nn.GELU, 2), (40, nn.Hardswish, 2)],
)
def test_equals_the_block_in_fp32(out_channels, activation, stride, random_block):
    block = random_block(24, out_channels, expansion=3, activation=activation, stride=stride, blur=False)
    fused = block.fused()
    assert type(fused) is FusedConvFirst and fused.stride == stride
    x = torch.randn(2, 24, 5, 7)
    torch.testing.assert_close(fused(x), block(x), rtol=1e-5, atol=1e-5)
    assert fused(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_error_in_16_bits(dtype, block, fused, device, assert_within_rule):
    x = torch.randn(2, 24, 9, 11).to(device, dtype)
    exact = block.to(device, torch.float64)(x.double())
    assert_within_rule(fused(x), block.to(dtype)(x), exact)


def test_plans_once_for_each_shape_and_dtype(fold, block):
    graphs = []

    def tuner(graph, processor):
        graphs.append(graph)
        return plan_block(graph, processor)

    fused = FusedConvFirst(fold(block), activation="relu", residual=True, tuner=tuner)
    small, large = torch.randn(1, 24, 5, 7), torch.randn(2, 24, 9, 9)
    plans = [fused.plan(x) for x in (small, large, small)]
    assert plans[0] is plans[2]
    assert (plans[1].shape.batch, plans[1].shape.height, plans[1].shape.width) == (2, 9, 9)
    assert plans[0].shape == replace(plans[1].shape, batch=1, height=5, width=7)
    fused(large)
    assert len(graphs) == 2
    assert fused.plan(small.bfloat16()).shape.dtype == "bfloat16"
    assert len(graphs) == 3


def test_weights_are_packed_once_for_each_layout(fold, block):
    tiles = {5: ConvFirstTile(4, 8, 16, 16, 1), 6: ConvFirstTile(8, 8, 16, 16, 1), 7: ConvFirstTile(4, 8, 32, 32, 1)}
    fused = FusedConvFirst(
        fold(block),
        activation="relu",
        residual=True,
        tuner=lambda graph, processor: plan_block(graph, processor, tiles[graph.inputs[0]["H"]]),
    )
    for height, layouts in ((5, 1), (6, 1), (7, 2), (5, 2)):
        x = torch.randn(1, 24, height, 7)
        torch.testing.assert_close(fused(x), block(x), rtol=1e-5, atol=1e-5)
        assert len(fused._packed) == layouts


def test_the_type_of_the_tile_says_which_kernel_runs(fold, block):
    tiles = {
        5: ConvFirstTile(4, 8, 16, 16, 1),
        6: HopperTile(64, 16, 3, 1, 1, 32, 0),
        7: HopperTile(128, 16, 4, 2, 1, 32, 0),
    }
    fused = FusedConvFirst(
        fold(block),
        activation="relu",
        residual=True,
        tuner=lambda graph, processor: plan_block(graph, "h200", tiles[graph.inputs[0]["H"]]),
    )
    for height, kernel, layouts in ((5, "convfirst", 1), (6, "convfirst_hopper", 2), (7, "convfirst_hopper", 2)):
        x = torch.randn(1, 24, height, 7)
        assert fused.plan(x).kernel == kernel
        torch.testing.assert_close(fused(x), block(x), rtol=1e-5, atol=1e-5)
        assert len(fused._packed) == layouts
        compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            assert torch.equal(compiled(x), fused(x))


def test_a_copy_computes_the_same(fused):
    x = torch.randn(1, 24, 5, 7)
    expected = fused(x)
    twin = copy.deepcopy(fused)
    assert torch.equal(twin(x), expected)
    fused.weights.project.zero_()
    fused._packed.clear()
    assert torch.equal(twin(x), expected)
    assert not torch.equal(fused(x), expected)


def test_has_no_parameters_and_prints_its_sizes(fused):
    assert not list(fused.parameters()) and not fused.state_dict()
    assert repr(fused) == (
        "FusedConvFirst(24, 24, hidden_channels=72, activation='relu', residual=True, stride=1, group_width=8)"
    )


def test_mbconv_compiles_as_one_graph_and_prints_its_sizes():
    torch.manual_seed(0)
    options = {"expansion": 3, "se_ratio": 0.125, "squeeze_activation": nn.SiLU}
    block = MBConv(24, 24, **options).eval().requires_grad_(False)
    fused = block.fused()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    for size in ((2, 24, 5, 7), (3, 24, 6, 6)):
        x = torch.randn(*size)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), block(x), rtol=1e-5, atol=1e-5)
    assert repr(fused) == (
        "FusedMBConv(24, 24, hidden_channels=72, activation='silu', residual=True, squeeze_activation='silu', "
        "squeeze_channels=3, group_width=8)"
    )


@pytest.mark.parametrize("size", [(1, 16, 5, 7), (24, 5, 7)])
def test_inputs_of_another_shape_are_refused(size, fused):
    with pytest.raises(ValueError, match=r"FusedConvFirst: the input must be \[N, 24, H, W\], got \["):
        fused(torch.randn(*size))


def test_a_block_of_stride_2_has_no_residual(fold, block):
    fused = FusedConvFirst(fold(block), activation="relu", residual=True, stride=2)
    with pytest.raises(ValueError, match="a residual needs equal channels and stride 1"):
        fused(torch.randn(1, 24, 5, 7))


def test_blocks_without_a_tile_are_refused(random_block, fold):
    block = random_block(12, 12, expansion=2, group_width=4)
    fused = FusedConvFirst(fold(block), activation="relu", residual=True)
    with pytest.raises(PlanError, match="in_channels=12 is not supported, use a multiple of 8"):
        fused(torch.randn(1, 12, 5, 7))


def test_compiles_as_one_graph(fused):
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    for size in ((2, 24, 5, 7), (3, 24, 6, 6)):
        x = torch.randn(*size)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), fused(x), rtol=1e-6, atol=1e-6)


def test_an_empty_batch(fused):
    assert fused(torch.randn(0, 24, 5, 7)).shape == (0, 24, 5, 7)


def test_weights_packed_in_inference_mode_serve_other_modes(fused):
    x = torch.randn(2, 24, 5, 7)
    with torch.inference_mode():
        expected = fused(x)
    with torch.no_grad():
        assert torch.equal(torch.compile(fused, backend="aot_eager")(x), expected)

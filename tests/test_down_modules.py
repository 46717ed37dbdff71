import copy
from dataclasses import replace

import pytest
import torch

from fusion.down_modules import FusedConvFirstDown
from fusion.planner.convfirst_down_tile import ConvFirstDownTile
from fusion.planner.plan import PlanError, plan_block

TILE = ConvFirstDownTile(32, 32, 16, 2)


def portable(graph, processor):
    return plan_block(graph, processor, kernel="convfirst_down")


@pytest.fixture
def block(random_block):
    return random_block(24, 48, expansion=3, stride=2)


@pytest.fixture
def fused(block):
    return block.fused(portable)


@pytest.mark.parametrize("size", [(5, 7), (6, 8), (2, 9)])
@pytest.mark.parametrize("activation", [torch.nn.ReLU, torch.nn.SiLU])
def test_equals_the_block_in_fp32(activation, size, random_block):
    block = random_block(24, 40, expansion=3, stride=2, activation=activation, group_width=4)
    fused = block.fused()
    assert type(fused) is FusedConvFirstDown
    x = torch.randn(2, 24, *size)
    torch.testing.assert_close(fused(x), block(x), rtol=1e-5, atol=1e-5)
    assert fused(x).is_contiguous(memory_format=torch.channels_last)


def test_equal_channels_add_no_residual(random_block):
    block = random_block(24, 24, expansion=3, stride=2)
    x = torch.randn(1, 24, 6, 6)
    torch.testing.assert_close(block.fused()(x), block(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_error_in_16_bits(dtype, block, fused, device, assert_within_rule):
    x = torch.randn(2, 24, 9, 12).to(device, dtype)
    exact = block.to(device, torch.float64)(x.double())
    assert_within_rule(fused(x), block.to(dtype)(x), exact)


def test_the_plan_is_of_the_block_and_of_the_shape(fused):
    x = torch.randn(2, 24, 9, 12)
    plan = fused.plan(x)
    shape = plan.shape
    sizes = (shape.batch, shape.height, shape.width, shape.in_channels, shape.hidden_channels, shape.out_channels)
    assert sizes == (2, 9, 12, 24, 72, 48)
    assert (plan.kernel, shape.dtype, shape.group_width) == ("convfirst_down", "float16", 8)
    assert fused.plan(x) is plan
    assert fused.plan(x.bfloat16()).shape == replace(shape, dtype="bfloat16")


def test_weights_are_packed_once_for_each_layout(block):
    tiles = {5: TILE, 6: replace(TILE, pixels=64), 7: replace(TILE, conv_slab=32)}
    fused = block.fused(lambda graph, processor: plan_block(graph, processor, tiles[graph.inputs[0]["H"]]))
    for height, layouts in ((5, 1), (6, 1), (7, 2), (5, 2)):
        x = torch.randn(1, 24, height, 7)
        torch.testing.assert_close(fused(x), block(x), rtol=1e-5, atol=1e-5)
        assert len(fused._packed) == layouts


def test_compiles_as_one_graph(fused):
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    for size in ((2, 24, 5, 7), (3, 24, 6, 6)):
        x = torch.randn(*size)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), fused(x), rtol=1e-6, atol=1e-6)


def test_an_empty_batch(fused):
    assert fused(torch.randn(0, 24, 5, 7)).shape == (0, 48, 3, 4)


def test_a_copy_computes_the_same(fused):
    x = torch.randn(1, 24, 5, 7)
    expected = fused(x)
    assert torch.equal(copy.deepcopy(fused)(x), expected)


def test_has_no_parameters_and_prints_its_sizes(fused):
    assert not list(fused.parameters()) and not fused.state_dict()
    assert repr(fused) == (
        "FusedConvFirstDown(24, 48, hidden_channels=72, activation='relu', residual=False, group_width=8)"
    )


@pytest.mark.parametrize("size", [(1, 16, 5, 7), (24, 5, 7)])
def test_inputs_of_another_shape_are_refused(size, fused):
    with pytest.raises(ValueError, match=r"FusedConvFirstDown: the input must be \[N, 24, H, W\], got \["):
        fused(torch.randn(*size))


def test_images_that_cannot_be_reflected_are_refused(block):
    with pytest.raises(PlanError, match="1x7 pixels cannot be blur-pooled"):
        block.fused()(torch.randn(1, 24, 1, 7))


def test_weights_of_stride_1_are_refused(random_weights):
    with pytest.raises(ValueError, match=r"of a block with a blur-pool, whose expansion has 48 inputs, got 24"):
        FusedConvFirstDown(random_weights(24, 72), activation="relu")

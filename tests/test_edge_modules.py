import copy

import pytest
import torch
from torch import nn

from fusion.edge_modules import FusedHead, FusedStem
from fusion.planner.plan import PlanError, plan_block
from models import ConvBnAct, PooledHead


def random_statistics(block):
    torch.manual_seed(0)
    nn.init.uniform_(block.bn.weight, 0.5, 1.5)
    nn.init.normal_(block.bn.bias)
    block.bn.running_mean.normal_()
    block.bn.running_var.uniform_(0.5, 2.0)
    return block.eval().requires_grad_(False)


@pytest.fixture
def stem():
    return random_statistics(ConvBnAct(3, 24, 3, stride=2))


@pytest.fixture
def head():
    return random_statistics(PooledHead(24, 40))


@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU, nn.Identity])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_equal_the_blocks_in_fp32(activation, layout):
    stem = random_statistics(ConvBnAct(3, 24, 3, stride=2, activation=activation))
    head = random_statistics(PooledHead(24, 40, activation=activation))
    x = torch.randn(2, 3, 9, 13).contiguous(memory_format=layout)
    out = stem.fused()(x)
    torch.testing.assert_close(out, stem(x), rtol=1e-5, atol=1e-5)
    assert out.is_contiguous(memory_format=torch.channels_last)
    fused = head.fused()
    torch.testing.assert_close(fused(out), head(out), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fused.features(out), head.features(out), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name, channels", [("stem", 3), ("head", 24)])
def test_error_in_16_bits(name, channels, dtype, device, request, assert_within_rule):
    block = request.getfixturevalue(name)
    fused = block.fused()
    x = torch.randn(2, channels, 9, 11).to(device, dtype)
    exact = block.to(device, torch.float64)(x.double())
    assert_within_rule(fused(x), block.to(dtype)(x), exact)


def test_features_have_the_dtype_of_their_input(head):
    fused = head.fused()
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        assert fused.features(torch.randn(1, 24, 3, 3).to(dtype)).dtype == dtype
    assert len(fused._unpacked) == 2


def test_print_their_sizes_and_have_no_parameters(stem, head):
    assert repr(stem.fused()) == "FusedStem(3, 24, activation='relu')"
    assert repr(head.fused()) == "FusedHead(24, 40, activation='silu')"
    for fused in (stem.fused(), head.fused()):
        assert not list(fused.parameters()) and not fused.state_dict()


def test_plan_once_for_each_shape_and_dtype(stem):
    graphs = []

    def tuner(graph, processor):
        graphs.append(graph)
        return plan_block(graph, processor)

    fused = stem.fused(tuner)
    for size in ((2, 3, 9, 13), (2, 3, 9, 13), (1, 3, 8, 8)):
        fused(torch.randn(*size))
        fused(torch.randn(*size).contiguous(memory_format=torch.channels_last))
    assert [graph.inputs[0].dims for graph in graphs] == [
        (("N", 2), ("H", 9), ("W", 13), ("C", 3)),
        (("N", 1), ("H", 8), ("W", 8), ("C", 3)),
    ]
    assert fused.plan(torch.empty(2, 3, 9, 13)).kernel == "stem"


def test_copies_compute_the_same(stem, head):
    x, y = torch.randn(1, 3, 5, 7), torch.randn(1, 24, 5, 7)
    for fused, block, each in ((stem.fused(), stem, x), (head.fused(), head, y)):
        fused(each)
        torch.testing.assert_close(copy.deepcopy(fused)(each), block(each), rtol=1e-5, atol=1e-5)


def test_compile_as_one_graph(stem, head):
    network, fused = nn.Sequential(stem, head), nn.Sequential(stem.fused(), head.fused())
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    features = torch.compile(fused[1].features, fullgraph=True, backend="aot_eager")
    for size in ((2, 3, 5, 7), (3, 3, 6, 6)):
        x = torch.randn(*size)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), network(x), rtol=1e-5, atol=1e-5)
            y = stem(x)
            torch.testing.assert_close(features(y), head.features(y), rtol=1e-5, atol=1e-5)


def test_inputs_of_another_shape_are_refused(stem, head):
    with pytest.raises(ValueError, match=r"FusedStem: the input must be \[N, 3, H, W\], got \[1, 4, 5, 7\]"):
        stem.fused()(torch.randn(1, 4, 5, 7))
    with pytest.raises(ValueError, match=r"FusedHead: the input must be \[N, 24, H, W\], got \[24, 5, 7\]"):
        head.fused()(torch.randn(24, 5, 7))


def test_channels_without_a_kernel_are_refused():
    stem = random_statistics(ConvBnAct(3, 12, 3, stride=2)).fused()
    assert isinstance(stem, FusedStem)
    with pytest.raises(PlanError, match="out_channels=12 is not supported, use a multiple of 8"):
        stem(torch.randn(1, 3, 5, 7))
    head = random_statistics(PooledHead(12, 40)).fused()
    assert isinstance(head, FusedHead)
    with pytest.raises(PlanError, match="in_channels=12 is not supported, use a multiple of 8"):
        head(torch.randn(1, 12, 5, 7))

"""What the paper says of whole networks on an RTX A5000, batch 128, fp16 (figures 3, 15 and 16)."""

from functools import cache

import pytest
import torch

import fusion
from fusion.planner.layer_kind import LayerKind
from fusion.planner.op_byte_sweep import sweep
from fusion.planner.waterline import Waterline
from models import create_model
from tests.analysis import known_networks
from tests.analysis.known_networks import efficientnet_b5

FIGURE3 = {
    "resnet101": (224, 76, 7.8),
    "efficientnetv2_s": (384, 43, 8.3),
    "convnext_small": (288, 72, 14.4),
}
"""Height = width in pixels, maximum efficiency in percent, and 10^9 multiply-accumulates an image in the figure."""

TIMM = {"resnet101": "resnet101", "efficientnetv2_s": "tf_efficientnetv2_s", "convnext_small": "convnext_small"}


@cache
def network_waterline(network, size):
    with torch.device("meta"):
        model = network().eval()
    return fusion.waterline(model, torch.empty(128, 3, size, size, device="meta"), "a5000", progress=False)


def convfirst_small():
    return create_model("convfirstnet_small")


def check_figure3(line: Waterline, percent, macs):
    assert 100 * line.max_efficiency == pytest.approx(percent, abs=3)
    assert line.ops_count / 2 / 128 / 1e9 == pytest.approx(macs, rel=0.02)


@pytest.mark.parametrize("name", FIGURE3)
def test_figure_3(name):
    size, percent, macs = FIGURE3[name]
    found = network_waterline(getattr(known_networks, name), size)
    check_figure3(found.layerwise, percent, macs)
    assert found.unknown == ()


@pytest.mark.parametrize("name", FIGURE3)
def test_figure_3_with_the_networks_of_timm(name):
    timm = pytest.importorskip("timm")
    size, percent, macs = FIGURE3[name]
    with torch.device("meta"):
        model = timm.create_model(TIMM[name]).eval()
    found = fusion.waterline(model, torch.empty(128, 3, size, size, device="meta"), "a5000", progress=False)
    check_figure3(found.layerwise, percent, macs)
    ours = network_waterline(getattr(known_networks, name), size).layerwise
    assert found.layerwise.ops_count == pytest.approx(ours.ops_count, rel=0.01)
    assert found.layerwise.bytes == pytest.approx(ours.bytes, rel=0.02)


def test_efficientnet_b5_is_less_efficient_here_than_in_figure_3():
    """The paper has 30 %. It comes near that only if squeeze-and-excitation moves nothing, which is no layer-wise
    execution: its gates read and write the hidden tensors, and its pools read them."""
    line = network_waterline(efficientnet_b5, 448).layerwise
    assert 100 * line.max_efficiency == pytest.approx(18.4, abs=0.5)
    others = [kernel for kernel in line.kernels if kernel.layer_kind is not LayerKind.OTHER]
    assert 100 * Waterline(line.processor, tuple(others)).max_efficiency == pytest.approx(28.6, abs=0.5)


def test_figure_15():
    found = network_waterline(convfirst_small, 256)
    assert 100 * found.layerwise.max_efficiency == pytest.approx(36, abs=1.5)
    assert 100 * found.fused.max_efficiency == pytest.approx(97, abs=1.5)
    assert all(block.kernel for block in found.blocks)
    assert len(found.blocks) == 51  # 49 blocks, stem and head


def test_figure_16():
    (point,) = sweep(network_waterline(convfirst_small, 256).fused, [500])
    assert 100 * point.waterline_efficiency == pytest.approx(80, abs=4)


def test_figure_4():
    """The roofline of the mediant promises too much where some kernels are memory-bound, and others are not."""
    resnet = network_waterline(known_networks.resnet101, 224).layerwise
    assert resnet.mediant_efficiency == 1.0
    b5 = network_waterline(efficientnet_b5, 448).layerwise
    assert b5.mediant_efficiency - b5.max_efficiency < 0.02

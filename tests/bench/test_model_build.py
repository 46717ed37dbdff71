"""Networks to compile, as they are built."""

import pytest
import torch
from torch import nn

from fusion.bench.model_build import build_model, channels_last, randomise_constants
from fusion.bench.model_case import ModelCase


def test_constants_become_random():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    model.register_parameter("scale", nn.Parameter(torch.full((4,), 1e-6)))
    model.register_parameter("gain", nn.Parameter(torch.zeros(())))
    model.register_parameter("empty", nn.Parameter(torch.zeros(0)))
    weight = model[0].weight.clone()
    randomise_constants(model, seed=0)
    assert torch.equal(model[0].weight, weight), "what is random stays"
    assert model[1].bias.unique().numel() == 4 and abs(model[1].weight - 1).max() < 0.5
    assert model.scale.abs().min() > 1e-4 and model.gain != 0


def test_other_convolutions_keep_their_layout():
    model = channels_last(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv3d(3, 4, 3), nn.Conv1d(3, 4, 3)))
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert model[1].weight.is_contiguous()


def test_a_network_is_calibrated():
    case = ModelCase("convfirstnet_pico:num_classes=7", batch=2, size=32)
    model = build_model(case, "cpu", calibration_images=4, calibration_batches=2)
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    logits = model(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 7) and logits.isfinite().all() and logits.std() > 0.1
    assert model.stages[3][2].project_bn.running_var.std() > 0
    again = build_model(case, "cpu", calibration_images=4, calibration_batches=2)
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))


def test_the_network_of_convfirst_blocks():
    pytest.importorskip("timm", exc_type=Exception)
    from timm.models._efficientnet_blocks import UniversalInvertedResidual

    model = build_model(ModelCase("convfirst_uir:num_classes=5", batch=2, size=64), "cpu", 4, 1)
    blocks = [module for module in model.modules() if isinstance(module, UniversalInvertedResidual)]
    assert len(blocks) == 18 and sum(block.has_skip for block in blocks) == 14
    for block in blocks:
        conv = block.dw_start.conv
        assert conv.in_channels // conv.groups == 8 and isinstance(block.dw_mid, nn.Identity)
    assert model.forward_features(torch.randn(1, 3, 64, 64)).shape[2:] == (2, 2)
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 5)

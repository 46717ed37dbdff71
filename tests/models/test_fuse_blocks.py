"""Networks with fused blocks."""

import logging
from functools import partial

import pytest
import torch
from torch import nn

from fusion.down_modules import FusedConvFirstDown, FusedMBConvDown
from fusion.edge_modules import FusedHead, FusedStem
from fusion.modules import FusedBlock, FusedConvFirst, FusedMBConv
from fusion.planner.plan import PlanError
from fusion.stem_convfirst_module import FusedStemConvFirst
from models import ConvFirst, MBConv, create_model, fuse_blocks


def test_the_fused_network_computes_the_same():
    torch.manual_seed(0)
    model = create_model("convfirstnet_pico", num_classes=10).eval()
    fused = fuse_blocks(model)
    x = torch.randn(2, 3, 37, 41)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["convfirstnet_pico", "convfirstnet_tiny"])
def test_create_model_fuses_every_block(name, caplog):
    with caplog.at_level(logging.WARNING):
        model = create_model(name, num_classes=10, fused=True)
    twins = {name: type(module) for name, module in model.module.named_modules() if isinstance(module, FusedBlock)}
    expected = {"head": FusedHead}
    for stage, depth in enumerate(model.config.depths):
        same, down = (FusedConvFirst, FusedConvFirstDown) if stage < 3 else (FusedMBConv, FusedMBConvDown)
        expected |= {f"stages.{stage}.{i}": down if stage and not i else same for i in range(depth)}
    first = {"stem": FusedStem, "block": expected.pop("stages.0.0"), "together": FusedStemConvFirst}
    expected |= {f"stages.0.0.{name}": twin for name, twin in first.items()}
    assert twins == expected
    assert not model.left_eager and not caplog.text
    assert not model.training
    assert [name for name, _ in model.named_parameters()] == ["module.classifier.weight", "module.classifier.bias"]


def test_parts_of_the_fused_network():
    """Feature maps, pre-logits and what describes the network are those of the original."""
    torch.manual_seed(0)
    model = create_model("convfirstnet_pico", num_classes=10).eval().double()
    fused = fuse_blocks(model)
    x = torch.randn(2, 3, 37, 41, dtype=torch.float64)
    with torch.no_grad():
        features = fused.forward_features(x)
        torch.testing.assert_close(features, model.forward_features(x))
        for pre_logits in (False, True):
            torch.testing.assert_close(
                fused.forward_head(features, pre_logits), model.forward_head(model.forward_features(x), pre_logits)
            )
    assert fused.feature_info == model.feature_info
    assert fused.default_cfg == model.default_cfg and fused.num_features == model.num_features


def test_feature_extractor():
    torch.manual_seed(0)
    options = {"features_only": True, "out_indices": (0, 2, 4)}
    model = create_model("convfirstnet_pico", **options).eval().double()
    fused = fuse_blocks(model, example_input=torch.randn(1, 3, 37, 41, dtype=torch.float64))
    x = torch.randn(2, 3, 50, 33, dtype=torch.float64)
    with torch.no_grad():
        for feature, expected in zip(fused(x), model(x), strict=True):
            torch.testing.assert_close(feature, expected)
    assert fused.feature_info.reduction() == [2, 8, 32]
    assert not fused.left_eager
    assert isinstance(create_model("convfirstnet_pico", fused=True, **options).stem, FusedStem)


def test_the_original_stays_as_it_was():
    model = create_model("convfirstnet_pico", num_classes=10).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fuse_blocks(model)
    assert model.training
    assert isinstance(model.stages[0][0], ConvFirst)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_block_in_training_mode_is_not_fused():
    for block in (ConvFirst(16, 16, expansion=3), MBConv(16, 16)):
        with pytest.raises(RuntimeError, match=r"training mode cannot be fused; call eval\(\) first"):
            block.train().fused()


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (
            ConvFirst(16, 16, expansion=6, activation=nn.Mish),
            r"ConvFirst with Mish\(\); supported are ReLU or SiLU or ReLU6 or GELU or Hardswish, of GELU the exact one",
        ),
        (
            ConvFirst(16, 32, expansion=6, stride=2, activation=partial(nn.GELU, approximate="tanh")),
            r"ConvFirst with GELU\(approximate='tanh'\); supported are",
        ),
        (MBConv(16, 16, activation=nn.Mish), r"MBConv with Mish\(\); supported are ReLU or SiLU"),
        (
            MBConv(16, 16, squeeze_activation=nn.GELU),
            "MBConv with GELU inside of squeeze-and-excitation; supported are ReLU or SiLU",
        ),
        (MBConv(16, 32, stride=2, activation=nn.Mish), r"MBConv with Mish\(\); supported are"),
    ],
)
def test_a_block_without_a_kernel_says_what_is_supported(block, message):
    with pytest.raises(PlanError, match=message):
        block.eval().fused()


def test_a_tuner_makes_the_plans():
    asked = []

    def tuner(graph, processor):
        from fusion.planner.plan import plan_block

        asked.append(graph.inputs[0].dims)
        return plan_block(graph, processor)

    block = ConvFirst(16, 16, expansion=3).eval().fused(tuner)
    with torch.no_grad():
        block(torch.randn(1, 16, 5, 5))
        block(torch.randn(1, 16, 5, 5))
        block(torch.randn(2, 16, 5, 5))
    assert len(asked) == 2

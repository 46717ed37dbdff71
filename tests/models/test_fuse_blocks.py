"""Networks with fused blocks."""

import logging

import pytest
import torch
from torch import nn

from fusion.modules import FusedConvFirst, FusedMBConv
from fusion.planner.plan import PlanError
from models import ConvFirst, MBConv, create_model, fuse_blocks


def test_the_fused_network_computes_the_same():
    torch.manual_seed(0)
    model = create_model("convfirstnet_pico", num_classes=10).eval()
    fused = fuse_blocks(model)
    x = torch.randn(2, 3, 37, 41)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)


def test_create_model_says_which_blocks_stay_eager(caplog):
    with caplog.at_level(logging.WARNING):
        model = create_model("convfirstnet_pico", num_classes=10, fused=True)
    twins = {name: type(module) for name, module in model.named_modules() if hasattr(module, "plan")}
    expected = dict.fromkeys(("stages.0.0", "stages.1.1", "stages.2.1", "stages.2.2"), FusedConvFirst)
    assert twins == expected | {f"stages.{stage}.{i}": FusedMBConv for stage in (3, 4) for i in range(1, 11)}
    eager = {name for name, module in model.named_modules() if isinstance(module, ConvFirst | MBConv)}
    assert set(model.left_eager) == eager
    assert "stride 2" in model.left_eager["stages.1.0"]
    assert eager == {f"stages.{stage}.0" for stage in (1, 2, 3, 4)}
    assert "MBConv with stride 2" in model.left_eager["stages.3.0"]
    assert "24 blocks are fused" in caplog.text
    assert "stages.1.0" in caplog.text
    assert not model.training


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
        (ConvFirst(16, 32, expansion=6, stride=2), "stride 2 and ReLU; supported are stride 1 and ReLU or SiLU"),
        (ConvFirst(16, 16, expansion=6, activation=nn.GELU), "stride 1 and GELU; supported are"),
        (MBConv(16, 32, stride=2), "MBConv with stride 2 and SiLU; supported are stride 1 and ReLU or SiLU"),
        (MBConv(16, 16, activation=nn.GELU), "MBConv with stride 1 and GELU; supported are"),
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

import pytest
import torch
from torch import nn

from fusion.edge_modules import FusedHead, FusedStem
from fusion.planner.plan import PlanError
from models import ConvBnAct, PooledHead, create_model


def test_forward_pools_the_features():
    torch.manual_seed(0)
    head, block = PooledHead(16, 24).eval(), ConvBnAct(16, 24, 1, activation=nn.SiLU).eval()
    block.load_state_dict(head.state_dict())
    x = torch.randn(2, 16, 3, 5)
    assert torch.equal(head.features(x), block(x))
    torch.testing.assert_close(head(x), block(x).mean((2, 3)))
    assert head(x).shape == (2, 24)


def test_the_network_is_its_parts():
    torch.manual_seed(0)
    model = create_model("convfirstnet_pico", num_classes=10).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        features = model.forward_features(x)
        assert features.shape == (2, 1280, 2, 2)
        torch.testing.assert_close(model(x), model.forward_head(features))


def test_the_network_with_fused_ends_computes_the_same():
    torch.manual_seed(0)
    model = create_model("convfirstnet_pico", num_classes=10).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        logits, features = model(x), model.forward_features(x)
        model.stem, model.head = model.stem.fused(), model.head.fused()
        assert isinstance(model.stem, FusedStem) and isinstance(model.head, FusedHead)
        torch.testing.assert_close(model(x), logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.forward_features(x), features, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block", [ConvBnAct(3, 16, 3, stride=2), PooledHead(16, 32)], ids=["stem", "head"])
def test_a_block_in_training_mode_is_not_fused(block):
    with pytest.raises(RuntimeError, match=r"training mode cannot be fused; call eval\(\) first"):
        block.train().fused()


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (ConvBnAct(3, 16, 3), "a 3x3 convolution of stride 1 and 3 input channels alone; supported is a stem, 3x3 of"),
        (ConvBnAct(3, 16, 5, stride=2), "a 5x5 convolution of stride 2 and 3 input"),
        (
            ConvBnAct(16, 32, 3, stride=2),
            "stride 2 and 16 input channels alone; .* at most 4 channels: run it in eager",
        ),
        (ConvBnAct(3, 16, 3, stride=2, activation=nn.Mish), r"ConvBnAct with Mish\(\); supported are .* or Identity"),
        (PooledHead(16, 32, activation=nn.Mish), r"PooledHead with Mish\(\); supported are ReLU or .* or Identity"),
    ],
    ids=lambda value: None if isinstance(value, nn.Module) else value,
)
def test_a_block_without_a_kernel_says_what_is_supported(block, message):
    with pytest.raises(PlanError, match=message):
        block.eval().fused()

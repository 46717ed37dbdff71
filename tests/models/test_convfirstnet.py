import pytest
import torch
from torch import nn

from models import ConvFirstNetConfig, DropPath, create_model, list_models


@pytest.fixture(scope="module")
def pico():
    torch.manual_seed(0)
    return create_model("convfirstnet_pico", num_classes=10).eval()


def small_model(**kwargs):
    """Every kind of block that the network has, few of them."""
    torch.manual_seed(0)
    return create_model(
        "convfirstnet_pico",
        num_classes=10,
        stem_channels=8,
        stage_channels=(8, 16, 16, 24, 24),
        depths=(1, 2, 1, 2, 2),
        head_channels=64,
        **kwargs,
    )


@pytest.mark.parametrize("name", list_models("convfirstnet_*"))
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_shapes_at_256(name, memory_format):
    with torch.device("meta"):
        model = create_model(name).eval().to(memory_format=memory_format)
        x = torch.empty(2, 3, 256, 256).to(memory_format=memory_format)
    features = model.forward_features(x)
    assert features.shape == (2, model.num_features, 8, 8)
    assert model.forward_head(features).shape == (2, 1000)


@pytest.mark.parametrize("size", [(64, 64), (75, 61), (17, 17), (18, 33)])
def test_any_image_size_from_17_pixels(pico, size):
    with torch.inference_mode():
        features = pico.forward_features(torch.randn(2, 3, *size))
    assert features.shape == (2, 1280, -(-size[0] // 32), -(-size[1] // 32))
    assert features.isfinite().all()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 16, 64), r"16x64 pixels is too small .* from 17 pixels up; resize or pad"),
        ((1, 3, 64, 16), r"64x16 pixels is too small"),
        ((3, 64, 64), r"got 3 dimensions \[3, 64, 64\].*unsqueeze"),
        ((1, 4, 64, 64), r"images of 3 channels .* got \[1, 4, 64, 64\].*in_chans=4"),
    ],
)
def test_unsupported_images(pico, shape, message):
    with pytest.raises(ValueError, match=message):
        pico(torch.zeros(shape))


def test_channels_must_be_a_multiple_of_the_group_width():
    with pytest.raises(ValueError, match="20 channels cannot have group width 8"):
        create_model("convfirstnet_pico", stem_channels=20)


@pytest.mark.parametrize("depths", [(1, 1, 1, 1), (1, 1, 0, 1, 1)])
def test_config_needs_an_entry_for_each_stage(depths):
    with pytest.raises(ValueError, match=r"depths=.* must have 5 positive entries"):
        ConvFirstNetConfig(stem_channels=8, stage_channels=(8,) * 5, depths=depths)


def test_eval_is_deterministic_and_batch_independent(pico):
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        y = pico(x)
        torch.testing.assert_close(pico(x), y, rtol=0, atol=0)
        torch.testing.assert_close(pico(x[:1]), y[:1])
        torch.testing.assert_close(pico(x.to(memory_format=torch.channels_last)), y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = small_model().eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        expected = model(x)
        actual = model.to(dtype)(x.to(dtype))
    assert actual.dtype == dtype
    assert (actual - expected).norm() < 0.05 * expected.norm()


def test_forward_head(pico):
    features = torch.randn(2, 1280, 3, 2)
    pre_logits = pico.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pre_logits, features.mean((2, 3)))
    torch.testing.assert_close(pico.forward_head(features), pico.get_classifier()(pre_logits))


def test_reset_classifier():
    model = small_model().eval().to(torch.bfloat16)
    x = torch.randn(2, 3, 32, 32, dtype=torch.bfloat16)
    model.reset_classifier(7)
    assert model.get_classifier() is model.classifier
    assert (model.num_classes, model(x).shape, model(x).dtype) == (7, (2, 7), torch.bfloat16)
    model.reset_classifier(0)
    assert model(x).shape == (2, model.num_features)


def test_num_classes_0_and_in_chans():
    model = small_model().eval()
    assert model.default_cfg["test_input_size"] == (3, 256, 256)
    model = create_model("convfirstnet_pico", num_classes=0, in_chans=1).eval()
    assert model.default_cfg["input_size"] == (1, 224, 224)
    assert model(torch.randn(1, 1, 32, 32)).shape == (1, 1280)


def test_dropout_and_drop_path_of_the_paper():
    for name, dropout in [("pico", 0.2), ("nano", 0.3), ("tiny", 0.3), ("small", 0.3)]:
        with torch.device("meta"):
            model = create_model(f"convfirstnet_{name}")
        assert model.dropout.p == dropout
        rates = [module.p for module in model.modules() if isinstance(module, DropPath)]
        torch.testing.assert_close(torch.tensor(rates), torch.linspace(0, 0.2, len(rates)))


def test_training_step():
    model = small_model(drop_path_rate=0.0, drop_rate=0.0).train()
    x, target = torch.randn(4, 3, 64, 64), torch.tensor([0, 3, 3, 9])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), target)
        loss.backward()
        losses.append(loss.item())
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            # In front of a batch norm that normalises with the batch's mean a bias has no effect, hence no gradient.
            if not name.endswith(("expand.bias", "conv.bias", "project.bias")):
                assert parameter.grad.any(), name
        optimizer.step()
    assert losses[2] < losses[0]


def test_training_with_dropout_and_drop_path_is_random_and_eval_is_not():
    model = small_model(drop_rate=0.5, drop_path_rate=0.5)
    x = torch.randn(4, 3, 32, 32)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_zero_init_last_starts_residual_branches_at_zero():
    model = small_model(zero_init_last=True).eval()
    x = torch.randn(2, 16, 8, 8)
    block = model.stages[1][1]
    assert block.has_residual
    torch.testing.assert_close(block(x), x)
    assert model.stages[1][0].project_bn.weight.all()


def test_fresh_weights_keep_activations_within_fp16():
    torch.manual_seed(0)
    model = create_model("convfirstnet_small").eval()
    with torch.inference_mode():
        features = model.forward_features(torch.randn(1, 3, 64, 64))
    assert features.abs().max() < 1000


def test_state_dict_round_trip():
    source, target = small_model(), small_model()
    source.train()(torch.randn(2, 3, 64, 64))
    state = source.state_dict()
    assert not any("blur" in key for key in state)
    target.load_state_dict(state)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(source.eval()(x), target.eval()(x))


def test_export(pico):
    x = torch.randn(2, 3, 64, 64)
    exported = torch.export.export(pico, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    x = torch.randn(3, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(exported(x), pico(x))


def test_symbolic_trace(pico):
    graph_module = torch.fx.symbolic_trace(pico)
    x = torch.randn(1, 3, 75, 61)
    with torch.inference_mode():
        torch.testing.assert_close(graph_module(x), pico(x))
        with pytest.raises(ValueError, match="too small"):
            graph_module(x[..., :16])

import pytest
import torch

from models import create_model


@pytest.fixture(scope="module")
def pico():
    torch.manual_seed(0)
    return create_model("convfirstnet_pico").eval()


def features_of(model, **kwargs):
    """A feature extractor that has the weights of `model`."""
    extractor = create_model("convfirstnet_pico", features_only=True, **kwargs).eval()
    weights = model.state_dict()
    extractor.load_state_dict({key: weights[key] for key in extractor.state_dict()})
    return extractor


def test_all_stages(pico):
    extractor = features_of(pico)
    assert extractor.feature_info.channels() == [16, 32, 48, 128, 128]
    assert extractor.feature_info.reduction() == [2, 4, 8, 16, 32]
    assert extractor.feature_info.module_name() == [f"stages.{i}" for i in range(5)]
    assert extractor.feature_info == pico.feature_info
    x = torch.randn(1, 3, 75, 61)
    with torch.inference_mode():
        features = extractor(x)
        for feature, info in zip(features, extractor.feature_info, strict=True):
            stride = info["reduction"]
            assert feature.shape == (1, info["num_chs"], -(-75 // stride), -(-61 // stride))
        torch.testing.assert_close(pico.head.features(features[-1]), pico.forward_features(x))


def test_some_stages_leave_out_the_rest_and_take_smaller_images(pico):
    extractor = features_of(pico, out_indices=(2, 0))
    assert extractor.feature_info.reduction() == [2, 8]
    assert len(extractor.stages) == 3
    assert [feature.shape for feature in extractor(torch.zeros(1, 3, 5, 5))] == [(1, 16, 3, 3), (1, 48, 1, 1)]
    with pytest.raises(ValueError, match=r"5x4 pixels is too small .* from 5 pixels"):
        extractor(torch.zeros(1, 3, 5, 4))


def test_first_stage_takes_a_single_pixel(pico):
    assert features_of(pico, out_indices=(0,))(torch.zeros(1, 3, 1, 1))[0].shape == (1, 16, 1, 1)


@pytest.mark.parametrize("out_indices", [(), (5,), (-1, 2)])
def test_unknown_stages(out_indices):
    with pytest.raises(ValueError, match="stages 0 to 4"):
        create_model("convfirstnet_pico", features_only=True, out_indices=out_indices)


def test_out_indices_need_features_only():
    with pytest.raises(ValueError, match="features_only=True"):
        create_model("convfirstnet_pico", out_indices=(1,))


def test_symbolic_trace(pico):
    extractor = features_of(pico)
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(torch.fx.symbolic_trace(extractor)(x), extractor(x))

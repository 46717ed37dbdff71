import pytest

from models import create_model, list_models, register_model


def test_list_models():
    names = ["convfirstnet_nano", "convfirstnet_pico", "convfirstnet_small", "convfirstnet_tiny"]
    assert list_models("convfirstnet_*") == names
    assert set(names) <= set(list_models())
    assert list_models("*_tiny") == ["convfirstnet_tiny"]
    assert list_models("resnet*") == []


def test_unknown_name_suggests_close_ones():
    with pytest.raises(ValueError, match=r"no model is named 'convfirstnet_pic'\. Did you mean 'convfirstnet_pico'"):
        create_model("convfirstnet_pic")
    with pytest.raises(ValueError, match=r"no model is named 'xyz'\. Registered models: .*convfirstnet_nano"):
        create_model("xyz")


def test_a_name_is_registered_once():
    def convfirstnet_pico():
        pass

    with pytest.raises(ValueError, match="'convfirstnet_pico' is registered already"):
        register_model(convfirstnet_pico)


def test_unknown_option():
    with pytest.raises(TypeError, match="drop_pth_rate"):
        create_model("convfirstnet_pico", drop_pth_rate=0.1)

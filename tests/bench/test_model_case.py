"""Names of networks with arguments, and the sizes of their images."""

from types import SimpleNamespace

import pytest

from fusion.bench import model_case
from fusion.bench.model_case import ModelCase, image_size, known_model, split_model


@pytest.mark.parametrize(
    "text, name, arguments",
    [
        ("pico", "convfirstnet_pico", {}),
        ("convfirstnet_pico", "convfirstnet_pico", {}),
        ("resnet18.a1_in1k", "resnet18.a1_in1k", {}),
        ("small:num_classes=10", "convfirstnet_small", {"num_classes": 10}),
        ("net:group_size=8,act_layer=silu", "net", {"group_size": 8, "act_layer": "silu"}),
        ("net:depths=(1,1,2,1), drop_rate=-0.5", "net", {"depths": (1, 1, 2, 1), "drop_rate": -0.5}),
        ("net:flag=True,name='a,b=c'", "net", {"flag": True, "name": "a,b=c"}),
    ],
)
def test_names_and_arguments(text, name, arguments):
    assert split_model(text) == (name, arguments)


@pytest.mark.parametrize("arguments", ["", "8", "a=", "a=f()", "**a", "a=1)+(2", "a b=1"])
def test_arguments_that_are_none(arguments):
    with pytest.raises(ValueError, match="is no list of arguments; write NAME:KEY=VALUE"):
        split_model(f"resnet18:{arguments}")


def test_nothing_is_downloaded():
    with pytest.raises(ValueError, match="nothing is downloaded"):
        split_model("resnet18:pretrained=True")


@pytest.fixture
def made_up_timm(monkeypatch):
    """A timm of three networks, by name: one of any size, one that has its own and one that has a smallest."""

    def config(size, test=None, fixed=False, least=None):
        shape = {"input_size": size, "test_input_size": test, "min_input_size": least}
        shapes = {name: pixels and (3, pixels, pixels) for name, pixels in shape.items()}
        return SimpleNamespace(fixed_input_size=fixed, **shapes)

    configs = {
        "resnet18": config(224, test=288),
        "vit": config(224, fixed=True),
        "halonet": config(256, least=128),
        "bare": None,
    }
    timm = SimpleNamespace(
        is_model=configs.__contains__, list_models=lambda: sorted(configs), get_pretrained_cfg=configs.get
    )
    monkeypatch.setattr(model_case, "has_timm", lambda: True)
    monkeypatch.setattr(model_case, "import_timm", lambda wanted: timm)


def test_known_networks(made_up_timm):
    assert known_model("pico") == "convfirstnet_pico"
    assert known_model("pico:num_classes=10") == "convfirstnet_pico:num_classes=10"
    for name in ("convfirst_uir", "resnet18", "vit:depth=2"):
        assert known_model(name) == name
    with pytest.raises(ValueError, match="no network is named 'picoo': did you mean pico") as raised:
        known_model("picoo")
    assert "pico, nano, tiny, small, convfirst_uir, and timm has none of that name" in str(raised.value)
    with pytest.raises(ValueError, match="did you mean resnet18"):
        known_model("resnet8:a=1")


def test_without_timm_only_convfirstnets_are_known(monkeypatch):
    monkeypatch.setattr(model_case, "has_timm", lambda: False)
    assert known_model("small") == "convfirstnet_small"
    with pytest.raises(ValueError, match="is not installed: pip install timm"):
        known_model("resnet18")
    with pytest.raises(ValueError, match="convfirst_uir is made with timm, which is not installed: pip install timm"):
        known_model("convfirst_uir")


def test_a_timm_that_cannot_be_imported(monkeypatch):
    monkeypatch.setattr(model_case, "has_timm", lambda: True)
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(ValueError, match=r"resnet18 needs timm, which cannot be imported \(ModuleNotFoundError"):
        known_model("resnet18")


@pytest.mark.parametrize(
    "model, asked, preferred, size",
    [
        ("pico", None, None, 256),
        ("pico", None, 64, 64),
        ("convfirst_uir", 96, 64, 96),
        ("resnet18", None, None, 288),
        ("resnet18", None, 64, 64),
        ("resnet18", 96, None, 96),
        ("vit", None, 64, 224),
        ("vit", 224, None, 224),
        ("vit:img_size=96", None, None, 96),
        ("vit:img_size=96", 96, 64, 96),
        ("halonet", None, 64, 128),
        ("bare", None, None, 224),
    ],
)
def test_sizes_of_images(made_up_timm, model, asked, preferred, size):
    assert image_size(model, asked, preferred) == size


@pytest.mark.parametrize(
    "model, asked, message",
    [
        ("vit", 96, "vit takes images of 224 x 224 only, not 96: leave out --size for it, or try vit:img_size=96"),
        ("vit:img_size=96", 224, "takes images of 96 x 96 only, not 224"),
        ("halonet", 64, "halonet takes images from 128 x 128 up, not 64"),
    ],
)
def test_sizes_that_a_network_does_not_take(made_up_timm, model, asked, message):
    with pytest.raises(ValueError, match=message):
        image_size(model, asked)


def test_which_networks_can_be_fused_without_compiling():
    assert ModelCase("convfirstnet_pico:num_classes=10", 2, 64).is_convfirstnet
    assert not ModelCase("convfirst_uir", 2, 64).is_convfirstnet
    assert str(ModelCase("vit:depth=2", 8, 224)) == "vit:depth=2 at 224, batch 8"

import pytest
from torch import fx

from fusion.frontend.names import block_name, clean_path


@pytest.mark.parametrize(
    "path, clean",
    [
        ("L['self'].stages.3.0.blur", "stages.3.0.blur"),
        ("L['self']._modules['stages']._modules['0'].conv", "stages.0.conv"),
        ("L['self'].stages._modules['0']", "stages.0"),
        ("getattr(getattr(L['self'].blocks, '1'), '0').conv", "blocks.1.0.conv"),
        ("L['model'].blocks[1].conv", "blocks.1.conv"),
        ("G['model'].conv", "conv"),
        ("L['self']._orig_mod.conv", "conv"),
        ("L['self']", ""),
        ("", ""),
        ("trunk.block1-0.f", "trunk.block1-0.f"),
    ],
)
def test_paths(path, clean):
    assert clean_path(path) == clean


def nodes(*paths):
    graph = fx.Graph()
    for path in paths:
        node = graph.placeholder("x")
        node.meta["nn_module_stack"] = {"": ("", object), "key": (path, object)} if path else {}
    return list(graph.nodes)


def test_a_block_is_named_after_the_module_that_its_layers_are_in():
    (output,) = nodes("")
    assert block_name(nodes("a.1.conv", "a.1.se.fc1", "a.1.project"), [], output) == "a.1"
    assert block_name(nodes("a.1.conv", "a.10.conv"), [], output) == "a"
    assert block_name(nodes("conv", "project"), [], output) == "x"
    assert block_name(nodes("", ""), [], output) == "x"


def test_a_single_layer_is_named_after_what_it_shares_with_others_or_itself():
    (output,) = nodes("")
    assert block_name(nodes("stem.conv"), nodes("stem.bn", ""), output) == "stem"
    assert block_name(nodes("conv_stem"), nodes("bn1"), output) == "conv_stem"

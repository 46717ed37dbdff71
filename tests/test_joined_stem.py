"""A network's stem together with its first block."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import fusion
from fusion.joined_stem import JoinedStem
from fusion.launch_record import InputKind
from models import ConvFirst, create_model


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return create_model("convfirstnet_pico", num_classes=10).eval().double()


def joined_stem(network):
    return fusion.fuse(network).stages[0][0]


def kind(*shape, dtype=torch.float16):
    return InputKind(shape, dtype, torch.device("cpu"))


def test_the_stem_gives_way_to_the_pair(network):
    fused = fusion.fuse(network)
    assert isinstance(fused.stem, nn.Identity) and isinstance(fused.stages[0][0], JoinedStem)
    x = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(fused.stages[0](x), network.stages[0](network.stem(x)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "size, together", [((256, 256), True), ((40, 44), True), ((41, 44), False), ((512, 512), False)]
)
def test_it_runs_together_where_a_kernel_does(size, together, network):
    pair = joined_stem(network)
    assert pair.runs_together(kind(2, 3, *size)) == together
    assert pair.between(kind(2, 3, *size)).shape == (2, 16, -(-size[0] // 2), -(-size[1] // 2))


@pytest.mark.parametrize("size", [(40, 44), (41, 43)])
def test_both_ways_give_the_same(size, network):
    x = torch.randn(1, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        out = joined_stem(network)(x)
        torch.testing.assert_close(out, network.stages[0](network.stem(x)), rtol=1e-6, atol=1e-6)
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_measured_times_decide_where_there_are_any(network):
    pair, x = joined_stem(network), kind(128, 3, 256, 256)
    kinds = {pair.together: x, pair.stem: x, pair.block: pair.between(x)}
    for together_us, expected in ((30.0, True), (50.0, False)):
        for twin, us in zip(kinds, (together_us, 20.0, 20.0), strict=True):
            plan = twin.plan(kinds[twin])
            twin._plans = {key: replace(plan, measured_us=us) for key in twin._plans}
        pair._decided = {}
        assert pair.runs_together(x) == expected


@pytest.mark.parametrize("change", ["activation", "order", "missing"])
def test_other_networks_keep_their_stem(change):
    torch.manual_seed(0)
    network = create_model("convfirstnet_pico", num_classes=10).eval()
    if change == "activation":
        network.stages[0][0] = ConvFirst(16, 16, expansion=3, activation=nn.SiLU).eval()
    elif change == "order":
        network.stages[0][0] = nn.Identity().eval()
    else:
        network.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1).eval()
    fused = fusion.fuse(network)
    assert not any(isinstance(module, JoinedStem) for module in fused.modules())
    x = torch.randn(1, 3, 40, 40)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), network(x), rtol=1e-4, atol=1e-5)


def test_it_comes_back_from_a_file(network, tmp_path):
    x = torch.randn(1, 3, 40, 40, dtype=torch.float64)
    fused = fusion.fuse(network, x)
    fused.save(tmp_path / "pico.pt")
    loaded = fusion.load(tmp_path / "pico.pt")
    assert isinstance(loaded.stages[0][0], JoinedStem)
    with torch.no_grad():
        assert torch.equal(loaded(x), fused(x))

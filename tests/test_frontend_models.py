"""Whole networks: what is found in them, by name, and nothing where there is nothing."""

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from fusion.frontend.find import find_blocks
from fusion.reference import relative_error
from models import create_model
from tests.frontend_graphs import SPELLINGS, TOLERANCE, check, find, symbolic_graph, with_random_statistics

spelled = pytest.mark.parametrize("spelling", SPELLINGS)


@spelled
def test_convfirstnet(spelling):
    """All but dropout and classifier."""
    torch.manual_seed(0)
    model = create_model("convfirstnet_pico", num_classes=10)
    kinds = ["stem", *["ConvFirst"] * 6, *["MBConv"] * 22, "head"]
    findings = check(model, torch.randn(1, 3, 40, 40), spelling, kinds)
    names = [
        "stem",
        *(f"stages.{stage}.{block}" for stage, depth in enumerate((1, 2, 3, 11, 11)) for block in range(depth)),
    ]
    assert [block.name for block in findings.found] == [*names, "head"]
    assert findings.left == ()


def test_names_without_metadata():
    model = create_model("convfirstnet_pico", num_classes=10).eval()
    graph = symbolic_graph(model, torch.randn(1, 3, 40, 40), metadata=False)
    names = [block.name for block in find(graph).found]
    assert names[:3] == ["stem", "stages.0.0", "stages.1.0"]


class Bottleneck(nn.Module):
    """Of a ResNet."""

    def __init__(self, channels):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels // 4, 1, bias=False), nn.BatchNorm2d(channels // 4)
        self.conv2 = nn.Conv2d(channels // 4, channels // 4, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels // 4)
        self.conv3, self.bn3 = nn.Conv2d(channels // 4, channels, 1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        y += x
        return F.relu(y, inplace=True)


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 7, 2, 3, bias=False), nn.BatchNorm2d(16)
        self.blocks = nn.Sequential(Bottleneck(16), Bottleneck(16))
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(self.blocks(x), 1), 1))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 4, stride=4)
        self.norm, self.qkv = nn.LayerNorm(16), nn.Linear(16, 48)
        self.mlp = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
        self.token = nn.Parameter(torch.randn(1, 1, 16))

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1)
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        x = x + F.scaled_dot_product_attention(q, k, v)
        return (x + self.mlp(self.norm(x)))[:, 0]


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.conv = nn.Linear(32, 16), nn.Conv1d(3, 16, 3)

    def forward(self, x):
        state = x.new_zeros(2, 16)
        for step in self.conv(x.flatten(2)).unbind(2)[:4]:
            state = torch.tanh(self.cell(torch.cat([state, step], dim=1)))
        return {"state": state, "sizes": (x.shape[0], [state])}


@spelled
@pytest.mark.parametrize("model", [ResNet, Transformer, Recurrent])
def test_other_networks_have_no_blocks(model, spelling):
    model = model().eval()
    if spelling == "symbolic" and isinstance(model, Recurrent):
        pytest.skip("a symbolic trace cannot iterate")
    findings = find(SPELLINGS[spelling](model, torch.randn(2, 3, 16, 16)))
    assert findings.found == findings.left == ()


def test_graphs_of_anything():
    """Odd nodes and arguments, dangling names and an empty graph."""
    assert find_blocks(fx.symbolic_trace(nn.Identity()), {}).found == ()
    module = fx.GraphModule(nn.Module(), fx.Graph())
    graph = module.graph
    x = graph.placeholder("x")
    for target, args, kwargs in (
        (torch.conv2d, (x,), {}),
        (torch.conv2d, (x, x, x, x, x, x, x), {}),
        (torch.conv2d, (x, x), {"unknown": 1}),
        (torch.conv2d, (x, x, None, [1, 1, 1], "odd"), {}),
        (torch.conv2d, (1, 2), {}),
        (F.batch_norm, (x, None, None), {"training": x}),
        (F.adaptive_avg_pool2d, (x, (None, 1)), {}),
        (torch.mean, (x, "dim"), {}),
        (torch.cat, ([],), {}),
        (torch.cat, (x,), {}),
        (torch.add, (1, 2), {}),
        (F.pad, (x, (1, x, 1, 1)), {}),
        (getattr, (x, x), {}),
        (max, (), {}),
    ):
        x = graph.call_function(target, args, kwargs)
    for method in ("size", "view", "expand", "nothing_", "__setitem__", "mean"):
        x = graph.call_method(method, (x,))
    x = graph.create_node("call_module", "missing.module", (x,))
    graph.create_node("get_attr", "missing.tensor")
    graph.output([x, {"x": x}])
    assert find_blocks(module, {}).found == ()


@pytest.fixture(scope="module")
def timm():
    return pytest.importorskip("timm", exc_type=Exception)


@torch.no_grad()
def check_network(model, x, spelling):
    """Each twin of a network, on the input that its block has there; networks with random statistics amplify errors."""
    model = with_random_statistics(model).eval().double()
    graph = SPELLINGS[spelling](model, x.double())
    findings = find(graph)
    wanted = {node for block in findings.found for node in (block.input, block.output)}
    values = {}

    class Recorder(fx.Interpreter):
        def run_node(self, node):
            value = super().run_node(node)
            if node in wanted:
                values[node] = value.clone()
            return value

    graph.run(lambda *inputs: Recorder(graph.module).run(*inputs), x.double())
    for block in findings.found:
        assert relative_error(block.block(values[block.input]), values[block.output]) < TOLERANCE, block.name
    return findings


@spelled
def test_timm_efficientnet(timm, spelling):
    findings = check_network(timm.create_model("efficientnet_b0", group_size=8), torch.randn(2, 3, 32, 32), spelling)
    (left,) = findings.left
    assert left.name == "blocks.0.0" and left.reason.startswith("it has no expansion")
    names = {block.name: block.block for block in findings.found}
    assert len(names) == 17 and {"conv_stem", "blocks.1.0", "blocks.6.0", "conv_head"} <= set(names)
    assert names["blocks.2.1"].weights.kernel_size == 5 and names["blocks.2.1"].residual
    assert names["blocks.2.0"].weights.kernel_size == 5 and not names["blocks.2.0"].blur


@spelled
def test_timm_efficientnetv2(timm, spelling):
    model = timm.create_model("efficientnetv2_rw_t", group_size=8)
    findings = check_network(model, torch.randn(1, 3, 32, 32), spelling)
    assert len(findings.found) == 31 and findings.left == ()
    assert {block.block.squeeze_activation for block in findings.found[1:-1]} == {"silu"}


@spelled
def test_timm_universal_inverted_residuals(timm, spelling):
    from timm.models._efficientnet_builder import decode_arch_def
    from timm.models.efficientnet import EfficientNet

    blocks = decode_arch_def(
        [["uir_r2_a3_k0_s2_e4_c32_gs8"], ["uir_r1_a3_k0_s1_e6_c64_gs8"], ["uir_r2_a0_k0_s1_e4_c64_gs8"]]
    )
    model = EfficientNet(blocks, stem_size=16, num_features=64, act_layer=nn.ReLU)
    findings = check_network(model, torch.randn(2, 3, 32, 32), spelling)
    kinds = ["stem", "ConvFirst", "ConvFirst", "ConvFirst", "FFN", "FFN", "head"]
    assert [block.kind for block in findings.found] == kinds and findings.left == ()
    assert [block.block.stride for block in findings.found[1:4]] == [2, 1, 1]
    assert [block.block.residual for block in findings.found[1:6]] == [False, True, False, True, True]


@spelled
def test_timm_blur_pools(timm, spelling):
    model = timm.create_model("efficientnet_b0", group_size=8, aa_layer=timm.layers.BlurPool2d)
    findings = check_network(model, torch.randn(2, 3, 64, 64), spelling)
    down = [block for block in findings.found if block.name in ("blocks.1.0", "blocks.3.0")]
    assert [block.block.blur for block in down] == [True, True]

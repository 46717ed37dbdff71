"""What looks like a block and is left alone, with a reason; the model computes the same with what else is found."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fusion.frontend.find import find_blocks
from models import BlurPool, ConvBnAct, ConvFirst, Ffn, MBConv
from tests.frontend_graphs import SPELLINGS, Function, check, dynamo_graph, exported_graph, find, symbolic_graph

X = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))

spelled = pytest.mark.parametrize("spelling", SPELLINGS)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def convfirst(**conv):
    block = ConvFirst(16, 16, expansion=3)
    block.has_residual = False
    options = {"kernel_size": 3, "padding": 1, "groups": 2} | conv
    out_channels = options.pop("out_channels", 16)
    block.conv, block.conv_bn = nn.Conv2d(16, out_channels, **options), nn.BatchNorm2d(out_channels)
    block.expand = nn.Conv2d(out_channels, 48, 1)
    return block


def mbconv(**options):
    block = MBConv(16, 16, expansion=2)
    block.has_residual = False
    for name, value in options.items():
        setattr(block, name, value)
    return block


def two_activations():
    class Block(MBConv):
        def forward(self, x):
            y = F.relu(self.expand_bn(self.expand(x)))
            y = F.silu(self.conv_bn(self.conv(y)))
            return x + self.project_bn(self.project(self.se(y)))

    return Block(16, 16, expansion=2)


def hidden_used_twice():
    class Block(ConvFirst):
        def forward(self, x):
            y = self.conv_bn(self.conv(x))
            h = self.act(self.expand_bn(self.expand(y)))
            return self.project_bn(self.project(h)) + h[:, :16]

    return Block(16, 16, expansion=3)


def convolved_used_twice():
    class Block(ConvFirst):
        def forward(self, x):
            y = self.conv_bn(self.conv(x))
            h = self.act(self.expand_bn(self.expand(y)))
            return self.project_bn(self.project(h)) + torch.sin(y)

    return Block(16, 16, expansion=3)


def given_out():
    class Block(MBConv):
        def forward(self, x):
            y = self.act(self.conv_bn(self.conv(self.act(self.expand_bn(self.expand(x))))))
            return self.project_bn(self.project(self.se(y))), y

    return Block(16, 16, expansion=2)


def without_expansion():
    layers = {"conv": nn.Conv2d(16, 16, 3, padding=1, groups=2), "se": MBConv(4, 4, expansion=4, group_width=1).se}
    return Function(lambda m, x: m.project(m.se(F.silu(m.conv(torch.sin(x))))), **layers, project=nn.Conv2d(16, 8, 1))


class Blur(nn.Module):
    """A blur-pool of another filter, `[3, 3]`, or of another padding."""

    def __init__(self, channels, filter=None, mode="reflect"):
        super().__init__()
        own = BlurPool(channels).filter
        self.register_buffer("filter", own if filter is None else torch.tensor(filter).expand_as(own).contiguous())
        self.mode = mode

    def forward(self, x):
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode=self.mode), self.filter, stride=2, groups=len(self.filter))


IDENTITY = [[0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]


def concatenated(tensors, blur):
    def forward(m, x):
        y = m.blur(torch.cat(tensors(x, m.block.conv_bn(m.block.conv(x))), 1))
        return m.block.project_bn(m.block.project(m.block.act(m.block.expand_bn(m.block.expand(y)))))

    return Function(forward, block=ConvFirst(16, 16, expansion=3, stride=2), blur=blur)


LEFT = {
    "kernel size": (lambda: convfirst(kernel_size=5, padding=2), "ConvFirst", "kernel size 5 is not supported, use 3"),
    "kernel of two sizes": (
        lambda: convfirst(kernel_size=(3, 5), padding=(1, 2)),
        "ConvFirst",
        "kernel size 3x5 is not supported, use a square one",
    ),
    "kernel size of MBConv": (
        lambda: mbconv(conv=nn.Conv2d(32, 32, 7, padding=3, groups=4)),
        "MBConv",
        "kernel size 7 is not supported, use 3 or 5",
    ),
    "kernel size with a blur-pool": (
        lambda: mbconv(conv=nn.Conv2d(32, 32, 5, padding=2, groups=4), blur=BlurPool(32)),
        "MBConv",
        "kernel size 5 with a blur-pool is not supported, use 3",
    ),
    "even kernel": (lambda: convfirst(kernel_size=2), "ConvFirst", "kernel size 2 is not supported, use 3"),
    "padding": (lambda: convfirst(padding=0), "ConvFirst", "has padding (0, 0), supported is half the kernel size"),
    "dilation": (lambda: convfirst(dilation=2, padding=2), "ConvFirst", "has dilation (2, 2), supported is 1"),
    "stride": (lambda: convfirst(stride=3), "ConvFirst", "has stride (3, 3), supported are 1 and 2"),
    "two strides": (lambda: convfirst(stride=(1, 2)), "ConvFirst", "has stride (1, 2), supported are 1 and 2"),
    "groups": (
        lambda: convfirst(out_channels=32),
        "ConvFirst",
        "have 8 channels in and 16 out, supported are as many out as in",
    ),
    "activation": (
        lambda: ConvFirst(16, 16, expansion=3, activation=nn.Mish),
        "ConvFirst",
        "the activation 'mish' of its expansion is not supported, use one of relu, silu",
    ),
    "approximate GELU": (
        lambda: ConvFirst(16, 16, expansion=3, activation=lambda: nn.GELU("tanh")),
        "ConvFirst",
        "is GELU by tanh; supported is the exact one, nn.GELU(approximate='none')",
    ),
    "sigmoid": (
        lambda: Ffn(16, 16, expansion=3, activation=nn.Sigmoid),
        "FFN",
        "the activation 'sigmoid' of its expansion is not supported",
    ),
    "hidden used twice": (hidden_used_twice, "ConvFirst", "the result of its expansion (", "is used outside of it, by"),
    "convolved used twice": (convolved_used_twice, "ConvFirst", "the result of its spatial convolution ("),
    "given out": (given_out, "MBConv", "the result of its spatial convolution (", "is an output of the graph"),
    "two activations": (two_activations, "MBConv", "it has two different activations, 'relu' after its expansion and"),
    "hard gate": (
        lambda: mbconv(se=nn.Sequential(Hard())),
        "MBConv",
        "the activation 'hardsigmoid' of its excitation layer is not supported, use one of sigmoid",
    ),
    "squeeze activation": (
        lambda: MBConv(16, 16, expansion=2, squeeze_activation=nn.GELU),
        "MBConv",
        "the activation 'gelu' of its squeeze layer is not supported, use one of relu, silu",
    ),
    "no gate": (lambda: mbconv(se=nn.Identity()), "MBConv", "it has no squeeze-and-excitation"),
    "gate of something else": (lambda: mbconv(se=Soft()), "MBConv", "it has no squeeze-and-excitation"),
    "no projection": (
        lambda: mbconv(project=nn.Conv2d(32, 16, 3, padding=1)),
        "MBConv",
        "it has no projection",
    ),
    "no expansion": (without_expansion, "MBConv", "it has no expansion (1x1 convolution and activation)"),
    "stride of a 1x1 convolution": (
        lambda: mbconv(expand=nn.Conv2d(16, 32, 1, stride=2)),
        "MBConv",
        "its expansion, a 1x1 convolution, has stride 2 and padding 0",
    ),
    "another blur filter": (
        lambda: mbconv(blur=Blur(32, IDENTITY)),
        "MBConv",
        "is not the blur-pool that is supported",
    ),
    "another blur padding": (
        lambda: mbconv(blur=Blur(32, mode="replicate")),
        "MBConv",
        "what is padded in it is not the blur-pool that is supported: [1, 2, 1] / 4 in each direction, stride 2",
    ),
    "another blur-pool of ConvFirst": (
        lambda: concatenated(lambda x, y: [x, y], Blur(32, IDENTITY)),
        "ConvFirst",
        "is not the blur-pool that is supported",
    ),
    "stem padding": (
        lambda: Function(lambda m, x: m.conv(x[:, :3]), conv=nn.Conv2d(3, 8, 3, 2)),
        "stem",
        "has padding (0, 0), supported is half the kernel size, (1, 1)",
    ),
    "stem padded ahead": (
        lambda: Function(lambda m, x: m.conv(F.pad(x[:, :3], (0, 1, 0, 1))), conv=nn.Conv2d(3, 8, 3, 2)),
        "stem",
        "is padded by a layer ahead of it (constant)",
    ),
    "stem activation": (
        lambda: Function(lambda m, x: F.mish(m.conv(x[:, :3])), conv=nn.Conv2d(3, 8, 3, 2, 1)),
        "stem",
        "the activation 'mish' of its convolution is not supported, use one of relu, silu",
    ),
    "pooled head": (
        lambda: Function(lambda m, x: F.relu(m.conv(x)).mean((2, 3), keepdim=True), conv=nn.Conv2d(16, 8, 1)),
        "head",
        "its pooled channels stay [N, K, 1, 1]; supported is [N, K], flatten them",
    ),
    "head's map given out": (
        lambda: Function(lambda m, x: ((y := F.relu(m.conv(x))).mean((2, 3)), y), conv=nn.Conv2d(16, 8, 1)),
        "head",
        "is an output of the graph",
    ),
}


class Hard(nn.Module):
    """A gate by the hard sigmoid."""

    def __init__(self):
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(32, 4, 1), nn.Conv2d(4, 32, 1)

    def forward(self, x):
        return x * F.hardsigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))


class Soft(nn.Module):
    """A gate by the softmax over channels."""

    def __init__(self):
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(32, 4, 1), nn.Conv2d(4, 32, 1)

    def forward(self, x):
        return x * self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))).softmax(1)


@spelled
@pytest.mark.parametrize("case", LEFT)
def test_reasons(case, spelling):
    make, kind, *parts = LEFT[case]
    model = make().eval()
    x = X.double()
    (left,) = find(SPELLINGS[spelling](model.double(), x)).left
    assert left.kind == kind
    for part in parts:
        assert part in left.reason


def test_an_input_without_a_batch():
    layers = {"conv": nn.Conv2d(16, 16, 3, padding=1, groups=2), "expand": nn.Conv2d(16, 48, 1)}
    model = Function(lambda m, x: m.project(F.relu(m.expand(m.conv(x)))), **layers, project=nn.Conv2d(48, 16, 1))
    (left,) = find(exported_graph(model, X[0])).left
    assert left.reason == "its input has 3 dimensions, supported is [N, C, H, W]"


@spelled
def test_a_padding_mode(spelling):
    """A module's own, or a layer ahead of the convolution where modules are taken apart."""
    (left,) = find(SPELLINGS[spelling](convfirst(padding_mode="circular").eval(), X)).left
    assert "padding mode 'circular'" in left.reason or "padded by a layer ahead of it (circular)" in left.reason


@spelled
def test_batch_norm_in_training_mode(spelling):
    block = ConvFirst(16, 16, expansion=3).eval()
    block.expand_bn.train()
    (left,) = find(SPELLINGS[spelling](block, X)).left
    assert left.reason.startswith(
        "the batch norm of its expansion normalises by the batch's own statistics; call eval()"
    )
    without = ConvFirst(16, 16, expansion=3)
    without.conv_bn = nn.BatchNorm2d(16, track_running_stats=False)
    (left,) = find(SPELLINGS[spelling](without.eval(), X)).left
    assert "the batch norm of its spatial convolution normalises" in left.reason


@pytest.mark.parametrize("build", [dynamo_graph, exported_graph])
def test_weights_that_are_no_constants(build):
    graph = build(ConvFirst(16, 16, expansion=3).eval(), X)
    names = [node for node in graph.constants if "expand_w" in node.name or "expand_parameters_w" in node.name]
    assert len(names) == 1
    del graph.constants[names[0]]
    (left,) = find(graph).left
    assert "weight of its expansion is" in left.reason and "no parameter of the model" in left.reason
    meta = {node: value.to("meta") for node, value in graph.constants.items()}
    (left,) = find_blocks(graph.module, meta).left
    assert "has no values (meta device)" in left.reason


@spelled
@pytest.mark.parametrize("what", ["weight", "computed", "statistics"])
def test_weights_that_are_computed(what, spelling):
    block = ConvFirst(16, 16, expansion=3).eval()

    def forward(m, x):
        b = m.block
        y = b.conv_bn(b.conv(x))
        weight = b.expand.weight
        if what == "weight":
            weight = weight * x.mean()
        elif what == "computed":
            weight = torch.tanh(weight)
        h = F.conv2d(y, weight, b.expand.bias)
        mean = b.expand_bn.running_mean + (x.sum() if what == "statistics" else 0)
        h = F.batch_norm(h, mean, b.expand_bn.running_var, b.expand_bn.weight, b.expand_bn.bias)
        return b.project(F.relu(h))

    findings = find(SPELLINGS[spelling](Function(forward, block=block), X))
    assert not findings.found
    if spelling != "symbolic":  # which does not tell the size of such a weight
        assert "is computed by the graph" in findings.left[0].reason


@pytest.mark.parametrize("spelling", ["dynamo", "export"])
def test_a_weight_that_the_graph_changes(spelling):
    block = ConvFirst(16, 16, expansion=3).eval().requires_grad_(False)

    def forward(m, x):
        m.count.add_(1)
        m.block.project_bn.running_mean.add_(m.count)
        return m.block(x)

    model = Function(forward, block=block)
    model.register_buffer("count", torch.zeros(16))
    (left,) = find(SPELLINGS[spelling](model, X)).left
    assert "the batch norm's mean of its projection may be changed in place by the graph" in left.reason


def test_hooks_are_not_lost():
    block = ConvFirst(16, 16, expansion=3).eval()
    graph = symbolic_graph(block, X)
    graph.module.get_submodule("expand").register_forward_hook(lambda module, args, out: 2 * out)
    assert find(graph).found == ()


def test_other_subclasses_are_not_read():
    class Doubled(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    graph = symbolic_graph(ConvFirst(16, 16, expansion=3).eval(), X)
    graph.module.expand = Doubled(16, 48, 1)
    assert find(graph).found == ()


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="autocast on CPUs needs it")
def test_blocks_under_autocast():
    def forward(m, x):
        with torch.autocast("cpu", torch.bfloat16):
            y = m.a(x)
        return m.b(y.float())

    model = Function(forward, a=ConvFirst(16, 16, expansion=3), b=ConvFirst(16, 16, expansion=3)).eval()
    findings = find(dynamo_graph(model, X))
    assert [block.name for block in findings.found] == ["b"]
    (left,) = findings.left
    assert left.name == "a" and left.reason.startswith("it runs under torch.autocast")


@spelled
@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: F.relu(m.bn(m.conv3(F.relu(m.conv1(x))))) + x,
        lambda m, x: m.narrow(F.relu(m.conv3(F.relu(m.conv1(x))))),
        lambda m, x: m.conv3(x).mean((2, 3)),
        lambda m, x: m.depthwise(x),
        lambda m, x: m.depthwise(x) + m.conv1(x),
        lambda m, x: F.relu(m.conv1(F.relu(m.depthwise(x)))),
        lambda m, x: m.conv1(F.adaptive_avg_pool2d(x, 1)).flatten(1),
        lambda m, x: m.narrow(F.relu(m.conv1(x.mean((2, 3), keepdim=True)))),
        lambda m, x: m.wide(F.relu(m.narrow(x))),
        lambda m, x: x * torch.sigmoid(m.wide(F.relu(m.narrow(x.mean((2, 3), keepdim=True))))),
        lambda m, x: m.stem7(x),
    ],
)
def test_what_is_no_block(function, spelling):
    layers = {
        "conv1": nn.Conv2d(16, 16, 1),
        "conv3": nn.Conv2d(16, 16, 3, padding=1),
        "bn": nn.BatchNorm2d(16),
        "narrow": nn.Conv2d(16, 4, 1),
        "wide": nn.Conv2d(4, 16, 1),
        "depthwise": nn.Conv2d(16, 16, 3, padding=1, groups=16),
        "stem7": nn.Conv2d(16, 16, 7, stride=2, padding=3),
    }
    findings = find(SPELLINGS[spelling](Function(function, **layers).eval(), X))
    assert findings.found == findings.left == ()


@spelled
def test_a_stem_of_many_channels_is_none(spelling):
    findings = find(SPELLINGS[spelling](ConvBnAct(16, 16, 3, stride=2).eval(), X))
    assert findings.found == findings.left == ()


@spelled
def test_what_is_left_alone_stays_as_it_is(spelling):
    model = nn.Sequential(
        ConvFirst(16, 16, expansion=3), convfirst(kernel_size=5, padding=2), ConvFirst(16, 16, expansion=3)
    )
    findings = check(model, X, spelling, ["ConvFirst", "ConvFirst"])
    assert [block.name for block in findings.found] == ["0", "2"]
    assert [block.name for block in findings.left] == ["1"]


@spelled
def test_concatenations_of_something_else(spelling):
    for tensors in (lambda x, y: [y, x], lambda x, y: [x, y + 1], lambda x, y: [torch.sin(x), y]):
        findings = find(SPELLINGS[spelling](concatenated(tensors, BlurPool(32)).eval(), X))
        assert "ConvFirst" not in [block.kind for block in findings.found]

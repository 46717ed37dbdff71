"""Blocks in many spellings are found, and their twins compute what the model's layers do."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fusion.down_modules import FusedConvFirstDown, FusedMBConvDown
from fusion.modules import FusedConvFirst, FusedFfn, FusedMBConv
from models import BlurPool, ConvBnAct, ConvFirst, Ffn, MBConv, PooledHead
from tests.frontend_graphs import SPELLINGS, Function, check

X = torch.randn(2, 16, 7, 9, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 3, 9, 7, generator=torch.Generator().manual_seed(1))

spelled = pytest.mark.parametrize("spelling", SPELLINGS)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@spelled
@pytest.mark.parametrize(
    "block, kind, twin",
    [
        (lambda: ConvFirst(16, 16, expansion=3), "ConvFirst", FusedConvFirst),
        (lambda: ConvFirst(16, 24, expansion=3, group_width=4), "ConvFirst", FusedConvFirst),
        (lambda: ConvFirst(16, 16, expansion=3, group_width=16), "ConvFirst", FusedConvFirst),
        (lambda: ConvFirst(16, 24, expansion=3, stride=2), "ConvFirst", FusedConvFirstDown),
        (lambda: ConvFirst(16, 24, expansion=3, stride=2, blur=False), "ConvFirst", FusedConvFirst),
        (lambda: MBConv(16, 16, expansion=2), "MBConv", FusedMBConv),
        (lambda: MBConv(16, 24, expansion=2, group_width=4), "MBConv", FusedMBConv),
        (lambda: MBConv(16, 24, expansion=2, stride=2), "MBConv", FusedMBConvDown),
        (lambda: Ffn(16, 16, expansion=4), "FFN", FusedFfn),
        (lambda: Ffn(16, 24, expansion=4), "FFN", FusedFfn),
    ],
)
def test_the_blocks_of_our_models(block, kind, twin, spelling):
    block = block()
    (found,) = check(block, X, spelling, [kind]).found
    assert type(found.block) is twin
    assert found.block.options == block.fused().options
    for name, tensor in vars(block.fused().weights).items():
        torch.testing.assert_close(getattr(found.block.weights, name), tensor)


@spelled
@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU, nn.Identity])
@pytest.mark.parametrize("in_chans", [1, 3, 4])
def test_stems(in_chans, activation, spelling):
    x = torch.randn(2, in_chans, 9, 7)
    check(ConvBnAct(in_chans, 16, 3, stride=2, activation=activation), x, spelling, ["stem"])


@spelled
@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU, nn.Identity])
@pytest.mark.parametrize(
    "pool",
    [
        lambda x: x.mean((2, 3)),
        lambda x: torch.mean(x, dim=[-1, -2]),
        lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1),
        lambda x: F.adaptive_avg_pool2d(x, (1, 1)).view(-1, 24),
        lambda x: torch.flatten(x.mean([2, 3], keepdim=True), 1, -1),
        lambda x: x.mean((2, 3), True).squeeze(-1).squeeze(-1),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Identity(), nn.Flatten()),
    ],
    ids=["mean", "torch.mean", "flatten", "view", "torch.flatten", "squeeze", "modules"],
)
def test_heads(pool, activation, spelling):
    layers = {"conv": nn.Conv2d(16, 24, 1), "bn": nn.BatchNorm2d(24), "act": activation()}
    layers["fc"] = nn.Linear(24, 5)
    if isinstance(pool, nn.Module):
        layers["pool"] = pool
    model = Function(lambda m, x: m.fc(getattr(m, "pool", pool)(m.act(m.bn(m.conv(x))))), **layers)
    (found,) = check(model, X, spelling, ["head"]).found
    assert found.block.weights.out_channels == 24


class Gated(nn.Module):
    """An MBConv block of which the gate is a function of the module and the activated map."""

    def __init__(self, gate, *, linear, hidden=32, keep_bn=True, squeeze_act=None, bias=True):
        super().__init__()
        self.expand, self.bn1 = nn.Conv2d(16, hidden, 1, bias=False), nn.BatchNorm2d(hidden)
        self.conv, self.bn2 = nn.Conv2d(hidden, hidden, 3, padding=1, groups=4, bias=False), nn.BatchNorm2d(hidden)
        self.act = nn.SiLU(inplace=True)
        if linear:
            self.fc1, self.fc2 = nn.Linear(hidden, 6, bias=bias), nn.Linear(6, hidden, bias=bias)
        else:
            self.fc1, self.fc2 = nn.Conv2d(hidden, 6, 1, bias=bias), nn.Conv2d(6, hidden, 1, bias=bias)
        self.squeeze_act = squeeze_act or nn.ReLU(inplace=True)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.project, self.bn3 = nn.Conv2d(hidden, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.gate = gate

    def scores(self, pooled):
        return self.fc2(self.squeeze_act(self.fc1(pooled)))

    def forward(self, x):
        y = self.act(self.bn1(self.expand(x)))
        y = self.act(self.bn2(self.conv(y)))
        return x + self.bn3(self.project(self.gate(self, y)))


def classic(m, y):
    batch, channels, _, _ = y.size()
    gate = torch.sigmoid(m.scores(m.pool(y).view(batch, channels))).view(batch, channels, 1, 1)
    return y * gate.expand_as(y)


def by_shape(m, y):
    gate = m.scores(y.mean((2, 3)).reshape(y.shape[0], -1)).sigmoid()
    return gate.reshape(y.shape[0], y.shape[1], 1, 1) * y


def in_place(m, y):
    gate = m.scores(y.mean((2, 3))).sigmoid_()
    return y.mul_(gate.unsqueeze(-1).unsqueeze(-1))


def in_place_operator(m, y):
    gate = torch.sigmoid(m.scores(F.adaptive_avg_pool2d(y, (1, 1)).flatten(1)))
    y *= gate[..., None, None]
    return y


LINEAR_GATES = {
    "classic": classic,
    "shape": by_shape,
    "in place": in_place,
    "in-place operator": in_place_operator,
    "none": lambda m, y: y * torch.sigmoid(m.scores(y.mean([-1, -2])))[:, :, None, None],
    "expand": lambda m, y: y * F.sigmoid(m.scores(m.pool(y).flatten(1))).view(-1, 32, 1, 1).expand(-1, -1, 7, 9),
    "squeeze": lambda m, y: torch.mul(m.scores(m.pool(y).squeeze(3).squeeze(2)).sigmoid().view(2, 32, 1, 1), y),
    "unflattened": lambda m, y: y * m.scores(torch.flatten(m.pool(y), 1)).sigmoid().unsqueeze(2).unsqueeze(3),
}
CONV_GATES = {
    "keepdim": lambda m, y: y * m.scores(y.mean((2, 3), keepdim=True)).sigmoid(),
    "pool": lambda m, y: torch.sigmoid(m.scores(m.pool(y))) * y,
    "function": lambda m, y: y.mul_(torch.sigmoid(m.scores(F.adaptive_avg_pool2d(y, 1)))),
    "unsqueezed": lambda m, y: y * m.scores(y.mean((2, 3))[:, :, None, None]).sigmoid(),
    "viewed": lambda m, y: y * m.scores(y.mean((2, 3)).view(y.size(0), -1, 1, 1)).sigmoid(),
    "expanded": lambda m, y: y * m.scores(m.pool(y)).sigmoid().expand_as(y),
}


@spelled
@pytest.mark.parametrize("gate", LINEAR_GATES)
def test_gates_of_linear_layers(gate, spelling):
    check(Gated(LINEAR_GATES[gate], linear=True), X, spelling, ["MBConv"])


@spelled
@pytest.mark.parametrize("gate", CONV_GATES)
def test_gates_of_convolutions(gate, spelling):
    check(Gated(CONV_GATES[gate], linear=False), X, spelling, ["MBConv"])


@spelled
@pytest.mark.parametrize("act", [nn.ReLU(), nn.SiLU(inplace=True)])
def test_the_activation_of_a_gate(act, spelling):
    model = Gated(CONV_GATES["keepdim"], linear=False, squeeze_act=act, bias=False)
    (found,) = check(model, X, spelling, ["MBConv"]).found
    assert found.block.squeeze_activation == type(act).__name__.lower()
    assert not found.block.weights.squeeze_bias.any()


@spelled
def test_batch_norm_in_a_gate(spelling):
    act = nn.Sequential(nn.BatchNorm2d(6), nn.ReLU())
    check(Gated(CONV_GATES["pool"], linear=False, squeeze_act=act), X, spelling, ["MBConv"])


@spelled
@pytest.mark.parametrize("kernel_size", [3, 5])
def test_kernel_sizes_of_mbconv(kernel_size, spelling):
    model = Gated(CONV_GATES["keepdim"], linear=False)
    model.conv = nn.Conv2d(32, 32, kernel_size, padding=kernel_size // 2, groups=4)
    (found,) = check(model, X, spelling, ["MBConv"]).found
    assert found.block.weights.kernel_size == kernel_size


@spelled
@pytest.mark.parametrize("blur", [True, False])
def test_mbconv_of_stride_2(blur, spelling):
    model = Gated(CONV_GATES["keepdim"], linear=False)
    if blur:
        model.act2 = nn.Sequential(nn.SiLU(inplace=True), BlurPool(32))
    else:
        model.act2, model.conv.stride = nn.SiLU(inplace=True), (2, 2)

    def forward(m, x):
        y = m.act2(m.bn2(m.conv(m.act(m.bn1(m.expand(x))))))
        return m.bn3(m.project(m.gate(m, y)))

    model = Function(lambda m, x: forward(m.block, x), block=model)
    (found,) = check(model, X, spelling, ["MBConv"]).found
    assert type(found.block) is FusedMBConvDown and found.block.blur is blur


def convfirst_layers(**options):
    return {
        "conv": nn.Conv2d(16, 16, 3, padding=1, groups=2, **options),
        "expand": nn.Conv2d(16, 48, 1, **options),
        "project": nn.Conv2d(48, 16, 1, **options),
    }


def bare(m, x, act=F.relu):
    return m.project(act(m.expand(m.conv(x))))


RESIDUALS = {
    "x + y": lambda m, x: x + bare(m, x),
    "y + x": lambda m, x: bare(m, x) + x,
    "torch.add": lambda m, x: torch.add(bare(m, x), x),
    "add": lambda m, x: x.add(bare(m, x)),
    "y.add_(x)": lambda m, x: bare(m, x).add_(x),
    "dropout": lambda m, x: x + m.drop(bare(m, x)),
    "x.add_(y)": lambda m, x: (z := F.relu(m.first(x))).add_(bare(m, z)),
    "contiguous": lambda m, x: (z := torch.sin(x)) + bare(m, z.contiguous()),
}


def iadd(m, x):
    y = bare(m, x)
    y += x
    return y


RESIDUALS["y += x"] = iadd


@spelled
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("residual", RESIDUALS)
def test_residuals_and_convolutions_without_batch_norm(residual, bias, spelling):
    model = Function(
        RESIDUALS[residual], **convfirst_layers(bias=bias), drop=nn.Dropout(0.3), first=nn.Conv2d(16, 16, 1)
    )
    (found,) = check(model, X, spelling, ["ConvFirst"]).found
    assert found.block.residual


@spelled
def test_a_sum_with_something_else_is_no_residual(spelling):
    layers = convfirst_layers()
    for function in (
        lambda m, x: torch.sin(x) + bare(m, x),
        lambda m, x: torch.add(x, bare(m, x), alpha=2),
        lambda m, x: (y := bare(m, x)) + y,
        lambda m, x: x - bare(m, x),
    ):
        (found,) = check(Function(function, **layers), X, spelling, ["ConvFirst"]).found
        assert not found.block.residual


@spelled
def test_a_projection_used_twice_ends_the_block(spelling):
    model = Function(lambda m, x: (x + (y := bare(m, x))) * y.mean(), **convfirst_layers())
    (found,) = check(model, X, spelling, ["ConvFirst"]).found
    assert not found.block.residual


ACTIVATIONS = {
    "nn.ReLU": (nn.ReLU(inplace=True), "relu"),
    "nn.SiLU": (nn.SiLU(inplace=True), "silu"),
    "nn.ReLU6": (nn.ReLU6(inplace=True), "relu6"),
    "nn.Hardtanh": (nn.Hardtanh(0, 6), "relu6"),
    "nn.GELU": (nn.GELU(), "gelu"),
    "nn.Hardswish": (nn.Hardswish(inplace=True), "hardswish"),
    "F.relu": (F.relu, "relu"),
    "torch.relu": (torch.relu, "relu"),
    "torch.relu_": (torch.relu_, "relu"),
    "x.relu_": (lambda x: x.relu_(), "relu"),
    "F.silu": (lambda x: F.silu(x, inplace=True), "silu"),
    "F.relu6": (F.relu6, "relu6"),
    "F.hardtanh": (lambda x: F.hardtanh(x, 0.0, 6.0), "relu6"),
    "F.gelu": (F.gelu, "gelu"),
    "F.hardswish": (F.hardswish, "hardswish"),
}


@spelled
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations(act, spelling):
    act, name = ACTIVATIONS[act]
    layers = convfirst_layers()
    layers |= {"act": act} if isinstance(act, nn.Module) else {}
    model = Function(lambda m, x: bare(m, x, getattr(m, "act", act)), **layers)
    (found,) = check(model, X, spelling, ["ConvFirst"]).found
    assert found.block.activation == name


@spelled
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_batch_norms(bias, affine, spelling):
    layers = convfirst_layers(bias=bias)
    layers |= {f"bn{n}": nn.BatchNorm2d(c, affine=affine, eps=1e-2) for n, c in enumerate((16, 48, 16))}
    model = Function(
        lambda m, x: x + m.bn2(m.project(F.relu(m.bn1(m.expand(m.bn0(m.conv(x)))), inplace=True))), **layers
    )
    check(model, X, spelling, ["ConvFirst"])


def test_padding_by_name():
    layers = convfirst_layers() | {"conv": nn.Conv2d(16, 16, 3, padding="same", groups=2)}
    for spelling in SPELLINGS:
        check(Function(bare, **layers), X, spelling, ["ConvFirst"])


class LayerScale(nn.Module):
    def __init__(self, shape, inplace):
        super().__init__()
        self.inplace = inplace
        self.gamma, self.is_vector = nn.Parameter(torch.rand(shape)), len(shape) == 1

    def forward(self, x):
        gamma = self.gamma.view(1, -1, 1, 1) if self.is_vector else self.gamma
        return x.mul_(gamma) if self.inplace else x * gamma


@spelled
@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("shape", [(16,), (16, 1, 1), (1, 16, 1, 1)], ids=str)
def test_layer_scale(shape, inplace, spelling):
    layers = convfirst_layers() | {"bn": nn.BatchNorm2d(16), "scale": LayerScale(shape, inplace)}
    model = Function(lambda m, x: x + m.scale(m.bn(bare(m, x))), **layers)
    (found,) = check(model, X, spelling, ["ConvFirst"]).found
    assert found.block.residual


@spelled
def test_what_is_no_layer_scale(spelling):
    """Along the width, and a product that is used twice."""
    x = X[..., :16].expand(-1, -1, -1, 9)[..., :1].expand(-1, -1, -1, 16).contiguous()
    scale = LayerScale((16,), False)
    along_width = Function(lambda m, x: x + bare(m, x) * m.scale.gamma, **convfirst_layers(), scale=scale)
    (found,) = check(along_width, x, spelling, ["ConvFirst"]).found
    assert not found.block.residual and found.output.name != "mul"
    by_number = Function(lambda m, x: x + 0.5 * bare(m, x), **convfirst_layers())
    (found,) = check(by_number, X, spelling, ["ConvFirst"]).found
    assert found.block.residual


class TimmBlurPool(nn.Module):
    """A filter for one channel, expanded to all of them, and padding by a module's sizes."""

    def __init__(self, channels):
        super().__init__()
        self.channels = channels
        coefficients = torch.tensor([1.0, 2.0, 1.0]) / 4
        self.register_buffer("filt", (coefficients[:, None] * coefficients[None])[None, None], persistent=False)

    def forward(self, x):
        x = F.pad(x, [1, 1, 1, 1], mode="reflect")
        return F.conv2d(x, self.filt.expand(self.channels, -1, -1, -1), stride=2, groups=self.channels)


@spelled
def test_a_blur_pool_of_an_expanded_filter(spelling):
    layers = convfirst_layers() | {"expand": nn.Conv2d(32, 48, 1), "blur": TimmBlurPool(32)}
    model = Function(lambda m, x: m.project(F.relu(m.expand(m.blur(torch.cat([x, m.conv(x)], dim=1))))), **layers)
    (found,) = check(model, X, spelling, ["ConvFirst"]).found
    assert type(found.block) is FusedConvFirstDown


@spelled
def test_depth_wise_convolutions(spelling):
    layers = convfirst_layers() | {"conv": nn.Conv2d(16, 16, 3, padding=1, groups=16)}
    (found,) = check(Function(bare, **layers), X, spelling, ["ConvFirst"]).found
    assert found.block.weights.group_width == 1


@spelled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype, spelling):
    """Weights are folded in float64 from what the model has."""
    from tests.frontend_graphs import find, with_random_statistics

    block = with_random_statistics(ConvFirst(16, 16, expansion=3)).eval().to(dtype)
    (found,) = find(SPELLINGS[spelling](block, X.to(dtype))).found
    torch.testing.assert_close(found.block.weights.expand, block.fused().weights.expand)


@pytest.mark.parametrize("gate", ["classic", "shape", "none", "in place"])
def test_dynamic_shapes(gate):
    dynamic = {0: torch.export.Dim("batch", min=2), 2: torch.export.Dim("height", min=4)}
    check(Gated(LINEAR_GATES[gate], linear=True), X, "export", ["MBConv"], dynamic_shapes=(dynamic,))
    check(Gated(LINEAR_GATES[gate], linear=True), X, "dynamo", ["MBConv"], dynamic=True)


@spelled
def test_chains_of_blocks(spelling):
    model = nn.Sequential(
        ConvBnAct(3, 16, 3, stride=2),
        ConvFirst(16, 16, expansion=3),
        ConvFirst(16, 24, expansion=3, stride=2),
        MBConv(24, 24, expansion=2),
        Ffn(24, 24, expansion=2),
        PooledHead(24, 32),
        nn.Linear(32, 5),
    )
    found = check(model, IMAGES, spelling, ["stem", "ConvFirst", "ConvFirst", "MBConv", "FFN", "head"]).found
    assert [block.name for block in found] == ["0", "1", "2", "3", "4", "5"]

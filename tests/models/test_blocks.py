import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import BlurPool, ConvFirst, DropPath, MBConv, SqueezeExcite


def blurpool_reference(x):
    """One output pixel at a time, in float64."""
    weights = np.array([1, 2, 1]) / 4

    def reflect(index, size):
        index = abs(index)
        return 2 * (size - 1) - index if index >= size else index

    n, c, height, width = x.shape
    out = np.zeros((n, c, (height + 1) // 2, (width + 1) // 2))
    for i in range(out.shape[2]):
        for j in range(out.shape[3]):
            for r in range(3):
                for s in range(3):
                    pixel = x[:, :, reflect(2 * i + r - 1, height), reflect(2 * j + s - 1, width)]
                    out[:, :, i, j] += weights[r] * weights[s] * pixel
    return out


def with_random_batch_norm(block):
    """Give every batch norm statistics and an affine map that are not the identity."""
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight, mean=1, std=0.1)
            nn.init.normal_(module.bias, std=0.1)
    return block.double().eval()


def conv_then_bn(x, conv, bn):
    """Convolution and batch norm written out; a grouped convolution as a dense one with a block-diagonal kernel."""
    out_width = conv.out_channels // conv.groups
    kernel = torch.zeros(conv.out_channels, conv.in_channels, *conv.kernel_size, dtype=x.dtype)
    for group in range(conv.groups):
        rows = slice(group * out_width, (group + 1) * out_width)
        columns = slice(group * conv.weight.shape[1], (group + 1) * conv.weight.shape[1])
        kernel[rows, columns] = conv.weight[rows]
    y = F.conv2d(x, kernel, conv.bias, padding=conv.kernel_size[0] // 2)

    def per_channel(v):
        return v[:, None, None]

    normalised = (y - per_channel(bn.running_mean)) / per_channel(bn.running_var + bn.eps).sqrt()
    return normalised * per_channel(bn.weight) + per_channel(bn.bias)


def blurred(x):
    return torch.from_numpy(blurpool_reference(x.numpy()))


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (2, 3), (6, 9)])
def test_blurpool_against_loops(size):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(BlurPool(3).double()(x), blurred(x))


def test_blurpool_has_no_state():
    blur = BlurPool(8)
    assert not blur.state_dict() and not list(blur.parameters())
    assert torch.equal(blur.filter, blur.bfloat16().filter.float())
    torch.testing.assert_close(blur.filter.float().sum((1, 2, 3)), torch.ones(8))


@torch.no_grad()
@pytest.mark.parametrize(
    ("stride", "out_channels", "blur"), [(1, 16, True), (1, 24, True), (2, 16, True), (2, 24, True), (2, 16, False)]
)
def test_convfirst_against_its_definition(stride, out_channels, blur):
    torch.manual_seed(0)
    block = with_random_batch_norm(ConvFirst(16, out_channels, expansion=6, stride=stride, blur=blur))
    x = torch.randn(2, 16, 7, 6, dtype=torch.float64)
    y = conv_then_bn(x, block.conv, block.conv_bn)
    if not blur:
        y = y[..., ::2, ::2]
    elif stride == 2:
        y = blurred(torch.cat([x, y], 1))
    y = conv_then_bn(y, block.expand, block.expand_bn).clamp(min=0)
    y = conv_then_bn(y, block.project, block.project_bn)
    if stride == 1 and out_channels == 16:
        y = y + x
    torch.testing.assert_close(block(x), y)


@torch.no_grad()
@pytest.mark.parametrize(("stride", "out_channels"), [(1, 16), (1, 24), (2, 16), (2, 24)])
@pytest.mark.parametrize("squeeze_activation", [nn.ReLU, nn.SiLU])
def test_mbconv_against_its_definition(squeeze_activation, stride, out_channels):
    torch.manual_seed(0)
    block = with_random_batch_norm(MBConv(16, out_channels, stride=stride, squeeze_activation=squeeze_activation))
    x = torch.randn(2, 16, 7, 6, dtype=torch.float64)
    y = conv_then_bn(x, block.expand, block.expand_bn)
    y = conv_then_bn(y * y.sigmoid(), block.conv, block.conv_bn)
    y = y * y.sigmoid()
    if stride == 2:
        y = blurred(y)
    squeeze, excite = block.se.squeeze, block.se.excite
    assert squeeze.out_features == 4
    s = y.mean((2, 3)) @ squeeze.weight.T + squeeze.bias
    s = s.clamp(min=0) if squeeze_activation is nn.ReLU else s * s.sigmoid()
    y = y * (s @ excite.weight.T + excite.bias).sigmoid()[:, :, None, None]
    y = conv_then_bn(y, block.project, block.project_bn)
    if stride == 1 and out_channels == 16:
        y = y + x
    torch.testing.assert_close(block(x), y)


def test_options_reach_the_block():
    block = MBConv(32, 32, expansion=2, group_width=16, se_ratio=0.5, activation=nn.Hardswish, drop_path=0.1)
    assert (block.hidden_channels, block.conv.groups, block.se.squeeze.out_features) == (64, 4, 16)
    assert isinstance(block.act, nn.Hardswish) and block.drop_path.p == 0.1
    block = ConvFirst(32, 32, expansion=2, group_width=16, activation=nn.SiLU, drop_path=0.1)
    assert (block.hidden_channels, block.conv.groups) == (64, 2)
    assert isinstance(block.act, nn.SiLU) and block.drop_path.p == 0.1


@pytest.mark.parametrize("block_type", [ConvFirst, MBConv])
def test_unsupported_blocks(block_type):
    with pytest.raises(ValueError, match="stride 1 or 2, got 3"):
        block_type(16, 16, expansion=4, stride=3)
    with pytest.raises(ValueError, match="multiple of the group width"):
        block_type(15, 16, expansion=3)
    with pytest.raises(ValueError, match="group width 0"):
        block_type(16, 16, expansion=3, group_width=0)


def test_squeeze_excite_needs_a_squeeze_channel():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        SqueezeExcite(16, 0)


def test_drop_path_statistics():
    torch.manual_seed(0)
    drop_path = DropPath(0.25)
    x = torch.ones(20_000, 2, 1, 3)
    y = drop_path(x)
    samples = y.flatten(1)
    assert (samples == samples[:, :1]).all(), "a sample is dropped or kept as a whole"
    torch.testing.assert_close(samples.unique(), torch.tensor([0, 4 / 3]))
    assert y.mean().item() == pytest.approx(1, abs=0.02)
    assert drop_path.eval()(x) is x


@pytest.mark.parametrize("p", [-0.1, 1.0])
def test_drop_path_probability(p):
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\)"):
        DropPath(p)


@pytest.mark.parametrize("block_type", [ConvFirst, MBConv])
def test_drop_path_spares_the_shortcut(block_type):
    torch.manual_seed(0)
    block = block_type(16, 16, expansion=4, drop_path=0.5).train()
    x = torch.randn(64, 16, 4, 4)
    dropped = (block(x) == x).flatten(1).all(1)
    assert 10 < dropped.sum() < 54

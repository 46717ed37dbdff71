import pytest
import torch
from torch import nn

from fusion.ffn_weights import FfnWeights, PackedFfn, ffn_sizes, unpack_ffn
from fusion.planner.ffn_tile import FfnTile
from fusion.reference import ffn
from models import Ffn

TILE = FfnTile(blocks=1, hidden=32, stages=2, expand_chunks=2, project_chunks=2, x_in_registers=0)


@pytest.fixture
def random_module():
    """`(channels, out_channels) -> models.Ffn` in eval mode, with random batch norm statistics, float64."""

    def make(channels, out_channels):
        torch.manual_seed(channels)
        block = Ffn(channels, out_channels, expansion=3).eval().double()
        for bn in (block.expand_bn, block.project_bn):
            nn.init.uniform_(bn.weight, 0.5, 1.5)
            nn.init.normal_(bn.bias)
            bn.running_mean.normal_()
            bn.running_var.uniform_(0.5, 2.0)
        return block.requires_grad_(False)

    return make


@pytest.mark.parametrize("out_channels", [24, 40])
def test_folded_weights_compute_the_block(out_channels, random_module):
    block = random_module(24, out_channels)
    x = torch.randn(2, 24, 5, 7, dtype=torch.float64)
    fused = block.fused()
    folded = ffn(x, *vars(fused.weights).values(), "relu", residual=out_channels == 24)
    torch.testing.assert_close(folded, block(x))
    torch.testing.assert_close(fused(x), block(x), rtol=0, atol=1e-6)  # the project bias is packed in fp32
    assert fused(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("sizes", [(24, 40, 24), (64, 64, 72), (144, 100, 8), (112, 33, 48)], ids=str)
def test_packing_is_undone(sizes, random_ffn_weights):
    channels, hidden, out_channels = sizes
    weights = random_ffn_weights(channels, hidden, out_channels)
    packed = weights.pack(TILE, torch.float64, "cpu")
    assert [list(tensor.shape) for tensor in packed.tensors()] == list(ffn_sizes(TILE, *sizes))
    for name, tensor in vars(unpack_ffn(packed, TILE, *sizes)).items():
        expected = getattr(weights, name)
        assert torch.equal(tensor, expected.float() if name == "project_bias" else expected)


def test_layout():
    """Step by step U transposed, then V, each slab in rows of 64; the bias as quads of threads hold it."""
    expand, project = torch.arange(64 * 80.0).reshape(64, 80), -torch.arange(16 * 64.0).reshape(16, 64)
    packed: PackedFfn = FfnWeights(expand, torch.arange(64.0), project, torch.arange(16.0)).pack(
        TILE, torch.float32, "cpu"
    )
    rows = packed.weights.reshape(2, 3, 32, 64)
    assert torch.equal(rows[1, 0], expand[32:, :64])
    assert torch.equal(rows[1, 1, :, :16], expand[32:, 64:])
    assert torch.equal(rows[1, 2, :, :16], project[:, 32:].T)
    assert not rows[:, 1:, :, 16:].any()
    assert packed.hidden_bias[32:40].tolist() == [32, 33, 40, 41, 48, 49, 56, 57]


def test_a_module_in_training_or_with_another_activation_is_refused():
    with pytest.raises(RuntimeError, match=r"in training mode cannot be fused; call eval\(\) first"):
        Ffn(16, 16, expansion=2).fused()
    with pytest.raises(ValueError, match="no fused kernel runs Ffn with SiLU; supported is ReLU"):
        Ffn(16, 16, expansion=2, activation=nn.SiLU).eval().fused()

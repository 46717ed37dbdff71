import pytest
import torch

from fusion import ops
from fusion.planner.tile import ConvFirstTile
from fusion.reference import convfirst as reference

TILE = ConvFirstTile(4, 8, 32, 32, 2)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture
def arguments(device, random_weights):
    """`(**changes) -> dict` of the operator's arguments for a block with 24 input, 40 hidden, 24 output channels."""

    def make(dtype=torch.float16, out_channels=24, **changes):
        weights = random_weights(24, 40, out_channels)
        packed = weights.pack(TILE, dtype, device)
        torch.manual_seed(0)
        return {
            "x": torch.randn(2, 24, 5, 7).to(device, dtype),
            **{name: getattr(packed, name) for name in packed.__dataclass_fields__},
            "hidden_channels": 40,
            "out_channels": out_channels,
            "group_width": 8,
            "activation": "relu",
            "residual": out_channels == 24,
            "stride": 1,
            "tile": TILE.to_ints(),
            **changes,
        }

    return make


@pytest.mark.parametrize("changes", [{}, {"out_channels": 16, "activation": "gelu", "stride": 2}], ids=str)
def test_opcheck(changes, arguments):
    torch.library.opcheck(torch.ops.fusion.convfirst.default, tuple(arguments(**changes).values()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("out_channels, activation, stride", [(24, "silu", 1), (16, "relu", 1), (16, "hardswish", 2)])
def test_cpus_compute_the_reference(out_channels, activation, stride, dtype, random_weights):
    weights = random_weights(24, 40, out_channels)
    torch.manual_seed(0)
    x = torch.randn(2, 24, 5, 7).to(dtype)
    residual = out_channels == 24
    out = ops.convfirst(
        x,
        *weights.pack(TILE, dtype, "cpu").tensors(),
        40,
        out_channels,
        8,
        activation,
        residual,
        stride,
        TILE.to_ints(),
    )
    # Biases are packed in fp32, whatever the dtype.
    expected = reference(
        x.contiguous(memory_format=torch.channels_last),
        weights.conv,
        weights.expand,
        weights.expand_bias.float(),
        weights.project,
        weights.project_bias.float(),
        activation,
        residual,
        stride,
    )
    assert out.dtype == dtype and out.shape == (2, out_channels, -(-5 // stride), -(-7 // stride))
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


def test_memory_formats_of_the_input_are_equal_and_the_output_is_channels_last(arguments):
    kwargs = arguments()
    x = kwargs.pop("x")
    outs = [
        ops.convfirst(x.contiguous(memory_format=layout), **kwargs)
        for layout in (torch.contiguous_format, torch.channels_last)
    ]
    assert torch.equal(*outs)
    for out in outs:
        assert out.shape == (2, 24, 5, 7)
        assert out.stride() == (5 * 7 * 24, 1, 7 * 24, 24)


def test_strided_input(arguments):
    kwargs = arguments()
    x = kwargs.pop("x")
    wide = torch.stack([x, x], dim=-1).flatten(-2)
    assert torch.equal(ops.convfirst(wide[..., ::2], **kwargs), ops.convfirst(x, **kwargs))


def test_empty_batch(arguments, device):
    out = ops.convfirst(**arguments(x=torch.empty(0, 24, 5, 7, dtype=torch.float16, device=device)))
    assert out.shape == (0, 24, 5, 7) and out.dtype == torch.float16


def test_a_gradient_is_refused(arguments):
    kwargs = arguments()
    kwargs["x"].requires_grad_()
    with pytest.raises(RuntimeError, match=r"has no gradient, but one of its inputs requires.*torch\.no_grad\(\)"):
        ops.convfirst(**kwargs)
    with torch.no_grad():
        assert not ops.convfirst(**kwargs).requires_grad
    kwargs["x"] = kwargs["x"].detach()
    assert not ops.convfirst(**kwargs).requires_grad
    kwargs["project"].requires_grad_()
    with pytest.raises(RuntimeError, match="has no gradient"):
        ops.convfirst(**kwargs)


ERRORS = [
    (lambda k: {"x": k["x"][0]}, ValueError, r"x must be \[N, C, H, W\], got shape \[24, 5, 7\]"),
    (
        lambda k: {"tile": [8, 16]},
        ValueError,
        r"tile must be the 7 integers of ConvFirstTile.to_ints\(\), got \[8, 16\]",
    ),
    (
        lambda k: {"tile": ConvFirstTile(4, 8, 32, 32, 2, ffn_stages=1).to_ints()},
        ValueError,
        "cannot run: loops must be pipelined, in 2 stages at least; take the tile of a plan",
    ),
    (
        lambda k: {"x": torch.empty(1).expand(1, 24, 2**14, 2**13)},
        ValueError,
        "images of 16384x8192 pixels are too large, split them",
    ),
    (
        lambda k: {"activation": "elu"},
        ValueError,
        "activation 'elu' is not supported, use relu or silu or relu6 or gelu or hardswish",
    ),
    (lambda k: {"stride": 3}, ValueError, "stride 3 is not supported, use 1 or 2"),
    (
        lambda k: {"stride": 2},
        ValueError,
        "a residual cannot be added to the smaller output of stride 2; use stride 1, or pass residual=False",
    ),
    (lambda k: {"x": k["x"][:, :20]}, ValueError, "20 input channels are not supported, use a multiple of 8"),
    (lambda k: {"out_channels": 20}, ValueError, "20 output channels are not supported, use a multiple of 8"),
    (lambda k: {"group_width": 5}, ValueError, "24 channels do not divide into groups of 5"),
    (lambda k: {"group_width": 0}, ValueError, "24 channels do not divide into groups of 0"),
    (
        lambda k: {"tile": ConvFirstTile(4, 8, 32, 16, 2).to_ints()},
        ValueError,
        r"conv must be a contiguous \[4608\] for 24 input.*got shape \[9216\].*pack the weights for this tile with",
    ),
    (
        lambda k: {"tile": ConvFirstTile(4, 8, 128, 32, 2).to_ints()},
        ValueError,
        r"expand must be a contiguous \[32, 256\].*got shape \[32, 64\]",
    ),
    (lambda k: {"project": k["project"].T}, ValueError, r"project must be a contiguous \[64, 32\].*shape \[32, 64\]"),
    (
        lambda k: {"expand": k["expand"].T.contiguous().T},
        ValueError,
        r"expand must be a contiguous \[32, 64\].*strides \[1, 32\]",
    ),
    (lambda k: {"expand_bias": k["expand_bias"].half()}, TypeError, "expand_bias has dtype torch.float16, it must be"),
    (lambda k: {"project": k["project"].to("meta")}, RuntimeError, "project is on meta, x on .*; move one of them"),
    (lambda k: {"x": k["x"].to("meta")}, RuntimeError, "x is on meta; supported are CUDA GPUs, and CPUs"),
]


@pytest.mark.parametrize("change, error, message", ERRORS, ids=[message for *_, message in ERRORS])
def test_errors(change, error, message, arguments):
    kwargs = arguments()
    with pytest.raises(error, match=f"fusion::convfirst: .*{message}"):
        ops.convfirst(**{**kwargs, **change(kwargs)})


def test_a_residual_needs_equal_channels(arguments):
    with pytest.raises(ValueError, match=r"24 input channels cannot be added to 16 output.*or pass residual=False"):
        ops.convfirst(**arguments(out_channels=16, residual=True))


def test_slabs_that_split_groups_are_refused(arguments, random_weights, device):
    tile = ConvFirstTile(4, 8, 32, 16, 2)
    conv = random_weights(24, 40).pack(tile, torch.float16, device).conv
    with pytest.raises(ValueError, match=r"slabs \(16, 16\).*split groups of 24 channels"):
        ops.convfirst(**arguments(group_width=24, tile=tile.to_ints(), conv=conv))


@needs_gpu
def test_other_dtypes_are_refused_on_a_gpu(arguments):
    with pytest.raises(TypeError, match=r"x has dtype torch.float32; supported are torch.float16 or torch.bfloat16"):
        ops.convfirst(**arguments(dtype=torch.float32))
    with pytest.raises(TypeError, match=r"conv has dtype torch.bfloat16, it must be torch.float16 for torch.float16 x"):
        ops.convfirst(**{**arguments(dtype=torch.bfloat16), "x": arguments()["x"]})


@needs_gpu
def test_weights_on_the_cpu_are_refused_on_a_gpu(arguments):
    kwargs = arguments()
    with pytest.raises(RuntimeError, match=r"expand is on cpu, x on cuda:0; move one of them"):
        ops.convfirst(**{**kwargs, "expand": kwargs["expand"].cpu()})

from dataclasses import replace

import pytest
import torch

from fusion import mbconv_down_ops
from fusion.planner.mbconv_down_tile import MBConvDownTile
from fusion.reference import mbconv_down as reference

TILE = MBConvDownTile(2, 3, 2, 4, 32, 16, 16, 16, 2, 2, 16, 32, 16, 64, 2, 2)
HAS_GPU = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA GPU")


@pytest.fixture
def arguments(device, random_mbconv_weights):
    """`(**changes) -> dict` of the operator's arguments for 24 input, 40 hidden, 48 output and 3 squeeze channels."""

    def make(dtype=torch.float16, kernel_size=3, **changes):
        weights = random_mbconv_weights(24, 40, 48, squeeze=3, kernel_size=kernel_size)
        torch.manual_seed(0)
        return {
            "x": torch.randn(3, 24, 5, 8).to(device, dtype),
            **vars(weights.pack(TILE, dtype, device)),
            "hidden_channels": 40,
            "out_channels": 48,
            "squeeze_channels": 3,
            "group_width": 8,
            "activation": "silu",
            "squeeze_activation": "relu",
            "blur": True,
            "tile": TILE.to_ints(),
            **changes,
        }

    return make


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "activation, squeeze_activation, blur, kernel_size",
    [("silu", "relu", True, 3), ("relu", "silu", False, 3), ("silu", "silu", False, 5)],
)
def test_opcheck(activation, squeeze_activation, blur, kernel_size, arguments, deterministic):
    """In order, because opcheck compares runs to the bit."""
    options = {"activation": activation, "squeeze_activation": squeeze_activation, "blur": blur}
    kwargs = arguments(kernel_size=kernel_size, **options)
    torch.library.opcheck(torch.ops.fusion.mbconv_down.default, tuple(kwargs.values()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "activation, squeeze_activation, blur, size",
    [("silu", "relu", True, (5, 8)), ("relu", "silu", True, (2, 3)), ("silu", "silu", False, (5, 8))],
)
def test_cpus_compute_the_reference(activation, squeeze_activation, blur, size, dtype, random_mbconv_weights):
    weights = random_mbconv_weights(24, 40, 48, squeeze=3)
    torch.manual_seed(0)
    x = torch.randn(2, 24, *size).to(dtype)
    packed = weights.pack(TILE, dtype, "cpu").tensors()
    options = activation, squeeze_activation, blur
    out = mbconv_down_ops.mbconv_down(x, *packed, 40, 48, 3, 8, *options, TILE.to_ints())
    # Biases are packed in fp32, whatever the dtype.
    exact = (w.float() if name.endswith("bias") else w for name, w in vars(weights).items())
    x = x.contiguous(memory_format=torch.channels_last)
    expected = reference(x, *exact, *options)
    assert out.dtype == dtype
    torch.testing.assert_close(out, expected)  # products of transposed weights may be summed in another order


@pytest.mark.parametrize("blur, kernel_size", [(True, 3), (False, 3), (False, 5)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_error_in_16_bits(dtype, blur, kernel_size, arguments, device, random_mbconv_weights, assert_within_rule):
    kwargs = arguments(dtype, kernel_size, blur=blur)
    weights = random_mbconv_weights(24, 40, 48, squeeze=3, kernel_size=kernel_size)
    weights = [w.to(device) for w in vars(weights).values()]
    eager, exact = (reference(x, *weights, "silu", blur=blur) for x in (kwargs["x"], kwargs["x"].double()))
    assert_within_rule(mbconv_down_ops.mbconv_down(**kwargs), eager, exact)


def test_memory_formats_of_the_input_are_equal_and_the_output_is_channels_last(arguments, deterministic):
    kwargs = arguments()
    x = kwargs.pop("x")
    layouts = torch.contiguous_format, torch.channels_last
    outs = [mbconv_down_ops.mbconv_down(x.contiguous(memory_format=layout), **kwargs) for layout in layouts]
    wide = torch.stack([x, x], dim=-1).flatten(-2)
    outs.append(mbconv_down_ops.mbconv_down(wide[..., ::2], **kwargs))
    for out in outs:
        assert torch.equal(out, outs[0])
        assert out.shape == (3, 48, 3, 4)
        assert out.stride() == (3 * 4 * 48, 1, 4 * 48, 48)


@pytest.mark.parametrize("size", [(1, 8), (5, 1), (1, 1)])
def test_an_image_of_one_row_or_column_needs_no_blur(size, arguments):
    kwargs = arguments()
    x = kwargs.pop("x")[..., : size[0], : size[1]]
    out = mbconv_down_ops.mbconv_down(x, **{**kwargs, "blur": False})
    assert out.shape == (3, 48, -(-size[0] // 2), -(-size[1] // 2)) and out.isfinite().all()
    with pytest.raises(ValueError, match="pixels are too small: a blur-pool reflects"):
        mbconv_down_ops.mbconv_down(x, **kwargs)


def test_empty_batch(arguments, device):
    x = torch.empty(0, 24, 5, 8, dtype=torch.float16, device=device)
    out = mbconv_down_ops.mbconv_down(**arguments(x=x))
    assert out.shape == (0, 48, 3, 4) and out.dtype == torch.float16


def test_a_gradient_is_refused(arguments):
    kwargs = arguments()
    kwargs["x"].requires_grad_()
    with pytest.raises(RuntimeError, match=r"has no gradient, but one of its inputs requires.*torch\.no_grad\(\)"):
        mbconv_down_ops.mbconv_down(**kwargs)
    with torch.no_grad():
        assert not mbconv_down_ops.mbconv_down(**kwargs).requires_grad


@needs_gpu
@pytest.mark.parametrize("size", [(16, 16), (33, 31)])
def test_deterministic_algorithms_give_equal_bits(size, device, random_mbconv_weights, deterministic):
    weights = random_mbconv_weights(64, 512, squeeze=16)
    torch.manual_seed(0)
    x = torch.randn(8, 64, *size).to(device, torch.float16)
    packed = weights.pack(TILE, x.dtype, device).tensors()
    ints = TILE.to_ints()
    outs = [mbconv_down_ops.mbconv_down(x, *packed, 512, 64, 16, 8, "silu", "relu", True, ints) for _ in range(10)]
    assert all(torch.equal(out, outs[0]) for out in outs)


ERRORS = [
    (lambda k: {"x": k["x"][0]}, ValueError, r"x must be \[N, C, H, W\], got shape \[24, 5, 8\]"),
    (lambda k: {"x": k["x"][:, :, :1]}, ValueError, "images of 1x8 pixels are too small: a blur-pool reflects"),
    (lambda k: {"x": k["x"][..., :1]}, ValueError, "images of 5x1 pixels are too small: a blur-pool reflects"),
    (
        lambda k: {"conv": k["conv"].reshape(4, 4, 16, 16 * 16)[..., :16].repeat(1, 7, 1, 1)[:, :25]},
        ValueError,
        "kernel size 5 with a blur-pool is not supported, use 3, or let the convolution have stride 2",
    ),
    (lambda k: {"tile": [8]}, ValueError, r"tile must be the 16 integers of MBConvDownTile.to_ints\(\), got \[8\]"),
    (
        lambda k: {"tile": replace(TILE, stages=1).to_ints()},
        ValueError,
        "cannot run: loops must be pipelined, in 2 stages at least; take the tile of a plan",
    ),
    (
        lambda k: {"x": k["x"][:1, :, :1, :1].expand(1, 24, 2**13, 2**13 + 2)},
        ValueError,
        "images of 8192x8194 pixels are too large, split them",
    ),
    (lambda k: {"activation": "elu"}, ValueError, "activation 'elu' is not supported, use relu or .*hardswish"),
    (
        lambda k: {"squeeze_activation": "gelu"},
        ValueError,
        "squeeze_activation 'gelu' is not supported, use relu or silu",
    ),
    (lambda k: {"x": k["x"][:, :20]}, ValueError, "20 input channels are not supported, use a multiple of 8"),
    (lambda k: {"out_channels": 20}, ValueError, "20 output channels are not supported, use a multiple of 8"),
    (lambda k: {"group_width": 0}, ValueError, "with groups of 0 do not go together"),
    (lambda k: {"hidden_channels": 36}, ValueError, "36 hidden and 3 squeeze channels with groups of 8 do not go"),
    (lambda k: {"group_width": 20}, ValueError, "slabs of 16 channels split groups of 20"),
    (
        lambda k: {"squeeze_channels": 17},
        ValueError,
        r"squeeze must be a contiguous \[64, 32\] for 24 input.*got shape \[64, 16\].*pack the weights for this tile",
    ),
    (
        lambda k: {"tile": replace(TILE, conv_slab=32).to_ints()},
        ValueError,
        r"conv must be a contiguous \[2, 512, 128\].*got shape \[4, 256, 64\]",
    ),
    (lambda k: {"conv_bias": k["conv_bias"].half()}, TypeError, "conv_bias has dtype torch.float16, it must be"),
    (lambda k: {"excite": k["excite"].to("meta")}, RuntimeError, "excite is on meta, x on .*; move one of them"),
    (lambda k: {"x": k["x"].to("meta")}, RuntimeError, "x is on meta; supported are CUDA GPUs, and CPUs"),
]


@pytest.mark.parametrize("change, error, message", ERRORS, ids=[message for *_, message in ERRORS])
def test_errors(change, error, message, arguments):
    kwargs = arguments()
    with pytest.raises(error, match=f"fusion::mbconv_down: .*{message}"):
        mbconv_down_ops.mbconv_down(**{**kwargs, **change(kwargs)})


@needs_gpu
def test_other_dtypes_are_refused_on_a_gpu(arguments):
    with pytest.raises(TypeError, match=r"x has dtype torch.float32; supported are torch.float16 or torch.bfloat16"):
        mbconv_down_ops.mbconv_down(**arguments(dtype=torch.float32))

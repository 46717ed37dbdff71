from dataclasses import replace

import pytest
import torch

from fusion import kernels, mbconv_ops
from fusion.mbconv_hopper_weights import pack_mbconv_hopper
from fusion.planner.mbconv_hopper_tile import MAX_IMAGES, MBConvHopperTile
from fusion.reference import mbconv as reference

TILE = MBConvHopperTile(images=2, rows=1, bands=8, columns=8)
FP32 = ("squeeze_bias", "excite_bias", "project_bias")
HAS_GPU = torch.cuda.is_available()
IS_HOPPER = HAS_GPU and torch.cuda.get_device_capability() == (9, 0)
runs = pytest.mark.skipif(HAS_GPU and not IS_HOPPER, reason="this GPU is not of compute capability 9.0")
needs_hopper = pytest.mark.skipif(not IS_HOPPER, reason="needs a GPU of compute capability 9.0")


@pytest.fixture
def arguments(device, random_mbconv_weights):
    """`(**changes) -> dict` of the operator's arguments for 24 input, 72 hidden, 24 output and 3 squeeze channels."""

    def make(dtype=torch.float16, out_channels=24, **changes):
        weights = random_mbconv_weights(24, 72, out_channels, squeeze=3)
        torch.manual_seed(0)
        return {
            "x": torch.randn(3, 24, 5, 7).to(device, dtype),
            **vars(pack_mbconv_hopper(weights, TILE, dtype, device)),
            "hidden_channels": 72,
            "out_channels": out_channels,
            "squeeze_channels": 3,
            "activation": "silu",
            "residual": out_channels == 24,
            "tile": TILE.to_ints(),
            **changes,
        }

    return make


@runs
@pytest.mark.parametrize("changes", [{}, {"out_channels": 16, "activation": "relu"}], ids=str)
def test_opcheck(changes, arguments):
    torch.library.opcheck(torch.ops.fusion.mbconv_hopper.default, tuple(arguments(**changes).values()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("out_channels, activation", [(24, "silu"), (72, "relu")])
def test_cpus_compute_the_reference(out_channels, activation, dtype, random_mbconv_weights):
    weights = random_mbconv_weights(24, 72, out_channels, squeeze=3)
    torch.manual_seed(0)
    x = torch.randn(2, 24, 5, 7).to(dtype)
    packed, residual = pack_mbconv_hopper(weights, TILE, dtype, "cpu").tensors(), out_channels == 24
    out = mbconv_ops.mbconv_hopper(x, *packed, 72, out_channels, 3, activation, residual, TILE.to_ints())
    # These biases are packed in fp32, whatever the dtype.
    exact = (w.float() if name in FP32 else w for name, w in vars(weights).items())
    expected = reference(x.contiguous(memory_format=torch.channels_last), *exact, activation, residual)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, expected)  # products of transposed weights may be summed in another order


@runs
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("out_channels", [24, 16])
def test_error_in_16_bits(out_channels, dtype, arguments, device, random_mbconv_weights, assert_within_rule):
    kwargs = arguments(dtype, out_channels)
    weights = [w.to(device) for w in vars(random_mbconv_weights(24, 72, out_channels, squeeze=3)).values()]
    eager, exact = (reference(x, *weights, "silu", out_channels == 24) for x in (kwargs["x"], kwargs["x"].double()))
    assert_within_rule(mbconv_ops.mbconv_hopper(**kwargs), eager, exact)


@runs
def test_strides_of_the_input_and_the_output(arguments):
    kwargs = arguments()
    x = kwargs.pop("x")
    expected = mbconv_ops.mbconv_hopper(x, **kwargs)
    assert expected.shape == (3, 24, 5, 7) and expected.stride() == (5 * 7 * 24, 1, 7 * 24, 24)
    last = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(mbconv_ops.mbconv_hopper(last, **kwargs), expected)
    wide = torch.stack([x, x], dim=-1).flatten(-2)
    assert torch.equal(mbconv_ops.mbconv_hopper(wide[..., ::2], **kwargs), expected)
    flat = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:]
    unaligned = flat.view(3, 5, 7, 24).permute(0, 3, 1, 2).copy_(x)
    assert unaligned.data_ptr() % 16
    assert torch.equal(mbconv_ops.mbconv_hopper(unaligned, **kwargs), expected)


@runs
def test_empty_batch(arguments, device):
    out = mbconv_ops.mbconv_hopper(**arguments(x=torch.empty(0, 24, 5, 7, dtype=torch.float16, device=device)))
    assert out.shape == (0, 24, 5, 7) and out.dtype == torch.float16


@runs
def test_every_tile_that_covers_the_image_takes_the_same_weights(arguments):
    kwargs = arguments()
    out = mbconv_ops.mbconv_hopper(**kwargs)
    for tile in (MBConvHopperTile(1, 1, 8, 8), MBConvHopperTile(1, 1, 16, 8), MBConvHopperTile(4, 1, 8, 8)):
        again = mbconv_ops.mbconv_hopper(**{**kwargs, "tile": tile.to_ints()})
        torch.testing.assert_close(again, out, rtol=1e-2, atol=1e-2)


@runs
def test_a_gradient_is_refused(arguments):
    kwargs = arguments()
    kwargs["x"].requires_grad_()
    message = r"fusion::mbconv_hopper is an inference operator and has no gradient, but one of its inputs requires"
    with pytest.raises(RuntimeError, match=message):
        mbconv_ops.mbconv_hopper(**kwargs)
    with torch.no_grad():
        assert not mbconv_ops.mbconv_hopper(**kwargs).requires_grad
    kwargs["x"] = kwargs["x"].detach()
    kwargs["squeeze"].requires_grad_()
    with pytest.raises(RuntimeError, match=message):
        mbconv_ops.mbconv_hopper(**kwargs)


ERRORS = [
    (lambda k: {"x": k["x"][0]}, ValueError, r"x must be \[N, C, H, W\], got shape \[24, 5, 7\]"),
    (lambda k: {"tile": [8]}, ValueError, r"tile must be the 4 integers of MBConvHopperTile.to_ints\(\), got \[8\]"),
    (lambda k: {"x": k["x"][:, :20]}, ValueError, "20 input channels are not supported, use a multiple of 8"),
    (lambda k: {"out_channels": 20}, ValueError, "20 output channels are not supported, use a multiple of 8"),
    (
        lambda k: {"x": k["x"][:1, :, :1, :1].expand(1, 24, 2**14, 2**13)},
        ValueError,
        r"images of 16384x8192 pixels are too large, split them: 2\*\*31 elements are the limit",
    ),
    (
        lambda k: {"hidden_channels": 76},
        ValueError,
        "76 hidden and 3 squeeze channels do not go together with groups of 8; both are positive",
    ),
    (lambda k: {"hidden_channels": 0}, ValueError, "0 hidden and 3 squeeze channels do not go together"),
    (lambda k: {"squeeze_channels": 0}, ValueError, "72 hidden and 0 squeeze channels do not go together"),
    (
        lambda k: {"tile": replace(TILE, rows=3).to_ints()},
        ValueError,
        "cannot run: rows=3 is not one of 1, 2, 4; take the tile of a plan",
    ),
    (lambda k: {"tile": replace(TILE, bands=9).to_ints()}, ValueError, "cannot run: bands=9 is not a power of two"),
    (lambda k: {"tile": replace(TILE, bands=4).to_ints()}, ValueError, "cannot run: rows of 32 pixels of all bands"),
    (lambda k: {"tile": replace(TILE, images=8).to_ints()}, ValueError, "cannot run: 512 pixels of a program are not"),
    (
        lambda k: {"tile": replace(TILE, rows=2).to_ints()},
        ValueError,
        "8 bands of 2 rows and 8 columns do not cover images of 5x7 pixels evenly; take the tile of a plan for this",
    ),
    (
        lambda k: {"x": k["x"][..., :1, :1].expand(3, 24, 9, 7)},
        ValueError,
        "8 bands of 1 rows and 8 columns do not cover images of 9x7 pixels evenly",
    ),
    (
        lambda k: {"x": k["x"][:1].expand(MAX_IMAGES + 1, 24, 5, 7)},
        ValueError,
        "1048577 images are too many for a launch, split the batch",
    ),
    (lambda k: {"activation": "gelu"}, ValueError, "activation 'gelu' is not supported, use relu or silu"),
    (
        lambda k: {"squeeze_channels": 17},
        ValueError,
        r"squeeze must be a contiguous \[128, 32\] for 24 input, 72 hidden and 24 output channels with "
        r"MBConvHopperTile\(.*got shape \[128, 16\] with strides .*pack the weights for this tile with "
        r"fusion.mbconv_hopper_weights.pack_mbconv_hopper",
    ),
    (lambda k: {"hidden_channels": 136}, ValueError, r"expand must be a contiguous \[3, 2, 128, 8\]"),
    (lambda k: {"out_channels": 72}, ValueError, r"weights must be a contiguous \[544, 64\]"),
    (lambda k: {"biases": k["biases"][:1]}, ValueError, r"biases must be a contiguous \[2, 128\]"),
    (lambda k: {"excite": k["excite"].T}, ValueError, r"excite must be a contiguous \[16, 256\].*shape \[256, 16\]"),
    (lambda k: {"squeeze_bias": k["squeeze_bias"][:3]}, ValueError, r"squeeze_bias must be a contiguous \[16\]"),
    (lambda k: {"excite_bias": k["excite_bias"][:72]}, ValueError, r"excite_bias must be a contiguous \[256\]"),
    (lambda k: {"project_bias": k["project_bias"][:24]}, ValueError, r"project_bias must be a contiguous \[32\]"),
    (lambda k: {"excite_bias": k["excite_bias"].half()}, TypeError, "excite_bias has dtype torch.float16, it must be"),
    (lambda k: {"weights": k["weights"].to("meta")}, RuntimeError, "weights is on meta, x on .*; move one of them"),
    (lambda k: {"x": k["x"].to("meta")}, RuntimeError, "x is on meta; supported are CUDA GPUs, and CPUs"),
    (
        lambda k: {"out_channels": 32},
        ValueError,
        "a residual of 24 input channels cannot be added to 32 output channels; .* or pass residual=False",
    ),
]


@pytest.mark.parametrize("change, error, message", ERRORS, ids=[message for *_, message in ERRORS])
def test_errors(change, error, message, arguments):
    kwargs = arguments()
    with pytest.raises(error, match=f"fusion::mbconv_hopper: .*{message}"):
        mbconv_ops.mbconv_hopper(**{**kwargs, **change(kwargs)})


def test_a_tile_of_no_pixels_is_refused(arguments):
    with pytest.raises(ValueError, match="MBConvHopperTile: images must be a positive integer, got 0"):
        mbconv_ops.mbconv_hopper(**arguments(tile=[0, 1, 8, 8]))


def test_the_kernel_is_called_by_its_name(arguments, device):
    if HAS_GPU and not IS_HOPPER:
        pytest.skip("this GPU is not of compute capability 9.0")
    kwargs = arguments()
    expected = mbconv_ops.mbconv_hopper(**kwargs)
    names = ("expand", "weights", "biases", "squeeze", "squeeze_bias", "excite", "excite_bias", "project_bias")
    packed = tuple(kwargs.pop(name) for name in names)
    x, tile = kwargs.pop("x"), kwargs.pop("tile")
    assert torch.equal(kernels.run_mbconv("mbconv_hopper", x, packed, tile, group_width=8, **kwargs), expected)


@needs_hopper
def test_other_dtypes_are_refused_on_a_gpu(arguments):
    with pytest.raises(TypeError, match=r"x has dtype torch.float32; supported are torch.float16 or torch.bfloat16"):
        mbconv_ops.mbconv_hopper(**arguments(dtype=torch.float32))
    kwargs = arguments()
    with pytest.raises(TypeError, match=r"expand has dtype torch.bfloat16, it must be torch.float16"):
        mbconv_ops.mbconv_hopper(**{**kwargs, "expand": kwargs["expand"].bfloat16()})


@needs_hopper
def test_unaligned_weights_are_refused(arguments):
    kwargs = arguments()
    flat = torch.empty(kwargs["weights"].numel() + 1, dtype=torch.float16, device="cuda")[1:]
    weights = flat.view_as(kwargs["weights"]).copy_(kwargs["weights"])
    with pytest.raises(ValueError, match=r"weights are at an address that is no multiple of 16 bytes, clone them"):
        mbconv_ops.mbconv_hopper(**{**kwargs, "weights": weights})


@pytest.mark.skipif(not HAS_GPU or IS_HOPPER, reason="needs a GPU that is not of compute capability 9.0")
def test_other_gpus_are_refused(arguments):
    with pytest.raises(RuntimeError, match=r"the kernel needs 9\.0; pack the weights for an MBConvTile and call"):
        mbconv_ops.mbconv_hopper(**arguments())

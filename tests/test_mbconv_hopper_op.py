from dataclasses import replace

import pytest
import torch

from fusion import kernels, mbconv_ops
from fusion.mbconv_hopper_weights import pack_mbconv_hopper, stack_mbconv_hopper
from fusion.mbconv_weights import MBConvWeights
from fusion.planner.mbconv_hopper_tile import MAX_IMAGES, MBConvHopperTile
from fusion.reference import mbconv as reference

TILE = MBConvHopperTile(bands=2, piece=4, step=32, stages=3)
NAMES = (
    "expand",
    "taps",
    "conv_bias",
    "squeeze",
    "squeeze_bias",
    "excite",
    "excite_bias",
    "project",
    "project_bias",
)
FP32 = ("conv_bias", "squeeze_bias", "excite_bias", "project_bias")
HAS_GPU = torch.cuda.is_available()
IS_HOPPER = HAS_GPU and torch.cuda.get_device_capability() == (9, 0)
runs = pytest.mark.skipif(HAS_GPU and not IS_HOPPER, reason="this GPU is not of compute capability 9.0")
needs_hopper = pytest.mark.skipif(not IS_HOPPER, reason="needs a GPU of compute capability 9.0")


def twice(tensor):
    """As if it were of two blocks."""
    return torch.cat([tensor, tensor])


@pytest.fixture
def two_blocks(random_mbconv_weights):
    """`(out_channels) -> ` different weights of two blocks of 24 input, 72 hidden and 3 squeeze channels."""

    def make(out_channels=24):
        weights = random_mbconv_weights(24, 72, out_channels, squeeze=3)
        return weights, MBConvWeights(*(tensor.flip(0) for tensor in vars(weights).values()))

    return make


@pytest.fixture
def arguments(device, two_blocks):
    """`(**changes) -> dict` of the operator's arguments for 24 input, 72 hidden, 24 output and 3 squeeze channels."""

    def make(dtype=torch.float16, out_channels=24, blocks=1, **changes):
        packed = [pack_mbconv_hopper(weights, TILE, dtype, device) for weights in two_blocks(out_channels)]
        torch.manual_seed(0)
        return {
            "x": torch.randn(3, 24, 5, 7).to(device, dtype),
            **vars(stack_mbconv_hopper(packed[:blocks])),
            "hidden_channels": 72,
            "out_channels": out_channels,
            "squeeze_channels": 3,
            "activation": "silu",
            "squeeze_activation": "relu",
            "residual": out_channels == 24,
            "tile": TILE.to_ints(),
            **changes,
        }

    return make


@runs
@pytest.mark.parametrize(
    "changes",
    [{}, {"blocks": 2}, {"out_channels": 16, "activation": "relu", "squeeze_activation": "silu"}],
    ids=str,
)
def test_opcheck(changes, arguments):
    torch.library.opcheck(torch.ops.fusion.mbconv_hopper.default, tuple(arguments(**changes).values()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("out_channels, activation, squeeze_activation", [(24, "silu", "relu"), (72, "relu", "silu")])
def test_cpus_compute_the_reference(out_channels, activation, squeeze_activation, dtype, random_mbconv_weights):
    weights = random_mbconv_weights(24, 72, out_channels, squeeze=3)
    torch.manual_seed(0)
    x = torch.randn(2, 24, 5, 7).to(dtype)
    packed, residual = pack_mbconv_hopper(weights, TILE, dtype, "cpu").tensors(), out_channels == 24
    options = activation, squeeze_activation, residual, TILE.to_ints()
    out = mbconv_ops.mbconv_hopper(x, *packed, 72, out_channels, 3, *options)
    # These biases are packed in fp32, whatever the dtype.
    exact = (w.float() if name in FP32 else w for name, w in vars(weights).items())
    x = x.contiguous(memory_format=torch.channels_last)
    expected = reference(x, *exact, activation, residual, squeeze_activation)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, expected)  # products of transposed weights may be summed in another order


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_stacked_blocks_follow_each_other(dtype, two_blocks):
    torch.manual_seed(0)
    x = torch.randn(2, 24, 5, 7).to(dtype)
    packed = [pack_mbconv_hopper(weights, TILE, dtype, "cpu") for weights in two_blocks()]
    options = 72, 24, 3, "silu", "silu", True, TILE.to_ints()
    expected = x
    for block in packed:
        expected = mbconv_ops.mbconv_hopper(expected, *block.tensors(), *options)
    out = mbconv_ops.mbconv_hopper(x, *stack_mbconv_hopper(packed).tensors(), *options)
    assert torch.equal(out, expected)
    swapped = mbconv_ops.mbconv_hopper(x, *stack_mbconv_hopper(packed[::-1]).tensors(), *options)
    assert not torch.allclose(swapped, expected)


def test_stacked_blocks_without_a_residual_are_refused(arguments):
    message = "fusion::mbconv_hopper: 2 blocks in one launch without residuals are not supported, call it for each"
    for out_channels in (24, 16):
        with pytest.raises(ValueError, match=message):
            mbconv_ops.mbconv_hopper(**arguments(out_channels=out_channels, blocks=2, residual=False))


@runs
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("out_channels, squeeze_activation", [(24, "relu"), (16, "relu"), (24, "silu")])
def test_error_in_16_bits(
    out_channels, squeeze_activation, dtype, arguments, device, random_mbconv_weights, assert_within_rule
):
    kwargs = arguments(dtype, out_channels, squeeze_activation=squeeze_activation)
    weights = [w.to(device) for w in vars(random_mbconv_weights(24, 72, out_channels, squeeze=3)).values()]
    options = "silu", out_channels == 24, squeeze_activation
    eager, exact = (reference(x, *weights, *options) for x in (kwargs["x"], kwargs["x"].double()))
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
def test_tiles_of_the_same_step_that_cover_the_image_take_the_same_weights(arguments):
    kwargs = arguments()
    out = mbconv_ops.mbconv_hopper(**kwargs)
    for tile in (MBConvHopperTile(1, 1, 32, 3), MBConvHopperTile(1, 1, 32, 2), MBConvHopperTile(2, 4, 32, 8)):
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
        lambda k: {"tile": replace(TILE, bands=3).to_ints()},
        ValueError,
        "cannot run: bands=3 is not one of 1, 2, 4, 8; take the tile of a plan",
    ),
    (lambda k: {"tile": replace(TILE, piece=8).to_ints()}, ValueError, "cannot run: piece=8 is not one of 1, 2, 4;"),
    (lambda k: {"tile": replace(TILE, step=16).to_ints()}, ValueError, "cannot run: step=16 is not one of 32, 64;"),
    (lambda k: {"tile": replace(TILE, stages=1).to_ints()}, ValueError, "cannot run: stages=1 is not between 2 and 8;"),
    (
        lambda k: {"tile": replace(TILE, bands=4, piece=2).to_ints()},
        ValueError,
        "4 bands of 4 rows and up to 4 columns do not cover images of 5x7 pixels; take the tile of a plan for this",
    ),
    (
        lambda k: {"x": k["x"][..., :1, :1].expand(3, 24, 9, 7)},
        ValueError,
        "2 bands of 8 rows and up to 4 columns do not cover images of 9x7 pixels",
    ),
    (
        lambda k: {"tile": replace(TILE, piece=2).to_ints()},
        ValueError,
        "4 columns of each of 2 bands cannot be computed 2 at a time: that must be all of them; take the tile of a",
    ),
    (
        lambda k: {"x": k["x"][:1].expand(MAX_IMAGES + 1, 24, 5, 7)},
        ValueError,
        "1048577 images are too many for a launch, split the batch",
    ),
    (lambda k: {"activation": "gelu"}, ValueError, "activation 'gelu' is not supported, use relu or silu"),
    (
        lambda k: {"squeeze_activation": "gelu"},
        ValueError,
        "squeeze_activation 'gelu' is not supported, use relu or silu",
    ),
    (
        lambda k: {"squeeze_channels": 17},
        ValueError,
        r"squeeze must be a contiguous \[1, 1, 4096\] for 24 input, 72 hidden and 24 output channels with "
        r"MBConvHopperTile\(.*got shape \[1, 1, 2048\] with strides .*pack the weights for this tile with "
        r"fusion.mbconv_hopper_weights.pack_mbconv_hopper",
    ),
    (lambda k: {"hidden_channels": 136}, ValueError, r"expand must be a contiguous \[1, 2, 6144\]"),
    (lambda k: {"expand": k["expand"][0]}, ValueError, r"expand must be a contiguous \[1, 1, 6144\]"),
    (lambda k: {"out_channels": 72}, ValueError, r"project must be a contiguous \[1, 160, 64\]"),
    (lambda k: {"taps": k["taps"][:, :, :4]}, ValueError, r"taps must be a contiguous \[1, 1, 5, 8, 32, 8\]"),
    (lambda k: {"conv_bias": k["conv_bias"][0]}, ValueError, r"conv_bias must be a contiguous \[1, 1, 8, 4, 8\]"),
    (lambda k: {"excite": k["excite"].mT}, ValueError, r"excite must be a contiguous \[1, 1, 2048\].*\[1, 2048, 1\]"),
    (lambda k: {"squeeze_bias": k["squeeze_bias"][:, :3]}, ValueError, r"squeeze_bias must be a contiguous \[1, 16\]"),
    (lambda k: {"excite_bias": k["excite_bias"][:, :72]}, ValueError, r"excite_bias must be a contiguous \[1, 128\]"),
    (lambda k: {"project_bias": k["project_bias"][0]}, ValueError, r"project_bias must be a contiguous \[1, 32\]"),
    (
        lambda k: {"expand": twice(k["expand"])},
        ValueError,
        r"taps must be a contiguous \[2, 1, 5, 8, 32, 8\].*\[1, 1, 5",
    ),
    (
        lambda k: {"project": twice(k["project"])},
        ValueError,
        r"project must be a contiguous \[1, 64, 64\].*\[2, 64, 64",
    ),
    (lambda k: {"excite_bias": k["excite_bias"].half()}, TypeError, "excite_bias has dtype torch.float16, it must be"),
    (lambda k: {"conv_bias": k["conv_bias"].half()}, TypeError, "conv_bias has dtype torch.float16, it must be"),
    (lambda k: {"project": k["project"].to("meta")}, RuntimeError, "project is on meta, x on .*; move one of them"),
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


def test_a_tile_of_no_bands_is_refused(arguments):
    with pytest.raises(ValueError, match="MBConvHopperTile: bands must be a positive integer, got 0"):
        mbconv_ops.mbconv_hopper(**arguments(tile=[0, 4, 32, 3]))


def test_the_kernel_is_called_by_its_name(arguments, two_blocks):
    if HAS_GPU and not IS_HOPPER:
        pytest.skip("this GPU is not of compute capability 9.0")
    kwargs = arguments()
    expected = mbconv_ops.mbconv_hopper(**kwargs)
    packed = tuple(kwargs[name] for name in NAMES)
    options = {"activation": "silu", "squeeze_activation": "relu", "residual": True, "weights": two_blocks(24)[0]}
    assert torch.equal(kernels.run("mbconv_hopper", kwargs["x"], packed, kwargs["tile"], **options), expected)


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
    flat = torch.empty(kwargs["project"].numel() + 1, dtype=torch.float16, device="cuda")[1:]
    project = flat.view_as(kwargs["project"]).copy_(kwargs["project"])
    with pytest.raises(ValueError, match=r"weights are at an address that is no multiple of 16 bytes, clone them"):
        mbconv_ops.mbconv_hopper(**{**kwargs, "project": project})


@pytest.mark.skipif(not HAS_GPU or IS_HOPPER, reason="needs a GPU that is not of compute capability 9.0")
def test_other_gpus_are_refused(arguments):
    with pytest.raises(RuntimeError, match=r"the kernel needs 9\.0; pack the weights for an MBConvTile and call"):
        mbconv_ops.mbconv_hopper(**arguments())

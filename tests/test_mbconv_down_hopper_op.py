from dataclasses import replace

import pytest
import torch

from fusion import kernels
from fusion.down_modules import FusedMBConvDown
from fusion.mbconv_down_hopper_op import mbconv_down_hopper
from fusion.mbconv_hopper_weights import PackedMBConvHopper, pack_mbconv_hopper, unpack_mbconv_hopper
from fusion.planner.mbconv_down_hopper_tile import MBConvDownHopperTile
from fusion.planner.mbconv_hopper_tile import MAX_IMAGES, MBConvHopperTile
from fusion.reference import mbconv_down as reference

TILE = MBConvDownHopperTile(step=32, stages=3, resident=1)
FP32 = ("conv_bias", "squeeze_bias", "excite_bias", "project_bias")
HAS_GPU = torch.cuda.is_available()
IS_HOPPER = HAS_GPU and torch.cuda.get_device_capability() == (9, 0)
runs = pytest.mark.skipif(HAS_GPU and not IS_HOPPER, reason="this GPU is not of compute capability 9.0")
needs_hopper = pytest.mark.skipif(not IS_HOPPER, reason="needs a GPU of compute capability 9.0")


def twice(tensor):
    """As if it were of two blocks."""
    return torch.cat([tensor, tensor])


@pytest.fixture
def arguments(device, random_mbconv_weights):
    """`(**changes) -> dict` of the operator's arguments for 24 input, 72 hidden, 24 output and 3 squeeze channels."""

    def make(dtype=torch.float16, out_channels=24, size=(6, 10), **changes):
        packed = pack_mbconv_hopper(random_mbconv_weights(24, 72, out_channels, squeeze=3), TILE, dtype, device)
        torch.manual_seed(0)
        return {
            "x": torch.randn(3, 24, *size).to(device, dtype),
            **vars(packed),
            "hidden_channels": 72,
            "out_channels": out_channels,
            "squeeze_channels": 3,
            "activation": "silu",
            "squeeze_activation": "relu",
            "blur": True,
            "tile": TILE.to_ints(),
            **changes,
        }

    return make


@runs
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"size": (18, 4)},
        {"out_channels": 16, "activation": "relu", "squeeze_activation": "silu"},
        {"size": (5, 9), "blur": False},
    ],
    ids=str,
)
def test_opcheck(changes, arguments):
    torch.library.opcheck(torch.ops.fusion.mbconv_down_hopper.default, tuple(arguments(**changes).values()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "out_channels, activation, squeeze_activation, blur",
    [(24, "silu", "relu", True), (72, "relu", "silu", True), (24, "silu", "silu", False)],
)
def test_cpus_compute_the_reference(out_channels, activation, squeeze_activation, blur, dtype, random_mbconv_weights):
    weights = random_mbconv_weights(24, 72, out_channels, squeeze=3)
    torch.manual_seed(0)
    x = torch.randn(2, 24, 6, 10).to(dtype)
    packed = pack_mbconv_hopper(weights, TILE, dtype, "cpu").tensors()
    options = activation, squeeze_activation, blur
    out = mbconv_down_hopper(x, *packed, 72, out_channels, 3, *options, TILE.to_ints())
    # These biases are packed in fp32, whatever the dtype.
    exact = (w.float() if name in FP32 else w for name, w in vars(weights).items())
    x = x.contiguous(memory_format=torch.channels_last)
    expected = reference(x, *exact, *options)
    assert out.dtype == dtype and out.shape == (2, out_channels, 3, 5)
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, expected)  # products of transposed weights may be summed in another order


def test_weights_are_packed_as_those_of_stride_1(random_mbconv_weights):
    weights = random_mbconv_weights(40, 192, 112, squeeze=18)
    packed = pack_mbconv_hopper(weights, TILE, torch.float64, "cpu")
    other = pack_mbconv_hopper(weights, MBConvHopperTile(1, 4, TILE.step, 2), torch.float64, "cpu")
    for name, tensor in vars(packed).items():
        assert torch.equal(tensor, vars(other)[name]), name
    (back,) = unpack_mbconv_hopper(packed, TILE, 40, 192, 112, 18)
    torch.testing.assert_close(back.project, weights.project)


@runs
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "out_channels, squeeze_activation, blur",
    [(24, "relu", True), (16, "relu", True), (24, "silu", True), (24, "relu", False)],
)
def test_error_in_16_bits(
    out_channels, squeeze_activation, blur, dtype, arguments, device, random_mbconv_weights, assert_within_rule
):
    options = {"squeeze_activation": squeeze_activation, "blur": blur}
    kwargs = arguments(dtype, out_channels, **options)
    weights = [w.to(device) for w in vars(random_mbconv_weights(24, 72, out_channels, squeeze=3)).values()]
    eager, exact = (reference(x, *weights, "silu", **options) for x in (kwargs["x"], kwargs["x"].double()))
    assert_within_rule(mbconv_down_hopper(**kwargs), eager, exact)


@runs
def test_strides_of_the_input_and_the_output(arguments):
    kwargs = arguments()
    x = kwargs.pop("x")
    expected = mbconv_down_hopper(x, **kwargs)
    assert expected.shape == (3, 24, 3, 5) and expected.stride() == (3 * 5 * 24, 1, 5 * 24, 24)
    last = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(mbconv_down_hopper(last, **kwargs), expected)
    wide = torch.stack([x, x], dim=-1).flatten(-2)
    assert torch.equal(mbconv_down_hopper(wide[..., ::2], **kwargs), expected)
    flat = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:]
    unaligned = flat.view(3, 6, 10, 24).permute(0, 3, 1, 2).copy_(x)
    assert unaligned.data_ptr() % 16
    assert torch.equal(mbconv_down_hopper(unaligned, **kwargs), expected)


@runs
def test_empty_batch(arguments, device):
    out = mbconv_down_hopper(**arguments(x=torch.empty(0, 24, 6, 10, dtype=torch.float16, device=device)))
    assert out.shape == (0, 24, 3, 5) and out.dtype == torch.float16


@runs
def test_a_gradient_is_refused(arguments):
    kwargs = arguments()
    kwargs["x"].requires_grad_()
    message = r"fusion::mbconv_down_hopper is an inference operator and has no gradient, but one of its inputs requires"
    with pytest.raises(RuntimeError, match=message):
        mbconv_down_hopper(**kwargs)
    with torch.no_grad():
        assert not mbconv_down_hopper(**kwargs).requires_grad


ERRORS = [
    (lambda k: {"x": k["x"][0]}, ValueError, r"x must be \[N, C, H, W\], got shape \[24, 6, 10\]"),
    (
        lambda k: {"tile": [8]},
        ValueError,
        r"tile must be the 3 integers of MBConvDownHopperTile.to_ints\(\), got \[8\]",
    ),
    (lambda k: {"x": k["x"][:, :20]}, ValueError, "20 input channels are not supported, use a multiple of 8"),
    (lambda k: {"out_channels": 20}, ValueError, "20 output channels are not supported, use a multiple of 8"),
    (
        lambda k: {"hidden_channels": 76},
        ValueError,
        "76 hidden and 3 squeeze channels do not go together with groups of 8; both are positive",
    ),
    (lambda k: {"squeeze_channels": 0}, ValueError, "72 hidden and 0 squeeze channels do not go together"),
    (lambda k: {"tile": replace(TILE, step=16).to_ints()}, ValueError, "cannot run: step=16 is not one of 32, 64;"),
    (lambda k: {"tile": replace(TILE, stages=1).to_ints()}, ValueError, "cannot run: stages=1 is not between 2 and 8;"),
    (
        lambda k: {"x": k["x"][:, :, :5]},
        ValueError,
        "images of 5x10 pixels are not supported: height and width must be even for a blur-pool; pack the weights for "
        "an MBConvDownTile and call fusion::mbconv_down",
    ),
    (
        lambda k: {"x": k["x"][..., :1, :1].expand(3, 24, 34, 8)},
        ValueError,
        "images of 34x8 pixels are too large: up to 32x32 are supported; pack the weights for an MBConvDownTile",
    ),
    (
        lambda k: {"x": k["x"][:1].expand(MAX_IMAGES + 1, 24, 6, 10)},
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
        r"MBConvDownHopperTile\(.*got shape \[1, 1, 2048\] with strides .*pack the weights for this tile with "
        r"fusion.mbconv_hopper_weights.pack_mbconv_hopper",
    ),
    (lambda k: {"expand": twice(k["expand"])}, ValueError, r"expand must be a contiguous \[1, 1, 6144\].*\[2, 1, 6144"),
    (lambda k: {"excite_bias": k["excite_bias"].half()}, TypeError, "excite_bias has dtype torch.float16, it must be"),
    (lambda k: {"project": k["project"].to("meta")}, RuntimeError, "project is on meta, x on .*; move one of them"),
]


@pytest.mark.parametrize("change, error, message", ERRORS, ids=[message for *_, message in ERRORS])
def test_errors(change, error, message, arguments):
    kwargs = arguments()
    with pytest.raises(error, match=f"fusion::mbconv_down_hopper: .*{message}"):
        mbconv_down_hopper(**{**kwargs, **change(kwargs)})


def test_the_kernel_is_called_by_its_name(arguments, random_mbconv_weights):
    if HAS_GPU and not IS_HOPPER:
        pytest.skip("this GPU is not of compute capability 9.0")
    kwargs = arguments()
    expected = mbconv_down_hopper(**kwargs)
    packed = tuple(kwargs[name] for name in PackedMBConvHopper.__dataclass_fields__)
    options = {"activation": "silu", "squeeze_activation": "relu", "blur": True}
    weights = random_mbconv_weights(24, 72, squeeze=3)
    out = kernels.run("mbconv_down_hopper", kwargs["x"], packed, kwargs["tile"], weights, **options)
    assert torch.equal(out, expected)
    assert kernels.packing(TILE) == ("mbconv_down_hopper", 32)


@runs
@pytest.mark.parametrize("blur, size", [(True, (6, 10)), (False, (7, 9))])
def test_a_module_runs_it(blur, size, device, random_mbconv_weights):
    weights = random_mbconv_weights(24, 72, 40, squeeze=3)
    fused = FusedMBConvDown(weights, activation="silu", squeeze_activation="silu", blur=blur)
    torch.manual_seed(0)
    x = torch.randn(2, 24, *size).to(device, torch.float16)
    plan = fused.plan(x)
    assert plan.kernel == "mbconv_down_hopper"
    packed = kernels.pack(weights, plan.tile, x.dtype, x.device).tensors()
    options = "silu", "silu", blur
    assert torch.equal(fused(x), mbconv_down_hopper(x, *packed, 72, 40, 3, *options, plan.tile.to_ints()))


@needs_hopper
def test_other_dtypes_are_refused_on_a_gpu(arguments):
    with pytest.raises(TypeError, match=r"x has dtype torch.float32; supported are torch.float16 or torch.bfloat16"):
        mbconv_down_hopper(**arguments(dtype=torch.float32))


@needs_hopper
def test_unaligned_weights_are_refused(arguments):
    kwargs = arguments()
    flat = torch.empty(kwargs["project"].numel() + 1, dtype=torch.float16, device="cuda")[1:]
    project = flat.view_as(kwargs["project"]).copy_(kwargs["project"])
    with pytest.raises(ValueError, match=r"weights are at an address that is no multiple of 16 bytes, clone them"):
        mbconv_down_hopper(**{**kwargs, "project": project})


@pytest.mark.skipif(not HAS_GPU or IS_HOPPER, reason="needs a GPU that is not of compute capability 9.0")
def test_other_gpus_are_refused(arguments):
    with pytest.raises(RuntimeError, match=r"the kernel needs 9\.0; pack the weights for an MBConvDownTile and call"):
        mbconv_down_hopper(**arguments())

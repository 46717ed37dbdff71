from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch

from fusion import kernels
from fusion.down_modules import FusedMBConvDown
from fusion.mbconv_hopper_weights import (
    PackedMBConvHopper,
    kernel_size_of,
    pack_mbconv_hopper,
    packed_sizes,
    unpack_mbconv_hopper,
)
from fusion.mbconv_windows_hopper_op import mbconv_down_windows_hopper
from fusion.planner.mbconv_hopper_tile import MAX_IMAGES, MBConvHopperTile
from fusion.planner.mbconv_windows_hopper_tile import MBConvDownWindowsHopperTile
from fusion.planner.plan import PlanError, plan_block
from fusion.reference import mbconv_down as reference

TILE = MBConvDownWindowsHopperTile(piece=4, pass_tiles=8, step=32, stages=3)
KERNEL = "mbconv_down_windows_hopper"
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

    def make(dtype=torch.float16, out_channels=24, size=(19, 9), kernel_size=3, **changes):
        weights = random_mbconv_weights(24, 72, out_channels, squeeze=3, kernel_size=kernel_size)
        packed = pack_mbconv_hopper(weights, TILE, dtype, device)
        torch.manual_seed(0)
        return {
            "x": torch.randn(3, 24, *size).to(device, dtype),
            **vars(packed),
            "hidden_channels": 72,
            "out_channels": out_channels,
            "squeeze_channels": 3,
            "activation": "silu",
            "squeeze_activation": "relu",
            "blur": False,
            "tile": TILE.to_ints(),
            **changes,
        }

    return make


@runs
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"size": (18, 20)},
        {"kernel_size": 5},
        {"out_channels": 16, "activation": "relu", "squeeze_activation": "silu"},
        {"size": (2, 3), "kernel_size": 5, "tile": replace(TILE, pass_tiles=16).to_ints()},
    ],
    ids=str,
)
def test_opcheck(changes, arguments):
    torch.library.opcheck(torch.ops.fusion.mbconv_down_windows_hopper.default, tuple(arguments(**changes).values()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "out_channels, activation, squeeze_activation, kernel_size, size",
    [
        (24, "silu", "relu", 3, (19, 10)),
        (72, "relu", "silu", 3, (20, 9)),
        (24, "silu", "silu", 5, (19, 9)),
        (40, "relu", "relu", 5, (2, 18)),
    ],
)
def test_cpus_compute_the_reference(
    out_channels, activation, squeeze_activation, kernel_size, size, dtype, random_mbconv_weights
):
    weights = random_mbconv_weights(24, 72, out_channels, squeeze=3, kernel_size=kernel_size)
    torch.manual_seed(0)
    x = torch.randn(2, 24, *size).to(dtype)
    packed = pack_mbconv_hopper(weights, TILE, dtype, "cpu").tensors()
    options = activation, squeeze_activation, False
    out = mbconv_down_windows_hopper(x, *packed, 72, out_channels, 3, *options, TILE.to_ints())
    # These biases are packed in fp32, whatever the dtype.
    exact = (w.float() if name in FP32 else w for name, w in vars(weights).items())
    x = x.contiguous(memory_format=torch.channels_last)
    expected = reference(x, *exact, *options)
    assert out.dtype == dtype and out.shape == (2, out_channels, *(-(-side // 2) for side in size))
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, expected)  # products of transposed weights may be summed in another order


def test_weights_are_packed_as_those_of_small_images(random_mbconv_weights):
    """Whatever the tile is, but for its step."""
    weights = random_mbconv_weights(40, 192, 112, squeeze=18)
    other = pack_mbconv_hopper(weights, MBConvHopperTile(1, 4, TILE.step, 2), torch.float64, "cpu")
    for tile in (TILE, MBConvDownWindowsHopperTile(4, 16, TILE.step, 6)):
        for name, tensor in vars(kernels.pack(weights, tile, torch.float64, "cpu")).items():
            assert torch.equal(tensor, vars(other)[name]), name
    wider = kernels.pack(weights, replace(TILE, step=64), torch.float64, "cpu")
    assert not torch.equal(wider.project, other.project)


@pytest.mark.parametrize("kernel_size, pieces", [(3, 5), (5, 13)])
@pytest.mark.parametrize("sizes", [(24, 96, 24, 6), (8, 8, 8, 1), (40, 160, 112, 33)], ids=str)
def test_packing_is_undone(sizes, kernel_size, pieces, random_mbconv_weights):
    """And there are as many taps that are not zero as there are weights."""
    weights = random_mbconv_weights(*sizes, kernel_size=kernel_size)
    packed = pack_mbconv_hopper(weights, TILE, torch.float64, "cpu")
    shapes = {name: list(tensor.shape) for name, tensor in vars(packed).items()}
    assert shapes == packed_sizes(TILE, *sizes, kernel_size=kernel_size)
    assert shapes["taps"][2] == pieces and kernel_size_of(packed.taps) == kernel_size
    assert all(tensor.is_contiguous() for tensor in packed.tensors())
    assert packed.taps.count_nonzero() == weights.conv.count_nonzero() == sizes[1] * 8 * kernel_size**2
    (unpacked,) = unpack_mbconv_hopper(packed, TILE, *sizes)
    for name, tensor in vars(unpacked).items():
        expected = getattr(weights, name)
        assert torch.equal(tensor, expected.float() if name in FP32 else expected), name


def test_taps_of_5x5_are_as_threads_hold_the_right_operand(random_mbconv_weights):
    """Lane 4 out + pair has 8 elements of each piece, of two groups and two input channels.

    Five pieces are [group][above, below], of the rows next to each, one for each column; five are those of the rows
    beyond. The last three are [column, next column][group], of the row itself.
    """
    weights = random_mbconv_weights(24, 136, 40, 3, kernel_size=5)
    taps = pack_mbconv_hopper(weights, TILE, torch.float64, "cpu").taps[0]
    assert list(taps.shape) == [2, 13, 8, 32, 8]
    for channel, ins, dx in product((0, 7, 8, 29, 45, 63, 71, 127, 128, 135), range(8), range(5)):
        sweep, warp, group, out = channel // 128, channel % 128 // 16, channel % 16 // 8, channel % 8
        lane, odd = 4 * out + ins // 2, ins % 2
        above, below, far_above, far_below = (
            taps[sweep, piece, warp, lane, 4 * group + 2 * row + odd] for piece, row in product((dx, 5 + dx), (0, 1))
        )
        same = taps[sweep, 10 + dx // 2, warp, lane, 4 * (dx % 2) + 2 * group + odd]
        found = torch.stack([far_above, above, same, below, far_below])
        assert torch.equal(found, weights.conv[channel, ins, :, dx] / 2), (channel, ins, dx)
    assert not taps[:, 12, :, :, 4:].any()


@runs
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "out_channels, size, squeeze_activation, kernel_size",
    [
        (24, (19, 9), "relu", 3),
        (16, (2, 40), "silu", 3),
        (24, (33, 20), "relu", 3),
        (24, (19, 9), "silu", 5),
        (16, (18, 7), "relu", 5),
    ],
    ids=str,
)
def test_error_in_16_bits(
    out_channels,
    size,
    squeeze_activation,
    kernel_size,
    dtype,
    arguments,
    device,
    random_mbconv_weights,
    assert_within_rule,
):
    options = {"squeeze_activation": squeeze_activation, "blur": False}
    kwargs = arguments(dtype, out_channels, size, kernel_size, **options)
    weights = random_mbconv_weights(24, 72, out_channels, squeeze=3, kernel_size=kernel_size)
    weights = [w.to(device) for w in vars(weights).values()]
    eager, exact = (reference(x, *weights, "silu", **options) for x in (kwargs["x"], kwargs["x"].double()))
    assert_within_rule(mbconv_down_windows_hopper(**kwargs), eager, exact)


@runs
@pytest.mark.parametrize("kernel_size", [3, 5])
def test_strides_of_the_input_and_the_output(kernel_size, arguments):
    kwargs = arguments(kernel_size=kernel_size)
    x = kwargs.pop("x")
    expected = mbconv_down_windows_hopper(x, **kwargs)
    assert expected.shape == (3, 24, 10, 5) and expected.stride() == (10 * 5 * 24, 1, 5 * 24, 24)
    last = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(mbconv_down_windows_hopper(last, **kwargs), expected)
    wide = torch.stack([x, x], dim=-1).flatten(-2)
    assert torch.equal(mbconv_down_windows_hopper(wide[..., ::2], **kwargs), expected)
    flat = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:]
    unaligned = flat.view(3, 19, 9, 24).permute(0, 3, 1, 2).copy_(x)
    assert unaligned.data_ptr() % 16
    assert torch.equal(mbconv_down_windows_hopper(unaligned, **kwargs), expected)


@runs
def test_empty_batch(arguments, device):
    out = mbconv_down_windows_hopper(**arguments(x=torch.empty(0, 24, 19, 9, dtype=torch.float16, device=device)))
    assert out.shape == (0, 24, 10, 5) and out.dtype == torch.float16


@runs
def test_tiles_of_the_same_step_take_the_same_weights(arguments):
    kwargs = arguments()
    out = mbconv_down_windows_hopper(**kwargs)
    for changes in ({"pass_tiles": 16}, {"stages": 8}, {"pass_tiles": 16, "stages": 2}):
        again = mbconv_down_windows_hopper(**{**kwargs, "tile": replace(TILE, **changes).to_ints()})
        torch.testing.assert_close(again, out, rtol=1e-2, atol=1e-2)


@runs
def test_a_gradient_is_refused(arguments):
    kwargs = arguments()
    kwargs["x"].requires_grad_()
    message = r"fusion::mbconv_down_windows_hopper is an inference operator and has no gradient, but one of its inputs"
    with pytest.raises(RuntimeError, match=message):
        mbconv_down_windows_hopper(**kwargs)
    with torch.no_grad():
        assert not mbconv_down_windows_hopper(**kwargs).requires_grad
    kwargs["x"] = kwargs["x"].detach()
    kwargs["squeeze"].requires_grad_()
    with pytest.raises(RuntimeError, match=message):
        mbconv_down_windows_hopper(**kwargs)


ERRORS = [
    (lambda k: {"x": k["x"][0]}, ValueError, r"x must be \[N, C, H, W\], got shape \[24, 19, 9\]"),
    (
        lambda k: {"tile": [8]},
        ValueError,
        r"tile must be the 4 integers of MBConvDownWindowsHopperTile.to_ints\(\), got \[8\]",
    ),
    (lambda k: {"x": k["x"][:, :20]}, ValueError, "20 input channels are not supported, use a multiple of 8"),
    (lambda k: {"out_channels": 20}, ValueError, "20 output channels are not supported, use a multiple of 8"),
    (
        lambda k: {"x": k["x"][:1, :, :1, :1].expand(1, 24, 2**14, 2**13)},
        ValueError,
        r"images of 16384x8192 pixels are too large, split them: 2\*\*31 elements are the limit",
    ),
    (
        lambda k: {"x": k["x"][:1, :, :1, :1].expand(1, 24, 2**13, 2**13)},
        ValueError,
        r"images of 8192x8192 pixels are too large, split them: 2\*\*31 elements of the input, hidden or output tensor",
    ),
    (
        lambda k: {"hidden_channels": 76},
        ValueError,
        "76 hidden and 3 squeeze channels do not go together with groups of 8; both are positive",
    ),
    (lambda k: {"hidden_channels": 0}, ValueError, "0 hidden and 3 squeeze channels do not go together"),
    (lambda k: {"squeeze_channels": 0}, ValueError, "72 hidden and 0 squeeze channels do not go together"),
    (
        lambda k: {"tile": replace(TILE, piece=2).to_ints()},
        ValueError,
        "cannot run: piece=2 is not one of 4; take the tile of a plan",
    ),
    (
        lambda k: {"tile": replace(TILE, pass_tiles=4).to_ints()},
        ValueError,
        "cannot run: pass_tiles=4 is not one of 8, 16;",
    ),
    (lambda k: {"tile": replace(TILE, step=16).to_ints()}, ValueError, "cannot run: step=16 is not one of 32, 64;"),
    (lambda k: {"tile": replace(TILE, stages=1).to_ints()}, ValueError, "cannot run: stages=1 is not between 2 and 8;"),
    (
        lambda k: {"x": k["x"][:1].expand(MAX_IMAGES + 1, 24, 19, 9)},
        ValueError,
        "1048577 images are too many for a launch, split the batch",
    ),
    (
        lambda k: {"blur": True},
        ValueError,
        "a blur-pool is not supported, pack the weights for an MBConvDownTile and call fusion::mbconv_down",
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
        r"MBConvDownWindowsHopperTile\(.*got shape \[1, 1, 2048\] with strides .*pack the weights for this tile with "
        r"fusion.mbconv_hopper_weights.pack_mbconv_hopper",
    ),
    (lambda k: {"expand": twice(k["expand"])}, ValueError, r"expand must be a contiguous \[1, 1, 6144\].*\[2, 1, 6144"),
    (lambda k: {"hidden_channels": 136}, ValueError, r"expand must be a contiguous \[1, 2, 6144\]"),
    (lambda k: {"out_channels": 72}, ValueError, r"project must be a contiguous \[1, 160, 64\]"),
    (lambda k: {"taps": k["taps"][:, :, :4]}, ValueError, r"taps must be a contiguous \[1, 1, 5, 8, 32, 8\]"),
    (
        lambda k: {"taps": twice(torch.cat([k["taps"]] * 3, dim=2)[:, :, :13])},
        ValueError,
        r"taps must be a contiguous \[1, 1, 13, 8, 32, 8\].*got shape \[2, 1, 13, 8",
    ),
    (lambda k: {"taps": k["taps"][0, 0, 0, 0]}, ValueError, r"taps must be a contiguous \[1, 1, 5, 8, 32, 8\]"),
    (lambda k: {"excite_bias": k["excite_bias"].half()}, TypeError, "excite_bias has dtype torch.float16, it must be"),
    (lambda k: {"project": k["project"].to("meta")}, RuntimeError, "project is on meta, x on .*; move one of them"),
    (lambda k: {"x": k["x"].to("meta")}, RuntimeError, "x is on meta; supported are CUDA GPUs, and CPUs"),
]


@pytest.mark.parametrize("change, error, message", ERRORS, ids=[message for *_, message in ERRORS])
def test_errors(change, error, message, arguments):
    kwargs = arguments()
    with pytest.raises(error, match=f"fusion::mbconv_down_windows_hopper: .*{message}"):
        mbconv_down_windows_hopper(**{**kwargs, **change(kwargs)})


def test_a_tile_of_no_columns_is_refused(arguments):
    with pytest.raises(ValueError, match="MBConvDownWindowsHopperTile: piece must be a positive integer, got 0"):
        mbconv_down_windows_hopper(**arguments(tile=[0, 8, 32, 3]))


@runs
def test_the_kernel_is_called_by_its_name(arguments, random_mbconv_weights):
    kwargs = arguments()
    expected = mbconv_down_windows_hopper(**kwargs)
    packed = tuple(kwargs[name] for name in PackedMBConvHopper.__dataclass_fields__)
    options = {"activation": "silu", "squeeze_activation": "relu", "blur": False}
    weights = random_mbconv_weights(24, 72, squeeze=3)
    out = kernels.run(KERNEL, kwargs["x"], packed, kwargs["tile"], weights, **options)
    assert torch.equal(out, expected)
    message = "the Hopper kernel has no activation 'gelu', only 'relu' or 'silu'; use an MBConvDownTile"
    with pytest.raises(ValueError, match=message):
        kernels.run(KERNEL, kwargs["x"], packed, kwargs["tile"], weights, activation="gelu")


def test_tiles_of_equal_step_share_packed_weights():
    assert kernels.packing(TILE) == (KERNEL, 32) == kernels.packing(MBConvDownWindowsHopperTile(4, 16, 32, 8))
    assert kernels.packing(replace(TILE, step=64)) == (KERNEL, 64)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"group_width": 16}, "groups of 16 channels are not supported, only of 8; use an MBConv"),
        ({"kernel_size": 7}, "kernel size 7 is not supported, use 3 or 5, or an MBConv"),
    ],
    ids=str,
)
def test_weights_that_cannot_be_packed(options, message, random_mbconv_weights):
    with pytest.raises(ValueError, match=rf"MBConvDownWindowsHopperTile\(.*{message}"):
        kernels.pack(random_mbconv_weights(16, 64, **options), TILE, torch.float16, "cpu")


@runs
@pytest.mark.parametrize("out_channels, size, kernel_size", [(24, (18, 20), 3), (40, (19, 9), 5)], ids=str)
def test_a_module_runs_it(out_channels, size, kernel_size, device, random_mbconv_weights):
    weights = random_mbconv_weights(24, 72, out_channels, squeeze=3, kernel_size=kernel_size)
    options = {"activation": "silu", "squeeze_activation": "silu", "tuner": partial(plan_block, kernel=KERNEL)}
    fused = FusedMBConvDown(weights, **options, blur=False)
    torch.manual_seed(0)
    x = torch.randn(2, 24, *size).to(device, torch.float16)
    plan = fused.plan(x)
    assert plan.kernel == KERNEL and isinstance(plan.tile, MBConvDownWindowsHopperTile)
    packed = kernels.pack(weights, plan.tile, x.dtype, x.device).tensors()
    sizes = 72, out_channels, 3
    expected = mbconv_down_windows_hopper(x, *packed, *sizes, "silu", "silu", False, plan.tile.to_ints())
    assert torch.equal(fused(x), expected)


def test_a_module_with_a_blur_pool_is_refused(random_mbconv_weights):
    fused = FusedMBConvDown(
        random_mbconv_weights(24, 72, squeeze=3), activation="silu", tuner=partial(plan_block, kernel=KERNEL)
    )
    with pytest.raises(PlanError, match="a blur-pool is not supported, use an MBConvDownTile"):
        fused(torch.randn(2, 24, 18, 20))


@needs_hopper
def test_other_dtypes_are_refused_on_a_gpu(arguments):
    with pytest.raises(TypeError, match=r"x has dtype torch.float32; supported are torch.float16 or torch.bfloat16"):
        mbconv_down_windows_hopper(**arguments(dtype=torch.float32))
    kwargs = arguments()
    with pytest.raises(TypeError, match=r"expand has dtype torch.bfloat16, it must be torch.float16"):
        mbconv_down_windows_hopper(**{**kwargs, "expand": kwargs["expand"].bfloat16()})


@needs_hopper
def test_unaligned_weights_are_refused(arguments):
    kwargs = arguments()
    flat = torch.empty(kwargs["project"].numel() + 1, dtype=torch.float16, device="cuda")[1:]
    project = flat.view_as(kwargs["project"]).copy_(kwargs["project"])
    with pytest.raises(ValueError, match=r"weights are at an address that is no multiple of 16 bytes, clone them"):
        mbconv_down_windows_hopper(**{**kwargs, "project": project})


@pytest.mark.skipif(not HAS_GPU or IS_HOPPER, reason="needs a GPU that is not of compute capability 9.0")
def test_other_gpus_are_refused(arguments):
    with pytest.raises(RuntimeError, match=r"the kernel needs 9\.0; pack the weights for an MBConvDownTile and call"):
        mbconv_down_windows_hopper(**arguments())

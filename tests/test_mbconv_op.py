from dataclasses import replace

import pytest
import torch

from fusion import mbconv_ops
from fusion.planner.mbconv_tile import MBConvTile
from fusion.reference import mbconv as reference

TILE = MBConvTile(2, 4, 8, 32, 16, 16, 2, 2, 32, 16, 64, 2, 2)
HAS_GPU = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA GPU")


@pytest.fixture
def arguments(device, random_mbconv_weights):
    """`(**changes) -> dict` of the operator's arguments for 24 input, 40 hidden, 24 output and 3 squeeze channels."""

    def make(dtype=torch.float16, out_channels=24, kernel_size=3, **changes):
        weights = random_mbconv_weights(24, 40, out_channels, squeeze=3, kernel_size=kernel_size)
        torch.manual_seed(0)
        return {
            "x": torch.randn(3, 24, 5, 7).to(device, dtype),
            **vars(weights.pack(TILE, dtype, device)),
            "hidden_channels": 40,
            "out_channels": out_channels,
            "squeeze_channels": 3,
            "group_width": 8,
            "activation": "silu",
            "squeeze_activation": "relu",
            "residual": out_channels == 24,
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
    "changes",
    [{}, {"out_channels": 16, "activation": "relu", "squeeze_activation": "silu"}, {"kernel_size": 5}],
    ids=str,
)
def test_opcheck(changes, arguments, deterministic):
    """In order, because opcheck compares runs to the bit."""
    torch.library.opcheck(torch.ops.fusion.mbconv.default, tuple(arguments(**changes).values()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("out_channels, activation, squeeze_activation", [(24, "silu", "relu"), (16, "relu", "silu")])
def test_cpus_compute_the_reference(out_channels, activation, squeeze_activation, dtype, random_mbconv_weights):
    weights = random_mbconv_weights(24, 40, out_channels, squeeze=3)
    torch.manual_seed(0)
    x = torch.randn(2, 24, 5, 7).to(dtype)
    residual = out_channels == 24
    packed = weights.pack(TILE, dtype, "cpu").tensors()
    options = activation, squeeze_activation, residual, TILE.to_ints()
    out = mbconv_ops.mbconv(x, *packed, 40, out_channels, 3, 8, *options)
    # Biases are packed in fp32, whatever the dtype.
    exact = (w.float() if name.endswith("bias") else w for name, w in vars(weights).items())
    x = x.contiguous(memory_format=torch.channels_last)
    expected = reference(x, *exact, activation, residual, squeeze_activation)
    assert out.dtype == dtype
    torch.testing.assert_close(out, expected)  # products of transposed weights may be summed in another order


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("out_channels, kernel_size", [(24, 3), (16, 3), (24, 5)])
def test_error_in_16_bits(
    out_channels, kernel_size, dtype, arguments, device, random_mbconv_weights, assert_within_rule
):
    kwargs = arguments(dtype, out_channels, kernel_size)
    weights = random_mbconv_weights(24, 40, out_channels, squeeze=3, kernel_size=kernel_size)
    weights = [w.to(device) for w in vars(weights).values()]
    eager, exact = (reference(x, *weights, "silu", out_channels == 24) for x in (kwargs["x"], kwargs["x"].double()))
    assert_within_rule(mbconv_ops.mbconv(**kwargs), eager, exact)


def test_memory_formats_of_the_input_are_equal_and_the_output_is_channels_last(arguments, deterministic):
    kwargs = arguments()
    x = kwargs.pop("x")
    outs = [
        mbconv_ops.mbconv(x.contiguous(memory_format=layout), **kwargs)
        for layout in (torch.contiguous_format, torch.channels_last)
    ]
    assert torch.equal(*outs)
    for out in outs:
        assert out.shape == (3, 24, 5, 7)
        assert out.stride() == (5 * 7 * 24, 1, 7 * 24, 24)


def test_strided_input(arguments, deterministic):
    kwargs = arguments()
    x = kwargs.pop("x")
    wide = torch.stack([x, x], dim=-1).flatten(-2)
    assert torch.equal(mbconv_ops.mbconv(wide[..., ::2], **kwargs), mbconv_ops.mbconv(x, **kwargs))


def test_empty_batch(arguments, device):
    out = mbconv_ops.mbconv(**arguments(x=torch.empty(0, 24, 5, 7, dtype=torch.float16, device=device)))
    assert out.shape == (0, 24, 5, 7) and out.dtype == torch.float16


def test_a_gradient_is_refused(arguments):
    kwargs = arguments()
    kwargs["x"].requires_grad_()
    with pytest.raises(RuntimeError, match=r"has no gradient, but one of its inputs requires.*torch\.no_grad\(\)"):
        mbconv_ops.mbconv(**kwargs)
    with torch.no_grad():
        assert not mbconv_ops.mbconv(**kwargs).requires_grad
    kwargs["x"] = kwargs["x"].detach()
    kwargs["squeeze"].requires_grad_()
    with pytest.raises(RuntimeError, match="has no gradient"):
        mbconv_ops.mbconv(**kwargs)


@needs_gpu
@pytest.mark.parametrize("size", [(16, 16), (33, 31)])
def test_deterministic_algorithms_give_equal_bits(size, device, random_mbconv_weights, deterministic):
    weights = random_mbconv_weights(64, 512, squeeze=16)
    torch.manual_seed(0)
    x = torch.randn(8, 64, *size).to(device, torch.float16)
    packed = weights.pack(TILE, x.dtype, device).tensors()
    outs = [mbconv_ops.mbconv(x, *packed, 512, 64, 16, 8, "silu", "relu", True, TILE.to_ints()) for _ in range(10)]
    assert all(torch.equal(out, outs[0]) for out in outs)


@needs_gpu
def test_deterministic_algorithms_choose_the_ordered_sum(arguments, monkeypatch, deterministic):
    from fusion.triton_kernels import mbconv as kernels

    orders = []
    launch = kernels.launch
    monkeypatch.setattr(
        kernels, "launch", lambda *a, ordered, **k: (orders.append(ordered), launch(*a, ordered=ordered, **k))
    )
    mbconv_ops.mbconv(**arguments())
    torch.use_deterministic_algorithms(False)
    mbconv_ops.mbconv(**arguments())
    assert orders == [True, False]


ERRORS = [
    (lambda k: {"x": k["x"][0]}, ValueError, r"x must be \[N, C, H, W\], got shape \[24, 5, 7\]"),
    (lambda k: {"tile": [8]}, ValueError, r"tile must be the 13 integers of MBConvTile.to_ints\(\), got \[8\]"),
    (
        lambda k: {"tile": replace(TILE, stages=1).to_ints()},
        ValueError,
        "cannot run: loops must be pipelined, in 2 stages at least; take the tile of a plan",
    ),
    (
        lambda k: {"x": k["x"][:1, :, :1, :1].expand(1, 24, 2**14, 2**12)},
        ValueError,
        "images of 16384x4096 pixels and 40 hidden channels are too large, split them",
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
        r"conv must be a contiguous \[2, 9, 32, 32\].*got shape \[4, 9, 16, 16\]",
    ),
    (
        lambda k: {"conv": k["conv"][:, :1].repeat(1, 49, 1, 1)},
        ValueError,
        "kernel size 7 is not supported, use 3 or 5",
    ),
    (lambda k: {"project": k["project"].T}, ValueError, r"project must be a contiguous \[64, 32\].*shape \[32, 64\]"),
    (lambda k: {"conv_bias": k["conv_bias"].half()}, TypeError, "conv_bias has dtype torch.float16, it must be"),
    (lambda k: {"excite": k["excite"].to("meta")}, RuntimeError, "excite is on meta, x on .*; move one of them"),
    (lambda k: {"x": k["x"].to("meta")}, RuntimeError, "x is on meta; supported are CUDA GPUs, and CPUs"),
    (
        lambda k: {
            "out_channels": 16,
            "project": k["project"][:, :16].contiguous(),
            "project_bias": k["project_bias"][:16],
        },
        ValueError,
        "24 input channels cannot be added to 16 output.*or pass residual=False",
    ),
]


@pytest.mark.parametrize("change, error, message", ERRORS, ids=[message for *_, message in ERRORS])
def test_errors(change, error, message, arguments):
    kwargs = arguments()
    with pytest.raises(error, match=f"fusion::mbconv: .*{message}"):
        mbconv_ops.mbconv(**{**kwargs, **change(kwargs)})


@needs_gpu
def test_other_dtypes_are_refused_on_a_gpu(arguments):
    with pytest.raises(TypeError, match=r"x has dtype torch.float32; supported are torch.float16 or torch.bfloat16"):
        mbconv_ops.mbconv(**arguments(dtype=torch.float32))

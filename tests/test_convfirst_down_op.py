import pytest
import torch

from fusion import convfirst_down_ops
from fusion.convfirst_down_weights import pack_convfirst_down
from fusion.planner.convfirst_down_tile import ConvFirstDownTile
from fusion.reference import convfirst_down as reference

TILE = ConvFirstDownTile(32, 32, 32, 2)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture
def arguments(device, random_weights):
    """`(**changes) -> dict` of the operator's arguments for a block with 24 input, 40 hidden, 48 output channels."""

    def make(dtype=torch.float16, **changes):
        packed = pack_convfirst_down(random_weights(24, 40, 48, stride=2), TILE, dtype, device)
        torch.manual_seed(0)
        return {
            "x": torch.randn(2, 24, 5, 8).to(device, dtype),
            **vars(packed),
            "hidden_channels": 40,
            "out_channels": 48,
            "group_width": 8,
            "activation": "relu",
            "tile": TILE.to_ints(),
            **changes,
        }

    return make


@pytest.mark.parametrize("size, activation", [((5, 8), "relu"), ((2, 3), "silu")], ids=str)
def test_opcheck(size, activation, arguments):
    kwargs = arguments(activation=activation)
    kwargs["x"] = kwargs["x"][..., : size[0], : size[1]]
    torch.library.opcheck(torch.ops.fusion.convfirst_down.default, tuple(kwargs.values()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size, activation", [((5, 7), "silu"), ((4, 6), "relu"), ((2, 3), "relu")])
def test_cpus_compute_the_reference(size, activation, dtype, random_weights, assert_within_rule):
    weights = random_weights(24, 40, 48, group_width=4, stride=2)
    torch.manual_seed(0)
    x = torch.randn(2, 24, *size).to(dtype)
    packed = pack_convfirst_down(weights, TILE, dtype, "cpu").tensors()
    out = convfirst_down_ops.convfirst_down(x, *packed, 40, 48, 4, activation, TILE.to_ints())
    eager, exact = (reference(y, *vars(weights).values(), activation) for y in (x, x.double()))
    if dtype == torch.float64:
        # Biases are packed in fp32, whatever the dtype.
        torch.testing.assert_close(out, exact, rtol=1e-6, atol=1e-6)
    else:
        assert_within_rule(out, eager, exact)


def test_memory_formats_of_the_input_are_equal_and_the_output_is_channels_last(arguments):
    kwargs = arguments()
    x = kwargs.pop("x")
    outs = [
        convfirst_down_ops.convfirst_down(x.contiguous(memory_format=layout), **kwargs)
        for layout in (torch.contiguous_format, torch.channels_last)
    ]
    assert torch.equal(*outs)
    for out in outs:
        assert out.shape == (2, 48, 3, 4) and out.dtype == x.dtype
        assert out.is_contiguous(memory_format=torch.channels_last)


def test_an_empty_batch(arguments):
    kwargs = arguments()
    assert convfirst_down_ops.convfirst_down(**{**kwargs, "x": kwargs["x"][:0]}).shape == (0, 48, 3, 4)


def test_gradients_are_refused(arguments):
    kwargs = arguments(torch.float32) if not torch.cuda.is_available() else arguments()
    kwargs["x"].requires_grad_()
    with pytest.raises(RuntimeError, match="fusion::convfirst_down is an inference operator and has no gradient"):
        convfirst_down_ops.convfirst_down(**kwargs)
    with torch.no_grad():
        convfirst_down_ops.convfirst_down(**kwargs)


ERRORS = [
    (lambda k: {"x": k["x"][0]}, ValueError, r"x must be \[N, C, H, W\], got shape \[24, 5, 8\]"),
    (lambda k: {"x": k["x"][:, :, :1]}, ValueError, "images of 1x8 pixels cannot be blur-pooled, whose reflection"),
    (lambda k: {"x": k["x"][..., :1]}, ValueError, "images of 5x1 pixels cannot be blur-pooled"),
    (lambda k: {"tile": [1, 2]}, ValueError, r"tile must be the 7 integers of ConvFirstDownTile.to_ints\(\), got"),
    (
        lambda k: {"tile": [32, 32, 32, 2, 1, 2, 16]},
        ValueError,
        "cannot run: loops must be pipelined, in 2 stages at least; take the tile of a plan",
    ),
    (lambda k: {"activation": "elu"}, ValueError, "activation 'elu' is not supported, use relu or .* or hardswish"),
    (lambda k: {"x": k["x"][:, :20]}, ValueError, "20 input channels are not supported, use a multiple of 8"),
    (lambda k: {"out_channels": 20}, ValueError, "20 output channels are not supported, use a multiple of 8"),
    (lambda k: {"group_width": 5}, ValueError, "24 channels do not divide into groups of 5"),
    (lambda k: {"group_width": 0}, ValueError, "24 channels do not divide into groups of 0"),
    (
        lambda k: {"tile": ConvFirstDownTile(32, 32, 16, 2).to_ints()},
        ValueError,
        r"conv must be a contiguous \[230400\] for 24 input.*got shape \[460800\].*pack the weights for this tile with",
    ),
    (
        lambda k: {"tile": ConvFirstDownTile(32, 128, 32, 2).to_ints()},
        ValueError,
        r"expand must be a contiguous \[64, 256\].*got shape \[64, 64\]",
    ),
    (lambda k: {"project": k["project"].T}, ValueError, r"project must be a contiguous \[64, 48\].*shape \[48, 64\]"),
    (lambda k: {"expand_bias": k["expand_bias"].half()}, TypeError, "expand_bias has dtype torch.float16, it must be"),
    (lambda k: {"project": k["project"].to("meta")}, RuntimeError, "project is on meta, x on .*; move one of them"),
    (lambda k: {"x": k["x"].to("meta")}, RuntimeError, "x is on meta; supported are CUDA GPUs, and CPUs"),
]


@pytest.mark.parametrize("change, error, message", ERRORS, ids=[message for *_, message in ERRORS])
def test_errors(change, error, message, arguments):
    kwargs = arguments()
    with pytest.raises(error, match=f"fusion::convfirst_down: .*{message}"):
        convfirst_down_ops.convfirst_down(**{**kwargs, **change(kwargs)})


def test_slabs_that_split_groups_are_refused(arguments):
    tile = ConvFirstDownTile(32, 32, 16, 2)
    with pytest.raises(ValueError, match=r"slabs \(16, 16\).*split groups of 24 channels"):
        convfirst_down_ops.convfirst_down(**arguments(group_width=24, tile=tile.to_ints()))


@needs_gpu
def test_other_dtypes_are_refused_on_a_gpu(arguments):
    with pytest.raises(TypeError, match=r"x has dtype torch.float32; supported are torch.float16 or torch.bfloat16"):
        convfirst_down_ops.convfirst_down(**arguments(dtype=torch.float32))

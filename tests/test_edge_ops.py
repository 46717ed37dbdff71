import pytest
import torch

from fusion import edge_ops, reference
from fusion.edge_weights import HeadWeights, StemWeights
from fusion.planner.head_tile import HeadTile
from fusion.planner.stem_tile import StemTile

STEM_TILE, HEAD_TILE = StemTile(2, 32, 2, 2), HeadTile(16, 32, 2, 2, 2)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def normal(*size):
    return torch.randn(*size, generator=torch.Generator().manual_seed(sum(size)), dtype=torch.float64)


STEM_WEIGHTS = StemWeights(normal(24, 3, 3, 3) / 5, normal(24))
HEAD_WEIGHTS = HeadWeights(normal(40, 24) / 5, normal(40))


@pytest.fixture
def stem_arguments(device):
    """`(**changes) -> dict` of the operator's arguments for a stem with 3 input and 24 output channels."""

    def make(dtype=torch.float16, **changes):
        packed = STEM_WEIGHTS.pack(STEM_TILE, dtype, device)
        torch.manual_seed(0)
        x = torch.randn(2, 3, 5, 12).to(device, dtype)
        rest = {"out_channels": 24, "activation": "relu", "tile": STEM_TILE.to_ints()}
        return {"x": x, **vars(packed), **rest, **changes}

    return make


@pytest.fixture
def head_arguments(device):
    """`(**changes) -> dict` of the operator's arguments for a head with 24 input and 40 output channels."""

    def make(dtype=torch.float16, **changes):
        packed = HEAD_WEIGHTS.pack(HEAD_TILE, dtype, device)
        torch.manual_seed(0)
        x = torch.randn(2, 24, 5, 7).to(device, dtype)
        rest = {"out_channels": 40, "activation": "silu", "tile": HEAD_TILE.to_ints()}
        return {"x": x, **vars(packed), **rest, **changes}

    return make


def test_opcheck(stem_arguments, head_arguments):
    for layout in (torch.contiguous_format, torch.channels_last):
        arguments = stem_arguments()
        arguments["x"] = arguments["x"].contiguous(memory_format=layout)
        torch.library.opcheck(torch.ops.fusion.stem.default, tuple(arguments.values()))
    torch.library.opcheck(torch.ops.fusion.head.default, tuple(head_arguments().values()))


@pytest.mark.parametrize("activation", ["relu", "silu", "none", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_cpus_compute_the_reference(dtype, activation):
    x = normal(2, 3, 5, 12).to(dtype)
    packed = STEM_WEIGHTS.pack(STEM_TILE, dtype, "cpu").tensors()
    out = edge_ops.stem(x, *packed, 24, activation, STEM_TILE.to_ints())
    expected = reference.stem(x, STEM_WEIGHTS.conv, STEM_WEIGHTS.bias, activation)
    assert out.dtype == dtype
    torch.testing.assert_close(out, expected, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)

    x = normal(2, 24, 5, 7).to(dtype)
    packed = HEAD_WEIGHTS.pack(HEAD_TILE, dtype, "cpu").tensors()
    out = edge_ops.head(x, *packed, 40, activation, HEAD_TILE.to_ints())
    expected = reference.head(x, HEAD_WEIGHTS.conv, HEAD_WEIGHTS.bias.float(), activation)
    assert (out.dtype, out.shape) == (dtype, (2, 40))
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


def test_memory_formats_of_the_input_agree_and_a_map_is_channels_last(stem_arguments, head_arguments):
    arguments = stem_arguments()
    x = arguments.pop("x")
    strided = torch.stack([x, x], dim=-1).flatten(-2)[..., ::2]
    inputs = (x, x.contiguous(memory_format=torch.channels_last), strided)
    outs = [edge_ops.stem(each, **arguments) for each in inputs]
    for out in outs:
        assert out.stride() == (3 * 6 * 24, 1, 6 * 24, 24)
        torch.testing.assert_close(out, outs[0], rtol=2e-3, atol=2e-3)
    arguments = head_arguments()
    x = arguments.pop("x")
    first, second = (edge_ops.head(each, **arguments) for each in (x, x.contiguous(memory_format=torch.channels_last)))
    torch.testing.assert_close(first, second, rtol=2e-3, atol=2e-3)


def test_no_images(stem_arguments, head_arguments, device):
    empty = torch.empty(0, 3, 5, 12, dtype=torch.float16, device=device)
    assert edge_ops.stem(**stem_arguments(x=empty)).shape == (0, 24, 3, 6)
    empty = torch.empty(0, 24, 5, 7, dtype=torch.float16, device=device)
    assert edge_ops.head(**head_arguments(x=empty)).shape == (0, 40)


@pytest.mark.parametrize("name, weight", [("stem", "interleaved"), ("head", "conv")])
def test_a_gradient_is_refused(name, weight, stem_arguments, head_arguments):
    op, arguments = getattr(edge_ops, name), {"stem": stem_arguments, "head": head_arguments}[name]()
    for argument in ("x", weight):
        wanting = {**arguments, argument: arguments[argument].detach().requires_grad_()}
        with pytest.raises(RuntimeError, match=rf"fusion::{name}.*has no gradient, .*torch\.no_grad\(\)"):
            op(**wanting)
        with torch.no_grad():
            assert not op(**wanting).requires_grad
    assert not op(**arguments).requires_grad


STEM_ERRORS = [
    (lambda k: {"x": k["x"][0]}, ValueError, r"x must be \[N, C, H, W\], got shape \[3, 5, 12\]"),
    (lambda k: {"tile": [2, 32]}, ValueError, r"tile must be the 4 integers of StemTile.to_ints\(\), got \[2, 32\]"),
    (lambda k: {"tile": [3, 32, 2, 2]}, ValueError, "cannot run: height=3 is not a power of two; take the tile of a"),
    (lambda k: {"activation": "elu"}, ValueError, "activation 'elu' is not supported, use relu or .*hardswish or none"),
    (lambda k: {"x": k["x"].repeat(1, 2, 1, 1)}, ValueError, "images of 6 channels are not supported, only of 1 to 4"),
    (lambda k: {"out_channels": 20}, ValueError, "20 output channels are not supported, use a multiple of 8 up to 64"),
    (
        lambda k: {"x": torch.empty(1).expand(1, 3, 2**15, 2**15)},
        ValueError,
        "images of 32768x32768 pixels are too large, split them",
    ),
    (
        lambda k: {"x": k["x"][:1].expand(70000, -1, -1, -1)},
        ValueError,
        "70000 images and 2 rows of tiles are too many for a launch, split the batch",
    ),
    (
        lambda k: {"tile": [2, 64, 4, 2]},
        ValueError,
        r"interleaved must be a contiguous \[128, 128\] for 3 input and 24 output.*\[64, 64\].*pack the weights for th",
    ),
    (lambda k: {"planar": k["planar"].T}, ValueError, r"planar must be a contiguous \[128, 64\].*shape \[64, 128\]"),
    (lambda k: {"planar": k["planar"].to("meta")}, RuntimeError, "planar is on meta, x on .*; move one of them"),
    (lambda k: {"x": k["x"].to("meta")}, RuntimeError, "x is on meta; supported are CUDA GPUs, and CPUs"),
]


@pytest.mark.parametrize("change, error, message", STEM_ERRORS, ids=[message for *_, message in STEM_ERRORS])
def test_errors_of_a_stem(change, error, message, stem_arguments):
    arguments = stem_arguments()
    with pytest.raises(error, match=f"fusion::stem: .*{message}"):
        edge_ops.stem(**{**arguments, **change(arguments)})


HEAD_ERRORS = [
    (lambda k: {"x": k["x"][0]}, ValueError, r"x must be \[N, C, H, W\], got shape \[24, 5, 7\]"),
    (lambda k: {"tile": [16, 32]}, ValueError, r"tile must be the 5 integers of HeadTile.to_ints\(\), got \[16, 32\]"),
    (lambda k: {"tile": [16, 32, 2, 2, 1]}, ValueError, "cannot run: the loop must be pipelined, in 2 to 4 stages"),
    (lambda k: {"activation": "elu"}, ValueError, "activation 'elu' is not supported, use relu or .*hardswish or none"),
    (lambda k: {"x": k["x"][:, :, :0]}, ValueError, "images of 0x7 pixels have no mean, use at least one pixel"),
    (lambda k: {"x": k["x"][:, :20]}, ValueError, "20 input channels are not supported, use a multiple of 8"),
    (lambda k: {"out_channels": 20}, ValueError, "20 output channels are not supported, use a multiple of 8"),
    (
        lambda k: {"tile": [16, 128, 2, 2, 2]},
        ValueError,
        r"conv must be a contiguous \[128, 32\] for 24 input and 40 output channels.*got shape \[64, 32\]",
    ),
    (lambda k: {"bias": k["bias"].half()}, TypeError, "bias has dtype torch.float16, it must be torch.float32"),
    (lambda k: {"conv": k["conv"].to("meta")}, RuntimeError, "conv is on meta, x on .*; move one of them"),
]


@pytest.mark.parametrize("change, error, message", HEAD_ERRORS, ids=[message for *_, message in HEAD_ERRORS])
def test_errors_of_a_head(change, error, message, head_arguments):
    arguments = head_arguments()
    with pytest.raises(error, match=f"fusion::head: .*{message}"):
        edge_ops.head(**{**arguments, **change(arguments)})


@needs_gpu
def test_other_dtypes_are_refused_on_a_gpu(stem_arguments, head_arguments):
    for op, arguments in ((edge_ops.stem, stem_arguments), (edge_ops.head, head_arguments)):
        with pytest.raises(
            TypeError, match=r"x has dtype torch.float32; supported are torch.float16 or torch.bfloat16"
        ):
            op(**arguments(dtype=torch.float32))
        with pytest.raises(TypeError, match=r"has dtype torch.bfloat16, it must be torch.float16 for torch.float16 x"):
            op(**{**arguments(dtype=torch.bfloat16), "x": arguments()["x"]})


@needs_gpu
def test_an_input_that_is_not_aligned(stem_arguments):
    """A view whose first element lies at an odd address: loads become narrow, results stay."""
    arguments = stem_arguments()
    x = arguments.pop("x").contiguous(memory_format=torch.channels_last)
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:].as_strided(x.shape, x.stride())
    shifted.copy_(x)
    torch.testing.assert_close(edge_ops.stem(shifted, **arguments), edge_ops.stem(x, **arguments), rtol=0, atol=0)

import pytest
import torch

from fusion import ops
from fusion.op_checks import check_gpu
from fusion.planner.hopper_tile import HopperTile
from fusion.reference import convfirst as reference

TILE = HopperTile(64, 32, 3, 1, 1, 32, 0)
STREAMED = HopperTile(64, 32, 2, 2, 1, 16, 2)
HAS_GPU = torch.cuda.is_available()
IS_HOPPER = HAS_GPU and torch.cuda.get_device_capability() == (9, 0)
runs = pytest.mark.skipif(HAS_GPU and not IS_HOPPER, reason="this GPU is not of compute capability 9.0")


@pytest.fixture
def arguments(device, random_weights):
    """`(**changes) -> dict` of the operator's arguments for a block with 24 input, 40 hidden, 24 output channels."""

    def make(dtype=torch.float16, out_channels=24, tile=TILE, **changes):
        packed = random_weights(24, 40, out_channels).pack_hopper(tile, dtype, device)
        torch.manual_seed(0)
        return {
            "x": torch.randn(2, 24, 5, 7).to(device, dtype),
            "weights": packed.weights,
            "project_bias": packed.project_bias,
            "hidden_channels": 40,
            "out_channels": out_channels,
            "residual": out_channels == 24,
            "tile": tile.to_ints(),
            **changes,
        }

    return make


@runs
@pytest.mark.parametrize("changes", [{}, {"out_channels": 16}, {"tile": STREAMED}], ids=str)
def test_opcheck(changes, arguments):
    torch.library.opcheck(torch.ops.fusion.convfirst_hopper.default, tuple(arguments(**changes).values()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("out_channels", [24, 72])
@pytest.mark.parametrize("tile", [TILE, STREAMED, HopperTile(128, 16, 2, 1, 3, 64, 0)], ids=str)
def test_cpus_compute_the_reference(tile, out_channels, dtype, random_weights):
    weights = random_weights(24, 40, out_channels)
    torch.manual_seed(0)
    x = torch.randn(2, 24, 5, 7).to(dtype)
    packed, residual = weights.pack_hopper(tile, dtype, "cpu").tensors(), out_channels == 24
    out = ops.convfirst_hopper(x, *packed, 40, out_channels, residual, tile.to_ints())
    expected = reference(
        x.contiguous(memory_format=torch.channels_last),
        weights.conv,
        weights.expand,
        weights.expand_bias,
        weights.project,
        weights.project_bias.float(),
        "relu",
        residual,
    )
    assert out.dtype == dtype
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


@runs
def test_memory_formats_of_the_input_are_equal_and_the_output_is_channels_last(arguments):
    kwargs = arguments()
    x = kwargs.pop("x")
    outs = [
        ops.convfirst_hopper(x.contiguous(memory_format=layout), **kwargs)
        for layout in (torch.contiguous_format, torch.channels_last)
    ]
    assert torch.equal(*outs)
    for out in outs:
        assert out.shape == (2, 24, 5, 7)
        assert out.stride() == (5 * 7 * 24, 1, 7 * 24, 24)


@runs
def test_strided_and_unaligned_inputs(arguments):
    kwargs = arguments()
    x = kwargs.pop("x")
    expected = ops.convfirst_hopper(x, **kwargs)
    wide = torch.stack([x, x], dim=-1).flatten(-2)
    assert torch.equal(ops.convfirst_hopper(wide[..., ::2], **kwargs), expected)
    flat = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:]
    unaligned = flat.view(2, 5, 7, 24).permute(0, 3, 1, 2).copy_(x)
    assert unaligned.data_ptr() % 16 and unaligned.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(ops.convfirst_hopper(unaligned, **kwargs), expected)


@runs
def test_empty_batch(arguments, device):
    out = ops.convfirst_hopper(**arguments(x=torch.empty(0, 24, 5, 7, dtype=torch.float16, device=device)))
    assert out.shape == (0, 24, 5, 7) and out.dtype == torch.float16


@runs
def test_compiles_as_one_graph(arguments):
    kwargs = arguments()
    x = kwargs.pop("x")
    compiled = torch.compile(lambda x: ops.convfirst_hopper(x, **kwargs) * 2, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), ops.convfirst_hopper(x, **kwargs) * 2)


@runs
def test_a_gradient_is_refused(arguments):
    kwargs = arguments()
    kwargs["x"].requires_grad_()
    with pytest.raises(RuntimeError, match=r"fusion::convfirst_hopper is an inference operator and has no gradient"):
        ops.convfirst_hopper(**kwargs)
    with torch.no_grad():
        assert not ops.convfirst_hopper(**kwargs).requires_grad


ERRORS = [
    (lambda k: {"x": k["x"][0]}, ValueError, r"x must be \[N, C, H, W\], got shape \[24, 5, 7\]"),
    (
        lambda k: {"tile": [64, 32]},
        ValueError,
        r"tile must be the 7 integers of HopperTile.to_ints\(\), got \[64, 32\]",
    ),
    (
        lambda k: {"tile": HopperTile(64, 32, 5, 1, 1, 32, 0).to_ints()},
        ValueError,
        "cannot run: stages=5 is not one of 2, 3, 4.*take the tile of a plan",
    ),
    (
        lambda k: {"tile": HopperTile(64, 32, 2, 2, 1, 32, 3).to_ints()},
        ValueError,
        "cannot run: weight_chunks=3 does not go with 2 steps over the hidden channels, use 2 to 2, or 0",
    ),
    (
        lambda k: {"x": torch.empty(1).expand(1, 24, 2**14, 2**13)},
        ValueError,
        "images of 16384x8192 pixels are too large, split them",
    ),
    (lambda k: {"x": k["x"][:, :20]}, ValueError, "20 input channels are not supported, use a multiple of 8"),
    (lambda k: {"out_channels": 20}, ValueError, "20 output channels are not supported, use a multiple of 8"),
    (
        lambda k: {"out_channels": 16},
        ValueError,
        r"weights must be a contiguous \[7744\] for 24 input, 40 hidden and 16 output.*got shape \[8768\]",
    ),
    (
        lambda k: {"tile": HopperTile(64, 64, 3, 1, 1, 32, 0).to_ints(), "hidden_channels": 65},
        ValueError,
        r"weights must be a contiguous \[12928\].*pack the weights for this tile with .*pack_hopper",
    ),
    (lambda k: {"project_bias": k["project_bias"].half()}, TypeError, "project_bias has dtype torch.float16, it must"),
    (lambda k: {"weights": k["weights"].to("meta")}, RuntimeError, "weights is on meta, x on .*; move one of them"),
    (lambda k: {"x": k["x"].to("meta")}, RuntimeError, "x is on meta; supported are CUDA GPUs, and CPUs"),
]


@pytest.mark.parametrize("change, error, message", ERRORS, ids=[message for *_, message in ERRORS])
def test_errors(change, error, message, arguments):
    kwargs = arguments()
    with pytest.raises(error, match=f"fusion::convfirst_hopper: .*{message}"):
        ops.convfirst_hopper(**{**kwargs, **change(kwargs)})


def test_a_residual_needs_equal_channels(arguments):
    with pytest.raises(ValueError, match=r"24 input channels cannot be added to 16 output.*or pass residual=False"):
        ops.convfirst_hopper(**arguments(out_channels=16, residual=True))


def test_errors_are_found_while_tracing(arguments):
    kwargs = arguments(out_channels=16)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(ValueError, match="residual"):
        ops.convfirst_hopper(**{**kwargs, "residual": True})


@pytest.mark.skipif(not IS_HOPPER, reason="needs a GPU of compute capability 9.0")
def test_gpus_refuse_other_dtypes_and_unaligned_weights(arguments):
    with pytest.raises(TypeError, match=r"x has dtype torch.float32; supported are torch.float16 or torch.bfloat16"):
        ops.convfirst_hopper(**arguments(dtype=torch.float32))
    kwargs = arguments()
    weights = torch.empty(kwargs["weights"].numel() + 1, dtype=torch.float16, device="cuda")[1:]
    with pytest.raises(ValueError, match=r"weights are at an address that is no multiple of 16 bytes, clone them"):
        ops.convfirst_hopper(**{**kwargs, "weights": weights})


@pytest.mark.skipif(not HAS_GPU or IS_HOPPER, reason="needs a GPU that is not of compute capability 9.0")
def test_other_gpus_are_refused(arguments):
    with pytest.raises(RuntimeError, match=r"has compute capability .*, the kernel needs 9\.0; pack .*ConvFirstTile"):
        ops.convfirst_hopper(**arguments())


def test_the_capability_is_checked(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    with pytest.raises(RuntimeError, match=r"Some GPU has compute capability 8\.6, the kernel needs 9\.0; pack"):
        check_gpu("fusion::some", torch.device("cuda", 0), "pack again")

import pytest
import torch

from fusion import kernels, ops
from fusion.planner.ffn_tile import FfnTile
from fusion.reference import ffn

TILE = FfnTile(blocks=1, hidden=16, stages=2, expand_chunks=2, project_chunks=3, x_in_registers=0)
HAS_GPU = torch.cuda.is_available()
IS_HOPPER = HAS_GPU and torch.cuda.get_device_capability() == (9, 0)
runs = pytest.mark.skipif(HAS_GPU and not IS_HOPPER, reason="this GPU is not of compute capability 9.0")


@pytest.fixture
def arguments(device, random_ffn_weights):
    """`(**changes) -> dict` of the operator's arguments for a block with 24 input, 40 hidden, 24 output channels."""

    def make(dtype=torch.float16, out_channels=24, **changes):
        weights, hidden_bias, project_bias = (
            random_ffn_weights(24, 40, out_channels).pack(TILE, dtype, device).tensors()
        )
        torch.manual_seed(0)
        return {
            "x": torch.randn(2, 24, 5, 7).to(device, dtype),
            "weights": weights,
            "hidden_bias": hidden_bias,
            "project_bias": project_bias,
            "hidden_channels": 40,
            "out_channels": out_channels,
            "residual": out_channels == 24,
            "tile": TILE.to_ints(),
            **changes,
        }

    return make


@runs
@pytest.mark.parametrize("changes", [{}, {"out_channels": 16}], ids=str)
def test_opcheck(changes, arguments):
    torch.library.opcheck(torch.ops.fusion.ffn_hopper.default, tuple(arguments(**changes).values()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("out_channels", [24, 72])
def test_cpus_compute_the_reference(out_channels, dtype, random_ffn_weights):
    weights = random_ffn_weights(24, 40, out_channels)
    torch.manual_seed(0)
    x = torch.randn(2, 24, 5, 7).to(dtype).contiguous(memory_format=torch.channels_last)
    packed, residual = weights.pack(TILE, dtype, "cpu").tensors(), out_channels == 24
    out = ops.ffn_hopper(x, *packed, 40, out_channels, residual, TILE.to_ints())
    *others, project_bias = vars(weights).values()
    torch.testing.assert_close(out, ffn(x, *others, project_bias.float(), "relu", residual), rtol=0, atol=0)
    assert out.dtype == dtype


@runs
def test_strides_of_the_input_and_the_output(arguments):
    kwargs = arguments()
    x = kwargs.pop("x")
    expected = ops.ffn_hopper(x, **kwargs)
    assert expected.shape == (2, 24, 5, 7) and expected.stride() == (5 * 7 * 24, 1, 7 * 24, 24)
    wide = torch.stack([x, x], dim=-1).flatten(-2)
    assert torch.equal(ops.ffn_hopper(wide[..., ::2], **kwargs), expected)
    flat = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:]
    unaligned = flat.view(2, 5, 7, 24).permute(0, 3, 1, 2).copy_(x)
    assert unaligned.data_ptr() % 16
    assert torch.equal(ops.ffn_hopper(unaligned, **kwargs), expected)


@runs
def test_empty_batch(arguments, device):
    out = ops.ffn_hopper(**arguments(x=torch.empty(0, 24, 5, 7, dtype=torch.float16, device=device)))
    assert out.shape == (0, 24, 5, 7) and out.dtype == torch.float16


@runs
def test_a_gradient_is_refused(arguments):
    kwargs = arguments()
    kwargs["x"].requires_grad_()
    with pytest.raises(RuntimeError, match=r"fusion::ffn_hopper is an inference operator and has no gradient"):
        ops.ffn_hopper(**kwargs)


ERRORS = [
    (lambda k: {"x": k["x"][0]}, ValueError, r"x must be \[N, C, H, W\], got shape \[24, 5, 7\]"),
    (lambda k: {"tile": [1, 16]}, ValueError, r"tile must be the 6 integers of FfnTile.to_ints\(\), got \[1, 16\]"),
    (lambda k: {"tile": [1, 16, 2, 1, 3, 0]}, ValueError, "1 and 3 chunks of weights .*take the tile of a plan"),
    (lambda k: {"x": k["x"][:, :20]}, ValueError, "20 input channels are not supported, use a multiple of 8"),
    (
        lambda k: {"out_channels": 72},
        ValueError,
        r"weights must be a contiguous \[144, 64\] for 24 input, 40 hidden and 72 output.*FfnWeights.pack",
    ),
    (lambda k: {"hidden_bias": k["hidden_bias"][:40]}, ValueError, r"hidden_bias must be a contiguous \[48\]"),
    (lambda k: {"project_bias": k["project_bias"].half()}, TypeError, "project_bias has dtype torch.float16, it must"),
    (lambda k: {"weights": k["weights"].to("meta")}, RuntimeError, "weights is on meta, x on .*; move one of them"),
    (
        lambda k: {"x": torch.empty(1, dtype=torch.float16).expand(2**10, 24, 2**10, 2**10)},
        ValueError,
        "1073741824 pixels are too many for a launch, split the batch",
    ),
]


@pytest.mark.parametrize("change, error, message", ERRORS, ids=[message for *_, message in ERRORS])
def test_errors(change, error, message, arguments):
    kwargs = arguments()
    with pytest.raises(error, match=f"fusion::ffn_hopper: .*{message}"):
        ops.ffn_hopper(**{**kwargs, **change(kwargs)})


def test_a_residual_needs_equal_channels(arguments):
    with pytest.raises(ValueError, match=r"24 input channels cannot be added to 16 output.*or pass residual=False"):
        ops.ffn_hopper(**arguments(out_channels=16, residual=True))


def test_other_activations_are_refused(arguments, random_ffn_weights):
    kwargs = arguments()
    packed = kwargs["weights"], kwargs["hidden_bias"], kwargs["project_bias"]
    options = {"weights": random_ffn_weights(24, 40), "activation": "silu", "residual": True}
    with pytest.raises(ValueError, match="no activation 'silu', only 'relu'; run the block layer by layer"):
        kernels.run("ffn_hopper", kwargs["x"], packed, kwargs["tile"], **options)

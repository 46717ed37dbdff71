"""Kernels run natively where there is a GPU and in Triton's interpreter where there is none."""

import os

import pytest
import torch

from fusion.interpreter import interpret_kernels

if not torch.cuda.is_available():
    # Before anything imports Triton. So this module imports what does inside of its fixtures only.
    interpret_kernels()
if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers are as many as cores: more threads, of what they start too, would only wait for each other.
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def device() -> str:
    """Where kernels run: "cuda", or "cpu" for the interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def random_weights():
    """`(channels, hidden, out_channels=channels, group_width=8, stride=1) -> ConvFirstWeights`, unit scale, float64."""
    from fusion.weights import ConvFirstWeights

    def make(channels, hidden, out_channels=None, group_width=8, stride=1):
        out_channels = out_channels or channels
        generator = torch.Generator().manual_seed(channels * hidden + out_channels)

        def normal(*size, scale=1.0):
            return torch.randn(*size, generator=generator, dtype=torch.float64) * scale

        return ConvFirstWeights(
            normal(channels, group_width, 3, 3, scale=(9 * group_width) ** -0.5),
            normal(hidden, stride * channels, scale=(2 / channels / stride) ** 0.5),
            normal(hidden),
            normal(out_channels, hidden, scale=hidden**-0.5),
            normal(out_channels),
        )

    return make


@pytest.fixture(scope="session")
def random_ffn_weights(random_weights):
    """`(channels, hidden, out_channels=channels) -> FfnWeights` of unit scale, float64."""
    from fusion.ffn_weights import FfnWeights

    def make(channels, hidden, out_channels=None):
        weights = random_weights(channels, hidden, out_channels)
        return FfnWeights(weights.expand, weights.expand_bias, weights.project, weights.project_bias)

    return make


@pytest.fixture(scope="session")
def random_mbconv_weights():
    """`(channels, hidden, out_channels=channels, squeeze=6, group_width=8, kernel_size=3) -> MBConvWeights` of unit
    scale, float64."""
    from fusion.mbconv_weights import MBConvWeights

    def make(channels, hidden, out_channels=None, squeeze=6, group_width=8, kernel_size=3):
        out_channels = out_channels or channels
        generator = torch.Generator().manual_seed(channels * hidden + out_channels + squeeze)

        def normal(*size, scale=1.0):
            return torch.randn(*size, generator=generator, dtype=torch.float64) * scale

        return MBConvWeights(
            normal(hidden, channels, scale=(2 / channels) ** 0.5),
            normal(hidden),
            normal(hidden, group_width, kernel_size, kernel_size, scale=(kernel_size**2 / 2 * group_width) ** -0.5),
            normal(hidden),
            normal(squeeze, hidden, scale=(2 / hidden) ** 0.5),
            normal(squeeze),
            normal(hidden, squeeze, scale=(2 / squeeze) ** 0.5),
            normal(hidden),
            normal(out_channels, hidden, scale=(2 / hidden) ** 0.5),
            normal(out_channels),
        )

    return make


@pytest.fixture(scope="session")
def random_block():
    """`(channels, out_channels, **options) -> models.ConvFirst` in eval mode with random batch norm statistics."""
    from models.convfirst import ConvFirst

    def make(channels, out_channels, **options):
        torch.manual_seed(channels + out_channels)
        block = ConvFirst(channels, out_channels, **options).eval()
        for bn in (block.conv_bn, block.expand_bn, block.project_bn):
            torch.nn.init.uniform_(bn.weight, 0.5, 1.5)
            torch.nn.init.normal_(bn.bias)
            bn.running_mean.normal_()
            bn.running_var.uniform_(0.5, 2.0)
        return block.requires_grad_(False)

    return make


@pytest.fixture(scope="session")
def small_network():
    """`(seed=0, **options) -> models.ConvFirstNet` in eval mode, every kind of block, random batch norm statistics."""
    from models import create_model

    def make(seed=0, **options):
        torch.manual_seed(seed)
        sizes = {"stem_channels": 8, "stage_channels": (8, 16, 16, 24, 24), "depths": (1, 2, 1, 3, 2)}
        model = create_model("convfirstnet_pico", num_classes=10, head_channels=32, **sizes, **options).eval()
        for bn in model.modules():
            if isinstance(bn, torch.nn.BatchNorm2d):
                torch.nn.init.uniform_(bn.weight, 0.5, 1.5)
                torch.nn.init.normal_(bn.bias, std=0.1)
                bn.running_mean.normal_(std=0.1)
                bn.running_var.uniform_(0.5, 2.0)
        return model

    return make


@pytest.fixture(scope="session")
def fold():
    """`models.ConvFirst -> ConvFirstWeights`."""
    from fusion.weights import ConvFirstWeights

    def fold_block(block):
        return ConvFirstWeights.fold(
            block.conv, block.conv_bn, block.expand, block.expand_bn, block.project, block.project_bn
        )

    return fold_block


@pytest.fixture(scope="session")
def run_kernel(device):
    """`(x, weights, tile, activation="relu", residual=False, stride=1) -> [N, K, H', W']`, the ConvFirst kernel on `x`.

    The output is full of NaN before. On a GPU the operator runs as well and must agree to the bit.
    """
    from fusion import ops
    from fusion.triton_kernels.convfirst import launch

    def run(x, weights, tile, activation="relu", residual=False, stride=1):
        x = x.contiguous(memory_format=torch.channels_last)
        packed = weights.pack(tile, x.dtype, x.device).tensors()
        size = (-(-side // stride) for side in x.shape[2:])
        out = torch.full(
            (x.shape[0], weights.out_channels, *size), float("nan"), dtype=x.dtype, device=x.device
        ).contiguous(memory_format=torch.channels_last)
        launch(x, *packed, out, activation=activation, residual=residual, stride=stride, tile=tile)
        if device == "cuda":
            sizes = weights.hidden_channels, weights.out_channels, weights.group_width
            from_op = ops.convfirst(x, *packed, *sizes, activation, residual, stride, tile.to_ints())
            torch.testing.assert_close(from_op, out, rtol=0, atol=0, equal_nan=True)
        return out

    return run


@pytest.fixture(scope="session")
def run_mbconv_kernel():
    """`(x, weights, tile, activation="silu", residual=False, ordered=False, squeeze_activation="relu")`
    `-> [N, K, H, W]`, by the MBConv kernels.

    The output and the workspace are full of NaN before.
    """
    from fusion.triton_kernels.mbconv import launch, new_workspace

    def run(x, weights, tile, activation="silu", residual=False, ordered=False, squeeze_activation="relu"):
        x = x.contiguous(memory_format=torch.channels_last)
        packed = weights.pack(tile, x.dtype, x.device).tensors()
        names = ("hidden_channels", "out_channels", "squeeze_channels", "kernel_size")
        sizes = {name: getattr(weights, name) for name in names}
        workspace = new_workspace(x, **sizes, ordered=ordered, tile=tile)
        out = torch.empty((x.shape[0], weights.out_channels, *x.shape[2:]), dtype=x.dtype, device=x.device)
        out = out.contiguous(memory_format=torch.channels_last)
        for tensor in (out, *workspace):
            tensor.fill_(float("nan"))
        options = {"activation": activation, "residual": residual, "ordered": ordered}
        options["squeeze_activation"] = squeeze_activation
        launch(x, *packed, out, tile=tile, workspace=workspace, **options)
        return out

    return run


@pytest.fixture(scope="session")
def assert_within_rule():
    """`(out, eager, exact)`: the error of `out` is at most twice that of eager PyTorch in the same dtype."""

    def check(out, eager, exact):
        assert out.dtype == eager.dtype and out.shape == exact.shape
        error, eager_error = (((y.double() - exact).norm() / exact.norm()).item() for y in (out, eager))
        assert error <= 2 * eager_error, f"error {error:.2e}, eager {eager_error:.2e}"

    return check

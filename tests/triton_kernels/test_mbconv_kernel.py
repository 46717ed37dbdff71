from dataclasses import dataclass, replace

import pytest
import torch

from fusion.planner.blocks import mbconv as mbconv_graph
from fusion.planner.families import MBCONV
from fusion.planner.match import match_mbconv
from fusion.planner.mbconv_tile import MBConvTile, why_invalid
from fusion.planner.processor import PROCESSORS
from fusion.reference import mbconv

HAS_GPU = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA GPU: too large for the interpreter")
DTYPES = [
    torch.float16,
    pytest.param(
        torch.bfloat16,
        marks=pytest.mark.skipif(not HAS_GPU, reason="Triton's interpreter multiplies bfloat16 matrices wrongly"),
    ),
]
TILE = MBConvTile(
    images=2,
    height=8,
    width=8,
    hidden=64,
    channels=32,
    conv_slab=32,
    warps=4,
    stages=3,
    project_pixels=64,
    project_hidden=32,
    project_out=128,
    project_warps=4,
    project_stages=3,
)
SAMPLED = 150
"""Every how many candidates a GPU runs one, from the best prediction to the worst."""


@dataclass(frozen=True)
class Case:
    channels: int
    hidden: int
    out_channels: int | None = None
    squeeze: int = 6
    group_width: int = 8
    size: tuple[int, int] = (5, 7)
    batch: int = 1
    activation: str = "silu"
    residual: bool = False
    ordered: bool = False
    tile: MBConvTile = TILE
    squeeze_activation: str = "relu"
    kernel_size: int = 3

    def __str__(self):
        channels = f"{self.channels}-{self.hidden}-{self.out_channels or self.channels}s{self.squeeze}"
        image = "x".join(map(str, (self.batch, *self.size)))
        tile = ",".join(map(str, self.tile.to_ints()))
        flags = "+x" * self.residual + "-ordered" * self.ordered
        activations = f"{self.activation}-{self.squeeze_activation}"
        return f"{channels}g{self.group_width}k{self.kernel_size}-{image}-{activations}{flags}-{tile}"

    def graph(self, dtype="float16"):
        return mbconv_graph(
            self.batch,
            *self.size,
            self.channels,
            hidden_channels=self.hidden,
            out_channels=self.out_channels,
            squeeze_channels=self.squeeze,
            group_width=self.group_width,
            activation=self.activation,
            squeeze_activation=self.squeeze_activation,
            residual=self.residual,
            kernel_size=self.kernel_size,
            dtype=dtype,
        )


CASES = [
    # Channels and squeeze widths that fill their padding and that do not.
    Case(24, 96, squeeze=6, residual=True),
    Case(72, 144, squeeze=18, residual=True),
    Case(144, 72, squeeze=3, residual=True),
    Case(8, 8, squeeze=1),
    # Other output than input channels, more than one program's.
    Case(24, 64, out_channels=40),
    Case(16, 64, out_channels=200, activation="relu"),
    Case(32, 40, out_channels=72, tile=replace(TILE, project_out=16)),
    # Images of one pixel, smaller than a tile, equal to it, and such that are no multiple of it.
    *(Case(16, 64, size=size, residual=True) for size in ((1, 1), (4, 4), (8, 8), (9, 17))),
    Case(24, 48, size=(32, 32), residual=True, tile=replace(TILE, height=16, width=16, project_pixels=128)),
    Case(16, 32, size=(2, 33), tile=replace(TILE, height=1, width=16, hidden=32, warps=2)),
    Case(16, 32, size=(19, 2), tile=replace(TILE, height=16, width=1, hidden=32, warps=2)),
    # Micro-batches: as many images as the batch has, more, fewer, and such that do not divide it.
    *(Case(16, 64, batch=3, tile=replace(TILE, images=images)) for images in (1, 2, 3, 4)),
    Case(24, 72, batch=3, size=(9, 5), ordered=True, residual=True),
    # The other activation inside of squeeze-and-excitation.
    Case(24, 72, squeeze=6, residual=True, squeeze_activation="silu"),
    Case(16, 64, squeeze=33, batch=2, activation="relu", ordered=True, squeeze_activation="silu"),
    # Activations, on hidden channels that are padded.
    *(Case(16, 24, size=(4, 3), activation=activation) for activation in ("relu6", "gelu", "hardswish")),
    # Groups from depth-wise to one that is a whole slab.
    *(Case(16, 64, group_width=width, activation="relu") for width in (1, 16)),
    Case(16, 64, group_width=64, tile=replace(TILE, conv_slab=64)),
    # Tiles.
    Case(40, 80, tile=replace(TILE, hidden=16, conv_slab=16, channels=16, stages=2), residual=True),
    Case(40, 80, tile=replace(TILE, hidden=128, project_hidden=16, project_stages=2), residual=True),
    Case(40, 80, tile=replace(TILE, height=4, width=4, warps=2, project_pixels=16, project_warps=2), ordered=True),
    # 5x5 convolutions: images smaller than what a pixel needs, than a tile and its neighbours, equal to that, larger.
    *(
        Case(16, 64, size=size, residual=True, kernel_size=5)
        for size in ((1, 1), (3, 3), (2, 11), (7, 7), (8, 8), (12, 12), (13, 18))
    ),
    Case(24, 40, out_channels=40, size=(9, 5), batch=3, ordered=True, squeeze_activation="silu", kernel_size=5),
    Case(16, 32, size=(19, 2), tile=replace(TILE, height=16, width=1, hidden=32, warps=2), kernel_size=5),
    Case(16, 64, size=(9, 9), tile=replace(TILE, height=4, width=4, warps=2), group_width=1, kernel_size=5),
    Case(16, 64, group_width=64, tile=replace(TILE, conv_slab=64), kernel_size=5),
]


def random_input(*size, device, dtype):
    torch.manual_seed(sum(size))
    return torch.randn(*size, dtype=torch.float32).to(device, dtype)


def apply_reference(x, weights, case):
    """The block in the dtype of `x`."""
    tensors = (w.to(x.device) for w in vars(weights).values())
    return mbconv(x, *tensors, case.activation, case.residual, case.squeeze_activation)


def weights_of(case, random_mbconv_weights):
    sizes = case.channels, case.hidden, case.out_channels, case.squeeze, case.group_width, case.kernel_size
    return random_mbconv_weights(*sizes)


def check(case, dtype, device, random_mbconv_weights, run_mbconv_kernel, assert_within_rule):
    weights = weights_of(case, random_mbconv_weights)
    x = random_input(case.batch, case.channels, *case.size, device=device, dtype=dtype)
    options = case.activation, case.residual, case.ordered, case.squeeze_activation
    out = run_mbconv_kernel(x, weights, case.tile, *options)
    exact = apply_reference(x.double(), weights, case)
    assert_within_rule(out, apply_reference(x, weights, case), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_reference(case, dtype, device, random_mbconv_weights, run_mbconv_kernel, assert_within_rule):
    assert why_invalid(case.tile, match_mbconv(case.graph()), PROCESSORS["rtx4090"]) is None
    check(case, dtype, device, random_mbconv_weights, run_mbconv_kernel, assert_within_rule)


def test_a_gate_of_each_image(device, random_mbconv_weights, run_mbconv_kernel):
    """An image's result depends neither on the others nor on its place in a micro-batch."""
    case = Case(16, 64, batch=3, ordered=True)
    weights = weights_of(case, random_mbconv_weights)
    x = random_input(3, 16, 5, 7, device=device, dtype=torch.float16) * torch.tensor([0.1, 1, 4])[
        :, None, None, None
    ].to(device)
    x = x.half()
    together = run_mbconv_kernel(x, weights, TILE, ordered=True)
    alone = [run_mbconv_kernel(x[i : i + 1], weights, TILE, ordered=True) for i in range(3)]
    assert torch.equal(together, torch.cat(alone))


def test_ordered_sums_are_repeatable_to_the_bit(device, random_mbconv_weights, run_mbconv_kernel):
    """However many programs an image has, and however they are scheduled."""
    size, hidden, batch = ((33, 31), 256, 8) if HAS_GPU else ((9, 9), 128, 1)
    case = Case(32, hidden, size=size, batch=batch, ordered=True)
    weights = weights_of(case, random_mbconv_weights)
    x = random_input(batch, 32, *size, device=device, dtype=torch.float16)
    outs = [run_mbconv_kernel(x, weights, TILE, ordered=True) for _ in range(5 if HAS_GPU else 2)]
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_sums_are_fp32(device, random_mbconv_weights, run_mbconv_kernel):
    """The sums of a pool leave the range of fp16, and partial sums of the expansion too."""
    weights = random_mbconv_weights(32, 64)
    weights.expand[:, :16] = 1.0
    weights.expand[:, 16:] = -1.0
    weights.expand[:, 0] += 0.5
    case = Case(32, 64, activation="relu", size=(8, 8))
    x = torch.full((1, 32, 8, 8), 8192.0, dtype=torch.float16, device=device)
    largest = torch.finfo(x.dtype).max
    identity = {"project": torch.eye(64, dtype=torch.float64), "project_bias": torch.zeros(64, dtype=torch.float64)}
    hidden = apply_reference(x.double(), replace(weights, **identity), case)
    assert 16 * x.max().item() > largest
    assert hidden.max() < largest < hidden.sum((2, 3)).max()
    exact = apply_reference(x.double(), weights, case)
    out = run_mbconv_kernel(x, weights, TILE, "relu")
    assert ((out.double() - exact).norm() / exact.norm()).item() < 2e-3


def test_reads_and_writes_its_own_images_only(device, random_mbconv_weights):
    """What lies before and after the images in memory is neither read nor written."""
    from fusion.triton_kernels.mbconv import launch

    weights = random_mbconv_weights(24, 48)
    x, out = (
        torch.full((4, 24, 5, 7), float("nan"), dtype=torch.float16, device=device).contiguous(
            memory_format=torch.channels_last
        )
        for _ in range(2)
    )
    x[1:3] = random_input(2, 24, 5, 7, device=device, dtype=torch.float16)
    packed = weights.pack(TILE, x.dtype, device).tensors()
    launch(x[1:3], *packed, out[1:3], activation="silu", squeeze_activation="relu", residual=True, tile=TILE)
    assert out[1:3].isfinite().all()
    assert out[[0, 3]].isnan().all()


GPU_CASES = [
    Case(128, 512, squeeze=32, size=(16, 16), batch=40, residual=True),
    Case(256, 1024, squeeze=64, size=(8, 8), batch=20, residual=True),
    Case(144, 576, squeeze=36, size=(14, 14), batch=9, residual=True),
    Case(72, 288, out_channels=96, squeeze=18, size=(33, 47), batch=5),
    Case(192, 384, squeeze=200, size=(7, 7), batch=9, activation="relu", residual=True, squeeze_activation="silu"),
    Case(40, 240, squeeze=10, size=(28, 28), batch=9, residual=True, squeeze_activation="silu", kernel_size=5),
    Case(112, 672, squeeze=28, size=(14, 14), batch=9, residual=True, squeeze_activation="silu", kernel_size=5),
]


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_candidate_tiles_on_the_gpu(case, dtype, device, random_mbconv_weights, run_mbconv_kernel, assert_within_rule):
    """A compiler may break one tile and spare all others, so candidates are sampled over their whole range."""
    from fusion.probe import processor_of

    shape = match_mbconv(case.graph(str(dtype).removeprefix("torch.")))
    wrong = []
    for tile in MBCONV.ranked_tiles(shape, processor_of())[::SAMPLED]:
        try:
            check(replace(case, tile=tile), dtype, device, random_mbconv_weights, run_mbconv_kernel, assert_within_rule)
        except AssertionError as error:
            wrong.append(f"{tile!r}: {error}")
    assert not wrong, "\n".join(wrong)

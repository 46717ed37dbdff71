from dataclasses import dataclass, replace

import pytest
import torch

from fusion.planner.blocks import mbconv as mbconv_graph
from fusion.planner.families import MBCONV_DOWN
from fusion.planner.match import match_mbconv_down
from fusion.planner.mbconv_down_tile import MBConvDownTile, why_invalid
from fusion.planner.processor import PROCESSORS
from fusion.reference import mbconv_down

HAS_GPU = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA GPU: too large for the interpreter")
DTYPES = [
    torch.float16,
    pytest.param(
        torch.bfloat16,
        marks=pytest.mark.skipif(not HAS_GPU, reason="Triton's interpreter multiplies bfloat16 matrices wrongly"),
    ),
]
TILE = MBConvDownTile(
    images=2,
    programs=3,
    height=4,
    width=4,
    hidden=32,
    channels=32,
    conv_slab=16,
    quads=32,
    warps=4,
    stages=3,
    copy_bytes=16,
    project_pixels=32,
    project_hidden=16,
    project_out=64,
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
    ordered: bool = False
    tile: MBConvDownTile = TILE
    squeeze_activation: str = "relu"
    blur: bool = True
    kernel_size: int = 3

    def __str__(self):
        channels = f"{self.channels}-{self.hidden}-{self.out_channels or self.channels}s{self.squeeze}"
        image = "x".join(map(str, (self.batch, *self.size)))
        tile = ",".join(map(str, self.tile.to_ints()))
        activations = f"{self.activation}-{self.squeeze_activation}"
        flags = "-ordered" * self.ordered + "-strided" * (not self.blur)
        return f"{channels}g{self.group_width}k{self.kernel_size}-{image}-{activations}{flags}-{tile}"

    def shape(self, dtype="float16"):
        graph = mbconv_graph(
            self.batch,
            *self.size,
            self.channels,
            hidden_channels=self.hidden,
            out_channels=self.out_channels,
            stride=2,
            squeeze_channels=self.squeeze,
            group_width=self.group_width,
            activation=self.activation,
            squeeze_activation=self.squeeze_activation,
            blur=self.blur,
            kernel_size=self.kernel_size,
            dtype=dtype,
        )
        return match_mbconv_down(graph)

    def weights(self, random_mbconv_weights):
        sizes = self.channels, self.hidden, self.out_channels, self.squeeze, self.group_width, self.kernel_size
        return random_mbconv_weights(*sizes)

    def input(self, device, dtype=torch.float16):
        torch.manual_seed(sum(self.size) + self.channels)
        return torch.randn(self.batch, self.channels, *self.size).to(device, dtype)


CASES = [
    # Channels and squeeze widths that fill their padding and that do not.
    Case(24, 96, out_channels=40, squeeze=6),
    Case(72, 144, squeeze=18),
    Case(144, 72, squeeze=3),
    Case(8, 8, squeeze=1),
    # Other output than input channels, more than one program's.
    Case(16, 64, out_channels=200, activation="relu"),
    Case(32, 40, out_channels=72, tile=replace(TILE, project_out=16)),
    # Both parities of rows and columns, from the smallest image that can be blurred: less than a tile of the output,
    # equal to it, and such that are no multiple of it, so that quads and windows move inwards.
    *(Case(16, 32, size=size) for size in ((2, 2), (2, 3), (3, 2), (3, 3), (4, 5), (7, 8), (8, 8))),
    *(Case(16, 32, size=size) for size in ((9, 9), (10, 15), (17, 11), (2, 19), (18, 3))),
    # One part an image, of as many quads as are convolved together, more and fewer.
    Case(24, 48, size=(16, 16), tile=replace(TILE, height=8, width=8, quads=64)),
    Case(24, 48, size=(16, 15), tile=replace(TILE, height=8, width=8)),
    Case(24, 48, size=(13, 16), tile=replace(TILE, height=8, width=16, quads=128)),
    # Tiles of a row, of a column and of a pixel.
    Case(16, 32, size=(5, 34), tile=replace(TILE, height=1, width=8)),
    Case(16, 32, size=(19, 4), tile=replace(TILE, height=8, width=1)),
    Case(16, 32, size=(5, 4), tile=replace(TILE, height=1, width=1, quads=16, warps=2)),
    # Micro-batches: as many images as the batch has, more, fewer, and such that do not divide it.
    *(Case(16, 48, batch=3, tile=replace(TILE, images=images)) for images in (1, 2, 3, 4)),
    # Programs: one for all parts, as many as there are parts, and more.
    *(Case(16, 32, batch=2, size=(9, 9), tile=replace(TILE, programs=programs)) for programs in (1, 8, 100)),
    Case(24, 72, batch=3, size=(9, 5), ordered=True),
    # The other activation inside of squeeze-and-excitation.
    Case(24, 72, squeeze=6, squeeze_activation="silu"),
    Case(16, 32, squeeze=33, batch=2, activation="relu", ordered=True, squeeze_activation="silu"),
    # Activations, on hidden channels that are padded.
    *(Case(16, 24, size=(4, 3), activation=activation) for activation in ("relu6", "gelu", "hardswish")),
    # Groups from depth-wise to one that is a whole slab.
    *(Case(16, 32, group_width=width, activation="relu") for width in (1, 16)),
    Case(16, 64, group_width=32, tile=replace(TILE, conv_slab=32)),
    Case(16, 64, group_width=64, tile=replace(TILE, hidden=64, conv_slab=64, stages=2)),
    # Tiles.
    Case(40, 80, tile=replace(TILE, hidden=16, channels=16, stages=2)),
    Case(40, 80, tile=replace(TILE, hidden=128, conv_slab=32, project_hidden=32, project_stages=2)),
    Case(40, 80, tile=replace(TILE, warps=2, quads=16, project_pixels=16, project_warps=2), ordered=True),
    # A squeeze layer so wide that fewer hidden channels are blurred together than a part has.
    Case(16, 48, squeeze=200, size=(9, 9)),
]
STRIDED_CASES = [
    replace(case, blur=False)
    for case in (
        Case(24, 96, out_channels=40, squeeze=6),
        Case(8, 8, squeeze=1, activation="relu", squeeze_activation="silu"),
        # From the smallest image on, less than a tile of the output, equal to it, and such that are no multiple of it.
        *(Case(16, 32, size=size) for size in ((1, 1), (2, 1), (1, 9), (2, 3), (4, 5), (7, 8), (8, 8), (9, 11))),
        # Parts of as many pixels as are convolved together, more and fewer; tiles of a column and of a row.
        Case(24, 48, size=(16, 15), tile=replace(TILE, height=8, width=8)),
        Case(24, 48, size=(13, 16), tile=replace(TILE, height=8, width=16, quads=128)),
        Case(16, 32, size=(5, 34), tile=replace(TILE, height=1, width=8, quads=16, warps=2)),
        Case(16, 32, size=(19, 4), tile=replace(TILE, height=8, width=1)),
        # Micro-batches, programs that take several parts, sums in order.
        Case(16, 48, batch=3, size=(9, 9), tile=replace(TILE, images=2, programs=1)),
        Case(24, 72, batch=2, size=(9, 5), ordered=True),
        # Slabs that fill their steps with neighbours, and wider ones.
        Case(16, 64, group_width=32, tile=replace(TILE, conv_slab=32)),
        Case(16, 64, group_width=64, tile=replace(TILE, hidden=64, conv_slab=64, stages=2)),
        Case(40, 80, group_width=1, tile=replace(TILE, hidden=128, copy_bytes=8)),
        Case(16, 48, squeeze=200),
        # 5x5: images smaller than what a pixel needs, than a tile and its neighbours, equal to that, larger.
        *(
            Case(16, 32, size=size, kernel_size=5)
            for size in ((1, 1), (3, 3), (2, 9), (7, 7), (8, 8), (9, 11), (11, 11), (14, 17))
        ),
        Case(24, 40, out_channels=40, batch=3, size=(9, 5), ordered=True, squeeze_activation="silu", kernel_size=5),
        Case(24, 48, size=(21, 28), tile=replace(TILE, height=8, width=16, quads=128, programs=1), kernel_size=5),
        Case(16, 32, size=(19, 4), tile=replace(TILE, height=8, width=1, copy_bytes=8), kernel_size=5),
        Case(16, 64, group_width=32, tile=replace(TILE, conv_slab=32), kernel_size=5),
        Case(16, 64, group_width=64, tile=replace(TILE, hidden=64, conv_slab=64, stages=2), kernel_size=5),
        Case(16, 32, size=(9, 9), group_width=1, activation="relu", kernel_size=5),
    )
]


def apply_reference(x, weights, case):
    """The block in the dtype of `x`."""
    tensors = (w.to(x.device) for w in vars(weights).values())
    return mbconv_down(x, *tensors, case.activation, case.squeeze_activation, case.blur)


def run_kernels(x, weights, tile, activation="silu", ordered=False, squeeze_activation="relu", blur=True):
    """By the kernels' launcher, with output and workspace full of NaN."""
    from fusion.triton_kernels.mbconv_down import launch, new_workspace

    x = x.contiguous(memory_format=torch.channels_last)
    packed = weights.pack(tile, x.dtype, x.device).tensors()
    names = ("hidden_channels", "out_channels", "squeeze_channels", "kernel_size")
    sizes = {name: getattr(weights, name) for name in names}
    workspace = new_workspace(x, **sizes, ordered=ordered, tile=tile, blur=blur)
    batch, _, height, width = x.shape
    out = torch.empty(batch, weights.out_channels, -(-height // 2), -(-width // 2), dtype=x.dtype, device=x.device)
    out = out.contiguous(memory_format=torch.channels_last)
    for tensor in (out, *workspace):
        tensor.fill_(float("nan"))
    options = {"activation": activation, "squeeze_activation": squeeze_activation, "blur": blur, "ordered": ordered}
    launch(x, *packed, out, tile=tile, workspace=workspace, **options)
    return out


def check(case, dtype, device, random_mbconv_weights, assert_within_rule):
    weights, x = case.weights(random_mbconv_weights), case.input(device, dtype)
    out = run_kernels(x, weights, case.tile, case.activation, case.ordered, case.squeeze_activation, case.blur)
    assert_within_rule(out, apply_reference(x, weights, case), apply_reference(x.double(), weights, case))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES + STRIDED_CASES, ids=str)
def test_against_the_reference(case, dtype, device, random_mbconv_weights, assert_within_rule):
    assert why_invalid(case.tile, case.shape(), PROCESSORS["rtx4090"]) is None
    check(case, dtype, device, random_mbconv_weights, assert_within_rule)


def test_an_image_depends_on_no_other(device, random_mbconv_weights):
    """Neither on those of its micro-batch, nor on which program computes its parts."""
    case = Case(16, 32, batch=3, size=(9, 7), ordered=True)
    weights = case.weights(random_mbconv_weights)
    x = case.input(device) * torch.tensor([0.1, 1, 4], device=device)[:, None, None, None]
    x = x.half()
    together = run_kernels(x, weights, TILE, ordered=True)
    alone = [run_kernels(x[i : i + 1], weights, TILE, ordered=True) for i in range(3)]
    assert torch.equal(together, torch.cat(alone))
    assert torch.equal(together, run_kernels(x, weights, replace(TILE, programs=50, images=3), ordered=True))


def test_ordered_sums_are_repeatable_to_the_bit(device, random_mbconv_weights):
    """However many parts an image has, and however they are scheduled."""
    size, hidden, batch = ((33, 31), 256, 8) if HAS_GPU else ((9, 9), 96, 1)
    case = Case(32, hidden, size=size, batch=batch, ordered=True)
    weights, x = case.weights(random_mbconv_weights), case.input(device)
    outs = [run_kernels(x, weights, TILE, ordered=True) for _ in range(5 if HAS_GPU else 2)]
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_sums_are_fp32(device, random_mbconv_weights):
    """The sums of a pool leave the range of fp16, and partial sums of the expansion too."""
    weights = random_mbconv_weights(32, 64)
    weights.expand[:, :16] = 1.0
    weights.expand[:, 16:] = -1.0
    weights.expand[:, 0] += 0.5
    case = Case(32, 64, activation="relu", size=(16, 16))
    x = torch.full((1, 32, 16, 16), 8192.0, dtype=torch.float16, device=device)
    largest = torch.finfo(x.dtype).max
    identity = {"project": torch.eye(64, dtype=torch.float64), "project_bias": torch.zeros(64, dtype=torch.float64)}
    hidden = apply_reference(x.double(), replace(weights, **identity), case)
    assert 16 * x.max().item() > largest
    assert hidden.max() < largest < hidden.sum((2, 3)).max()
    exact = apply_reference(x.double(), weights, case)
    out = run_kernels(x, weights, TILE, "relu")
    assert ((out.double() - exact).norm() / exact.norm()).item() < 2e-3


@pytest.mark.parametrize("blur", [True, False])
@pytest.mark.parametrize("size", [(5, 7), (8, 8)])
def test_reads_and_writes_its_own_images_only(size, blur, device, random_mbconv_weights):
    """What lies before and after the images in memory is neither read nor written."""
    from fusion.triton_kernels.mbconv_down import launch

    weights = random_mbconv_weights(24, 48)
    x, out = (
        torch.full((4, 24, *image), float("nan"), dtype=torch.float16, device=device).contiguous(
            memory_format=torch.channels_last
        )
        for image in (size, (4, 4) if size == (8, 8) else (3, 4))
    )
    x[1:3] = Case(24, 48, batch=2, size=size).input(device)
    packed = weights.pack(TILE, x.dtype, device).tensors()
    launch(x[1:3], *packed, out[1:3], activation="silu", squeeze_activation="relu", blur=blur, tile=TILE)
    assert out[1:3].isfinite().all()
    assert out[[0, 3]].isnan().all()


GPU_CASES = [
    Case(48, 192, out_channels=128, squeeze=12, size=(32, 32), batch=40),
    Case(128, 512, squeeze=32, size=(16, 16), batch=40),
    Case(256, 1024, squeeze=64, size=(16, 16), batch=20),
    Case(144, 576, squeeze=36, size=(15, 14), batch=9),
    Case(72, 288, out_channels=96, squeeze=18, size=(65, 46), batch=5),
    Case(192, 384, squeeze=200, size=(7, 9), batch=9, activation="relu", squeeze_activation="silu"),
    Case(16, 96, out_channels=24, squeeze=4, size=(112, 112), batch=5, blur=False),
    Case(104, 624, out_channels=208, squeeze=26, size=(18, 18), batch=9, squeeze_activation="silu", blur=False),
    Case(48, 192, out_channels=104, squeeze=12, size=(37, 35), batch=9, blur=False),
    Case(24, 144, out_channels=40, size=(56, 56), batch=9, squeeze_activation="silu", blur=False, kernel_size=5),
    Case(112, 672, out_channels=192, squeeze=28, size=(15, 14), batch=9, blur=False, kernel_size=5),
]


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_candidate_tiles_on_the_gpu(case, dtype, device, random_mbconv_weights, assert_within_rule):
    """A compiler may break one tile and spare all others, so candidates are sampled over their whole range."""
    from fusion.probe import processor_of

    shape = case.shape(str(dtype).removeprefix("torch."))
    wrong = []
    for tile in MBCONV_DOWN.ranked_tiles(shape, processor_of())[::SAMPLED]:
        try:
            check(replace(case, tile=tile), dtype, device, random_mbconv_weights, assert_within_rule)
        except AssertionError as error:
            wrong.append(f"{tile!r}: {error}")
    assert not wrong, "\n".join(wrong)

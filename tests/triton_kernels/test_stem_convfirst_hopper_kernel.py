"""The kernel of stem and block on a GPU of compute capability 9.0: Triton's interpreter does not know Gluon."""

from dataclasses import dataclass, replace

import pytest
import torch

from fusion import kernels, reference
from fusion.edge_weights import StemWeights
from fusion.planner.families import STEM_CONVFIRST_HOPPER
from fusion.planner.match import StemConvFirstShape
from fusion.planner.processor import PROCESSORS
from fusion.planner.stem_convfirst_hopper_tile import StemConvFirstHopperTile, candidate_tiles, why_invalid
from fusion.stem_convfirst_module import FusedStemConvFirst
from fusion.stem_convfirst_weights import StemConvFirstWeights
from fusion.triton_kernels import stem_convfirst_hopper

IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = pytest.mark.skipif(not IS_HOPPER, reason="needs a GPU of compute capability 9.0")

NARROW, WIDE = StemConvFirstHopperTile(16, 2, 16), StemConvFirstHopperTile(32, 2, 32)
FEW_PROCESSORS = 2
"""With so few, a program has more rows than its ring holds, even of small images."""
PIXEL_TOLERANCE = 3e-2
"""Of outputs of unit scale: a few roundings to fp16 of sums of some units."""


@dataclass(frozen=True)
class Case:
    channels: int = 16
    hidden: int = 48
    out_channels: int | None = None
    size: tuple[int, int] = (10, 20)
    batch: int = 3
    residual: bool = True
    tile: StemConvFirstHopperTile = NARROW
    dtype: torch.dtype = torch.float16

    def __str__(self):
        channels = f"{self.channels}-{self.hidden}-{self.out_channels or self.channels}"
        image = "x".join(map(str, (self.batch, *self.size)))
        tile = ",".join(map(str, self.tile.to_ints()))
        return f"{channels}-{image}{'+x' * self.residual}-{tile}-{self.dtype_name}"

    @property
    def dtype_name(self):
        return str(self.dtype).removeprefix("torch.")

    def shape(self):
        sizes = self.batch, *self.size, 3, self.channels, self.hidden, self.out_channels or self.channels
        return StemConvFirstShape(*sizes, 8, "relu", self.residual, self.dtype_name)

    def input(self):
        torch.manual_seed(sum(self.size))
        x = torch.randn(self.batch, 3, *self.size).to("cuda", self.dtype)
        return x.contiguous(memory_format=torch.channels_last)


NETWORKS = [
    Case(16, 48, size=(256, 256), batch=2, tile=StemConvFirstHopperTile(16, 5, 16)),
    Case(24, 72, size=(256, 256), batch=2, tile=StemConvFirstHopperTile(32, 3, 32)),
    Case(32, 96, size=(256, 256), batch=2, tile=StemConvFirstHopperTile(32, 3, 32)),
]
CASES = [
    *NETWORKS,
    Case(),
    Case(24, 72, tile=WIDE),
    Case(32, 96, tile=WIDE),
    Case(8, 32),
    Case(16, 48, tile=WIDE),
    # Widths up to a whole row of the ring, heights: programs begin and end anywhere in an image.
    *(Case(size=(6, width)) for width in (4, 8, 12, 60, 64, 124, 128, 132, 200, 252, 256)),
    *(Case(24, 48, size=(6, width), tile=WIDE) for width in (4, 32, 100, 252, 256)),
    *(Case(size=(height, 24)) for height in (2, 4, 6, 14, 66, 130)),
    *(Case(24, 48, size=(height, 256), batch=1, tile=WIDE) for height in (2, 4, 6, 14, 66)),
    *(Case(batch=batch) for batch in (1, 2, 7, 33)),
    Case(size=(2, 4), batch=1),
    Case(size=(2, 4), batch=300),
    # Other output than input channels, and no residual.
    Case(16, 48, out_channels=24, residual=False),
    Case(24, 40, out_channels=16, residual=False, tile=WIDE),
    Case(32, 96, out_channels=64, residual=False, tile=WIDE),
    Case(24, 72, residual=False, tile=WIDE),
    # Hidden channels that do not fill the last step, or the only one; programs.
    *(Case(24, 40, tile=StemConvFirstHopperTile(hidden, 1, 32)) for hidden in (16, 32, 64)),
    *(Case(24, 200, tile=StemConvFirstHopperTile(hidden, 1, 32)) for hidden in (16, 32, 64)),
    *(Case(size=(20, 72), tile=StemConvFirstHopperTile(16, programs, 16)) for programs in (1, 3, 4, 5)),
    # The other dtype.
    *(replace(case, dtype=torch.bfloat16) for case in (*NETWORKS, Case(), Case(24, 40, tile=WIDE))),
]


@pytest.fixture
def few_processors(monkeypatch):
    """`() -> None` leaves the kernel `FEW_PROCESSORS` of the GPU's processors."""
    return lambda: monkeypatch.setattr(stem_convfirst_hopper, "processor_count", lambda device: FEW_PROCESSORS)


@pytest.fixture
def make_weights(random_weights):
    """`(case) -> StemConvFirstWeights` of unit scale, float64."""

    def make(case):
        generator = torch.Generator().manual_seed(case.channels)
        conv = torch.randn(case.channels, 3, 3, 3, generator=generator, dtype=torch.float64) * 27**-0.5
        bias = torch.randn(case.channels, generator=generator, dtype=torch.float64)
        block = random_weights(case.channels, case.hidden, case.out_channels)
        return StemConvFirstWeights.join(StemWeights(conv, bias), block)

    return make


def empty_output(x, channels):
    """Full of NaN."""
    batch, _, height, width = x.shape
    out = torch.full((batch, channels, height // 2, width // 2), float("nan"), dtype=x.dtype, device=x.device)
    return out.contiguous(memory_format=torch.channels_last)


def run_kernel(x, weights, case, packed=None, out=None):
    packed = packed or weights.pack(case.tile, x.dtype, x.device)
    out = empty_output(x, weights.out_channels) if out is None else out
    sizes = {"stem_channels": weights.stem_channels, "hidden_channels": weights.hidden_channels}
    stem_convfirst_hopper.launch(x, *packed.tensors(), out, **sizes, residual=case.residual, tile=case.tile)
    return out


def run_operator(x, weights, packed, case):
    options = {"activation": "relu", "residual": case.residual}
    name, tile = STEM_CONVFIRST_HOPPER.name, case.tile.to_ints()
    return kernels.run(name, x, packed.tensors(), tile, weights, **options)


def apply_reference(x, weights, case):
    """Stem and block in the dtype of `x`."""
    return reference.stem_convfirst(x, *(w.to(x.device) for w in vars(weights).values()), "relu", case.residual)


def check(case, make_weights, assert_within_rule):
    weights, x = make_weights(case), case.input()
    out, again = run_kernel(x, weights, case), run_kernel(x, weights, case)
    assert_within_rule(out, apply_reference(x, weights, case), apply_reference(x.double(), weights, case))
    assert torch.equal(out, again)
    return x, weights, out


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_reference(case, make_weights, assert_within_rule, few_processors):
    """Neither who computes a row nor how often changes a bit; the operator launches the same."""
    assert why_invalid(case.tile, case.shape(), PROCESSORS["h200"]) is None
    x, weights, out = check(case, make_weights, assert_within_rule)
    packed = weights.pack(case.tile, x.dtype, x.device)
    assert torch.equal(run_operator(x, weights, packed, case), out)
    few_processors()
    assert torch.equal(run_kernel(x, weights, case), out)


@pytest.mark.parametrize("case", [*NETWORKS, Case(size=(14, 36)), Case(24, 48, size=(14, 252), tile=WIDE)], ids=str)
def test_every_pixel_is_in_its_place(case, make_weights):
    """The error of no pixel is larger than that of a few roundings; the message says where the worst is."""
    weights, x = make_weights(case), case.input()
    exact = apply_reference(x.double(), weights, case)
    error = (run_kernel(x, weights, case).double() - exact).abs().amax(1)
    error = torch.where(error.isnan(), torch.inf, error) / exact.std()
    worst = error.argmax().item()
    n, rest = divmod(worst, error[0].numel())
    row, column = divmod(rest, error.shape[2])
    wrong = (error > PIXEL_TOLERANCE).sum().item()
    assert not wrong, f"{wrong} pixels are wrong, image {n}, row {row}, column {column} by {error.max().item():.3g}"


GPU_CASES = [
    *(replace(case, batch=9) for case in NETWORKS),
    Case(16, 48, size=(100, 132), batch=16),
    Case(24, 100, size=(66, 252), batch=16, tile=WIDE),
]


@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_candidate_tiles(case, make_weights, assert_within_rule):
    """A compiler may break one tile and spare all others."""
    from fusion.probe import processor_of

    tiles = list(candidate_tiles(case.shape(), processor_of()))
    wrong = []
    for candidate in tiles:
        try:
            check(replace(case, tile=candidate), make_weights, assert_within_rule)
        except AssertionError as error:
            wrong.append(f"{candidate!r}: {error}")
    assert tiles and not wrong, "\n".join(wrong)


TILED = [Case(24, 72, size=(18, 64), batch=7, tile=tile) for tile in (WIDE, StemConvFirstHopperTile(16, 1, 32))]


@pytest.mark.parametrize("width", [8, 60, 256])
@pytest.mark.parametrize("case", TILED, ids=str)
def test_reads_and_writes_its_own_images_only(case, width, make_weights):
    """What lies before and after the images in memory is neither read nor written."""
    case = replace(case, size=(6, width))
    weights, x = make_weights(case), case.input()
    x[[0, 6]] = float("nan")
    out = empty_output(x, 24)
    run_kernel(x[1:6], weights, case, out=out[1:6])
    assert out[1:6].isfinite().all()
    assert out[[0, 6]].isnan().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("image", [0, 1, 3, 6])
@pytest.mark.parametrize("case", TILED, ids=str)
def test_what_is_not_finite_stays_in_its_image(case, image, value, make_weights, few_processors):
    few_processors()
    weights, x = make_weights(case), case.input()
    expected = run_kernel(x, weights, case)
    x[image] = value
    out = run_kernel(x, weights, case)
    others = [other for other in range(7) if other != image]
    assert torch.equal(out[others], expected[others])
    assert not out[image].isfinite().all(1).any()


@pytest.mark.parametrize("row, column", [(0, 0), (0, 13), (7, 14), (8, 15), (9, -1), (16, 0), (17, 13), (17, -1)])
@pytest.mark.parametrize("width", [20, 60, 256])
@pytest.mark.parametrize("case", TILED, ids=str)
def test_what_is_not_finite_reaches_as_far_as_its_groups(case, width, row, column, make_weights):
    """Two pixels of the stem share a product: both see what one of them should. The block adds its neighbourhood."""
    case = replace(case, size=(18, width), batch=3)
    weights, x = make_weights(case), case.input()
    expected = run_kernel(x, weights, case)
    column %= width
    x[1, :, row, column] = float("nan")
    out = run_kernel(x, weights, case)
    may, must = torch.zeros_like(out, dtype=torch.bool), torch.zeros_like(out, dtype=torch.bool)
    rows = slice(max(row // 2 - 1, 0), (row + 1) // 2 + 2)
    first, last = column // 2, min((column + 1) // 2, width // 2 - 1)
    must[1, :, rows, max(first - 1, 0) : last + 2] = True
    may[1, :, rows, max(first // 2 * 2 - 1, 0) : last // 2 * 2 + 3] = True
    assert torch.equal(out[~may], expected[~may])
    assert out[must].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_bias_of_the_stem_keeps_its_precision(dtype, make_weights):
    """Large biases that the convolution all but cancels: their rounding to 16 bits would be seen."""
    case = Case(24, 48, size=(12, 64), tile=WIDE, dtype=dtype)
    weights, x = make_weights(case), case.input()
    x.fill_(1.0)
    weights.stem_conv.fill_(37.0)
    weights.stem_bias.sub_(27 * 37)
    exact = apply_reference(x.double(), weights, case)
    error = ((run_kernel(x, weights, case).double() - exact).norm() / exact.norm()).item()
    assert error < 10 * torch.finfo(dtype).eps


@pytest.mark.parametrize("case", NETWORKS, ids=str)
def test_kernels_overlap_without_races(case, make_weights):
    """A kernel may start before the one ahead has finished: what it reads is there all the same."""
    weights, x = make_weights(case), case.input()
    packed = weights.pack(case.tile, x.dtype, x.device)
    inputs = [x * scale for scale in (1.0, -0.5, 0.25)]
    expected = [run_kernel(y, weights, case, packed) for y in inputs]
    torch.cuda.synchronize()
    image, outs = torch.empty_like(x), [empty_output(x, weights.out_channels) for _ in inputs]
    for _ in range(5):
        for y, out in zip(inputs, outs, strict=True):
            image.copy_(y)
            run_kernel(image, weights, case, packed, out)
        for out, right in zip(outs, expected, strict=True):
            assert torch.equal(out, right)
            out.fill_(float("nan"))


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "not aligned"])
@pytest.mark.parametrize("is_planar", [False, True], ids=["channels_last", "contiguous"])
def test_other_inputs_are_copied(is_planar, offset, make_weights):
    """The operator takes any memory format and address."""
    case = Case()
    weights, x = make_weights(case), case.input()
    packed = weights.pack(case.tile, x.dtype, x.device)
    expected = run_operator(x, weights, packed, case)
    other = x.contiguous() if is_planar else x
    memory = torch.empty(x.numel() + offset, dtype=x.dtype, device=x.device)
    other = memory.as_strided(other.shape, other.stride(), offset).copy_(other)
    assert torch.equal(run_operator(other, weights, packed, case), expected)


def test_the_twin_runs_as_its_plan_says(make_weights, assert_within_rule):
    case = Case(24, 72, size=(64, 64))
    weights, x = make_weights(case), case.input()
    both = FusedStemConvFirst(weights, activation="relu", residual=True)
    out = both(x)
    assert both.plan(x).kernel == STEM_CONVFIRST_HOPPER.name
    assert_within_rule(out, apply_reference(x, weights, case), apply_reference(x.double(), weights, case))
    assert torch.equal(torch.compile(both, fullgraph=True)(x), out)


def test_too_many_rows_are_refused(monkeypatch, make_weights):
    monkeypatch.setattr(stem_convfirst_hopper, "MAX_ROWS", 10)
    case = Case(batch=4)
    with pytest.raises(ValueError, match=r"4 images of 10x20 pixels are too many rows for one launch, split the batch"):
        run_kernel(case.input(), make_weights(case), case)

"""Stride-2 ConvFirst on a GPU of compute capability 9.0: Triton's interpreter does not know Gluon."""

from dataclasses import dataclass, replace

import pytest
import torch

from fusion.convfirst_down_hopper_op import convfirst_down_hopper
from fusion.convfirst_down_hopper_weights import pack_convfirst_down_hopper
from fusion.planner.convfirst_down_hopper_tile import ConvFirstDownHopperTile, candidate_tiles, why_invalid
from fusion.planner.match import ConvFirstDownShape
from fusion.planner.processor import PROCESSORS
from fusion.reference import convfirst_down
from fusion.triton_kernels import convfirst_down_hopper as kernel

IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = pytest.mark.skipif(not IS_HOPPER, reason="needs a GPU of compute capability 9.0")

SMALL = ConvFirstDownHopperTile(pixels=64, hidden=16, stages=2, partitions=1, programs=1, slab=16, weight_chunks=0)
STREAMED = replace(SMALL, hidden=32, partitions=2, weight_chunks=2)
PIECES = replace(SMALL, hidden=32, partitions=2, by_piece=1)
"""16 channels at a time, with weights that stay."""
STREAMED_PIECES = replace(PIECES, weight_chunks=2)
FEW_PROCESSORS = 2
"""With so few, a program has more rows than its ring holds, even of small images."""
SAMPLED = 12


@dataclass(frozen=True)
class Case:
    channels: int
    hidden: int
    out_channels: int
    size: tuple[int, int] = (10, 14)
    batch: int = 3
    tile: ConvFirstDownHopperTile = SMALL
    dtype: torch.dtype = torch.float16

    def __str__(self):
        image = "x".join(map(str, (self.batch, *self.size)))
        tile = ",".join(map(str, self.tile.to_ints()))
        return f"{self.channels}-{self.hidden}-{self.out_channels}-{image}-{tile}-{self.dtype_name}"

    @property
    def dtype_name(self):
        return str(self.dtype).removeprefix("torch.")

    def shape(self):
        sizes = self.batch, *self.size, self.channels, self.hidden, self.out_channels
        return ConvFirstDownShape(*sizes, 8, "relu", self.dtype_name)

    def input(self):
        torch.manual_seed(sum(self.size))
        x = torch.randn(self.batch, self.channels, *self.size).to("cuda", self.dtype)
        return x.contiguous(memory_format=torch.channels_last)


def tile(**changes):
    return replace(SMALL, **changes)


WIDTHS = (2, 4, 10, 16, 18, 32, 34, 40, 66, 74, 128, 130, 132, 200, 260, 300)
HEIGHTS = (2, 4, 6, 10, 14, 66, 100)
CASES = [
    *(Case(channels, 2 * channels, channels) for channels in (8, 16, 24, 32)),
    *(Case(channels, 2 * channels, 2 * channels, tile=tile(slab=32)) for channels in (16, 24, 32)),
    Case(40, 48, 16),
    Case(48, 32, 16),
    Case(24, 40, 72),
    Case(16, 96, 144, tile=tile(hidden=32)),
    *(Case(16, 32, 24, size=(6, width)) for width in WIDTHS),
    *(Case(24, 64, 48, size=(6, width), tile=replace(STREAMED, slab=32)) for width in (2, 10, 34, 66, 130, 200)),
    *(Case(16, 32, 32, size=(height, 14), batch=1) for height in HEIGHTS),
    *(Case(16, 32, 32, size=(height, 20), tile=tile(partitions=2)) for height in HEIGHTS),
    *(Case(24, 48, 16, size=(6, width), batch=batch) for batch in (1, 2, 3, 7, 9) for width in (8, 16, 64)),
    Case(24, 40, 16, tile=tile(hidden=32)),
    Case(24, 100, 16, tile=tile(hidden=64, slab=32)),
    *(Case(16, 96, 32, size=(34, 66), tile=tile(hidden=32, stages=stages)) for stages in (2, 3, 4)),
    *(Case(16, 96, 32, size=(34, 66), tile=tile(hidden=32, programs=programs)) for programs in (1, 2, 3)),
    Case(16, 96, 32, size=(128, 128), batch=4, tile=ConvFirstDownHopperTile(64, 32, 2, 1, 3, 16, 0)),
    Case(32, 192, 48, size=(64, 64), batch=8, tile=ConvFirstDownHopperTile(64, 32, 2, 2, 1, 32, 3)),
    Case(32, 192, 64, size=(128, 128), batch=4, tile=ConvFirstDownHopperTile(64, 32, 2, 2, 1, 32, 3)),
    Case(24, 144, 48, size=(128, 128), batch=4, tile=ConvFirstDownHopperTile(64, 32, 2, 2, 1, 32, 3)),
    *(Case(channels, 2 * channels, channels, tile=PIECES) for channels in (8, 16, 24, 32, 48)),
    *(Case(channels, 96, 24, tile=STREAMED_PIECES) for channels in (8, 16, 24, 40, 48, 64)),
    *(Case(24, 64, 48, size=(6, width), tile=PIECES) for width in WIDTHS),
    *(Case(48, 96, 24, size=(6, width), tile=STREAMED_PIECES) for width in WIDTHS),
    *(Case(32, 64, 16, size=(height, 14), batch=1, tile=PIECES) for height in HEIGHTS),
    *(Case(48, 96, 24, size=(height, 34), tile=STREAMED_PIECES) for height in HEIGHTS),
    *(Case(24, 48, 16, size=(6, width), batch=batch, tile=PIECES) for batch in (1, 2, 7, 9) for width in (8, 16, 64)),
    *(Case(16, 96, 32, size=(34, 66), tile=replace(PIECES, stages=stages)) for stages in (2, 3)),
    *(Case(48, 288, 72, size=(34, 66), tile=replace(STREAMED_PIECES, weight_chunks=chunks)) for chunks in (2, 3)),
    Case(32, 192, 48, size=(64, 64), batch=8, tile=PIECES),
    Case(24, 144, 48, size=(128, 128), batch=4, tile=PIECES),
    Case(32, 192, 64, size=(128, 128), batch=4, tile=PIECES),
    Case(48, 288, 64, size=(64, 64), batch=8, tile=STREAMED_PIECES),
    Case(48, 288, 72, size=(64, 64), batch=8, tile=STREAMED_PIECES),
    Case(64, 384, 96, size=(64, 64), batch=8, tile=STREAMED_PIECES),
    *(
        replace(case, dtype=torch.bfloat16)
        for case in (
            Case(24, 40, 24),
            Case(16, 96, 32, size=(34, 130), tile=tile(hidden=32, stages=3, programs=2)),
            Case(32, 192, 48, size=(64, 64), batch=3, tile=ConvFirstDownHopperTile(64, 32, 2, 2, 1, 32, 3)),
            Case(24, 144, 48, size=(34, 130), tile=PIECES),
            Case(64, 384, 96, size=(64, 64), batch=3, tile=STREAMED_PIECES),
        )
    ),
]


@pytest.fixture
def few_processors(monkeypatch):
    """`() -> None` leaves the kernel `FEW_PROCESSORS` of the GPU's processors."""
    return lambda: monkeypatch.setattr(kernel, "processor_count", lambda device: FEW_PROCESSORS)


def down_weights(make, case):
    """Of a stride-2 block: an expansion of twice as many channels."""
    weights = make(case.channels, case.hidden, case.out_channels)
    torch.manual_seed(case.hidden)
    of_input = torch.randn_like(weights.expand) / case.channels**0.5
    return replace(weights, expand=torch.cat([of_input, weights.expand / 2**0.5], dim=1))


def empty_output(x, channels):
    """Full of NaN."""
    sizes = x.shape[0], channels, x.shape[2] // 2, x.shape[3] // 2
    out = torch.full(sizes, float("nan"), dtype=x.dtype, device=x.device)
    return out.contiguous(memory_format=torch.channels_last)


def run_kernel(x, weights, case, out=None):
    packed = pack_convfirst_down_hopper(weights, case.tile, x.dtype, x.device)
    out = empty_output(x, weights.out_channels) if out is None else out
    kernel.launch(x, *packed.tensors(), out, hidden_channels=case.hidden, tile=case.tile)
    return out


def apply_reference(x, weights):
    """The block in the dtype of `x`."""
    tensors = (weights.conv, weights.expand, weights.expand_bias, weights.project, weights.project_bias)
    return convfirst_down(x, *(w.to(x.device) for w in tensors), "relu")


def check(case, random_weights, assert_within_rule):
    weights, x = down_weights(random_weights, case), case.input()
    out, again = run_kernel(x, weights, case), run_kernel(x, weights, case)
    assert_within_rule(out, apply_reference(x, weights), apply_reference(x.double(), weights))
    assert torch.equal(out, again)
    return x, weights, out


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_reference(case, random_weights, assert_within_rule, few_processors):
    """Neither who computes a row nor how often changes a bit; the operator launches the same."""
    assert why_invalid(case.tile, case.shape(), PROCESSORS["h200"]) is None
    x, weights, out = check(case, random_weights, assert_within_rule)
    packed = pack_convfirst_down_hopper(weights, case.tile, x.dtype, x.device).tensors()
    sizes = weights.hidden_channels, weights.out_channels
    assert torch.equal(convfirst_down_hopper(x, *packed, *sizes, case.tile.to_ints()), out)
    few_processors()
    assert torch.equal(run_kernel(x, weights, case), out)


@pytest.mark.parametrize(
    "case",
    [*CASES[:5], *(Case(24, 96, 24, size=(10, width), tile=PIECES) for width in (8, 14, 40, 66, 128, 200))],
    ids=str,
)
def test_every_pixel(case, random_weights):
    """Edges weigh little in a norm over the whole image: each pixel is compared by itself."""
    weights, x = down_weights(random_weights, case), case.input()
    exact = apply_reference(x.double(), weights)
    error = (run_kernel(x, weights, case).double() - exact).norm(dim=1) / exact.norm(dim=1)
    assert error.max() < 5e-3


@pytest.mark.parametrize(
    "case",
    [
        Case(16, 96, 32, (128, 128), 16),
        Case(32, 192, 48, (64, 64), 16),
        Case(24, 144, 48, (48, 150), 5),
        Case(48, 288, 72, (64, 64), 16),
        Case(64, 384, 96, (64, 64), 16),
    ],
    ids=str,
)
def test_candidate_tiles(case, random_weights, assert_within_rule):
    """A compiler may break one tile and spare all others, so candidates are sampled over their whole range."""
    from fusion.probe import processor_of

    tiles = list(candidate_tiles(case.shape(), processor_of()))
    wrong = []
    for candidate in tiles[:: max(1, len(tiles) // SAMPLED)]:
        try:
            check(replace(case, tile=candidate), random_weights, assert_within_rule)
        except AssertionError as error:
            wrong.append(f"{candidate!r}: {error}")
    assert tiles and not wrong, "\n".join(wrong)


@pytest.mark.parametrize("tile", [SMALL, STREAMED, PIECES, STREAMED_PIECES], ids=str)
def test_reads_and_writes_its_own_images_only(tile, random_weights):
    """What lies before and after the images in memory is neither read nor written."""
    case = Case(24, 96, 24, size=(6, 10), batch=4, tile=tile)
    weights, x = down_weights(random_weights, case), case.input()
    x[[0, 3]] = float("nan")
    out = empty_output(x, 24)
    run_kernel(x[1:3], weights, case, out=out[1:3])
    assert out[1:3].isfinite().all()
    assert out[[0, 3]].isnan().all()


@pytest.mark.parametrize("tile", [SMALL, PIECES, STREAMED_PIECES], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("image", [0, 3, 6])
@pytest.mark.parametrize("width", [8, 32, 74])
@pytest.mark.parametrize("height", [6, 8])
def test_what_is_not_finite_stays_in_its_image(height, width, image, value, tile, random_weights, few_processors):
    """Whatever is before, after or beside it in the batch, in a stream or in the ring."""
    few_processors()
    case = Case(24, 96, 24, size=(height, width), batch=7, tile=tile)
    weights, x = down_weights(random_weights, case), case.input()
    expected = run_kernel(x, weights, case)
    x[image] = value
    out = run_kernel(x, weights, case)
    others = [other for other in range(7) if other != image]
    assert torch.equal(out[others], expected[others])
    assert out[image].isnan().all(), "zero weights, or sums of both signs"


@pytest.mark.parametrize("tile", [SMALL, PIECES], ids=str)
@pytest.mark.parametrize("row, column", [(0, 0), (0, 7), (3, 6), (4, -1), (7, -1), (9, 0), (9, 7)])
@pytest.mark.parametrize("width", [8, 14, 34, 200])
def test_what_is_not_finite_reaches_as_far_as_convolution_and_blur(width, row, column, tile, random_weights):
    case = Case(24, 96, 24, size=(10, width), tile=tile)
    weights, x = down_weights(random_weights, case), case.input()
    expected = run_kernel(x, weights, case)
    x[1, :, row, column] = float("nan")
    out = run_kernel(x, weights, case)
    column %= width
    rows, columns = torch.arange(5, device="cuda"), torch.arange(width // 2, device="cuda")
    near = ((2 * rows - row).abs() <= 2)[:, None] & ((2 * columns - column).abs() <= 2)[None]
    assert torch.equal(out[1][:, ~near], expected[1][:, ~near])
    assert torch.equal(out[[0, 2]], expected[[0, 2]])
    assert out[1][:, near].isnan().all()


@pytest.mark.parametrize("tile", [tile(hidden=32, programs=3), PIECES], ids=str)
def test_back_to_back_launches_do_not_race(tile, random_weights):
    """A kernel may start before the one ahead of it has finished."""
    case = Case(16, 96, 16, size=(128, 128), batch=8, tile=tile)
    weights, x = down_weights(random_weights, case), case.input()
    packed = pack_convfirst_down_hopper(weights, case.tile, x.dtype, x.device).tensors()

    def chain(synchronize):
        out = x
        while out.shape[2] > 8:
            out, y = empty_output(out, 16), out
            kernel.launch(y, *packed, out, hidden_channels=case.hidden, tile=case.tile)
            if synchronize:
                torch.cuda.synchronize()
        return out

    expected = chain(synchronize=True)
    assert expected.isfinite().all()
    for _ in range(5):
        assert torch.equal(chain(synchronize=False), expected)


def test_too_many_rows_are_refused(monkeypatch, random_weights):
    monkeypatch.setattr(kernel, "MAX_ROWS", 5)  # virtual rows of a stream of one image
    case = Case(24, 48, 24, size=(10, 14), batch=4)
    with pytest.raises(ValueError, match=r"4 images of 10x14 pixels are too many rows for one launch, split the batch"):
        run_kernel(case.input(), down_weights(random_weights, case), case)

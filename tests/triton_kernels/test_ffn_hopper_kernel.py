"""The FFN kernel on a GPU of compute capability 9.0: Triton's interpreter does not know Gluon."""

from dataclasses import dataclass, replace

import pytest
import torch

from fusion import kernels, ops
from fusion.planner.ffn_tile import FfnTile, candidate_tiles, why_invalid
from fusion.planner.match import FfnShape
from fusion.planner.processor import PROCESSORS
from fusion.reference import ffn
from fusion.triton_kernels import ffn_hopper

IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = pytest.mark.skipif(not IS_HOPPER, reason="needs a GPU of compute capability 9.0")

FEW_PROCESSORS = 2
"""With so few, a partition has more tiles than stages, even of small images."""
SAMPLED = 4
"""How many candidates of a block run."""
CHAIN = 8


@dataclass(frozen=True)
class Case:
    channels: int
    hidden: int
    tile: FfnTile
    out_channels: int | None = None
    size: tuple[int, int] = (9, 13)
    batch: int = 3
    residual: bool = True
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
        sizes = self.batch, *self.size, self.channels, self.hidden, self.out_channels or self.channels
        return FfnShape(*sizes, "relu", self.residual, self.dtype_name)

    def input(self):
        torch.manual_seed(sum(self.size))
        x = torch.randn(self.batch, self.channels, *self.size).to("cuda", self.dtype)
        return x.contiguous(memory_format=torch.channels_last)


RESIDENT = FfnTile(blocks=2, hidden=16, stages=2, expand_chunks=3, project_chunks=3, x_in_registers=1)
RING = FfnTile(blocks=1, hidden=32, stages=1, expand_chunks=2, project_chunks=3, x_in_registers=0)
CASES = [
    # Channels that fill their slabs and channels that do not; hidden channels that do not fill the last step.
    *(Case(channels, 40, RESIDENT) for channels in (8, 24, 32, 64, 72)),
    *(Case(channels, 250, RING) for channels in (24, 64, 144)),
    # Other output than input channels, and no residual.
    Case(24, 48, RESIDENT, out_channels=72, residual=False),
    Case(144, 100, RING, out_channels=24, residual=False),
    Case(64, 48, RESIDENT, residual=False),
    # Pixels: a single one, less than a tile, exactly one, one more, many; one image.
    *(Case(16, 48, RESIDENT, size=size, batch=1) for size in ((1, 1), (5, 7), (8, 32), (1, 257), (100, 130))),
    *(Case(16, 160, RING, size=size, batch=1) for size in ((1, 1), (8, 16), (1, 129), (100, 130))),
    # Rings, stages and where the input is read from.
    *(Case(64, 512, FfnTile(2, 64, stages, 3, 2, x)) for stages, x in ((1, 0), (3, 1))),
    Case(128, 512, FfnTile(2, 64, 2, 3, 3, 0), size=(17, 33)),
    Case(128, 512, FfnTile(1, 64, 2, 4, 5, 1), size=(17, 33)),
    Case(256, 1024, FfnTile(1, 64, 1, 2, 3, 0), size=(17, 33)),
    # The other dtype.
    Case(24, 40, RESIDENT, dtype=torch.bfloat16),
    Case(144, 250, RING, out_channels=72, residual=False, dtype=torch.bfloat16),
]


def empty_output(x, channels):
    """Full of NaN."""
    out = torch.full((x.shape[0], channels, *x.shape[2:]), float("nan"), dtype=x.dtype, device=x.device)
    return out.contiguous(memory_format=torch.channels_last)


def run_kernel(x, weights, case, packed=None, out=None):
    packed = packed or weights.pack(case.tile, x.dtype, x.device)
    out = empty_output(x, weights.out_channels) if out is None else out
    kernels.launch(x, packed, out, case.tile, weights, activation="relu", residual=case.residual)
    return out


def apply_reference(x, weights, case):
    """The block in the dtype of `x`."""
    return ffn(x, *(w.to(x.device) for w in vars(weights).values()), "relu", case.residual)


def check(case, random_ffn_weights, assert_within_rule):
    weights, x = random_ffn_weights(case.channels, case.hidden, case.out_channels), case.input()
    out, again = run_kernel(x, weights, case), run_kernel(x, weights, case)
    assert_within_rule(out, apply_reference(x, weights, case), apply_reference(x.double(), weights, case))
    assert torch.equal(out, again)
    return x, weights, out


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_reference(case, random_ffn_weights, assert_within_rule, monkeypatch):
    """Who computes a pixel changes no bit; the operator launches the same."""
    assert why_invalid(case.tile, case.shape(), PROCESSORS["h200"]) is None
    x, weights, out = check(case, random_ffn_weights, assert_within_rule)
    packed = weights.pack(case.tile, x.dtype, x.device).tensors()
    sizes = weights.hidden_channels, weights.out_channels
    assert torch.equal(ops.ffn_hopper(x, *packed, *sizes, case.residual, case.tile.to_ints()), out)
    monkeypatch.setattr(ffn_hopper, "processor_count", lambda device: FEW_PROCESSORS)
    assert torch.equal(run_kernel(x, weights, case), out)


GPU_CASES = [
    Case(64, 384, RESIDENT, size=(64, 64), batch=16),
    Case(40, 100, RESIDENT, size=(33, 47), batch=16),
    Case(192, 768, RESIDENT, size=(14, 14), batch=100),
]


@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_candidate_tiles(case, random_ffn_weights, assert_within_rule):
    """A compiler may break one tile and spare all others, so candidates are sampled over their whole range."""
    from fusion.probe import processor_of

    tiles = list(candidate_tiles(case.shape(), processor_of()))
    for candidate in tiles[:: max(1, len(tiles) // SAMPLED)]:
        check(replace(case, tile=candidate), random_ffn_weights, assert_within_rule)


def test_sums_are_fp32(random_ffn_weights):
    """In both products the first steps of a sum leave the range of fp16 and later ones come back into it."""
    size = 4096.0
    weights = random_ffn_weights(64, 48)
    weights.expand[:, :32] = 1.0
    weights.expand[:, 32:] = -1.0
    weights.expand[:, 0] += 1
    assert 32 * size > torch.finfo(torch.float16).max
    weights.project[:, :32] = 1
    weights.project[:, 32:] = -2
    weights.project[:, 0] += 1
    case = Case(64, 48, RESIDENT, size=(5, 7), batch=1)
    x = torch.full_like(case.input(), size)
    exact = apply_reference(x.double(), weights, case)
    out = run_kernel(x, weights, case)
    assert ((out.double() - exact).norm() / exact.norm()).item() < 2e-3


@pytest.mark.parametrize("case", [Case(24, 48, RESIDENT, batch=4), Case(24, 160, RING, batch=4)], ids=str)
def test_reads_and_writes_its_own_images_only(case, random_ffn_weights):
    """What lies before and after the images in memory is neither read nor written."""
    weights, x = random_ffn_weights(24, case.hidden), case.input()
    x[[0, 3]] = float("nan")
    out = empty_output(x, 24)
    run_kernel(x[1:3], weights, case, out=out[1:3])
    assert out[1:3].isfinite().all()
    assert out[[0, 3]].isnan().all()


CHAIN_CASES = [
    Case(64, 384, FfnTile(2, 64, 2, 6, 6, 1), size=(32, 32), batch=32),
    Case(128, 512, FfnTile(2, 64, 2, 3, 3, 0), size=(32, 32), batch=32),
    Case(24, 160, RING, size=(7, 7)),
]


@pytest.mark.parametrize("case", CHAIN_CASES, ids=str)
def test_kernels_overlap_without_races(case, random_ffn_weights):
    """A kernel may start before the one ahead has finished: blocks back to back are as right as one at a time."""
    weights, x = random_ffn_weights(case.channels, case.hidden), case.input()
    packed = weights.pack(case.tile, x.dtype, x.device)
    buffers = [empty_output(x, case.channels) for _ in range(2)]

    def chain(synchronize):
        out = x
        for index in range(CHAIN):
            out = run_kernel(out, weights, case, packed, buffers[index % 2])
            out.mul_(0.25)  # reads what was just written, and writes what is read next
            if synchronize:
                torch.cuda.synchronize()
        return out.clone()

    expected = chain(synchronize=True)
    assert expected.isfinite().all()
    for _ in range(3):
        for buffer in buffers:
            buffer.fill_(float("nan"))
        assert torch.equal(chain(synchronize=False), expected)

"""What the compiler makes of the stride-2 MBConv kernel for larger images on Hopper, ahead of time."""

import json
import os
from dataclasses import dataclass, replace

import pytest

from fusion.planner.match import MBConvDownShape
from fusion.planner.mbconv_hopper_tile import BIAS_CHANNELS, COMPILER_BYTES, WARPS
from fusion.planner.mbconv_windows_hopper_tile import (
    MBConvDownWindowsHopperTile,
    local_memory_bytes,
    why_invalid,
)
from fusion.planner.processor import PROCESSORS
from fusion.triton_kernels.ahead import compile_block
from fusion.triton_kernels.mbconv_windows_hopper_spec import constants
from tests.triton_kernels.compiling_process import ahead_output, compiling

PIECES = 3
"""Of a sweep in the kernel's code: the first one, a loop over others, and the last one."""


@dataclass(frozen=True)
class Case:
    channels: int
    hidden: int
    out_channels: int
    squeeze: int
    size: tuple[int, int]
    tile: tuple[int, int, int, int]
    kernel_size: int = 3
    most_stack_bytes: int = 0
    activation: str = "silu"
    dtype: str = "float16"
    squeeze_activation: str = "relu"

    def __str__(self):
        size, tile = "x".join(map(str, self.size)), ",".join(map(str, self.tile))
        channels = f"{self.channels}-{self.hidden}-{self.out_channels}s{self.squeeze}"
        activations = f"{self.activation}-{self.squeeze_activation}"
        return f"{channels}-{size}-{self.kernel_size}-{activations}-{tile}-{self.dtype}"

    @property
    def shape(self):
        channels = self.channels, self.hidden, self.out_channels, self.squeeze
        options = {"squeeze_activation": self.squeeze_activation, "kernel_size": self.kernel_size, "blur": False}
        return MBConvDownShape(128, *self.size, *channels, 8, self.activation, self.dtype, **options)

    @property
    def planned(self):
        return MBConvDownWindowsHopperTile(*self.tile)


CASES = [
    # No masks.
    Case(24, 144, 40, 6, (56, 56), (4, 8, 64, 4)),
    Case(24, 144, 40, 6, (56, 56), (4, 8, 64, 4), kernel_size=5),
    # Slabs of several widths; images that do not fill rows or columns.
    Case(144, 576, 200, 36, (21, 33), (4, 8, 32, 3), activation="relu", dtype="bfloat16"),
    # As many channels as a 5x5 convolution leaves registers for: some bytes are spilled.
    Case(
        *(112, 672, 192, 28, (14, 14), (4, 8, 64, 4)),
        kernel_size=5,
        most_stack_bytes=160,
        dtype="bfloat16",
        squeeze_activation="silu",
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_resources(case):
    """Products are not serialised, next to nothing is spilled, and the planner knows the shared memory."""
    assert why_invalid(case.planned, case.shape, PROCESSORS["h200"]) is None
    (found,) = compiling(compile_block, case.shape, case.planned).values()
    assert (found.hgmma, found.hmma) == products(case), found
    assert found.warpgroup < 2 * found.hgmma, "two fences and waits for each would be products one by one"
    assert found.stack_bytes <= case.most_stack_bytes, found
    spare = local_memory_bytes(case.planned, case.shape, PROCESSORS["h200"]) - found.shared_bytes
    assert 0 <= spare - reused_bytes(case) < COMPILER_BYTES, found


def products(case):
    """Of a warpgroup, m64 k16 and as wide as the product, and of a warp, in the kernel's code.

    A piece is convolved by two products for each of three columns of taps and each of two groups, for the two columns
    of the output at once. Or 5x5 by three products for each group and each of eight pairs of columns of the input: the
    first piece does without one of them, and the last one without two, for what is beside the image. And a loop over
    chunks of the projection's steps.
    """
    projected = spec_of(case).projected
    project = projected.chunk * projected.step // 16 * len(projected.products) * projected.rows // 128
    squeeze_and_excite = (1 + projected.sweeps) * projected.squeeze_depths
    convolve = 12 * PIECES if case.kernel_size == 3 else 6 * (8 * PIECES - 1 - 2)
    return PIECES * projected.depths + project, convolve + squeeze_and_excite


def reused_bytes(case):
    """Of the squeeze vector's shares as they are added: there the expansion's constant input is not needed any more."""
    spec = spec_of(case)
    return min(2 * spec.produced.piece_pixels * BIAS_CHANNELS, 4 * WARPS * spec.projected.squeeze_room)


def spec_of(case):
    options = {name: getattr(case, name) for name in ("kernel_size", "activation", "squeeze_activation")}
    channels = case.channels, case.hidden, case.out_channels, case.squeeze
    return constants(*case.size, *channels, residual=False, **options, tile=case.planned)


def test_the_command_line_takes_a_tile():
    """Which says that blocks have no blur-pool."""
    arguments = ("--json", "--block", "16,4,20", "--mbconv-down-windows-hopper-tile", "4,8,32,2")
    (row,) = json.loads(ahead_output(*arguments))
    assert (row["block"], row["tile"]) == ([16, 4, 20], [4, 8, 32, 2])
    assert row["hgmma"] > 0 and row["stack_bytes"] == 0


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are compiled in this process")
def test_interpreted_kernels_cannot_be_compiled():
    with pytest.raises(RuntimeError, match=r"under TRITON_INTERPRET=1"):
        compile_block(CASES[0].shape, CASES[0].planned)


def test_unsupported_blocks_are_refused():
    case = CASES[0]
    for shape, tile, message in (
        (replace(case.shape, blur=True), case.planned, "a blur-pool is not supported, use an MBConvDownTile"),
        (replace(case.shape, activation="gelu"), case.planned, "activation gelu is not supported, use relu or silu"),
        (case.shape, MBConvDownWindowsHopperTile(2, 8, 32, 4), "piece=2 is not one of 4"),
    ):
        with pytest.raises(ValueError, match=f"does not run .*{message}"):
            compiling(compile_block, shape, tile)
    message = "MBConvDownWindowsHopperTile is for compute capability 9.0 only"
    with pytest.raises(ValueError, match=f"does not run .*{message}"):
        compiling(compile_block, case.shape, case.planned, (8, 0))

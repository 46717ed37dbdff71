"""What the compiler makes of the MBConv kernel for larger images on Hopper, ahead of time."""

import json
import os
from dataclasses import dataclass, replace
from itertools import accumulate, product

import pytest

from fusion.planner.match import MBConvShape, options_of
from fusion.planner.mbconv_hopper_tile import BIAS_CHANNELS, COMPILER_BYTES, MIN_STAGES, STEPS, WARPS
from fusion.planner.mbconv_windows_hopper_tile import (
    PASS_TILES,
    MBConvWindowsHopperTile,
    local_memory_bytes,
    why_invalid,
)
from fusion.planner.processor import PROCESSORS
from fusion.triton_kernels.ahead import compile_block
from fusion.triton_kernels.mbconv_hopper_room import UNIT_ELEMENTS
from fusion.triton_kernels.mbconv_windows_hopper_spec import constants
from tests.triton_kernels.compiling_process import ahead_output, compiling

TILE_FIELDS = MBConvWindowsHopperTile.PIECES, PASS_TILES, STEPS, (MIN_STAGES, 3)


@dataclass(frozen=True)
class Case:
    channels: int
    hidden: int
    out_channels: int
    squeeze: int
    size: tuple[int, int]
    tile: tuple[int, int, int, int]
    activation: str = "silu"
    dtype: str = "float16"
    squeeze_activation: str = "relu"
    kernel_size: int = 3

    def __str__(self):
        size, tile = "x".join(map(str, self.size)), ",".join(map(str, self.tile))
        channels = f"{self.channels}-{self.hidden}-{self.out_channels}s{self.squeeze}"
        activations = f"{self.activation}-{self.squeeze_activation}"
        return f"{channels}-{size}-{self.kernel_size}-{activations}-{tile}-{self.dtype}"

    @property
    def shape(self):
        channels = self.channels, self.hidden, self.out_channels, self.squeeze
        residual = self.channels == self.out_channels
        options = {"squeeze_activation": self.squeeze_activation, "kernel_size": self.kernel_size}
        return MBConvShape(128, *self.size, *channels, 8, self.activation, residual, self.dtype, **options)

    @property
    def planned(self):
        return MBConvWindowsHopperTile(*self.tile)


CASES = [
    Case(40, 240, 40, 10, (28, 28), (4, 8, 64, 4)),
    Case(24, 96, 24, 6, (56, 56), (4, 16, 64, 4)),
    # Products of many channels; no masks.
    Case(128, 512, 128, 32, (32, 32), (4, 16, 64, 2)),
    # Slabs of several widths; images that do not fill rows or columns.
    Case(144, 576, 144, 36, (21, 33), (2, 8, 32, 6), activation="relu", dtype="bfloat16"),
    Case(64, 256, 200, 16, (14, 30), (2, 8, 32, 2), squeeze_activation="silu"),
    Case(40, 240, 40, 10, (28, 28), (4, 8, 64, 4), kernel_size=5, dtype="bfloat16"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_resources(case):
    """Products are not serialised, nothing is spilled, and the planner knows the shared memory."""
    assert why_invalid(case.planned, case.shape, PROCESSORS["h200"]) is None
    (found,) = compiling(compile_block, case.shape, case.planned).values()
    assert (found.hgmma, found.hmma) == products(case), found
    assert found.warpgroup < 2 * found.hgmma, "two fences and waits for each would be products one by one"
    assert found.stack_bytes == 0, found
    spare = local_memory_bytes(case.planned, case.shape, PROCESSORS["h200"]) - found.shared_bytes
    assert 0 <= spare - reused_bytes(case) < COMPILER_BYTES, found


def products(case):
    """Of a warpgroup, m64 k16 and as wide as the product, and of a warp, in the kernel's code.

    It has a loop over sweeps of a window. In it are the first piece, a loop over others, and the last one; a tile is
    convolved by six products for each of two groups, or 5x5 by three for each group and each of five columns, of which
    three are beyond either side of the image; columns of the last piece that are beyond the image are not convolved.
    And a loop over chunks of the projection's steps.
    """
    projected, width = spec_of(case).projected, case.size[1]
    columns = 3 * case.planned.piece
    project = projected.chunk * projected.step // 16 * len(projected.products) * projected.rows // 128
    squeeze_and_excite = (1 + projected.sweeps) * projected.squeeze_depths
    if case.kernel_size == 3:
        columns -= case.planned.columns(width) - width
    convolve = 12 * columns if case.kernel_size == 3 else 6 * (5 * columns - 2 * 3)
    return 3 * projected.depths + project, convolve + squeeze_and_excite


def reused_bytes(case):
    """Of the squeeze vector's shares as they are added: there the expansion's constant input is not needed any more."""
    spec = spec_of(case)
    return min(2 * spec.produced.piece_pixels * BIAS_CHANNELS, 4 * WARPS * spec.projected.squeeze_room)


def spec_of(case):
    shape = case.shape
    channels = shape.in_channels, shape.hidden_channels, shape.out_channels, shape.squeeze_channels
    options = {"kernel_size": shape.kernel_size, **options_of(shape)}
    return constants(shape.height, shape.width, *channels, **options, tile=case.planned)


@pytest.mark.parametrize("tile", [MBConvWindowsHopperTile(*values) for values in product(*TILE_FIELDS)], ids=str)
def test_everything_in_shared_memory_starts_where_a_swizzle_does(tile):
    """Slabs of the input, and those of the output with stages of weights: whole units of the room, one by one."""
    for width, channels, out_channels in product((1, 5, 17, 30, 56), (8, 24, 48, 72, 112), (8, 40, 200)):
        options = {"kernel_size": 3, "activation": "silu", "squeeze_activation": "relu", "residual": False}
        spec = constants(20, width, channels, 64, out_channels, 4, **options, tile=tile)
        produced, projected = spec.produced, spec.projected
        inputs = [produced.pixels * slab for slab in produced.in_slabs]
        outputs = [projected.pixels * slab for slab in projected.out_slabs]
        weights = [tile.stages * tile.step * columns for columns in projected.products]
        assert all(elements % UNIT_ELEMENTS == 0 for elements in (*inputs, *outputs, *weights))
        assert [spec.input_unit(number) for number in range(len(inputs) + 1)] == starts(inputs)
        assert [spec.output_unit(number) for number in range(len(outputs) + 1)] == starts(outputs)
        after_outputs = starts(outputs + weights)[len(outputs) :]
        assert [spec.weights_unit(number) for number in range(len(weights) + 1)] == after_outputs
        assert spec.room_units == max(starts(inputs)[-1], after_outputs[-1])


def starts(elements):
    """Where parts of so many elements start that lie one after another, and where they end, in units of the room."""
    return [start // UNIT_ELEMENTS for start in accumulate(elements, initial=0)]


def test_the_command_line_takes_a_tile():
    arguments = ("--json", "--block", "mbconv:16,4,20", "--mbconv-windows-hopper-tile", "2,8,32,2")
    (row,) = json.loads(ahead_output(*arguments))
    assert (row["block"], row["kernel"], row["tile"]) == ([16, 4, 20], "mbconv_windows_hopper", [2, 8, 32, 2])
    assert row["hgmma"] > 0 and row["stack_bytes"] == 0


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are compiled in this process")
def test_interpreted_kernels_cannot_be_compiled():
    with pytest.raises(RuntimeError, match=r"under TRITON_INTERPRET=1"):
        compile_block(CASES[0].shape, CASES[0].planned)


def test_unsupported_blocks_are_refused():
    case = CASES[0]
    for shape, tile, message in (
        (replace(case.shape, activation="gelu"), case.planned, "activation gelu is not supported, use relu or silu"),
        (case.shape, MBConvWindowsHopperTile(3, 8, 32, 4), "piece=3 is not one of 2, 4"),
    ):
        with pytest.raises(ValueError, match=f"does not run .*{message}"):
            compiling(compile_block, shape, tile)
    with pytest.raises(ValueError, match=r"does not run .*MBConvWindowsHopperTile is for compute capability 9.0 only"):
        compiling(compile_block, case.shape, case.planned, (8, 0))

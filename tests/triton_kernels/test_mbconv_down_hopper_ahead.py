"""What the compiler makes of the stride-2 MBConv kernel on Hopper, ahead of time."""

import os
from dataclasses import dataclass

import pytest

from fusion.planner.match import MBConvDownShape, options_of
from fusion.planner.mbconv_down_hopper_tile import MBConvDownHopperTile, local_memory_bytes, why_invalid
from fusion.planner.mbconv_hopper_tile import COMPILER_BYTES
from fusion.planner.processor import PROCESSORS
from fusion.triton_kernels.ahead import compile_block
from fusion.triton_kernels.mbconv_down_hopper_spec import constants
from tests.triton_kernels.compiling_process import compiling


@dataclass(frozen=True)
class Case:
    channels: int
    out_channels: int
    size: tuple[int, int]
    tile: tuple[int, int, int]
    most_stack_bytes: int = 0
    activation: str = "silu"
    dtype: str = "float16"
    squeeze_activation: str = "relu"
    blur: bool = True

    def __str__(self):
        size, tile = "x".join(map(str, self.size)), ",".join(map(str, self.tile))
        activations = f"{self.activation}-{self.squeeze_activation}"
        strided = "-strided" * (not self.blur)
        return f"{self.channels}-{self.out_channels}-{size}-{activations}{strided}-{tile}-{self.dtype}"

    @property
    def shape(self):
        channels = self.channels, 4 * self.channels, self.out_channels, max(1, self.channels // 4)
        options = {"squeeze_activation": self.squeeze_activation, "blur": self.blur}
        return MBConvDownShape(128, *self.size, *channels, 8, self.activation, self.dtype, **options)


CASES = [
    # The networks' blocks, hidden channels that stay and that do not, a last sweep that is split and one that is not.
    Case(128, 128, (16, 16), (32, 6, 1)),
    Case(192, 192, (16, 16), (32, 6, 1)),
    Case(256, 256, (16, 16), (32, 6, 0), most_stack_bytes=16),
    Case(48, 128, (32, 32), (32, 6, 0)),
    Case(64, 160, (32, 32), (64, 2, 0), dtype="bfloat16"),
    Case(96, 256, (32, 32), (32, 4, 0)),
    # Masks.
    Case(72, 24, (14, 10), (32, 4, 1), activation="relu"),
    Case(72, 192, (30, 28), (64, 3, 0), squeeze_activation="silu"),
    # No blur: one tile a column and two, a last sweep that is split.
    Case(128, 128, (16, 16), (32, 6, 1), blur=False),
    Case(40, 80, (28, 28), (32, 6, 0), blur=False),
    Case(24, 40, (15, 13), (32, 6, 1), blur=False, dtype="bfloat16"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_resources(case):
    """Products are not serialised, next to nothing is spilled, and the planner knows the shared memory."""
    tile = MBConvDownHopperTile(*case.tile)
    assert why_invalid(tile, case.shape, PROCESSORS["h200"]) is None
    (found,) = compiling(compile_block, case.shape, tile).values()
    assert (found.hgmma, found.hmma) == products(tile, case.shape), found
    assert found.warpgroup < 2 * found.hgmma, "two fences and waits for each would be products one by one"
    assert found.stack_bytes <= case.most_stack_bytes, found
    spare = local_memory_bytes(tile, case.shape, PROCESSORS["h200"]) - found.shared_bytes
    assert 0 <= spare < COMPILER_BYTES, found


def products(tile, shape):
    """Of a warpgroup, m64 k16 and as wide as the product, and of a warp, in the kernel's code.

    It has a loop over sweeps and maybe a half one. In each are the first piece, a loop over others, and the last one;
    a tile is convolved by six products for each of two groups, where two tiles of the first column share what is left
    of them. Without a blur the first piece is one of the loop, and pieces are convolved by as many products as such a
    tile. And a loop over chunks of the projection's steps.
    """
    channels = shape.in_channels, shape.hidden_channels, shape.out_channels, shape.squeeze_channels
    spec = constants(shape.height, shape.width, *channels, **options_of(shape), tile=tile)
    projected = spec.projected
    sweeps = (projected.whole_sweeps > 0) + projected.split
    rows = max(1, projected.rows // 128)
    project = projected.passes * projected.chunk * tile.step // 16 * len(projected.products) * rows
    convolve = 12 * 12 - 4 * (spec.tiles_of_column - 1) if shape.blur else 2 * 12
    squeeze_and_excite = (sweeps + projected.sweeps) * projected.squeeze_depths
    expand = (3 if shape.blur else 2) * sweeps * projected.depths
    return expand + project, convolve * sweeps + squeeze_and_excite


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are compiled in this process")
def test_interpreted_kernels_cannot_be_compiled():
    with pytest.raises(RuntimeError, match=r"under TRITON_INTERPRET=1"):
        compile_block(CASES[0].shape, MBConvDownHopperTile(32, 6, 1))


def test_unsupported_blocks_are_refused():
    with pytest.raises(ValueError, match=r"does not run .*height and width must be even"):
        compiling(compile_block, Case(24, 24, (15, 16), (32, 6, 1)).shape, MBConvDownHopperTile(32, 6, 1))
    with pytest.raises(ValueError, match=r"does not run .*step=16 is not one of 32, 64"):
        compiling(compile_block, CASES[0].shape, MBConvDownHopperTile(16, 6, 1))

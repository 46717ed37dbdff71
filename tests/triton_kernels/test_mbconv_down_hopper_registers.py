"""The assembly of the stride-2 MBConv kernel on Hopper, run for one warp in numpy."""

from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fusion.mbconv_hopper_weights import pack_mbconv_hopper
from fusion.planner.mbconv_down_hopper_tile import MBConvDownHopperTile
from fusion.reference import blur_pool
from fusion.triton_kernels import mbconv_down_hopper_registers as down
from fusion.triton_kernels import mbconv_hopper_registers as registers
from fusion.triton_kernels.mbconv_down_hopper_spec import constants
from tests.triton_kernels.ptx_lanes import halves, pair, run

HIDDEN = 16
"""Of a warp."""
TILE = MBConvDownHopperTile(32, 4, 1)
SIZES = [(16, 16), (32, 32), (12, 10), (2, 4), (16, 6), (30, 28), (18, 4), (32, 6)]


@pytest.fixture
def case(random_mbconv_weights):
    """`(size, activation, blur=True) -> ` constants, packed weights, what the expansion gives, and the result."""

    def make(size, activation, blur=True):
        weights = random_mbconv_weights(8, HIDDEN, 8, 3)
        packed = pack_mbconv_hopper(weights, TILE, torch.float16, "cpu")
        options = {"activation": activation, "squeeze_activation": "relu", "blur": blur}
        spec = constants(*size, 8, HIDDEN, 8, 3, **options, tile=TILE)
        torch.manual_seed(0)
        h = torch.randn(HIDDEN, *size, dtype=torch.float64)
        activate = {"silu": F.silu, "relu": F.relu}[activation]
        y = F.conv2d(activate(h)[None], weights.conv, weights.conv_bias, 1 if blur else 2, padding=1, groups=2)
        y = activate(y)
        return spec, packed, h, (blur_pool(y) if blur else y)[0]

    return make


class Warp:
    """Registers of one warp, a list of `[32]` for each tile."""

    def __init__(self, spec, packed):
        self.spec, self.tiles = spec, spec.tiles_of_column
        self.lane = np.arange(32)
        elements = packed.taps[0, 0, :, 0].numpy()  # [5, 32, 8]
        self.taps = [[pair(piece[:, 2 * i].copy(), piece[:, 2 * i + 1].copy()) for i in range(4)] for piece in elements]
        bias = packed.conv_bias[0, 0, 0].numpy()  # [4, 8]
        self.bias = [bias[self.lane % 4, i].copy() for i in range(8)]

    def inside(self, rows, column, height, width):
        return np.where((rows < height) & (column < width), 0xFFFFFFFF, 0).astype(np.uint32)

    def activated(self, h, column):
        """Tiles of a column: of sums a lane has channel g, or g + 8, and pixels 2 t and 2 t + 1 of each half."""
        spec, lane = self.spec, self.lane
        height, width = h.shape[1:]
        padded = np.zeros((HIDDEN, 64, 64), np.float32)
        padded[:, :height, :width] = h / 2
        padded[:, height:] = padded[:, :, width:] = 7.0  # must not matter
        sums, masks = [], []
        for tile in range(self.tiles):
            for half in range(2):
                for group in range(2):
                    for bit in range(2):
                        row = (lane % 4 * 2 + bit) * spec.rows_of_lane + 2 * tile + half
                        sums.append(padded[lane // 4 + 8 * group, row, column])
            for half in range(2):
                row = lane // 4 * spec.rows_of_lane + 2 * tile + half
                masks += [self.inside(row, column, height, width)] * 4
        if self.tiles == 1:
            text = registers.activate_text(spec.produced, dtype_name(), spec.blur)
        else:
            text = down.activate_pair_text(spec.produced, spec.exact, dtype_name(), spec.blur)
        outs = run(text, 8 * self.tiles, sums + masks)
        return [outs[8 * tile : 8 * tile + 8] for tile in range(self.tiles)]

    def convolved(self, left, here, right):
        """As `registers.convolved`."""
        sums = self.bias
        for tile, outer, which, same in ((left, 0, 0, 3), (here, 1, 1, 3), (right, 2, 0, 4)):
            sums = run(registers.outer_text(dtype_name()), 8, [*tile, *self.taps[outer], *sums])
            sums = run(registers.same_text(dtype_name(), which), 8, [*tile, *self.taps[same], *sums])
        return sums

    def blurred(self, done, pool, column):
        """[16 hidden, rows of a column of the output], and the pool."""
        spec, lane = self.spec, self.lane
        height, width = spec.projected.height, spec.projected.width
        z = np.zeros((HIDDEN, 8 * self.tiles))
        if self.tiles == 1:
            (sums,) = done
            even, odd = ([sums[4 * group + 2 * row + c] for group in range(2) for c in range(2)] for row in range(2))
            mask = [self.inside(lane // 4, column, height, width)] * 4
            outs = run(down.blur_half_text(spec.exact, dtype_name()), 6, [*even, *odd, *pool, *mask])
            found = [(group, 0, outs[group]) for group in range(2)]
            pool = outs[2:]
        else:
            mask = [self.inside(lane // 4 * 2 + half, column, height, width) for half in (0, 0, 0, 0, 1, 1, 1, 1)]
            outs = run(down.blur_text(spec.exact, dtype_name()), 12, [*done[0], *done[1], *pool, *mask])
            found = [(group, half, outs[2 * group + half]) for group in range(2) for half in range(2)]
            pool = outs[4:]
        for group, half, register in found:
            for bit in range(2):
                channel = 8 * group + lane % 4 * 2 + bit
                z[channel, lane // 4 * self.tiles + half] = halves(register)[:, bit]
        return z, pool

    def strided(self, tiles, tile, pool):
        """As `down.convolve_strided`: a tile of the output, [16 hidden, rows, columns], and the pool."""
        spec, lane, sums = self.spec, self.lane, self.bias
        other = 3 - self.tiles
        for column, (outer, which, same) in enumerate(((0, 0, 3), (1, 1, 3), (2, 0, 4))):
            pair_of_tiles = tiles[column * self.tiles] + tiles[column * self.tiles + other]
            sums = run(down.strided_outer_text(dtype_name()), 8, [*pair_of_tiles, *self.taps[outer], *sums])
            sums = run(down.strided_same_text(dtype_name(), which), 8, [*pair_of_tiles, *self.taps[same], *sums])
        # Halves of a tile are two columns, or even and odd rows.
        places = [(lane // 4, 2 * tile + h) if self.tiles == 1 else (lane // 4 * 2 + h, tile) for h in range(2)]
        height, width = spec.projected.height, spec.projected.width
        mask = [self.inside(*place, height, width) for place in places for _ in range(4)]
        outs = run(registers.finish_text(spec.projected, spec.exact, dtype_name()), 12, [*sums, *pool, *mask])
        z = np.zeros((HIDDEN, 8 * self.tiles, 2 // self.tiles))
        for group, half in product(range(2), range(2)):
            row, column = places[half]
            for bit in range(2):
                z[8 * group + lane % 4 * 2 + bit, row, column - places[0][1]] = halves(outs[2 * group + half])[:, bit]
        return z, outs[4:]


def dtype_name():
    """Any but bfloat16."""
    return "float16"


def blur(warp, h):
    """The output `[16 hidden, rows, columns]` of a warp and its pools, column by column."""
    spec, tiles = warp.spec, warp.tiles
    none = [[np.zeros(32, np.uint32)] * 8] * tiles
    columns = [none, *(warp.activated(h, column) for column in range(spec.columns)), none]
    sums = [[np.zeros(32, np.float32)] * 8] * tiles
    pool = [np.zeros(32, np.float32)] * (4 if tiles == 1 else 8)
    out = []
    for column in range(spec.columns):
        y = [warp.convolved(*(columns[column + dx][tile] for dx in range(3))) for tile in range(tiles)]
        if column % 2 == 0:
            sums = [run(down.even_text(spec.produced), 8, [*y[i], *sums[i]]) for i in range(tiles)]
        else:
            weight = [np.full(32, 2.0 if column == 1 else 1.0, np.float32)] * 8
            outs = [run(down.odd_text(spec.produced), 16, [*y[i], *sums[i], *weight]) for i in range(tiles)]
            z, pool = warp.blurred([each[:8] for each in outs], pool, column // 2)
            out.append(z)
            sums = [each[8:] for each in outs]
    return np.stack(out, -1), pool


def stride(warp, h):
    """As `blur`, for a convolution of stride 2: a piece of columns after the other."""
    spec = warp.spec
    window = [[np.zeros(32, np.uint32)] * 8] * warp.tiles
    pool = [np.zeros(32, np.float32)] * 8
    out = []
    for piece in range(spec.columns // spec.piece_columns):
        columns = range(piece * spec.piece_columns, (piece + 1) * spec.piece_columns)
        tiles = [tile for column in columns for tile in warp.activated(h, column)]
        z, pool = warp.strided(window + tiles, piece, pool)
        out.append(z)
        window = tiles[-warp.tiles :]
    return np.concatenate(out, -1), pool


@pytest.mark.parametrize("activation", ["silu", "relu"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_warp_convolves_and_blurs(size, activation, case):
    spec, packed, h, expected = case(size, activation)
    out, pool = blur(Warp(spec, packed), h.numpy().astype(np.float32))
    check(out, pool, spec.tiles_of_column == 2, expected)


@pytest.mark.parametrize("size", [*SIZES, (15, 13), (1, 1), (2, 1), (31, 29), (17, 5)], ids=str)
def test_a_warp_convolves_with_stride_2(size, case):
    spec, packed, h, expected = case(size, "silu", blur=False)
    out, pool = stride(Warp(spec, packed), h.numpy().astype(np.float32))
    check(out, pool, True, expected)


def check(out, pool, by_halves, expected):
    """The pool has eight registers if it is one of both halves of a tile."""
    height, width = expected.shape[1:]
    np.testing.assert_allclose(out[:, :height, :width], expected.numpy(), rtol=2e-3, atol=2e-3)
    values = [register.view(np.float32) for register in pool]
    if by_halves:
        values = [values[4 * group + c] + values[4 * group + 2 + c] for group in range(2) for c in range(2)]
    # [groups, channels of a pair, lanes, pairs]
    sums = np.stack(values).reshape(2, 2, 8, 4).sum(2).transpose(0, 2, 1).reshape(HIDDEN)
    np.testing.assert_allclose(sums / (height * width), expected.mean((1, 2)).numpy(), rtol=2e-3, atol=2e-3)

"""Where the stride-2 MBConv kernel for larger images finds its pixels: its own arithmetic, with PyTorch in place of
Gluon."""

from itertools import product
from math import ceil
from types import SimpleNamespace

import pytest
import torch

from fusion.planner.mbconv_hopper_tile import LANES, TILE_PIXELS, WARPS
from fusion.planner.mbconv_windows_hopper_tile import MBConvDownWindowsHopperTile
from fusion.triton_kernels import mbconv_hopper_spec as layouts
from fusion.triton_kernels import mbconv_windows_hopper as kernel
from fusion.triton_kernels import mbconv_windows_hopper_convolve as convolve
from fusion.triton_kernels.mbconv_windows_hopper_spec import constants

SIZES = [(16, 16), (17, 19), (18, 18), (28, 28), (29, 7), (56, 10), (61, 20), (14, 30), (5, 100), (2, 3), (1, 40)]
TILES = [MBConvDownWindowsHopperTile(4, 8, 32, 4), MBConvDownWindowsHopperTile(4, 16, 32, 4)]
CHANNELS, HIDDEN, OUT_CHANNELS = 24, 136, 40
SWEEPS, UNIT = 2, 256


@pytest.fixture(autouse=True)
def in_pytorch(monkeypatch):
    """Layouts say nothing but who computes what."""
    names = {
        "arange": lambda start, end, layout: torch.arange(start, end),
        "SliceLayout": lambda dim, layout: None,
        "int64": torch.int64,
        "maximum": max,
        "minimum": min,
        "where": lambda condition, value, other: value if condition else other,
    }
    for module in (kernel, convolve, layouts):
        monkeypatch.setattr(module, "gl", SimpleNamespace(**names))
    for module, constants_of in (
        (kernel, {"LANES": LANES, "TILE": TILE_PIXELS}),
        (convolve, {"LANES": LANES, "WARPS": WARPS, "UNIT": UNIT}),
        (layouts, {"WARPS": WARPS}),
    ):
        for name, value in constants_of.items():
            monkeypatch.setattr(module, name, value)
    for module in (convolve, layouts):
        monkeypatch.setattr(module, "fragment_layout", lambda: None)
    monkeypatch.setattr(kernel, "copy_layout", lambda slab: None)
    monkeypatch.setattr(kernel, "offsets_of", kernel.offsets_of.fn)
    monkeypatch.setattr(convolve, "fragment_offsets", layouts.fragment_offsets.fn)
    monkeypatch.setattr(convolve, "as_fragments", lambda y: y)


def spec_of(tile, height, width, kernel_size=3):
    options = {"activation": "silu", "squeeze_activation": "relu", "residual": False}
    channels = CHANNELS, HIDDEN, OUT_CHANNELS, 4
    return constants(height, width, *channels, kernel_size=kernel_size, **options, tile=tile)


def windows_of(tile, height, kernel_size):
    """Of every window the first pair of rows that it has, the first of its own, and the first after those."""
    count, spec = tile.windows(height, kernel_size), spec_of(tile, height, 1, kernel_size)
    return [kernel.window_of.fn(index, count, spec) for index in range(count)]


def slabs_of(widths):
    """First channel and width of each slab."""
    return [(sum(widths[:index]), width) for index, width in enumerate(widths)]


@pytest.mark.parametrize("kernel_size", [3, 5])
def test_every_row_of_the_output_is_owned_by_one_window_that_has_its_rows(kernel_size):
    """Row q is convolved from rows 2 q - 1 to 2 q + 1, or of 5x5 from 2 q - 2 to 2 q + 2: those of the image are in the
    window's 16 rows, and those that are not, zero, must not be of the image."""
    reach = kernel_size // 2
    for height in range(1, 131):
        owned = []
        for top, first, end in windows_of(TILES[0], height, kernel_size):
            window = range(2 * top, 2 * top + 16)
            assert top >= 0 and (window[-1] <= height or top == 0), "lanes are idle only where an image has none"
            for q in range(first, end):
                rows = range(2 * q - reach, 2 * q + reach + 1)
                assert all(row in window for row in rows if 0 <= row < height), (height, q)
            owned += range(first, end)
        assert owned == list(range(ceil(height / 2))), height


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_window_loads_its_rows(size):
    """Zeros in place of what is outside of the image; in memory rows 2 q of all lanes q come before rows 2 q + 1."""
    (height, width), tile = size, TILES[0]
    image = torch.arange(2 * height * width * CHANNELS).reshape(2, height, width, CHANNELS)
    for kernel_size in (3, 5):
        produced = spec_of(tile, height, width, kernel_size).produced
        padded = torch.full((height + 2 * LANES * 2, tile.columns(width), sum(produced.in_slabs)), -1)
        padded[:height, :width, :CHANNELS] = image[1]
        for top, _, _ in windows_of(tile, height, kernel_size):
            rows = padded[2 * top : 2 * top + 2 * LANES]
            # Pairs, rows of a pair, columns, channels.
            expected = rows.reshape(LANES, 2, *rows.shape[1:]).permute(2, 1, 0, 3)
            for (first, slab), piece in product(slabs_of(produced.in_slabs), range(produced.pieces)):
                offsets, inside = kernel.input_offsets.fn(torch.tensor(1), top, piece, first, slab, produced)
                columns = expected[piece * tile.piece : (piece + 1) * tile.piece, ..., first : first + slab]
                assert torch.equal(torch.where(inside, offsets, -1), columns.reshape(-1, slab))


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_passes_write_every_element_of_the_output_once(size, tile):
    """As two neighbouring columns of a row, those of a tile's first lanes before those of its second ones."""
    height, width = size
    spec = spec_of(tile, height, width)
    out_height, out_width, pairs = ceil(height / 2), ceil(width / 2), ceil(width / 4)
    image = torch.arange(2 * out_height * out_width * OUT_CHANNELS).reshape(2, out_height, out_width, OUT_CHANNELS)[1]
    padded = torch.full((out_height, 2 * pairs, sum(spec.projected.out_slabs)), -1)
    padded[:, :out_width, :OUT_CHANNELS] = image
    ordered = padded.reshape(out_height * pairs, 2, -1)
    missing = tile.passes(height, width) * tile.pass_pixels() // 2 - len(ordered)
    ordered = torch.cat([ordered, torch.full((missing, *ordered.shape[1:]), -1)])
    # Tiles, columns of a pair, lanes, channels.
    ordered = ordered.reshape(-1, LANES, 2, ordered.shape[-1]).transpose(1, 2)
    written = []
    for index in range(tile.passes(height, width)):
        tiles = ordered[index * tile.pass_tiles : (index + 1) * tile.pass_tiles]
        for first, slab in slabs_of(spec.projected.out_slabs):
            offsets, inside = kernel.pass_offsets.fn(torch.tensor(1), index, first, slab, spec)
            assert torch.equal(torch.where(inside, offsets, -1), tiles[..., first : first + slab].reshape(-1, slab))
            written.append(offsets[inside])
    assert torch.equal(torch.cat(written).sort().values, image.flatten())


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_windows_store_every_pair_of_pixels_where_its_pass_expects_it(size, tile, monkeypatch):
    """Once, of all windows: 32 elements of a lane's pair in each unit of 16 hidden channels."""
    height, width = size
    stores = []
    monkeypatch.setattr(convolve.gl, "store", lambda offsets, y, mask: stores.append((offsets, mask)), raising=False)
    for kernel_size in (3, 5):
        spec = spec_of(tile, height, width, kernel_size)
        written = []
        windows = windows_of(tile, height, kernel_size)
        for window, piece, sweep in product(windows, range(tile.columns(width) // 4), range(SWEEPS)):
            convolve.store.fn(None, (window, 0, sweep), piece, spec)
            offsets, mask = stores.pop()
            # Warps, lanes of eight, threads of a lane and their elements.
            offsets, mask = offsets.reshape(WARPS, LANES, 32), mask.expand(1, 32, 1).reshape(LANES, 4)
            assert torch.equal(mask.any(1), mask.all(1))
            for lane in mask.all(1).nonzero().flatten():
                pair = (window[0] + int(lane)) * ceil(width / 4) + piece
                index, place = divmod(pair, LANES * tile.pass_tiles)
                # The workspace is [passes, units, tiles, lanes, 32].
                units = index * WARPS * SWEEPS + sweep * WARPS + torch.arange(WARPS)
                expected = (units * tile.pass_tiles * UNIT + place * 32)[:, None] + torch.arange(32)
                assert torch.equal(offsets[:, lane], expected)
                written.append(expected.flatten())
        pairs = ceil(height / 2) * ceil(width / 4)
        written = torch.cat(written)
        assert len(written) == len(written.unique()) == pairs * 32 * WARPS * SWEEPS
        assert written.max() < tile.workspace_elements(height, width, HIDDEN)

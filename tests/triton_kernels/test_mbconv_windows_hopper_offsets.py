"""Where the MBConv kernel for larger images finds its pixels: its own arithmetic, with PyTorch in place of Gluon."""

from math import ceil
from types import SimpleNamespace

import pytest
import torch

from fusion.planner.mbconv_hopper_tile import LANES, TILE_PIXELS
from fusion.planner.mbconv_windows_hopper_tile import MBConvDownWindowsHopperTile, MBConvWindowsHopperTile
from fusion.triton_kernels import mbconv_windows_hopper as kernel
from fusion.triton_kernels.mbconv_windows_hopper_spec import constants

SIZES = [(16, 16), (17, 19), (18, 18), (28, 28), (29, 7), (56, 10), (61, 20), (14, 30), (5, 100), (2, 3), (1, 40)]
TILES = [MBConvWindowsHopperTile(2, 8, 32, 4), MBConvWindowsHopperTile(4, 16, 32, 4)]
DOWN_TILE = MBConvDownWindowsHopperTile(4, 8, 32, 4)
CHANNELS, OUT_CHANNELS = 24, 40


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
    monkeypatch.setattr(kernel, "gl", SimpleNamespace(**names))
    monkeypatch.setattr(kernel, "LANES", LANES)
    monkeypatch.setattr(kernel, "TILE", TILE_PIXELS)
    monkeypatch.setattr(kernel, "copy_layout", lambda slab: None)
    monkeypatch.setattr(kernel, "offsets_of", kernel.offsets_of.fn)


def spec_of(tile, height, width, kernel_size=3):
    options = {"kernel_size": kernel_size, "activation": "silu", "squeeze_activation": "relu", "residual": False}
    return constants(height, width, CHANNELS, 64, OUT_CHANNELS, 4, **options, tile=tile)


def windows_of(tile, height, kernel_size=3):
    """Of every window the pairs of rows that it has, and those that are its own."""
    count, spec = tile.windows(height, kernel_size), spec_of(tile, height, 1, kernel_size)
    for index in range(count):
        top, first, end = kernel.window_of.fn(index, count, spec)
        yield range(top, top + LANES), range(first, end)


def slabs_of(widths):
    """First channel and width of each slab."""
    return [(sum(widths[:index]), width) for index, width in enumerate(widths)]


@pytest.mark.parametrize("kernel_size", [3, 5])
@pytest.mark.parametrize("tile", [TILES[0], DOWN_TILE], ids=str)
def test_every_pair_of_rows_is_owned_by_one_window_that_has_its_neighbours(tile, kernel_size):
    """The rows that the convolution needs are in the window or outside of the image."""
    for height in range(1, 131):
        owned = []
        for window, own in windows_of(tile, height, kernel_size):
            owned += own
            assert window[0] >= 0 and (2 * window[-1] < height or height <= 2 * LANES)
            for pair in own:
                centres = range(2 * pair, min(2 * pair + 2, height), tile.STRIDE)
                rows = {row + offset for row in centres for offset in range(-(kernel_size // 2), kernel_size // 2 + 1)}
                assert all(row // 2 in window for row in rows if 0 <= row < height), (height, pair)
        assert owned == list(range(ceil(height / 2))), height


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_window_loads_its_rows(size, tile):
    """Zeros in place of what is outside of the image; in memory rows 2 q of all lanes q come before rows 2 q + 1."""
    height, width = size
    produced = spec_of(tile, height, width).produced
    image = torch.arange(2 * height * width * CHANNELS).reshape(2, height, width, CHANNELS)
    padded = torch.full((height + 2 * LANES * 2, tile.columns(width), sum(produced.in_slabs)), -1)
    padded[:height, :width, :CHANNELS] = image[1]
    for window, _ in windows_of(tile, height):
        rows = padded[2 * window[0] : 2 * window[0] + 2 * LANES]
        # Pairs, rows of a pair, columns, channels.
        expected = rows.reshape(LANES, 2, *rows.shape[1:]).permute(2, 1, 0, 3)
        for first, slab in slabs_of(produced.in_slabs):
            for piece in range(produced.pieces):
                offsets, inside = kernel.input_offsets.fn(torch.tensor(1), window[0], piece, first, slab, produced)
                columns = expected[piece * tile.piece : (piece + 1) * tile.piece, ..., first : first + slab]
                assert torch.equal(torch.where(inside, offsets, -1), columns.reshape(-1, slab))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_passes_write_every_element_of_the_output_of_stride_2_once(size):
    height, width = size
    spec = spec_of(DOWN_TILE, height, width)
    out_height, out_width = ceil(height / 2), ceil(width / 2)
    image = torch.arange(2 * out_height * out_width * OUT_CHANNELS).reshape(2, out_height, out_width, OUT_CHANNELS)[1]
    written = []
    for index in range(DOWN_TILE.passes(height, width)):
        for first, slab in slabs_of(spec.projected.out_slabs):
            offsets, inside = kernel.pass_offsets.fn(torch.tensor(1), index, first, slab, spec)
            written.append(offsets[inside])
    assert torch.equal(torch.cat(written).sort().values, image.flatten())


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_passes_write_every_element_of_the_output_once(size, tile):
    """As neighbouring columns of a pair of rows, whose rows lie in a tile one after the other."""
    height, width = size
    spec = spec_of(tile, height, width)
    image = torch.arange(2 * height * width * OUT_CHANNELS).reshape(2, height, width, OUT_CHANNELS)[1]
    padded = torch.full((2 * spec.row_pairs, width, sum(spec.projected.out_slabs)), -1)
    padded[:height, :, :OUT_CHANNELS] = image
    ordered = padded.reshape(spec.row_pairs, 2, width, -1).transpose(1, 2).reshape(-1, 2, padded.shape[-1])
    missing = tile.passes(height, width) * tile.pass_pixels() // 2 - len(ordered)
    ordered = torch.cat([ordered, torch.full((missing, *ordered.shape[1:]), -1)])
    # Tiles, rows of a pair, lanes, channels.
    ordered = ordered.reshape(-1, LANES, 2, ordered.shape[-1]).transpose(1, 2)
    written = []
    for index in range(tile.passes(height, width)):
        tiles = ordered[index * tile.pass_tiles : (index + 1) * tile.pass_tiles]
        for first, slab in slabs_of(spec.projected.out_slabs):
            offsets, inside = kernel.pass_offsets.fn(torch.tensor(1), index, first, slab, spec)
            assert torch.equal(torch.where(inside, offsets, -1), tiles[..., first : first + slab].reshape(-1, slab))
            written.append(offsets[inside])
    assert torch.equal(torch.cat(written).sort().values, image.flatten())

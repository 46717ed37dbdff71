from itertools import islice, product

import pytest

from fusion.planner import head_tile, stem_tile
from fusion.planner.blocks import conv, head
from fusion.planner.head_tile import HeadTile
from fusion.planner.match import match_head, match_stem
from fusion.planner.processor import PROCESSORS
from fusion.planner.stem_tile import MAX_GRID, STRIDE, StemTile, window

H200 = PROCESSORS["h200"]


def stem_shape(batch=128, height=256, width=256, channels=3, out_channels=32, **options):
    return match_stem(conv(batch, height, width, channels, out_channels, stride=2, activation="relu", **options))


def head_shape(batch=128, height=8, width=8, channels=128, out_channels=1280, **options):
    return match_head(head(batch, height, width, channels, out_channels, **options))


@pytest.mark.parametrize("channels, group, planar", list(product(range(1, 5), (2, 4), (False, True))))
def test_a_window_holds_what_its_group_looks_at(channels, group, planar):
    elements = window(channels, group, planar)
    pixels = range(-1, STRIDE * (group - 1) + 2)
    columns = [elements.column(pixel, channel) for pixel in pixels for channel in range(channels)]
    assert len(set(columns)) == len(columns)
    assert min(columns) >= 0
    assert max(columns) < elements.columns
    assert elements.columns & (elements.columns - 1) == 0
    assert elements.lead % (STRIDE * group) == 0, "windows start where loads may"


def test_windows_of_rgb_images_have_little_padding():
    assert (window(3, 2, planar=False).columns, window(3, 2, planar=False).span) == (16, 16)
    assert (window(3, 4, planar=False).columns, window(3, 4, planar=False).span) == (32, 32)
    assert (window(3, 2, planar=True).columns, window(3, 2, planar=True).span) == (32, 8)


@pytest.mark.parametrize("width, interleaved, planar", [(256, 8, 8), (252, 4, 4), (250, 2, 2), (251, 1, 1)])
def test_loads_are_as_wide_as_rows_allow(width, interleaved, planar):
    assert window(3, 4, planar=False).vector(4, width) == interleaved
    assert window(3, 4, planar=True).vector(4, width) == planar
    assert window(4, 4, planar=False).vector(4, 251) == 4, "four channels make up for an odd width"


def test_stem_tile():
    tile = StemTile(2, 128, 2, 4)
    assert tile.rows == 128
    assert [tile.columns(channels) for channels in (8, 16, 24, 32, 64)] == [16, 32, 64, 64, 128]
    assert tile.grid(5, 127, 129) == (2, 64, 5)
    assert tile.programs(5, 127, 129) == 640
    assert StemTile(*tile.to_ints()) == tile
    with pytest.raises(ValueError, match="StemTile: warps must be a positive integer, got 0"):
        StemTile(2, 128, 2, 0)


def test_head_tile():
    tile = HeadTile(64, 128, 5, 4)
    assert tile.stages == 3
    assert tile.in_slabs(160) == (128, 32)
    assert [tile.padded_out(channels) for channels in (8, 128, 1280, 1288)] == [128, 128, 1280, 1408]
    assert [tile.tiles(pixels) for pixels in (1, 64, 65)] == [1, 1, 2]
    assert tile.programs(128, 1280) == 26 * 10
    assert HeadTile(*tile.to_ints()) == tile
    with pytest.raises(ValueError, match=r"HeadTile: images must be a positive integer, got 1\.5"):
        HeadTile(64, 128, 1.5, 4)


STEM_REFUSALS = [
    ({"dtype": "float32"}, "dtype float32 is not supported, use one of float16, bfloat16"),
    ({"channels": 5}, "in_channels=5 is not supported, the kernel is for images of up to 4 channels"),
    ({"out_channels": 12}, "out_channels=12 is not supported, use a multiple of 8 up to 64"),
    ({"out_channels": 72}, "out_channels=72 is not supported"),
    ({"height": 2**16, "width": 2**15, "channels": 1}, "images of 65536x32768 pixels are too large, split them"),
    ({"batch": MAX_GRID + 1}, "65536 images and 64 rows of tiles are too many for a launch, split the batch"),
]


@pytest.mark.parametrize("changes, reason", STEM_REFUSALS, ids=[reason for _, reason in STEM_REFUSALS])
def test_stems_without_a_tile(changes, reason):
    shape = stem_shape(**changes)
    assert reason in stem_tile.why_invalid(StemTile(2, 128, 2, 4), shape, H200)
    assert not list(stem_tile.candidate_tiles(shape, H200))
    assert stem_tile.why_none(shape, H200)


HEAD_REFUSALS = [
    ({"dtype": "float32"}, "dtype float32 is not supported, use one of float16, bfloat16"),
    ({"channels": 12}, "in_channels=12 is not supported, use a multiple of 8"),
    ({"out_channels": 12}, "out_channels=12 is not supported, use a multiple of 8"),
    ({"height": 2**14, "width": 2**13, "channels": 16}, "images of 16384x8192 pixels are too large, split them"),
]


@pytest.mark.parametrize("changes, reason", HEAD_REFUSALS, ids=[reason for _, reason in HEAD_REFUSALS])
def test_heads_without_a_tile(changes, reason):
    shape = head_shape(**changes)
    assert reason in head_tile.why_invalid(HeadTile(64, 128, 5, 4), shape, H200)
    assert not list(head_tile.candidate_tiles(shape, H200))
    assert reason in head_tile.why_none(shape, H200)


INVALID_STEM_TILES = [
    (StemTile(3, 128, 2, 4), "height=3 is not a power of two"),
    (StemTile(2, 128, 3, 4), "group=3 is not one of 2, 4"),
    (StemTile(1, 16, 2, 1), "8 groups are too few for a matrix product, use at least 16"),
    (StemTile(16, 128, 2, 16), "16 warps are more than are of use, 8"),
    (StemTile(1, 64, 2, 4), "4 warps are too many for 32 groups of 2 pixels"),
    (StemTile(8, 128, 2, 4), "would spill"),
    (StemTile(16, 128, 4, 8), "bytes of local memory are more than h200 has"),
]


@pytest.mark.parametrize("tile, reason", INVALID_STEM_TILES, ids=str)
def test_invalid_stem_tiles(tile, reason):
    assert reason in stem_tile.why_invalid(tile, stem_shape(), H200)


INVALID_HEAD_TILES = [
    (HeadTile(48, 128, 5, 4), "pixels=48 is not a power of two"),
    (HeadTile(64, 8, 5, 4), "a matrix product needs at least 16 pixels and 16 channels"),
    (HeadTile(64, 128, 5, 4, 1), "the loop must be pipelined, in 2 to 4 stages"),
    (HeadTile(64, 256, 5, 16), "16 warps are more than are of use, 8"),
    (HeadTile(64, 32, 5, 4), "4 warps are too many for 32 channels"),
    (HeadTile(64, 256, 5, 4, 2), "would spill"),
    (HeadTile(128, 128, 5, 8, 4), "bytes of local memory are more than h200 has"),
]


@pytest.mark.parametrize("tile, reason", INVALID_HEAD_TILES, ids=str)
def test_invalid_head_tiles(tile, reason):
    assert reason in head_tile.why_invalid(tile, head_shape(channels=192), H200)


@pytest.mark.parametrize("processor", ["h200", "a5000", "b200"])
@pytest.mark.parametrize("module, shape", [(stem_tile, stem_shape()), (head_tile, head_shape())], ids=["stem", "head"])
def test_candidates_are_valid_and_distinct(module, shape, processor):
    processor = PROCESSORS[processor]
    tiles = list(module.candidate_tiles(shape, processor))
    assert len(set(tiles)) == len(tiles) > 10
    for tile in islice(tiles, 0, None, 7):
        assert module.why_invalid(tile, shape, processor) is None
        assert module.predicted_us(tile, shape, processor) > 0
    assert module.why_none(shape, processor) is None


@pytest.mark.parametrize("channels, bytes_us, measured_us", [(16, 27.3, 42.2), (24, 35.1, 64.0), (32, 42.9, 60.9)])
def test_a_stem_takes_longer_than_its_bytes_do(channels, bytes_us, measured_us):
    """Measured on an H200: compile_pico.json and compile_small.json, and 24 channels with four warps instead of eight
    in stride2_exploration.json."""
    shape = stem_shape(out_channels=channels)
    assert shape.activation_bytes / H200.bandwidth * 1e6 == pytest.approx(bytes_us, abs=0.1)
    best = min(stem_tile.predicted_us(tile, shape, H200) for tile in stem_tile.candidate_tiles(shape, H200))
    assert bytes_us < best == pytest.approx(measured_us, rel=0.1)


def test_activations_of_a_head_take_time():
    relu, silu, gelu = (head_shape(activation=name) for name in ("relu", "silu", "gelu"))
    tile = HeadTile(64, 128, 10, 4)
    assert head_tile.predicted_us(tile, relu, H200) < head_tile.predicted_us(tile, silu, H200)
    assert head_tile.predicted_us(tile, silu, H200) < head_tile.predicted_us(tile, gelu, H200)


def test_heads_divide_images_so_that_processors_have_a_program_or_more():
    shape = head_shape()
    counts = {(tile.channels, tile.images) for tile in head_tile.candidate_tiles(shape, H200)}
    assert (128, 10) in counts, "13 times 10 blocks of channels: 130 programs"
    assert (128, 5) in counts, "260 programs"
    assert {
        images for _, images in {(t.channels, t.images) for t in head_tile.candidate_tiles(head_shape(1), H200)}
    } == {1}

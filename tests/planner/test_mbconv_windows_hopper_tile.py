from dataclasses import replace
from itertools import product
from math import ceil

import pytest

from fusion.planner.blocks import mbconv
from fusion.planner.families import MBCONV, MBCONV_HOPPER, MBCONV_WINDOWS_HOPPER, families_of, family_of
from fusion.planner.match import match_mbconv
from fusion.planner.mbconv_hopper_tile import (
    COMPILER_BYTES,
    GROUP_REGISTERS,
    LANES,
    LOCAL_MEMORY_BYTES,
    MAX_IMAGES,
    MAX_STAGES,
    MIN_STAGES,
    STEPS,
    SWEEP,
)
from fusion.planner.mbconv_windows_hopper_tile import (
    PASS_TILES,
    TRIED_STAGES,
    MBConvDownWindowsHopperTile,
    MBConvWindowsHopperTile,
    candidate_tiles,
    estimated_registers,
    local_memory_bytes,
    predicted_us,
    programs_per_processor,
    row_pairs,
    why_invalid,
    why_malformed,
    why_none,
    why_too_large,
    why_unsupported,
)
from fusion.planner.plan import PlanError, plan_block
from fusion.planner.processor import PROCESSORS
from fusion.planner.tile import MAX_REGISTERS

H200 = PROCESSORS["h200"]
TILE = MBConvWindowsHopperTile(piece=4, pass_tiles=8, step=32, stages=4)
PIECES = MBConvWindowsHopperTile.PIECES
DESIGNS = set(product(PIECES, PASS_TILES))
HEIGHTS = range(1, 131)
SIZES = [(17, 17), (18, 18), (28, 28), (56, 56), (14, 30), (21, 33), (61, 20), (5, 100), (1, 40), (112, 112), (2, 3)]
CHANNELS = [
    # C, hidden, K, squeeze
    (8, 8, 8, 1),
    (16, 64, 16, 4),
    (24, 144, 24, 6),
    (40, 240, 80, 10),
    (64, 256, 200, 16),
    (128, 512, 128, 32),
    (144, 576, 144, 36),
]


def graph(channels=40, size=(28, 28), batch=128, expansion=6, **options):
    return mbconv(batch, *size, channels, expansion, **options)


def shape(*arguments, **options):
    return match_mbconv(graph(*arguments, **options))


def shapes(size):
    return [
        shape(c, size, 3, None, hidden_channels=hidden, out_channels=k, squeeze_channels=squeeze)
        for c, hidden, k, squeeze in CHANNELS
    ]


def test_the_fields_must_be_positive_integers_and_travel_as_integers():
    assert TILE.to_ints() == [4, 8, 32, 4]
    assert MBConvWindowsHopperTile(*TILE.to_ints()) == TILE
    for name, value in product(("piece", "pass_tiles", "step", "stages"), (0, -1, 1.5, None)):
        message = f"MBConvWindowsHopperTile: {name} must be a positive integer, got {value}"
        with pytest.raises(ValueError, match=message):
            replace(TILE, **{name: value})


@pytest.mark.parametrize(
    "height, pairs, count",
    [(1, 1, 1), (2, 1, 1), (15, 8, 1), (16, 8, 1), (17, 9, 2), (28, 14, 2), (29, 15, 3), (56, 28, 5), (112, 56, 9)],
)
def test_windows(height, pairs, count):
    assert row_pairs(height) == pairs
    assert TILE.windows(height, kernel_size=3) == TILE.windows(height, kernel_size=5) == count


def fewest_windows(height, distances):
    """Counted one by one: a window owns pairs of rows with all neighbours in it, which are so far, and starts as far
    down as it can."""
    pairs = range(ceil(height / 2))
    count, owned = 0, 0
    while owned < len(pairs):
        top = max(0, owned - 1)
        window = range(top, top + LANES)
        own = [p for p in pairs[owned:] if all(p + d in window for d in distances if p + d in pairs)]
        assert own == list(pairs[owned : owned + len(own)]), "pairs are owned in order"
        count, owned = count + 1, owned + len(own)
    return count


@pytest.mark.parametrize("kernel_size", [3, 5])
@pytest.mark.parametrize("tile_type", [MBConvWindowsHopperTile, MBConvDownWindowsHopperTile])
def test_windows_are_as_few_as_can_be(tile_type, kernel_size):
    """The kernel makes the same: `tests/triton_kernels/test_mbconv_windows_hopper_offsets.py`."""
    distances = rows_in_pairs(tile_type.STRIDE, kernel_size)
    tile = tile_type(*TILE.to_ints())
    found = [tile.windows(height, kernel_size) for height in HEIGHTS]
    assert found == [fewest_windows(height, distances) for height in HEIGHTS]


def rows_in_pairs(stride, kernel_size):
    """How far the pairs of rows are that the convolution needs for the output of one."""
    reach = kernel_size // 2
    centres = range(0, 2, stride)
    return {(row + offset) // 2 for row in centres for offset in range(-reach, reach + 1)}


@pytest.mark.parametrize("piece", PIECES)
def test_columns_are_whole_pieces(piece):
    """Two of them at least: the first and the last one have code of their own."""
    tile = replace(TILE, piece=piece)
    for width in range(1, 130):
        columns = tile.columns(width)
        assert columns % piece == 0 and columns >= 2 * piece
        assert width <= columns < max(width + piece, 2 * piece + 1)
        assert tile.window_pixels(width) == 16 * columns


@pytest.mark.parametrize("pass_tiles", PASS_TILES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_passes_cover_all_pixels(size, pass_tiles):
    """With the rows that the last pair lacks, and none of them is idle."""
    height, width = size
    tile = replace(TILE, pass_tiles=pass_tiles)
    assert tile.pass_pixels() == 16 * pass_tiles
    pixels = 2 * ceil(height / 2) * width
    passes = tile.passes(height, width)
    assert (passes - 1) * tile.pass_pixels() < pixels <= passes * tile.pass_pixels()


def test_workspace():
    """Hidden channels with their padding, of all pixels of all passes."""
    assert TILE.workspace_elements(28, 28, 240) == 256 * 7 * 128
    assert replace(TILE, pass_tiles=16).workspace_elements(28, 28, 240) == 256 * 4 * 256
    assert TILE.workspace_elements(17, 19, 144) == 256 * 3 * 128
    assert TILE.workspace_elements(1, 1, 8) == 128 * 128
    for (height, width), pass_tiles in product(SIZES, PASS_TILES):
        tile = replace(TILE, pass_tiles=pass_tiles)
        assert tile.workspace_elements(height, width, 136) >= SWEEP * 2 * height * width


def test_the_place_of_the_input_is_used_again():
    """The output and stages of weights take no memory of their own as long as a window of the input has more."""
    sizes = 28, 64, 256, 64, 16
    assert TILE.room_bytes(28, 64, 64) == 2 * 28 * 16 * 64
    assert replace(TILE, stages=2).memory_bytes(*sizes) == TILE.memory_bytes(*sizes)
    narrow = TILE.room_bytes(8, 64, 64)
    assert narrow == 2 * 128 * 64 + 2 * 4 * 32 * 64 > 2 * 8 * 16 * 64


def test_memory():
    """A window of 28 columns of 48 channels is all of the room: hidden channels have a stage of 8 KB for each step."""
    sizes = 28, 40, 240, 40, 10
    bias_input, gates, squeeze = 2 * 16 * 4 * 16, 2 * 256 + 4 * 64, 4 * 32 * (1 + 8)
    fixed = 2 * 28 * 16 * 48 + bias_input + gates + squeeze + COMPILER_BYTES
    assert TILE.fixed_bytes(*sizes) == fixed
    assert TILE.hidden_stage_bytes() == 2 * 32 * 128
    assert TILE.hidden_stages(*sizes) == MAX_STAGES
    assert TILE.memory_bytes(*sizes) == fixed + MAX_STAGES * 8 * 1024
    wider = replace(TILE, pass_tiles=16, step=64)
    assert wider.hidden_stage_bytes() == 4 * TILE.hidden_stage_bytes()
    assert wider.hidden_stages(*sizes) == 5


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_stages_of_hidden_channels_fill_the_memory(size):
    for block in shapes(size):
        sizes = block.width, block.in_channels, block.hidden_channels, block.out_channels, block.squeeze_channels
        for tile in candidate_tiles(block, H200):
            count = tile.hidden_stages(*sizes)
            assert MIN_STAGES <= count <= MAX_STAGES
            total = tile.memory_bytes(*sizes)
            assert total == tile.fixed_bytes(*sizes) + count * tile.hidden_stage_bytes() <= LOCAL_MEMORY_BYTES
            assert count == MAX_STAGES or total + tile.hidden_stage_bytes() > LOCAL_MEMORY_BYTES
            assert local_memory_bytes(tile, block, H200) == total
            if tile.reads_ahead(*sizes):
                assert count > MIN_STAGES


def test_steps_of_the_projection_follow_each_other_where_there_are_registers():
    """Of sums a thread has one for every 256 of a pass."""
    wide = replace(TILE, pass_tiles=16)
    assert [tile.sum_registers(144) for tile in (TILE, wide)] == [72, 144]
    assert wide.sum_registers(128) == GROUP_REGISTERS
    assert [TILE.group(144), wide.group(128), wide.group(144), replace(TILE, step=64).group(8)] == [4, 4, 2, 2]
    assert wide.reads_ahead(18, 24, 96, 128, 6) and not wide.reads_ahead(18, 24, 96, 144, 6)


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"piece": 1}, "piece=1 is not one of 2, 4"),
        ({"piece": 8}, "piece=8 is not one of 2, 4"),
        ({"pass_tiles": 4}, "pass_tiles=4 is not one of 8, 16"),
        ({"pass_tiles": 32}, "pass_tiles=32 is not one of 8, 16"),
        ({"step": 16}, "step=16 is not one of 32, 64"),
        ({"step": 128}, "step=128 is not one of 32, 64"),
        ({"stages": 1}, "stages=1 is not between 2 and 8"),
        ({"stages": 9}, "stages=9 is not between 2 and 8"),
    ],
    ids=str,
)
def test_malformed_tiles(changes, reason):
    assert why_malformed(TILE) is None and why_invalid(TILE, shape(), H200) is None
    assert why_malformed(replace(TILE, **changes)) == reason
    assert why_invalid(replace(TILE, **changes), shape(), H200) == reason


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"dtype": "float32"}, "dtype float32 is not supported, use one of float16, bfloat16"),
        ({"activation": "gelu"}, "activation gelu is not supported, use relu or silu"),
        ({"kernel_size": 7}, "kernel size 7 with group width 8 is not supported, use 3 or 5 and 8"),
        ({"channels": 32, "group_width": 16}, "kernel size 3 with group width 16 is not supported, use 3 or 5 and 8"),
        ({"channels": 12}, "in_channels=12 is not supported, use a multiple of 8"),
        ({"out_channels": 12}, "out_channels=12 is not supported, use a multiple of 8"),
        (
            {"batch": MAX_IMAGES + 1},
            "1048577 images are too many for a launch, split the batch: 1048576 are the limit",
        ),
        (
            {"channels": 8, "size": (2**14, 2**12), "batch": 1},
            "images of 16384x4096 pixels are too large, split them: 2**31 elements of the input, hidden or output "
            "tensor are the limit",
        ),
    ],
    ids=str,
)
def test_blocks_that_are_not_supported(options, reason):
    block = shape(**options)
    assert why_unsupported(shape()) is None
    assert why_unsupported(block) == reason
    assert why_none(block, H200) == reason
    assert why_invalid(TILE, block, H200) == reason
    assert not list(candidate_tiles(block, H200))


def test_offsets_within_an_image_and_its_workspace_fit_32_bits():
    """The workspace has whole sweeps of hidden channels."""
    size = 4096, 4080
    assert 4096 * 4080 * 128 < 2**31 <= 4096 * 4096 * 128
    for channels in ((128, 128, 128), (8, 8, 8)):
        assert why_too_large(TILE, *size, *channels) is None
        assert "images of 4096x4096 pixels are too large, split them" in why_too_large(TILE, 4096, 4096, *channels)
    for channels in ((136, 8, 8), (8, 136, 8), (8, 8, 136)):
        assert "images of 4096x4080 pixels are too large, split them" in why_too_large(TILE, *size, *channels)


@pytest.mark.parametrize(
    "block, processor, reason",
    [
        (shape(), "a100", "it is for compute capability 9.0, a100 has 8.0"),
        (shape(), "b200", "it is for compute capability 9.0, b200 has 10.0"),
        (
            shape(512, (18, 18), expansion=4),
            "h200",
            "about 294 registers a thread would spill, 255 are available: expansion weights of 512 channels, sums of "
            "512 output channels and weights of 128 squeeze channels stay in registers",
        ),
        (
            shape(128, (56, 56), expansion=4),
            "h200",
            "input, hidden channels and weights of .* KB do not fit the 227 KB of local memory that h200 has",
        ),
    ],
    ids=["a100", "b200", "registers", "memory"],
)
def test_tiles_that_a_processor_cannot_run(block, processor, reason):
    with pytest.raises(PlanError, match=f"cannot run .*{reason}.*; leave the tile to the planner"):
        plan_block(graph(block.in_channels, (block.height, block.width), expansion=4), processor, TILE)
    with pytest.raises(PlanError, match=f"no tile fits .*Hopper kernel for larger images: {reason}; run the block"):
        plan_block(
            graph(block.in_channels, (block.height, block.width), expansion=4),
            processor,
            kernel="mbconv_windows_hopper",
        )


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_candidates_are_valid_or_there_is_a_reason(size):
    """What a processor cannot hold is refused."""
    for block in shapes(size):
        tiles = list(candidate_tiles(block, H200))
        assert len(set(tiles)) == len(tiles)
        assert bool(tiles) != bool(why_none(block, H200))
        assert tiles or block.in_channels * block.width > 64 * 28
        for tile in tiles:
            assert why_invalid(tile, block, H200) is None
            assert local_memory_bytes(tile, block, H200) <= H200.local_memory_bytes
            assert estimated_registers(tile, block) <= MAX_REGISTERS
            assert programs_per_processor(tile, block, H200) == 1
            assert MBConvWindowsHopperTile(*tile.to_ints()) == tile


@pytest.mark.parametrize("channels, size", [(24, (18, 18)), (40, (28, 28)), (24, (56, 56)), (128, (14, 30))], ids=str)
def test_candidates_are_of_every_design(channels, size):
    """With both steps; all numbers of stages but those for which there is no room are tried."""
    block = shape(channels, size, expansion=4)
    tiles = list(candidate_tiles(block, H200))
    assert TRIED_STAGES == (6, 4, 3, 2)
    assert {(tile.piece, tile.pass_tiles) for tile in tiles} == DESIGNS
    assert {tile.step for tile in tiles} == set(STEPS)
    for sizes in product(PIECES, PASS_TILES, STEPS, range(MIN_STAGES, MAX_STAGES + 1)):
        tile = MBConvWindowsHopperTile(*sizes)
        is_valid = why_invalid(tile, block, H200) is None
        assert (tile in tiles) == (is_valid and tile.stages in TRIED_STAGES), tile


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    "channels, size, processor",
    [
        *((channels, size, "h200") for channels in (24, 40) for size in ((18, 18), (28, 28), (56, 56), (14, 30))),
        (128, (32, 32), "h200"),
        (24, (28, 28), "h100"),
    ],
    ids=str,
)
def test_the_planner_takes_it_for_larger_images(channels, size, processor, dtype):
    block = graph(channels, size, dtype=dtype)
    plan = plan_block(block, processor)
    assert plan.family is MBCONV_WINDOWS_HOPPER and family_of(plan.tile) is MBCONV_WINDOWS_HOPPER
    assert plan.kernel == "mbconv_windows_hopper" and plan.tile in candidate_tiles(plan.shape, PROCESSORS[processor])
    assert plan.program.name == "fused" and len(plan.program.kernels) == 1
    hidden, (height, width) = 6 * channels, size
    weights = hidden * (2 * channels + 9 * 8 + 2 * (channels // 4))
    activations = 2 * 128 * height * width * channels
    assert plan.bytes == 2 * (activations + weights), "the input, the output and the weights, once each"
    assert "mbconv_windows_hopper" in str(plan) and repr(plan.tile) in str(plan)
    assert "rejected portable kernels: predicted" in str(plan)
    assert f"rejected Hopper kernel: images of {height}x{width} pixels are too large" in str(plan)
    again = plan_block(block, processor, tile=plan.tile)
    assert (again.tile, again.bytes) == (plan.tile, plan.bytes)


@pytest.mark.parametrize("size", [(56, 56), (28, 28), (14, 14), (7, 7)], ids=str)
def test_the_planner_takes_it_for_5x5_convolutions(size):
    """Of small images too: no other Hopper kernel has them. They need more registers, and move more weights."""
    plan = plan_block(graph(40, size, kernel_size=5), "h200")
    assert plan.family is MBCONV_WINDOWS_HOPPER and plan.shape.kernel_size == 5
    assert "rejected Hopper kernel: kernel size 5 with group width 8 is not supported, use 3 and 8" in str(plan)
    narrow = replace(plan.shape, kernel_size=3)
    assert estimated_registers(plan.tile, plan.shape) > estimated_registers(plan.tile, narrow)
    assert predicted_us(plan.tile, plan.shape, H200) > predicted_us(plan.tile, narrow, H200)
    assert local_memory_bytes(plan.tile, plan.shape, H200) == local_memory_bytes(plan.tile, narrow, H200)


@pytest.mark.parametrize("channels, size", [(128, (16, 16)), (24, (16, 16)), (144, (8, 8)), (40, (14, 14))], ids=str)
def test_small_images_stay_with_the_kernel_that_holds_them(channels, size):
    """Although this one could run them, too."""
    assert families_of(shape()) == (MBCONV_HOPPER, MBCONV_WINDOWS_HOPPER, MBCONV), "in order of preference"
    block = graph(channels, size, expansion=4)
    plan = plan_block(block, "h200")
    assert plan.family is MBCONV_HOPPER
    assert "rejected Hopper kernel for larger images: predicted" in str(plan)
    assert plan_block(block, "h200", kernel="mbconv_windows_hopper").family is MBCONV_WINDOWS_HOPPER


@pytest.mark.parametrize(
    "options, processor, reason",
    [
        ({"channels": 32, "group_width": 16}, "h200", "kernel size 3 with group width 16 is not supported"),
        ({"activation": "gelu"}, "h200", "activation gelu is not supported, use relu or silu"),
        ({"channels": 512}, "h200", "registers a thread would spill"),
        ({"channels": 128, "size": (56, 56)}, "h200", "do not fit the 227 KB of local memory"),
        ({}, "a100", "it is for compute capability 9.0, a100 has 8.0"),
    ],
    ids=str,
)
def test_other_blocks_and_processors_take_the_portable_kernels(options, processor, reason):
    plan = plan_block(graph(**options), processor)
    assert plan.family is MBCONV and plan.kernel == "mbconv"
    rejected = [rejection.why for rejection in plan.rejected if rejection.what == "Hopper kernel for larger images"]
    assert len(rejected) == 1 and reason in rejected[0]
    with pytest.raises(PlanError, match=reason):
        plan_block(graph(**options), processor, kernel="mbconv_windows_hopper")


def test_the_portable_kernels_can_be_asked_for():
    for options in ({"kernel": "mbconv"}, {"portable": True}):
        assert plan_block(graph(), "h200", **options).family is MBCONV


def test_a_tile_of_another_family_is_refused():
    with pytest.raises(PlanError, match="is for other blocks than"):
        plan_block(graph(stride=2), "h200", TILE)


MEASURED = [
    # Stride, kernel size, height = width, channels, the best tile, and its microseconds at batch 128.
    (1, 3, 56, (24, 144, 24, 6), (4, 16, 64, 3), 218.1),
    (1, 3, 18, (104, 416, 104, 26), (4, 8, 64, 3), 82.6),
    (1, 3, 18, (104, 624, 128, 26), (4, 8, 64, 6), 92.9),
    (1, 3, 18, (128, 768, 128, 32), (4, 8, 64, 6), 116.4),
    (1, 3, 28, (80, 480, 80, 20), (4, 8, 64, 3), 132.5),
    (1, 3, 32, (64, 256, 64, 16), (4, 16, 64, 3), 96.7),
    (1, 5, 28, (40, 240, 40, 10), (4, 16, 64, 3), 90.3),
    (1, 5, 14, (80, 480, 112, 20), (2, 16, 64, 3), 47.0),
    (1, 5, 14, (112, 672, 112, 28), (2, 16, 64, 3), 79.7),
    (1, 5, 7, (192, 1152, 192, 48), (2, 8, 64, 3), 69.1),
    (1, 5, 32, (64, 256, 64, 16), (4, 16, 64, 3), 134.1),
    (2, 3, 112, (16, 96, 24, 4), (4, 16, 64, 3), 202.8),
    (2, 3, 36, (48, 192, 104, 12), (4, 8, 32, 3), 62.1),
    (2, 3, 18, (128, 768, 208, 32), (4, 8, 32, 6), 75.8),
    (2, 3, 56, (40, 240, 80, 10), (4, 8, 32, 6), 127.3),
    (2, 3, 32, (64, 256, 128, 16), (4, 8, 32, 3), 51.1),
    (2, 5, 56, (24, 144, 40, 6), (4, 8, 64, 6), 169.2),
    (2, 5, 14, (112, 672, 192, 28), (4, 8, 64, 3), 52.3),
]


@pytest.mark.parametrize("row", MEASURED, ids=str)
def test_predictions_of_the_measured_blocks(row):
    """On an H200 or an H100: 15 % off at most, and the planned tile is predicted to be no slower."""
    stride, kernel_size, size, (channels, hidden, out_channels, squeeze), tile, measured = row
    options = {"stride": stride, "blur": stride == 1, "kernel_size": kernel_size, "squeeze_channels": squeeze}
    block = mbconv(128, size, size, channels, None, hidden, out_channels, **options)
    kernel = "mbconv_windows_hopper" if stride == 1 else "mbconv_down_windows_hopper"
    plan = plan_block(block, "h200", kernel=kernel)
    predicted = predicted_us(family_of(plan.tile).tile_type(*tile), plan.shape, H200)
    assert abs(predicted / measured - 1) < 0.15
    assert plan.predicted_us <= predicted + 0.01

from dataclasses import replace
from itertools import product
from math import ceil

import pytest

from fusion.planner.blocks import mbconv
from fusion.planner.families import (
    MBCONV_DOWN,
    MBCONV_DOWN_HOPPER,
    MBCONV_DOWN_WINDOWS_HOPPER,
    families_of,
    family_named,
    family_of,
)
from fusion.planner.match import match_mbconv_down
from fusion.planner.mbconv_hopper_tile import (
    COMPILER_BYTES,
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
TILE = MBConvDownWindowsHopperTile(piece=4, pass_tiles=8, step=32, stages=4)
KERNEL = "mbconv_down_windows_hopper"
HEIGHTS = range(1, 131)
SIZES = [(17, 19), (18, 18), (28, 28), (56, 56), (14, 30), (21, 33), (61, 20), (5, 100), (1, 40), (112, 112), (2, 3)]
CHANNELS = [
    # C, hidden, K, squeeze
    (8, 8, 8, 1),
    (16, 64, 16, 4),
    (24, 144, 40, 6),
    (40, 240, 80, 10),
    (64, 256, 200, 16),
    (112, 672, 192, 28),
    (144, 576, 144, 36),
]


def graph(channels=24, out_channels=40, size=(56, 56), batch=128, expansion=6, **options):
    options = {"out_channels": out_channels, "stride": 2, "blur": False, **options}
    return mbconv(batch, *size, channels, expansion, **options)


def shape(*arguments, **options):
    return match_mbconv_down(graph(*arguments, **options))


def shapes(size, kernel_size):
    return [
        shape(c, k, size, 3, None, hidden_channels=hidden, squeeze_channels=squeeze, kernel_size=kernel_size)
        for c, hidden, k, squeeze in CHANNELS
    ]


def test_the_fields_must_be_positive_integers_and_travel_as_integers():
    assert TILE.to_ints() == [4, 8, 32, 4]
    assert MBConvDownWindowsHopperTile(*TILE.to_ints()) == TILE
    assert MBConvWindowsHopperTile(*TILE.to_ints()) != TILE
    for name, value in product(("piece", "pass_tiles", "step", "stages"), (0, -1, 1.5, None)):
        message = f"MBConvDownWindowsHopperTile: {name} must be a positive integer, got {value}"
        with pytest.raises(ValueError, match=message):
            replace(TILE, **{name: value})


@pytest.mark.parametrize(
    "height, pairs, count_3, count_5",
    [
        *((1, 1, 1, 1), (15, 8, 1, 1), (16, 8, 1, 1), (17, 9, 2, 2), (28, 14, 2, 2), (29, 15, 2, 3), (30, 15, 2, 3)),
        *((31, 16, 3, 3), (56, 28, 4, 5), (112, 56, 8, 9)),
    ],
)
def test_windows(height, pairs, count_3, count_5):
    assert row_pairs(height) == pairs
    assert [TILE.windows(height, kernel_size) for kernel_size in (3, 5)] == [count_3, count_5]


def rows_of(pair, height, kernel_size):
    """Rows of the input that a row of the output, of the same number as its pair, is convolved from."""
    reach = kernel_size // 2
    return [row for row in range(2 * pair - reach, 2 * pair + reach + 1) if 0 <= row < height]


def fewest_windows(height, kernel_size):
    """Counted one by one: a window owns pairs of which it has all rows, and starts as far down as it can."""
    pairs = range(ceil(height / 2))
    count, owned = 0, 0
    while owned < len(pairs):
        top = min(rows_of(owned, height, kernel_size)) // 2
        window = range(2 * top, 2 * (top + LANES))
        own = [pair for pair in pairs[owned:] if all(row in window for row in rows_of(pair, height, kernel_size))]
        assert own == list(pairs[owned : owned + len(own)]), "pairs are owned in order"
        count, owned = count + 1, owned + len(own)
    return count


@pytest.mark.parametrize("kernel_size", [3, 5])
def test_windows_are_as_few_as_can_be(kernel_size):
    """Those of which the kernel makes: `tests/triton_kernels/test_mbconv_down_windows_hopper_offsets.py`."""
    expected = [fewest_windows(height, kernel_size) for height in HEIGHTS]
    assert [TILE.windows(height, kernel_size) for height in HEIGHTS] == expected


def test_windows_of_a_5x5_convolution_are_those_of_stride_1():
    """It needs a row above and one below a pair, whatever the stride; a 3x3 one of stride 2 needs none below."""
    other = MBConvWindowsHopperTile(*TILE.to_ints())
    assert [tile.inner_pairs(size) for tile in (TILE, other) for size in (3, 5)] == [7, 6, 6, 6]
    assert all(TILE.windows(height, 5) == other.windows(height, 5) for height in HEIGHTS)


def test_columns_are_whole_pieces():
    """Two of them at least: the first and the last one have code of their own."""
    for width in range(1, 130):
        columns = TILE.columns(width)
        assert columns % 4 == 0 and columns >= 8
        assert width <= columns < max(width + 4, 9)
        assert TILE.window_pixels(width) == 16 * columns


def test_pairs_of_pixels_cover_a_row_of_the_output():
    """Of two columns each, of which the last one may lack the second, as many as pieces that have a pixel."""
    for width in range(1, 130):
        pairs, out_width = TILE.pixel_pairs(width), ceil(width / 2)
        assert 2 * pairs - 1 <= out_width <= 2 * pairs
        assert pairs == ceil(width / TILE.piece) <= TILE.columns(width) // TILE.piece


@pytest.mark.parametrize("pass_tiles", PASS_TILES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_passes_cover_the_output(size, pass_tiles):
    """With the column that the last pair of each row lacks, and none of them is idle."""
    height, width = size
    tile = replace(TILE, pass_tiles=pass_tiles)
    assert tile.pass_pixels() == 16 * pass_tiles
    pixels = ceil(height / 2) * 2 * ceil(ceil(width / 2) / 2)
    passes = tile.passes(height, width)
    assert (passes - 1) * tile.pass_pixels() < pixels <= passes * tile.pass_pixels()


def test_workspace():
    """Hidden channels with their padding, of the output's pixels, of all passes."""
    assert TILE.workspace_elements(56, 56, 144) == 256 * 7 * 128
    assert replace(TILE, pass_tiles=16).workspace_elements(56, 56, 144) == 256 * 4 * 256
    assert TILE.workspace_elements(17, 19, 144) == 256 * 128
    assert TILE.workspace_elements(1, 1, 8) == 128 * 128
    for (height, width), pass_tiles in product(SIZES, PASS_TILES):
        tile = replace(TILE, pass_tiles=pass_tiles)
        assert tile.workspace_elements(height, width, 136) >= 2 * SWEEP * ceil(height / 2) * ceil(width / 2)


def test_the_place_of_the_input_is_used_again():
    """The output and stages of weights take no memory of their own as long as a window of the input has more."""
    assert TILE.room_bytes(56, 24, 40) == 2 * 56 * 16 * 32
    assert replace(TILE, stages=2).memory_bytes(56, 24, 144, 40, 6) == TILE.memory_bytes(56, 24, 144, 40, 6)
    narrow = TILE.room_bytes(8, 24, 40)
    assert narrow == 2 * 128 * 48 + 2 * 4 * 32 * 48 > 2 * 8 * 16 * 32


def test_memory():
    """A window of 28 columns of 48 channels is all of the room: hidden channels have a stage of 8 KB for each step."""
    sizes = 28, 40, 240, 80, 10
    bias_input, gates, squeeze = 2 * 16 * 4 * 16, 2 * 256 + 4 * 128, 4 * 32 * (1 + 8)
    fixed = 2 * 28 * 16 * 48 + bias_input + gates + squeeze + COMPILER_BYTES
    assert TILE.fixed_bytes(*sizes) == fixed
    assert TILE.hidden_stage_bytes() == 2 * 32 * 128
    assert TILE.memory_bytes(*sizes) == fixed + MAX_STAGES * 8 * 1024
    wider = replace(TILE, pass_tiles=16, step=64)
    room = 2 * 256 * 80 + 2 * 4 * 64 * 80
    assert wider.fixed_bytes(*sizes) == fixed - 2 * 28 * 16 * 48 + room
    assert wider.hidden_stage_bytes() == 4 * TILE.hidden_stage_bytes()
    assert wider.hidden_stages(*sizes) == 4


@pytest.mark.parametrize("kernel_size", [3, 5])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_candidates_are_valid_or_there_is_a_reason(size, kernel_size):
    """What a processor cannot hold is refused; stages of hidden channels fill its memory."""
    for block in shapes(size, kernel_size):
        tiles = list(candidate_tiles(block, H200))
        assert len(set(tiles)) == len(tiles)
        assert bool(tiles) != bool(why_none(block, H200))
        assert tiles or block.in_channels * block.width > 64 * 56
        sizes = block.width, block.in_channels, block.hidden_channels, block.out_channels, block.squeeze_channels
        for tile in tiles:
            assert why_invalid(tile, block, H200) is None
            assert estimated_registers(tile, block) <= MAX_REGISTERS
            assert programs_per_processor(tile, block, H200) == 1
            assert type(tile)(*tile.to_ints()) == tile and type(tile) is MBConvDownWindowsHopperTile
            stages, total = tile.hidden_stages(*sizes), local_memory_bytes(tile, block, H200)
            assert MIN_STAGES <= stages <= MAX_STAGES
            assert total == tile.fixed_bytes(*sizes) + stages * tile.hidden_stage_bytes() <= LOCAL_MEMORY_BYTES
            assert stages == MAX_STAGES or total + tile.hidden_stage_bytes() > LOCAL_MEMORY_BYTES


@pytest.mark.parametrize("kernel_size", [3, 5])
@pytest.mark.parametrize("channels, size", [(24, (56, 56)), (40, (28, 28)), (16, (112, 112)), (104, (18, 18))], ids=str)
def test_candidates_are_of_every_design(channels, size, kernel_size):
    """With both steps; all numbers of stages but those for which there is no room are tried."""
    block = shape(channels, 2 * channels, size, expansion=4, kernel_size=kernel_size)
    tiles = list(candidate_tiles(block, H200))
    assert {(tile.piece, tile.pass_tiles) for tile in tiles} == {(4, 8), (4, 16)}
    assert {tile.step for tile in tiles} == set(STEPS)
    for sizes in product(PASS_TILES, STEPS, range(MIN_STAGES, MAX_STAGES + 1)):
        tile = MBConvDownWindowsHopperTile(4, *sizes)
        is_valid = why_invalid(tile, block, H200) is None
        assert (tile in tiles) == (is_valid and tile.stages in TRIED_STAGES), tile


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"piece": 2}, "piece=2 is not one of 4"),
        ({"piece": 8}, "piece=8 is not one of 4"),
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
        (
            {"blur": True},
            "a blur-pool is not supported, use an MBConvDownTile, or up to 32x32 pixels an MBConvDownHopperTile",
        ),
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
    """The workspace has whole sweeps of hidden channels, of a quarter of the pixels."""
    assert 4096 * 2 * 2046 * 128 < 2**31 <= 4096 * 4096 * 128
    assert why_too_large(TILE, 8192, 8184, 8, 128, 8) is None
    assert "images of 8192x8192 pixels are too large, split them" in why_too_large(TILE, 8192, 8192, 8, 128, 8)
    for channels in ((40, 8, 8), (8, 136, 8), (8, 8, 40)):
        assert "images of 8192x8184 pixels are too large, split them" in why_too_large(TILE, 8192, 8184, *channels)


@pytest.mark.parametrize(
    "block, processor, reason",
    [
        (graph(), "a100", "it is for compute capability 9.0, a100 has 8.0"),
        (graph(kernel_size=5), "b200", "it is for compute capability 9.0, b200 has 10.0"),
        (
            graph(512, 512, (36, 36), expansion=4),
            "h200",
            "about 294 registers a thread would spill, 255 are available: expansion weights of 512 channels, sums of "
            "512 output channels and weights of 128 squeeze channels stay in registers",
        ),
        (
            graph(128, 128, (56, 56), expansion=4),
            "h200",
            "input, hidden channels and weights of .* KB do not fit the 227 KB of local memory that h200 has",
        ),
    ],
    ids=["a100", "b200", "registers", "memory"],
)
def test_tiles_that_a_processor_cannot_run(block, processor, reason):
    with pytest.raises(PlanError, match=f"cannot run .*{reason}.*; leave the tile to the planner"):
        plan_block(block, processor, TILE)
    with pytest.raises(PlanError, match=f"no tile fits .*Hopper kernel for larger images: {reason}; run the block"):
        plan_block(block, processor, kernel=KERNEL)
    assert plan_block(block, processor).family is MBCONV_DOWN


def test_5x5_convolutions_take_more_registers_and_time():
    block = shape(40, 80, (28, 28))
    wide = replace(block, kernel_size=5)
    for tile in candidate_tiles(wide, H200):
        assert estimated_registers(tile, wide) > estimated_registers(tile, block)
        assert predicted_us(tile, wide, H200) > 1.1 * predicted_us(tile, block, H200)
        assert local_memory_bytes(tile, wide, H200) == local_memory_bytes(tile, block, H200)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    "channels, out_channels, size, processor",
    [
        (16, 24, (112, 112), "h200"),
        (24, 40, (56, 56), "h200"),
        (24, 40, (36, 36), "h200"),
        (48, 104, (33, 32), "h200"),
        (24, 40, (32, 34), "h200"),
        (24, 40, (56, 56), "h100"),
    ],
    ids=str,
)
def test_the_planner_takes_it_for_larger_images(channels, out_channels, size, processor, dtype):
    block = graph(channels, out_channels, size, dtype=dtype)
    plan = plan_block(block, processor)
    assert plan.family is MBCONV_DOWN_WINDOWS_HOPPER and family_of(plan.tile) is MBCONV_DOWN_WINDOWS_HOPPER
    assert plan.kernel == KERNEL and plan.tile in candidate_tiles(plan.shape, PROCESSORS[processor])
    assert plan.program.name == "fused" and len(plan.program.kernels) == 1
    hidden, (height, width) = 6 * channels, size
    weights = hidden * (channels + out_channels + 9 * 8 + 2 * (channels // 4))
    pixels = height * width * channels + ceil(height / 2) * ceil(width / 2) * out_channels
    assert plan.bytes == 2 * (128 * pixels + weights), "the input, the output and the weights, once each"
    assert KERNEL in str(plan) and repr(plan.tile) in str(plan)
    assert "rejected portable kernels: predicted" in str(plan)
    assert f"rejected Hopper kernel: images of {height}x{width} pixels are too large" in str(plan)
    again = plan_block(block, processor, tile=plan.tile)
    assert (again.tile, again.bytes) == (plan.tile, plan.bytes)


@pytest.mark.parametrize(
    "channels, out_channels, size",
    [(24, 40, (56, 56)), (112, 192, (14, 14)), (40, 80, (28, 28)), (16, 24, (7, 7))],
    ids=str,
)
def test_the_planner_takes_it_for_5x5_convolutions(channels, out_channels, size):
    """Of small images too: no other Hopper kernel has them."""
    plan = plan_block(graph(channels, out_channels, size, kernel_size=5), "h200")
    assert plan.family is MBCONV_DOWN_WINDOWS_HOPPER and plan.shape.kernel_size == 5
    assert "rejected Hopper kernel: kernel size 5 with group width 8 is not supported, use 3 and 8" in str(plan)


@pytest.mark.parametrize("size", [(32, 32), (31, 29), (14, 14)], ids=str)
def test_small_images_stay_with_the_kernel_that_holds_them(size):
    """Although this one could run them, too."""
    preferred = MBCONV_DOWN_HOPPER, MBCONV_DOWN_WINDOWS_HOPPER, MBCONV_DOWN
    assert families_of(shape()) == preferred and family_named(KERNEL) is MBCONV_DOWN_WINDOWS_HOPPER
    block = graph(size=size)
    plan = plan_block(block, "h200")
    assert plan.family is MBCONV_DOWN_HOPPER
    assert "rejected Hopper kernel for larger images: predicted" in str(plan)
    assert plan_block(block, "h200", kernel=KERNEL).family is MBCONV_DOWN_WINDOWS_HOPPER


@pytest.mark.parametrize(
    "options, processor, reason",
    [
        ({"blur": True}, "h200", "a blur-pool is not supported, use an MBConvDownTile"),
        ({"channels": 32, "group_width": 16}, "h200", "kernel size 3 with group width 16 is not supported"),
        ({"activation": "gelu"}, "h200", "activation gelu is not supported, use relu or silu"),
        ({"channels": 512}, "h200", "registers a thread would spill"),
        ({"channels": 128}, "h200", "do not fit the 227 KB of local memory"),
        ({}, "a100", "it is for compute capability 9.0, a100 has 8.0"),
    ],
    ids=str,
)
def test_other_blocks_and_processors_take_the_portable_kernels(options, processor, reason):
    plan = plan_block(graph(**options), processor)
    assert plan.family is MBCONV_DOWN and plan.kernel == "mbconv_down"
    rejected = [rejection.why for rejection in plan.rejected if rejection.what == "Hopper kernel for larger images"]
    assert len(rejected) == 1 and reason in rejected[0]
    with pytest.raises(PlanError, match=reason):
        plan_block(graph(**options), processor, kernel=KERNEL)


@pytest.mark.parametrize("kernel_size", [3, 5])
def test_a_single_image_takes_the_portable_kernels(kernel_size):
    """Of which all processors compute it: this one would leave them idle."""
    plan = plan_block(graph(batch=1, kernel_size=kernel_size), "h200")
    assert plan.family is MBCONV_DOWN
    assert "rejected Hopper kernel for larger images: predicted" in str(plan)


def test_the_portable_kernels_can_be_asked_for():
    for options in ({"kernel": "mbconv_down"}, {"portable": True}):
        assert plan_block(graph(), "h200", **options).family is MBCONV_DOWN


def test_a_tile_of_another_stride_is_refused():
    with pytest.raises(PlanError, match="is for other blocks than"):
        plan_block(mbconv(128, 28, 28, 40, 6), "h200", TILE)
    with pytest.raises(PlanError, match="is for other blocks than"):
        plan_block(graph(), "h200", MBConvWindowsHopperTile(*TILE.to_ints()))

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import pytest

from fusion.planner import (
    convfirst_down_hopper_tile,
    convfirst_down_tile,
    ffn_tile,
    hopper_tile,
    mbconv_down_tile,
    mbconv_hopper_tile,
    mbconv_tile,
)
from fusion.planner.blocks import convfirst, ffn, mbconv
from fusion.planner.convfirst_down_hopper_tile import ConvFirstDownHopperTile
from fusion.planner.convfirst_down_tile import ConvFirstDownTile
from fusion.planner.families import FAMILIES
from fusion.planner.ffn_tile import BLOCK_PIXELS, PARTITIONS, FfnTile
from fusion.planner.hopper_tile import HopperTile
from fusion.planner.match import (
    match_convfirst,
    match_convfirst_down,
    match_ffn,
    match_mbconv,
    match_mbconv_down,
    options_of,
)
from fusion.planner.mbconv_down_tile import MBConvDownTile
from fusion.planner.mbconv_hopper_tile import MBConvHopperTile
from fusion.planner.mbconv_tile import MBConvTile
from fusion.planner.plan import plan_block
from fusion.planner.processor import PROCESSORS
from fusion.planner.tile import (
    MAX_REGISTERS,
    TENSOR_MEMORY_COLUMNS,
    ConvFirstTile,
    estimated_registers,
    local_memory_bytes,
    tensor_memory_columns,
)
from fusion.triton_kernels import convfirst_hopper, mbconv_hopper
from fusion.triton_kernels.ahead import PROCESSOR_OF_CAPABILITY, compile_block, main
from fusion.triton_kernels.ahead_sources import RECIPES
from tests.triton_kernels.compiling_process import ahead_output, compiling

BLOCK = (64, 6, 64)
TILE = ConvFirstTile(8, 16, 32, 32, 4)
MATRIX_INSTRUCTION = {(8, 0): "hmma", (8, 9): "hmma", (9, 0): "hgmma", (10, 0): "utchmma", (12, 0): "hmma"}
MAX_STACK_BYTES = {(8, 0): 120, (8, 9): 0, (9, 0): 0, (10, 0): 0, (12, 0): 8}
"""Spills per thread, as Triton 3.6 compiles the tile."""
ALIGNMENT_BYTES = 1024
ROOT = Path(__file__).parents[2]


def shape_of(block):
    channels, expansion, size = block
    return match_convfirst(convfirst(128, size, size, channels, expansion))


def compiled_rows(*arguments):
    """What the command line tells as JSON."""
    return json.loads(ahead_output("--json", *arguments))


@pytest.mark.parametrize(
    "block, capabilities",
    [
        (BLOCK, ((8, 0), (9, 0), (10, 0))),
        ((48, 6, 64), ((8, 9), (12, 0))),
        ((24, 3, 64), ((9, 0), (10, 0))),
        ((16, 3, 128), ((8, 0), (8, 9), (12, 0))),
    ],
    ids=str,
)
def test_resources(block, capabilities):
    """Every architecture has a large and a small block."""
    options = ["--capability", *(".".join(map(str, capability)) for capability in capabilities)]
    options += ["--tile", ",".join(map(str, TILE.to_ints()))]
    rows = compiled_rows("--block", ",".join(map(str, block)), *options)
    compiled = [(tuple(row["block"]), tuple(row["capability"])) for row in rows]
    assert compiled == list(product([block], capabilities))
    for row, (_, capability) in zip(rows, compiled, strict=True):
        check_instructions(row, capability)
        check_registers(row, capability)
        check_memory(row, capability)


def check_instructions(row, capability):
    assert {name for name in ("hmma", "hgmma", "utchmma") if row[name]} == {MATRIX_INSTRUCTION[capability]}, row
    assert row["wide_copies"] > 0, row


def check_registers(row, capability):
    assert row["stack_bytes"] <= MAX_STACK_BYTES[capability], row
    estimate = min(estimated_registers(TILE, shape_of(row["block"])), MAX_REGISTERS)
    assert 0.5 * estimate <= row["registers"] <= min(1.4 * estimate, MAX_REGISTERS), row


def check_memory(row, capability):
    """The planner's estimate counts the stages of Hopper's pipelines, those of other processors may hold one less, and
    all operands that may have to be in shared memory on sm_100."""
    processor, shape = PROCESSORS[PROCESSOR_OF_CAPABILITY[capability]], shape_of(row["block"])
    estimate = local_memory_bytes(TILE, shape, processor)
    least = {(9, 0): 1, (10, 0): 0.5}.get(capability, 0.6)
    assert least * estimate <= row["shared_bytes"] <= estimate + ALIGNMENT_BYTES, row
    assert row["shared_bytes"] <= processor.local_memory_bytes, row
    # Tensor memory is handed out in powers of two.
    columns = tensor_memory_columns(TILE, shape, processor)
    assert row["tensor_columns"] <= min(2 * columns, TENSOR_MEMORY_COLUMNS), row
    assert (row["tensor_columns"] > 0) == (capability == (10, 0)), row


@pytest.mark.parametrize("activation", ["relu6", "gelu", "hardswish"])
def test_other_activations_take_the_place_of_relu(activation):
    """Products of the same kind, as much shared memory, about as many registers, and no spills."""
    shape = shape_of((24, 3, 64))
    (relu,) = compiling(compile_block, shape, TILE).values()
    (other,) = compiling(compile_block, replace(shape, activation=activation), TILE).values()
    assert other.hgmma > 0 and (other.hmma, other.stack_bytes) == (0, 0), other
    assert other.shared_bytes == relu.shared_bytes and other.registers <= 1.3 * relu.registers, other


@pytest.mark.parametrize(
    "tile, channels, share",
    [
        (ConvFirstTile(8, 8, 32, 16, 4, 2, 2), 200, False),
        (ConvFirstTile(8, 8, 32, 16, 8, 2, 2), 200, True),
        (ConvFirstTile(8, 8, 128, 64, 8, 3, 3), 64, True),
        (ConvFirstDownTile(64, 32, 16, 4, 3, 3), 128, False),
        (ConvFirstDownTile(64, 32, 16, 8, 3, 3), 128, True),
        (ConvFirstDownTile(64, 16, 64, 8, 5, 3), 128, True),
    ],
    ids=str,
)
def test_memory_where_warpgroups_share_rows(tile, channels, share):
    """There the convolution's result is in shared memory, beside the operands of the loops."""
    is_down = isinstance(tile, ConvFirstDownTile)
    graph = convfirst(8, 14, 14, channels, 2, out_channels=2 * channels, stride=2 if is_down else 1)
    shape = (match_convfirst_down if is_down else match_convfirst)(graph)
    memory = convfirst_down_tile.local_memory_bytes if is_down else local_memory_bytes
    (row,) = compiling(compile_block, shape, tile).values()
    estimate, elsewhere = (memory(tile, shape, PROCESSORS[name]) for name in ("h200", "a100"))
    convolved = 2 * tile.pixels * sum(tile.in_slabs(channels)) * (2 if is_down else 1)
    assert estimate - elsewhere == (convolved if share else 0)
    assert estimate - (convolved // 2 if share else 0) <= row.shared_bytes <= estimate + ALIGNMENT_BYTES, row


def test_resources_of_a_convolution_of_stride_2():
    """Those of the same block with stride 1: as many products and copies, and nothing spills."""
    options = ["--activation", "silu", "--tile", ",".join(map(str, TILE.to_ints()))]
    (row,) = compiled_rows("--block", "convfirst-strided:24,4,56", *options)
    graph = convfirst(128, 28, 28, 24, 4, out_channels=48, activation="silu")
    (whole,) = compiling(compile_block, match_convfirst(graph), TILE).values()
    assert row["kernel"] == "convfirst" and row["stack_bytes"] == 0
    assert [row[name] for name in SAME] == [getattr(whole, name) for name in SAME], row
    assert row["registers"] <= whole.registers + 16, row


SAME = ("hgmma", "hmma", "shared_bytes", "wide_copies", "narrow_loads")
DOWN_TILE = ConvFirstDownTile(128, 32, 16, 4)
DOWN_BLOCKS = [(24, 6, 128), (32, 6, 64)]
"""Of two slabs each."""


def test_resources_of_the_stride_2_kernel():
    """Nothing spills, products are not serialised, the taps are a loop, and its copies are as wide as told."""
    wide, *_ = down_rows(DOWN_TILE, DOWN_BLOCKS, ("9.0", "8.9"))
    (narrow,) = down_rows(replace(DOWN_TILE, copy_bytes=8), DOWN_BLOCKS[:1], ("9.0",))
    views = 2 * DOWN_TILE.conv_stages
    copies = DOWN_TILE.pixels * DOWN_TILE.conv_slab * 2 // (16 * DOWN_TILE.warps * 32)
    assert wide["wide_copies"] - narrow["wide_copies"] == views * copies, (wide, narrow)


def down_rows(tile, blocks, capabilities):
    """Resources of blocks with a tile, checked."""
    options = ["--capability", *capabilities, "--convfirst-down-tile", ",".join(map(str, tile.to_ints()))]
    rows = compiled_rows("--block", *(f"convfirst-down:{','.join(map(str, block))}" for block in blocks), *options)
    compiled = [(tuple(row["block"]), tuple(row["capability"])) for row in rows]
    assert [(block, ".".join(map(str, pair))) for block, pair in compiled] == list(product(blocks, capabilities))
    for row, ((channels, expansion, size), capability) in zip(rows, compiled, strict=True):
        graph = convfirst(128, size, size, channels, expansion, out_channels=2 * channels, stride=2)
        shape = match_convfirst_down(graph)
        assert row["stack_bytes"] == 0, row
        assert convfirst_down_tile.estimated_registers(tile, shape) == pytest.approx(row["registers"], rel=0.15), row
        processor = PROCESSORS[PROCESSOR_OF_CAPABILITY[capability]]
        estimate = convfirst_down_tile.local_memory_bytes(tile, shape, processor)
        assert 0.6 * estimate <= row["shared_bytes"] <= estimate + ALIGNMENT_BYTES, row
        check_instructions(row, capability)
        assert row["warpgroup"] < 1.5 * row["hgmma"] or capability == (8, 9), row
    return rows


@pytest.mark.parametrize(
    "block, tile",
    [
        ((32, 6, 128), (64, 32, 2, 2, 1, 32, 3)),
        ((16, 6, 128), (64, 32, 2, 1, 3, 16, 0)),
        ((24, 6, 128), (64, 32, 2, 2, 1, 16, 0, 1)),
        ((32, 6, 128), (64, 64, 2, 2, 1, 16, 2, 1)),
    ],
    ids=str,
)
def test_resources_of_the_stride_2_kernel_for_hopper(block, tile):
    """Nothing spills, products are not serialised, and the planner knows the shared memory."""
    options = ["--convfirst-down-hopper-tile", ",".join(map(str, tile))]
    (row,) = compiled_rows("--block", ",".join(map(str, block)), *options)
    assert (tuple(row["block"]), row["kernel"]) == (block, "convfirst_down_hopper")
    channels, expansion, size = block
    shape = match_convfirst_down(convfirst(128, size, size, channels, expansion, out_channels=2 * channels, stride=2))
    tile, processor = ConvFirstDownHopperTile(*tile), PROCESSORS["h200"]
    assert convfirst_down_hopper_tile.why_invalid(tile, shape, processor) is None
    assert row["hgmma"] > 0 and row["hmma"] == 0 and row["warpgroup"] < 1.5 * row["hgmma"], row
    assert row["stack_bytes"] == 0, row
    spare = convfirst_down_hopper_tile.local_memory_bytes(tile, shape, processor) - row["shared_bytes"]
    assert 0 <= spare <= (tile.partitions - 1) * hopper_tile.PARTITION_BYTES, row


@dataclass(frozen=True)
class HopperCase:
    tile: HopperTile
    blocks: tuple[tuple[int, int, int], ...]
    dtype: str = "float16"

    def __str__(self):
        return f"{','.join(map(str, self.tile.to_ints()))}-{self.dtype}"


HOPPER_CASES = [
    HopperCase(HopperTile(64, 64, 2, 2, 1, 64, 0), ((64, 3, 64),)),
    HopperCase(HopperTile(64, 32, 2, 2, 1, 64, 3), ((48, 2, 37),)),
    HopperCase(HopperTile(128, 16, 3, 1, 3, 16, 0), ((16, 3, 128),), "bfloat16"),
    HopperCase(HopperTile(64, 32, 2, 1, 2, 16, 0), ((48, 6, 64),)),
]


@pytest.mark.parametrize("case", HOPPER_CASES, ids=str)
def test_resources_of_the_hopper_kernel(case):
    blocks = [",".join(map(str, block)) for block in case.blocks]
    tile = ",".join(map(str, case.tile.to_ints()))
    rows = compiled_rows("--block", *blocks, "--hopper-tile", tile, "--dtype", case.dtype)
    assert [tuple(row["block"]) for row in rows] == list(case.blocks)
    for row in rows:
        shape, processor = shape_of(row["block"]), PROCESSORS["h200"]
        assert hopper_tile.why_invalid(case.tile, shape, processor) is None
        assert (row["hgmma"], row["hmma"]) == (matrix_products(case.tile, shape), 0), row
        assert row["warpgroup"] < 1.5 * row["hgmma"], "two fences and waits for each would be products one by one"
        assert row["stack_bytes"] == 0, row
        if case.tile.partitions == 1:
            estimate = hopper_tile.estimated_registers(case.tile, shape)
            assert estimate == pytest.approx(row["registers"], rel=0.15), row
        spare = hopper_tile.local_memory_bytes(case.tile, shape, processor) - row["shared_bytes"]
        assert 0 <= spare <= (case.tile.partitions - 1) * hopper_tile.PARTITION_BYTES, row


def matrix_products(tile, shape):
    """Of a warpgroup, m64 k16 and as wide as the product, in the kernel's code.

    The loop over blocks of pixels is there once for each partition. Within it all is unrolled, except the loop over
    groups of steps: the first group, and the body for those after it.
    """
    channels = shape.in_channels, shape.hidden_channels, shape.out_channels
    spec = convfirst_hopper.constants(shape.height, shape.width, *channels, residual=shape.residual, tile=tile)
    conv = 12 * sum(spec.in_slabs) // 16
    step = sum(spec.in_slabs) // 16 + len(spec.out_slabs) * spec.hidden // 16
    groups = min(2, spec.steps // spec.unroll)
    return tile.partitions * (conv + 2 * groups * spec.unroll * step)


def test_the_planned_tile_is_compiled_and_printed_as_a_table():
    """By the command in a process of its own, as a user runs it."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fusion.triton_kernels.ahead", "--block", "16,3,32"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=120)
    header, line = run.stdout.splitlines()
    row = dict(zip(header.split(), line.split(), strict=True))
    tile = plan_block(convfirst(128, 32, 32, 16, 3), "h200").tile
    assert (row["block"], row["capability"], row["tile"]) == ("16,3,32", "9,0", ",".join(map(str, tile.to_ints())))
    assert int(row["registers"]) > 0


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are compiled in this process")
def test_interpreted_kernels_cannot_be_compiled():
    for shape, tile in (
        (shape_of(BLOCK), TILE),
        (shape_of(BLOCK), HopperTile(64, 64, 2, 2, 1, 64, 0)),
        (match_mbconv(mbconv(1, 8, 8, 16, 4)), MBConvHopperTile(1, 4, 32, 4)),
    ):
        with pytest.raises(RuntimeError, match=r"under TRITON_INTERPRET=1.*unset it before Triton is imported"):
            compile_block(shape, tile)


def test_every_family_has_a_recipe():
    assert set(RECIPES) == {family.name for family in FAMILIES}
    options = [recipe.option for recipe in RECIPES.values()]
    assert len(set(options)) == len(options)


@pytest.mark.parametrize(
    "block, tile, dtype",
    [
        ((64, 1, 64), FfnTile(2, 64, 2, 1, 1, 1), "float16"),
        ((72, 2, 32), FfnTile(2, 64, 1, 2, 3, 0), "bfloat16"),
    ],
    ids=str,
)
def test_resources_of_the_ffn_kernel(block, tile, dtype):
    """Weights that stay, and a ring of them with slabs of two widths: products are neither repeated nor serialised."""
    options = ["--ffn-tile", ",".join(map(str, tile.to_ints())), "--dtype", dtype]
    (row,) = compiled_rows("--block", ",".join(map(str, block)), *options)
    channels, alpha, size = block
    shape = match_ffn(ffn(128, size, size, channels, alpha, dtype=dtype))
    slabs = tile.out_slabs(channels)
    products = tile.steps(shape.hidden_channels) * (sum(slabs) // 16 + len(slabs) * tile.hidden // 16)
    assert row["hgmma"] == PARTITIONS * tile.pixels // BLOCK_PIXELS * products
    assert row["warpgroup"] < row["hgmma"]
    assert row["stack_bytes"] == 0
    estimate = ffn_tile.local_memory_bytes(tile, shape, PROCESSORS["h200"])
    assert 0 <= estimate - row["shared_bytes"] < ffn_tile.COMPILER_BYTES


def test_resources_of_the_mbconv_kernels():
    """Without spills, on tensor cores, and in no more shared memory than the planner counts."""
    tile = MBConvTile(32, 16, 16, 64, 32, 32, 8, 3, 64, 32, 128, 4, 3)
    options = ["--capability", "8.0", "9.0", "--mbconv-tile", ",".join(map(str, tile.to_ints()))]
    rows = compiled_rows("--block", "mbconv:128,4,16", *options)
    compiled = [(row["kernel"], tuple(row["capability"])) for row in rows]
    assert compiled == [(kernel, capability) for capability in ((8, 0), (9, 0)) for kernel in ("produce", "project")]
    shape = match_mbconv(mbconv(128, 16, 16, 128, 4))
    for row, (_, capability) in zip(rows, compiled, strict=True):
        check_instructions(row, capability)
        assert row["stack_bytes"] == 0, row
        assert row["registers"] <= mbconv_tile.SPILL_ALLOWANCE * mbconv_tile.estimated_registers(tile, shape), row
        estimate = mbconv_tile.local_memory_bytes(tile, shape, PROCESSORS[PROCESSOR_OF_CAPABILITY[capability]])
        assert row["shared_bytes"] <= estimate + ALIGNMENT_BYTES, row


def test_resources_of_the_stride_2_mbconv_kernels():
    """On tensor cores, in the shared memory that the planner counts, with copies as wide as told and few spills."""
    tile = MBConvDownTile(128, 120, 16, 16, 64, 32, 16, 64, 4, 3, 16, 64, 32, 128, 4, 3)
    wide = mbconv_down_rows(tile, ("9.0", "8.0"))
    narrow = mbconv_down_rows(replace(tile, copy_bytes=8), ("9.0",))
    for row, narrow_row in zip(wide[:2], narrow, strict=True):
        assert (row["wide_copies"] > narrow_row["wide_copies"]) == (row["kernel"] == "produce"), (row, narrow_row)


def test_resources_of_the_stride_2_mbconv_kernels_without_a_blur():
    tile = MBConvDownTile(128, 264, 16, 16, 64, 64, 16, 128, 4, 3, 16, 64, 32, 128, 4, 3)
    mbconv_down_rows(tile, ("9.0", "8.0"), blur=False)
    mbconv_down_rows(replace(tile, conv_slab=32, quads=64), ("9.0",), blur=False)


def mbconv_down_rows(tile, capabilities, blur=True):
    """Resources of both kernels of a block with a tile, checked."""
    options = ["--capability", *capabilities, "--mbconv-down-tile", ",".join(map(str, tile.to_ints()))]
    rows = compiled_rows("--block", f"mbconv-{'down' if blur else 'strided'}:48,4,32", *options)
    compiled = [(row["kernel"], tuple(row["capability"])) for row in rows]
    kernels = [(kernel, capability) for capability in capabilities for kernel in ("produce", "project")]
    assert [(kernel, ".".join(map(str, pair))) for kernel, pair in compiled] == kernels
    shape = match_mbconv_down(mbconv(128, 32, 32, 48, 4, out_channels=96, stride=2, blur=blur))
    for row, (_, capability) in zip(rows, compiled, strict=True):
        check_instructions(row, capability)
        assert row["stack_bytes"] <= (0 if capability == (9, 0) else 32), row
        estimate = mbconv_down_tile.estimated_registers(tile, shape)
        assert row["registers"] <= (1.2 * estimate if capability == (9, 0) else MAX_REGISTERS), row
        estimate = mbconv_down_tile.local_memory_bytes(tile, shape, PROCESSORS[PROCESSOR_OF_CAPABILITY[capability]])
        assert row["shared_bytes"] <= estimate + ALIGNMENT_BYTES, row
    return rows


@pytest.mark.parametrize(
    "block, tile, most_stack_bytes",
    [
        ((128, 4, 16), MBConvHopperTile(1, 4, 32, 4), 64),
        ((144, 4, 16), MBConvHopperTile(1, 4, 32, 6), 96),
        ((128, 4, 8), MBConvHopperTile(2, 4, 32, 4), 0),
        ((144, 4, 8), MBConvHopperTile(2, 4, 64, 4), 0),
        ((24, 3, 4), MBConvHopperTile(4, 1, 32, 2), 0),
        ((24, 4, 5), MBConvHopperTile(1, 1, 32, 8), 0),
    ],
    ids=str,
)
def test_resources_of_the_mbconv_kernel_for_hopper(block, tile, most_stack_bytes):
    """Products are not serialised, next to nothing is spilled, and the planner knows the shared memory.

    Expansion and projection are products of warpgroups, the convolution is one of warps. Sweeps are in a loop one by
    one, in pairs, or with a last one that is split. Pieces are in a loop that is not unrolled.
    """
    options = ["--mbconv-hopper-tile", ",".join(map(str, tile.to_ints()))]
    (row,) = compiled_rows("--block", f"mbconv:{','.join(map(str, block))}", *options)
    assert (tuple(row["block"]), row["kernel"], row["tile"]) == (block, "mbconv_hopper", tile.to_ints())
    channels, alpha, size = block
    shape = match_mbconv(mbconv(128, size, size, channels, alpha))
    assert mbconv_hopper_tile.why_invalid(tile, shape, PROCESSORS["h200"]) is None
    assert (row["hgmma"], row["hmma"]) == mbconv_products(tile, shape), row
    assert row["warpgroup"] < 2 * row["hgmma"], "two fences and waits for each would be products one by one"
    assert row["stack_bytes"] <= most_stack_bytes, row
    estimate = mbconv_hopper_tile.local_memory_bytes(tile, shape, PROCESSORS["h200"])
    assert 0 <= estimate - row["shared_bytes"] < mbconv_hopper_tile.COMPILER_BYTES, row


def mbconv_products(tile, shape):
    """Of a warpgroup, m64 k16 and as wide as the product, and of a warp, in the kernel's code.

    It has a loop over sweeps, or pairs of them, one over pieces but for the first two and the last, and one over chunks
    of the projection's steps. A tile is convolved by six products for each of two groups.
    """
    channels = shape.in_channels, shape.hidden_channels, shape.out_channels, shape.squeeze_channels
    spec = mbconv_hopper.constants(shape.height, shape.width, *channels, **options_of(shape), tile=tile)
    if spec.at_once:
        sweeps, pieces, tiles = spec.together, spec.together, spec.together * spec.columns
    else:
        sweeps, pieces, tiles = 1, 3, 3 * spec.piece
    if spec.split:
        sweeps, pieces, tiles = sweeps + 1, pieces + 2, tiles + spec.columns // 2
    rows = max(1, spec.rows // 128)
    project = spec.passes * spec.chunk * tile.step // 16 * len(spec.products) * rows
    squeeze_and_excite = (sweeps + spec.sweeps) * spec.squeeze_depths
    return pieces * spec.depths + project, 12 * tiles + squeeze_and_excite


@pytest.mark.parametrize(
    "tile",
    [MBConvTile(8, 4, 4, 32, 32, 32, 2, 2, 16, 32, 32, 2, 2), MBConvHopperTile(4, 1, 32, 2)],
    ids=lambda tile: type(tile).__name__,
)
def test_silu_inside_of_squeeze_and_excitation_takes_the_place_of_relu(tile):
    """The same products, and no more spills."""
    shape = match_mbconv(mbconv(128, 4, 4, 24, 3))
    relu = compiling(compile_block, shape, tile)
    silu = compiling(compile_block, replace(shape, squeeze_activation="silu"), tile)
    assert relu.keys() == silu.keys()
    for name, found in silu.items():
        assert (found.hgmma, found.hmma) == (relu[name].hgmma, relu[name].hmma), found
        assert found.stack_bytes <= relu[name].stack_bytes, found


@pytest.mark.parametrize(
    "channels, hidden, out_channels, size, stride",
    [(80, 480, 112, 14, 1), (192, 1152, 192, 7, 1), (24, 144, 40, 56, 2), (112, 672, 192, 14, 2)],
)
def test_resources_of_5x5_convolutions(channels, hidden, out_channels, size, stride):
    """The portable kernels, with the planned tile: on tensor cores, without loads of single elements or spills."""
    sizes = {"hidden_channels": hidden, "out_channels": out_channels, "squeeze_channels": channels // 4}
    graph = mbconv(128, size, size, channels, **sizes, stride=stride, kernel_size=5, blur=False)
    plan = plan_block(graph, "h200", portable=True)
    found = compiling(compile_block, plan.shape, plan.tile)["produce"]
    assert found.hmma + found.hgmma > 0 and found.wide_copies > 0, found
    assert (found.stack_bytes, found.narrow_loads) == (0, 0), found


def test_unsupported_blocks_are_refused():
    shape = match_convfirst(convfirst(1, 8, 8, 16, 3, dtype="float32"))
    with pytest.raises(ValueError, match=r"does not run .*dtype float32 is not supported, use one of float16"):
        compiling(compile_block, shape, TILE)
    shape = match_convfirst(convfirst(1, 8, 8, 16, 3, activation="silu"))
    with pytest.raises(ValueError, match=r"does not run .*activation silu is not supported, use relu"):
        compiling(compile_block, shape, HopperTile(64, 64, 2, 2, 1, 64, 0))
    with pytest.raises(ValueError, match=r"does not run .*HopperTile is for compute capability 9.0 only"):
        compiling(compile_block, shape_of(BLOCK), HopperTile(64, 64, 2, 2, 1, 64, 0), (8, 0))
    for options, tile, message in (
        ({"group_width": 16}, (1, 4, 32, 4), "kernel size 3 with group width 16 is not supported, use 3 and 8"),
        ({}, (1, 3, 32, 4), "piece=3 is not one of 1, 2, 4"),
        ({}, (4, 1, 32, 4), "4 bands of 4 rows and up to 4 columns do not cover images of 8x8 pixels"),
        ({}, (2, 2, 32, 4), "4 columns of each of 2 bands cannot be computed 2 at a time"),
    ):
        with pytest.raises(ValueError, match=f"does not run .*{message}"):
            compiling(compile_block, match_mbconv(mbconv(1, 8, 8, 16, 4, **options)), MBConvHopperTile(*tile))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--block", "64,6"],
            "head: if you like, got '64,6'",
        ),
        (["--block", "64,6,64", "--capability", "7.0"], "compute capability 7.0 is not supported, use one of 8.0"),
        (["--block", "64,6,64", "--tile", "8,16"], "'8,16' does not have the fields of ConvFirstTile"),
        (["--block", "64,6,64", "--hopper-tile", "8"], "'8' does not have the fields of HopperTile, 7"),
        (["--block", "64,6,64", "--ffn-tile", "8"], "'8' does not have the fields of FfnTile, 6"),
        (["--block", "64,6,64", "--mbconv-down-tile", "8"], "'8' does not have the fields of MBConvDownTile, 16"),
        (["--block", "64,6,64", "--mbconv-tile", "8"], "'8' does not have the fields of MBConvTile, 13"),
        (
            ["--block", "mbconv:64,4,8", "--mbconv-hopper-tile", "1,4,32"],
            "'1,4,32' does not have the fields of MBConvHopperTile, 4",
        ),
        (["--block", "resnet:64,6,64"], "a block is CHANNELS,EXPANSION,SIZE, after convfirst: or convfirst-down: or"),
        (["--block", "64,6,64", "--convfirst-down-tile", "8"], "'8' does not have the fields of ConvFirstDownTile, 4"),
        (
            ["--block", "64,6,64", "--hopper-tile", "64,64,2,2,1,64,0", "--capability", "8.0"],
            "HopperTile is for compute capability 9.0 only, leave --capability out",
        ),
        (
            ["--block", "64,6,64", "--ffn-tile", "2,64,2,6,6,1", "--capability", "8.0"],
            "FfnTile is for compute capability 9.0 only, leave --capability out",
        ),
        (
            ["--block", "mbconv:64,4,8", "--mbconv-hopper-tile", "1,4,32,4", "--capability", "9.0", "10.0"],
            "MBConvHopperTile is for compute capability 9.0 only, leave --capability out",
        ),
        (
            ["--block", "mbconv:64,4,8", "--mbconv-hopper-tile", "1,4,32,4", "--mbconv-tile", "8"],
            "argument --mbconv-tile: ",
        ),
    ],
)
def test_arguments_are_checked(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err

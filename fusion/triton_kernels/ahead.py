"""Compile kernels ahead of time, on a machine with or without a GPU, and read what the compiler made of them.

`python -m fusion.triton_kernels.ahead --block 64,6,64 --capability 8.0 9.0` prints registers, spills, shared memory and
matrix instructions of each combination; `--hopper-tile 64,64,2,2,1,64,0` does so for the Hopper kernel, and
`--ffn-tile 2,64,2,4,4,1` for that of the FFN. `--block mbconv:128,4,16` compiles the two portable kernels of
an MBConv block, `--mbconv-hopper-tile 1,4,32,6` the one for Hopper. `--block mbconv-down:48,4,32` does so for an MBConv
block of stride 2 with twice as many output as input channels, and so does `--mbconv-down-hopper-tile 32,6,1`.
`--block convfirst-down:32,6,128` is such a ConvFirst block, `--convfirst-down-tile 256,64,16,8` a tile of its portable
kernel. `--block stem:3,32,256 head:128,1280,8` are a network's stem and head, with their output channels in place of
the expansion.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from fusion.planner import (
    convfirst_down_tile,
    ffn_tile,
    head_tile,
    hopper_tile,
    mbconv_down_hopper_tile,
    mbconv_down_tile,
    mbconv_hopper_tile,
    mbconv_tile,
    stem_tile,
)
from fusion.planner.blocks import conv, convfirst, ffn, head, mbconv
from fusion.planner.convfirst_down_tile import ConvFirstDownTile
from fusion.planner.families import MBCONV, MBCONV_DOWN, Tile
from fusion.planner.ffn_tile import FfnTile
from fusion.planner.head_tile import HeadTile
from fusion.planner.hopper_tile import WARPS, HopperTile
from fusion.planner.match import (
    BlockShape,
    ConvFirstDownShape,
    ConvFirstShape,
    FfnShape,
    HeadShape,
    MBConvDownShape,
    MBConvShape,
    StemShape,
)
from fusion.planner.mbconv_down_hopper_tile import MBConvDownHopperTile
from fusion.planner.mbconv_down_tile import MBConvDownTile
from fusion.planner.mbconv_hopper_tile import MBConvHopperTile
from fusion.planner.mbconv_tile import MBConvTile
from fusion.planner.plan import block_shape, plan_block
from fusion.planner.stem_tile import StemTile
from fusion.planner.tile import ConvFirstTile, why_unsupported
from fusion.triton_kernels import convfirst as portable
from fusion.triton_kernels import convfirst_down, ffn_hopper, mbconv_down, mbconv_down_hopper, mbconv_hopper
from fusion.triton_kernels import convfirst_hopper as hopper
from fusion.triton_kernels import head as head_kernels
from fusion.triton_kernels import mbconv as mbconv_kernels
from fusion.triton_kernels import stem as stem_kernels
from fusion.triton_kernels.convfirst import convfirst_kernel
from fusion.triton_kernels.convfirst_hopper import convfirst_hopper_kernel
from fusion.triton_kernels.hopper_layouts import box_layout, flat_layout

PROCESSOR_OF_CAPABILITY = {
    (8, 0): "a100",
    (8, 6): "a5000",
    (8, 9): "rtx4090",
    (9, 0): "h200",
    (10, 0): "b200",
    (12, 0): "rtx4090",
}
"""For whom the tile is planned: an older processor with the same local memory where the planner knows none."""
TYPES = {"float16": "fp16", "bfloat16": "bf16"}
Block = tuple[str, int, int, int]
"""Type, channels, expansion or, of a stem or head, output channels, height = width."""
BLOCK_NAMES = ("convfirst", "convfirst-down", "mbconv", "mbconv-down", "stem", "head")
"""Types of blocks that have no tile of their own to tell them."""
POINTER_ALIGNMENT = 16
"""Of PyTorch's allocations, in bytes. The compiler must know it to load and copy 16 bytes at a time."""
WARP_SIZE = 32


@dataclass(frozen=True)
class Resources:
    """What one program of a compiled kernel uses, and instructions in its code.

    `registers` are 32-bit and counted per thread, as are the `stack_bytes`, where registers spill to. `shared_bytes`
    and `tensor_columns` are per program: of the tensor memory that sm_100 has, 512 columns are all there are. The rest
    counts instructions: matrix products of sm_80 (`hmma`), sm_90 (`hgmma`) and sm_100 (`utchmma`), `warpgroup`, fences
    and waits of sm_90's products, two for each where they are serialised, `wide_copies`, asynchronous copies of 16
    bytes from global to shared memory, and `narrow_loads`, loads of less than 4 bytes from global memory.
    """

    registers: int
    stack_bytes: int
    shared_bytes: int
    tensor_columns: int
    hmma: int
    hgmma: int
    utchmma: int
    warpgroup: int
    wide_copies: int
    narrow_loads: int


def compile_convfirst(
    shape: ConvFirstShape, tile: ConvFirstTile, compute_capability: tuple[int, int] = (9, 0)
) -> Resources:
    """Compile the ConvFirst kernel for a block, a tile and a compute capability; no GPU is needed.

    Raises ValueError for a block that no tile runs, and RuntimeError under TRITON_INTERPRET=1. A tile that asks for
    more than a GPU has may compile: compare the result with the GPU's memories.
    """
    _refuse_interpreter()
    _refuse(shape, why_unsupported(shape))
    values = portable.constants(
        shape.in_channels,
        shape.hidden_channels,
        shape.out_channels,
        activation=shape.activation,
        residual=shape.residual,
        tile=tile,
    )
    signature = {name: _argument_type(name, values, shape.dtype) for name in convfirst_kernel.arg_names}
    return _compile(ASTSource, convfirst_kernel, signature, values, compute_capability, {"num_warps": tile.warps})


def compile_convfirst_hopper(shape: ConvFirstShape, tile: HopperTile) -> Resources:
    """Compile the Hopper kernel for a block and a tile, for compute capability 9.0; no GPU is needed.

    Raises ValueError for a block that no tile runs and for a malformed tile, and RuntimeError under TRITON_INTERPRET=1.
    """
    _refuse_interpreter()
    _refuse(shape, hopper_tile.why_unsupported(shape) or hopper_tile.why_malformed(tile, shape.hidden_channels))
    spec = hopper.constants(
        shape.height,
        shape.width,
        shape.in_channels,
        shape.hidden_channels,
        shape.out_channels,
        residual=shape.residual,
        tile=tile,
    )
    values = {"S": spec}
    signature = {name: _argument_type(name, values, shape.dtype) for name in convfirst_hopper_kernel.arg_names}
    for name, box, layout in (
        ("x_desc", hopper.descriptor_box(spec), box_layout(spec.slab)),
        ("weights_desc", hopper.weights_box(spec), flat_layout()),
    ):
        signature[name] = f"tensordesc<{TYPES[shape.dtype]}{box},{layout!r}>"
    options = {"num_warps": WARPS, "maxnreg": tile.register_limit}
    return _compile(GluonASTSource, convfirst_hopper_kernel, signature, values, hopper_tile.COMPUTE_CAPABILITY, options)


def compile_convfirst_down(
    shape: ConvFirstDownShape, tile: ConvFirstDownTile, compute_capability: tuple[int, int] = (9, 0)
) -> Resources:
    """Compile the portable kernel of a stride-2 ConvFirst block for a tile and a compute capability; no GPU is needed.

    Raises ValueError for a block that no tile runs and for a malformed tile, and RuntimeError under TRITON_INTERPRET=1.
    """
    _refuse_interpreter()
    _refuse(shape, convfirst_down_tile.why_unsupported(shape) or convfirst_down_tile.why_malformed(tile))
    values = convfirst_down.constants(
        shape.in_channels, shape.hidden_channels, shape.out_channels, activation=shape.activation, tile=tile
    )
    kernel = convfirst_down.convfirst_down_kernel
    signature = {name: _argument_type(name, values, shape.dtype) for name in kernel.arg_names}
    return _compile(ASTSource, kernel, signature, values, compute_capability, {"num_warps": tile.warps})


def compile_ffn_hopper(shape: FfnShape, tile: FfnTile) -> Resources:
    """Compile the FFN kernel for a block and a tile, for compute capability 9.0; no GPU is needed.

    Raises ValueError for a block that no tile runs and for a malformed tile, and RuntimeError under TRITON_INTERPRET=1.
    """
    _refuse_interpreter()
    _refuse(shape, ffn_tile.why_unsupported(shape) or ffn_tile.why_malformed(tile, shape.hidden_channels))
    spec = ffn_hopper.constants(
        shape.in_channels, shape.hidden_channels, shape.out_channels, residual=shape.residual, tile=tile
    )
    boxes = ffn_hopper.descriptor_boxes(spec)
    arguments = ffn_hopper.ffn_hopper_kernel.arg_names
    values = {name: None for name in arguments if name.endswith("_desc") and name not in boxes} | {"S": spec}
    signature = {name: _argument_type(name, values, shape.dtype) for name in arguments}
    for name, box in boxes.items():
        signature[name] = f"tensordesc<{TYPES[shape.dtype]}{box},{ffn_hopper.descriptor_layout(box)!r}>"
    signature["hidden_bias_ptr"] = f"*{TYPES[shape.dtype]}"
    options = {"num_warps": ffn_tile.WARPS}
    capability = ffn_tile.COMPUTE_CAPABILITY
    return _compile(GluonASTSource, ffn_hopper.ffn_hopper_kernel, signature, values, capability, options)


def compile_mbconv_hopper(shape: MBConvShape, tile: MBConvHopperTile) -> Resources:
    """Compile the Hopper kernel of an MBConv block for a tile, for compute capability 9.0; no GPU is needed.

    Raises ValueError for a block that no tile runs and for a tile that does not fit it, and RuntimeError under
    TRITON_INTERPRET=1.
    """
    _refuse_interpreter()
    _refuse(
        shape,
        mbconv_hopper_tile.why_unsupported(shape)
        or mbconv_hopper_tile.why_malformed(tile)
        or mbconv_hopper_tile.why_not_covering(tile, shape.height, shape.width),
    )
    spec = mbconv_hopper.constants(
        shape.height,
        shape.width,
        shape.in_channels,
        shape.hidden_channels,
        shape.out_channels,
        shape.squeeze_channels,
        activation=shape.activation,
        residual=shape.residual,
        tile=tile,
    )
    boxes = mbconv_hopper.descriptor_boxes(spec)
    return _compile_mbconv_hopper(mbconv_hopper.mbconv_hopper_kernel, shape.dtype, {"S": spec}, boxes)


def compile_mbconv_down_hopper(shape: MBConvDownShape, tile: MBConvDownHopperTile) -> Resources:
    """Compile the Hopper kernel of a stride-2 MBConv block for a tile, for compute capability 9.0; no GPU is needed.

    Raises ValueError for a block that no tile runs and for a malformed tile, and RuntimeError under TRITON_INTERPRET=1.
    """
    _refuse_interpreter()
    _refuse(shape, mbconv_down_hopper_tile.why_unsupported(shape) or mbconv_down_hopper_tile.why_malformed(tile))
    channels = shape.in_channels, shape.hidden_channels, shape.out_channels, shape.squeeze_channels
    spec = mbconv_down_hopper.constants(shape.height, shape.width, *channels, activation=shape.activation, tile=tile)
    boxes = mbconv_hopper.descriptor_boxes(spec.projected)
    return _compile_mbconv_hopper(mbconv_down_hopper.mbconv_down_hopper_kernel, shape.dtype, {"D": spec}, boxes)


def _compile_mbconv_hopper(
    kernel: triton.JITFunction, dtype: str, spec: dict[str, object], boxes: dict[str, list[int]]
) -> Resources:
    arguments = kernel.arg_names
    values = {name: None for name in arguments if name.endswith("_desc") and name not in boxes} | spec
    signature = {name: _argument_type(name, values, dtype) for name in arguments}
    for name, box in boxes.items():
        signature[name] = f"tensordesc<{TYPES[dtype]}{box},{flat_layout()!r}>"
    signature |= dict.fromkeys(("expand_ptr", "squeeze_ptr", "excite_ptr"), "*i32")
    options = {"num_warps": mbconv_hopper_tile.WARPS}
    return _compile(GluonASTSource, kernel, signature, values, mbconv_hopper_tile.COMPUTE_CAPABILITY, options)


def compile_mbconv(
    shape: MBConvShape, tile: MBConvTile, compute_capability: tuple[int, int] = (9, 0), *, ordered: bool = False
) -> dict[str, Resources]:
    """Compile the two MBConv kernels for a block, a tile and a compute capability, by name; no GPU is needed.

    Raises ValueError for a block that no tile runs and for a malformed tile, and RuntimeError under TRITON_INTERPRET=1.
    """
    _refuse_interpreter()
    _refuse(
        shape,
        mbconv_tile.why_unsupported(shape)
        or mbconv_tile.why_malformed(tile)
        or mbconv_tile.why_splits_groups(tile, shape.group_width),
    )
    image, options = (shape.height, shape.width), {"ordered": ordered, "tile": tile}
    produce = mbconv_kernels.produce_constants(
        *image,
        shape.in_channels,
        shape.hidden_channels,
        shape.squeeze_channels,
        activation=shape.activation,
        **options,
    )
    project = mbconv_kernels.project_constants(
        *image,
        shape.hidden_channels,
        shape.out_channels,
        shape.squeeze_channels,
        residual=shape.residual,
        **options,
    )
    return _compile_two(mbconv_kernels.produce_kernel, produce, project, shape.dtype, tile, compute_capability)


def compile_mbconv_down(
    shape: MBConvDownShape, tile: MBConvDownTile, compute_capability: tuple[int, int] = (9, 0), *, ordered: bool = False
) -> dict[str, Resources]:
    """Compile the two portable kernels of a stride-2 MBConv block, as `compile_mbconv` does those of stride 1."""
    _refuse_interpreter()
    _refuse(
        shape,
        mbconv_down_tile.why_unsupported(shape)
        or mbconv_down_tile.why_malformed(tile)
        or mbconv_tile.why_splits_groups(tile, shape.group_width),
    )
    options = {"ordered": ordered, "tile": tile}
    produce = mbconv_down.produce_down_constants(
        shape.height,
        shape.width,
        shape.in_channels,
        shape.hidden_channels,
        shape.squeeze_channels,
        activation=shape.activation,
        **options,
    )
    project = mbconv_kernels.project_constants(
        shape.out_height,
        shape.out_width,
        shape.hidden_channels,
        shape.out_channels,
        shape.squeeze_channels,
        residual=False,
        **options,
    )
    return _compile_two(mbconv_down.produce_down_kernel, produce, project, shape.dtype, tile, compute_capability)


def compile_stem(
    shape: StemShape, tile: StemTile, compute_capability: tuple[int, int] = (9, 0), *, planar: bool = False
) -> Resources:
    """Compile the stem kernel for a tile and a compute capability, for an input that is channels_last, or contiguous.

    No GPU is needed. Raises ValueError for a convolution that no tile runs and for a malformed tile, and RuntimeError
    under TRITON_INTERPRET=1.
    """
    _refuse_interpreter()
    _refuse(shape, stem_tile.why_unsupported(shape) or stem_tile.why_malformed(tile))
    kernel = stem_kernels.stem_kernel
    values = stem_kernels.constants(
        shape.width, shape.in_channels, shape.out_channels, activation=shape.activation, planar=planar, tile=tile
    )
    signature = {name: _argument_type(name, values, shape.dtype) for name in kernel.arg_names}
    return _compile(ASTSource, kernel, signature, values, compute_capability, {"num_warps": tile.warps})


def compile_head(shape: HeadShape, tile: HeadTile, compute_capability: tuple[int, int] = (9, 0)) -> Resources:
    """Compile the head kernel for a tile and a compute capability; no GPU is needed.

    Raises ValueError for a block that no tile runs and for a malformed tile, and RuntimeError under TRITON_INTERPRET=1.
    """
    _refuse_interpreter()
    _refuse(shape, head_tile.why_unsupported(shape) or head_tile.why_malformed(tile))
    kernel, pixels = head_kernels.head_kernel, shape.height * shape.width
    values = head_kernels.constants(
        pixels, shape.in_channels, shape.out_channels, activation=shape.activation, tile=tile
    )
    if tile.tiles(pixels) == 1:
        values["TILES"] = 1  # as at run time, where the compiler knows an argument that is one
    signature = {name: _argument_type(name, values, shape.dtype) for name in kernel.arg_names}
    return _compile(ASTSource, kernel, signature, values, compute_capability, {"num_warps": tile.warps})


def _compile_two(
    produce_kernel: triton.JITFunction,
    produce: dict[str, object],
    project: dict[str, object],
    dtype: str,
    tile: MBConvTile | MBConvDownTile,
    compute_capability: tuple[int, int],
) -> dict[str, Resources]:
    """Compile the portable kernels of an MBConv block, by name, with these compile-time arguments."""
    compiled = {}
    for name, kernel, values, warps in (
        ("produce", produce_kernel, produce, tile.warps),
        ("project", mbconv_kernels.project_kernel, project, tile.project_warps),
    ):
        signature = {argument: _argument_type(argument, values, dtype) for argument in kernel.arg_names}
        signature["squeezed_ptr"] = "*fp32"
        compiled[name] = _compile(ASTSource, kernel, signature, values, compute_capability, {"num_warps": warps})
    return compiled


def _refuse_interpreter() -> None:
    if not isinstance(convfirst_kernel, triton.JITFunction):
        raise RuntimeError(
            "kernels cannot be compiled ahead of time under TRITON_INTERPRET=1, where Triton interprets them; unset it "
            "before Triton is imported, for example in a subprocess"
        )


def _refuse(shape: BlockShape, reason: str | None) -> None:
    if reason:
        raise ValueError(f"the kernel does not run {shape}: {reason}")


def _compile(
    source_type: type[ASTSource],
    kernel: triton.JITFunction,
    signature: dict[str, str],
    values: dict[str, object],
    compute_capability: tuple[int, int],
    options: dict[str, int | None],
) -> Resources:
    position = {name: (index,) for index, name in enumerate(signature)}
    source = source_type(
        kernel,
        signature,
        {position[name]: value for name, value in values.items()},
        {
            position[name]: [["tt.divisibility", POINTER_ALIGNMENT]]
            for name, argument_type in signature.items()
            if argument_type.startswith("*")
        },
    )
    major, minor = compute_capability
    target = GPUTarget("cuda", 10 * major + minor, WARP_SIZE)
    return _resources(triton.compile(source, target=target, options=options))


def _argument_type(name: str, values: dict[str, object], dtype: str) -> str:
    if name in values:
        return "constexpr"
    if name.endswith("_bias_ptr"):
        return "*fp32"
    return f"*{TYPES[dtype]}" if name.endswith("_ptr") else "i32"


def _resources(compiled) -> Resources:
    usage = re.search(r"REG:(\d+) STACK:(\d+)", _dump(compiled.asm["cubin"], "-res-usage"))
    code = _dump(compiled.asm["cubin"], "-sass")
    # "/*0120*/  @!P0 LDGSTS.E.BYPASS.128 [R1], ...": address, maybe a predicate, then the instruction.
    instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", code)
    kinds = Counter(instruction.split(".")[0] for instruction in instructions)
    return Resources(
        registers=int(usage[1]),
        stack_bytes=int(usage[2]),
        shared_bytes=compiled.metadata.shared,
        tensor_columns=compiled.metadata.tmem_size,
        hmma=kinds["HMMA"],
        hgmma=kinds["HGMMA"],
        utchmma=kinds["UTCHMMA"],
        warpgroup=kinds["WARPGROUP"],
        wide_copies=sum(name.startswith("LDGSTS") and name.endswith(".128") for name in instructions),
        narrow_loads=sum(re.fullmatch(r"LDG\.(\w+\.)*[US](8|16)(\.\w+)*", name) is not None for name in instructions),
    )


def _dump(cubin: bytes, option: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, option, str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _compile_rows(
    block: Block, dtype: str, capability: tuple[int, int], tile: Tile | None
) -> Iterator[dict[str, object]]:
    """A row for every kernel of a block. The type of a tile, if given, is that of the block too."""
    name, channels, expansion, size = block
    names = {
        ConvFirstDownTile: "convfirst-down",
        FfnTile: "ffn",
        MBConvTile: "mbconv",
        MBConvDownTile: "mbconv-down",
        MBConvHopperTile: "mbconv",
        MBConvDownHopperTile: "mbconv-down",
        StemTile: "stem",
        HeadTile: "head",
    }
    name = names.get(type(tile), name)
    constructor = {
        "convfirst": convfirst,
        "convfirst-down": partial(convfirst, stride=2, out_channels=2 * channels),
        "ffn": ffn,
        "mbconv": mbconv,
        "mbconv-down": partial(mbconv, stride=2, out_channels=2 * channels),
        "stem": partial(conv, stride=2, activation="relu"),
        "head": head,
    }[name]
    graph = constructor(128, size, size, channels, expansion, dtype=dtype)
    if tile is None:
        kernel = {"mbconv": MBCONV.name, "mbconv-down": MBCONV_DOWN.name}.get(name)
        tile = plan_block(graph, PROCESSOR_OF_CAPABILITY[capability], kernel=kernel).tile
    shape = block_shape(graph)
    if isinstance(tile, HopperTile):
        kernels = {"convfirst_hopper": compile_convfirst_hopper(shape, tile)}
    elif isinstance(tile, ConvFirstDownTile):
        kernels = {"convfirst_down": compile_convfirst_down(shape, tile, capability)}
    elif isinstance(tile, StemTile):
        kernels = {"stem": compile_stem(shape, tile, capability)}
    elif isinstance(tile, HeadTile):
        kernels = {"head": compile_head(shape, tile, capability)}
    elif isinstance(tile, FfnTile):
        kernels = {"ffn_hopper": compile_ffn_hopper(shape, tile)}
    elif isinstance(tile, MBConvHopperTile):
        kernels = {"mbconv_hopper": compile_mbconv_hopper(shape, tile)}
    elif isinstance(tile, MBConvDownHopperTile):
        kernels = {"mbconv_down_hopper": compile_mbconv_down_hopper(shape, tile)}
    elif isinstance(tile, MBConvTile):
        kernels = compile_mbconv(shape, tile, capability)
    elif isinstance(tile, MBConvDownTile):
        kernels = compile_mbconv_down(shape, tile, capability)
    else:
        kernels = {"convfirst": compile_convfirst(shape, tile, capability)}
    for kernel, resources in kernels.items():
        yield {
            "block": block[1:],
            "kernel": kernel,
            "capability": capability,
            "tile": tile.to_ints(),
            **asdict(resources),
        }


def _ints(text: str, separator: str = ",") -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(separator))


def _block(text: str) -> Block:
    name, colon, sizes = text.rpartition(":")
    block = _ints(sizes)
    if len(block) != 3 or (colon and name not in BLOCK_NAMES):
        names = " or ".join(f"{name}:" for name in BLOCK_NAMES)
        raise argparse.ArgumentTypeError(f"a block is CHANNELS,EXPANSION,SIZE, after {names} if you like, got {text!r}")
    return name or "convfirst", *block


def _tile(text: str, tile_type: type[Tile], count: str) -> Tile:
    try:
        return tile_type(*_ints(text))
    except TypeError:
        raise argparse.ArgumentTypeError(
            f"{text!r} does not have the fields of {tile_type.__name__}, {count}"
        ) from None


def _capability(text: str) -> tuple[int, ...]:
    capability = _ints(text, ".")
    if capability not in PROCESSOR_OF_CAPABILITY:
        known = ", ".join(f"{major}.{minor}" for major, minor in PROCESSOR_OF_CAPABILITY)
        raise argparse.ArgumentTypeError(f"compute capability {text} is not supported, use one of {known}")
    return capability


def _table(rows: list[dict[str, object]]) -> str:
    header = list(rows[0])
    cells = [header, *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in cells)


def _cell(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compile every block for every compute capability and print a table, or JSON, with a row for each."""
    parser = argparse.ArgumentParser(prog="python -m fusion.triton_kernels.ahead", description=main.__doc__)
    parser.add_argument("--block", type=_block, nargs="+", required=True, metavar="[TYPE:]CHANNELS,EXPANSION,SIZE")
    parser.add_argument("--capability", type=_capability, nargs="+", default=[(9, 0)], metavar="MAJOR.MINOR")
    parser.add_argument("--dtype", choices=TYPES, default="float16")
    tiles = parser.add_mutually_exclusive_group()
    tiles.add_argument(
        "--tile",
        type=partial(_tile, tile_type=ConvFirstTile, count="5 to 7"),
        help="fields of ConvFirstTile with commas; default: the planner's choice",
    )
    tiles.add_argument(
        "--convfirst-down-tile",
        type=partial(_tile, tile_type=ConvFirstDownTile, count="4 to 7"),
        help="fields of ConvFirstDownTile with commas: compile the portable stride-2 ConvFirst kernel",
    )
    tiles.add_argument(
        "--hopper-tile",
        type=partial(_tile, tile_type=HopperTile, count="7"),
        help="fields of HopperTile with commas: compile the Hopper kernel",
    )
    tiles.add_argument(
        "--ffn-tile",
        type=partial(_tile, tile_type=FfnTile, count="6"),
        help="fields of FfnTile with commas: compile the FFN kernel",
    )
    tiles.add_argument(
        "--mbconv-tile",
        type=partial(_tile, tile_type=MBConvTile, count="13"),
        help="fields of MBConvTile with commas: compile the MBConv kernels",
    )
    tiles.add_argument(
        "--mbconv-down-tile",
        type=partial(_tile, tile_type=MBConvDownTile, count="16"),
        help="fields of MBConvDownTile with commas: compile the portable stride-2 MBConv kernels",
    )
    tiles.add_argument(
        "--mbconv-hopper-tile",
        type=partial(_tile, tile_type=MBConvHopperTile, count="4"),
        help="fields of MBConvHopperTile with commas: compile the MBConv kernel for Hopper",
    )
    tiles.add_argument(
        "--mbconv-down-hopper-tile",
        type=partial(_tile, tile_type=MBConvDownHopperTile, count="3"),
        help="fields of MBConvDownHopperTile with commas: compile the stride-2 MBConv kernel for Hopper",
    )
    tiles.add_argument(
        "--stem-tile",
        type=partial(_tile, tile_type=StemTile, count="4"),
        help="fields of StemTile with commas: compile the stem kernel",
    )
    tiles.add_argument(
        "--head-tile",
        type=partial(_tile, tile_type=HeadTile, count="4 or 5"),
        help="fields of HeadTile with commas: compile the head kernel",
    )
    parser.add_argument("--json", action="store_true", help="print a list of objects instead of a table")
    options = parser.parse_args(arguments)
    for_hopper = (
        options.hopper_tile or options.ffn_tile or options.mbconv_hopper_tile or options.mbconv_down_hopper_tile
    )
    if for_hopper and any(capability != hopper_tile.COMPUTE_CAPABILITY for capability in options.capability):
        parser.error(f"{type(for_hopper).__name__} is for compute capability 9.0 only, leave --capability out")
    tile = (
        for_hopper
        or options.tile
        or options.convfirst_down_tile
        or options.mbconv_tile
        or options.mbconv_down_tile
        or options.stem_tile
        or options.head_tile
    )
    rows = [
        row
        for block, capability in product(options.block, options.capability)
        for row in _compile_rows(block, options.dtype, capability, tile)
    ]
    print(json.dumps(rows) if options.json else _table(rows))


if __name__ == "__main__":
    main()

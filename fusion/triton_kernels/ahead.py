"""Compile kernels ahead of time, on a machine with or without a GPU, and read what the compiler made of them.

`python -m fusion.triton_kernels.ahead --block 64,6,64 --capability 8.0 9.0` prints registers, spills, shared memory and
matrix instructions of each combination; `--hopper-tile 64,64,2,2,1,64,0` does so for the Hopper kernel, and `--ffn-tile
2,64,2,4,4,1` for that of the FFN. `--block mbconv:128,4,16` compiles the two portable kernels of an MBConv block,
`--mbconv-hopper-tile 1,4,32,6` the one for Hopper, `--mbconv-windows-hopper-tile 4,8,64,4` that for larger images.
`--block mbconv-down:48,4,32` does so for an MBConv block of stride 2 with twice as many output as input channels, and
so does `--mbconv-down-hopper-tile 32,6,1`. `--block convfirst-down:32,6,128` is such a ConvFirst block,
`--convfirst-down-tile 256,64,16,8` a tile of its portable kernel and `--convfirst-down-hopper-tile 64,32,2,2,1,32,3`
one of the kernel for Hopper. `--block convfirst-strided:64,4,16` is one whose convolution has the stride, without a
blur-pool, and `--block mbconv-strided:40,6,28` such an MBConv block, of which `--mbconv-down-windows-hopper-tile
4,8,64,4` is a tile. `--block stem:3,32,256 head:128,1280,8` are a network's stem and head, with their output channels
in place of the expansion, and `--block stem-convfirst:16,3,256` is a stem of 16 channels with the ConvFirst block after
it.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from functools import partial
from itertools import product
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

from fusion.planner.blocks import ACTIVATIONS, conv, convfirst, ffn, head, mbconv, stem_convfirst
from fusion.planner.families import MBCONV, MBCONV_DOWN, Tile, family_of
from fusion.planner.graph import BlockGraph
from fusion.planner.match import BlockShape
from fusion.planner.plan import block_shape, plan_block
from fusion.triton_kernels.ahead_sources import ELEMENT, RECIPES, Recipe, Source
from fusion.triton_kernels.convfirst import convfirst_kernel

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


def compile_block(
    shape: BlockShape, tile: Tile, compute_capability: tuple[int, int] = (9, 0), **options: bool
) -> dict[str, Resources]:
    """Compile the kernels that run a block with a tile, by name, for a compute capability; no GPU is needed.

    `options` are those of a launch that make another kernel: `ordered` of the portable MBConv kernels, and `planar` of
    the stem, whose input is then contiguous. A tile that asks for more than a GPU has may compile: compare the result
    with the GPU's memories.

    Raises ValueError for a block that no tile runs, for a tile that is malformed or does not fit the block and for a
    compute capability that the kernel is not for, and RuntimeError under TRITON_INTERPRET=1.
    """
    _refuse_interpreter()
    recipe = RECIPES[family_of(tile).name]
    reason = (
        recipe.why_not_on(compute_capability)
        or recipe.family.why_unsupported(shape)
        or recipe.why_malformed(tile, shape)
    )
    if reason:
        raise ValueError(f"the kernel does not run {shape}: {reason}")
    sources = recipe.sources(shape, tile, **options)
    return {name: _compile(source, shape.dtype, compute_capability) for name, source in sources.items()}


def _refuse_interpreter() -> None:
    if not isinstance(convfirst_kernel, triton.JITFunction):
        raise RuntimeError(
            "kernels cannot be compiled ahead of time under TRITON_INTERPRET=1, where Triton interprets them; unset it "
            "before Triton is imported, for example in a subprocess"
        )


def _compile(source: Source, dtype: str, compute_capability: tuple[int, int]) -> Resources:
    arguments = source.kernel.arg_names
    absent = (name for name in arguments if name.endswith("_desc") and name not in source.descriptors)
    values = {**dict.fromkeys(absent), **source.values}
    signature = {name: _argument_type(name, source, values, dtype) for name in arguments}
    position = {name: (index,) for index, name in enumerate(signature)}
    source_type = GluonASTSource if isinstance(source.kernel, GluonJITFunction) else ASTSource
    ast = source_type(
        source.kernel,
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
    options = {"num_warps": source.warps, "maxnreg": source.register_limit}
    return _resources(triton.compile(ast, target=target, options=options))


def _argument_type(name: str, source: Source, values: dict[str, object], dtype: str) -> str:
    if name in values:
        return "constexpr"
    if name in source.descriptors:
        box, layout = source.descriptors[name]
        return f"tensordesc<{TYPES[dtype]}{box},{layout!r}>"
    if not name.endswith("_ptr"):
        return "i32"
    element = source.pointers.get(name, "fp32" if name.endswith("_bias_ptr") else ELEMENT)
    return f"*{TYPES[dtype] if element == ELEMENT else element}"


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


def _down(constructor: Callable[..., BlockGraph]) -> Callable[..., BlockGraph]:
    """Blocks of stride 2 with twice as many output as input channels."""

    def construct(batch: int, height: int, width: int, channels: int, expansion: int, **options) -> BlockGraph:
        options |= {"out_channels": 2 * channels, "stride": 2}
        return constructor(batch, height, width, channels, expansion, **options)

    return construct


def _stem_convfirst(batch: int, height: int, width: int, channels: int, expansion: int, **options) -> BlockGraph:
    """A stem of images of three channels with these output channels, and a block of this expansion."""
    return stem_convfirst(batch, height, width, 3, channels, expansion, **options)


BLOCKS = {
    "convfirst": convfirst,
    "convfirst-down": _down(convfirst),
    "convfirst-strided": _down(partial(convfirst, blur=False)),
    "ffn": ffn,
    "mbconv": mbconv,
    "mbconv-down": _down(mbconv),
    "mbconv-strided": _down(partial(mbconv, blur=False)),
    "stem": partial(conv, stride=2, activation="relu"),
    "stem-convfirst": _stem_convfirst,
    "head": head,
}
"""By type: what makes a graph from batch, height, width, channels and the expansion or the output channels."""
PLANNED_KERNELS = {"mbconv": MBCONV.name, "mbconv-down": MBCONV_DOWN.name, "mbconv-strided": MBCONV_DOWN.name}
"""Kernel families whose tiles are planned, by type of block; those of other blocks are up to the planner."""


def _compile_rows(
    block: Block, capability: tuple[int, int], tile: Tile | None, options: dict[str, str]
) -> Iterator[dict[str, object]]:
    """A row for every kernel of a block. A tile, if given, says of which type the block is, unless it runs its type."""
    name, channels, expansion, size = block
    if tile is not None and name not in RECIPES[family_of(tile).name].blocks:
        name = RECIPES[family_of(tile).name].blocks[0]
    graph = BLOCKS[name](128, size, size, channels, expansion, **options)
    if tile is None:
        tile = plan_block(graph, PROCESSOR_OF_CAPABILITY[capability], kernel=PLANNED_KERNELS.get(name)).tile
    for kernel, resources in compile_block(block_shape(graph), tile, capability).items():
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
    if len(block) != 3 or (colon and name not in BLOCKS):
        names = " or ".join(f"{name}:" for name in BLOCKS)
        raise argparse.ArgumentTypeError(f"a block is CHANNELS,EXPANSION,SIZE, after {names} if you like, got {text!r}")
    return name or "convfirst", *block


def _tile(text: str, recipe: Recipe) -> Tile:
    tile_type = recipe.family.tile_type
    try:
        return tile_type(*_ints(text))
    except TypeError:
        raise argparse.ArgumentTypeError(
            f"{text!r} does not have the fields of {tile_type.__name__}, {_field_count(tile_type)}"
        ) from None


def _field_count(tile_type: type[Tile]) -> str:
    required = sum(field.default is MISSING for field in fields(tile_type))
    return str(required) if required == len(fields(tile_type)) else f"{required} to {len(fields(tile_type))}"


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
    """Compile every block for every compute capability, with the planner's tile or a given one; print what came out."""
    parser = argparse.ArgumentParser(prog="python -m fusion.triton_kernels.ahead", description=main.__doc__)
    parser.add_argument("--block", type=_block, nargs="+", required=True, metavar="[TYPE:]CHANNELS,EXPANSION,SIZE")
    parser.add_argument("--capability", type=_capability, nargs="+", default=[(9, 0)], metavar="MAJOR.MINOR")
    parser.add_argument("--dtype", choices=TYPES, default="float16")
    parser.add_argument("--activation", choices=ACTIVATIONS, help="default: that of the paper's block")
    tiles = parser.add_mutually_exclusive_group()
    for recipe in RECIPES.values():
        tiles.add_argument(
            recipe.option,
            dest="tile",
            type=partial(_tile, recipe=recipe),
            help=f"fields of {recipe.family.tile_type.__name__} with commas: compile {recipe.title}",
        )
    parser.add_argument("--json", action="store_true", help="print a list of objects instead of a table")
    options = parser.parse_args(arguments)
    if options.tile is not None:
        for reason in map(RECIPES[family_of(options.tile).name].why_not_on, options.capability):
            if reason:
                parser.error(f"{reason}, leave --capability out")
    given = {"dtype": options.dtype, **({"activation": options.activation} if options.activation else {})}
    rows = [
        row
        for block, capability in product(options.block, options.capability)
        for row in _compile_rows(block, capability, options.tile, given)
    ]
    print(json.dumps(rows) if options.json else _table(rows))


if __name__ == "__main__":
    main()

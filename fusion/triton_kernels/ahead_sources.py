"""Which kernels run a block with a tile, and what the compiler is told of them, in one table by kernel family."""

from collections.abc import Callable
from dataclasses import dataclass, field

import triton

from fusion.planner import (
    convfirst_down_hopper_tile,
    convfirst_down_tile,
    ffn_tile,
    head_tile,
    hopper_tile,
    mbconv_down_hopper_tile,
    mbconv_down_tile,
    mbconv_hopper_tile,
    mbconv_tile,
    mbconv_windows_hopper_tile,
    stem_convfirst_hopper_tile,
    stem_tile,
)
from fusion.planner.convfirst_down_hopper_tile import ConvFirstDownHopperTile
from fusion.planner.convfirst_down_tile import ConvFirstDownTile
from fusion.planner.families import (
    CONVFIRST_DOWN,
    CONVFIRST_DOWN_HOPPER,
    FFN,
    HEAD,
    HOPPER,
    MBCONV,
    MBCONV_DOWN,
    MBCONV_DOWN_HOPPER,
    MBCONV_DOWN_WINDOWS_HOPPER,
    MBCONV_HOPPER,
    MBCONV_WINDOWS_HOPPER,
    PORTABLE,
    STEM,
    STEM_CONVFIRST_HOPPER,
    KernelFamily,
    Tile,
)
from fusion.planner.ffn_tile import FfnTile
from fusion.planner.head_tile import HeadTile
from fusion.planner.hopper_tile import COMPUTE_CAPABILITY, HopperTile
from fusion.planner.match import (
    BlockShape,
    ConvFirstDownShape,
    ConvFirstShape,
    FfnShape,
    HeadShape,
    MBConvDownShape,
    MBConvShape,
    StemConvFirstShape,
    StemShape,
    options_of,
)
from fusion.planner.mbconv_down_hopper_tile import MBConvDownHopperTile
from fusion.planner.mbconv_down_tile import MBConvDownTile
from fusion.planner.mbconv_hopper_tile import MBConvHopperTile
from fusion.planner.mbconv_tile import MBConvTile
from fusion.planner.mbconv_windows_hopper_tile import WindowsTile
from fusion.planner.stem_convfirst_hopper_tile import StemConvFirstHopperTile
from fusion.planner.stem_tile import StemTile
from fusion.planner.tile import ConvFirstTile
from fusion.triton_kernels import (
    convfirst,
    convfirst_down,
    convfirst_down_hopper,
    convfirst_hopper,
    ffn_hopper,
    head,
    mbconv,
    mbconv_down,
    mbconv_down_hopper,
    mbconv_hopper,
    mbconv_windows_hopper,
    stem,
    stem_convfirst_hopper,
)
from fusion.triton_kernels.hopper_layouts import box_layout, flat_layout, planes_layout
from fusion.triton_kernels.mbconv_hopper_launch import descriptor_boxes

ELEMENT = "element"
"""What a pointer points to that is of the block's dtype."""


@dataclass(frozen=True)
class Source:
    """A kernel as its launch calls it.

    `values` are the compile-time arguments. `descriptors` are the boxes that copies by TMA bring, with their layouts in
    shared memory, by argument; the kernel's other descriptors are None. Pointers to biases are to fp32, others to
    elements of the block's dtype, except for those that `pointers` tells the types of. `register_limit` is the most
    that a thread may have.
    """

    kernel: triton.JITFunction
    values: dict[str, object]
    warps: int
    descriptors: dict[str, tuple[list[int], object]] = field(default_factory=dict)
    pointers: dict[str, str] = field(default_factory=dict)
    register_limit: int | None = None


@dataclass(frozen=True)
class Recipe:
    """How the kernels of a family are compiled.

    `sources(shape, tile)` are the kernels by name, for blocks that the family supports and tiles for which
    `why_malformed` gives no reason. On the command line `blocks` are the types of the family's blocks, `option` takes a
    tile, and `title` is for people.
    """

    family: KernelFamily
    blocks: tuple[str, ...]
    option: str
    title: str
    why_malformed: Callable[[Tile, BlockShape], str | None]
    sources: Callable[..., dict[str, Source]]
    for_hopper: bool = False

    def why_not_on(self, compute_capability: tuple[int, int]) -> str | None:
        """Why the kernels are not compiled for a compute capability; None if they are."""
        if self.for_hopper and compute_capability != COMPUTE_CAPABILITY:
            return f"{self.family.tile_type.__name__} is for compute capability 9.0 only"
        return None


def _channels(shape: BlockShape) -> tuple[int, int, int]:
    return shape.in_channels, shape.hidden_channels, shape.out_channels


def _convfirst(shape: ConvFirstShape, tile: ConvFirstTile) -> dict[str, Source]:
    values = convfirst.constants(*_channels(shape), **options_of(shape), tile=tile)
    return {"convfirst": Source(convfirst.convfirst_kernel, values, tile.warps)}


def _convfirst_hopper(shape: ConvFirstShape, tile: HopperTile) -> dict[str, Source]:
    sizes = shape.height, shape.width, *_channels(shape)
    spec = convfirst_hopper.constants(*sizes, residual=shape.residual, tile=tile)
    box = convfirst_hopper.descriptor_box(spec), box_layout(spec.slab)
    return {"convfirst_hopper": _rows_source(convfirst_hopper.convfirst_hopper_kernel, spec, box, tile)}


def _convfirst_down(shape: ConvFirstDownShape, tile: ConvFirstDownTile) -> dict[str, Source]:
    values = convfirst_down.constants(*_channels(shape), activation=shape.activation, tile=tile)
    return {"convfirst_down": Source(convfirst_down.convfirst_down_kernel, values, tile.warps)}


def _convfirst_down_hopper(shape: ConvFirstDownShape, tile: ConvFirstDownHopperTile) -> dict[str, Source]:
    spec = convfirst_down_hopper.constants(shape.out_height, shape.out_width, *_channels(shape), tile=tile)
    box = convfirst_down_hopper.descriptor_box(spec), planes_layout(spec.slab)
    kernel = convfirst_down_hopper.convfirst_down_hopper_kernel
    return {"convfirst_down_hopper": _rows_source(kernel, spec, box, tile)}


def _rows_source(
    kernel: triton.JITFunction,
    spec: convfirst_hopper.Spec,
    box: tuple[list[int], object],
    tile: HopperTile | ConvFirstDownHopperTile,
) -> Source:
    """A kernel that takes rows of `x` in these boxes, and weights as the Hopper kernels of ConvFirst blocks do."""
    return Source(
        kernel,
        {"S": spec},
        hopper_tile.WARPS,
        descriptors={"x_desc": box, "weights_desc": (convfirst_hopper.weights_box(spec), flat_layout())},
        register_limit=tile.register_limit,
    )


def _ffn_hopper(shape: FfnShape, tile: FfnTile) -> dict[str, Source]:
    spec = ffn_hopper.constants(*_channels(shape), residual=shape.residual, tile=tile)
    boxes = ffn_hopper.descriptor_boxes(spec)
    source = Source(
        ffn_hopper.ffn_hopper_kernel,
        {"S": spec},
        ffn_tile.WARPS,
        descriptors={name: (box, ffn_hopper.descriptor_layout(box)) for name, box in boxes.items()},
        pointers={"hidden_bias_ptr": ELEMENT},
    )
    return {"ffn_hopper": source}


def _mbconv_hopper(shape: MBConvShape, tile: MBConvHopperTile) -> dict[str, Source]:
    sizes = shape.height, shape.width, *_channels(shape), shape.squeeze_channels
    spec = mbconv_hopper.constants(*sizes, **options_of(shape), tile=tile)
    boxes = descriptor_boxes(spec)
    return {"mbconv_hopper": _image_source(mbconv_hopper.mbconv_hopper_kernel, {"S": spec}, boxes)}


def _mbconv_windows_hopper(shape: MBConvShape | MBConvDownShape, tile: WindowsTile) -> dict[str, Source]:
    sizes = shape.height, shape.width, *_channels(shape), shape.squeeze_channels
    options = {"residual": False, **options_of(shape)}
    options.pop("blur", None)
    spec = mbconv_windows_hopper.constants(*sizes, kernel_size=shape.kernel_size, **options, tile=tile)
    boxes = descriptor_boxes(spec.projected)
    kernel = mbconv_windows_hopper.mbconv_windows_hopper_kernel
    return {"mbconv_windows_hopper": _image_source(kernel, {"D": spec}, boxes)}


def _mbconv_down_hopper(shape: MBConvDownShape, tile: MBConvDownHopperTile) -> dict[str, Source]:
    sizes = shape.height, shape.width, *_channels(shape), shape.squeeze_channels
    spec = mbconv_down_hopper.constants(*sizes, **options_of(shape), tile=tile)
    boxes = descriptor_boxes(spec.projected)
    kernel = mbconv_down_hopper.mbconv_down_hopper_kernel
    return {"mbconv_down_hopper": _image_source(kernel, {"D": spec}, boxes)}


def _image_source(kernel: triton.JITFunction, values: dict[str, object], boxes: dict[str, list[int]]) -> Source:
    """A kernel that takes weights as the Hopper kernels of MBConv blocks do."""
    return Source(
        kernel,
        values,
        mbconv_hopper_tile.WARPS,
        descriptors={name: (box, flat_layout()) for name, box in boxes.items()},
        pointers=dict.fromkeys(("expand_ptr", "squeeze_ptr", "excite_ptr"), "i32"),
    )


def _mbconv(shape: MBConvShape, tile: MBConvTile, *, ordered: bool = False) -> dict[str, Source]:
    """`ordered` as in `fusion.triton_kernels.mbconv.launch`."""
    image, options = (shape.height, shape.width), {"ordered": ordered, "tile": tile}
    channels = shape.in_channels, shape.hidden_channels, shape.squeeze_channels
    conv = {"kernel_size": shape.kernel_size, "activation": shape.activation}
    produce = mbconv.produce_constants(*image, *channels, **conv, **options)
    channels = shape.hidden_channels, shape.out_channels, shape.squeeze_channels
    options |= {"squeeze_activation": shape.squeeze_activation, "residual": shape.residual}
    project = mbconv.project_constants(*image, *channels, **options)
    return _two_sources(mbconv.produce_kernel, produce, project, tile)


def _mbconv_down(shape: MBConvDownShape, tile: MBConvDownTile, *, ordered: bool = False) -> dict[str, Source]:
    """`ordered` as in `fusion.triton_kernels.mbconv_down.launch`."""
    options = {"ordered": ordered, "tile": tile}
    sizes = shape.height, shape.width, shape.in_channels, shape.hidden_channels, shape.squeeze_channels
    conv = {"kernel_size": shape.kernel_size, "activation": shape.activation, "blur": shape.blur}
    produce = mbconv_down.produce_down_constants(*sizes, **conv, **options)
    sizes = shape.out_height, shape.out_width, shape.hidden_channels, shape.out_channels, shape.squeeze_channels
    options |= {"squeeze_activation": shape.squeeze_activation, "residual": False}
    project = mbconv.project_constants(*sizes, **options)
    return _two_sources(mbconv_down.produce_down_kernel, produce, project, tile)


def _two_sources(
    produce_kernel: triton.JITFunction,
    produce: dict[str, object],
    project: dict[str, object],
    tile: MBConvTile | MBConvDownTile,
) -> dict[str, Source]:
    """The portable kernels of an MBConv block, with these compile-time arguments."""
    pointers = {"squeezed_ptr": "fp32"}
    return {
        "produce": Source(produce_kernel, produce, tile.warps, pointers=pointers),
        "project": Source(mbconv.project_kernel, project, tile.project_warps, pointers=pointers),
    }


def _stem(shape: StemShape, tile: StemTile, *, planar: bool = False) -> dict[str, Source]:
    """For an input that is channels_last or, if `planar`, contiguous."""
    channels = shape.in_channels, shape.out_channels
    values = stem.constants(shape.width, *channels, activation=shape.activation, planar=planar, tile=tile)
    return {"stem": Source(stem.stem_kernel, values, tile.warps)}


def _stem_convfirst_hopper(shape: StemConvFirstShape, tile: StemConvFirstHopperTile) -> dict[str, Source]:
    sizes = shape.out_height, shape.out_width, shape.stem_channels, shape.hidden_channels, shape.out_channels
    spec = stem_convfirst_hopper.constants(*sizes, residual=shape.residual, tile=tile)
    source = Source(
        stem_convfirst_hopper.stem_convfirst_hopper_kernel,
        {"S": spec},
        hopper_tile.WARPS,
        descriptors={"weights_desc": (convfirst_hopper.weights_box(spec), flat_layout())},
        register_limit=tile.block.register_limit,
    )
    return {"stem_convfirst_hopper": source}


def _head(shape: HeadShape, tile: HeadTile) -> dict[str, Source]:
    pixels = shape.height * shape.width
    values = head.constants(pixels, shape.in_channels, shape.out_channels, activation=shape.activation, tile=tile)
    if tile.tiles(pixels) == 1:
        values["TILES"] = 1  # as at run time, where the compiler knows an argument that is one
    return {"head": Source(head.head_kernel, values, tile.warps)}


RECIPES = {
    recipe.family.name: recipe
    for recipe in (
        Recipe(
            PORTABLE,
            blocks=("convfirst", "convfirst-strided"),
            option="--tile",
            title="the portable ConvFirst kernel",
            why_malformed=lambda tile, shape: None,
            sources=_convfirst,
        ),
        Recipe(
            HOPPER,
            blocks=("convfirst",),
            option="--hopper-tile",
            title="the ConvFirst kernel for Hopper",
            why_malformed=lambda tile, shape: hopper_tile.why_malformed(tile, shape.hidden_channels),
            sources=_convfirst_hopper,
            for_hopper=True,
        ),
        Recipe(
            CONVFIRST_DOWN,
            blocks=("convfirst-down",),
            option="--convfirst-down-tile",
            title="the portable stride-2 ConvFirst kernel",
            why_malformed=lambda tile, shape: convfirst_down_tile.why_malformed(tile),
            sources=_convfirst_down,
        ),
        Recipe(
            CONVFIRST_DOWN_HOPPER,
            blocks=("convfirst-down",),
            option="--convfirst-down-hopper-tile",
            title="the stride-2 ConvFirst kernel for Hopper",
            why_malformed=lambda tile, shape: convfirst_down_hopper_tile.why_malformed(tile, shape.hidden_channels),
            sources=_convfirst_down_hopper,
            for_hopper=True,
        ),
        Recipe(
            FFN,
            blocks=("ffn",),
            option="--ffn-tile",
            title="the FFN kernel",
            why_malformed=lambda tile, shape: ffn_tile.why_malformed(tile, shape.hidden_channels),
            sources=_ffn_hopper,
            for_hopper=True,
        ),
        Recipe(
            MBCONV,
            blocks=("mbconv",),
            option="--mbconv-tile",
            title="the portable MBConv kernels",
            why_malformed=lambda tile, shape: (
                mbconv_tile.why_malformed(tile) or mbconv_tile.why_splits_groups(tile, shape.group_width)
            ),
            sources=_mbconv,
        ),
        Recipe(
            MBCONV_HOPPER,
            blocks=("mbconv",),
            option="--mbconv-hopper-tile",
            title="the MBConv kernel for Hopper",
            why_malformed=lambda tile, shape: (
                mbconv_hopper_tile.why_malformed(tile)
                or mbconv_hopper_tile.why_not_covering(tile, shape.height, shape.width)
            ),
            sources=_mbconv_hopper,
            for_hopper=True,
        ),
        Recipe(
            MBCONV_WINDOWS_HOPPER,
            blocks=("mbconv",),
            option="--mbconv-windows-hopper-tile",
            title="the MBConv kernel for Hopper and larger images",
            why_malformed=lambda tile, shape: mbconv_windows_hopper_tile.why_malformed(tile),
            sources=_mbconv_windows_hopper,
            for_hopper=True,
        ),
        Recipe(
            MBCONV_DOWN,
            blocks=("mbconv-down", "mbconv-strided"),
            option="--mbconv-down-tile",
            title="the portable stride-2 MBConv kernels",
            why_malformed=lambda tile, shape: (
                mbconv_down_tile.why_malformed(tile) or mbconv_tile.why_splits_groups(tile, shape.group_width)
            ),
            sources=_mbconv_down,
        ),
        Recipe(
            MBCONV_DOWN_HOPPER,
            blocks=("mbconv-down", "mbconv-strided"),
            option="--mbconv-down-hopper-tile",
            title="the stride-2 MBConv kernel for Hopper",
            why_malformed=lambda tile, shape: mbconv_down_hopper_tile.why_malformed(tile),
            sources=_mbconv_down_hopper,
            for_hopper=True,
        ),
        Recipe(
            MBCONV_DOWN_WINDOWS_HOPPER,
            blocks=("mbconv-strided",),
            option="--mbconv-down-windows-hopper-tile",
            title="the stride-2 MBConv kernel for Hopper and larger images",
            why_malformed=lambda tile, shape: mbconv_windows_hopper_tile.why_malformed(tile),
            sources=_mbconv_windows_hopper,
            for_hopper=True,
        ),
        Recipe(
            STEM,
            blocks=("stem",),
            option="--stem-tile",
            title="the stem kernel",
            why_malformed=lambda tile, shape: stem_tile.why_malformed(tile),
            sources=_stem,
        ),
        Recipe(
            STEM_CONVFIRST_HOPPER,
            blocks=("stem-convfirst",),
            option="--stem-convfirst-hopper-tile",
            title="the kernel of a stem and the ConvFirst block after it for Hopper",
            why_malformed=lambda tile, shape: stem_convfirst_hopper_tile.why_malformed(
                tile, shape.stem_channels, shape.hidden_channels
            ),
            sources=_stem_convfirst_hopper,
            for_hopper=True,
        ),
        Recipe(
            HEAD,
            blocks=("head",),
            option="--head-tile",
            title="the head kernel",
            why_malformed=lambda tile, shape: head_tile.why_malformed(tile),
            sources=_head,
        ),
    )
}
"""By the family's name."""

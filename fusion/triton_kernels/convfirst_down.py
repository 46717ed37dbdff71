"""Stride-2 ConvFirst as one portable Triton kernel: grouped convolution, blur-pool, expand, activation, project.

A. Lavin, On the Efficiency of Convolutional Neural Networks, section 5.3 and figure 6c. Nothing non-linear stands
between the grouped 3x3 convolution at full resolution and the blur-pool of stride 2, so they run as one grouped 5x5
convolution of stride 2, and the other half of the expansion's input, the blurred input, is more columns of the same
matrix products: a tap's matrix is diagonal there.

The convolution pads by zeros and the blur-pool by reflection. So output pixels of the first row, of the last row of an
odd number of input rows, and of such columns have other taps than inner pixels: nine kinds with 25 taps each. A program
computes `PIXELS` output pixels of one kind, in rows through all images, with all their channels. It reads the input
through 25 shifted views (DRAM sees each byte about once), keeps the FFN's input and the hidden channels in registers,
and writes the output once. Channels are cut into slabs as in `fusion.triton_kernels.convfirst`.
"""

import triton
import triton.language as tl

from fusion.planner.convfirst_down_tile import BORDERS, TAPS, ConvFirstDownTile
from fusion.relaunch import launch_kernel
from fusion.triton_kernels.activations import activated
from fusion.triton_kernels.convfirst import load_matrix, output_start, slab_start

_BORDERS = tl.constexpr(BORDERS)
_TAPS = tl.constexpr(TAPS)


@triton.constexpr_function
def slab_taps(slabs, index, taps):
    """Offset of the taps of slab `index` among those of one kind of border, `taps` for each slab."""
    return sum(taps * 2 * slab * slab for slab in slabs[:index])


@triton.jit
def output_range(size, KIND: tl.constexpr):
    """First output row, and how many, for `size` input rows: inner ones (0), the first one (1), and the last one (2)
    if they are odd in number; or columns."""
    outputs = (size + 1) // 2
    if KIND == 0:
        start, count = 1, outputs - 1 - size % 2
    elif KIND == 1:
        start, count = 0, 1
    else:
        start, count = outputs - 1, size % 2
    return start, count


@triton.jit
def program_pixels(N, H, W, PIXELS: tl.constexpr):
    """The program's kind of border and its output pixels: kind, and [PIXELS] images, rows, columns, and whether there
    is such a pixel.

    Programs are numbered kind by kind, inner pixels first.
    """
    program = tl.program_id(0).to(tl.int64)
    images = tl.cast(N, tl.int64)
    kind, first, top, left, rows, columns = 0, program, 0, 0, 1, 1
    before = tl.cast(0, tl.int64)
    for k in tl.static_range(_BORDERS):
        start_row, row_count = output_range(H, k // 3)
        start_column, column_count = output_range(W, k % 3)
        programs = tl.cdiv(images * row_count * column_count, PIXELS)
        is_mine = (program >= before) & (program < before + programs)
        kind = tl.where(is_mine, k, kind)
        first = tl.where(is_mine, program - before, first)
        top = tl.where(is_mine, start_row, top)
        left = tl.where(is_mine, start_column, left)
        rows = tl.where(is_mine, row_count, rows)
        columns = tl.where(is_mine, column_count, columns)
        before += programs
    first *= PIXELS
    area = rows * columns
    image = first // area
    # Counted from the image of the first one, 32 bits will do for the others.
    pixel = (first - image * area).to(tl.int32) + tl.arange(0, PIXELS)
    n = image + pixel // area
    row = top + pixel % area // columns
    column = left + pixel % area % columns
    return kind, n, row, column, n < images


@triton.jit
def blurred_conv(
    x_ptr,
    weights,
    pixel,
    row,
    column,
    H,
    W,
    tap_count,
    C: tl.constexpr,
    PIXELS: tl.constexpr,
    START: tl.constexpr,
    SLAB: tl.constexpr,
    COPIED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Channels `START : START + SLAB` of the blurred input and of the blurred convolution: [PIXELS, 2 * SLAB].

    `pixel`, `row` and `column` are those of the input that the output pixels are centred on.
    """
    # Said to be contiguous for no more than what one copy shall hold.
    c = START + tl.max_contiguous(tl.arange(0, SLAB), COPIED)
    pixels = x_ptr + (pixel * C)[:, None] + c[None, :]  # [PIXELS, SLAB]
    y = tl.zeros((PIXELS, 2 * SLAB), dtype=tl.float32)
    for tap in tl.range(0, tap_count, num_stages=STAGES):
        dy = tap // 5 - 2
        dx = tap % 5 - 2
        inside = (row + dy >= 0) & (row + dy < H) & (column + dx >= 0) & (column + dx < W)
        x = tl.load(pixels + (dy * W + dx) * C, mask=inside[:, None] & (c < C)[None, :], other=0.0)
        y = tl.dot(x, load_matrix(weights, tap * SLAB, 0, SLAB, 2 * SLAB, 2 * SLAB), y)
    return y


@triton.jit
def convfirst_down_kernel(
    x_ptr,  # [N, H, W, C]
    conv_ptr,  # for each kind of border and each slab of IN_SLABS [25, slab in, slab of blurred input + slab out]
    expand_ptr,  # [2 * sum(IN_SLABS), HIDDEN], for each slab blurred input and convolution
    expand_bias_ptr,  # [HIDDEN], fp32
    project_ptr,  # [HIDDEN, sum(OUT_SLABS)]
    project_bias_ptr,  # [sum(OUT_SLABS)], fp32
    out_ptr,  # [N, ceil(H / 2), ceil(W / 2), K]
    N,
    H,
    W,
    tap_count,  # 25: a compiler that knows it makes 25 copies of the loop's body for every slab
    C: tl.constexpr,
    HIDDEN: tl.constexpr,
    K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    IN_SLABS: tl.constexpr,
    OUT_SLABS: tl.constexpr,
    PIXELS: tl.constexpr,
    TILE_HIDDEN: tl.constexpr,
    COPIED: tl.constexpr,
    CONV_STAGES: tl.constexpr,
    FFN_STAGES: tl.constexpr,
):
    K_PADDED: tl.constexpr = slab_start(OUT_SLABS, len(OUT_SLABS))
    dtype = x_ptr.dtype.element_ty

    kind, n, row, column, exists = program_pixels(N, H, W, PIXELS)
    out_pixel = (n * ((H + 1) // 2) + row) * ((W + 1) // 2) + column  # [PIXELS], in 64 bits
    in_pixel = (n * H + 2 * row) * W + 2 * column
    taps = conv_ptr + kind * slab_taps(IN_SLABS, len(IN_SLABS), _TAPS)
    # Rows that no tap moves into the image.
    in_row = tl.where(exists, 2 * row, -_TAPS)

    ys = ()  # [PIXELS, 2 * slab] each
    for i in tl.static_range(len(IN_SLABS)):
        y = blurred_conv(
            x_ptr,
            taps + slab_taps(IN_SLABS, i, _TAPS),
            in_pixel,
            in_row,
            2 * column,
            H,
            W,
            tap_count,
            C,
            PIXELS,
            slab_start(IN_SLABS, i),
            IN_SLABS[i],
            COPIED,
            CONV_STAGES,
        )
        ys = ys + (y.to(dtype),)

    zs = ()  # [PIXELS, slab] each
    for i in tl.static_range(len(OUT_SLABS)):
        start = slab_start(OUT_SLABS, i)
        z = output_start(x_ptr, project_bias_ptr, row, column, exists, W, K, False, PIXELS, start, OUT_SLABS[i])
        zs = zs + (z,)

    for r in tl.range(0, HIDDEN, TILE_HIDDEN, num_stages=FFN_STAGES):
        h = tl.zeros((PIXELS, TILE_HIDDEN), dtype=tl.float32)
        for i in tl.static_range(len(IN_SLABS)):
            u = load_matrix(expand_ptr, 2 * slab_start(IN_SLABS, i), r, 2 * IN_SLABS[i], TILE_HIDDEN, HIDDEN)
            h = tl.dot(ys[i], u, h)
        h += tl.load(expand_bias_ptr + r + tl.arange(0, TILE_HIDDEN))[None, :]
        h = activated(h, ACTIVATION).to(dtype)  # [PIXELS, TILE_HIDDEN]: the next product takes it from registers
        sums = ()
        for i in tl.static_range(len(OUT_SLABS)):
            v = load_matrix(project_ptr, r, slab_start(OUT_SLABS, i), TILE_HIDDEN, OUT_SLABS[i], K_PADDED)
            sums = sums + (tl.dot(h, v, zs[i]),)
        zs = sums

    for i in tl.static_range(len(OUT_SLABS)):
        k = slab_start(OUT_SLABS, i) + tl.arange(0, OUT_SLABS[i])
        pixels = out_ptr + (out_pixel * K)[:, None] + k[None, :]
        tl.store(pixels, zs[i].to(dtype), mask=exists[:, None] & (k < K)[None, :])


def constants(
    in_channels: int, hidden_channels: int, out_channels: int, *, activation: str, tile: ConvFirstDownTile
) -> dict[str, object]:
    """Compile-time arguments of the kernel, by name, for a block with these channels and this tile."""
    return {
        "C": in_channels,
        "HIDDEN": tile.padded_hidden(hidden_channels),
        "K": out_channels,
        "ACTIVATION": activation,
        "IN_SLABS": tile.in_slabs(in_channels),
        "OUT_SLABS": tile.out_slabs(out_channels),
        "PIXELS": tile.pixels,
        "TILE_HIDDEN": tile.hidden,
        "COPIED": tile.copy_bytes // 2,
        "CONV_STAGES": tile.conv_stages,
        "FFN_STAGES": tile.ffn_stages,
    }


def launch(
    x,
    conv,
    expand,
    expand_bias,
    project,
    project_bias,
    out,
    *,
    activation: str,
    tile: ConvFirstDownTile,
    kernel=convfirst_down_kernel,
) -> None:
    """Run the kernel on `x` `[N, C, H, W]` into `out` `[N, K, ceil(H / 2), ceil(W / 2)]`, both channels_last.

    On the current device. Weights are packed for `tile` (`fusion.convfirst_down_weights.PackedConvFirstDown`). Nothing
    is checked here. `kernel` may be a wrapped `convfirst_down_kernel`, for tracing.
    """
    batch, in_channels, height, width = x.shape
    launch_kernel(
        kernel,
        (tile.programs(batch, height, width),),
        x,
        conv,
        expand,
        expand_bias,
        project,
        project_bias,
        out,
        batch,
        height,
        width,
        TAPS,
        **constants(in_channels, expand.shape[1], out.shape[1], activation=activation, tile=tile),
        num_warps=tile.warps,
    )

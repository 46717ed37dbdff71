"""ConvFirst as one portable Triton kernel: grouped convolution, expand, activation, project, residual.

A. Lavin, On the Efficiency of Convolutional Neural Networks, section 5.3. One program computes a tile of
`TILE_H x TILE_W` output pixels with all their channels. It reads the input through nine shifted views (DRAM sees each
byte once, L2 serves the overlaps), keeps the convolution's output and the hidden channels in registers, and writes the
output once. The convolution may have stride 2: output pixel (r, c) then looks at rows 2 r - 1 to 2 r + 1 of the input.

Triton tensors have power-of-two widths, so channels are cut into slabs of 16, 32, 64 ... with the last one padded. The
convolution runs as one matrix product for each slab and kernel tap, with weights that are zero between groups. That
multiplies more than a grouped convolution needs, on tensor cores that would idle otherwise, and is the loop that the
compiler pipelines best.
"""

import triton
import triton.language as tl

from fusion.planner.tile import ConvFirstTile
from fusion.relaunch import launch_kernel
from fusion.triton_kernels.activations import activated


@triton.constexpr_function
def slab_start(slabs, index):
    """First channel of slab `index`."""
    return sum(slabs[:index])


@triton.constexpr_function
def slab_weights(slabs, index):
    """Offset of the convolution weights of slab `index`: nine square matrices for each slab before it."""
    return sum(9 * slab * slab for slab in slabs[:index])


@triton.jit
def load_matrix(pointer, row_start, column_start, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STRIDE: tl.constexpr):
    """[ROWS, COLUMNS] block of a row-major matrix with rows of `STRIDE` elements."""
    row = row_start + tl.arange(0, ROWS)
    column = column_start + tl.arange(0, COLUMNS)
    return tl.load(pointer + row[:, None] * STRIDE + column[None, :])


@triton.jit
def grouped_conv(
    image,
    weights,
    row,
    column,
    H,
    W,
    C: tl.constexpr,
    PIXELS: tl.constexpr,
    START: tl.constexpr,
    SLAB: tl.constexpr,
    STAGES: tl.constexpr,
):
    """3x3 convolution, zero padding 1, of channels `START : START + SLAB`, centred on these pixels: [PIXELS, SLAB]."""
    c = START + tl.arange(0, SLAB)
    pixels = image + ((row * W + column) * C)[:, None] + c[None, :]  # [PIXELS, SLAB]
    y = tl.zeros((PIXELS, SLAB), dtype=tl.float32)
    for tap in tl.range(0, 9, num_stages=STAGES):
        dy = tap // 3 - 1
        dx = tap % 3 - 1
        inside = (row + dy >= 0) & (row + dy < H) & (column + dx >= 0) & (column + dx < W)
        x = tl.load(pixels + (dy * W + dx) * C, mask=inside[:, None] & (c < C)[None, :], other=0.0)
        y = tl.dot(x, load_matrix(weights, tap * SLAB, 0, SLAB, SLAB, SLAB), y)
    return y


@triton.jit
def output_start(
    image,
    bias,
    row,
    column,
    inside,
    W,
    K: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PIXELS: tl.constexpr,
    START: tl.constexpr,
    SLAB: tl.constexpr,
):
    """What the projection is added to: the bias and, with `RESIDUAL`, the input: [PIXELS, SLAB], fp32."""
    k = START + tl.arange(0, SLAB)
    z = tl.zeros((PIXELS, SLAB), dtype=tl.float32) + tl.load(bias + k)[None, :]
    if RESIDUAL:
        pixels = image + ((row * W + column) * K)[:, None] + k[None, :]
        z += tl.load(pixels, mask=inside[:, None] & (k < K)[None, :], other=0.0).to(tl.float32)
    return z


@triton.jit
def convfirst_kernel(
    x_ptr,  # [N, H, W, C]
    conv_ptr,  # for each slab of IN_SLABS [9, slab in, slab out]
    expand_ptr,  # [sum(IN_SLABS), HIDDEN]
    expand_bias_ptr,  # [HIDDEN], fp32
    project_ptr,  # [HIDDEN, sum(OUT_SLABS)]
    project_bias_ptr,  # [sum(OUT_SLABS)], fp32
    out_ptr,  # [N, ceil(H / STRIDE), ceil(W / STRIDE), K]
    H,
    W,
    C: tl.constexpr,
    HIDDEN: tl.constexpr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    IN_SLABS: tl.constexpr,
    OUT_SLABS: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    TILE_HIDDEN: tl.constexpr,
    CONV_STAGES: tl.constexpr,
    FFN_STAGES: tl.constexpr,
):
    PIXELS: tl.constexpr = TILE_H * TILE_W
    K_PADDED: tl.constexpr = slab_start(OUT_SLABS, len(OUT_SLABS))
    dtype = x_ptr.dtype.element_ty

    tl.static_assert(STRIDE == 1 or not RESIDUAL, "a residual needs stride 1")
    out_h = tl.cdiv(H, STRIDE)
    out_w = tl.cdiv(W, STRIDE)
    tiles_w = tl.cdiv(out_w, TILE_W)
    tiles = tl.cdiv(out_h, TILE_H) * tiles_w
    n = (tl.program_id(0) // tiles).to(tl.int64)  # a batch may hold more than 2**31 elements, an image may not
    tile = tl.program_id(0) % tiles
    pixel = tl.arange(0, PIXELS)
    row = tile // tiles_w * TILE_H + pixel // TILE_W  # of the output, [PIXELS]
    column = tile % tiles_w * TILE_W + pixel % TILE_W  # [PIXELS]
    inside = (row < out_h) & (column < out_w)
    image = x_ptr + n * H * W * C

    ys = ()  # [PIXELS, slab] each
    for i in tl.static_range(len(IN_SLABS)):
        weights = conv_ptr + slab_weights(IN_SLABS, i)
        y = grouped_conv(
            image,
            weights,
            STRIDE * row,
            STRIDE * column,
            H,
            W,
            C,
            PIXELS,
            slab_start(IN_SLABS, i),
            IN_SLABS[i],
            CONV_STAGES,
        )
        ys = ys + (y.to(dtype),)

    zs = ()  # [PIXELS, slab] each
    for i in tl.static_range(len(OUT_SLABS)):
        start = slab_start(OUT_SLABS, i)
        z = output_start(image, project_bias_ptr, row, column, inside, W, K, RESIDUAL, PIXELS, start, OUT_SLABS[i])
        zs = zs + (z,)

    for r in tl.range(0, HIDDEN, TILE_HIDDEN, num_stages=FFN_STAGES):
        h = tl.zeros((PIXELS, TILE_HIDDEN), dtype=tl.float32)
        for i in tl.static_range(len(IN_SLABS)):
            u = load_matrix(expand_ptr, slab_start(IN_SLABS, i), r, IN_SLABS[i], TILE_HIDDEN, HIDDEN)
            h = tl.dot(ys[i], u, h)
        h += tl.load(expand_bias_ptr + r + tl.arange(0, TILE_HIDDEN))[None, :]
        h = activated(h, ACTIVATION).to(dtype)  # [PIXELS, TILE_HIDDEN]: the next product takes it from registers
        sums = ()
        for i in tl.static_range(len(OUT_SLABS)):
            v = load_matrix(project_ptr, r, slab_start(OUT_SLABS, i), TILE_HIDDEN, OUT_SLABS[i], K_PADDED)
            sums = sums + (tl.dot(h, v, zs[i]),)
        zs = sums

    out = out_ptr + n * out_h * out_w * K
    for i in tl.static_range(len(OUT_SLABS)):
        k = slab_start(OUT_SLABS, i) + tl.arange(0, OUT_SLABS[i])
        pixels = out + ((row * out_w + column) * K)[:, None] + k[None, :]
        tl.store(pixels, zs[i].to(dtype), mask=inside[:, None] & (k < K)[None, :])


def constants(
    in_channels: int,
    hidden_channels: int,
    out_channels: int,
    *,
    activation: str,
    residual: bool,
    stride: int,
    tile: ConvFirstTile,
) -> dict[str, object]:
    """Compile-time arguments of the kernel, by name, for a block with these channels and this tile."""
    return {
        "C": in_channels,
        "HIDDEN": tile.padded_hidden(hidden_channels),
        "K": out_channels,
        "STRIDE": stride,
        "RESIDUAL": residual,
        "ACTIVATION": activation,
        "IN_SLABS": tile.in_slabs(in_channels),
        "OUT_SLABS": tile.out_slabs(out_channels),
        "TILE_H": tile.height,
        "TILE_W": tile.width,
        "TILE_HIDDEN": tile.hidden,
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
    residual: bool,
    stride: int,
    tile: ConvFirstTile,
    kernel=convfirst_kernel,
) -> None:
    """Run the kernel on `x` `[N, C, H, W]` into `out` `[N, K, ceil(H / stride), ceil(W / stride)]`, both channels_last.

    On the current device. Weights are packed for `tile` (`fusion.weights.PackedConvFirst`). Nothing is checked here.
    `kernel` may be a wrapped `convfirst_kernel`, for tracing.
    """
    in_channels, height, width = x.shape[1:]
    batch, out_channels, out_height, out_width = out.shape
    options = {"activation": activation, "residual": residual, "stride": stride, "tile": tile}
    launch_kernel(
        kernel,
        (tile.programs(batch, out_height, out_width),),
        x,
        conv,
        expand,
        expand_bias,
        project,
        project_bias,
        out,
        height,
        width,
        **constants(in_channels, expand.shape[1], out_channels, **options),
        num_warps=tile.warps,
    )

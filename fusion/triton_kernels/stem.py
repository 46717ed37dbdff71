"""A network's stem as one portable Triton kernel: dense 3x3 convolution of stride 2, bias, activation.

An implicit matrix product. Its rows are groups of neighbouring output pixels; its depth are the elements of three input
rows that a group looks at (`fusion.planner.stem_tile.Window`), and ones for the bias; its columns are the group's
output channels. So both input and output are read and written as they lie in memory, several elements at a time. Half
of the products are with zeros, on tensor cores that would idle otherwise: the kernel is bound by memory.

A non-finite element of the input reaches all pixels of the groups in whose windows it is, by way of those zeros.
"""

import triton
import triton.language as tl

from fusion.planner.stem_tile import BIAS_TERMS, StemTile, window
from fusion.relaunch import launch_kernel
from fusion.triton_kernels.activations import activated
from fusion.triton_kernels.native import rounded_relu, silu_of_double

BIAS_COLUMNS = tl.constexpr(BIAS_TERMS)


@triton.jit
def load_windows(
    image,
    row,
    group,
    H,
    W,
    C: tl.constexpr,
    PLANAR: tl.constexpr,
    GROUP: tl.constexpr,
    LEAD: tl.constexpr,
    SPAN: tl.constexpr,
    COLUMNS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """The groups' windows of three input rows, zero outside of the image, and ones: [ROWS, 4 * COLUMNS].

    `VECTOR` elements lie in a row, or do not, together. The compiler loads them at once, as it sees in the terms below
    that they start at multiples of `VECTOR` and share a mask.
    """
    element = tl.arange(0, 4 * COLUMNS)
    dy = element // COLUMNS - 1  # 2 for the bias
    column = element % COLUMNS
    vector = element // VECTOR * VECTOR  # and not of `column`: the compiler would see less
    y = 2 * row[:, None] + dy[None, :]  # [ROWS, 4 * COLUMNS]
    if PLANAR:
        start = group * (2 * GROUP) - LEAD  # [ROWS], pixels
        position = start[:, None] + (vector % SPAN)[None, :]
        channel = element // SPAN % (COLUMNS // SPAN)
        length = W
        used: tl.constexpr = C * SPAN
        plane = channel * (H * W // VECTOR * VECTOR)
        offset = y * (W // VECTOR * VECTOR) + (start[:, None] + (plane + element % SPAN)[None, :])
    else:
        start = group * (2 * GROUP * C) - LEAD  # [ROWS], elements
        position = start[:, None] + (vector % COLUMNS)[None, :]
        length = W * C
        used: tl.constexpr = SPAN
        offset = y * (W * C // VECTOR * VECTOR) + (start[:, None] + column[None, :])
    mask = (y >= 0) & (y < H) & (position >= 0) & (position < length) & (dy < 2)[None, :]
    if used < COLUMNS:
        mask = mask & (vector % COLUMNS < used)[None, :]
    ones = ((dy == 2) & (column < BIAS_COLUMNS)).to(image.dtype.element_ty)
    return tl.load(image + offset, mask=mask, other=tl.broadcast_to(ones[None, :], offset.shape))


@triton.jit
def stem_kernel(
    x_ptr,  # [N, H, W, C], or with PLANAR [N, C, H, W]
    weights_ptr,  # [4 * COLUMNS, WIDTH]
    out_ptr,  # [N, ceil(H / 2), ceil(W / 2), K]
    H,
    W,
    C: tl.constexpr,
    K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PLANAR: tl.constexpr,
    GROUP: tl.constexpr,
    LEAD: tl.constexpr,
    SPAN: tl.constexpr,
    COLUMNS: tl.constexpr,
    VECTOR: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_GROUPS: tl.constexpr,
):
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    out_h = (H + 1) // 2
    out_w = (W + 1) // 2
    n = tl.program_id(2).to(tl.int64)  # a batch may hold more than 2**31 elements, an image may not
    i = tl.arange(0, TILE_H * TILE_GROUPS)
    row = tl.program_id(1) * TILE_H + i // TILE_GROUPS  # of the output, [ROWS]
    group = tl.program_id(0) * TILE_GROUPS + i % TILE_GROUPS  # [ROWS]

    image = x_ptr + n * (H * W * C // VECTOR * VECTOR)
    windows = load_windows(image, row, group, H, W, C, PLANAR, GROUP, LEAD, SPAN, COLUMNS, VECTOR)
    depth = tl.arange(0, 4 * COLUMNS)
    out = out_ptr + n * out_h * out_w * K + ((row * out_w + group * GROUP) * K)[:, None]
    column = tl.arange(0, WIDTH)
    y = tl.dot(windows, tl.load(weights_ptr + depth[:, None] * WIDTH + column[None, :]))  # [ROWS, WIDTH]
    if ACTIVATION == "relu":
        y = rounded_relu(y, dtype)
    elif ACTIVATION == "silu":
        y = silu_of_double(0.5 * y)
    else:
        y = activated(y, ACTIVATION)
    pixel = group[:, None] * GROUP + (column // K)[None, :]
    inside = (row < out_h)[:, None] & (pixel < out_w)
    if WIDTH != GROUP * K:
        inside = inside & (column < GROUP * K)[None, :]
    tl.store(out + column[None, :], y.to(dtype), mask=inside)


def constants(
    width: int, in_channels: int, out_channels: int, *, activation: str, planar: bool, tile: StemTile
) -> dict[str, object]:
    """Compile-time arguments of the kernel, by name, for images of this width, these channels and this tile."""
    elements = window(in_channels, tile.group, planar)
    return {
        "C": in_channels,
        "K": out_channels,
        "ACTIVATION": activation,
        "PLANAR": planar,
        "GROUP": tile.group,
        "LEAD": elements.lead,
        "SPAN": elements.span,
        "COLUMNS": elements.columns,
        "VECTOR": elements.vector(tile.group, width),
        "WIDTH": tile.columns(out_channels),
        "TILE_H": tile.height,
        "TILE_GROUPS": tile.width // tile.group,
    }


def launch(x, interleaved, planar, out, *, activation: str, tile: StemTile, kernel=stem_kernel) -> None:
    """Run the kernel on `x` `[N, C, H, W]` into `out` `[N, K, ceil(H / 2), ceil(W / 2)]`, channels_last.

    `x` is channels_last or contiguous. Weights are packed for `tile` (`fusion.edge_weights.PackedStem`). Runs on the
    current device; nothing is checked here. `kernel` may be a wrapped `stem_kernel`, for tracing.
    """
    batch, in_channels, height, width = x.shape
    out_channels, out_height, out_width = out.shape[1:]
    is_planar = in_channels > 1 and x.stride(1) > 1
    launch_kernel(
        kernel,
        tile.grid(batch, out_height, out_width),
        x,
        planar if is_planar else interleaved,
        out,
        height,
        width,
        **constants(width, in_channels, out_channels, activation=activation, planar=is_planar, tile=tile),
        num_warps=tile.warps,
    )

"""A network's head as one portable Triton kernel: 1x1 convolution, bias, activation, global average pool.

One program computes a block of output channels for a few images. Its weights stay, and pixels pass by: a product has
output channels as rows and pixels as columns, so that a thread has many pixels of few channels and the pool is mostly a
sum within threads. What is pooled never leaves the registers.
"""

import triton
import triton.language as tl

from fusion.planner.head_tile import HeadTile
from fusion.relaunch import launch_kernel
from fusion.triton_kernels.activations import activated
from fusion.triton_kernels.native import silu_of_double


@triton.constexpr_function
def slab_start(slabs, index):
    """First channel of slab `index`."""
    return sum(slabs[:index])


@triton.jit
def head_kernel(
    x_ptr,  # [N, PIXELS, C]
    conv_ptr,  # [K padded, sum(SLABS)]
    conv_bias_ptr,  # [K padded], fp32
    out_ptr,  # [N, K]
    N,
    PIXELS,
    TILES,  # of an image; the compiler knows it if it is one
    C: tl.constexpr,
    K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PARTIAL: tl.constexpr,
    SLABS: tl.constexpr,
    TILE_PIXELS: tl.constexpr,
    TILE_CHANNELS: tl.constexpr,
    TILE_IMAGES: tl.constexpr,
    STAGES: tl.constexpr,
):
    C_PADDED: tl.constexpr = slab_start(SLABS, len(SLABS))
    BLOCKS: tl.constexpr = (K + TILE_CHANNELS - 1) // TILE_CHANNELS
    first = tl.program_id(0) // BLOCKS * TILE_IMAGES
    k = tl.program_id(0) % BLOCKS * TILE_CHANNELS + tl.arange(0, TILE_CHANNELS)

    weights = ()  # [TILE_CHANNELS, slab] each
    for i in tl.static_range(len(SLABS)):
        c = slab_start(SLABS, i) + tl.arange(0, SLABS[i])
        weights = weights + (tl.load(conv_ptr + k[:, None] * C_PADDED + c[None, :]),)
    bias = tl.load(conv_bias_ptr + k)
    if ACTIVATION == "silu":
        bias *= 0.5

    share = 1.0 / PIXELS
    steps = (tl.minimum(first + TILE_IMAGES, N) - first) * TILES
    pool = tl.zeros((TILE_CHANNELS,), dtype=tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        n = (first + step // TILES).to(tl.int64)  # a batch may hold more than 2**31 elements, an image may not
        pixel = step % TILES * TILE_PIXELS + tl.arange(0, TILE_PIXELS)
        image = x_ptr + n * PIXELS * C
        h = tl.zeros((TILE_CHANNELS, TILE_PIXELS), dtype=tl.float32)
        for i in tl.static_range(len(SLABS)):
            c = slab_start(SLABS, i) + tl.arange(0, SLABS[i])
            pixels = image + pixel[None, :] * C + c[:, None]  # [slab, TILE_PIXELS]
            if PARTIAL or slab_start(SLABS, i) + SLABS[i] > C:
                x = tl.load(pixels, mask=(pixel < PIXELS)[None, :] & (c < C)[:, None], other=0.0)
            else:
                x = tl.load(pixels)
            h = tl.dot(weights[i], x, h)
        if ACTIVATION == "silu":
            h = silu_of_double(h * 0.5 + bias[:, None])
        else:
            h = activated(h + bias[:, None], ACTIVATION)
        if PARTIAL:
            h = tl.where((pixel < PIXELS)[None, :], h, 0.0)
        pool += tl.sum(h, axis=1)
        is_last = step % TILES == TILES - 1
        tl.store(out_ptr + n * K + k, (pool * share).to(out_ptr.dtype.element_ty), mask=is_last & (k < K))
        pool = tl.where(is_last, 0.0, pool)


def constants(
    pixels: int, in_channels: int, out_channels: int, *, activation: str, tile: HeadTile
) -> dict[str, object]:
    """Compile-time arguments of the kernel, by name, for images of so many pixels, these channels and this tile."""
    return {
        "C": in_channels,
        "K": out_channels,
        "ACTIVATION": activation,
        "PARTIAL": pixels % tile.pixels > 0,
        "SLABS": tile.in_slabs(in_channels),
        "TILE_PIXELS": tile.pixels,
        "TILE_CHANNELS": tile.channels,
        "TILE_IMAGES": tile.images,
        "STAGES": tile.stages,
    }


def launch(x, conv, bias, out, *, activation: str, tile: HeadTile, kernel=head_kernel) -> None:
    """Run the kernel on `x` `[N, C, H, W]`, channels_last, into `out` `[N, K]`, on the current device.

    Weights are packed for `tile` (`fusion.edge_weights.PackedHead`). Nothing is checked here. `kernel` may be a wrapped
    `head_kernel`, for tracing.
    """
    batch, in_channels, height, width = x.shape
    out_channels = out.shape[1]
    launch_kernel(
        kernel,
        (tile.programs(batch, out_channels),),
        x,
        conv,
        bias,
        out,
        batch,
        height * width,
        tile.tiles(height * width),
        **constants(height * width, in_channels, out_channels, activation=activation, tile=tile),
        num_warps=tile.warps,
    )

"""MBConv with squeeze-and-excitation as two portable Triton kernels that meet in global memory.

A. Lavin, On the Efficiency of Convolutional Neural Networks, section 5.4, divided in another way than in the paper, so
that images and channels may be of any size and no program waits for another one. Both kernels run on a micro-batch of
images at a time, and the next one reuses their workspace, which so stays in L2:

- `produce_kernel`: a program computes the hidden tensor `y` for a tile of `TILE_H x TILE_W` pixels and `HIDDEN`
  channels. It expands the *window*, the tile and its neighbours within the image, into a piece of `scratch` of its own,
  and reads that through shifted views, one for each of the convolution's taps, nine or 25. It pools `y`, multiplies
  the sums by its rows of the squeeze layer and adds the products to the image's squeeze vector by atomic adds, in any
  order; or, with `ORDERED`, stores them.
- `project_kernel`: a program computes the gates of all channels from the squeeze vector, into a piece of `gates` of its
  own, and projects gated pixels to `sum(OUT_SLABS)` output channels, while it loops over the hidden ones.

As in `fusion.triton_kernels.convfirst` the convolution is one matrix product for each slab and tap, with weights that
are zero between groups.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusion.mbconv_weights import packed_kernel_size
from fusion.planner.mbconv_tile import MBConvTile
from fusion.relaunch import launch_kernel, scratch, zero
from fusion.triton_kernels.activations import activated
from fusion.triton_kernels.convfirst import load_matrix, slab_start


@triton.jit
def expand_window(
    image,
    weights,
    bias,
    scratch,
    places,
    top,
    left,
    first,
    W,
    C: tl.constexpr,
    C_PADDED: tl.constexpr,
    HIDDEN_PADDED: tl.constexpr,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    PIXELS: tl.constexpr,
    STRIDE: tl.constexpr,
    HIDDEN: tl.constexpr,
    CHANNELS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Hidden channels `first : first + HIDDEN` of the window at (top, left), to `scratch`.

    There, pixels are `STRIDE` elements apart, and `places` [HIDDEN] are those of a pixel's channels.
    """
    c = tl.arange(0, CHANNELS)
    b = tl.load(bias + first + tl.arange(0, HIDDEN))
    for start in tl.range(0, WINDOW_H * WINDOW_W, PIXELS, num_stages=1):
        pixel = start + tl.arange(0, PIXELS)
        inside = pixel < WINDOW_H * WINDOW_W
        position = (top + pixel // WINDOW_W) * W + left + pixel % WINDOW_W
        pixels = image + (position * C)[:, None] + c[None, :]  # [PIXELS, CHANNELS]
        h = tl.zeros((PIXELS, HIDDEN), dtype=tl.float32)
        for k in tl.range(0, C_PADDED, CHANNELS, num_stages=STAGES):
            x = tl.load(pixels + k, mask=inside[:, None] & (k + c < C)[None, :], other=0.0)
            h = tl.dot(x, load_matrix(weights, k, first, CHANNELS, HIDDEN, HIDDEN_PADDED), h)
        h = activated(h + b[None, :], ACTIVATION).to(scratch.dtype.element_ty)
        tl.store(scratch + pixel[:, None] * STRIDE + places[None, :], h, mask=inside[:, None])


@triton.jit(do_not_specialize=["first_image"])
def produce_kernel(
    x_ptr,  # [N, H, W, C]
    expand_ptr,  # [C_PADDED, HIDDEN_PADDED]
    expand_bias_ptr,  # [HIDDEN_PADDED], fp32
    conv_ptr,  # for each slab of CONV_SLAB channels [KERNEL_SIZE ** 2, slab in, slab out]
    conv_bias_ptr,  # [HIDDEN_PADDED], fp32
    squeeze_ptr,  # [HIDDEN_PADDED, SQUEEZE]
    scratch_ptr,  # [programs, WINDOW_H * WINDOW_W, HIDDEN]
    y_ptr,  # [images, H, W, HIDDEN_PADDED]
    squeezed_ptr,  # fp32 [N, SQUEEZE], or, with ORDERED, [N, parts, SQUEEZE]
    first_image,
    H,
    W,
    C: tl.constexpr,
    C_PADDED: tl.constexpr,
    HIDDEN_PADDED: tl.constexpr,
    SQUEEZE: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ORDERED: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    WINDOW_PIXELS: tl.constexpr,
    HIDDEN: tl.constexpr,
    CHANNELS: tl.constexpr,
    CONV_SLAB: tl.constexpr,
    STAGES: tl.constexpr,
):
    PIXELS: tl.constexpr = TILE_H * TILE_W
    SLABS: tl.constexpr = HIDDEN_PADDED // HIDDEN
    TAPS: tl.constexpr = KERNEL_SIZE * KERNEL_SIZE
    MARGIN: tl.constexpr = KERNEL_SIZE // 2
    dtype = x_ptr.dtype.element_ty

    tiles_w = tl.cdiv(W, TILE_W)
    parts = tl.cdiv(H, TILE_H) * tiles_w * SLABS
    program = tl.program_id(0).to(tl.int64)  # a batch may hold more than 2**31 elements, an image may not
    i = program // parts
    part = tl.program_id(0) % parts
    tile = part // SLABS
    first = part % SLABS * HIDDEN
    top = tile // tiles_w * TILE_H
    left = tile % tiles_w * TILE_W
    pixel = tl.arange(0, PIXELS)
    row = top + pixel // TILE_W  # [PIXELS]
    column = left + pixel % TILE_W  # [PIXELS]
    inside = (row < H) & (column < W)

    # The window is as large in every program: at the borders it moves inwards, and nothing outside is expanded.
    top = tl.minimum(tl.maximum(top - MARGIN, 0), H - WINDOW_H)
    left = tl.minimum(tl.maximum(left - MARGIN, 0), W - WINDOW_W)
    scratch = scratch_ptr + program * (WINDOW_H * WINDOW_W * HIDDEN)
    expand_window(
        x_ptr + (first_image + i) * H * W * C,
        expand_ptr,
        expand_bias_ptr,
        scratch,
        tl.arange(0, HIDDEN),
        top,
        left,
        first,
        W,
        C,
        C_PADDED,
        HIDDEN_PADDED,
        WINDOW_H,
        WINDOW_W,
        WINDOW_PIXELS,
        HIDDEN,
        HIDDEN,
        CHANNELS,
        ACTIVATION,
        STAGES,
    )
    tl.debug_barrier()  # other threads of the program read what this one has stored

    s = tl.arange(0, SQUEEZE)
    channel = tl.arange(0, CONV_SLAB)
    y_image = y_ptr + i * H * W * HIDDEN_PADDED + ((row * W + column) * HIDDEN_PADDED)[:, None]
    views = scratch + (((row - top) * WINDOW_W + column - left) * HIDDEN)[:, None] + channel[None, :]
    squeezed = tl.zeros((SQUEEZE,), dtype=tl.float32)
    for slab in tl.range(0, HIDDEN, CONV_SLAB, num_stages=1):
        weights = conv_ptr + (first + slab) * TAPS * CONV_SLAB
        y = tl.zeros((PIXELS, CONV_SLAB), dtype=tl.float32)
        for tap in tl.range(0, TAPS, num_stages=STAGES):
            dy = tap // KERNEL_SIZE - MARGIN
            dx = tap % KERNEL_SIZE - MARGIN
            in_image = (row + dy >= 0) & (row + dy < H) & (column + dx >= 0) & (column + dx < W)
            h = tl.load(views + slab + (dy * WINDOW_W + dx) * HIDDEN, mask=in_image[:, None], other=0.0)
            y = tl.dot(h, load_matrix(weights, tap * CONV_SLAB, 0, CONV_SLAB, CONV_SLAB, CONV_SLAB), y)
        channels = first + slab + channel
        y = activated(y + tl.load(conv_bias_ptr + channels)[None, :], ACTIVATION).to(dtype)
        tl.store(y_image + channels[None, :], y, mask=inside[:, None])
        pooled = tl.sum(tl.where(inside[:, None], y.to(tl.float32), 0.0), axis=0)  # [CONV_SLAB]
        squeeze = load_matrix(squeeze_ptr, first + slab, 0, CONV_SLAB, SQUEEZE, SQUEEZE).to(tl.float32)
        squeezed += tl.sum(pooled[:, None] * squeeze, axis=0)
    if ORDERED:
        tl.store(squeezed_ptr + ((first_image + i) * parts + part) * SQUEEZE + s, squeezed)
    else:
        tl.atomic_add(squeezed_ptr + (first_image + i) * SQUEEZE + s, squeezed, sem="relaxed")


@triton.jit(do_not_specialize=["first_image"])
def project_kernel(
    x_ptr,  # [N, H, W, C]
    y_ptr,  # [images, H, W, HIDDEN_PADDED]
    squeezed_ptr,  # fp32 [N, SQUEEZE], or, with ORDERED, [N, PARTS, SQUEEZE]
    squeeze_bias_ptr,  # [SQUEEZE], fp32
    excite_ptr,  # [HIDDEN_PADDED, SQUEEZE]
    excite_bias_ptr,  # [HIDDEN_PADDED], fp32
    project_ptr,  # [HIDDEN_PADDED, programs of a pixel * sum(OUT_SLABS)]
    project_bias_ptr,  # [programs of a pixel * sum(OUT_SLABS)], fp32
    gates_ptr,  # [programs, HIDDEN_PADDED]
    out_ptr,  # [N, H, W, K]
    first_image,
    H,
    W,
    K: tl.constexpr,
    HIDDEN_PADDED: tl.constexpr,
    SQUEEZE: tl.constexpr,
    SQUEEZE_ACTIVATION: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ORDERED: tl.constexpr,
    PARTS: tl.constexpr,
    GATES: tl.constexpr,
    PIXELS: tl.constexpr,
    HIDDEN: tl.constexpr,
    OUT_SLABS: tl.constexpr,
    OUT_PROGRAMS: tl.constexpr,
    STAGES: tl.constexpr,
):
    OUT: tl.constexpr = slab_start(OUT_SLABS, len(OUT_SLABS))
    dtype = x_ptr.dtype.element_ty

    programs = tl.cdiv(H * W, PIXELS) * OUT_PROGRAMS
    i = (tl.program_id(0) // programs).to(tl.int64)
    program = tl.program_id(0) % programs
    first = program % OUT_PROGRAMS * OUT
    pixel = program // OUT_PROGRAMS * PIXELS + tl.arange(0, PIXELS)
    inside = pixel < H * W
    n = first_image + i

    s = tl.arange(0, SQUEEZE)
    if ORDERED:
        squeezed = tl.zeros((SQUEEZE,), dtype=tl.float32)
        for part in tl.range(0, PARTS, num_stages=1):
            squeezed += tl.load(squeezed_ptr + (n * PARTS + part) * SQUEEZE + s)
    else:
        squeezed = tl.load(squeezed_ptr + n * SQUEEZE + s)
    squeezed = activated(squeezed / (H * W) + tl.load(squeeze_bias_ptr + s), SQUEEZE_ACTIVATION)  # [SQUEEZE]

    gates = gates_ptr + tl.program_id(0).to(tl.int64) * HIDDEN_PADDED
    for r in tl.range(0, HIDDEN_PADDED, GATES, num_stages=STAGES):
        channel = r + tl.arange(0, GATES)
        excite = load_matrix(excite_ptr, r, 0, GATES, SQUEEZE, SQUEEZE).to(tl.float32)
        gate = tl.sum(excite * squeezed[None, :], axis=1) + tl.load(excite_bias_ptr + channel)
        tl.store(gates + channel, tl.sigmoid(gate).to(dtype))
    tl.debug_barrier()  # other threads of the program read what this one has stored

    image = x_ptr + n * H * W * K + (pixel * K)[:, None]
    zs = ()  # [PIXELS, slab] each
    for j in tl.static_range(len(OUT_SLABS)):
        k = first + slab_start(OUT_SLABS, j) + tl.arange(0, OUT_SLABS[j])
        z = tl.load(project_bias_ptr + k)[None, :] + tl.zeros((PIXELS, 1), dtype=tl.float32)
        if RESIDUAL:
            z += tl.load(image + k[None, :], mask=inside[:, None] & (k < K)[None, :], other=0.0).to(tl.float32)
        zs = zs + (z,)

    channel = tl.arange(0, HIDDEN)
    ys = y_ptr + i * H * W * HIDDEN_PADDED + (pixel * HIDDEN_PADDED)[:, None] + channel[None, :]
    for r in tl.range(0, HIDDEN_PADDED, HIDDEN, num_stages=STAGES):
        y = tl.load(ys + r, mask=inside[:, None], other=0.0)  # [PIXELS, HIDDEN]
        gated = y * tl.load(gates + r + channel)[None, :]
        sums = ()
        for j in tl.static_range(len(OUT_SLABS)):
            column = first + slab_start(OUT_SLABS, j)
            v = load_matrix(project_ptr, r, column, HIDDEN, OUT_SLABS[j], OUT * OUT_PROGRAMS)
            sums = sums + (tl.dot(gated, v, zs[j]),)
        zs = sums

    out = out_ptr + n * H * W * K + (pixel * K)[:, None]
    for j in tl.static_range(len(OUT_SLABS)):
        k = first + slab_start(OUT_SLABS, j) + tl.arange(0, OUT_SLABS[j])
        tl.store(out + k[None, :], zs[j].to(dtype), mask=inside[:, None] & (k < K)[None, :])


def produce_constants(
    height: int,
    width: int,
    in_channels: int,
    hidden_channels: int,
    squeeze_channels: int,
    *,
    kernel_size: int,
    activation: str,
    ordered: bool,
    tile: MBConvTile,
) -> dict[str, object]:
    """Compile-time arguments of the first kernel, by name, for images of `height x width` pixels."""
    window_height, window_width = tile.window(height, width, kernel_size)
    return {
        "C": in_channels,
        "C_PADDED": tile.padded_in(in_channels),
        "HIDDEN_PADDED": tile.padded_hidden(hidden_channels),
        "SQUEEZE": tile.padded_squeeze(squeeze_channels),
        "KERNEL_SIZE": kernel_size,
        "ACTIVATION": activation,
        "ORDERED": ordered,
        "TILE_H": tile.height,
        "TILE_W": tile.width,
        "WINDOW_H": window_height,
        "WINDOW_W": window_width,
        "WINDOW_PIXELS": tile.window_pixels,
        "HIDDEN": tile.hidden,
        "CHANNELS": tile.channels,
        "CONV_SLAB": tile.conv_slab,
        "STAGES": tile.stages,
    }


def project_constants(
    height: int,
    width: int,
    hidden_channels: int,
    out_channels: int,
    squeeze_channels: int,
    *,
    squeeze_activation: str,
    residual: bool,
    ordered: bool,
    tile: MBConvTile,
) -> dict[str, object]:
    """Compile-time arguments of the second kernel, by name, for images of `height x width` pixels."""
    return {
        "K": out_channels,
        "HIDDEN_PADDED": tile.padded_hidden(hidden_channels),
        "SQUEEZE": tile.padded_squeeze(squeeze_channels),
        "SQUEEZE_ACTIVATION": squeeze_activation,
        "RESIDUAL": residual,
        "ORDERED": ordered,
        "PARTS": tile.parts(height, width, hidden_channels) if ordered else 1,
        "GATES": tile.gates(squeeze_channels),
        "PIXELS": tile.project_pixels,
        "HIDDEN": tile.project_hidden,
        "OUT_SLABS": tile.out_slabs(out_channels),
        "OUT_PROGRAMS": tile.out_programs(out_channels),
        "STAGES": tile.project_stages,
    }


class Workspace(NamedTuple):
    """Memory that the two kernels share.

    `scratch` `[programs, window, HIDDEN]` holds the windows of a micro-batch, `y` `[images, H, W, HIDDEN_PADDED]` its
    hidden tensor, `gates` `[programs, HIDDEN_PADDED]` those of each program of the second kernel, `squeezed` the
    squeeze vectors of the whole batch, fp32 `[N, SQUEEZE]` or `[N, parts, SQUEEZE]`.
    """

    scratch: Tensor
    y: Tensor
    gates: Tensor
    squeezed: Tensor


def micro_batches(batch: int | torch.SymInt, images: int) -> list[tuple[int, int]]:
    """First image and number of images of each micro-batch, in order; none has more images than the first.

    A batch of any size, which torch.export and torch.compile trace, is one micro-batch: what they make cannot have more
    launches for more images.
    """
    if not isinstance(batch, int):
        return [(0, batch)]
    return [(first, min(images, batch - first)) for first in range(0, batch, images)]


def new_workspace(
    x: Tensor,
    *,
    hidden_channels: int,
    out_channels: int,
    squeeze_channels: int,
    kernel_size: int,
    ordered: bool,
    tile: MBConvTile,
) -> Workspace:
    """A workspace for images `x` `[N, C, H, W]`; nothing in it has to be initialised."""
    batch, _, height, width = x.shape
    (_, images), *_ = micro_batches(batch, tile.images)
    hidden = tile.padded_hidden(hidden_channels)
    parts = tile.parts(height, width, hidden_channels)
    programs = tile.project_programs(height, width, out_channels)
    window_height, window_width = tile.window(height, width, kernel_size)
    squeezed = (batch, *([parts] if ordered else []), tile.padded_squeeze(squeeze_channels))
    return Workspace(
        scratch(x, (images * parts, window_height * window_width, tile.hidden)),
        scratch(x, (images, height, width, hidden)),
        scratch(x, (images * programs, hidden)),
        scratch(x, squeezed, torch.float32),
    )


def launch(
    x: Tensor,
    expand: Tensor,
    expand_bias: Tensor,
    conv: Tensor,
    conv_bias: Tensor,
    squeeze: Tensor,
    squeeze_bias: Tensor,
    excite: Tensor,
    excite_bias: Tensor,
    project: Tensor,
    project_bias: Tensor,
    out: Tensor,
    *,
    activation: str,
    squeeze_activation: str,
    residual: bool,
    tile: MBConvTile,
    ordered: bool = False,
    workspace: Workspace | None = None,
    wrap: Callable = lambda kernel: kernel,
) -> None:
    """Run the kernels on `x` `[N, C, H, W]` into `out` `[N, K, H, W]`, both channels_last, on the current device.

    Weights are packed for `tile` (`fusion.mbconv_weights.PackedMBConv`). With `ordered`, equal inputs give equal bits.
    `workspace` is what `new_workspace` makes if left out. Nothing is checked here. `wrap` may wrap the kernels, for
    tracing.
    """
    batch, in_channels, height, width = x.shape
    hidden, padded_squeeze = squeeze.shape  # padding them again changes nothing
    kernel_size = packed_kernel_size(conv)
    if workspace is None:
        sizes = {"hidden_channels": hidden, "out_channels": out.shape[1], "squeeze_channels": padded_squeeze}
        workspace = new_workspace(x, **sizes, kernel_size=kernel_size, ordered=ordered, tile=tile)
    scratch, y, gates, squeezed = workspace
    if not ordered:
        zero(squeezed)
    produce = produce_constants(
        height,
        width,
        in_channels,
        hidden,
        padded_squeeze,
        kernel_size=kernel_size,
        activation=activation,
        ordered=ordered,
        tile=tile,
    )
    finish = project_constants(
        height,
        width,
        hidden,
        out.shape[1],
        padded_squeeze,
        squeeze_activation=squeeze_activation,
        residual=residual,
        ordered=ordered,
        tile=tile,
    )
    parts = tile.parts(height, width, hidden)
    programs = tile.project_programs(height, width, out.shape[1])
    for first_image, images in micro_batches(batch, tile.images):
        launch_kernel(
            wrap(produce_kernel),
            (images * parts,),
            x,
            expand,
            expand_bias,
            conv,
            conv_bias,
            squeeze,
            scratch,
            y,
            squeezed,
            first_image,
            height,
            width,
            **produce,
            num_warps=tile.warps,
        )
        launch_kernel(
            wrap(project_kernel),
            (images * programs,),
            x,
            y,
            squeezed,
            squeeze_bias,
            excite,
            excite_bias,
            project,
            project_bias,
            gates,
            out,
            first_image,
            height,
            width,
            **finish,
            num_warps=tile.project_warps,
        )

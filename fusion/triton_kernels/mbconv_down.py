"""MBConv of stride 2 with squeeze-and-excitation as two portable Triton kernels that meet in global memory.

A. Lavin, On the Efficiency of Convolutional Neural Networks, section 5.4. Both kernels run on a micro-batch of images
at a time, and the next one reuses their workspace. The second one is that of stride 1
(`fusion.triton_kernels.mbconv.project_kernel`), on the hidden tensor of half the resolution. The first one is
`produce_down_kernel`.
Its programs divide the parts of the images, `TILE_H x TILE_W` pixels of the output times `HIDDEN` hidden channels, and
each takes one part after the other, through pieces of workspace of its own that so stay in L2:

- It expands the *window*, all pixels of the input that the part depends on, to `window`.
- It convolves *quads*, 2x2 pixels of full resolution, to `full`. An activation follows, so that the blur cannot be a
  part of the convolution.
- It blurs `full` to half the resolution, pools that, multiplies the sums by its rows of the squeeze layer and adds the
  products to the image's squeeze vector by atomic adds, in any order; or, with `ORDERED`, stores them.

The convolution of a slab of channels is a matrix product with a quad in a row: its 4x4 neighbours times 2x2 pixels,
with weights that are zero between groups and where a neighbour is not one of the nine of a pixel. So each hidden
channel is loaded 4 times for a pixel, and not 9 times as if each tap had a product of its own. Channels of a slab are
neighbours in `window`, so that four pixels of a row are one piece of memory.

Without `BLUR` the convolution has stride 2 itself, and each quad gives one pixel of the output, the first of its own:
of the same matrices, the columns of that pixel and the rows of its nine neighbours. Its sums are pooled as they are.
A 5x5 convolution, which has no blur, multiplies a pixel's 25 neighbours with weights of theirs alone.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusion.mbconv_weights import packed_kernel_size
from fusion.planner.mbconv_down_tile import MBConvDownTile
from fusion.relaunch import launch_kernel, scratch, zero
from fusion.triton_kernels.activations import activated
from fusion.triton_kernels.convfirst import load_matrix
from fusion.triton_kernels.mbconv import expand_window, micro_batches, project_constants, project_kernel


@triton.jit
def in_pieces(offset, ELEMENTS: tl.constexpr):
    """The same offsets, of which the compiler knows no more than `ELEMENTS` to be contiguous, and copies them together.

    It copies 16 bytes past the L1 cache, and 8 by way of it.
    """
    return offset // ELEMENTS * ELEMENTS + offset % ELEMENTS


@triton.jit
def convolve_quads(
    window,
    weights,
    bias,
    full,
    top,
    left,
    quad_top,
    quad_left,
    first,
    H,
    W,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    QUADS_H: tl.constexpr,
    QUADS_W: tl.constexpr,
    QUADS: tl.constexpr,
    HIDDEN: tl.constexpr,
    SLAB: tl.constexpr,
    STEP_PIXELS: tl.constexpr,
    COPIED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Convolution and activation of the quads at (quad_top, quad_left), to `full` [2 QUADS_H, 2 QUADS_W, HIDDEN].

    Reads `window` [HIDDEN // SLAB, WINDOW_H, WINDOW_W, SLAB], whose first pixel is (top, left).
    """
    ROW_STEPS: tl.constexpr = 4 // STEP_PIXELS
    DEPTH: tl.constexpr = STEP_PIXELS * SLAB
    k = tl.arange(0, DEPTH)  # channels of STEP_PIXELS neighbours
    n = tl.arange(0, 4 * SLAB)  # channels of a quad's pixels, by rows
    matrices = k[:, None] * (4 * SLAB) + in_pieces(n, COPIED)[None, :]
    places = (n // (2 * SLAB) * (2 * QUADS_W) + n // SLAB % 2) * HIDDEN + n % SLAB
    for slab in tl.range(0, HIDDEN // SLAB, num_stages=1):
        matrix = weights + (first + slab * SLAB).to(tl.int64) * (64 * SLAB) + matrices
        b = tl.load(bias + first + slab * SLAB + n % SLAB)
        for start in tl.range(0, QUADS_H * QUADS_W, QUADS, num_stages=1):
            quad = start + tl.arange(0, QUADS)
            in_window = quad < QUADS_H * QUADS_W
            row = 2 * (quad_top + quad // QUADS_W) - 1  # of the first neighbour
            column = 2 * (quad_left + quad % QUADS_W) - 1
            position = slab * (WINDOW_H * WINDOW_W) + (row - top) * WINDOW_W + column - left
            views = window + (position * SLAB)[:, None] + in_pieces(k, COPIED)[None, :]  # [QUADS, DEPTH]
            columns = column[:, None] + (k // SLAB)[None, :]
            y = tl.zeros((QUADS, 4 * SLAB), dtype=tl.float32)
            for step in tl.range(0, 4 * ROW_STEPS, num_stages=STAGES):
                dy = step // ROW_STEPS
                dx = step % ROW_STEPS * STEP_PIXELS
                in_rows = in_window & (row + dy >= 0) & (row + dy < H)
                in_image = in_rows[:, None] & (columns + dx >= 0) & (columns + dx < W)
                h = tl.load(views + (dy * WINDOW_W + dx) * SLAB, mask=in_image, other=0.0)
                y = tl.dot(h, tl.load(matrix + step * (DEPTH * 4 * SLAB)), y)
            y = activated(y + b[None, :], ACTIVATION).to(full.dtype.element_ty)
            corners = (4 * QUADS_W * (quad // QUADS_W) + 2 * (quad % QUADS_W)) * HIDDEN + slab * SLAB
            tl.store(full + corners[:, None] + places[None, :], y, mask=in_window[:, None])


@triton.jit
def first_pixels(
    window,
    matrix,
    position,
    row,
    column,
    inside,
    H,
    W,
    WINDOW_W: tl.constexpr,
    SLAB: tl.constexpr,
    STEP_PIXELS: tl.constexpr,
    ROW_STEPS: tl.constexpr,
    COPIED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """3x3 convolution of pixels by the matrix of a slab's quads, of which each is the first pixel: [pixels, SLAB].

    `matrix` [STEP_PIXELS * SLAB, SLAB] is where the first step's rows are, and of them the first pixel's columns.
    The pixels' first neighbours are at (row, column) of the image, and in the window `position` pixels after the start.
    """
    k = tl.arange(0, STEP_PIXELS * SLAB)  # channels of STEP_PIXELS neighbours
    views = window + (position * SLAB)[:, None] + in_pieces(k, COPIED)[None, :]
    columns = column[:, None] + (k // SLAB)[None, :]
    y = tl.zeros((row.shape[0], SLAB), dtype=tl.float32)
    for step in tl.range(0, 3 * ROW_STEPS, num_stages=STAGES):
        dy = step // ROW_STEPS
        dx = step % ROW_STEPS * STEP_PIXELS
        in_rows = inside & (row + dy >= 0) & (row + dy < H)
        in_image = in_rows[:, None] & (columns + dx >= 0) & (columns + dx < W)
        near = (dx + k // SLAB < 3)[None, :]  # there may be no fourth one in the window
        h = tl.load(views + (dy * WINDOW_W + dx) * SLAB, mask=in_image & near, other=0.0)
        y = tl.dot(h, tl.load(matrix + (4 * dy + dx) * (4 * SLAB * SLAB)), y)
    return y


@triton.jit
def all_taps(
    window,
    matrix,
    position,
    row,
    column,
    inside,
    H,
    W,
    KERNEL_SIZE: tl.constexpr,
    WINDOW_W: tl.constexpr,
    SLAB: tl.constexpr,
    STEP_PIXELS: tl.constexpr,
    COPIED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The same for a kernel of any size, by a slab's matrix [taps x slab in, slab out], where every column counts."""
    TAPS: tl.constexpr = KERNEL_SIZE * KERNEL_SIZE
    DEPTH: tl.constexpr = STEP_PIXELS * SLAB
    k = tl.arange(0, DEPTH)  # channels of STEP_PIXELS neighbours, from one row to the next
    views = window + (position * SLAB)[:, None] + in_pieces(k, COPIED)[None, :]
    y = tl.zeros((row.shape[0], SLAB), dtype=tl.float32)
    for step in tl.range(0, tl.cdiv(TAPS, STEP_PIXELS), num_stages=STAGES):
        tap = step * STEP_PIXELS + k // SLAB
        dy = tap // KERNEL_SIZE
        dx = tap % KERNEL_SIZE
        rows = row[:, None] + dy[None, :]
        columns = column[:, None] + dx[None, :]
        in_image = inside[:, None] & (rows >= 0) & (rows < H) & (columns >= 0) & (columns < W)
        exists = tap < TAPS  # but for the last ones of the last step
        shifts = (dy * WINDOW_W + dx - k // SLAB) * SLAB  # from the neighbours in one row, as `views` has them
        h = tl.load(views + shifts[None, :], mask=in_image & exists[None, :], other=0.0)
        y = tl.dot(h, tl.load(matrix + step * (DEPTH * SLAB), mask=exists[:, None], other=0.0), y)
    return y


@triton.jit
def convolve_pixels(
    window,
    weights,
    bias,
    squeeze,
    y_image,
    top,
    left,
    out_top,
    out_left,
    first,
    H,
    W,
    HIDDEN_PADDED: tl.constexpr,
    SQUEEZE: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PIXELS: tl.constexpr,
    HIDDEN: tl.constexpr,
    SLAB: tl.constexpr,
    STEP_PIXELS: tl.constexpr,
    ROW_STEPS: tl.constexpr,
    COPIED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Convolution of stride 2 and activation of the part's pixels to `y_image` [ceil(H / 2), ceil(W / 2),
    HIDDEN_PADDED]; their product, summed over pixels, with the squeeze layer's rows: [SQUEEZE].

    Reads `window` as `convolve_quads` does and, of a 3x3 convolution, the same matrices; those of another one are
    [taps x slab in, slab out].
    """
    OUT_H = (H + 1) // 2
    OUT_W = (W + 1) // 2
    NEIGHBOURS: tl.constexpr = 16 if KERNEL_SIZE == 3 else KERNEL_SIZE * KERNEL_SIZE  # in a slab's matrix
    WIDTH: tl.constexpr = 4 * SLAB if KERNEL_SIZE == 3 else SLAB
    k = tl.arange(0, STEP_PIXELS * SLAB)
    n = tl.arange(0, SLAB)
    matrices = k[:, None] * WIDTH + in_pieces(n, COPIED)[None, :]
    squeezed = tl.zeros((SQUEEZE,), dtype=tl.float32)
    for slab in tl.range(0, HIDDEN // SLAB, num_stages=1):
        channels = first + slab * SLAB + n
        matrix = weights + (first + slab * SLAB).to(tl.int64) * (NEIGHBOURS * WIDTH) + matrices
        b = tl.load(bias + channels)
        pooled = tl.zeros((SLAB,), dtype=tl.float32)
        for start in tl.range(0, ROWS * COLUMNS, PIXELS, num_stages=1):
            pixel = start + tl.arange(0, PIXELS)
            out_row = out_top + pixel // COLUMNS
            out_column = out_left + pixel % COLUMNS
            inside = (pixel < ROWS * COLUMNS) & (out_row < OUT_H) & (out_column < OUT_W)
            row = 2 * out_row - KERNEL_SIZE // 2  # of the first neighbour
            column = 2 * out_column - KERNEL_SIZE // 2
            position = slab * (WINDOW_H * WINDOW_W) + (row - top) * WINDOW_W + column - left
            if KERNEL_SIZE == 3:
                y = first_pixels(
                    window,
                    matrix,
                    position,
                    row,
                    column,
                    inside,
                    H,
                    W,
                    WINDOW_W,
                    SLAB,
                    STEP_PIXELS,
                    ROW_STEPS,
                    COPIED,
                    STAGES,
                )
            else:
                y = all_taps(
                    window,
                    matrix,
                    position,
                    row,
                    column,
                    inside,
                    H,
                    W,
                    KERNEL_SIZE,
                    WINDOW_W,
                    SLAB,
                    STEP_PIXELS,
                    COPIED,
                    STAGES,
                )
            y = activated(y + b[None, :], ACTIVATION).to(window.dtype.element_ty)
            pixels = (out_row * OUT_W + out_column) * HIDDEN_PADDED
            tl.store(y_image + pixels[:, None] + channels[None, :], y, mask=inside[:, None])
            pooled += tl.sum(tl.where(inside[:, None], y.to(tl.float32), 0.0), axis=0)
        rows = load_matrix(squeeze, first + slab * SLAB, 0, SLAB, SQUEEZE, SQUEEZE).to(tl.float32)
        squeezed += tl.sum(pooled[:, None] * rows, axis=0)
    return squeezed


@triton.jit
def reflected(position, SIZE):
    """Of a position at most one before or behind `SIZE` rows or columns, that of the same distance within."""
    position = tl.abs(position)
    return tl.where(position < SIZE, position, 2 * SIZE - 2 - position)


@triton.jit
def blur(
    full,
    y_image,
    squeeze,
    out_top,
    out_left,
    quad_top,
    quad_left,
    first,
    H,
    W,
    HIDDEN_PADDED: tl.constexpr,
    SQUEEZE: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    QUADS_W: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLUR_PIXELS: tl.constexpr,
    BLUR_CHANNELS: tl.constexpr,
):
    """Blur the part's pixels of `full` to `y_image` [ceil(H / 2), ceil(W / 2), HIDDEN_PADDED]; their product, summed
    over pixels, with the squeeze layer's rows: [SQUEEZE]."""
    OUT_H = (H + 1) // 2
    OUT_W = (W + 1) // 2
    channel = tl.arange(0, BLUR_CHANNELS)
    squeezed = tl.zeros((SQUEEZE,), dtype=tl.float32)
    for start_channel in tl.range(0, HIDDEN, BLUR_CHANNELS, num_stages=1):
        pooled = tl.zeros((BLUR_CHANNELS,), dtype=tl.float32)
        for start in tl.range(0, TILE_H * TILE_W, BLUR_PIXELS, num_stages=1):
            pixel = start + tl.arange(0, BLUR_PIXELS)
            row = out_top + pixel // TILE_W
            column = out_left + pixel % TILE_W
            inside = ((row < OUT_H) & (column < OUT_W))[:, None]
            y = tl.zeros((BLUR_PIXELS, BLUR_CHANNELS), dtype=tl.float32)
            for dy in tl.static_range(-1, 2):
                rows = (reflected(2 * row + dy, H) - 2 * quad_top) * (2 * QUADS_W)
                for dx in tl.static_range(-1, 2):
                    position = rows + reflected(2 * column + dx, W) - 2 * quad_left
                    views = full + (position * HIDDEN)[:, None] + (start_channel + channel)[None, :]
                    v = tl.load(views, mask=inside, other=0.0).to(tl.float32)
                    y += (2 - dy * dy) * (2 - dx * dx) / 16 * v
            y = y.to(full.dtype.element_ty)
            channels = first + start_channel + channel
            tl.store(y_image + ((row * OUT_W + column) * HIDDEN_PADDED)[:, None] + channels[None, :], y, mask=inside)
            pooled += tl.sum(y.to(tl.float32), axis=0)
        rows = load_matrix(squeeze, first + start_channel, 0, BLUR_CHANNELS, SQUEEZE, SQUEEZE).to(tl.float32)
        squeezed += tl.sum(pooled[:, None] * rows, axis=0)
    return squeezed


@triton.jit(do_not_specialize=["first_image", "images"])
def produce_down_kernel(
    x_ptr,  # [N, H, W, C]
    expand_ptr,  # [C_PADDED, HIDDEN_PADDED]
    expand_bias_ptr,  # [HIDDEN_PADDED], fp32
    conv_ptr,  # for each slab of SLAB channels [4x4 neighbours x slab in, 2x2 pixels x slab out]; 5x5 [25, in, out]
    conv_bias_ptr,  # [HIDDEN_PADDED], fp32
    squeeze_ptr,  # [HIDDEN_PADDED, SQUEEZE]
    window_ptr,  # [programs, HIDDEN // SLAB, WINDOW_H * WINDOW_W, SLAB]
    full_ptr,  # [programs, 2 QUADS_H, 2 QUADS_W, HIDDEN], with BLUR
    y_ptr,  # [images, ceil(H / 2), ceil(W / 2), HIDDEN_PADDED]
    squeezed_ptr,  # fp32 [N, SQUEEZE], or, with ORDERED, [N, parts of an image, SQUEEZE]
    first_image,
    images,
    H,
    W,
    C: tl.constexpr,
    C_PADDED: tl.constexpr,
    HIDDEN_PADDED: tl.constexpr,
    SQUEEZE: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ORDERED: tl.constexpr,
    BLUR: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    WINDOW_PIXELS: tl.constexpr,
    QUADS_H: tl.constexpr,
    QUADS_W: tl.constexpr,
    QUADS: tl.constexpr,
    HIDDEN: tl.constexpr,
    CHANNELS: tl.constexpr,
    SLAB: tl.constexpr,
    STEP_PIXELS: tl.constexpr,
    ROW_STEPS: tl.constexpr,
    COPIED: tl.constexpr,
    BLUR_PIXELS: tl.constexpr,
    BLUR_CHANNELS: tl.constexpr,
    STAGES: tl.constexpr,
):
    GROUPS: tl.constexpr = HIDDEN_PADDED // HIDDEN
    OUT_H = (H + 1) // 2
    OUT_W = (W + 1) // 2
    tiles_w = tl.cdiv(OUT_W, TILE_W)
    parts = tl.cdiv(OUT_H, TILE_H) * tiles_w * GROUPS
    program = tl.program_id(0).to(tl.int64)
    window = window_ptr + program * (WINDOW_H * WINDOW_W * HIDDEN)
    full = full_ptr + program * (4 * QUADS_H * QUADS_W * HIDDEN)
    s = tl.arange(0, SQUEEZE)
    channel = tl.arange(0, HIDDEN)
    places = channel // SLAB * (WINDOW_H * WINDOW_W * SLAB) + channel % SLAB
    for index in tl.range(tl.program_id(0), images * parts, tl.num_programs(0), num_stages=1, disable_licm=True):
        i = (index // parts).to(tl.int64)  # a batch may hold more than 2**31 elements, an image may not
        part = index % parts
        first = part % GROUPS * HIDDEN
        out_top = part // GROUPS // tiles_w * TILE_H
        out_left = part // GROUPS % tiles_w * TILE_W

        # Quads and window are as many in every part: at the borders they move inwards, and nothing outside is computed.
        if BLUR:
            quad_top = tl.minimum(tl.maximum(out_top - 1, 0), OUT_H - QUADS_H)
            quad_left = tl.minimum(tl.maximum(out_left - 1, 0), OUT_W - QUADS_W)
        else:
            quad_top = out_top
            quad_left = out_left
        top = tl.minimum(tl.maximum(2 * quad_top - KERNEL_SIZE // 2, 0), H - WINDOW_H)
        left = tl.minimum(tl.maximum(2 * quad_left - KERNEL_SIZE // 2, 0), W - WINDOW_W)
        expand_window(
            x_ptr + (first_image + i) * H * W * C,
            expand_ptr,
            expand_bias_ptr,
            window,
            places,
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
            SLAB,
            HIDDEN,
            CHANNELS,
            ACTIVATION,
            STAGES,
        )
        tl.debug_barrier()  # other threads of the program read what this one has stored
        y_image = y_ptr + i * OUT_H * OUT_W * HIDDEN_PADDED
        if BLUR:
            convolve_quads(
                window,
                conv_ptr,
                conv_bias_ptr,
                full,
                top,
                left,
                quad_top,
                quad_left,
                first,
                H,
                W,
                WINDOW_H,
                WINDOW_W,
                QUADS_H,
                QUADS_W,
                QUADS,
                HIDDEN,
                SLAB,
                STEP_PIXELS,
                COPIED,
                ACTIVATION,
                STAGES,
            )
            tl.debug_barrier()
            squeezed = blur(
                full,
                y_image,
                squeeze_ptr,
                out_top,
                out_left,
                quad_top,
                quad_left,
                first,
                H,
                W,
                HIDDEN_PADDED,
                SQUEEZE,
                TILE_H,
                TILE_W,
                QUADS_W,
                HIDDEN,
                BLUR_PIXELS,
                BLUR_CHANNELS,
            )
        else:
            squeezed = convolve_pixels(
                window,
                conv_ptr,
                conv_bias_ptr,
                squeeze_ptr,
                y_image,
                top,
                left,
                out_top,
                out_left,
                first,
                H,
                W,
                HIDDEN_PADDED,
                SQUEEZE,
                KERNEL_SIZE,
                WINDOW_H,
                WINDOW_W,
                QUADS_H,
                QUADS_W,
                QUADS,
                HIDDEN,
                SLAB,
                STEP_PIXELS,
                ROW_STEPS,
                COPIED,
                ACTIVATION,
                STAGES,
            )
            tl.debug_barrier()  # the next part's window takes the place of this one's
        if ORDERED:
            tl.store(squeezed_ptr + ((first_image + i) * parts + part) * SQUEEZE + s, squeezed)
        else:
            tl.atomic_add(squeezed_ptr + (first_image + i) * SQUEEZE + s, squeezed, sem="relaxed")


def produce_down_constants(
    height: int,
    width: int,
    in_channels: int,
    hidden_channels: int,
    squeeze_channels: int,
    *,
    kernel_size: int,
    activation: str,
    blur: bool,
    ordered: bool,
    tile: MBConvDownTile,
) -> dict[str, object]:
    """Compile-time arguments of the first kernel, by name, for images of `height x width` pixels."""
    window_height, window_width = tile.window(height, width, blur, kernel_size)
    rows, columns = tile.quad_window(-(-height // 2), -(-width // 2), blur)
    return {
        "C": in_channels,
        "C_PADDED": tile.padded_in(in_channels),
        "HIDDEN_PADDED": tile.padded_hidden(hidden_channels),
        "SQUEEZE": tile.padded_squeeze(squeeze_channels),
        "KERNEL_SIZE": kernel_size,
        "ACTIVATION": activation,
        "ORDERED": ordered,
        "BLUR": blur,
        "TILE_H": tile.height,
        "TILE_W": tile.width,
        "WINDOW_H": window_height,
        "WINDOW_W": window_width,
        "WINDOW_PIXELS": tile.window_pixels,
        "QUADS_H": rows,
        "QUADS_W": columns,
        "QUADS": tile.quads,
        "HIDDEN": tile.hidden,
        "CHANNELS": tile.channels,
        "SLAB": tile.conv_slab,
        "STEP_PIXELS": tile.step_pixels,
        "ROW_STEPS": tile.row_steps(blur),
        "COPIED": tile.copy_bytes // 2,
        "BLUR_PIXELS": tile.blur_pixels(squeeze_channels),
        "BLUR_CHANNELS": tile.blur_channels(squeeze_channels),
        "STAGES": tile.stages,
    }


class DownWorkspace(NamedTuple):
    """Memory that the two kernels share.

    `window` `[programs, window x HIDDEN]` and `full` `[programs, quads x 4 x HIDDEN]` belong to the first kernel's
    programs, `gates` `[programs, HIDDEN_PADDED]` to those of the second. Without a blur there is no `full`, but for an
    element, so that it has an address. `y` `[images, out H, out W, HIDDEN_PADDED]` is the hidden tensor of a
    micro-batch at half the resolution, `squeezed` holds the squeeze vectors of the whole batch, fp32 `[N, SQUEEZE]` or
    `[N, parts, SQUEEZE]`.
    """

    window: Tensor
    full: Tensor
    y: Tensor
    gates: Tensor
    squeezed: Tensor


def new_workspace(
    x: Tensor,
    *,
    hidden_channels: int,
    out_channels: int,
    squeeze_channels: int,
    kernel_size: int,
    ordered: bool,
    tile: MBConvDownTile,
    blur: bool = True,
) -> DownWorkspace:
    """A workspace for images `x` `[N, C, H, W]`; nothing in it has to be initialised."""
    batch, _, height, width = x.shape
    out_height, out_width = -(-height // 2), -(-width // 2)
    (_, images), *_ = micro_batches(batch, tile.images)
    hidden = tile.padded_hidden(hidden_channels)
    parts = tile.parts(out_height, out_width, hidden_channels)
    programs = torch.sym_min(tile.programs, images * parts)
    window, full = tile.scratch_elements(height, width, blur, kernel_size)
    project_programs = tile.project_programs(out_height, out_width, out_channels)
    squeezed = (batch, *([parts] if ordered else []), tile.padded_squeeze(squeeze_channels))
    return DownWorkspace(
        scratch(x, (programs, window)),
        scratch(x, (programs, max(full, 1))),
        scratch(x, (images, out_height, out_width, hidden)),
        scratch(x, (images * project_programs, hidden)),
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
    tile: MBConvDownTile,
    blur: bool = True,
    ordered: bool = False,
    workspace: DownWorkspace | None = None,
    wrap: Callable = lambda kernel: kernel,
) -> None:
    """Run the kernels on `x` `[N, C, H, W]` into `out` `[N, K, ceil(H / 2), ceil(W / 2)]`, both channels_last, on the
    current device.

    Weights are packed for `tile` (`fusion.mbconv_weights.PackedMBConv`). With `ordered`, equal inputs give equal bits.
    `workspace` is what `new_workspace` makes if left out. Nothing is checked here. `wrap` may wrap the kernels, for
    tracing.
    """
    batch, in_channels, height, width = x.shape
    _, out_channels, out_height, out_width = out.shape
    hidden, padded_squeeze = squeeze.shape  # padding them again changes nothing
    kernel_size = packed_kernel_size(conv)
    if workspace is None:
        sizes = {"hidden_channels": hidden, "out_channels": out_channels, "squeeze_channels": padded_squeeze}
        workspace = new_workspace(x, **sizes, kernel_size=kernel_size, ordered=ordered, tile=tile, blur=blur)
    window, full, y, gates, squeezed = workspace
    if not ordered:
        zero(squeezed)
    produce = produce_down_constants(
        height,
        width,
        in_channels,
        hidden,
        padded_squeeze,
        kernel_size=kernel_size,
        activation=activation,
        blur=blur,
        ordered=ordered,
        tile=tile,
    )
    finish = project_constants(
        out_height,
        out_width,
        hidden,
        out_channels,
        padded_squeeze,
        squeeze_activation=squeeze_activation,
        residual=False,
        ordered=ordered,
        tile=tile,
    )
    parts = tile.parts(out_height, out_width, hidden)
    project_programs = tile.project_programs(out_height, out_width, out_channels)
    for first_image, images in micro_batches(batch, tile.images):
        launch_kernel(
            wrap(produce_down_kernel),
            (torch.sym_min(tile.programs, images * parts),),
            x,
            expand,
            expand_bias,
            conv,
            conv_bias,
            squeeze,
            window,
            full,
            y,
            squeezed,
            first_image,
            images,
            height,
            width,
            **produce,
            num_warps=tile.warps,
        )
        launch_kernel(
            wrap(project_kernel),
            (images * project_programs,),
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
            out_height,
            out_width,
            **finish,
            num_warps=tile.project_warps,
        )

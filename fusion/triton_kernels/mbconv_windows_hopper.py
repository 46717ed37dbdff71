"""MBConv with squeeze-and-excitation on Hopper (sm_90) as one kernel in Gluon: groups of 8, larger images, any stride.

As in the kernel for small images (`mbconv_hopper`) a program, eight warps, owns an image and all its hidden channels,
so that no program waits for another one. It goes over the image twice:

*Produce*, window by window, each eight pairs of rows, one for each lane of a warp's eight, with all columns. Windows
overlap by the rows that the convolution of others needs, whose hidden channels are computed twice. Each adds to the
squeeze vector, and leaves the hidden channels of its own rows in a workspace in global memory.

*Project*, pass by pass: pixels in the order of the workspace, as many as the sums of a product have room for, whichever
windows they are of. There they come in pairs, the two slots of a lane in a product's left operand: two rows of a
column, or two columns of a row that a convolution of stride 2 makes of a pair.

Programmatic dependent launch: the kernel may start before the one ahead of it in the stream has finished, and reads
nothing but weights until it has.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from fusion.mbconv_hopper_weights import kernel_size_of
from fusion.planner import mbconv_hopper_tile
from fusion.planner.mbconv_windows_hopper_tile import WindowsTile
from fusion.triton_kernels.hopper_layouts import plain_layout
from fusion.triton_kernels.hopper_parts import (
    fence_async_global,
    fixed,
    slab_start,
    wait_for_previous_kernel,
    zeros,
)
from fusion.triton_kernels.mbconv_hopper import (
    new_bias_input,
    new_hidden,
    pixels_of,
)
from fusion.triton_kernels.mbconv_hopper_gates import excite
from fusion.triton_kernels.mbconv_hopper_launch import launch_images
from fusion.triton_kernels.mbconv_hopper_produce import load_left
from fusion.triton_kernels.mbconv_hopper_project import (
    expect_hidden,
    expect_weights,
    load_hidden,
    load_weights,
    project,
)
from fusion.triton_kernels.mbconv_hopper_room import inputs_of, new_room, outputs_of, weights_of
from fusion.triton_kernels.mbconv_hopper_spec import (
    HIDDEN,
    TILE,
    copy_layout,
    new_barriers,
    tile_layout,
)
from fusion.triton_kernels.mbconv_windows_hopper_produce import produce
from fusion.triton_kernels.mbconv_windows_hopper_spec import constants

LANES = gl.constexpr(mbconv_hopper_tile.LANES)


@gluon.jit
def window_of(index, windows, D: gl.constexpr):
    """Pairs of rows: the first one in a window, the first of its own, and the first after those."""
    top = gl.maximum(gl.minimum(index * D.inner_pairs, D.row_pairs - LANES), 0)
    first = gl.where(index == 0, 0, index * D.inner_pairs + 1)
    end = gl.where(index == windows - 1, D.row_pairs, (index + 1) * D.inner_pairs + 1)
    return top, first, end


@gluon.jit
def offsets_of(
    image, row, column, is_pixel, FIRST: gl.constexpr, SLAB: gl.constexpr, CHANNELS: gl.constexpr, S: gl.constexpr
):
    """[pixels, slab]: offsets of these pixels into images of the size of `S`, and which are inside."""
    channel = FIRST + gl.arange(0, SLAB, gl.SliceLayout(0, copy_layout(SLAB)))
    offsets = (row * S.width + column)[:, None] * CHANNELS + channel[None, :]
    offsets += image.to(gl.int64) * (S.height * S.width * CHANNELS)
    return offsets, is_pixel[:, None] & (channel < CHANNELS)[None, :]


@gluon.jit
def input_offsets(image, top, piece: gl.constexpr, FIRST: gl.constexpr, SLAB: gl.constexpr, S: gl.constexpr):
    """[pixels, slab] of a piece of the window whose first pair of rows is `top`."""
    pixel = gl.arange(0, S.piece_pixels, gl.SliceLayout(1, copy_layout(SLAB)))
    row = (top + pixel % LANES) * 2 + pixel // LANES % 2
    column = piece * S.piece + pixel // TILE
    return offsets_of(image, row, column, (row < S.height) & (column < S.width), FIRST, SLAB, S.in_channels, S)


@gluon.jit
def load_pieces(x_ptr, xs, image, top, FIRST: gl.constexpr, S: gl.constexpr):
    """Pieces from `FIRST` on, as many as are loaded together."""
    COUNT: gl.constexpr = S.pieces_together(FIRST)
    SLABS: gl.constexpr = len(S.in_slabs)
    values = ()
    for piece in gl.static_range(COUNT):
        for s in gl.static_range(SLABS):
            offsets, inside = input_offsets(image, top, FIRST + piece, slab_start(S.in_slabs, s), S.in_slabs[s], S)
            values = values + (gl.load(x_ptr + offsets, mask=inside, other=0.0),)
    for piece in gl.static_range(COUNT):
        for s in gl.static_range(SLABS):
            xs[s].index(FIRST + piece).store(values[piece * SLABS + s])


@gluon.jit
def load_window(x_ptr, xs, image, window, S: gl.constexpr):
    """The pixels of a window, zero outside of the image."""
    top, _, _ = window
    for first in gl.static_range(0, fixed(S.pieces), fixed(S.loaded_pieces)):
        load_pieces(x_ptr, xs, image, top, first, S)


@gluon.jit
def pass_offsets(image, index, FIRST: gl.constexpr, SLAB: gl.constexpr, D: gl.constexpr):
    """[pixels, slab] of a pass, into images of the output."""
    S: gl.constexpr = D.projected
    pixel = gl.arange(0, S.pixels, gl.SliceLayout(1, copy_layout(SLAB)))
    pair = (index * S.tiles + pixel // TILE) * LANES + pixel % LANES
    row, column, second = pair // D.pixel_pairs, pair % D.pixel_pairs, pixel // LANES % 2
    if D.stride == 1:
        row = 2 * row + second
    else:
        column = 2 * column + second
    return offsets_of(image, row, column, (row < S.height) & (column < S.width), FIRST, SLAB, S.out_channels, S)


@gluon.jit
def load_residual(x_ptr, outs, image, index, D: gl.constexpr):
    """What a pass's output is added to."""
    S: gl.constexpr = D.projected
    for s in gl.static_range(len(S.out_slabs)):
        offsets, inside = pass_offsets(image, index, slab_start(S.out_slabs, s), S.out_slabs[s], D)
        pixels_of(outs[s], S.out_slabs[s], S).store(gl.load(x_ptr + offsets, mask=inside, other=0.0))


@gluon.jit
def store_output(out_ptr, outs, image, index, D: gl.constexpr):
    S: gl.constexpr = D.projected
    for s in gl.static_range(len(S.out_slabs)):
        offsets, inside = pass_offsets(image, index, slab_start(S.out_slabs, s), S.out_slabs[s], D)
        value = pixels_of(outs[s], S.out_slabs[s], S).load(copy_layout(S.out_slabs[s]))
        gl.store(out_ptr + offsets, value, mask=inside)


@gluon.jit(do_not_specialize=["windows", "pieces", "passes"])
def mbconv_windows_hopper_kernel(
    x_ptr,  # [N, H, W, C]
    out_ptr,  # [N, H, W, K], or with stride 2 [N, ceil(H / 2), ceil(W / 2), K]
    v256_desc,  # fusion.mbconv_hopper_weights.PackedMBConvHopper.project, in boxes of a product
    v128_desc,  # None where there is no product of this width
    v64_desc,
    v32_desc,
    v16_desc,
    hidden_desc,  # the workspace as rows of 64
    expand_ptr,  # U, registers of two products at a time
    taps_ptr,  # [sweeps, 5 or 13, warps, 32, 8]
    conv_bias_ptr,  # fp32, as all biases
    squeeze_ptr,  # registers of two products at a time, as of U
    squeeze_bias_ptr,
    excite_ptr,  # likewise
    excite_bias_ptr,
    project_bias_ptr,
    workspace_ptr,  # [programs, passes, hidden x pixels of a pass]
    windows,  # of an image
    pieces,  # of a window
    passes,  # of an image
    D: gl.constexpr,
):
    dtype: gl.constexpr = x_ptr.dtype.element_ty
    S: gl.constexpr = D.projected
    v_descs = (v256_desc, v128_desc, v64_desc, v32_desc, v16_desc)
    image = gl.program_id(0)
    room = new_room(dtype, D)
    xs, outs, hidden = inputs_of(room, D), outputs_of(room, D), new_hidden(dtype, S)
    gates = gl.allocate_shared_memory(dtype, [S.gate_room // S.step, S.step], plain_layout(1))
    vector = gl.allocate_shared_memory(gl.float32, [S.squeeze_room], plain_layout(1))
    biases = gl.allocate_shared_memory(gl.float32, [S.bias_room], plain_layout(1))
    weight_ring = (weights_of(room, D), new_barriers(fixed(S.stages)), v_descs)
    hidden_ring = (hidden, new_barriers(fixed(S.hidden_stages)), hidden_desc)
    xs_and_ones = xs + (new_bias_input(dtype, fixed(D.produced)),)
    left = load_left(expand_ptr, 0, True, dtype, fixed(D.produced))
    squeezed = ()
    for _ in gl.static_range(fixed(S.squeeze_parts)):
        squeezed = squeezed + (zeros(HIDDEN, TILE, gl.float32, tile_layout()),)
    wait_for_previous_kernel()
    elements = passes * (S.hidden * S.pixels)
    ws = workspace_ptr + image.to(gl.int64) * elements
    weights = expand_ptr, taps_ptr, conv_bias_ptr, squeeze_ptr
    for index in range(0, windows):
        window = window_of(index, windows, D)
        gl.thread_barrier()
        load_window(x_ptr, xs, image, window, fixed(D.produced))
        fence_async_shared()
        gl.thread_barrier()
        left, squeezed = produce(window, pieces, left, squeezed, xs_and_ones, weights, ws, dtype, D)
    fence_async_global()
    fence_async_shared()
    first_row = image * (elements // 64)
    turns = passes * S.turns
    for turn in gl.static_range(fixed(S.stages)):
        expect_weights(weight_ring, turn, passes, S)
    for turn in gl.static_range(fixed(S.hidden_stages)):
        expect_hidden(hidden_ring, turn, turn, turns, S)
    gl.thread_barrier()
    for turn in gl.static_range(fixed(S.stages)):
        load_weights(weight_ring, turn, passes, S)
    for turn in gl.static_range(fixed(S.hidden_stages)):
        load_hidden(hidden_ring, first_row, turn, turn, turns, S)
    excite(
        squeezed,
        vector,
        gates,
        biases,
        squeeze_bias_ptr,
        excite_ptr,
        excite_bias_ptr,
        project_bias_ptr,
        S,
    )
    for index in range(0, passes):
        if S.residual:
            load_residual(x_ptr, outs, image, index, D)
        project(index, passes, first_row, gates, biases, hidden_ring, weight_ring, outs, S)
        gl.thread_barrier()
        store_output(out_ptr, outs, image, index, D)


def launch(
    x: torch.Tensor,
    expand: torch.Tensor,
    taps: torch.Tensor,
    conv_bias: torch.Tensor,
    squeeze: torch.Tensor,
    squeeze_bias: torch.Tensor,
    excite: torch.Tensor,
    excite_bias: torch.Tensor,
    project: torch.Tensor,
    project_bias: torch.Tensor,
    out: torch.Tensor,
    *,
    hidden_channels: int,
    squeeze_channels: int,
    activation: str,
    squeeze_activation: str,
    tile: WindowsTile,
    residual: bool = False,
    blur: bool = False,
) -> None:
    """Run the kernel on `x` `[N, C, H, W]` into `out` `[N, K, H, W]`, or `[N, K, ceil(H / 2), ceil(W / 2)]` with a tile
    for stride 2, both channels_last, on the current device.

    Weights are packed for `tile` (`fusion.mbconv_hopper_weights.PackedMBConvHopper`), of one block. All addresses are
    multiples of 16 bytes. There is a launch for as many images as the GPU has processors, and all use one workspace.
    The kernel reads weights before the kernel ahead of it in the stream has finished: that one must not be what writes
    them. Nothing is checked here; `blur` must be false.
    """
    _, in_channels, height, width = x.shape
    kernel_size = kernel_size_of(taps)
    spec = constants(
        height,
        width,
        in_channels,
        hidden_channels,
        out.shape[1],
        squeeze_channels,
        kernel_size=kernel_size,
        activation=activation,
        squeeze_activation=squeeze_activation,
        residual=residual,
        tile=tile,
    )
    launch_images(
        mbconv_windows_hopper_kernel,
        x,
        expand,
        taps,
        conv_bias,
        squeeze,
        squeeze_bias,
        excite,
        excite_bias,
        project,
        project_bias,
        out,
        projected=spec.projected,
        workspace_elements=tile.workspace_elements(height, width, hidden_channels),
        windows=tile.windows(height, kernel_size),
        pieces=tile.columns(width) // tile.piece,
        passes=tile.passes(height, width),
        D=spec,
    )

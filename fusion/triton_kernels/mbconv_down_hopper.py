"""Stride-2 MBConv with squeeze-and-excitation on Hopper (sm_90) as one kernel in Gluon: groups of 8.

As in the kernel of stride 1 (`mbconv_hopper`) a program, eight warps, owns an image and all its hidden channels. In its
first phase hidden channels are blurred to half of the rows and columns before they leave the registers: lanes of a warp
have neighbouring rows of a column, and a warp has all columns. So what is squeezed, gated and projected has a quarter
of the pixels, and the second phase is that of stride 1 for a small image. A convolution of stride 2 takes the place of
convolution and blur where the block has no blur-pool.

Shared memory that the input has in the first phase has the output and the stages of the projection's weights in the
second one (`mbconv_hopper_room`).

An image's columns are one tile each, of up to 16 rows, or two of up to 32 rows together. In shared memory pixels of the
input lie tile by tile, in each the first row of every lane before the second. Of the output a tile is two columns of up
to 8 rows, 2 t + 1 and 2 t + 2, or, without a blur, 2 t and 2 t + 1; or one of up to 16, as in the kernel of stride 1.

Programmatic dependent launch: the kernel may start before the one ahead of it in the stream has finished, and reads
nothing but weights until it has.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from fusion.planner.mbconv_down_hopper_tile import MBConvDownHopperTile
from fusion.triton_kernels.hopper_layouts import plain_layout
from fusion.triton_kernels.hopper_parts import (
    fence_async_global,
    fixed,
    slab_start,
    wait_for_previous_kernel,
)
from fusion.triton_kernels.mbconv_down_hopper_produce import produce
from fusion.triton_kernels.mbconv_down_hopper_spec import constants
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
from fusion.triton_kernels.mbconv_hopper_spec import TILE, copy_layout, new_barriers


@gluon.jit
def input_offsets(image, FIRST: gl.constexpr, SLAB: gl.constexpr, CHANNEL: gl.constexpr, D: gl.constexpr):
    """[pixels, slab] from pixel `FIRST` in shared memory on: offsets into images `[N, H, W, C]`, which are inside."""
    S: gl.constexpr = D.produced
    LAYOUT: gl.constexpr = copy_layout(SLAB)
    pixel = FIRST + gl.arange(0, D.load_pixels, gl.SliceLayout(1, LAYOUT))
    channel = CHANNEL + gl.arange(0, SLAB, gl.SliceLayout(0, LAYOUT))
    tile, lane = pixel // TILE, pixel % 8
    row = lane * D.rows_of_lane + tile % D.tiles_of_column * 2 + pixel // 8 % 2
    column = tile // D.tiles_of_column
    inside = (row < S.height) & (column < S.width)
    offsets = (row * S.width + column)[:, None] * S.in_channels + channel[None, :]
    offsets += image.to(gl.int64) * (S.height * S.width * S.in_channels)
    return offsets, inside[:, None] & (channel < S.in_channels)[None, :]


@gluon.jit
def store_input(values, xs, piece, D: gl.constexpr):
    """[pixels, slab] of each slab, from a piece on."""
    for s in gl.static_range(len(xs)):
        target = xs[s].index(piece)
        target._reinterpret(target.dtype, values[s].shape, target.layout).store(values[s])


@gluon.jit
def load_input(x_ptr, xs, image, D: gl.constexpr):
    """All pixels that there is room for, zero outside of the image."""
    S: gl.constexpr = D.produced
    for part in gl.static_range(S.pixels // D.load_pixels):
        values = ()
        for s in gl.static_range(len(S.in_slabs)):
            offsets, inside = input_offsets(image, part * D.load_pixels, S.in_slabs[s], slab_start(S.in_slabs, s), D)
            values = values + (gl.load(x_ptr + offsets, mask=inside, other=0.0),)
        store_input(values, xs, part * D.load_pixels // S.piece_pixels, D)


@gluon.jit
def output_offsets(image, SLAB: gl.constexpr, CHANNEL: gl.constexpr, D: gl.constexpr):
    """[pixels, slab] as `input_offsets`, into images `[N, ceil(H / 2), ceil(W / 2), K]`."""
    S: gl.constexpr = D.projected
    LAYOUT: gl.constexpr = copy_layout(SLAB)
    pixel = gl.arange(0, S.pixels, gl.SliceLayout(1, LAYOUT))
    channel = CHANNEL + gl.arange(0, SLAB, gl.SliceLayout(0, LAYOUT))
    tile, lane, half = pixel // TILE, pixel % 8, pixel // 8 % 2
    if D.tiles_of_column == 1:
        row, column = lane, 2 * tile + half
        if D.blur:
            column = (column + 1) % D.out_columns
    else:
        row, column = 2 * lane + half, tile
    inside = (row < S.height) & (column < S.width) & (pixel < D.out_pixels)
    offsets = (row * S.width + column)[:, None] * S.out_channels + channel[None, :]
    offsets += image.to(gl.int64) * (S.height * S.width * S.out_channels)
    return offsets, inside[:, None] & (channel < S.out_channels)[None, :]


@gluon.jit
def store_output(out_ptr, outs, image, D: gl.constexpr):
    S: gl.constexpr = D.projected
    for s in gl.static_range(len(S.out_slabs)):
        offsets, inside = output_offsets(image, S.out_slabs[s], slab_start(S.out_slabs, s), D)
        value = pixels_of(outs[s], S.out_slabs[s], S).load(copy_layout(S.out_slabs[s]))
        gl.store(out_ptr + offsets, value, mask=inside)


@gluon.jit(do_not_specialize=["pieces"])
def mbconv_down_hopper_kernel(
    x_ptr,  # [N, H, W, C]
    out_ptr,  # [N, ceil(H / 2), ceil(W / 2), K]
    v256_desc,  # fusion.mbconv_hopper_weights.PackedMBConvHopper.project, in boxes of a product
    v128_desc,  # None where there is no product of this width
    v64_desc,
    v32_desc,
    v16_desc,
    hidden_desc,  # the workspace as rows of 64, None if hidden channels stay in shared memory
    expand_ptr,  # U, registers of two products at a time
    taps_ptr,  # [sweeps, 5, warps, 32, 8]
    conv_bias_ptr,  # fp32, as all biases
    squeeze_ptr,  # registers of two products at a time, as of U
    squeeze_bias_ptr,
    excite_ptr,  # likewise
    excite_bias_ptr,
    project_bias_ptr,
    workspace_ptr,  # [programs, hidden x pixels of the output]
    pieces,  # of an image
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
    wait_for_previous_kernel()
    load_input(x_ptr, xs, image, D)
    fence_async_shared()
    gl.thread_barrier()
    ws = workspace_ptr + image.to(gl.int64) * (S.hidden * S.pixels)
    first_row = image * (S.hidden * S.pixels // 64)
    weights = expand_ptr, taps_ptr, conv_bias_ptr, squeeze_ptr
    squeezed = produce(pieces, left, xs_and_ones, weights, (ws, hidden), dtype, D)
    if not S.resident:
        fence_async_global()
    fence_async_shared()
    for turn in gl.static_range(fixed(S.stages)):
        expect_weights(weight_ring, turn, 1, S)
    if not S.resident:
        for index in gl.static_range(fixed(S.hidden_stages)):
            expect_hidden(hidden_ring, index, index, S.turns, S)
    gl.thread_barrier()
    for turn in gl.static_range(fixed(S.stages)):
        load_weights(weight_ring, turn, 1, S)
    if not S.resident:
        for index in gl.static_range(fixed(S.hidden_stages)):
            load_hidden(hidden_ring, first_row, index, index, S.turns, S)
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
    project(0, 1, first_row, gates, biases, hidden_ring, weight_ring, outs, S)
    gl.thread_barrier()
    store_output(out_ptr, outs, image, D)


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
    tile: MBConvDownHopperTile,
    blur: bool = True,
) -> None:
    """Run the kernel on `x` `[N, C, H, W]` into `out` `[N, K, ceil(H / 2), ceil(W / 2)]`, on the current
    device.

    Both are channels_last. Weights are packed for `tile` (`fusion.mbconv_hopper_weights.PackedMBConvHopper`), of one
    block. All addresses are multiples of 16 bytes. There is a launch for as many images as the GPU has processors, and
    all use one workspace. The kernel reads weights before the kernel ahead of it in the stream has finished: that one
    must not be what writes them. Nothing is checked here.
    """
    _, in_channels, height, width = x.shape
    channels = in_channels, hidden_channels, out.shape[1], squeeze_channels
    options = {"activation": activation, "squeeze_activation": squeeze_activation, "blur": blur, "tile": tile}
    spec = constants(height, width, *channels, **options)
    launch_images(
        mbconv_down_hopper_kernel,
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
        pieces=tile.pieces(height, width),
        D=spec,
    )

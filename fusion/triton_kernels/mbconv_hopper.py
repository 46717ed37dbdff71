"""MBConv with squeeze-and-excitation on Hopper (sm_90) as one kernel in Gluon: the block of `mbconv.py`, groups of 8.

A program, eight warps, owns an image at full height and width, and all its hidden channels. So squeeze vectors are sums
within one program, and no program waits for another. It may run several blocks one after the other, the image in shared
memory all the while. Each has two phases.

*Produce*: *sweeps* of 128 hidden channels, 16 for each warp. They are expanded by products whose rows are hidden
channels and whose columns are pixels, so that a warp has all pixels of its hidden channels; activated and transposed in
registers; convolved there by small products, group by group, whose left operands are those registers; activated,
summed over the pixels, and squeezed. As registers hold the result, it is a left operand of the projection, and goes to
shared memory if all hidden channels have room there, else to a workspace that stays in L2 as far as it has room. If
only 64 hidden channels are left for a last sweep, each warpgroup may have half of the columns (`mbconv_hopper_half`).

*Project*: excite gives each hidden channel its gate. The hidden channels come back to registers, are multiplied by
their gates, and projected. The projection's weights come through a ring in shared memory, by TMA.

An image is cut into `bands` of columns. A *tile* is a column of every band: lane g of eight has rows 2 q and 2 q + 1 of
a band, where g = `pairs` band + q. Pixels lie in shared memory tile by tile, the even rows of all lanes before the odd.

Programmatic dependent launch: the kernel may start before the one ahead of it in the stream has finished, and reads
nothing but weights and biases until it has.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from fusion.planner import slabs
from fusion.planner.mbconv_hopper_tile import MBConvHopperTile
from fusion.triton_kernels.hopper_layouts import flat_layout, plain_layout, rows_layout
from fusion.triton_kernels.hopper_parts import (
    fence_async_global,
    fixed,
    slab_start,
    wait_for_previous_kernel,
    zeros,
)
from fusion.triton_kernels.mbconv_hopper_gates import excite
from fusion.triton_kernels.mbconv_hopper_half import produce_half
from fusion.triton_kernels.mbconv_hopper_launch import launch_images
from fusion.triton_kernels.mbconv_hopper_produce import load_left, produce
from fusion.triton_kernels.mbconv_hopper_project import (
    expect_hidden,
    expect_weights,
    load_hidden,
    load_weights,
    project,
)
from fusion.triton_kernels.mbconv_hopper_spec import (
    BIAS,
    TILE,
    UNIT,
    WARPS,
    constants,
    copy_layout,
    new_barriers,
    place,
)

WIDEST = gl.constexpr(slabs.WIDEST)


@gluon.jit
def new_slab(SLAB: gl.constexpr, dtype: gl.constexpr, S: gl.constexpr):
    """[pieces, pixels of a piece, slab] in shared memory."""
    return gl.allocate_shared_memory(dtype, [S.pieces, S.piece_pixels, SLAB], rows_layout(SLAB))


@gluon.constexpr_function
def slabs_together(S, OUT):
    """Slabs of 64 that lie next to each other, as products of the projection write several at once."""
    widths = S.out_slabs if OUT else S.in_slabs
    return widths.count(WIDEST.value) if S.warps_of_rows < WARPS.value else 0


@gluon.constexpr_function
def slabs_apart(S, OUT):
    return (S.out_slabs if OUT else S.in_slabs)[slabs_together(S, OUT) :]


@gluon.jit
def new_slabs(OUT: gl.constexpr, dtype: gl.constexpr, S: gl.constexpr):
    """Slabs of the input or of the output."""
    new = ()
    TOGETHER: gl.constexpr = slabs_together(S, OUT)
    if TOGETHER > 0:
        LAYOUT: gl.constexpr = rows_layout(WIDEST)
        together = gl.allocate_shared_memory(dtype, [TOGETHER * S.pieces, S.piece_pixels, WIDEST], LAYOUT)
        for s in gl.static_range(TOGETHER):
            slab = together.index(s * S.pieces)._reinterpret(dtype, [S.pieces, S.piece_pixels, WIDEST], LAYOUT)
            new = new + (slab,)
    for s in gl.static_range(len(slabs_apart(S, OUT))):
        new = new + (new_slab(slabs_apart(S, OUT)[s], dtype, S),)
    return new


@gluon.jit
def new_outputs(xs, dtype: gl.constexpr, S: gl.constexpr):
    """In the place of the input, if the slabs are the same."""
    if S.in_place:
        return xs
    else:
        return new_slabs(True, dtype, S)


@gluon.jit
def pixels_of(slab, SLAB: gl.constexpr, S: gl.constexpr):
    """[pixels, slab]"""
    return slab._reinterpret(slab.dtype, [S.pixels, SLAB], rows_layout(SLAB))


@gluon.jit
def pixel_offsets(image, SLAB: gl.constexpr, FIRST: gl.constexpr, CHANNELS: gl.constexpr, S: gl.constexpr):
    """[pixels, slab] in the order of shared memory: offsets into images `[N, H, W, channels]`, and which are inside."""
    LAYOUT: gl.constexpr = copy_layout(SLAB)
    pixel = gl.arange(0, S.pixels, gl.SliceLayout(1, LAYOUT))
    channel = FIRST + gl.arange(0, SLAB, gl.SliceLayout(0, LAYOUT))
    tile, lane = pixel // TILE, pixel % 8
    row = lane % S.pairs * 2 + pixel // 8 % 2
    column = place(tile, S) + S.columns * (lane // S.pairs)
    inside = (row < S.height) & (column < S.width) & (tile < S.columns)
    offsets = (row * S.width + column)[:, None] * CHANNELS + channel[None, :]
    offsets += image.to(gl.int64) * (S.height * S.width * CHANNELS)
    return offsets, inside[:, None] & (channel < CHANNELS)[None, :]


@gluon.jit
def load_input(x_ptr, xs, image, S: gl.constexpr):
    values = ()
    for s in gl.static_range(len(S.in_slabs)):
        offsets, inside = pixel_offsets(image, S.in_slabs[s], slab_start(S.in_slabs, s), S.in_channels, S)
        values = values + (gl.load(x_ptr + offsets, mask=inside, other=0.0),)
    for s in gl.static_range(len(S.in_slabs)):
        pixels_of(xs[s], S.in_slabs[s], S).store(values[s])


@gluon.jit
def store_output(out_ptr, outs, image, S: gl.constexpr):
    for s in gl.static_range(len(S.out_slabs)):
        offsets, inside = pixel_offsets(image, S.out_slabs[s], slab_start(S.out_slabs, s), S.out_channels, S)
        value = pixels_of(outs[s], S.out_slabs[s], S).load(copy_layout(S.out_slabs[s]))
        gl.store(out_ptr + offsets, value, mask=inside)


@gluon.jit
def new_bias_input(dtype: gl.constexpr, S: gl.constexpr):
    """Pixels that the expansion's bias is multiplied by: ones in two channels, for the bias and its rounding's rest."""
    PIXELS: gl.constexpr = S.piece_pixels * (2 if S.split else 1)
    slab = gl.allocate_shared_memory(dtype, [1, PIXELS, BIAS], rows_layout(BIAS))
    value = zeros(PIXELS, BIAS, gl.float32, copy_layout(BIAS))
    value += gl.where(gl.arange(0, BIAS, gl.SliceLayout(0, copy_layout(BIAS))) < 2, 1.0, 0.0)[None, :]
    slab.index(0).store(value.to(dtype))
    return slab


@gluon.jit
def new_weights(dtype: gl.constexpr, S: gl.constexpr):
    """Stages of the projection's weights, [stages, rows, 64] for each product."""
    vs = ()
    for s in gl.static_range(len(S.products)):
        vs = vs + (gl.allocate_shared_memory(dtype, [S.stages, S.step * S.products[s] // 64, 64], rows_layout(64)),)
    return vs


@gluon.jit
def new_resident(dtype: gl.constexpr, S: gl.constexpr):
    SHAPE: gl.constexpr = [S.sweeps // S.together * S.tiles, WARPS, UNIT]
    return gl.allocate_shared_memory(dtype, SHAPE, plain_layout(2))


@gluon.jit
def new_hidden(dtype: gl.constexpr, S: gl.constexpr):
    """Hidden channels in shared memory, for each of the sweeps that are together.

    All of them, [turns x tiles, warps, 256], or stages for what comes back from the workspace, [stages, rows, 64].
    """
    if S.resident:
        new = ()
        for _ in gl.static_range(fixed(S.together)):
            new = new + (new_resident(dtype, S),)
        return new
    else:
        stages = gl.allocate_shared_memory(dtype, [S.hidden_stages, S.hidden_rows, 64], flat_layout())
        return stages, stages


@gluon.jit(do_not_specialize=["blocks", "pieces"])
def mbconv_hopper_kernel(
    x_ptr,  # [N, H, W, C]
    out_ptr,  # [N, H, W, K]
    v256_desc,  # fusion.mbconv_hopper_weights.PackedMBConvHopper.project, in boxes of a product
    v128_desc,  # None where there is no product of this width
    v64_desc,
    v32_desc,
    v16_desc,
    hidden_desc,  # the workspace as rows of 64, None if hidden channels stay in shared memory
    expand_ptr,  # U, registers of two products at a time
    taps_ptr,  # [blocks, sweeps, 5, warps, 32, 8]
    conv_bias_ptr,  # fp32, as all biases
    squeeze_ptr,  # registers of two products at a time, as of U
    squeeze_bias_ptr,
    excite_ptr,  # likewise
    excite_bias_ptr,
    project_bias_ptr,
    workspace_ptr,  # [programs, hidden x pixels]
    blocks,
    pieces,  # of an image
    S: gl.constexpr,
):
    dtype: gl.constexpr = x_ptr.dtype.element_ty
    OUT: gl.constexpr = slab_start(S.out_slabs, len(S.out_slabs))
    v_descs = (v256_desc, v128_desc, v64_desc, v32_desc, v16_desc)
    image = gl.program_id(0)
    xs = new_slabs(False, dtype, S)
    outs = new_outputs(xs, dtype, S)
    vs = new_weights(dtype, S)
    hidden = new_hidden(dtype, S)
    gates = gl.allocate_shared_memory(dtype, [S.gate_room // S.step, S.step], plain_layout(1))
    vector = gl.allocate_shared_memory(gl.float32, [S.squeeze_room], plain_layout(1))
    biases = gl.allocate_shared_memory(gl.float32, [S.bias_room], plain_layout(1))
    weight_ring = (vs, new_barriers(fixed(S.stages)), v_descs)
    hidden_ring = (hidden, new_barriers(fixed(S.hidden_stages)), hidden_desc)
    xs_and_ones = xs + (new_bias_input(dtype, S),)
    fence_async_shared()
    gl.thread_barrier()
    for turn in gl.static_range(fixed(S.stages)):
        expect_weights(weight_ring, turn, blocks, S)
    gl.thread_barrier()
    for turn in gl.static_range(fixed(S.stages)):
        load_weights(weight_ring, turn, blocks, S)
    weights = expand_ptr, taps_ptr, conv_bias_ptr, squeeze_ptr
    left = load_left(expand_ptr, 0, True, dtype, S)
    wait_for_previous_kernel()
    load_input(x_ptr, xs, image, S)
    fence_async_shared()
    gl.thread_barrier()
    ws = workspace_ptr + image.to(gl.int64) * (S.hidden * S.pixels)
    first_row = image * (S.hidden * S.pixels // 64)
    for block in range(0, blocks):
        if not S.at_once:
            left = load_left(expand_ptr, block * S.sweeps, True, dtype, S)
        left, squeezed = produce(block, blocks, pieces, left, xs_and_ones, weights, (ws, hidden), dtype, S)
        if S.split:
            squeezed = produce_half(block, squeezed, xs_and_ones, weights, ws, hidden[0].index(0), dtype, S)
        if not S.resident:
            fence_async_global()
            fence_async_shared()
            for index in gl.static_range(fixed(S.hidden_stages)):
                expect_hidden(hidden_ring, block * S.turns + index, index, S.turns, S)
            gl.thread_barrier()
            for index in gl.static_range(fixed(S.hidden_stages)):
                load_hidden(hidden_ring, first_row, block * S.turns + index, index, S.turns, S)
        excite(
            squeezed,
            vector,
            gates,
            biases,
            squeeze_bias_ptr + block * (16 * S.squeeze_depths),
            excite_ptr + block * (S.sweeps * S.squeeze_depths * UNIT * WARPS // 2),
            excite_bias_ptr + block * S.packed_hidden,
            project_bias_ptr + block * OUT,
            S,
        )
        project(block, blocks, first_row, gates, biases, hidden_ring, weight_ring, outs, S)
        fence_async_shared()
        gl.thread_barrier()
    store_output(out_ptr, outs, image, S)


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
    residual: bool,
    tile: MBConvHopperTile,
) -> None:
    """Run the kernel on `x` `[N, C, H, W]` into `out` `[N, K, H, W]`, both channels_last, on the current device.

    Weights are packed for `tile` (`fusion.mbconv_hopper_weights.PackedMBConvHopper`), of one block or of several. All
    addresses are multiples of 16 bytes. There is a launch for as many images as the GPU has processors, and all use one
    workspace. The kernel reads weights and biases before the kernel ahead of it in the stream has finished: that one
    must not be what writes them. Nothing is checked here.
    """
    _, in_channels, height, width = x.shape
    spec = constants(
        height,
        width,
        in_channels,
        hidden_channels,
        out.shape[1],
        squeeze_channels,
        activation=activation,
        squeeze_activation=squeeze_activation,
        residual=residual,
        tile=tile,
    )
    launch_images(
        mbconv_hopper_kernel,
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
        projected=spec,
        workspace_elements=tile.workspace_elements(width, hidden_channels),
        blocks=len(expand),
        pieces=spec.columns // spec.piece,
        S=spec,
    )

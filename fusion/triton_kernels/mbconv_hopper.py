"""MBConv with squeeze-and-excitation on Hopper (sm_90) as one kernel in Gluon: the block of `mbconv.py`, groups of 8.

A program owns whole images, a *tile*, at full height and width, and all their hidden channels. So squeeze vectors are
sums within one program, and no program waits for another. Its two partitions, a warpgroup each, work in two phases.

*Produce*: the partitions take turns at *chunks* of 64 hidden channels. A chunk is expanded from the input, which is in
shared memory, by products whose rows are hidden channels and whose columns are all pixels of the tile. Half of it at a
time is activated, transposed into a buffer of rows in shared memory, and convolved by products of shifted views of that
buffer. The result is activated, summed over the pixels, and written, as the registers hold it, to a workspace that
stays in L2 as far as it has room.

*Project*: squeeze and excite give each hidden channel its gate. The hidden channels come back to registers, which now
hold the left operand of a product, are multiplied by their gates, and projected. The projection's weights come through
a ring in shared memory, by TMA, for both partitions.

An image of `height x width` pixels is cut into `bands` of `rows` rows each. Row j of all bands is a *row buffer*, whose
pixels lie column by column, those of all bands in turn. So a shift by a column is a shift by `bands` pixels, zeros
before and after a row buffer are the image's left and right edges, and the row above the first of a band is the last
one of the band before: a copy of that row, shifted by one pixel, in which the last band is zero. Likewise the row
below the last of a band is a copy of the first one, in which the first band is zero.

Programmatic dependent launch: the kernel may start before the one ahead of it in the stream has finished, and reads
nothing but weights and biases until it has.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fusion.planner.mbconv_hopper_tile import WARPS, MBConvHopperTile
from fusion.triton_kernels.hopper_layouts import flat_layout, plain_layout, rows_layout
from fusion.triton_kernels.hopper_parts import fixed, processor_count, slab_start, wait_for_previous_kernel
from fusion.triton_kernels.mbconv_hopper_gates import add_shares, average, excite, load_excite, squeeze, store_shares
from fusion.triton_kernels.mbconv_hopper_produce import clear_pads, load_biases, load_taps, produce
from fusion.triton_kernels.mbconv_hopper_project import load_project, project
from fusion.triton_kernels.mbconv_hopper_spec import (
    CREW,
    HALF,
    SLAB_WIDTHS,
    Spec,
    constants,
    new_barriers,
    pixels_layout,
    width_index,
)

WORKER_REGISTERS = gl.constexpr(240)
"""Of each thread of the second partition; it leaves as many to the first."""


@gluon.jit
def new_slab(SLAB: gl.constexpr, dtype: gl.constexpr, S: gl.constexpr):
    """[images, pixels, slab] in shared memory."""
    return gl.allocate_shared_memory(dtype, [S.images, S.image_pixels, SLAB], rows_layout(SLAB))


@gluon.jit
def units_of(arena):
    """The arena in units of 512 bytes."""
    return arena.index(0)._reinterpret(arena.dtype, [2 * arena.shape[0], 16, 16], rows_layout(16))


@gluon.jit
def buffer_of(arena, PARTITION: gl.constexpr, S: gl.constexpr):
    """A partition's row buffers, [atoms, 8 pixels, 32]."""
    first = units_of(arena).index(PARTITION * S.partition_bytes // 512)
    return first._reinterpret(arena.dtype, [S.buffer_pixels // 8, 8, HALF], rows_layout(32))


@gluon.jit
def taps_of(arena, PARTITION: gl.constexpr, S: gl.constexpr):
    """A partition's taps of both halves, each [2 pieces x 3 columns x 3 rows, 16 out, 16 in]."""
    first = units_of(arena).index((PARTITION * S.partition_bytes + S.taps_start) // 512)
    return first._reinterpret(arena.dtype, [36, 16, 16], rows_layout(16))


@gluon.jit
def meet(barriers, INDEX: gl.constexpr):
    """Wait for the other partition."""
    gl.thread_barrier()
    mbarrier.arrive(barriers.index(INDEX))
    mbarrier.wait(barriers.index(INDEX), 0)


@gluon.jit
def walk(
    xs,
    x_full,
    outs,
    arena,
    taps_full,
    v_full,
    v_free,
    meets,
    descs,
    out_descs,
    expand_ptr,
    squeeze_ptr,
    squeeze_bias_ptr,
    excite_ptr,
    excite_bias_ptr,
    biases_ptr,
    biases,
    out_bias,
    ws,
    pool,
    gates,
    image,
    PARTITION: gl.constexpr,
    S: gl.constexpr,
):
    """A partition's part."""
    buffer = buffer_of(arena, PARTITION, S)
    w = taps_of(arena, PARTITION, S)
    shares = arena.index(S.shares_atom)._reinterpret(gl.float32, [5 * CREW * S.images, S.squeeze], plain_layout(1))
    vectors = shares.index((4 * CREW + PARTITION) * S.images)._reinterpret(
        gl.float32, [S.images, S.squeeze], plain_layout(1)
    )
    load_biases(biases, biases_ptr + PARTITION * S.bias_elements, S)
    produce(image, xs, x_full, buffer, w, taps_full, descs, expand_ptr, biases, ws, pool, PARTITION, S)
    average(pool, gates, PARTITION, S)  # gates take the place of the means
    squeezed = squeeze(squeeze_ptr, gates, PARTITION, S)
    fence_async_shared()
    meet(meets, 0)
    if PARTITION == 0:
        for stage in gl.static_range(fixed(S.stages)):
            load_project(descs[2], arena, v_full, stage, S)
    store_shares(shares, squeezed, PARTITION, S)
    weights = load_excite(excite_ptr, min(PARTITION, S.gate_steps - 1), S)
    meet(meets, 1)
    add_shares(squeeze_bias_ptr, shares, vectors, S)
    excite(weights, excite_ptr, excite_bias_ptr, vectors, gates, PARTITION, S)
    meet(meets, 2)
    project(ws, gates, arena, v_full, v_free, descs[2], outs, out_bias, PARTITION, S)
    meet(meets, 3)
    if PARTITION == 0:
        for s in gl.static_range(len(S.store_slabs)):
            for i in gl.static_range(fixed(S.images)):
                desc = out_descs[width_index(S.store_slabs[s])]
                source = outs[s].index(i)._reinterpret(arena.dtype, desc.block_shape, desc.layout)
                tma.async_copy_shared_to_global(desc, [image + i, 0, 0, 0, slab_start(S.store_slabs, s)], source)
        tma.store_wait(0)


@gluon.jit
def mbconv_hopper_kernel(
    x64_desc,  # x as [N, rows, W, bands, C], in boxes [1, rows, columns, bands, 64]
    x32_desc,  # None where there is no slab of this width
    x16_desc,
    out64_desc,  # [N, rows, W, bands, K]
    out32_desc,
    out16_desc,
    weights64_desc,  # fusion.mbconv_hopper_weights.PackedMBConvHopper.weights in boxes [64, 64]
    weights8_desc,  # [8, 64]
    project_desc,  # [step, 64]
    expand_ptr,  # U, [chunks, C / 16, threads, 8], as threads hold it
    biases_ptr,  # [partitions, bias_elements]
    squeeze_ptr,  # [hidden, squeeze]
    excite_ptr,  # [squeeze, hidden]
    squeeze_bias_ptr,  # fp32, as the next two
    excite_bias_ptr,
    project_bias_ptr,
    workspace_ptr,  # [programs, workspace_elements]
    S: gl.constexpr,
):
    dtype: gl.constexpr = expand_ptr.dtype.element_ty
    x_descs = (x64_desc, x32_desc, x16_desc)
    out_descs = (out64_desc, out32_desc, out16_desc)
    descs = (weights64_desc, weights8_desc, project_desc)
    image = gl.program_id(0) * S.images
    xs = ()
    for s in gl.static_range(len(S.in_slabs)):
        xs = xs + (new_slab(S.in_slabs[s], dtype, S),)
    if S.in_slabs == S.store_slabs:
        outs = xs
    else:
        outs = ()
        for s in gl.static_range(len(S.store_slabs)):
            outs = outs + (new_slab(S.store_slabs[s], dtype, S),)
    arena = gl.allocate_shared_memory(dtype, [S.arena_atoms, 8, 64], rows_layout(64))
    x_full = new_barriers(fixed(len(S.in_slabs)), 1)
    taps_full = ()
    for _ in gl.static_range(CREW):
        taps_full = taps_full + (new_barriers(2, 1),)
    v_full = new_barriers(fixed(S.stages), 1)
    v_free = new_barriers(fixed(S.stages), CREW - 1)
    meets = new_barriers(4, CREW)
    gates = gl.allocate_shared_memory(dtype, [S.images * S.gate_steps * 8, 32], plain_layout(1))
    biases = ()
    for p in gl.static_range(CREW):
        biases = biases + (gl.allocate_shared_memory(dtype, [S.bias_elements // 16, 16], plain_layout(1)),)
        clear_pads(buffer_of(arena, p, S), S)
    fence_async_shared()
    gl.thread_barrier()
    for p in gl.static_range(CREW):
        for half in gl.static_range(2):
            load_taps(descs, taps_of(arena, p, S), taps_full[p], half, 2 * p + half, p < S.chunks)
    wait_for_previous_kernel()
    for s in gl.static_range(len(S.in_slabs)):
        desc = x_descs[width_index(S.in_slabs[s])]
        mbarrier.expect(x_full.index(s), 2 * S.pixels * S.in_slabs[s])
        for i in gl.static_range(fixed(S.images)):
            target = xs[s].index(i)._reinterpret(dtype, desc.block_shape, desc.layout)
            tma.async_copy_global_to_shared(
                desc, [image + i, 0, 0, 0, slab_start(S.in_slabs, s)], x_full.index(s), target
            )
    ws = workspace_ptr + gl.program_id(0).to(gl.int64) * S.workspace_elements
    pool = (ws + S.chunks * 64 * S.pixels).to(gl.pointer_type(gl.float32), bitcast=True)
    gl.thread_barrier()
    gl.warp_specialize(
        [
            (
                walk,
                (
                    xs,
                    x_full,
                    outs,
                    arena,
                    taps_full[0],
                    v_full,
                    v_free,
                    meets,
                    descs,
                    out_descs,
                    expand_ptr,
                    squeeze_ptr,
                    squeeze_bias_ptr,
                    excite_ptr,
                    excite_bias_ptr,
                    biases_ptr,
                    biases[0],
                    project_bias_ptr,
                    ws,
                    pool,
                    gates,
                    image,
                    0,
                    S,
                ),
            ),
            (
                walk,
                (
                    xs,
                    x_full,
                    outs,
                    arena,
                    taps_full[1],
                    v_full,
                    v_free,
                    meets,
                    descs,
                    out_descs,
                    expand_ptr,
                    squeeze_ptr,
                    squeeze_bias_ptr,
                    excite_ptr,
                    excite_bias_ptr,
                    biases_ptr,
                    biases[1],
                    project_bias_ptr,
                    ws,
                    pool,
                    gates,
                    image,
                    1,
                    S,
                ),
            ),
        ],
        [gl.num_warps()],
        [WORKER_REGISTERS],
    )


def descriptor_boxes(spec: Spec) -> dict[str, list[int]]:
    """What one copy by TMA brings: the box of every descriptor that the kernel needs, by the argument's name."""
    image = [1, spec.rows, spec.columns, spec.bands]
    sides = {"x": spec.in_slabs, "out": spec.store_slabs}
    boxes = {
        f"{name}{width}_desc": [*image, width]
        for name, slabs in sides.items()
        for width in SLAB_WIDTHS
        if width in slabs
    }
    return boxes | {"weights64_desc": [64, 64], "weights8_desc": [8, 64], "project_desc": [spec.step, 64]}


def descriptor_layout(box: list[int]) -> gl.NVMMASharedLayout:
    """Of what a copy brings: pixels that products read, or weights as they are packed."""
    return flat_layout() if len(box) == 2 else pixels_layout(box[-1])


def launch(
    x: torch.Tensor,
    expand: torch.Tensor,
    weights: torch.Tensor,
    biases: torch.Tensor,
    squeeze: torch.Tensor,
    squeeze_bias: torch.Tensor,
    excite: torch.Tensor,
    excite_bias: torch.Tensor,
    project_bias: torch.Tensor,
    out: torch.Tensor,
    *,
    hidden_channels: int,
    squeeze_channels: int,
    activation: str,
    residual: bool,
    tile: MBConvHopperTile,
) -> None:
    """Run the kernel on `x` `[N, C, H, W]` into `out` `[N, K, H, W]`, both channels_last, on the current device.

    Weights are packed for `tile` (`fusion.mbconv_hopper_weights.PackedMBConvHopper`). All addresses are multiples of
    16 bytes. There is a launch for as many images as the GPU's processors hold at a time, and all use one workspace.
    The kernel reads weights and biases before the kernel ahead of it in the stream has finished: that one must not be
    what writes them. Nothing is checked here.
    """
    batch, in_channels, height, width = x.shape
    spec = constants(
        height,
        width,
        in_channels,
        hidden_channels,
        out.shape[1],
        squeeze_channels,
        activation=activation,
        residual=residual,
        tile=tile,
    )
    programs = min(-(-batch // tile.images), processor_count(x.device.index))
    workspace = torch.empty(programs * spec.workspace_elements, dtype=x.dtype, device=x.device)
    boxes = descriptor_boxes(spec)
    descriptors = {
        name: TensorDescriptor(weights, list(weights.shape), [weights.shape[1], 1], box, descriptor_layout(box))
        for name, box in boxes.items()
        if len(box) == 2
    }
    for first in range(0, batch, programs * tile.images):
        images = slice(first, first + programs * tile.images)
        pixels = {
            f"{name}{slab}_desc": pixels_descriptor(tensor[images], spec, boxes.get(f"{name}{slab}_desc"))
            for name, tensor in (("x", x), ("out", out))
            for slab in SLAB_WIDTHS
        }
        mbconv_hopper_kernel[(-(-x[images].shape[0] // tile.images),)](
            **pixels,
            **descriptors,
            expand_ptr=expand,
            biases_ptr=biases,
            squeeze_ptr=squeeze,
            excite_ptr=excite,
            squeeze_bias_ptr=squeeze_bias,
            excite_bias_ptr=excite_bias,
            project_bias_ptr=project_bias,
            workspace_ptr=workspace,
            S=spec,
            num_warps=WARPS,
            launch_pdl=True,
        )


def pixels_descriptor(tensor: torch.Tensor, spec: Spec, box: list[int] | None) -> TensorDescriptor | None:
    """Of images `[N, C, H, W]` as [N, rows, columns, bands, C]; None without a box."""
    if box is None:
        return None
    batch, channels, height, width = tensor.shape
    return TensorDescriptor(
        tensor,
        [batch, spec.rows, width, height // spec.rows, channels],
        [height * width * channels, width * channels, channels, spec.rows * width * channels, 1],
        box,
        descriptor_layout(box),
    )

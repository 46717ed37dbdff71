"""The FFN block on Hopper (sm_90) as a persistent kernel in Gluon: Z = x + relu(x U + a) V + b, pixel by pixel.

The pixels of a batch are one list `[P, C]`. Two partitions of a program, a warpgroup each, walk through it, a *tile* of
one or two *blocks* of 64 pixels at a time. TMA brings a tile's input to shared memory, in *slabs* of up to 64 channels,
and takes its output from there. The hidden channels are computed in *steps*: a step's expansion is summed, rounded,
activated and projected in registers, where a sum has the layout of the next product's left operand. While one block is
activated, products of the other block, or of the other partition, are under way.

TMA brings the weights to shared memory too, in *chunks*: what a step needs of U, and of V. Where the chunks of all
steps have room they stay. Otherwise they come through two rings, again for every tile, and the first partition replaces
a chunk when both have used it.

Programmatic dependent launch: the kernel may start before the one ahead of it in the stream has finished, and reads
nothing but weights and biases until it has.
"""

from dataclasses import dataclass
from functools import cache

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fusion.planner.ffn_tile import BLOCK_PIXELS, PARTITIONS, WARPS, WEIGHT_COLUMNS, FfnTile
from fusion.relaunch import launch_kernel
from fusion.triton_kernels.hopper_layouts import (
    operand_layout,
    plain_layout,
    rows_layout,
    sum_layout,
    thread_layout,
)
from fusion.triton_kernels.hopper_parts import (
    activate,
    bias_slab,
    fixed,
    hidden_bias,
    load_out_bias,
    processor_count,
    slab_start,
    wait_for_previous_kernel,
    zeros,
)

SLAB_WIDTHS = (64, 32, 16)
"""Of slabs: for each there may be a descriptor of the input, the output and the weights."""
BLOCK = gl.constexpr(BLOCK_PIXELS)
CREW = gl.constexpr(PARTITIONS)
"""Partitions of a program."""
WORKER_REGISTERS = gl.constexpr(240)
"""Of each thread of the second partition; it leaves as many to the first."""
STEP_BITS = gl.constexpr(30)
TILE_BITS = gl.constexpr(20)
"""Bits of a step's and a tile's number; those above make a zero that the compiler cannot see."""


@dataclass(frozen=True)
class Spec:
    """Compile-time constants of the kernel: the block, and how `fusion.planner.ffn_tile.FfnTile` divides it.

    `in_slabs` and `out_slabs` are the widths of the slabs of channels. The hidden channels take `steps` steps of
    `hidden`. A tile has `blocks` blocks, and a partition has `stages` tiles in shared memory at a time;
    `expand_chunks` of U and `project_chunks` of V are there for both partitions.
    """

    residual: bool
    in_slabs: tuple[int, ...]
    out_slabs: tuple[int, ...]
    steps: int
    hidden: int
    blocks: int
    stages: int
    expand_chunks: int
    project_chunks: int
    x_in_registers: int

    @property
    def in_place(self) -> bool:
        """Whether the output takes the place of the input in shared memory."""
        return self.in_slabs == self.out_slabs

    @property
    def streams(self) -> bool:
        """Whether chunks are replaced, because not all have room."""
        return self.expand_chunks < self.steps

    @property
    def tile_pixels(self) -> int:
        return self.blocks * BLOCK_PIXELS


@gluon.constexpr_function
def slab_bytes(slabs, rows):
    """Of `rows` rows of all slabs."""
    return 2 * rows * sum(slabs)


@gluon.constexpr_function
def width_index(width):
    """Index of the descriptor for slabs of this width, in the order of `SLAB_WIDTHS`."""
    return (64 // width).bit_length() - 1


@gluon.jit
def new_slab(COUNT: gl.constexpr, ROWS: gl.constexpr, SLAB: gl.constexpr, dtype: gl.constexpr):
    """[COUNT, ROWS, SLAB] in shared memory."""
    return gl.allocate_shared_memory(dtype, [COUNT, ROWS, SLAB], rows_layout(SLAB))


@gluon.jit
def new_tiles(COUNT: gl.constexpr, SLABS: gl.constexpr, ROWS: gl.constexpr, dtype: gl.constexpr):
    """For each slab [COUNT, ROWS, slab] in shared memory."""
    slabs = ()
    for s in gl.static_range(len(SLABS)):
        slabs = slabs + (new_slab(COUNT, ROWS, SLABS[s], dtype),)
    return slabs


@gluon.jit
def new_barriers(COUNT: gl.constexpr):
    """[COUNT, 1], each for one arrival."""
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(barriers.index(i), count=1)
    return barriers


@gluon.jit
def load_chunk(weights_descs, ring, full, step, used, CHUNKS: gl.constexpr, FIRST: gl.constexpr, S: gl.constexpr):
    """Start to load U or V of a step, of which `FIRST` is the first slab; steps count on from tile to tile."""
    SLABS: gl.constexpr = S.in_slabs if FIRST == 0 else S.out_slabs
    barrier = full.index(step % CHUNKS)
    mbarrier.expect(barrier, slab_bytes(SLABS, S.hidden), pred=used)
    for s in gl.static_range(len(SLABS)):
        row = (step % S.steps * (len(S.in_slabs) + len(S.out_slabs)) + FIRST + s) * S.hidden
        desc = weights_descs[width_index(SLABS[s])]
        tma.async_copy_global_to_shared(desc, [row, 0], barrier, ring[s].index(step % CHUNKS), pred=used)


@gluon.jit
def load_expand_chunk(weights_descs, us, full, step, steps, S: gl.constexpr):
    """Start to load U of one of `steps` steps, if it is one."""
    load_chunk(weights_descs, us, full, step, step < steps, S.expand_chunks, 0, S)


@gluon.jit
def load_project_chunk(weights_descs, vs, full, step, steps, S: gl.constexpr):
    """Start to load V of one of `steps` steps, if it is one."""
    load_chunk(weights_descs, vs, full, step, step < steps, S.project_chunks, fixed(len(S.in_slabs)), S)


@gluon.jit
def wait_for_chunk(full, step, tile, CHUNKS: gl.constexpr, S: gl.constexpr):
    """Chunks that stay are waited for in the first tile only."""
    if S.streams:
        mbarrier.wait(full.index(step % CHUNKS), (step // CHUNKS) & 1)
    else:
        mbarrier.wait(full.index(step % CHUNKS), 0, pred=tile == 0)


@gluon.jit
def release_chunks(free, step, S: gl.constexpr):
    """The second partition has used U of a step and V of the step before."""
    gl.thread_barrier()
    mbarrier.arrive(free.index(step % S.expand_chunks))


@gluon.jit
def replace_chunks(weights_descs, us, vs, u_full, v_full, free, step, steps, S: gl.constexpr):
    """The first partition has used them too, and replaces them; before the first steps there is nothing to replace."""
    gl.thread_barrier()
    mbarrier.wait(free.index(step % S.expand_chunks), (step // S.expand_chunks) & 1, pred=step >= 0)
    load_expand_chunk(weights_descs, us, u_full, step + S.expand_chunks, gl.where(step < 0, 0, steps), S)
    load_project_chunk(weights_descs, vs, v_full, step - 1 + S.project_chunks, gl.where(step < 1, 0, steps), S)


@gluon.jit
def load_tile(x_descs, xs, full, tile, tiles, first, stride, S: gl.constexpr):
    """Start to load a tile, if there is one, to its stage; what is outside of the tensor comes as zeros."""
    stage = tile % S.stages
    barrier = full.index(stage)
    mbarrier.expect(barrier, slab_bytes(S.in_slabs, S.tile_pixels), pred=tile < tiles)
    for i in gl.static_range(fixed(S.blocks)):
        pixel = first + tile * stride + i * BLOCK
        for s in gl.static_range(len(S.in_slabs)):
            desc = x_descs[width_index(S.in_slabs[s])]
            target = xs[s].index(stage * S.blocks + i)
            tma.async_copy_global_to_shared(
                desc, [pixel, slab_start(S.in_slabs, s)], barrier, target, pred=tile < tiles
            )


@gluon.jit
def replace_tile(x_descs, xs, full, tile, tiles, first, stride, S: gl.constexpr):
    """Load a tile in place of the last one, once that is stored."""
    tma.store_wait(0)
    load_tile(x_descs, xs, full, tile, tiles, first, stride, S)


@gluon.jit
def inputs(xs, first_block, S: gl.constexpr):
    """Left operands of the expansion: for every block slabs [64, slab], in registers or in shared memory."""
    blocks = ()
    for i in gl.static_range(fixed(S.blocks)):
        slabs = ()
        for s in gl.static_range(len(S.in_slabs)):
            x = xs[s].index(first_block + i)
            if S.x_in_registers:
                slabs = slabs + (x.load(operand_layout(S.hidden)),)
            else:
                slabs = slabs + (x,)
        blocks = blocks + (slabs,)
    return blocks


@gluon.jit
def expand(x, us, stage, S: gl.constexpr):
    """Start [64, hidden] of a block, the sum over slabs."""
    h = zeros(BLOCK, S.hidden, gl.float32, sum_layout(S.hidden))
    for s in gl.static_range(len(us)):
        u = us[s].index(stage).permute((1, 0))  # [slab, hidden]
        h = warpgroup_mma(x[s], u, h, use_acc=s > 0, is_async=True)
    return h


@gluon.jit
def project(h, vs, stage, zs, FIRST: gl.constexpr):
    """Start to add hidden channels to the output's slabs [64, slab], or to replace them with the `FIRST`."""
    sums = ()
    for s in gl.static_range(len(vs)):
        sums = sums + (warpgroup_mma(h, vs[s].index(stage), zs[s], use_acc=not FIRST, is_async=True),)
    return sums


@gluon.jit
def start_step(x, us, zs, stage, STEP: gl.constexpr, S: gl.constexpr):
    """Start to expand every block.

    Two blocks do so each when its projection of the step before is done, which frees the registers of its operand.
    """
    if S.blocks == 1:
        return (expand(x[0], us, stage, S),), zs
    else:
        z0, z1 = zs
        if STEP > 0:
            z0 = wait_for_sums(z0, fixed(len(S.out_slabs)))
        h0 = expand(x[0], us, stage, S)
        if STEP > 0:
            z1 = wait_for_sums(z1, fixed(len(S.in_slabs)))
        h1 = expand(x[1], us, stage, S)
        return (h0, h1), (z0, z1)


@gluon.jit
def wait_for_sums(z, PENDING: gl.constexpr):
    """Slabs [64, slab], once no more than `PENDING` later products are under way."""
    z = warpgroup_mma_wait(PENDING, deps=z)
    return z if isinstance(z, gl.tuple) else (z,)


@gluon.constexpr_function
def products_after_expand(S, block):
    """How many products may be under way when a block's expansion is used: those started after it."""
    if S.blocks == 1:
        return 0
    return len(S.in_slabs) if block == 0 else len(S.out_slabs)


@gluon.jit
def finish_step(hs, vs, bias, zs, stage, STEP: gl.constexpr, S: gl.constexpr):
    """Activate every block and start to project it."""
    next_zs = ()
    for i in gl.static_range(fixed(S.blocks)):
        h = warpgroup_mma_wait(products_after_expand(S, i), deps=[hs[i]])
        h, b = gl.broadcast(h, bias)
        activated = gl.convert_layout(activate(h, b, vs[0].dtype), operand_layout(S.hidden), assert_trivial=True)
        next_zs = next_zs + (project(activated, vs, stage, zs[i], STEP == 0),)
    return next_zs


@gluon.jit
def finish_block(z, xs, block, out_bias, LATER: gl.constexpr, S: gl.constexpr):
    """Slabs [64, slab] in 16 bits, where adding bias and input takes one instruction for two elements each.

    Projections of `LATER` later blocks may be under way.
    """
    sums = wait_for_sums(z, fixed(LATER * len(S.out_slabs)))
    rounded = ()
    for s in gl.static_range(len(S.out_slabs)):
        bias = bias_slab(out_bias, slab_start(S.out_slabs, s), S.out_slabs[s])
        added = bias.load(gl.SliceLayout(0, sum_layout(S.out_slabs[s])))[None, :]
        if S.residual:
            added = xs[s].index(block).load(sum_layout(S.out_slabs[s])) + added
        rounded = rounded + (sums[s].to(out_bias.dtype) + added,)
    return rounded


@gluon.jit
def store_tile(out_descs, outs, first_block, zs, pixel, S: gl.constexpr):
    """Start to store a tile, by way of shared memory."""
    gl.thread_barrier()  # every warp's products and sums have read what is replaced
    for i in gl.static_range(fixed(S.blocks)):
        for s in gl.static_range(len(S.out_slabs)):
            outs[s].index(first_block + i).store(zs[i][s])
    fence_async_shared()
    gl.thread_barrier()
    for i in gl.static_range(fixed(S.blocks)):
        for s in gl.static_range(len(S.out_slabs)):
            desc = out_descs[width_index(S.out_slabs[s])]
            source = outs[s].index(first_block + i)
            tma.async_copy_shared_to_global(desc, [pixel + i * BLOCK, slab_start(S.out_slabs, s)], source)


@gluon.jit
def walk(
    x_descs,
    out_descs,
    weights_descs,
    xs,
    outs,
    x_full,
    us,
    vs,
    u_full,
    v_full,
    free,
    bias,
    out_bias,
    first,
    stride,
    tiles,
    PARTITION: gl.constexpr,
    S: gl.constexpr,
):
    """A partition's part: tiles from pixel `first` on, `stride` pixels apart."""
    for tile in range(0, tiles):
        # Were zeros plain, the compiler would keep all addresses of the operands in registers.
        zero = tile >> TILE_BITS
        first_step = tile * S.steps if S.streams else zero
        block = tile % S.stages * S.blocks
        if S.stages == 1 and tile > 0:
            replace_tile(x_descs, xs, x_full, tile, tiles, first, stride, S)
        mbarrier.wait(x_full.index(tile % S.stages), (tile // S.stages) & 1)
        x = inputs(xs, block, S)
        zs = ()
        for _ in gl.static_range(fixed(S.blocks)):
            z = ()
            for s in gl.static_range(len(S.out_slabs)):
                z = z + (zeros(BLOCK, S.out_slabs[s], gl.float32, sum_layout(S.out_slabs[s])),)
            zs = zs + (z,)
        for step in gl.static_range(fixed(S.steps)):
            now = first_step + step
            wait_for_chunk(u_full, now, tile, S.expand_chunks, S)
            if not S.x_in_registers:
                x = inputs(xs, block + (now >> STEP_BITS), S)
            hs, zs = start_step(x, us, zs, now % S.expand_chunks, step, S)
            if S.streams and PARTITION == 0:
                replace_chunks(weights_descs, us, vs, u_full, v_full, free, now - 1, tiles * S.steps, S)
            if step == 0 and S.stages > 1:  # noqa: SIM102 (the compiler knows this, not the next)
                if tile > 0:
                    replace_tile(x_descs, xs, x_full, tile + S.stages - 1, tiles, first, stride, S)
            b = hidden_bias(bias, step + zero, S)
            wait_for_chunk(v_full, now, tile, S.project_chunks, S)
            zs = finish_step(hs, vs, b, zs, now % S.project_chunks, step, S)
            if S.streams and PARTITION == 1:
                release_chunks(free, now, S)
        rounded = ()
        for i in gl.static_range(fixed(S.blocks)):
            rounded = rounded + (finish_block(zs[i], xs, block + i, out_bias, S.blocks - 1 - i, S),)
        if S.in_place:
            store_tile(out_descs, xs, block, rounded, first + tile * stride, S)
        else:
            store_tile(out_descs, outs, 0, rounded, first + tile * stride, S)
    tma.store_wait(0)  # what is stored must not outlive the program


@gluon.jit(do_not_specialize=["pixels"])
def ffn_hopper_kernel(
    x64_desc,  # x as [P, C], in boxes [64, 64]
    x32_desc,  # in boxes [64, 32]; None where there is no slab of this width
    x16_desc,
    out64_desc,  # [P, K]
    out32_desc,
    out16_desc,
    weights64_desc,  # fusion.ffn_weights.PackedFfn.weights in boxes [hidden, 64]
    weights32_desc,
    weights16_desc,
    hidden_bias_ptr,  # [steps * hidden], as the threads hold it
    project_bias_ptr,  # [sum(out_slabs)], fp32
    pixels,
    S: gl.constexpr,
):
    dtype: gl.constexpr = hidden_bias_ptr.dtype.element_ty
    x_descs = (x64_desc, x32_desc, x16_desc)
    out_descs = (out64_desc, out32_desc, out16_desc)
    weights_descs = (weights64_desc, weights32_desc, weights16_desc)
    us = new_tiles(S.expand_chunks, fixed(S.in_slabs), S.hidden, dtype)
    vs = new_tiles(S.project_chunks, fixed(S.out_slabs), S.hidden, dtype)
    u_full = new_barriers(S.expand_chunks)
    v_full = new_barriers(S.project_chunks)
    free = new_barriers(S.expand_chunks)
    xs = ()
    outs = ()
    x_full = ()
    for _ in gl.static_range(CREW):
        x = new_tiles(S.stages * S.blocks, fixed(S.in_slabs), BLOCK, dtype)
        xs = xs + (x,)
        if S.in_place:
            outs = outs + (x,)
        else:
            outs = outs + (new_tiles(S.blocks, fixed(S.out_slabs), BLOCK, dtype),)
        x_full = x_full + (new_barriers(S.stages),)
    fence_async_shared()
    gl.thread_barrier()

    stride = gl.num_programs(0) * (CREW * S.tile_pixels)
    first = gl.program_id(0) * (CREW * S.tile_pixels)
    tiles = gl.cdiv(pixels - first, stride)
    for i in gl.static_range(fixed(S.expand_chunks)):
        load_expand_chunk(weights_descs, us, u_full, i, tiles * S.steps, S)
    for i in gl.static_range(fixed(S.project_chunks)):
        load_project_chunk(weights_descs, vs, v_full, i, tiles * S.steps, S)
    bias = gl.allocate_shared_memory(dtype, [S.steps, S.hidden], plain_layout(1))
    for step in gl.static_range(fixed(S.steps)):
        element = step * S.hidden + gl.arange(0, S.hidden, thread_layout())
        bias.index(step).store(gl.load(hidden_bias_ptr + element))
    out_bias = load_out_bias(project_bias_ptr, dtype, S)
    wait_for_previous_kernel()
    for stage in gl.static_range(fixed(S.stages)):
        for p in gl.static_range(CREW):
            load_tile(x_descs, xs[p], x_full[p], stage, tiles, first + p * S.tile_pixels, stride, S)
    gl.thread_barrier()
    second = first + S.tile_pixels
    gl.warp_specialize(
        [
            (
                walk,
                (
                    x_descs,
                    out_descs,
                    weights_descs,
                    xs[0],
                    outs[0],
                    x_full[0],
                    us,
                    vs,
                    u_full,
                    v_full,
                    free,
                    bias,
                    out_bias,
                    first,
                    stride,
                    tiles,
                    0,
                    S,
                ),
            ),
            (
                walk,
                (
                    x_descs,
                    out_descs,
                    weights_descs,
                    xs[1],
                    outs[1],
                    x_full[1],
                    us,
                    vs,
                    u_full,
                    v_full,
                    free,
                    bias,
                    out_bias,
                    second,
                    stride,
                    tiles,
                    1,
                    S,
                ),
            ),
        ],
        [gl.num_warps()],
        [WORKER_REGISTERS],
    )


@cache
def constants(in_channels: int, hidden_channels: int, out_channels: int, *, residual: bool, tile: FfnTile) -> Spec:
    """Compile-time constants of the kernel for these channels and this tile."""
    return Spec(
        residual=residual,
        in_slabs=tile.in_slabs(in_channels),
        out_slabs=tile.out_slabs(out_channels),
        steps=tile.steps(hidden_channels),
        hidden=tile.hidden,
        blocks=tile.blocks,
        stages=tile.stages,
        expand_chunks=tile.expand_chunks,
        project_chunks=tile.project_chunks,
        x_in_registers=tile.x_in_registers,
    )


def descriptor_boxes(spec: Spec) -> dict[str, list[int]]:
    """What one copy by TMA brings: the box of every descriptor that the kernel needs, by the argument's name."""
    sides = {
        "x": (BLOCK_PIXELS, spec.in_slabs),
        "out": (BLOCK_PIXELS, spec.out_slabs),
        "weights": (spec.hidden, spec.in_slabs + spec.out_slabs),
    }
    return {
        f"{name}{width}_desc": [rows, width]
        for name, (rows, slabs) in sides.items()
        for width in SLAB_WIDTHS
        if width in slabs
    }


def launch(x, weights, hidden_bias, project_bias, out, *, hidden_channels: int, residual: bool, tile: FfnTile) -> None:
    """Run the kernel on `x` `[N, C, H, W]` into `out` `[N, K, H, W]`, both channels_last, on the current device.

    Weights are packed for `tile` (`fusion.ffn_weights.PackedFfn`). All addresses are multiples of 16 bytes. The kernel
    reads weights and biases before the kernel ahead of it in the stream has finished: that one must not be what writes
    them. Nothing is checked here.
    """
    batch, in_channels, height, width = x.shape
    pixels = batch * height * width
    out_channels = out.shape[1]
    spec = constants(in_channels, hidden_channels, out_channels, residual=residual, tile=tile)
    work = tile.work(pixels, processor_count(x.device.index))
    sides = {
        "x": (x, [pixels, in_channels]),
        "out": (out, [pixels, out_channels]),
        "weights": (weights, [weights.numel() // WEIGHT_COLUMNS, WEIGHT_COLUMNS]),
    }
    boxes = descriptor_boxes(spec)
    descriptors = {}
    for name, (tensor, shape) in sides.items():
        for slab in SLAB_WIDTHS:
            argument = f"{name}{slab}_desc"
            descriptors[argument] = None
            if argument in boxes:
                layout = descriptor_layout(boxes[argument])
                descriptors[argument] = TensorDescriptor(tensor, shape, [shape[1], 1], boxes[argument], layout)
    launch_kernel(
        ffn_hopper_kernel,
        (work.grid,),
        **descriptors,
        hidden_bias_ptr=hidden_bias,
        project_bias_ptr=project_bias,
        pixels=pixels,
        S=spec,
        num_warps=WARPS,
        launch_pdl=True,
    )


def descriptor_layout(box: list[int]) -> gl.NVMMASharedLayout:
    """Of what a copy brings: that of the tiles that the products read."""
    return gl.NVMMASharedLayout(swizzle_byte_width=2 * box[1], element_bitwidth=16, rank=2)

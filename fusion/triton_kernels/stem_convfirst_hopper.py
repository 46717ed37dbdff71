"""A network's stem and the ConvFirst block after it on Hopper (sm_90) in Gluon, on the frame of `convfirst_hopper.py`.

What the stem, a dense 3x3 convolution of stride 2, gives to the block is never in global memory: the rows of the ring,
which TMA brings to the block alone, are computed here. As in `stem.py` a row of the stem's product is a group of two
neighbouring pixels, and its depth are windows of 16 elements of three input rows. So a row of 128 pixels is one product
`[64, 48] x [48, 2 slab]`. A window's first element belongs to no pixel of the group: a one stands there, for the bias.
It is zero where a pixel lies outside of the image, so that all of the product is: what the block's convolution pads
with.

The rows of the ring are virtual rows of the stem's output (`fusion.planner.hopper_tile`). For every block of 64 pixels
of two rows that a program computes it also makes one row of 128 pixels: its windows come straight from global memory to
the registers of the left operand, while the block before is computed.
"""

from dataclasses import dataclass
from functools import cache

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fusion.planner.hopper_tile import BLOCK_PIXELS, MAX_JOBS, MAX_ROWS, WARPS, WEIGHT_COLUMNS
from fusion.planner.stem_convfirst_hopper_tile import IN_CHANNELS, RING_ROWS, WIDTH, StemConvFirstHopperTile
from fusion.planner.stem_tile import KERNEL_SIZE
from fusion.relaunch import launch_kernel
from fusion.triton_kernels.convfirst_hopper import (
    Spec,
    copy_matrix,
    ffn_group,
    finish_piece,
    join_slab,
    load_weights,
    products_after_piece,
    shifted_row,
    start_group,
    start_sums,
    store_row,
    swap_quads,
    weights_box,
)
from fusion.triton_kernels.hopper_layouts import (
    channel_layout,
    copy_layout,
    flat_layout,
    operand_layout,
    rows_layout,
    sum_layout,
)
from fusion.triton_kernels.hopper_parts import (
    fixed,
    load_out_bias,
    moved,
    processor_count,
    slab_start,
    taps,
    wait_for_previous_kernel,
    zeros,
)

JOB_BITS = gl.constexpr(MAX_JOBS.bit_length() - 1)
"""Bits of a job's number; those above make a zero that the compiler cannot see."""
CHANNELS = gl.constexpr(IN_CHANNELS)
"""Of the images."""
WINDOWS = gl.constexpr(KERNEL_SIZE)
"""Of a group: input rows."""
WINDOW = gl.constexpr(16)
"""Elements of an input row that a group of two pixels looks at."""
LEAD = gl.constexpr(4)
"""Of them, before its first input pixel: the last channels of the pixel before that, and one of no use."""
STRIDE = gl.constexpr(12)
"""Elements from a group's window to the next one's."""
VECTOR = gl.constexpr(4)
"""Elements of a window that a thread loads at once."""
ROWS_AHEAD = gl.constexpr(4)
"""Rows of the ring that a job needs."""
LOADS_AHEAD = gl.constexpr(3)
"""Rows of the stem whose windows are under way together before the first job."""
UNIT = gl.constexpr(32)
"""Columns of the stem's product of which each thread of a quad has a fourth: 16 bytes, neighbours in the ring."""


@dataclass(frozen=True)
class StemSpec(Spec):
    """Compile-time constants of the kernel (see `Spec`); `height` and `width` are those of the stem's output."""

    @property
    def ring_rows(self) -> int:
        """Row buffers of the ring: those of a job, and one that is written while a job needs the others."""
        return RING_ROWS

    @property
    def ring_atoms(self) -> int:
        """Atoms of the ring: its row buffers, and zeros after the last."""
        return self.ring_rows * self.row_atoms + 1

    @property
    def columns(self) -> int:
        """Columns of the stem's product: both pixels of a group."""
        return 2 * self.slab


@gluon.jit
def new_ring(dtype: gl.constexpr, S: gl.constexpr):
    """The ring [atoms, 8 pixels, slab], with zeros before every row buffer and after the last."""
    ring = gl.allocate_shared_memory(dtype, [S.ring_atoms, 8, S.slab], rows_layout(S.slab))
    nothing = zeros(8, S.slab, dtype, copy_layout(S.slab))
    for row in gl.static_range(fixed(S.ring_rows + 1)):
        ring.index(row * S.row_atoms).store(nothing)
    return (ring,)


@gluon.jit
def row_atom(row, S: gl.constexpr):
    """First atom of a row's buffer: zeros before its pixels."""
    return row % S.ring_rows * S.row_atoms


@gluon.jit
def load_stem_weights(pointer, dtype: gl.constexpr, S: gl.constexpr):
    """Start to copy the stem's weights to shared memory: for each of three windows [16, columns]."""
    w = gl.allocate_shared_memory(dtype, [WINDOWS, WINDOW, S.columns], rows_layout(S.columns))
    for window in gl.static_range(WINDOWS):
        copy_matrix(w.index(window), pointer + window * (WINDOW * S.columns))
    return w


@gluon.jit
def place_of(v, rows, S: gl.constexpr):
    """Image and row of virtual row `v`, and whether it is a row of an image."""
    n = v // (S.height + 1)
    y = v - n * (S.height + 1)
    return n, y, (v >= 0) & (v < rows) & (y < S.height)


@gluon.jit
def load_windows(x_ptr, v, rows, S: gl.constexpr):
    """Load the windows of virtual row `v` of the stem's output: of three input rows [64 groups, 16], zero outside."""
    LAYOUT: gl.constexpr = channel_layout(WINDOW, WINDOW, S.block)
    n, y, is_row = place_of(v, rows, S)
    group = gl.arange(0, S.block, gl.SliceLayout(1, LAYOUT))[:, None]
    element = gl.arange(0, WINDOW, gl.SliceLayout(0, LAYOUT))[None, :]
    start = group * STRIDE - LEAD
    # Of the vector that an element is loaded with, so that the compiler sees that its elements share a mask.
    inside = (start + element // VECTOR * VECTOR >= 0) & is_row
    if S.width < S.tile_width:
        inside = inside & (group < S.width // 2)
    windows = ()
    for dy in gl.static_range(WINDOWS):
        row = 2 * y + (dy - 1)
        source = x_ptr + (n * (2 * S.height) + row).to(gl.int64) * (2 * CHANNELS * S.width)
        mask = inside
        if dy == 0:
            mask = inside & (row >= 0)
        windows = windows + (gl.load(source + (start + element), mask=mask, other=0.0),)
    return windows


@gluon.jit
def start_stem(windows, w, v, rows, S: gl.constexpr):
    """Start a row of the stem, [64 groups, columns], columns permuted; the bias included, no activation."""
    LAYOUT: gl.constexpr = channel_layout(WINDOW, WINDOW, S.block)
    _, _, is_row = place_of(v, rows, S)
    group = gl.arange(0, S.block, gl.SliceLayout(1, LAYOUT))[:, None]
    element = gl.arange(0, WINDOW, gl.SliceLayout(0, LAYOUT))[None, :]
    one = gl.where(is_row & (group < S.width // 2), 1.0, 0.0).to(w.dtype)
    one, _ = gl.broadcast(one, windows[0])
    y = zeros(S.block, S.columns, gl.float32, sum_layout(S.columns))
    for window in gl.static_range(WINDOWS):
        x = gl.where(element == 0, one, windows[window])
        x = gl.convert_layout(swap_quads(x, 1, 4, WINDOW // 8), operand_layout(WINDOW), assert_trivial=True)
        y = warpgroup_mma(x, w.index(window), y, use_acc=window > 0, is_async=True)
    return y


@gluon.jit
def rounded_relu(y, dtype: gl.constexpr):
    """relu(y) in 16 bits, two elements an instruction."""
    if dtype == gl.float16:
        return gl.inline_asm_elementwise(
            "cvt.rn.relu.f16x2.f32 $0, $2, $1;", "=r,r,r", [y], dtype=gl.float16, is_pure=True, pack=2
        )
    else:
        return gl.inline_asm_elementwise(
            "cvt.rn.relu.bf16x2.f32 $0, $2, $1;", "=r,r,r", [y], dtype=gl.bfloat16, is_pure=True, pack=2
        )


@gluon.jit
def store_stem(ring, atom, y, S: gl.constexpr):
    """Activate and round a row of the stem and store it to the row buffer that starts at `atom`."""
    slab = ring[0]
    y = swap_quads(rounded_relu(y, slab.dtype), S.columns // UNIT, UNIT // 8, 4)
    y = gl.convert_layout(y, channel_layout(S.columns, UNIT, S.block), assert_trivial=True)
    view = slab.index(atom + 1)._reinterpret(slab.dtype, [S.pixels, S.slab], rows_layout(S.slab))
    view.store(y.reshape((S.pixels, S.slab)))


@gluon.jit
def start_piece(ring, atoms, w, PIECE_INDEX: gl.constexpr, block, S: gl.constexpr):
    """Start two output rows of 16 channels of the block's convolution, as `convfirst_hopper.start_piece` does.

    `atoms`: of the four input rows.
    """
    y = zeros(S.block, 32, gl.float32, sum_layout(32))
    y0 = zeros(S.block, 16, gl.float32, sum_layout(16))
    y1 = zeros(S.block, 16, gl.float32, sum_layout(16))
    for column in gl.static_range(-1, 2):
        x = shifted_row(ring, atoms[1], column, PIECE_INDEX, block, S)
        y = warpgroup_mma(x, taps(w, PIECE_INDEX, column, 1, 2), y, use_acc=column > -1, is_async=True)
        x = shifted_row(ring, atoms[2], column, PIECE_INDEX, block, S)
        y = warpgroup_mma(x, taps(w, PIECE_INDEX, column, 0, 2), y, is_async=True)
        x = shifted_row(ring, atoms[0], column, PIECE_INDEX, block, S)
        y0 = warpgroup_mma(x, taps(w, PIECE_INDEX, column, 2, 1), y0, use_acc=column > -1, is_async=True)
        x = shifted_row(ring, atoms[3], column, PIECE_INDEX, block, S)
        y1 = warpgroup_mma(x, taps(w, PIECE_INDEX, column, 0, 1), y1, use_acc=column > -1, is_async=True)
    return y, y0, y1


@gluon.jit
def conv_rows(ring, atoms, w, block, S: gl.constexpr):
    """Two output rows of the block's convolution at a block's pixels, each as slabs [block, slab]."""
    sums = ()
    for piece in gl.static_range(fixed(S.pieces)):
        sums = sums + (start_piece(ring, atoms, w, piece, block, S),)
    ys0 = ()
    ys1 = ()
    for piece in gl.static_range(fixed(S.pieces)):
        y0, y1 = finish_piece(sums[piece], products_after_piece(S, 0, piece), w.dtype)
        ys0 = ys0 + (y0,)
        ys1 = ys1 + (y1,)
    slabs0 = ()
    slabs1 = ()
    for s in gl.static_range(len(S.in_slabs)):
        slabs0 = slabs0 + (join_slab(ys0, slab_start(S.in_slabs, s), S.in_slabs[s]),)
        slabs1 = slabs1 + (join_slab(ys1, slab_start(S.in_slabs, s), S.in_slabs[s]),)
    return slabs0, slabs1


@gluon.jit(do_not_specialize=["rows", "jobs"])
def stem_convfirst_hopper_kernel(
    x_ptr,  # [N, 2 H, 2 W, 3]
    stem_ptr,  # [3, 16, columns], fusion.stem_convfirst_weights.PackedStemConvFirst.stem
    weights_desc,  # fusion.weights.PackedHopper.weights as [-1, 64] in boxes [8 copy_atoms, 64]
    weights_ptr,
    project_bias_ptr,  # [sum(out_slabs)], fp32
    out_ptr,  # [N, H, W, K]
    rows,  # virtual rows: images times H + 1
    jobs,  # of each run
    S: gl.constexpr,
):
    dtype: gl.constexpr = x_ptr.dtype.element_ty
    stem_w = load_stem_weights(stem_ptr, dtype, S)
    all_taps, all_chunks, bias, weights_full, weights_free = load_weights(weights_ptr, weights_desc, dtype, S)
    out_bias = load_out_bias(project_bias_ptr, dtype, S)
    ring = new_ring(dtype, S)
    first = gl.program_id(0) * (2 * jobs)
    wait_for_previous_kernel()
    windows = ()
    for i in gl.static_range(LOADS_AHEAD):
        windows = windows + (load_windows(x_ptr, first - 1 + i, rows, S),)
    async_copy.wait_group(0)
    fence_async_shared()
    gl.thread_barrier()
    for i in gl.static_range(ROWS_AHEAD):
        stem_sum = start_stem(windows[i], stem_w, first - 1 + i, rows, S)
        if i + LOADS_AHEAD <= ROWS_AHEAD:
            windows = windows + (load_windows(x_ptr, first - 1 + i + LOADS_AHEAD, rows, S),)
        stem_sum = warpgroup_mma_wait(0, deps=[stem_sum])
        store_stem(ring, row_atom(i, S), stem_sum, S)
    fence_async_shared()
    gl.thread_barrier()
    windows = windows[ROWS_AHEAD]
    total = jobs * S.blocks
    for now in range(0, total):
        job = now // S.blocks
        block = now % S.blocks
        # Were it plainly zero, the compiler would keep all addresses of the weights in registers.
        zero = job >> JOB_BITS
        w = moved(all_taps, zero)
        weights = (weights_desc, moved(all_chunks, zero), weights_full, weights_free)
        atoms = ()
        for i in gl.static_range(ROWS_AHEAD):
            atoms = atoms + (row_atom(2 * job + i, S),)
        v = first - 1 + ROWS_AHEAD + now
        stem_sum = start_stem(windows, moved(stem_w, zero), v, rows, S)
        ys = conv_rows(ring, atoms, w, block, S)
        stem_sum = warpgroup_mma_wait(0, deps=[stem_sum])
        mbarrier.wait(weights_full.index(0), 0, pred=now == 0)
        hs = start_group(ys[0], ys[1], weights, now, 0, S)
        zs = (start_sums(ring, atoms[1], out_bias, block, S), start_sums(ring, atoms[2], out_bias, block, S))
        windows = load_windows(x_ptr, v + 1, rows, S)
        gl.thread_barrier()  # every warp is done with the row that is replaced
        store_stem(ring, row_atom(ROWS_AHEAD + now, S), stem_sum, S)
        fence_async_shared()
        gl.thread_barrier()
        zs = ffn_group(0, ys, hs, zs, weights, bias, now, total, 0, S)
        for group in range(1, S.groups):
            step = group * S.unroll ^ zero  # if it were affine, the compiler would be busy for minutes
            hs = start_group(ys[0], ys[1], weights, now, step, S)
            zs = ffn_group(step, ys, hs, zs, weights, bias, now, total, 0, S)
        sums = warpgroup_mma_wait(0, deps=zs[0] + zs[1])
        out_row = first + 2 * job
        store_row(out_ptr, sums[: len(S.out_slabs)], out_row, 0, rows, 0, 1, block, S)
        store_row(out_ptr, sums[len(S.out_slabs) :], out_row + 1, 0, rows, 0, 1, block, S)


@cache
def constants(
    height: int,
    width: int,
    in_channels: int,
    hidden_channels: int,
    out_channels: int,
    *,
    residual: bool,
    tile: StemConvFirstHopperTile,
) -> StemSpec:
    """Compile-time constants of the kernel for a stem's output of `height x width` pixels and `in_channels` channels,
    and the block's hidden and output channels."""
    rows = tile.block
    return StemSpec(
        height=height,
        width=width,
        in_channels=in_channels,
        out_channels=out_channels,
        residual=residual,
        in_slabs=rows.in_slabs(in_channels),
        out_slabs=rows.out_slabs(out_channels),
        slab=rows.slab,
        steps=rows.steps(hidden_channels),
        hidden=rows.hidden,
        pixels=rows.pixels,
        block=BLOCK_PIXELS,
        streams=1,
        strips=1,
        stages=rows.stages,
        partitions=1,
        weight_chunks=0,
        chunk_shapes=rows.chunk_shapes(in_channels, out_channels),
        unit=rows.unit(out_channels),
        unroll=rows.unroll(hidden_channels),
    )


def launch(
    x,
    stem,
    weights,
    project_bias,
    out,
    *,
    stem_channels: int,
    hidden_channels: int,
    residual: bool,
    tile: StemConvFirstHopperTile,
) -> None:
    """Run the kernel on images `x` `[N, 3, 2 H, 2 W]` into `out` `[N, K, H, W]`, both channels_last.

    W is even and no more than 128. The stem has `stem_channels` output channels, which the block takes. Weights are
    packed for `tile` (`fusion.stem_convfirst_weights`). All addresses are multiples of 16
    bytes. The kernel reads weights and biases before the kernel ahead of it in the stream has finished: that one must
    not be what writes them.

    Raises ValueError for more rows of images than the kernel can count. Nothing else is checked here.
    """
    batch, out_channels, height, width = out.shape
    spec = constants(height, width, stem_channels, hidden_channels, out_channels, residual=residual, tile=tile)
    work = tile.block.work(batch, height, WIDTH, processor_count(x.device.index))
    if work.rows >= MAX_ROWS or work.jobs >= MAX_JOBS:
        raise ValueError(
            f"{batch} images of {2 * height}x{2 * width} pixels are too many rows for one launch, split the batch"
        )
    rows_of_weights = TensorDescriptor(
        weights,
        [weights.numel() // WEIGHT_COLUMNS, WEIGHT_COLUMNS],
        [WEIGHT_COLUMNS, 1],
        weights_box(spec),
        flat_layout(),
    )
    launch_kernel(
        stem_convfirst_hopper_kernel,
        (work.grid,),
        x,
        stem,
        rows_of_weights,
        weights,
        project_bias,
        out,
        work.rows,
        work.jobs,
        spec,
        num_warps=WARPS,
        maxnreg=tile.block.register_limit,
        launch_pdl=True,
    )

"""Stride-2 ConvFirst (paper figure 6c) on Hopper (sm_90) in Gluon, on the frame of `convfirst_hopper.py`.

Grouped convolution and blur-pool are both linear. Down the rows their composition is a convolution of five rows, whose
taps are made when weights are packed. Along a row the columns 2 j and 2 j + 1 are convolved each by itself; the third
one that the blur needs, 2 j - 1, is the left neighbour's second, and comes by way of shared memory. At the left edge,
where columns are reflected, it is the pixel's own. At the top edge, where rows are reflected, other taps are used. The
input's own blur, the other half of what the expansion takes, is made of products too, with multiples of the identity as
taps.

The images of a batch are one tall image of virtual *output* rows, H / 2 of each image and a blank one after them, and a
job is two of them. A pair of the ring holds the four input rows of two output rows, each divided into its even and its
odd columns, so that a stride of two is a step of one pixel in a row buffer.

A ring holds all channels. Where they are many, `convfirst_down_pieces.py` has 16 of them at a time, and no ring.
"""

from dataclasses import dataclass
from functools import cache

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fusion.planner.convfirst_down_hopper_tile import (
    COLUMN_TAPS,
    INPUT_ROWS,
    INPUT_TAPS,
    ROW_ATOMS,
    ConvFirstDownHopperTile,
)
from fusion.planner.hopper_tile import (
    BLOCK_PIXELS,
    MAX_JOBS,
    MAX_ROWS,
    PARTITION_REGISTERS,
    WARPS,
    WEIGHT_COLUMNS,
)
from fusion.relaunch import launch_kernel
from fusion.triton_kernels.convfirst_down_pieces import (
    column_weights,
    conv_pieces,
    load_chunks,
    load_pieces,
    new_chunk_barriers,
    new_neighbours,
    new_pieces,
    release_chunk,
)
from fusion.triton_kernels.convfirst_down_products import (
    COLUMN,
    COLUMN_PRODUCTS,
    ROWS,
    add_row,
    edge_taps,
    joined,
    matrix,
)
from fusion.triton_kernels.convfirst_hopper import (
    Spec,
    activated,
    ffn_group,
    first_row_and_column,
    join_slab,
    load_weights,
    new_ring,
    pair_atom,
    products_after_expand,
    project,
    replace_chunk,
    shifted_row,
    slot_of,
    start_group,
    start_sums,
    store_row,
    wait_for_pair,
    weights_box,
)
from fusion.triton_kernels.hopper_layouts import flat_layout, plain_layout, planes_layout, sum_layout
from fusion.triton_kernels.hopper_parts import (
    fixed,
    hidden_bias,
    load_out_bias,
    moved,
    processor_count,
    slab_start,
    wait_for_previous_kernel,
    zeros,
)

WORKER_REGISTERS = gl.constexpr(PARTITION_REGISTERS)
"""Of each thread of the second partition; it leaves as many to the first."""
LOADER_REGISTERS = gl.constexpr(24)
"""Of each thread of a loader, the fewest that a thread may have."""
JOB_BITS = gl.constexpr(MAX_JOBS.bit_length() - 1)
"""Bits of a job's number; those above make a zero that the compiler cannot see."""
INPUT_PRODUCTS = gl.constexpr(18)
"""Products of the input's blur of a piece."""


@dataclass(frozen=True)
class DownSpec(Spec):
    """Compile-time constants of the kernel (see `Spec`); `height`, `width` and `tile_width` are the output's.

    With `by_piece`, `stages` are buffers of a piece of the input rows of a job (`convfirst_down_pieces.py`).
    """

    by_piece: bool

    @property
    def pieces(self) -> int:
        """Pieces of 16 channels of the input: the expansion takes them, and as many that the convolution computes."""
        return sum(self.in_slabs) // 32

    @property
    def pair_rows(self) -> int:
        """Row buffers of a pair: even and odd columns of four input rows."""
        return 8

    @property
    def buffers(self) -> int:
        """Pieces that are under way together."""
        return min(2, self.pieces)

    @property
    def taps(self) -> int:
        """Matrices `[16, 16]` of the convolution, and at the end those of the input's blur if products make it."""
        return 3 * COLUMN_TAPS * self.pieces + (0 if self.by_piece else INPUT_TAPS)

    @property
    def input_rows(self) -> int:
        """Input rows of a job."""
        return INPUT_ROWS

    @property
    def piece_atoms(self) -> int:
        """Atoms of a buffer of a piece."""
        return INPUT_ROWS * ROW_ATOMS

    @property
    def piece_bytes(self) -> int:
        """What TMA brings of a piece."""
        return 2 * INPUT_ROWS * 2 * self.pixels * self.slab


@gluon.jit
def new_buffers(dtype: gl.constexpr, S: gl.constexpr):
    """[2 rows, 8 + block, 16] of as many pieces as are under way, where pixels find their left neighbours."""
    buffers = ()
    for _ in gl.static_range(fixed(S.buffers)):
        buffers = buffers + (gl.allocate_shared_memory(dtype, [2 * (8 + S.block), 1, 16], plain_layout(2)),)
    return buffers


@gluon.jit
def load_pair(x_desc, ring, full, pair, first, rows, column, S: gl.constexpr):
    """Start to copy the input rows of virtual rows first - 1 + 2 pair and the next one to their stage of the ring."""
    barrier = full.index(pair % S.stages)
    mbarrier.expect(barrier, S.pair_bytes)
    for row in gl.static_range(2):
        v = first - 1 + 2 * pair + row
        n = v // (S.height + 1)
        y = v - n * (S.height + 1)
        inside = (v >= 0) & (v < rows) & (y < S.height)
        for odd_row in gl.static_range(2):
            # Row -1 of the tensor is out of its bounds and comes as zeros.
            source = gl.where(inside, 2 * (n * S.height + y) + odd_row, -1)
            for odd_column in gl.static_range(2):
                atom = pair_atom(pair, S) + (4 * row + 2 * odd_row + odd_column) * S.row_atoms + 1
                for s in gl.static_range(len(ring)):
                    target = ring[s].index(atom)
                    target = target._reinterpret(target.dtype, x_desc.block_shape, x_desc.layout)
                    tma.async_copy_global_to_shared(
                        x_desc, [odd_column, column, 0, source, s * S.slab], barrier, target
                    )


@gluon.jit
def input_row(ring, atom, ROW: gl.constexpr, U: gl.constexpr, PIECE_INDEX: gl.constexpr, block, S: gl.constexpr):
    """16 channels of input columns 2 j + U for a block's pixels j, [block, 16]; row `ROW` of the pair at `atom`."""
    return shifted_row(ring, atom + (2 * ROW + U % 2) * S.row_atoms, U // 2, PIECE_INDEX, block, S)


@gluon.jit
def start_columns(ring, top, bottom, w, edges, PIECE_INDEX: gl.constexpr, block, S: gl.constexpr):
    """Start columns 2 j and 2 j + 1 of two output rows, blurred down the rows, of 16 channels of the convolution.

    Of each column what the rows have in common side by side [block, 32], and the rest of each. `top`, `bottom`: atoms
    of their pairs. Products that take the same pixels follow each other: so their addresses are soon done with.
    """
    sums = ()
    for _ in gl.static_range(2):
        sums = sums + (zeros(S.block, 32, gl.float32, sum_layout(32)),)
        sums = sums + (zeros(S.block, 16, gl.float32, sum_layout(16)), zeros(S.block, 16, gl.float32, sum_layout(16)))
    y, y0, y1, z, z0, z1 = sums
    for u in gl.static_range(-1, 3):
        for row in gl.static_range(ROWS):
            x = input_row(ring, top if row < 4 else bottom, row % 4, u, PIECE_INDEX, block, S)
            if u < 2:
                y, y0, y1 = add_row(x, w, edges, y, y0, y1, row, u + 1, PIECE_INDEX)
            if u > -1:
                z, z0, z1 = add_row(x, w, edges, z, z0, z1, row, u, PIECE_INDEX)
    return y, y0, y1, z, z0, z1


@gluon.jit
def start_input(ring, top, bottom, w, edges, PIECE_INDEX: gl.constexpr, SHIFT: gl.constexpr, block, S: gl.constexpr):
    """Start column 2 j + `SHIFT` of two output rows of 16 channels of the input's blur.

    The matrices are 1/4, 1/4, 1/2 and 1/4 of the identity.
    """
    base: gl.constexpr = 3 * COLUMN * S.pieces
    x0 = zeros(S.block, 16, gl.float32, sum_layout(16))
    x1 = zeros(S.block, 16, gl.float32, sum_layout(16))
    x = input_row(ring, top, 1, SHIFT, PIECE_INDEX, block, S)
    x0 = warpgroup_mma(x, matrix(w, base, 1), x0, use_acc=False, is_async=True)
    x = input_row(ring, top, 2, SHIFT, PIECE_INDEX, block, S)
    x0 = warpgroup_mma(x, matrix(w, base + 2, 1), x0, is_async=True)
    x = input_row(ring, top, 3, SHIFT, PIECE_INDEX, block, S)
    x0 = warpgroup_mma(x, matrix(edges[0], base, 1), x0, is_async=True)
    x1 = warpgroup_mma(x, matrix(w, base + 1, 1), x1, use_acc=False, is_async=True)
    x = input_row(ring, bottom, 0, SHIFT, PIECE_INDEX, block, S)
    x1 = warpgroup_mma(x, matrix(w, base + 2, 1), x1, is_async=True)
    x = input_row(ring, bottom, 1, SHIFT, PIECE_INDEX, block, S)
    x1 = warpgroup_mma(x, matrix(edges[1], base, 1), x1, is_async=True)
    return x0, x1


@gluon.jit
def blurred(left, middle, right, is_edge, dtype: gl.constexpr):
    """(1/4, 1/2, 1/4) of three columns; at the image's left edge the right one stands for the left one, too."""
    is_edge, _ = gl.broadcast(is_edge, right)
    return (0.25 * (gl.where(is_edge, right, left) + right) + 0.5 * middle).to(dtype)


@gluon.jit
def neighbours(buffer, row, y, S: gl.constexpr):
    """[block, 16], of every pixel what its left neighbour has; of the first one anything. fp32, rounded on the way."""
    first = row * (8 + S.block) + 8
    own = buffer.index(first)._reinterpret(buffer.dtype, [S.block, 16], plain_layout(2))
    own.store(y.to(buffer.dtype))
    left = buffer.index(first - S.streams)._reinterpret(buffer.dtype, [S.block, 16], plain_layout(2))
    return left.load(sum_layout(16)).to(gl.float32)


@gluon.jit
def start_inputs(ring, top, bottom, w, edges, PIECE_INDEX: gl.constexpr, block, S: gl.constexpr):
    """Start columns 2 j - 1, 2 j and 2 j + 1 of two output rows of 16 channels of the input."""
    xs = ()
    for shift in gl.static_range(-1, 2):
        xs = xs + start_input(ring, top, bottom, w, edges, PIECE_INDEX, shift, block, S)
    return xs


@gluon.jit
def finish_columns(buffer, sums, is_edge, PENDING: gl.constexpr, dtype: gl.constexpr, S: gl.constexpr):
    """Two output rows of 16 channels of the convolution, [block, 16] each, while `PENDING` products are under way."""
    y, y0, y1, z, z0, z1 = warpgroup_mma_wait(PENDING, deps=sums)
    right0, right1 = joined(z, z0, z1)
    left0 = neighbours(buffer, 0, right0, S)
    left1 = neighbours(buffer, 1, right1, S)
    middle0, middle1 = joined(y, y0, y1)
    return blurred(left0, middle0, right0, is_edge, dtype), blurred(left1, middle1, right1, is_edge, dtype)


@gluon.jit
def finish_inputs(xs, is_edge, PENDING: gl.constexpr, dtype: gl.constexpr):
    """The same of the input itself."""
    left0, left1, middle0, middle1, right0, right1 = warpgroup_mma_wait(PENDING, deps=xs)
    return blurred(left0, middle0, right0, is_edge, dtype), blurred(left1, middle1, right1, is_edge, dtype)


@gluon.jit
def conv_rows(ring, buffers, top, bottom, w, edges, column, zero, block, S: gl.constexpr):
    """Two output rows at a block's pixels, each as slabs [block, slab], the left operands of the expansion.

    While sums of a piece are blurred, products of its input or of the next piece are under way.
    """
    position = block * S.block + gl.arange(0, S.block, gl.SliceLayout(1, sum_layout(16)))
    is_edge = (column + position // S.streams == 0)[:, None]
    xs0 = ()
    xs1 = ()
    ys0 = ()
    ys1 = ()
    columns = start_columns(ring, top, bottom, w, edges[:4], 0, block, S)
    for piece in gl.static_range(fixed(S.pieces)):
        # Were these the same atoms, their addresses would stay in registers.
        xs = start_inputs(ring, top + zero, bottom + zero, w, edges[4:], piece, block, S)
        y0, y1 = finish_columns(buffers[piece % 2], columns, is_edge, INPUT_PRODUCTS, w.dtype, S)
        if piece + 1 < S.pieces:
            columns = start_columns(ring, top, bottom, w, edges[:4], piece + 1, block, S)
            x0, x1 = finish_inputs(xs, is_edge, COLUMN_PRODUCTS, w.dtype)
        else:
            x0, x1 = finish_inputs(xs, is_edge, 0, w.dtype)
        xs0 = xs0 + (x0,)
        xs1 = xs1 + (x1,)
        ys0 = ys0 + (y0,)
        ys1 = ys1 + (y1,)
    slabs0 = ()
    slabs1 = ()
    for s in gl.static_range(len(S.in_slabs)):
        slabs0 = slabs0 + (join_slab(xs0 + ys0, slab_start(S.in_slabs, s), S.in_slabs[s]),)
        slabs1 = slabs1 + (join_slab(xs1 + ys1, slab_start(S.in_slabs, s), S.in_slabs[s]),)
    return slabs0, slabs1


@gluon.jit
def streamed_step(ys, zs, weights, bias, job, jobs, step, PARTITION: gl.constexpr, S: gl.constexpr):
    """Expand, activate and project two rows with the weights of a step, and replace those: sums `zs` of slabs.

    No product is under way where the code branches, else the compiler makes each wait for the one before.
    """
    hs = start_group(ys[0], ys[1], weights, job, step, S)
    slot = slot_of(job, step, S)
    b = hidden_bias(bias, step, S)
    sums = ()
    for row in gl.static_range(2):
        h = warpgroup_mma_wait(products_after_expand(S, True, True, row), deps=[hs[row]])
        sums = sums + project(activated(h, b, S), weights[1], slot, zs[row], S)
    sums = warpgroup_mma_wait(0, deps=sums)
    if S.by_piece:
        release_chunk(weights, job, step, S)
    else:
        replace_chunk(weights, job, jobs, step + 1, PARTITION, S)
    return sums[: len(S.out_slabs)], sums[len(S.out_slabs) :]


@gluon.jit
def ffn(ys, zs, weights, bias, job, jobs, zero, PARTITION: gl.constexpr, S: gl.constexpr):
    """Expand, activate and project two rows of slabs `ys`, added to `zs`: the slabs of both, one after the other.

    `zero` is one that the compiler cannot see.
    """
    if S.weight_chunks:
        for step in range(S.steps):
            zs = streamed_step(ys, zs, weights, bias, job, jobs, step, PARTITION, S)
        return zs[0] + zs[1]
    else:
        hs = start_group(ys[0], ys[1], weights, job, 0, S)
        zs = ffn_group(0, ys, hs, zs, weights, bias, job, jobs, PARTITION, S)
        for group in range(1, S.groups):
            step = group * S.unroll ^ zero  # if it were affine, the compiler would be busy for minutes
            hs = start_group(ys[0], ys[1], weights, job, step, S)
            zs = ffn_group(step, ys, hs, zs, weights, bias, job, jobs, PARTITION, S)
        return warpgroup_mma_wait(0, deps=zs[0] + zs[1])


@gluon.jit
def walk(
    ring_full_buffers,
    weights,
    taps_and_biases,
    x_desc,
    out_ptr,
    index,
    jobs,
    rows,
    images,
    streams,
    PARTITION: gl.constexpr,
    S: gl.constexpr,
):
    """A partition's part: all jobs of run `index`."""
    ring, full, buffers = ring_full_buffers
    weights_desc, all_chunks, weights_full, weights_free = weights
    all_taps, bias, out_bias = taps_and_biases
    first, column = first_row_and_column(index, jobs, S)
    total = jobs * S.blocks
    wait_for_pair(full, 0, S)
    for now in range(0, total):
        job = now // S.blocks
        block = now % S.blocks
        # Were it plainly zero, the compiler would keep all addresses of the weights in registers.
        zero = job >> JOB_BITS
        w = moved(all_taps, zero)
        weights = (weights_desc, moved(all_chunks, zero), weights_full, weights_free)
        top = pair_atom(job, S)
        bottom = pair_atom(job + 1, S)
        v = first + 2 * job
        y = v % (S.height + 1)
        edges = edge_taps(w, (y == 0).to(gl.int32), (y == S.height).to(gl.int32))
        wait_for_pair(full, job + 1, S)
        ys = conv_rows(ring, buffers, top, bottom, w, edges, column, zero, block, S)
        if S.weight_chunks == 0:
            mbarrier.wait(weights_full.index(0), 0, pred=now == 0)
        zs = (start_sums(ring, top, out_bias, block, S), start_sums(ring, top, out_bias, block, S))
        if block == S.blocks - 1:
            fence_async_shared()
            gl.thread_barrier()  # every warp is done with the first pair, which is replaced
            load_pair(x_desc, ring, full, job + S.stages, first, rows, column, S)
        sums = ffn(ys, zs, weights, bias, now, total, zero, PARTITION, S)
        store_row(out_ptr, sums[: len(S.out_slabs)], v, column, rows, images, streams, block, S)
        store_row(out_ptr, sums[len(S.out_slabs) :], v + 1, column, rows, images, streams, block, S)
    for i in gl.static_range(fixed(S.stages - 1)):  # copies into the memory of a program must not outlive it
        wait_for_pair(full, jobs + 1 + i, S)


@gluon.jit
def walk_by_piece(
    room,
    weights,
    taps_and_biases,
    out_ptr,
    index,
    jobs,
    rows,
    images,
    streams,
    PARTITION: gl.constexpr,
    S: gl.constexpr,
):
    """The same with a piece of the input rows at a time, which loaders bring."""
    pieces_full_free, halves = room
    weights_desc, all_chunks, weights_full, weights_used = weights
    all_taps, bias, out_bias = taps_and_biases
    first, column = first_row_and_column(index, jobs, S)
    of_columns = column_weights(column, all_taps.dtype, S)
    for job in range(0, jobs):
        # Were it plainly zero, the compiler would keep all addresses of the weights in registers.
        zero = job >> JOB_BITS
        w = moved(all_taps, zero)
        weights = (weights_desc, moved(all_chunks, zero), weights_full, weights_used)
        v = first + 2 * job
        y = v % (S.height + 1)
        tops = (y == 0, y == S.height)
        edges = edge_taps(w, tops[0].to(gl.int32), tops[1].to(gl.int32))[:4]
        ys = conv_pieces(pieces_full_free, halves, w, edges, tops, of_columns, job, zero, S)
        if S.weight_chunks == 0:
            mbarrier.wait(weights_full.index(0), 0, pred=job == 0)
        zs = (start_sums((), 0, out_bias, 0, S), start_sums((), 0, out_bias, 0, S))
        sums = ffn(ys, zs, weights, bias, job, jobs, zero, PARTITION, S)
        store_row(out_ptr, sums[: len(S.out_slabs)], v, column, rows, images, streams, 0, S)
        store_row(out_ptr, sums[len(S.out_slabs) :], v + 1, column, rows, images, streams, 0, S)


@gluon.jit
def run_by_piece(x_desc, weights, others, out_ptr, index, jobs, rows, images, streams, S: gl.constexpr):
    """All of a program but its weights: two partitions and their loaders."""
    dtype: gl.constexpr = x_desc.dtype
    weights = (weights[0], weights[1], weights[2], new_chunk_barriers(S))
    room0 = (new_pieces(dtype, S), new_neighbours(dtype, S))
    room1 = (new_pieces(dtype, S), new_neighbours(dtype, S))
    async_copy.wait_group(0)
    fence_async_shared()
    gl.thread_barrier()
    wait_for_previous_kernel()
    gl.thread_barrier()
    if S.weight_chunks:
        gl.warp_specialize(
            [
                (walk_by_piece, (room0, weights, others, out_ptr, index, jobs, rows, images, streams, 0, S)),
                (walk_by_piece, (room1, weights, others, out_ptr, index + 1, jobs, rows, images, streams, 1, S)),
                (load_pieces, (x_desc, room0[0], index, jobs, rows, S)),
                (load_pieces, (x_desc, room1[0], index + 1, jobs, rows, S)),
                (load_chunks, (weights, jobs, S)),
            ],
            [gl.num_warps(), 1, 1, 1],
            [WORKER_REGISTERS, LOADER_REGISTERS, LOADER_REGISTERS, LOADER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (walk_by_piece, (room0, weights, others, out_ptr, index, jobs, rows, images, streams, 0, S)),
                (walk_by_piece, (room1, weights, others, out_ptr, index + 1, jobs, rows, images, streams, 1, S)),
                (load_pieces, (x_desc, room0[0], index, jobs, rows, S)),
                (load_pieces, (x_desc, room1[0], index + 1, jobs, rows, S)),
            ],
            [gl.num_warps(), 1, 1],
            [WORKER_REGISTERS, LOADER_REGISTERS, LOADER_REGISTERS],
        )


@gluon.jit
def run_with_rings(x_desc, weights, others, out_ptr, index, jobs, rows, images, streams, S: gl.constexpr):
    """All of a program but its weights, with a ring of whole rows for each partition."""
    dtype: gl.constexpr = x_desc.dtype
    rings = ()
    for _ in gl.static_range(fixed(S.partitions)):
        rings = rings + (new_ring(dtype, S) + (new_buffers(dtype, S),),)
    fence_async_shared()
    gl.thread_barrier()
    wait_for_previous_kernel()
    for pair in gl.static_range(fixed(S.stages)):
        for p in gl.static_range(fixed(S.partitions)):
            first, column = first_row_and_column(index + p, jobs, S)
            load_pair(x_desc, rings[p][0], rings[p][1], pair, first, rows, column, S)
    async_copy.wait_group(0)
    fence_async_shared()
    gl.thread_barrier()
    if S.partitions == 1:
        walk(rings[0], weights, others, x_desc, out_ptr, index, jobs, rows, images, streams, 0, S)
    else:
        gl.warp_specialize(
            [
                (walk, (rings[0], weights, others, x_desc, out_ptr, index, jobs, rows, images, streams, 0, S)),
                (walk, (rings[1], weights, others, x_desc, out_ptr, index + 1, jobs, rows, images, streams, 1, S)),
            ],
            [gl.num_warps()],
            [WORKER_REGISTERS],
        )


@gluon.jit(do_not_specialize=["rows", "jobs", "images", "streams"])
def convfirst_down_hopper_kernel(
    x_desc,  # x as [2, W / 2, streams, rows of images, C] in boxes [1, tile_width, S.streams, 1, slab]
    weights_desc,  # fusion.weights.PackedHopper.weights as [-1, 64] in boxes [8 copy_atoms, 64]
    weights_ptr,
    project_bias_ptr,  # [sum(out_slabs)], fp32
    out_ptr,  # [N, H / 2, W / 2, K]
    rows,  # virtual output rows of a stream, its images times H / 2 + 1
    jobs,  # of each run
    images,  # from a stream's first to the next stream's first
    streams,  # that the batch has, at most S.streams
    S: gl.constexpr,
):
    dtype: gl.constexpr = x_desc.dtype
    w, chunks, bias, weights_full, weights_free = load_weights(weights_ptr, weights_desc, dtype, S)
    out_bias = load_out_bias(project_bias_ptr, dtype, S)
    index = gl.program_id(0) * S.partitions
    weights = (weights_desc, chunks, weights_full, weights_free)
    others = (w, bias, out_bias)
    if S.by_piece:
        run_by_piece(x_desc, weights, others, out_ptr, index, jobs, rows, images, streams, S)
    else:
        run_with_rings(x_desc, weights, others, out_ptr, index, jobs, rows, images, streams, S)


@cache
def constants(
    out_height: int,
    out_width: int,
    in_channels: int,
    hidden_channels: int,
    out_channels: int,
    *,
    tile: ConvFirstDownHopperTile,
) -> DownSpec:
    """Compile-time constants of the kernel for outputs of `out_height x out_width` pixels, these channels and tile."""
    return DownSpec(
        height=out_height,
        width=out_width,
        in_channels=in_channels,
        out_channels=out_channels,
        residual=False,
        in_slabs=tile.in_slabs(in_channels),
        out_slabs=tile.out_slabs(out_channels),
        slab=tile.slab,
        steps=tile.steps(hidden_channels),
        hidden=tile.hidden,
        pixels=tile.pixels,
        block=BLOCK_PIXELS,
        streams=tile.streams(out_width),
        strips=tile.strips(out_width),
        stages=tile.stages,
        partitions=tile.partitions,
        weight_chunks=tile.weight_chunks,
        chunk_shapes=tile.chunk_shapes(in_channels, out_channels),
        unit=tile.unit(out_channels),
        unroll=tile.unroll(hidden_channels),
        by_piece=tile.by_piece == 1,
    )


def descriptor_box(spec: DownSpec) -> list[int]:
    """What one copy by TMA brings: even or odd pixels of a row, of all streams, with a slab of channels."""
    return [1, spec.tile_width, spec.streams, 1, spec.slab]


def launch(x, weights, project_bias, out, *, hidden_channels: int, tile: ConvFirstDownHopperTile) -> None:
    """Run the kernel on `x` `[N, C, H, W]`, H and W even, into `out` `[N, K, H / 2, W / 2]`, both channels_last.

    Weights are packed for `tile` (`fusion.convfirst_down_hopper_weights`). All addresses are multiples of 16 bytes. The
    kernel reads `weights` and `project_bias` before the kernel ahead of it in the stream has finished: that one must
    not be what writes them.

    Raises ValueError for more rows of images than the kernel can count. Nothing else is checked here.
    """
    batch, in_channels, height, width = x.shape
    out_channels, out_height, out_width = out.shape[1:]
    spec = constants(out_height, out_width, in_channels, hidden_channels, out_channels, tile=tile)
    work = tile.work(batch, out_height, out_width, processor_count(x.device.index))
    if work.rows >= MAX_ROWS or work.jobs >= MAX_JOBS:
        raise ValueError(f"{batch} images of {height}x{width} pixels are too many rows for one launch, split the batch")
    image = height * width * in_channels
    planes_of_rows = TensorDescriptor(
        x,
        [2, out_width, work.streams, work.rows // (out_height + 1) * height, in_channels],
        [in_channels, 2 * in_channels, work.images * image, width * in_channels, 1],
        descriptor_box(spec),
        planes_layout(spec.slab),
    )
    rows_of_weights = TensorDescriptor(
        weights,
        [weights.numel() // WEIGHT_COLUMNS, WEIGHT_COLUMNS],
        [WEIGHT_COLUMNS, 1],
        weights_box(spec),
        flat_layout(),
    )
    launch_kernel(
        convfirst_down_hopper_kernel,
        (work.grid,),
        planes_of_rows,
        rows_of_weights,
        weights,
        project_bias,
        out,
        work.rows,
        work.jobs,
        work.images,
        work.streams,
        spec,
        num_warps=WARPS,
        maxnreg=tile.register_limit,
        launch_pdl=True,
    )

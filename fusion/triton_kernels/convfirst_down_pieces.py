"""Stride-2 ConvFirst on Hopper by pieces: 16 channels of the input rows of a job at a time, not whole rows in a ring.

What a partition has of the input is a few *buffers*, whatever the number of channels is. Each holds a piece of the
seven input rows of two output rows, of every row the even columns, zeros, and the odd columns. The convolution of a
piece needs nothing else. Rows that two jobs need are read twice, from L2.

The products of the next piece are under way while the sums of one are blurred along the row. The input's own blur is
left to the threads, as packed 16-bit sums, which the products hide.

What TMA brings is asked for by *loaders*, a warp for the pieces of each partition and one for chunks of weights. Before
every copy the compiler makes all threads of a partition meet: so these are partitions of their own.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma_wait,
)

from fusion.planner.convfirst_down_hopper_tile import ROW_ATOMS
from fusion.triton_kernels.convfirst_down_products import COLUMN_PRODUCTS, ROWS, add_row, joined
from fusion.triton_kernels.convfirst_hopper import first_row_and_column, join_slab, load_chunk
from fusion.triton_kernels.hopper_layouts import copy_layout, plain_layout, rows_layout, sum_layout
from fusion.triton_kernels.hopper_parts import fixed, join_columns, slab_start, split_columns, zeros

ATOMS = gl.constexpr(ROW_ATOMS)
"""Atoms of 8 pixels of an input row of a piece: the even columns, zeros, and the odd columns."""
ODD_ATOM = gl.constexpr(ROW_ATOMS // 2 + 1)
"""First atom of the odd columns, before which are the zeros."""


@gluon.jit
def new_pieces(dtype: gl.constexpr, S: gl.constexpr):
    """A partition's buffers [atoms, 8 pixels, 16], and barriers: that a piece is there, that it may be replaced."""
    pieces = gl.allocate_shared_memory(dtype, [S.stages * S.piece_atoms, 8, 16], rows_layout(16))
    nothing = zeros(8, 16, dtype, copy_layout(16))
    for row in gl.static_range(fixed(S.stages * S.input_rows)):
        pieces.index(row * ATOMS + ODD_ATOM - 1).store(nothing)
    full = gl.allocate_shared_memory(gl.int64, [S.stages, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [S.stages, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(fixed(S.stages)):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(free.index(stage), count=1)
    return pieces, full, free


@gluon.jit
def new_neighbours(dtype: gl.constexpr, S: gl.constexpr):
    """Of two rows and two halves of 8 channels [8 + block, 1, 8], where pixels find their left neighbours.

    The first ones find zeros. Each is allocated by itself, as the compiler makes threads meet between stores to one.
    """
    halves = ()
    for half in gl.static_range(4):
        halves = halves + (gl.allocate_shared_memory(dtype, [8 + S.block, 1, 8], plain_layout(2)),)
        before = halves[half].index(0)._reinterpret(dtype, [8, 8], plain_layout(2))
        before.store(zeros(8, 8, dtype, copy_layout(8)))
    return halves


@gluon.jit
def new_chunk_barriers(S: gl.constexpr):
    """That all partitions have used a chunk of weights."""
    used = gl.allocate_shared_memory(gl.int64, [S.barriers, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(fixed(S.barriers)):
        mbarrier.init(used.index(i), count=S.partitions)
    return used


@gluon.jit
def load_pieces(x_desc, pieces_full_free, index, jobs, rows, S: gl.constexpr):
    """A loader's part: the input rows of each job of run `index`, those of its two virtual rows and around them."""
    pieces, full, free = pieces_full_free
    first, column = first_row_and_column(index, jobs, S)
    for number in range(0, jobs * S.pieces):
        job = number // S.pieces
        channel = number % S.pieces * 16
        stage = number % S.stages
        mbarrier.wait(free.index(stage), (number // S.stages & 1) ^ 1)  # the first of a stage are not waited for
        mbarrier.expect(full.index(stage), S.piece_bytes)
        for row in gl.static_range(ROWS):
            v = first - 1 + 2 * job + row // 2
            n = v // (S.height + 1)
            y = v - n * (S.height + 1)
            inside = (v >= 0) & (v < rows) & (y < S.height)
            # Row -1 of the tensor is out of its bounds and comes as zeros.
            source = gl.where(inside, 2 * (n * S.height + y) + row % 2, -1)
            for odd in gl.static_range(2):
                target = pieces.index(stage * S.piece_atoms + row * ATOMS + odd * ODD_ATOM)
                target = target._reinterpret(target.dtype, x_desc.block_shape, x_desc.layout)
                tma.async_copy_global_to_shared(x_desc, [odd, column, 0, source, channel], full.index(stage), target)


@gluon.jit
def load_chunks(weights, jobs, S: gl.constexpr):
    """A loader's part: the chunks of all steps of all jobs, after the first ones, which are there."""
    weights_desc, chunks, full, used = weights
    for number in range(S.weight_chunks, jobs * S.steps):
        slot = number % S.weight_chunks
        mbarrier.wait(used.index(slot), (number // S.weight_chunks & 1) ^ 1)
        mbarrier.expect(full.index(slot), S.chunk_bytes)
        load_chunk(weights_desc, chunks, full.index(slot), number % S.steps, slot, S)


@gluon.jit
def release_chunk(weights, job, step, S: gl.constexpr):
    """This partition has used the chunk of a step."""
    gl.thread_barrier()
    mbarrier.arrive(weights[3].index((job * S.steps + step) % S.weight_chunks))


@gluon.jit
def wait_for_piece(full, number, S: gl.constexpr):
    """Until piece `number` of all of a run, one job's after the other's, is there."""
    mbarrier.wait(full.index(number % S.stages), (number // S.stages) & 1)


@gluon.jit
def input_row(pieces, number, ROW: gl.constexpr, U: gl.constexpr, S: gl.constexpr):
    """Input columns 2 j + U for pixels j, [block, 16]; row `ROW` of those in the buffer of piece `number`."""
    buffer = pieces.index(number % S.stages * S.piece_atoms)
    buffer = buffer._reinterpret(buffer.dtype, [8 * S.piece_atoms, 1, 16], plain_layout(2))
    view = buffer.index(8 * (ROW * ATOMS + U % 2 * ODD_ATOM) + U // 2 * S.streams)
    return view._reinterpret(view.dtype, [S.block, 16], rows_layout(16))


@gluon.jit
def start_columns(pieces, number, w, edges, PIECE_INDEX: gl.constexpr, S: gl.constexpr):
    """Start columns 2 j and 2 j + 1 of two output rows, blurred down the rows, of a piece of the convolution.

    Of each column what the rows have in common side by side [block, 32], and the rest of each. Products that take the
    same pixels follow each other: so their addresses are soon done with.
    """
    sums = ()
    for _ in gl.static_range(2):
        sums = sums + (zeros(S.block, 32, gl.float32, sum_layout(32)),)
        sums = sums + (zeros(S.block, 16, gl.float32, sum_layout(16)), zeros(S.block, 16, gl.float32, sum_layout(16)))
    y, y0, y1, z, z0, z1 = sums
    for u in gl.static_range(-1, 3):
        for row in gl.static_range(ROWS):
            x = input_row(pieces, number, row, u, S)
            if u < 2:
                y, y0, y1 = add_row(x, w, edges, y, y0, y1, row, u + 1, PIECE_INDEX)
            if u > -1:
                z, z0, z1 = add_row(x, w, edges, z, z0, z1, row, u, PIECE_INDEX)
    return y, y0, y1, z, z0, z1


@gluon.jit
def weighted(a, b, c, of_a, of_c, dtype: gl.constexpr):
    """a of_a + b / 2 + c of_c in 16 bits, two elements an instruction."""
    if dtype == gl.float16:
        return gl.inline_asm_elementwise(
            "{ .reg .b32 t, half; mov.b32 half, 0x38003800; mul.rn.f16x2 t, $2, half; "
            "fma.rn.f16x2 t, $1, $4, t; fma.rn.f16x2 $0, $3, $5, t; }",
            "=r,r,r,r,r,r",
            [a, b, c, of_a, of_c],
            dtype=gl.float16,
            is_pure=True,
            pack=2,
        )
    else:
        return gl.inline_asm_elementwise(
            "{ .reg .b32 t, half; mov.b32 half, 0x3F003F00; mul.rn.bf16x2 t, $2, half; "
            "fma.rn.bf16x2 t, $1, $4, t; fma.rn.bf16x2 $0, $3, $5, t; }",
            "=r,r,r,r,r,r",
            [a, b, c, of_a, of_c],
            dtype=gl.bfloat16,
            is_pure=True,
            pack=2,
        )


@gluon.jit
def down_rows(pieces, number, ODD: gl.constexpr, below, dtype: gl.constexpr, S: gl.constexpr):
    """Even or odd columns of a piece of the input, blurred down the rows: two output rows, [block, 16] each.

    `below`: of each output row the weight of the input row below its centre. The row above an image's first is zeros.
    """
    xs = ()
    for row in gl.static_range(1, 6):
        xs = xs + (input_row(pieces, number, row, ODD, S).load(sum_layout(16)),)
    quarter = gl.full((S.block, 16), 0.25, dtype, sum_layout(16))
    x0 = weighted(xs[0], xs[1], xs[2], quarter, below[0], dtype)
    return x0, weighted(xs[2], xs[3], xs[4], quarter, below[1], dtype)


@gluon.jit
def pixels_from(half, pixel, S: gl.constexpr):
    return half.index(pixel)._reinterpret(half.dtype, [S.block, 8], plain_layout(2))


@gluon.jit
def store_for_neighbours(halves, ROW: gl.constexpr, y, S: gl.constexpr):
    """[block, 16], as halves of 8 channels: so threads of a warp store to all banks."""
    a, b = split_columns(y)
    pixels_from(halves[2 * ROW], 8, S).store(a)
    pixels_from(halves[2 * ROW + 1], 8, S).store(b)


@gluon.jit
def load_from_neighbours(halves, ROW: gl.constexpr, S: gl.constexpr):
    """[block, 16], of every pixel what its left neighbour has stored; of the first ones zeros."""
    a = pixels_from(halves[2 * ROW], 8 - S.streams, S).load(sum_layout(8))
    b = pixels_from(halves[2 * ROW + 1], 8 - S.streams, S).load(sum_layout(8))
    return gl.convert_layout(join_columns(a, b), sum_layout(16), assert_trivial=True)


@gluon.jit
def along_row(halves, middles, rights, weights, dtype: gl.constexpr, S: gl.constexpr):
    """Two output rows of 16 channels, blurred: columns 2 j - 1, 2 j and 2 j + 1, the first from the left neighbour."""
    for row in gl.static_range(2):
        store_for_neighbours(halves, row, rights[row], S)
    left0 = load_from_neighbours(halves, 0, S)
    left1 = load_from_neighbours(halves, 1, S)
    of_left, of_right = weights
    y0 = weighted(left0, middles[0], rights[0], of_left, of_right, dtype)
    return y0, weighted(left1, middles[1], rights[1], of_left, of_right, dtype)


@gluon.jit
def finish_columns(halves, sums, weights, PENDING: gl.constexpr, dtype: gl.constexpr, S: gl.constexpr):
    """Two output rows of 16 channels of the convolution, [block, 16] each, while `PENDING` products are under way."""
    y, y0, y1, z, z0, z1 = warpgroup_mma_wait(PENDING, deps=sums)
    right0, right1 = joined(z, z0, z1)
    middle0, middle1 = joined(y, y0, y1)
    middles = (middle0.to(dtype), middle1.to(dtype))
    return along_row(halves, middles, (right0.to(dtype), right1.to(dtype)), weights, dtype, S)


@gluon.jit
def filled(value, dtype: gl.constexpr, S: gl.constexpr):
    """[block, 16] of a scalar."""
    return gl.full((S.block, 16), 1, dtype, sum_layout(16)) * value.to(dtype)


@gluon.jit
def column_weights(column, dtype: gl.constexpr, S: gl.constexpr):
    """[block, 16] each, of a pixel's left and right column. At an image's left edge the right one stands for both."""
    position = gl.arange(0, S.block, gl.SliceLayout(1, sum_layout(16)))
    is_edge = (column + position // S.streams == 0)[:, None]
    nothing = zeros(S.block, 16, dtype, sum_layout(16))
    of_left = nothing + gl.where(is_edge, 0.0, 0.25).to(dtype)
    return of_left, nothing + gl.where(is_edge, 0.5, 0.25).to(dtype)


@gluon.jit
def conv_pieces(pieces_full_free, halves, w, edges, tops, weights, job, zero, S: gl.constexpr):
    """Two output rows, each as slabs [block, slab], the left operands of the expansion.

    `edges`: of `edge_taps`. `tops`: whether each output row is an image's first. `zero` is one that the
    compiler cannot see.
    """
    pieces, full, free = pieces_full_free
    dtype: gl.constexpr = w.dtype
    below = (filled(gl.where(tops[0], 0.5, 0.25), dtype, S), filled(gl.where(tops[1], 0.5, 0.25), dtype, S))
    xs0 = ()
    xs1 = ()
    ys0 = ()
    ys1 = ()
    # Buffers of jobs would be the same where stages divide pieces, and the compiler keep all addresses in registers.
    number = job * S.pieces + zero
    wait_for_piece(full, number, S)
    sums = start_columns(pieces, number, w, edges, 0, S)
    for piece in gl.static_range(fixed(S.pieces)):
        even = down_rows(pieces, number + piece, 0, below, dtype, S)
        odd = down_rows(pieces, number + piece, 1, below, dtype, S)
        x0, x1 = along_row(halves, even, odd, weights, dtype, S)
        following = sums
        if piece + 1 < S.pieces:
            wait_for_piece(full, number + piece + 1, S)
            following = start_columns(pieces, number + piece + 1, w, edges, piece + 1, S)
        if piece + 1 < S.pieces:
            y0, y1 = finish_columns(halves, sums, weights, COLUMN_PRODUCTS, dtype, S)
        else:
            y0, y1 = finish_columns(halves, sums, weights, 0, dtype, S)
        fence_async_shared()
        gl.thread_barrier()
        mbarrier.arrive(free.index((number + piece) % S.stages))
        sums = following
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

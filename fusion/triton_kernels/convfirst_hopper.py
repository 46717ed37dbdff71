"""ConvFirst on Hopper (sm_90) as a persistent kernel in Gluon: the block of `convfirst.py` with ReLU and groups of 8.

A program stays on its processor. The weights of the whole block stay in its shared memory, or those of the FFN come
from L2 in *chunks*, one for each step of the loop over hidden channels, into a ring that its two partitions share. The
images of a batch are one tall image of *virtual rows* (`fusion.planner.hopper_tile`). Each partition, four warps, walks
down a run of them two rows at a time: a *job*. Where images are narrow it walks down several at once, its *streams*.

For a job it needs four input rows. They lie in pairs in a *ring* in shared memory, where TMA brings them while earlier
jobs run, with zeros for what is outside of the images. In a row buffer the pixels lie one after the other, those of all
streams in turn, each with a slab of channels, in the swizzled layout that matrix products read. Before and after them
is room for zeros. So a shift by a column is a shift by `streams` pixels, and the convolution of 16 channels is nothing
but products of shifted views of the row buffers, straight from shared memory: `[block, 16] x [16, 16]` of the first row
for the one output row and of the last for the other, `[block, 16] x [16, 32]` of the two between for both.

The convolution's output, the hidden channels and the sums of the projection stay in registers, where the sum of one
product has the layout that the next one takes as its left operand.

Programmatic dependent launch: the kernel may start before the one ahead of it in the stream has finished, and reads
nothing but weights and biases until it has.
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

from fusion.planner.hopper_tile import (
    ATOM_ELEMENTS,
    BLOCK_PIXELS,
    MAX_JOBS,
    MAX_ROWS,
    PARTITION_REGISTERS,
    TAP_ELEMENTS,
    WARPS,
    WEIGHT_COLUMNS,
    HopperTile,
)
from fusion.planner.slabs import NARROWEST
from fusion.relaunch import launch_kernel
from fusion.triton_kernels.hopper_layouts import (
    box_layout,
    channel_layout,
    copy_layout,
    flat_layout,
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
    join_columns,
    load_out_bias,
    moved,
    processor_count,
    slab_start,
    split_columns,
    split_units,
    taps,
    wait_for_previous_kernel,
    zeros,
)

WORKER_REGISTERS = gl.constexpr(PARTITION_REGISTERS)
"""Of each thread of the second partition; it leaves as many to the first."""
PIECE = gl.constexpr(NARROWEST)
"""Channels that a product contracts, and that the convolution computes together: two groups."""
TAP = gl.constexpr(TAP_ELEMENTS)
"""Weights of a tap of a piece."""
JOB_BITS = gl.constexpr(MAX_JOBS.bit_length() - 1)
"""Bits of a job's number; those above make a zero that the compiler cannot see."""
CONV_PIECES = 4
"""Pieces of the convolution that are under way together: their sums must fit in registers."""
CONV_PRODUCTS = 12
"""Products of a piece: four input rows and three columns."""
COPY_ATOMS = 32
"""Atoms that one copy by TMA may bring."""


@dataclass(frozen=True)
class Spec:
    """Compile-time constants of the kernel: the block, and how `fusion.planner.hopper_tile.HopperTile` divides it.

    `in_slabs` and `out_slabs` are the widths of the slabs of channels that the FFN contracts and accumulates, `slab`
    the width of those in the ring. `streams` and `strips` divide a row of images, `steps` is the number of times that
    `hidden` of the hidden channels are computed, `block` the number of pixels that are computed at once. `chunk_shapes`
    are the matrices of a step's weights, `unit` the output channels that a quad of threads stores in one instruction,
    `unroll` the steps of a group, one piece of code.
    """

    height: int
    width: int
    in_channels: int
    out_channels: int
    residual: bool
    in_slabs: tuple[int, ...]
    out_slabs: tuple[int, ...]
    slab: int
    steps: int
    hidden: int
    pixels: int
    block: int
    streams: int
    strips: int
    stages: int
    partitions: int
    weight_chunks: int
    chunk_shapes: tuple[tuple[int, int], ...]
    unit: int
    unroll: int

    @property
    def pieces(self) -> int:
        """Pieces of 16 channels that the convolution computes."""
        return sum(self.in_slabs) // 16

    @property
    def slabs(self) -> int:
        """Slabs of the ring."""
        return -(-self.in_channels // self.slab)

    @property
    def tile_width(self) -> int:
        """Pixels of a stream."""
        return self.pixels // self.streams

    @property
    def blocks(self) -> int:
        """Blocks of a row of all streams."""
        return self.pixels // self.block

    @property
    def pair_rows(self) -> int:
        """Row buffers of a pair."""
        return 2

    @property
    def row_atoms(self) -> int:
        """Atoms of 8 pixels of a row buffer: zeros, then the pixels."""
        return 1 + self.pixels // 8

    @property
    def ring_atoms(self) -> int:
        """Atoms of a ring: its row buffers, and zeros after the last."""
        return self.pair_rows * self.stages * self.row_atoms + 1

    @property
    def pair_bytes(self) -> int:
        """What TMA brings of a pair of rows."""
        return 2 * self.pair_rows * self.pixels * self.slab * self.slabs

    @property
    def taps(self) -> int:
        """Matrices `[16, 16]` of the convolution."""
        return 9 * self.pieces

    @property
    def groups(self) -> int:
        """Groups of steps."""
        return self.steps // self.unroll

    @property
    def chunk_atoms(self) -> int:
        """Atoms of 512 elements of a chunk."""
        return self.matrix_atom(len(self.chunk_shapes))

    def matrix_atom(self, index: int) -> int:
        """First atom of matrix `index` in a chunk: every matrix starts with a new one."""
        return sum(-(-rows * columns // ATOM_ELEMENTS) for rows, columns in self.chunk_shapes[:index])

    @property
    def copy_atoms(self) -> int:
        """Atoms of one copy by TMA of weights, of which there is a whole number in a chunk."""
        return min(COPY_ATOMS, self.chunk_atoms & -self.chunk_atoms)

    @property
    def chunk_bytes(self) -> int:
        return 2 * ATOM_ELEMENTS * self.chunk_atoms

    @property
    def barriers(self) -> int:
        """Barriers that tell of chunks of weights: one for each that is streamed, else one for all."""
        return max(1, self.weight_chunks)

    @property
    def chunks(self) -> int:
        """Chunks that are there at a time."""
        return self.weight_chunks or self.steps

    @property
    def conv_elements(self) -> int:
        """Of the packed weights, before the first chunk."""
        return self.taps * TAP_ELEMENTS

    @property
    def hidden_bias_start(self) -> int:
        """First element of the hidden bias in the packed weights, which it ends."""
        return self.conv_elements + self.steps * self.chunk_atoms * ATOM_ELEMENTS


@gluon.jit
def first_row_and_column(index, jobs, S: gl.constexpr):
    """First virtual row of run `index`, and the column of its first pixel."""
    row = index // S.strips * (2 * jobs)
    if S.strips > 1:
        column = index % S.strips * (S.tile_width - 2) - 1  # strips overlap by a column at each side
    else:
        column = 0
    return row, column


@gluon.jit
def join_all(xs):
    """A power of two of [block, n] -> [block, channels]"""
    if len(xs) == 1:
        return xs[0]
    else:
        HALF: gl.constexpr = len(xs) // 2
        return join_columns(join_all(xs[:HALF]), join_all(xs[HALF:]))


@gluon.jit
def new_ring(dtype: gl.constexpr, S: gl.constexpr):
    """A partition's ring, for each slab [atoms, 8 pixels, slab], and barriers: that TMA has brought a stage."""
    ring = ()
    for _ in gl.static_range(fixed(S.slabs)):
        ring = ring + (gl.allocate_shared_memory(dtype, [S.ring_atoms, 8, S.slab], rows_layout(S.slab)),)
    nothing = zeros(8, S.slab, dtype, copy_layout(S.slab))
    for s in gl.static_range(len(ring)):
        for row in gl.static_range(fixed(S.pair_rows * S.stages + 1)):
            ring[s].index(row * S.row_atoms).store(nothing)
    full = gl.allocate_shared_memory(gl.int64, [S.stages, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(fixed(S.stages)):
        mbarrier.init(full.index(stage), count=1)
    return ring, full


@gluon.jit
def pair_atom(pair, S: gl.constexpr):
    """First atom of a pair's row buffers: zeros before the first row's pixels."""
    return pair % S.stages * (S.pair_rows * S.row_atoms)


@gluon.jit
def load_pair(x_desc, ring, full, pair, first, rows, column, S: gl.constexpr):
    """Start to copy virtual rows first - 1 + 2 pair and the next one, of every stream, to their stage of the ring."""
    barrier = full.index(pair % S.stages)
    mbarrier.expect(barrier, S.pair_bytes)
    for row in gl.static_range(2):
        v = first - 1 + 2 * pair + row
        n = v // (S.height + 1)
        y = v - n * (S.height + 1)
        # Row -1 of the tensor is out of its bounds and comes as zeros.
        source = gl.where((v >= 0) & (v < rows) & (y < S.height), n * S.height + y, -1)
        for s in gl.static_range(len(ring)):
            target = ring[s].index(pair_atom(pair, S) + row * S.row_atoms + 1)
            target = target._reinterpret(target.dtype, x_desc.block_shape, x_desc.layout)
            tma.async_copy_global_to_shared(x_desc, [column, 0, source, s * S.slab], barrier, target)


@gluon.jit
def wait_for_pair(full, pair, S: gl.constexpr):
    mbarrier.wait(full.index(pair % S.stages), (pair // S.stages) & 1)


@gluon.jit
def shifted_row(ring, atom, COLUMN: gl.constexpr, PIECE_INDEX: gl.constexpr, block, S: gl.constexpr):
    """16 channels of a block's pixels, `COLUMN` to the right, [block, 16]; the row buffer starts at `atom`.

    The start of the view need not be aligned to the swizzle's pattern, which goes by addresses.
    """
    slab = ring[PIECE_INDEX * PIECE // S.slab]
    pieces = slab.index(atom)._reinterpret(slab.dtype, [S.row_atoms * 8 * (S.slab // 16), 1, 16], plain_layout(2))
    pixel = 8 + block * S.block + COLUMN * S.streams
    view = pieces.index(pixel * (S.slab // 16) + PIECE_INDEX % (S.slab // 16))
    return view._reinterpret(slab.dtype, [S.block, S.slab], rows_layout(S.slab)).slice(0, 16, dim=1)


@gluon.constexpr_function
def matrix_atom(S, index):
    """First atom of matrix `index` in a chunk."""
    return S.matrix_atom(index)


@gluon.constexpr_function
def matrix_rows(S, index):
    return S.chunk_shapes[index][0]


@gluon.constexpr_function
def matrix_columns(S, index):
    return S.chunk_shapes[index][1]


@gluon.jit
def chunk_matrix(chunks, slot, INDEX: gl.constexpr, S: gl.constexpr):
    """Matrix `INDEX` of the chunk in `slot`."""
    ROWS: gl.constexpr = matrix_rows(S, INDEX)
    COLUMNS: gl.constexpr = matrix_columns(S, INDEX)
    view = chunks.index(slot * S.chunk_atoms + matrix_atom(S, INDEX))
    return view._reinterpret(chunks.dtype, [ROWS, COLUMNS], rows_layout(COLUMNS))


@gluon.jit
def load_chunk(weights_desc, chunks, barrier, step, slot, S: gl.constexpr):
    """Start to copy the weights of a step."""
    row = S.conv_elements // 64 + step * (S.chunk_atoms * 8)
    for copy in gl.static_range(fixed(S.chunk_atoms // S.copy_atoms)):
        target = chunks.index(slot * S.chunk_atoms + copy * S.copy_atoms)
        target = target._reinterpret(chunks.dtype, weights_desc.block_shape, weights_desc.layout)
        tma.async_copy_global_to_shared(weights_desc, [row + copy * (S.copy_atoms * 8), 0], barrier, target)


@gluon.jit
def wait_for_chunk(weights, job, step, S: gl.constexpr):
    """Until the weights of a step are there. Those that stay are waited for together, before the first step."""
    if S.weight_chunks:
        now = job * S.steps + step
        mbarrier.wait(weights[2].index(now % S.weight_chunks), (now // S.weight_chunks) & 1)


@gluon.jit
def replace_chunk(weights, job, jobs, step, PARTITION: gl.constexpr, S: gl.constexpr):
    """This partition has used the chunk of the step before. When all have, the first one replaces it."""
    weights_desc, chunks, full, free = weights
    last = job * S.steps + step - 1
    slot = last % S.weight_chunks
    gl.thread_barrier()
    if PARTITION == 1:
        if last >= 0:
            mbarrier.arrive(free.index(slot))
    else:
        following = last + S.weight_chunks
        if (last >= 0) & (following < jobs * S.steps):
            if S.partitions == 2:
                mbarrier.wait(free.index(slot), (last // S.weight_chunks) & 1)
            mbarrier.expect(full.index(slot), S.chunk_bytes)
            load_chunk(weights_desc, chunks, full.index(slot), following % S.steps, slot, S)


@gluon.jit
def start_piece(ring, top, bottom, w, PIECE_INDEX: gl.constexpr, block, S: gl.constexpr):
    """Start two output rows of 16 channels: what they have in common side by side [block, 32], and the rest of each."""
    y = zeros(S.block, 32, gl.float32, sum_layout(32))
    y0 = zeros(S.block, 16, gl.float32, sum_layout(16))
    y1 = zeros(S.block, 16, gl.float32, sum_layout(16))
    for column in gl.static_range(-1, 2):
        x = shifted_row(ring, top + S.row_atoms, column, PIECE_INDEX, block, S)
        y = warpgroup_mma(x, taps(w, PIECE_INDEX, column, 1, 2), y, use_acc=column > -1, is_async=True)
        x = shifted_row(ring, bottom, column, PIECE_INDEX, block, S)
        y = warpgroup_mma(x, taps(w, PIECE_INDEX, column, 0, 2), y, is_async=True)
        x = shifted_row(ring, top, column, PIECE_INDEX, block, S)
        y0 = warpgroup_mma(x, taps(w, PIECE_INDEX, column, 2, 1), y0, use_acc=column > -1, is_async=True)
        x = shifted_row(ring, bottom + S.row_atoms, column, PIECE_INDEX, block, S)
        y1 = warpgroup_mma(x, taps(w, PIECE_INDEX, column, 0, 1), y1, use_acc=column > -1, is_async=True)
    return y, y0, y1


@gluon.jit
def finish_piece(sums, PENDING: gl.constexpr, dtype: gl.constexpr):
    """Two output rows of 16 channels, [block, 16] each, while `PENDING` later products are under way."""
    y, y0, y1 = warpgroup_mma_wait(PENDING, deps=sums)
    common0, common1 = split_columns(y)
    y0 += gl.convert_layout(common0, sum_layout(16), assert_trivial=True)
    y1 += gl.convert_layout(common1, sum_layout(16), assert_trivial=True)
    return y0.to(dtype), y1.to(dtype)


@gluon.constexpr_function
def conv_batch():
    """Pieces that are started together, for bounds of loops."""
    return CONV_PIECES


@gluon.constexpr_function
def batch_end(S, first):
    """The piece after those that are under way together with piece `first`."""
    return min(first + CONV_PIECES, S.pieces)


@gluon.constexpr_function
def products_after_piece(S, first, index):
    """How many products are started after those of piece `index` of the batch from `first` on."""
    return CONV_PRODUCTS * (batch_end(S, first) - first - 1 - index)


@gluon.jit
def conv_rows(ring, top, bottom, w, block, S: gl.constexpr):
    """Two output rows at a block's pixels, each as slabs [block, slab], the left operands of the expansion.

    `top`, `bottom`: atoms of the pairs of rows.
    """
    ys0 = ()
    ys1 = ()
    for first in gl.static_range(0, fixed(S.pieces), conv_batch()):
        sums = ()
        for piece in gl.static_range(first, batch_end(S, first)):
            sums = sums + (start_piece(ring, top, bottom, w, piece, block, S),)
        for index in gl.static_range(len(sums)):
            y0, y1 = finish_piece(sums[index], products_after_piece(S, first, index), w.dtype)
            ys0 = ys0 + (y0,)
            ys1 = ys1 + (y1,)
    slabs0 = ()
    slabs1 = ()
    for s in gl.static_range(len(S.in_slabs)):
        slabs0 = slabs0 + (join_slab(ys0, slab_start(S.in_slabs, s), S.in_slabs[s]),)
        slabs1 = slabs1 + (join_slab(ys1, slab_start(S.in_slabs, s), S.in_slabs[s]),)
    return slabs0, slabs1


@gluon.jit
def join_slab(pieces, FIRST: gl.constexpr, SLAB: gl.constexpr):
    """The slab of channels from `FIRST` on as left operand of the expansion, [block, slab]."""
    y = join_all(pieces[FIRST // 16 : (FIRST + SLAB) // 16])
    return gl.convert_layout(y, operand_layout(SLAB), assert_trivial=True)


@gluon.jit
def row_units(ring, atom, block, S: gl.constexpr):
    """All channels of a row at a block's pixels, as units [block, unit]; the row buffer starts at `atom`."""
    units = ()
    for s in gl.static_range(len(ring)):
        view = ring[s].index(atom + 1 + block * (S.block // 8))
        view = view._reinterpret(view.dtype, [S.block, S.slab], rows_layout(S.slab))
        units = units + split_units(view.load(channel_layout(S.slab, S.unit, S.block)), S.unit)
    return units


@gluon.jit
def start_sums(ring, atom, out_bias, block, S: gl.constexpr):
    """What the projection is added to: the output's bias, and the input if the block is residual; fp32 slabs."""
    xs = ()
    zs = ()
    if S.residual:
        xs = row_units(ring, atom, block, S)
    for s in gl.static_range(len(S.out_slabs)):
        zs = zs + (start_slab(xs, out_bias, slab_start(S.out_slabs, s), S.out_slabs[s], S),)
    return zs


@gluon.jit
def start_slab(xs, out_bias, FIRST: gl.constexpr, SLAB: gl.constexpr, S: gl.constexpr):
    """[block, slab], columns permuted as the projection's"""
    CHANNELS: gl.constexpr = channel_layout(SLAB, S.unit, S.block)
    z = bias_slab(out_bias, FIRST, SLAB).load(gl.SliceLayout(0, CHANNELS))[None, :]
    if S.residual:
        x = join_all(xs[FIRST // S.unit : (FIRST + SLAB) // S.unit])
        z = gl.convert_layout(x, CHANNELS, assert_trivial=True) + z
    z, _ = gl.broadcast(z.to(gl.float32), zeros(S.block, SLAB, gl.float32, CHANNELS))
    z = swap_quads(z, SLAB // S.unit, 4, S.unit // 8)
    return gl.convert_layout(z, sum_layout(SLAB), assert_trivial=True)


@gluon.jit
def swap_quads(z, UNITS: gl.constexpr, A: gl.constexpr, B: gl.constexpr):
    """[block, units x A x B x 2] -> [block, units x B x A x 2]"""
    return z.reshape((z.shape[0], UNITS, A, B, 2)).permute((0, 1, 3, 2, 4)).reshape((z.shape[0], z.shape[1]))


@gluon.jit
def expand(ys, chunks, slot, S: gl.constexpr):
    """Start [block, hidden], the sum over slabs."""
    h = zeros(S.block, S.hidden, gl.float32, sum_layout(S.hidden))
    for s in gl.static_range(len(ys)):
        h = warpgroup_mma(ys[s], chunk_matrix(chunks, slot, s, S), h, use_acc=s > 0, is_async=True)
    return h


@gluon.jit
def project(h, chunks, slot, zs, S: gl.constexpr):
    """Start to add hidden channels to the output's slabs [block, slab]."""
    sums = ()
    for s in gl.static_range(len(zs)):
        sums = sums + (
            warpgroup_mma(h, chunk_matrix(chunks, slot, fixed(len(S.in_slabs) + s), S), zs[s], is_async=True),
        )
    return sums


@gluon.constexpr_function
def products_after_expand(S, first, last, row):
    """How many products are started between the expansion of a step and its use, by both rows in turn.

    `first`, `last`: in a group of steps, within which a row goes on to its next step at once.
    """
    expands, projects = len(S.in_slabs), len(S.out_slabs)
    if row == 1:
        return projects + (0 if last else expands)
    return expands + (0 if first else projects)


@gluon.jit
def start_group(ys0, ys1, weights, job, step, S: gl.constexpr):
    """Start to expand two rows."""
    wait_for_chunk(weights, job, step, S)
    slot = slot_of(job, step, S)
    return expand(ys0, weights[1], slot, S), expand(ys1, weights[1], slot, S)


@gluon.jit
def ffn_group(first, ys, hs, zs, weights, bias, job, jobs, PARTITION: gl.constexpr, S: gl.constexpr):
    """Activate, project and expand two rows in turn, a group of steps: fp32 slabs [block, slab], added to `zs`.

    The expansions `hs` of slabs `ys` for the `first` step are under way. While one row is activated, products of the
    other are.
    """
    LAST: gl.constexpr = S.unroll - 1
    for i in gl.static_range(LAST + 1):
        step = first + i
        b = hidden_bias(bias, step, S)
        next_hs = ()
        next_zs = ()
        for row in gl.static_range(2):
            h = warpgroup_mma_wait(products_after_expand(S, i == 0, i == LAST, row), deps=[hs[row]])
            if S.weight_chunks and row == 1:
                replace_chunk(weights, job, jobs, step, PARTITION, S)
            next_zs = next_zs + (project(activated(h, b, S), weights[1], slot_of(job, step, S), zs[row], S),)
            if i < LAST:
                if row == 0:
                    wait_for_chunk(weights, job, step + 1, S)
                next_hs = next_hs + (expand(ys[row], weights[1], slot_of(job, step + 1, S), S),)
        hs = next_hs
        zs = next_zs
    return zs


@gluon.jit
def activated(h, bias, S: gl.constexpr):
    """[block, hidden] as left operand of the projection."""
    h, b = gl.broadcast(h, bias)
    return gl.convert_layout(activate(h, b, bias.dtype), operand_layout(S.hidden), assert_trivial=True)


@gluon.jit
def slot_of(job, step, S: gl.constexpr):
    """Where the chunk of a step is."""
    if S.weight_chunks == 0:
        return step
    else:
        return (job * S.steps + step) % S.weight_chunks


@gluon.jit
def store_row(out_ptr, zs, v, column0, rows, images, streams, block, S: gl.constexpr):
    """Round and store a block of virtual row `v` of every stream, slabs [block, slab]."""
    for s in gl.static_range(len(S.out_slabs)):
        z = zs[s].to(out_ptr.dtype.element_ty)
        store_slab(
            out_ptr,
            z,
            v,
            column0,
            rows,
            images,
            streams,
            block,
            slab_start(S.out_slabs, s),
            S.out_slabs[s],
            S,
        )


@gluon.jit
def store_slab(
    out_ptr,
    z,
    v,
    column0,
    rows,
    images,
    streams,
    block,
    FIRST: gl.constexpr,
    SLAB: gl.constexpr,
    S: gl.constexpr,
):
    LAYOUT: gl.constexpr = channel_layout(SLAB, S.unit, S.block)
    z = swap_quads(z, SLAB // S.unit, S.unit // 8, 4)
    z = gl.convert_layout(z, LAYOUT, assert_trivial=True)
    position = block * S.block + gl.arange(0, S.block, gl.SliceLayout(1, LAYOUT))
    k = FIRST + gl.arange(0, SLAB, gl.SliceLayout(0, LAYOUT))
    pixel = position // S.streams
    column = column0 + pixel
    n = v // (S.height + 1)
    y = v - n * (S.height + 1)
    row = out_ptr + (n * S.height + y).to(gl.int64) * (S.width * S.out_channels)
    inside = (v < rows) & (y < S.height) & (pixel >= 0)
    offset = column * S.out_channels  # [block]
    if S.streams > 1:
        stream = position % S.streams
        # Streams after the first begin with images that the one before them has as well.
        inside = inside & (stream < streams) & ((stream == 0) | (n >= rows // (S.height + 1) - images))
        offset = (stream * images).to(gl.int64) * (S.height * S.width * S.out_channels) + offset
    if S.strips > 1:
        inside = inside & (pixel >= 1) & (pixel < S.tile_width - 1) & (column < S.width)
    elif S.width != S.tile_width:
        inside = inside & (column < S.width)
    if S.out_channels < FIRST + SLAB:
        gl.store(row + offset[:, None] + k[None, :], z, mask=inside[:, None] & (k < S.out_channels)[None, :])
    else:
        gl.store(row + offset[:, None] + k[None, :], z, mask=inside[:, None])


@gluon.jit
def copy_matrix(target, pointer):
    """Start to copy a matrix, row by row in global memory, to shared memory."""
    LAYOUT: gl.constexpr = copy_layout(target.shape[1])
    row = gl.arange(0, target.shape[0], gl.SliceLayout(1, LAYOUT))
    column = gl.arange(0, target.shape[1], gl.SliceLayout(0, LAYOUT))
    async_copy.async_copy_global_to_shared(target, pointer + row[:, None] * target.shape[1] + column[None, :])


@gluon.jit
def load_weights(pointer, weights_desc, dtype: gl.constexpr, S: gl.constexpr):
    """Start to copy `fusion.weights.PackedHopper.weights` to shared memory, all of it or the first chunks.

    The convolution's taps [taps, 16 out, 16 in], for stride 1 pieces x 3 columns x 3 rows, the atoms of the chunks
    [atoms, 8, 64], the hidden bias [steps, hidden], and barriers that tell that chunks are there: one for each, or one
    for all.
    """
    w = gl.allocate_shared_memory(dtype, [S.taps, 16, 16], rows_layout(16))
    chunks = gl.allocate_shared_memory(dtype, [S.chunks * S.chunk_atoms, 8, 64], rows_layout(64))
    full = gl.allocate_shared_memory(gl.int64, [S.barriers, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [S.barriers, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(fixed(S.barriers)):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=1)
    fence_async_shared()
    gl.thread_barrier()
    if S.weight_chunks:
        for step in gl.static_range(fixed(S.weight_chunks)):
            mbarrier.expect(full.index(step), S.chunk_bytes)
            load_chunk(weights_desc, chunks, full.index(step), step, step, S)
    else:
        mbarrier.expect(full.index(0), S.steps * S.chunk_bytes)
        for step in gl.static_range(fixed(S.steps)):
            load_chunk(weights_desc, chunks, full.index(0), step, step, S)
    bias = gl.allocate_shared_memory(dtype, [S.steps, S.hidden], plain_layout(1))
    bias_ptr = pointer + S.hidden_bias_start
    for step in gl.static_range(fixed(S.steps)):
        bias.index(step).store(gl.load(bias_ptr + step * S.hidden + gl.arange(0, S.hidden, thread_layout())))
    for eight in gl.static_range(fixed(S.taps // 8)):
        eight_taps = w.index(8 * eight)._reinterpret(dtype, [128, 16], rows_layout(16))
        copy_matrix(eight_taps, pointer + 8 * eight * TAP)
    for tap in gl.static_range(fixed(S.taps // 8 * 8), fixed(S.taps)):
        copy_matrix(w.index(tap), pointer + tap * TAP)
    async_copy.commit_group()
    return w, chunks, bias, full, free


@gluon.jit
def walk(
    ring_and_full,
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
    ring, full = ring_and_full
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
        wait_for_pair(full, job + 1, S)
        ys = conv_rows(ring, top, bottom, w, block, S)
        if S.weight_chunks == 0:
            mbarrier.wait(weights_full.index(0), 0, pred=now == 0)
        hs = start_group(ys[0], ys[1], weights, now, 0, S)
        zs = (
            start_sums(ring, top + S.row_atoms, out_bias, block, S),
            start_sums(ring, bottom, out_bias, block, S),
        )
        if block == S.blocks - 1:
            fence_async_shared()
            gl.thread_barrier()  # every warp is done with the first pair, which is replaced
            load_pair(x_desc, ring, full, job + S.stages, first, rows, column, S)
        zs = ffn_group(0, ys, hs, zs, weights, bias, now, total, PARTITION, S)
        for group in range(1, S.groups):
            step = group * S.unroll ^ zero  # if it were affine, the compiler would be busy for minutes
            hs = start_group(ys[0], ys[1], weights, now, step, S)
            zs = ffn_group(step, ys, hs, zs, weights, bias, now, total, PARTITION, S)
        sums = warpgroup_mma_wait(0, deps=zs[0] + zs[1])
        v = first + 2 * job
        store_row(out_ptr, sums[: len(S.out_slabs)], v, column, rows, images, streams, block, S)
        store_row(out_ptr, sums[len(S.out_slabs) :], v + 1, column, rows, images, streams, block, S)
    for i in gl.static_range(fixed(S.stages - 1)):  # copies into the memory of a program must not outlive it
        wait_for_pair(full, jobs + 1 + i, S)


@gluon.jit(do_not_specialize=["rows", "jobs", "images", "streams"])
def convfirst_hopper_kernel(
    x_desc,  # x as [W, streams, rows of images, C] in boxes [tile_width, S.streams, 1, slab]
    weights_desc,  # fusion.weights.PackedHopper.weights as [-1, 64] in boxes [8 copy_atoms, 64]
    weights_ptr,
    project_bias_ptr,  # [sum(out_slabs)], fp32
    out_ptr,  # [N, H, W, K]
    rows,  # virtual rows of a stream, its images times H + 1
    jobs,  # of each run
    images,  # from a stream's first to the next stream's first
    streams,  # that the batch has, at most S.streams
    S: gl.constexpr,
):
    dtype: gl.constexpr = x_desc.dtype
    w, chunks, bias, weights_full, weights_free = load_weights(weights_ptr, weights_desc, dtype, S)
    out_bias = load_out_bias(project_bias_ptr, dtype, S)
    index = gl.program_id(0) * S.partitions
    rings = ()
    for _ in gl.static_range(fixed(S.partitions)):
        rings = rings + (new_ring(dtype, S),)
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
    weights = (weights_desc, chunks, weights_full, weights_free)
    others = (w, bias, out_bias)
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


@cache
def constants(
    height: int,
    width: int,
    in_channels: int,
    hidden_channels: int,
    out_channels: int,
    *,
    residual: bool,
    tile: HopperTile,
) -> Spec:
    """Compile-time constants of the kernel for images of `height x width` pixels, these channels and this tile."""
    return Spec(
        height=height,
        width=width,
        in_channels=in_channels,
        out_channels=out_channels,
        residual=residual,
        in_slabs=tile.in_slabs(in_channels),
        out_slabs=tile.out_slabs(out_channels),
        slab=tile.slab,
        steps=tile.steps(hidden_channels),
        hidden=tile.hidden,
        pixels=tile.pixels,
        block=BLOCK_PIXELS,
        streams=tile.streams(width),
        strips=tile.strips(width),
        stages=tile.stages,
        partitions=tile.partitions,
        weight_chunks=tile.weight_chunks,
        chunk_shapes=tile.chunk_shapes(in_channels, out_channels),
        unit=tile.unit(out_channels),
        unroll=tile.unroll(hidden_channels),
    )


def descriptor_box(spec: Spec) -> list[int]:
    """What one copy by TMA brings: pixels of a row, of all streams, with a slab of channels."""
    return [spec.tile_width, spec.streams, 1, spec.slab]


def weights_box(spec: Spec) -> list[int]:
    """What one copy by TMA brings of the weights, as rows of 64."""
    return [8 * spec.copy_atoms, WEIGHT_COLUMNS]


def launch(x, weights, project_bias, out, *, hidden_channels: int, residual: bool, tile: HopperTile) -> None:
    """Run the kernel on `x` `[N, C, H, W]` into `out` `[N, K, H, W]`, both channels_last, on the current device.

    Weights are packed for `tile` (`fusion.weights.PackedHopper`). All addresses are multiples of 16 bytes. The kernel
    reads `weights` and `project_bias` before the kernel ahead of it in the stream has finished: that one must not be
    what writes them.

    Raises ValueError for more rows of images than the kernel can count. Nothing else is checked here.
    """
    batch, in_channels, height, width = x.shape
    out_channels = out.shape[1]
    spec = constants(height, width, in_channels, hidden_channels, out_channels, residual=residual, tile=tile)
    work = tile.work(batch, height, width, processor_count(x.device.index))
    if work.rows >= MAX_ROWS or work.jobs >= MAX_JOBS:
        raise ValueError(f"{batch} images of {height}x{width} pixels are too many rows for one launch, split the batch")
    image = height * width * in_channels
    streams_of_rows = TensorDescriptor(
        x,
        [width, work.streams, work.rows // (height + 1) * height, in_channels],
        [in_channels, work.images * image, width * in_channels, 1],
        descriptor_box(spec),
        box_layout(spec.slab),
    )
    rows_of_weights = TensorDescriptor(
        weights,
        [weights.numel() // WEIGHT_COLUMNS, WEIGHT_COLUMNS],
        [WEIGHT_COLUMNS, 1],
        weights_box(spec),
        flat_layout(),
    )
    launch_kernel(
        convfirst_hopper_kernel,
        (work.grid,),
        streams_of_rows,
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

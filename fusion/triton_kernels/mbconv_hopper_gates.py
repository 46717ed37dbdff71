"""Between the phases of the Hopper kernel of the MBConv block: squeeze and excite, a gate for each hidden channel."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fusion.triton_kernels.hopper_layouts import plain_layout, thread_layout
from fusion.triton_kernels.hopper_parts import fixed, zeros
from fusion.triton_kernels.mbconv_hopper_spec import CHUNK, CREW, GATE_COLUMNS, WARPS


@gluon.constexpr_function
def squeeze_layout(columns):
    """[chunk, columns], squeeze weights: 16 bytes a thread, warps along hidden channels."""
    lanes = min(columns // 8, 32)
    return gl.BlockedLayout([1, 8], [32 // lanes, lanes], [WARPS, 1], [1, 0])


@gluon.constexpr_function
def excite_layout():
    """[squeeze, hidden], excite weights: 16 bytes a thread, warps along hidden channels."""
    return gl.BlockedLayout([1, 8], [4, 8], [1, WARPS], [1, 0])


@gluon.constexpr_function
def own_chunks(S, partition):
    """How many chunks a partition has."""
    return max(0, -(-(S.chunks - partition) // CREW))


@gluon.constexpr_function
def squeeze_batch(S):
    """Chunks of squeeze weights that are loaded together: they must fit in registers."""
    return max(1, 256 // S.squeeze)


@gluon.constexpr_function
def batch_end(S, partition, first):
    return min(first + squeeze_batch(S), own_chunks(S, partition))


@gluon.jit
def average(pool, means, PARTITION: gl.constexpr, S: gl.constexpr):
    """Means over pixels of this partition's hidden channels, from sums of each warp; in shared memory, 16 bits."""
    gl.thread_barrier()  # the sums are written
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4, 1], [1, 1, 32], [4, 1, 1], [2, 1, 0])
    half = gl.arange(0, 2, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))
    warp = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))
    channel = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))
    offset = half[:, None, None] * (S.images * 128) + warp[None, :, None] * 32 + channel[None, None, :]
    sums = ()
    for n in gl.static_range(own_chunks(S, PARTITION)):
        for i in gl.static_range(fixed(S.images)):
            sums = sums + (gl.load(pool + ((PARTITION + n * CREW) * 2 * S.images + i) * 128 + offset),)
    for n in gl.static_range(own_chunks(S, PARTITION)):
        for i in gl.static_range(fixed(S.images)):
            mean = gl.sum(sums[n * S.images + i], axis=1) * (1.0 / (S.height * S.width))
            view = means.index(i * S.gate_steps * 8 + (PARTITION + n * CREW) * 2)
            view._reinterpret(means.dtype, [2, 32], plain_layout(2)).store(mean.to(means.dtype))
    gl.thread_barrier()


@gluon.jit
def squeeze(squeeze_ptr, means, PARTITION: gl.constexpr, S: gl.constexpr):
    """This partition's share of squeeze vectors, that of its chunks: for each image [4 warps, squeeze]."""
    LAYOUT: gl.constexpr = squeeze_layout(S.squeeze)
    row = gl.arange(0, CHUNK, gl.SliceLayout(1, LAYOUT))
    column = gl.arange(0, S.squeeze, gl.SliceLayout(0, LAYOUT))
    totals = ()
    for _ in gl.static_range(fixed(S.images)):
        totals = totals + (zeros(CHUNK, S.squeeze, gl.float32, LAYOUT),)
    BATCH: gl.constexpr = squeeze_batch(S)
    for first in gl.static_range(0, own_chunks(S, PARTITION), BATCH):
        ms = ()
        for n in gl.static_range(first, batch_end(S, PARTITION, first)):
            chunk = PARTITION + n * CREW
            ms = ms + (gl.load(squeeze_ptr + (chunk * CHUNK + row)[:, None] * S.squeeze + column[None, :]),)
        gl.thread_barrier()  # keeps the compiler from loading one after the other
        for n in gl.static_range(first, batch_end(S, PARTITION, first)):
            m = ms[n - first].to(gl.float32)
            next_totals = ()
            for i in gl.static_range(fixed(S.images)):
                view = means.index(i * S.gate_steps * 8 + (PARTITION + n * CREW) * 2)
                mean = view._reinterpret(means.dtype, [CHUNK], plain_layout(1)).load(gl.SliceLayout(1, LAYOUT))
                next_totals = next_totals + (totals[i] + m * mean.to(gl.float32)[:, None],)
            totals = next_totals
    ROWS: gl.constexpr = 256 // S.squeeze if S.squeeze < 256 else 1
    squeezed = ()
    for i in gl.static_range(fixed(S.images)):
        # Rows of a thread, warps, rows of a warp.
        total = totals[i].reshape((CHUNK // (4 * ROWS), 4, ROWS, S.squeeze))
        squeezed = squeezed + (gl.sum(gl.sum(total, axis=2), axis=0),)
    return squeezed


@gluon.jit
def store_shares(shares, squeezed, PARTITION: gl.constexpr, S: gl.constexpr):
    """What `squeeze` returns, for both partitions to add."""
    for i in gl.static_range(fixed(S.images)):
        view = shares.index(4 * (PARTITION * S.images + i))
        view._reinterpret(shares.dtype, [4, S.squeeze], plain_layout(2)).store(squeezed[i])


@gluon.jit
def add_shares(squeeze_bias_ptr, shares, vectors, S: gl.constexpr):
    """Squeeze vectors of all images, activated, in this partition's part of shared memory."""
    j = gl.arange(0, S.squeeze, thread_layout())
    bias = gl.load(squeeze_bias_ptr + j)
    for i in gl.static_range(fixed(S.images)):
        v = bias
        for p in gl.static_range(CREW):
            for warp in gl.static_range(4):
                v += shares.index(4 * (p * S.images + i) + warp).load(thread_layout())
        vectors.index(i).store(gl.maximum(v, 0.0))
    gl.thread_barrier()


@gluon.jit
def load_excite(excite_ptr, step, S: gl.constexpr):
    """Excite weights of 256 hidden channels, [squeeze, 256]."""
    LAYOUT: gl.constexpr = excite_layout()
    row = gl.arange(0, S.squeeze, gl.SliceLayout(1, LAYOUT))
    column = gl.arange(0, GATE_COLUMNS, gl.SliceLayout(0, LAYOUT))
    return gl.load(excite_ptr + row[:, None] * (S.gate_steps * GATE_COLUMNS) + (step * GATE_COLUMNS + column)[None, :])


@gluon.jit
def excite(m, excite_ptr, excite_bias_ptr, vectors, gates, PARTITION: gl.constexpr, S: gl.constexpr):
    """Gates of this partition's share of the hidden channels, of every other 256; `m` are weights of the first."""
    LAYOUT: gl.constexpr = excite_layout()
    column = gl.arange(0, GATE_COLUMNS, gl.SliceLayout(0, LAYOUT))
    for step in gl.static_range(PARTITION, fixed(S.gate_steps), CREW):
        b2 = gl.load(excite_bias_ptr + step * GATE_COLUMNS + column)
        if step > PARTITION:
            m = load_excite(excite_ptr, step, S)
            gl.thread_barrier()  # keeps the compiler from loading one after the other
        for i in gl.static_range(fixed(S.images)):
            v = vectors.index(i).load(gl.SliceLayout(1, LAYOUT))
            g = gl.sum(m.to(gl.float32) * v[:, None], axis=0) + b2
            g = 1.0 / (1.0 + gl.exp(-g))
            view = gates.index((i * S.gate_steps + step) * 8)._reinterpret(gates.dtype, [GATE_COLUMNS], plain_layout(1))
            view.store(g.to(gates.dtype))

"""First phase of the Hopper kernel of the MBConv block: hidden channels are expanded, convolved and summed."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fusion.triton_kernels.hopper_layouts import copy_layout, plain_layout, rows_layout, sum_layout
from fusion.triton_kernels.hopper_parts import (
    activate,
    fixed,
    join_columns,
    moved,
    slab_start,
    split_columns,
    split_units,
    taps,
    zeros,
)
from fusion.triton_kernels.mbconv_hopper_spec import (
    BLOCK,
    CHUNK,
    CREW,
    HALF,
    TAPS_ROWS,
    WARPS,
    read_fragments,
    store_fragments,
)

LOOP_BITS = gl.constexpr(24)
"""Bits of a chunk's and an image's number; those above make a zero that the compiler cannot see."""
IN_FLIGHT = 2
"""Jobs of the convolution that are under way together: their sums must fit in registers."""
SLABS_AHEAD = 2
"""Slabs of U that are loaded a chunk ahead: they must fit in registers."""


@gluon.constexpr_function
def expand_layout(pixels):
    """[chunk, pixels], sums of the expansion."""
    return gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, pixels, 16])


@gluon.constexpr_function
def left_layout(pixels):
    """[chunk, channels], left operand of the expansion."""
    return gl.DotOperandLayout(0, expand_layout(pixels), 2)


@gluon.constexpr_function
def vector_layout(count):
    """[count], up to 16 bytes a thread."""
    each = max(1, min(8, count // 128))
    return gl.BlockedLayout([each], [32], [WARPS], [0])


@gluon.jit
def activate_either(h, bias, dtype: gl.constexpr, S: gl.constexpr):
    """SiLU or ReLU of fp32 sums and a 16-bit bias, in 16 bits, two elements an instruction.

    x sigmoid(x) = x/2 tanh(x/2) + x/2; for SiLU `bias` is half of the bias.
    """
    if S.activation == "relu":
        return activate(h, bias, dtype)
    elif dtype == gl.float16:
        return gl.inline_asm_elementwise(
            "{ .reg .b32 t, u, half; mov.b32 half, 0x38003800; cvt.rn.f16x2.f32 t, $2, $1; "
            "fma.rn.f16x2 t, t, half, $3; tanh.approx.f16x2 u, t; fma.rn.f16x2 $0, t, u, t; }",
            "=r,r,r,r",
            [h, bias],
            dtype=gl.float16,
            is_pure=True,
            pack=2,
        )
    else:
        return gl.inline_asm_elementwise(
            "{ .reg .b32 t, u, half; mov.b32 half, 0x3F003F00; cvt.rn.bf16x2.f32 t, $2, $1; "
            "fma.rn.bf16x2 t, t, half, $3; tanh.approx.bf16x2 u, t; fma.rn.bf16x2 $0, t, u, t; }",
            "=r,r,r,r",
            [h, bias],
            dtype=gl.bfloat16,
            is_pure=True,
            pack=2,
        )


@gluon.jit
def load_fragments(pointer, chunk, SLAB_INDEX: gl.constexpr, S: gl.constexpr):
    """U of a chunk and a slab, [64, slab], left operand: packed as threads hold it."""
    CHANNELS: gl.constexpr = slab_start(S.in_slabs, len(S.in_slabs))
    FIRST: gl.constexpr = slab_start(S.in_slabs, SLAB_INDEX)
    u = read_fragments(pointer + (chunk * (CHANNELS // 16) + FIRST // 16) * 1024, S.in_slabs[SLAB_INDEX] // 16, 1024)
    return gl.convert_layout(u, left_layout(S.part), assert_trivial=True)


@gluon.constexpr_function
def slabs_ahead(S):
    """Slabs of U that are loaded a chunk ahead."""
    return min(SLABS_AHEAD, len(S.in_slabs))


@gluon.jit
def load_ahead(expand_ptr, chunk, S: gl.constexpr):
    """The first slabs of U of a chunk."""
    us = ()
    for s in gl.static_range(slabs_ahead(S)):
        us = us + (load_fragments(expand_ptr, chunk, s, S),)
    return us


@gluon.constexpr_function
def parts(S):
    """Times that the products of the expansion go over the pixels."""
    return S.pixels // S.part


@gluon.constexpr_function
def parts_ahead(S):
    """Parts that are under way together: their sums must fit in registers."""
    return min(parts(S), 2)


@gluon.constexpr_function
def products_after_part(S, part):
    """Products under way that were started after those of a part."""
    return len(S.in_slabs) * (min(part + parts_ahead(S), parts(S)) - part - 1)


@gluon.jit
def start_part(us, xs, zero, PART: gl.constexpr, S: gl.constexpr):
    """Start sums [64 hidden, part] of a chunk."""
    h = zeros(CHUNK, S.part, gl.float32, expand_layout(S.part))
    for s in gl.static_range(len(S.in_slabs)):
        x = xs[s].index(zero)._reinterpret(xs[s].dtype, [parts(S), S.part, S.in_slabs[s]], rows_layout(S.in_slabs[s]))
        h = warpgroup_mma(us[s], x.index(PART).permute((1, 0)), h, use_acc=s > 0, is_async=True)
    return h


@gluon.jit
def finish_part(h, bias, PART: gl.constexpr, S: gl.constexpr):
    """Activated hidden channels [64, part]."""
    LAYOUT: gl.constexpr = expand_layout(S.part)
    h = warpgroup_mma_wait(products_after_part(S, PART), deps=[h])
    h, b = gl.broadcast(h, bias)
    h = activate_either(h, b, bias.dtype, S)
    if not S.exact:
        pixel = (PART * S.part + gl.arange(0, S.part, gl.SliceLayout(0, LAYOUT))) % S.row_pixels
        valid = (pixel // S.bands < S.width) & (pixel % S.bands < S.height // S.rows)
        h = gl.where(valid[None, :], h, 0.0)
    return h


@gluon.jit
def expand(expand_ptr, us, chunk, xs, x_full, first, biases, row, zero, S: gl.constexpr):
    """Activated hidden channels of a chunk, [64, part] for each part of the pixels; `us` are its first slabs of U."""
    for s in gl.static_range(slabs_ahead(S), fixed(len(S.in_slabs))):
        us = us + (load_fragments(expand_ptr, chunk, s, S),)
    for s in gl.static_range(len(S.in_slabs)):
        mbarrier.wait(x_full.index(s), 0, pred=first)
    bias = biases.index(row)._reinterpret(biases.dtype, [64], plain_layout(1))
    bias = bias.load(gl.SliceLayout(1, expand_layout(S.part)))[:, None]
    hs = ()
    for part in gl.static_range(parts_ahead(S)):
        hs = hs + (start_part(us, xs, zero, part, S),)
    activated = ()
    for part in gl.static_range(parts(S)):
        activated = activated + (finish_part(hs[part], bias, part, S),)
        if part + parts_ahead(S) < parts(S):
            hs = hs + (start_part(us, xs, zero, part + parts_ahead(S), S),)
    return activated


@gluon.jit
def halves(hs):
    """Parts [64, part] -> two tuples of parts [32, part]: rows 8 apart of every 16."""
    first = ()
    second = ()
    for part in gl.static_range(len(hs)):
        h = hs[part]
        a, b = gl.split(h.reshape((4, 2, 8, h.shape[1])).permute((0, 2, 3, 1)))
        first = first + (a.reshape((32, h.shape[1])),)
        second = second + (b.reshape((32, h.shape[1])),)
    return first, second


@gluon.constexpr_function
def buffer_row(S, image, row):
    """First pixel of a row buffer; row -1 and `rows` are copies."""
    return S.pad + (image * (S.rows + 2) + row + 1) * (S.row_pixels + S.pad)


@gluon.jit
def store_row(buffer, h, START: gl.constexpr, S: gl.constexpr):
    """[32, row_pixels] to a row buffer."""
    view = buffer.index(START // 8)._reinterpret(buffer.dtype, [S.row_pixels, HALF], rows_layout(32))
    view.permute((1, 0)).store(h)


@gluon.jit
def without_band(h, BAND: gl.constexpr, S: gl.constexpr):
    """A row [32, row_pixels] with zeros in a band, which in the next column is no neighbour of the image."""
    pixel = gl.arange(0, S.row_pixels, gl.SliceLayout(0, h.type.layout))
    return gl.where((pixel % S.bands != BAND)[None, :], h, 0.0)


@gluon.jit
def store_half(buffer, h, S: gl.constexpr):
    """[32, pixels] of activated hidden channels to all row buffers."""
    rows = ()
    for part in gl.static_range(len(h)):
        rows = rows + split_units(h[part], fixed(S.row_pixels))
    for i in gl.static_range(fixed(S.images)):
        for j in gl.static_range(fixed(S.rows)):
            store_row(buffer, rows[i * S.rows + j], buffer_row(S, i, j), S)
        store_row(buffer, without_band(rows[i * S.rows + S.rows - 1], S.bands - 1, S), buffer_row(S, i, -1), S)
        store_row(buffer, without_band(rows[i * S.rows], 0, S), buffer_row(S, i, fixed(S.rows)), S)


@gluon.constexpr_function
def view_start(S, image, row, block, column):
    """Pixel of the row buffers where a shifted view of a block starts."""
    shift = -1 if row < 0 else 1 if row == S.rows else 0
    return buffer_row(S, image, row) + 64 * block + column * S.bands + shift


@gluon.jit
def shifted(buffer, zero, START: gl.constexpr, PIECE: gl.constexpr):
    """[64 pixels, 16 channels] from a pixel on, which need not be aligned to the swizzle's pattern."""
    pieces = buffer.index(zero)._reinterpret(buffer.dtype, [buffer.shape[0] * 8 * 2, 1, 16], plain_layout(2))
    view = pieces.index(START * 2 + PIECE)
    return view._reinterpret(buffer.dtype, [BLOCK, HALF], rows_layout(32)).slice(0, 16, dim=1)


@gluon.jit
def start_pair(
    buffer, zero, w, IMAGE: gl.constexpr, ROW: gl.constexpr, B: gl.constexpr, PIECE: gl.constexpr, S: gl.constexpr
):
    """Start rows ROW and ROW + 1 of a block and piece."""
    y = zeros(BLOCK, 32, gl.float32, sum_layout(32))
    y0 = zeros(BLOCK, 16, gl.float32, sum_layout(16))
    y1 = zeros(BLOCK, 16, gl.float32, sum_layout(16))
    for column in gl.static_range(-1, 2):
        x = shifted(buffer, zero, view_start(S, IMAGE, ROW, B, column), PIECE)
        y = warpgroup_mma(x, taps(w, PIECE, column, 1, 2), y, use_acc=column > -1, is_async=True)
        x = shifted(buffer, zero, view_start(S, IMAGE, ROW + 1, B, column), PIECE)
        y = warpgroup_mma(x, taps(w, PIECE, column, 0, 2), y, is_async=True)
        x = shifted(buffer, zero, view_start(S, IMAGE, ROW - 1, B, column), PIECE)
        y0 = warpgroup_mma(x, taps(w, PIECE, column, 2, 1), y0, use_acc=column > -1, is_async=True)
        x = shifted(buffer, zero, view_start(S, IMAGE, ROW + 2, B, column), PIECE)
        y1 = warpgroup_mma(x, taps(w, PIECE, column, 0, 1), y1, use_acc=column > -1, is_async=True)
    return y, y0, y1


@gluon.jit
def start_single(buffer, zero, w, IMAGE: gl.constexpr, B: gl.constexpr, PIECE: gl.constexpr, S: gl.constexpr):
    """Start the only row of a band."""
    y = zeros(BLOCK, 16, gl.float32, sum_layout(16))
    for column in gl.static_range(-1, 2):
        for row in gl.static_range(-1, 2):
            x = shifted(buffer, zero, view_start(S, IMAGE, row, B, column), PIECE)
            y = warpgroup_mma(
                x, taps(w, PIECE, column, 1 - row, 1), y, use_acc=(column > -1) | (row > -1), is_async=True
            )
    return y


@gluon.constexpr_function
def jobs(S):
    """What is convolved at a time: 16 channels of two row buffers' blocks, or of one's where a band is a single row."""
    return 2 * S.images * S.row_blocks * max(1, S.rows // 2)


@gluon.constexpr_function
def first_jobs(S):
    """Jobs that are started before one is finished."""
    return min(IN_FLIGHT, jobs(S))


@gluon.constexpr_function
def job_products(S):
    return 9 if S.rows == 1 else 12


@gluon.constexpr_function
def job_piece(index):
    return index % 2


@gluon.constexpr_function
def job_image(S, index):
    return index // (jobs(S) // S.images)


@gluon.constexpr_function
def job_row(S, index):
    return index // 2 // S.row_blocks * 2 % S.rows if S.rows > 1 else 0


@gluon.constexpr_function
def job_row_block(S, index):
    return index // 2 % S.row_blocks


@gluon.constexpr_function
def job_block(S, index):
    """Block of the tile, whose order is that of row buffers, that a job computes first."""
    return (job_image(S, index) * S.rows + job_row(S, index)) * S.row_blocks + job_row_block(S, index)


@gluon.constexpr_function
def later_products(S, index):
    """Products under way that were started after those of a job."""
    return job_products(S) * (min(index + IN_FLIGHT, jobs(S)) - index - 1)


@gluon.jit
def start_job(buffer, zero, w, INDEX: gl.constexpr, S: gl.constexpr):
    if S.rows == 1:
        y = start_single(buffer, zero, w, job_image(S, INDEX), job_row_block(S, INDEX), job_piece(INDEX), S)
        return (y,)
    else:
        return start_pair(
            buffer, zero, w, job_image(S, INDEX), job_row(S, INDEX), job_row_block(S, INDEX), job_piece(INDEX), S
        )


@gluon.jit
def finish_pair(sums, PENDING: gl.constexpr):
    y, y0, y1 = warpgroup_mma_wait(PENDING, deps=sums)
    common0, common1 = split_columns(y)
    y0 += gl.convert_layout(common0, sum_layout(16), assert_trivial=True)
    y1 += gl.convert_layout(common1, sum_layout(16), assert_trivial=True)
    return y0, y1


@gluon.jit
def finish_job(sums, bias, ws, total, INDEX: gl.constexpr, S: gl.constexpr):
    """Activate and write the blocks of a job, and add them to `total`."""
    if S.rows == 1:
        y = warpgroup_mma_wait(later_products(S, INDEX), deps=sums)
        total += finish_block(y, bias, ws, job_block(S, INDEX), S)
    else:
        y0, y1 = finish_pair(sums, later_products(S, INDEX))
        total += finish_block(y0, bias, ws, job_block(S, INDEX), S)
        total += finish_block(y1, bias, ws, job_block(S, INDEX) + S.row_blocks, S)
    return total


@gluon.jit
def inside(block, S: gl.constexpr):
    """Which pixels of a block are of the image, [64, 1]."""
    pixel = block % S.row_blocks * BLOCK + gl.arange(0, BLOCK, gl.SliceLayout(1, sum_layout(16)))
    return ((pixel // S.bands < S.width) & (pixel % S.bands < S.height // S.rows))[:, None]


@gluon.jit
def finish_block(y, bias, ws, block, S: gl.constexpr):
    """Activate sums [64, 16] and write them to the workspace; returns them for the pool in fp32."""
    y, b = gl.broadcast(y, bias)
    y = activate_either(y, b, bias.dtype, S)
    store_fragments(ws + block * (BLOCK * 16), y)
    pooled = y.to(gl.float32)
    if not S.exact:
        pooled = gl.where(inside(block, S), pooled, 0.0)
    return pooled


@gluon.jit
def replaced(values, value, INDEX: gl.constexpr):
    """A tuple with another element."""
    return values[:INDEX] + (value,) + values[INDEX + 1 :]


@gluon.jit
def convolve(buffer, zero, w, biases, bias_row, ws, pool, half, S: gl.constexpr):
    """Convolve, activate, write to the workspace and pool a half."""
    bs = (
        biases.index(bias_row).load(gl.SliceLayout(0, sum_layout(16)))[None, :],
        biases.index(bias_row + 1).load(gl.SliceLayout(0, sum_layout(16)))[None, :],
    )
    pieces = ws + half * (S.pixels * HALF)
    under_way = ()
    for index in gl.static_range(first_jobs(S)):
        under_way = under_way + (start_job(buffer, zero, w, index, S),)
    totals = ()
    for _ in gl.static_range(fixed(2 * S.images)):
        totals = totals + (zeros(BLOCK, 16, gl.float32, sum_layout(16)),)
    for index in gl.static_range(jobs(S)):
        total = finish_job(
            under_way[0],
            bs[job_piece(index)],
            pieces + job_piece(index) * (S.pixels * 16),
            totals[2 * job_image(S, index) + job_piece(index)],
            index,
            S,
        )
        totals = replaced(totals, total, 2 * job_image(S, index) + job_piece(index))
        under_way = under_way[1:]
        if index + first_jobs(S) < jobs(S):
            under_way = under_way + (start_job(buffer, zero, w, index + first_jobs(S), S),)
    for i in gl.static_range(fixed(S.images)):
        store_pool(pool + (half * S.images + i) * 128, join_columns(totals[2 * i], totals[2 * i + 1]))


@gluon.jit
def store_pool(pointer, total):
    """Sums over the pixels of each warp, [4 warps, 32]."""
    total = gl.sum(total.reshape((4, 16, HALF)), axis=1)
    LAYOUT: gl.constexpr = total.type.layout
    warp = gl.arange(0, 4, gl.SliceLayout(1, LAYOUT))
    channel = gl.arange(0, HALF, gl.SliceLayout(0, LAYOUT))
    gl.store(pointer + warp[:, None] * HALF + channel[None, :], total)


@gluon.jit
def load_biases(biases, pointer, S: gl.constexpr):
    """Of the expansion and the convolution, those of a partition's chunks."""
    values = gl.load(pointer + gl.arange(0, S.bias_elements, vector_layout(S.bias_elements)))
    if S.activation == "silu":
        values = (values * 0.5).to(biases.dtype)
    biases.index(0)._reinterpret(biases.dtype, [S.bias_elements], plain_layout(1)).store(values)
    gl.thread_barrier()


@gluon.jit
def clear_pads(buffer, S: gl.constexpr):
    """Zeros around row buffers."""
    nothing = zeros(8, HALF, buffer.dtype, copy_layout(32))
    for r in gl.static_range(fixed(S.images * (S.rows + 2) + 1)):
        for a in gl.static_range(fixed(S.pad // 8)):
            buffer.index((r * (S.row_pixels + S.pad)) // 8 + a).store(nothing)


@gluon.jit
def load_taps(descs, w, full, slot, half, used):
    """Start to load the taps of a half of the hidden channels to slot 0 or 1, if there is such a half."""
    weights64_desc, weights8_desc, _ = descs
    barrier = full.index(slot)
    mbarrier.expect(barrier, 2 * TAPS_ROWS * 64, pred=used)
    row = half * TAPS_ROWS
    target = w.index(18 * slot)._reinterpret(w.dtype, weights64_desc.block_shape, weights64_desc.layout)
    tma.async_copy_global_to_shared(weights64_desc, [row, 0], barrier, target, pred=used)
    target = w.index(18 * slot + 16)._reinterpret(w.dtype, weights8_desc.block_shape, weights8_desc.layout)
    tma.async_copy_global_to_shared(weights8_desc, [row + 64, 0], barrier, target, pred=used)


@gluon.jit
def produce(
    image,
    xs,
    x_full,
    buffer,
    w,
    taps_full,
    descs,
    expand_ptr,
    biases,
    ws,
    pool,
    PARTITION: gl.constexpr,
    S: gl.constexpr,
):
    """A partition's chunks."""
    us = load_ahead(expand_ptr, gl.minimum(PARTITION, S.chunks - 1), S)
    for chunk in range(PARTITION, S.chunks, CREW):
        turn = chunk // CREW
        zero = (chunk + image) >> LOOP_BITS
        hs = expand(expand_ptr, us, chunk, xs, x_full, chunk == PARTITION, biases, 8 * turn, zero, S)
        us = load_ahead(expand_ptr, gl.minimum(chunk + CREW, S.chunks - 1), S)
        now, rest = halves(hs)
        # As a loop, so that the compiler activates both halves before it convolves the first.
        for half in range(0, 2):
            gl.thread_barrier()  # the convolution of the half before has read buffer and taps
            if (half > 0) | (turn > 0):
                following = chunk * 2 + gl.where(half > 0, 2 * CREW, 1)
                load_taps(descs, w, taps_full, 1 - half, following, following < 2 * S.chunks)
            store_half(buffer, now, S)
            fence_async_shared()
            gl.thread_barrier()
            now = rest
            mbarrier.wait(taps_full.index(half), turn & 1)
            convolve(
                buffer, zero, moved(w, 18 * half + zero), biases, 8 * turn + 4 + 2 * half, ws, pool, chunk * 2 + half, S
            )

"""Second phase of the Hopper kernel of the MBConv block: hidden channels times their gates, projected.

Hidden channels are the left operand of the products, in registers. They come from shared memory, where they have been
all along or where TMA brings them back from the workspace. Weights come by TMA, a step at a time, in a ring of stages
that goes on from block to block. Some steps follow each other without a wait for their products.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from fusion.triton_kernels.hopper_layouts import plain_layout, powers, rows_layout
from fusion.triton_kernels.hopper_parts import fixed, slab_start, split_columns, zeros
from fusion.triton_kernels.mbconv_hopper_registers import type_name
from fusion.triton_kernels.mbconv_hopper_spec import HIDDEN, TILE, UNIT, WARPS


@gluon.constexpr_function
def project_layout(S, columns):
    """[rows, columns], sums of the projection."""
    across = WARPS.value // S.warps_of_rows
    return gl.NVMMADistributedLayout([3, 0], [S.warps_of_rows, across], [16, columns // across, 16])


@gluon.constexpr_function
def hidden_operand(S, columns):
    """[rows, step], left operand of a product with so many columns."""
    return gl.DotOperandLayout(0, project_layout(S, columns), 2)


@gluon.constexpr_function
def hidden_layout(S, shape, tile_dim):
    """[tiles of a pass and units, in either order, 256]: 16 bytes a thread of each tile of its warp."""

    def steps(dim, start, stop):
        return [[step if i == dim else 0 for i in range(3)] for step in powers(start, stop)]

    rows = {tile_dim: steps(tile_dim, S.warps_of_rows, shape[tile_dim]), 1 - tile_dim: steps(1 - tile_dim, 1, S.units)}
    # Warps that divide the output channels hold the same.
    same = [[0, 0, 0] for _ in powers(S.warps_of_rows, WARPS.value)]
    warps = steps(tile_dim, 1, S.warps_of_rows) + same
    return gl.DistributedLinearLayout(steps(2, 1, 8) + rows[1] + rows[0], steps(2, 8, UNIT.value), warps, [], shape)


@gluon.constexpr_function
def product_index(width):
    """Index of the descriptor for products of this width, the widest first."""
    return (256 // width).bit_length() - 1


@gluon.jit
def expect_weights(ring, turn, blocks, S: gl.constexpr):
    """Say that the projection's weights of a turn of all blocks will come, if there is one."""
    _, full, _ = ring
    mbarrier.expect(full.index(turn % S.stages), S.weight_rows * 128, pred=turn < blocks * S.turns)


@gluon.jit
def load_weights(ring, turn, blocks, S: gl.constexpr):
    """Start to load the weights of a turn."""
    vs, full, descs = ring
    row = turn * S.weight_rows
    if not S.weights_in_order:
        row = (turn // S.turns * S.packed_steps + turn % S.turns % S.steps) * S.weight_rows
    for s in gl.static_range(len(S.products)):
        desc = descs[product_index(S.products[s])]
        first = row + S.step * slab_start(S.products, s) // 64
        barrier, target = full.index(turn % S.stages), vs[s].index(turn % S.stages)
        target = target._reinterpret(target.dtype, desc.block_shape, desc.layout)
        tma.async_copy_global_to_shared(desc, [first, 0], barrier, target, pred=turn < blocks * S.turns)


@gluon.jit
def expect_hidden(ring, turn, index, turns, S: gl.constexpr):
    """Say that the hidden channels of turn `index` of `turns` will come, if there is one: `turn` of all blocks."""
    _, full, _ = ring
    mbarrier.expect(full.index(turn % S.hidden_stages), S.hidden_rows * 128, pred=index < turns)


@gluon.jit
def load_hidden(ring, first_row, turn, index, turns, S: gl.constexpr):
    """Start to load the hidden channels of a turn."""
    hidden, full, desc = ring
    row = first_row + index * S.hidden_rows
    barrier, target = full.index(turn % S.hidden_stages), hidden[0].index(turn % S.hidden_stages)
    tma.async_copy_global_to_shared(desc, [row, 0], barrier, target, pred=index < turns)


@gluon.jit
def read_streamed(hidden, stage, S: gl.constexpr):
    """[rows, step], left operand."""
    TILES: gl.constexpr = S.rows // TILE
    y = hidden.index(stage)._reinterpret(hidden.dtype, [S.units, TILES, UNIT], plain_layout(3))
    y = y.load(hidden_layout(S, [S.units, TILES, UNIT], 1)).reshape((S.units, TILES, 8, 4, 2, 2, 2))
    # Units, tiles, lanes' pixels, lanes' channels, channels + 8, second row of pixels, channel of a pair.
    y = y.permute((1, 5, 2, 0, 4, 3, 6)).reshape((S.rows, S.step))
    return gl.convert_layout(y, hidden_operand(S, 64), assert_trivial=True)


@gluon.jit
def read_resident(hidden, sweep, STEP: gl.constexpr, PASS: gl.constexpr, S: gl.constexpr):
    """[rows, step], left operand, of step `STEP` of a sweep."""
    TILES: gl.constexpr = S.rows // TILE
    y = hidden.index(sweep * S.tiles)._reinterpret(hidden.dtype, [S.tiles, WARPS, UNIT], plain_layout(3))
    y = y.slice(PASS * TILES, TILES, dim=0).slice(STEP * S.units, S.units, dim=1)
    y = y.load(hidden_layout(S, [TILES, S.units, UNIT], 0)).reshape((TILES, S.units, 8, 4, 2, 2, 2))
    y = y.permute((0, 5, 2, 1, 4, 3, 6)).reshape((S.rows, S.step))
    return gl.convert_layout(y, hidden_operand(S, 64), assert_trivial=True)


@gluon.constexpr_function
def multiply_text(dtype):
    return f"mul.rn.{type_name(dtype)}x2 $0, $1, $2;"


@gluon.jit
def multiply(y, gate):
    """y gate in 16 bits, two elements an instruction."""
    return gl.inline_asm_elementwise(multiply_text(y.dtype), "=r,r,r", [y, gate], dtype=y.dtype, is_pure=True, pack=2)


@gluon.jit
def gated(y, gates, step, S: gl.constexpr):
    """[rows, step], multiplied by the gates."""
    g = gates.index(step)._reinterpret(gates.dtype, [S.step], plain_layout(1))
    g = g.load(gl.SliceLayout(0, hidden_operand(S, 64)))[None, :]
    y, g = gl.broadcast(y, g)
    return multiply(y, g)


@gluon.jit
def read_gated(ring, gates, first, turn, STEP: gl.constexpr, PASS: gl.constexpr, S: gl.constexpr):
    """[rows, step], left operand, of step `STEP` of a chunk."""
    hidden, full, _ = ring
    step = turn * S.chunk + STEP
    if S.resident:
        PER_SWEEP: gl.constexpr = HIDDEN // S.step
        y = read_resident(hidden[STEP // PER_SWEEP], turn, STEP % PER_SWEEP, PASS, S)
    else:
        of_all = first + PASS * S.steps + step
        mbarrier.wait(full.index(of_all % S.hidden_stages), of_all // S.hidden_stages & 1)
        y = read_streamed(hidden[0], of_all % S.hidden_stages, S)
    return gated(y, gates, step, S)


@gluon.jit
def start_products(y, sums, weight_ring, turn, S: gl.constexpr):
    vs, full, _ = weight_ring
    mbarrier.wait(full.index(turn % S.stages), turn // S.stages & 1)
    next_sums = ()
    for s in gl.static_range(len(S.products)):
        v = vs[s].index(turn % S.stages)
        v = v._reinterpret(v.dtype, [S.step, S.products[s]], rows_layout(min(S.products[s], 64)))
        left = gl.convert_layout(y, hidden_operand(S, S.products[s]), assert_trivial=True)
        next_sums = next_sums + (warpgroup_mma(left, v, sums[s], is_async=True),)
    return next_sums


@gluon.jit
def wait_products(sums, COUNT: gl.constexpr):
    """Until `COUNT` products are left."""
    done = warpgroup_mma_wait(COUNT, deps=sums)
    return done if isinstance(done, gl.tuple) else (done,)


@gluon.jit
def later_turn(first, later, blocks, S: gl.constexpr):
    """Of turn `later` of a block, whose first one is `first` of all: its number, and which it is of how many whose
    hidden channels are there, the turns of this block or of all."""
    if S.all_hidden:
        return first + later, first + later, blocks * S.turns
    else:
        return first + later, later, fixed(S.turns)


@gluon.jit
def refill(index, first, blocks, first_row, hidden_ring, weight_ring, S: gl.constexpr):
    """The stages of turn `index` of a block, whose products are done, take later turns; `first` is the block's."""
    turn, later = first + index + S.stages, index + S.hidden_stages
    expect_weights(weight_ring, turn, blocks, S)
    if not S.resident:
        of_all, there, turns = later_turn(first, later, blocks, S)
        expect_hidden(hidden_ring, of_all, there, turns, S)
    gl.thread_barrier()
    load_weights(weight_ring, turn, blocks, S)
    if not S.resident:
        of_all, there, turns = later_turn(first, later, blocks, S)
        load_hidden(hidden_ring, first_row, of_all, there, turns, S)


@gluon.jit
def first_sums(biases, FIRST: gl.constexpr, COLUMNS: gl.constexpr, S: gl.constexpr):
    """[rows, product] of biases."""
    LAYOUT: gl.constexpr = project_layout(S, COLUMNS)
    bias = biases.slice(FIRST, COLUMNS).load(gl.SliceLayout(0, LAYOUT))
    return zeros(S.rows, COLUMNS, gl.float32, LAYOUT) + bias[None, :]


@gluon.jit
def project_pass(
    block, blocks, first_row, gates, biases, hidden_ring, weight_ring, PASS: gl.constexpr, S: gl.constexpr
):
    """Sums of the pixels of a pass, [rows, product] for each product."""
    PRODUCTS: gl.constexpr = len(S.products)
    sums = ()
    for s in gl.static_range(PRODUCTS):
        sums = sums + (first_sums(biases, slab_start(S.products, s), S.products[s], S),)
    first = block * S.turns
    for turn in range(0, S.steps // S.chunk):
        for i in gl.static_range(fixed(S.chunk)):
            index = PASS * S.steps + turn * S.chunk + i
            if i == 0 or not S.reads_ahead:
                y = read_gated(hidden_ring, gates, first, turn, i, PASS, S)
            sums = start_products(y, sums, weight_ring, first + index, S)
            if i + 1 < S.chunk and S.reads_ahead:
                y = read_gated(hidden_ring, gates, first, turn, i + 1, PASS, S)
            if i % S.group > 0:
                sums = wait_products(sums, PRODUCTS)
                refill(index - 1, first, blocks, first_row, hidden_ring, weight_ring, S)
            if i % S.group == S.group - 1 or i + 1 == S.chunk:
                sums = wait_products(sums, 0)
                refill(index, first, blocks, first_row, hidden_ring, weight_ring, S)
    return sums


@gluon.constexpr_function
def slab_index(first):
    """Of the slab that starts at a channel: all but the last ones have 64."""
    return -(-first // 64)


@gluon.jit
def finish_slab(z, outs, FIRST: gl.constexpr, COLUMNS: gl.constexpr, PASS: gl.constexpr, S: gl.constexpr):
    """Add the input to a pass's sums of output channels, round and write to shared memory.

    Where warps divide the channels, all slabs of a product at once.
    """
    if COLUMNS > 64 and S.warps_of_rows == WARPS:
        a, b = split_columns(z)
        finish_slab(a, outs, FIRST, COLUMNS // 2, PASS, S)
        finish_slab(b, outs, FIRST + COLUMNS // 2, COLUMNS // 2, PASS, S)
    else:
        LAYOUT: gl.constexpr = project_layout(S, COLUMNS)
        z = gl.convert_layout(z, LAYOUT, assert_trivial=True)
        out = outs[slab_index(FIRST)]
        out = out._reinterpret(out.dtype, [S.passes, S.rows, COLUMNS], rows_layout(min(COLUMNS, 64))).index(PASS)
        if S.residual:
            z += out.load(LAYOUT).to(gl.float32)
        out.store(z.to(out.dtype))


@gluon.jit
def project(block, blocks, first_row, gates, biases, hidden_ring, weight_ring, outs, S: gl.constexpr):
    """The block's output into `outs`, which hold the input of a residual block.

    A ring is stages in shared memory, a barrier for each, and what brings their data.
    """
    for turn in gl.static_range(fixed(S.passes)):
        sums = project_pass(block, blocks, first_row, gates, biases, hidden_ring, weight_ring, turn, S)
        for s in gl.static_range(len(S.products)):
            finish_slab(sums[s], outs, slab_start(S.products, s), S.products[s], turn, S)

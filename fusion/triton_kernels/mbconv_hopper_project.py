"""Second phase of the Hopper kernel of the MBConv block: hidden channels, gated and projected."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fusion.triton_kernels.hopper_layouts import operand_layout, plain_layout, rows_layout, sum_layout
from fusion.triton_kernels.hopper_parts import fixed, split_units, zeros
from fusion.triton_kernels.mbconv_hopper_spec import BLOCK, CREW, TAPS_ROWS, read_fragments


@gluon.constexpr_function
def own_blocks(S):
    """Blocks that a partition projects together."""
    return 1 if S.splits_columns else S.blocks // CREW // S.passes


@gluon.constexpr_function
def first_own_block(S, turn, partition):
    """The first block that a partition projects in a pass."""
    return 0 if S.splits_columns else (CREW * turn + partition) * own_blocks(S)


@gluon.constexpr_function
def image_of_block(S, block):
    return block // (S.blocks // S.images)


@gluon.constexpr_function
def own_slabs(S, partition):
    """Slabs of output channels that a partition projects: (first channel, width) each."""
    slabs = S.store_slabs if S.splits_columns else S.out_slabs
    slabs = tuple((sum(slabs[:i]), slab) for i, slab in enumerate(slabs))
    return slabs[partition::CREW] if S.splits_columns else slabs


@gluon.constexpr_function
def own_slab_start(S, partition, index):
    return own_slabs(S, partition)[index][0]


@gluon.constexpr_function
def own_slab_width(S, partition, index):
    return own_slabs(S, partition)[index][1]


@gluon.constexpr_function
def own_slab_count(S, partition):
    return len(own_slabs(S, partition))


@gluon.jit
def load_project(weights_desc, vs, full, q, S: gl.constexpr):
    """Start to load the projection's weights for turn `q`, if there is one, those of a step."""
    SLABS: gl.constexpr = S.out_tiles
    used = q < S.turns
    stage = q % S.stages
    barrier = full.index(stage)
    mbarrier.expect(barrier, SLABS * S.step * 64 * 2, pred=used)
    for s in gl.static_range(SLABS):
        step = q % (S.turns // S.passes)
        row = TAPS_ROWS * 2 * S.chunks + (step * SLABS + s) * S.step
        target = vs.index((stage * SLABS + s) * (S.step // 8))
        target = target._reinterpret(vs.dtype, weights_desc.block_shape, weights_desc.layout)
        tma.async_copy_global_to_shared(weights_desc, [row, 0], barrier, target, pred=used)


@gluon.constexpr_function
def tile_index(S, first):
    """Of the slab that starts at a channel."""
    return sum(sum(S.store_slabs[:i]) < first for i in range(len(S.store_slabs)))


@gluon.jit
def matrix_of(vs, stage, FIRST: gl.constexpr, SLAB: gl.constexpr, S: gl.constexpr):
    """[step hidden, slab] of the projection's weights."""
    view = vs.index((stage * S.out_tiles + tile_index(S, FIRST)) * (S.step // 8))
    if SLAB >= 64:
        return view._reinterpret(vs.dtype, [S.step, SLAB], rows_layout(64))
    else:
        return view._reinterpret(vs.dtype, [S.step, 64], rows_layout(64)).slice(0, SLAB, dim=1)


@gluon.jit
def own_matrix(vs, stage, PARTITION: gl.constexpr, INDEX: gl.constexpr, S: gl.constexpr):
    """The matrix of own slab `INDEX`."""
    return matrix_of(vs, stage, own_slab_start(S, PARTITION, INDEX), own_slab_width(S, PARTITION, INDEX), S)


@gluon.jit
def read_step(ws, step, FIRST: gl.constexpr, S: gl.constexpr):
    """Hidden channels of a step, for each own block [64, step]."""
    ys = ()
    for b in gl.static_range(own_blocks(S)):
        pointer = ws + step * (S.pixels * S.step) + (FIRST + b) * (BLOCK * 16)
        y = read_fragments(pointer, S.step // 16, fixed(S.pixels * 16))
        ys = ys + (gl.convert_layout(y, operand_layout(S.step), assert_trivial=True),)
    return ys


@gluon.jit
def multiply(y, gate, dtype: gl.constexpr):
    """y gate in 16 bits, two elements an instruction."""
    if dtype == gl.float16:
        return gl.inline_asm_elementwise(
            "mul.rn.f16x2 $0, $1, $2;", "=r,r,r", [y, gate], dtype=gl.float16, is_pure=True, pack=2
        )
    else:
        return gl.inline_asm_elementwise(
            "mul.rn.bf16x2 $0, $1, $2;", "=r,r,r", [y, gate], dtype=gl.bfloat16, is_pure=True, pack=2
        )


@gluon.jit
def gated(y, gates, step, IMAGE: gl.constexpr, S: gl.constexpr):
    """[64, step] of an image, multiplied by its gates."""
    g = gates.index(IMAGE * S.gate_steps * 8 + step * (S.step // 32))._reinterpret(
        gates.dtype, [S.step], plain_layout(1)
    )
    g = g.load(gl.SliceLayout(0, operand_layout(S.step)))[None, :]
    y, g = gl.broadcast(y, g)
    return multiply(y, g, y.dtype)


@gluon.jit
def new_sums(WIDTH: gl.constexpr):
    return zeros(BLOCK, WIDTH, gl.float32, sum_layout(WIDTH))


@gluon.jit
def project_pass(
    ws, gates, vs, v_full, v_free, weights_desc, TURN: gl.constexpr, PARTITION: gl.constexpr, S: gl.constexpr
):
    """Sums of the own blocks of a pass: for each block slabs [64, slab]."""
    OWN: gl.constexpr = own_blocks(S)
    SLABS: gl.constexpr = own_slab_count(S, PARTITION)
    FIRST: gl.constexpr = first_own_block(S, TURN, PARTITION)
    zs = ()
    for _ in gl.static_range(OWN):
        for s in gl.static_range(SLABS):
            zs = zs + (new_sums(own_slab_width(S, PARTITION, s)),)
    STEPS: gl.constexpr = S.turns // S.passes
    ys = read_step(ws, 0, FIRST, S)
    for step in range(0, STEPS):
        turn = TURN * STEPS + step
        operands = ()
        for b in gl.static_range(OWN):
            operands = operands + (gated(ys[b], gates, step, image_of_block(S, FIRST + b), S),)
        ys = read_step(ws, gl.minimum(step + 1, STEPS - 1), FIRST, S)
        mbarrier.wait(v_full.index(turn % S.stages), (turn // S.stages) & 1)
        if SLABS > 0:
            next_zs = ()
            for b in gl.static_range(OWN):
                for s in gl.static_range(SLABS):
                    v = own_matrix(vs, turn % S.stages, PARTITION, s, S)
                    next_zs = next_zs + (warpgroup_mma(operands[b], v, zs[b * SLABS + s], is_async=True),)
            done = warpgroup_mma_wait(0, deps=next_zs)
            zs = done if isinstance(done, gl.tuple) else (done,)
        gl.thread_barrier()
        if PARTITION > 0:
            mbarrier.arrive(v_free.index(turn % S.stages))
        else:
            mbarrier.wait(v_free.index(turn % S.stages), (turn // S.stages) & 1)
            load_project(weights_desc, vs, v_full, turn + S.stages, S)
    return zs


@gluon.jit
def finish_unit(z, out, out_bias, BLOCK_INDEX: gl.constexpr, FIRST: gl.constexpr, WIDTH: gl.constexpr, S: gl.constexpr):
    """Up to 64 channels of a block."""
    LAYOUT: gl.constexpr = sum_layout(WIDTH)
    z = gl.convert_layout(z, LAYOUT, assert_trivial=True)
    z += gl.load(out_bias + FIRST + gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT)))[None, :]
    tile = out._reinterpret(out.dtype, [S.blocks, BLOCK, WIDTH], rows_layout(WIDTH)).index(BLOCK_INDEX)
    if S.residual:
        z += tile.load(LAYOUT).to(gl.float32)
    tile.store(z.to(out.dtype))


@gluon.jit
def finish_slab(z, outs, out_bias, BLOCK_INDEX: gl.constexpr, FIRST: gl.constexpr, SLAB: gl.constexpr, S: gl.constexpr):
    """Add bias and input, round and write to shared memory."""
    units = split_units(z, min(SLAB, 64))
    for u in gl.static_range(len(units)):
        finish_unit(units[u], outs[tile_index(S, FIRST) + u], out_bias, BLOCK_INDEX, FIRST + u * 64, min(SLAB, 64), S)


@gluon.jit
def project(ws, gates, vs, v_full, v_free, weights_desc, outs, out_bias, PARTITION: gl.constexpr, S: gl.constexpr):
    """A partition's pixels, or output channels, into `outs`, which hold the input of a residual block."""
    SLABS: gl.constexpr = own_slab_count(S, PARTITION)
    for turn in gl.static_range(fixed(S.passes)):
        zs = project_pass(ws, gates, vs, v_full, v_free, weights_desc, turn, PARTITION, S)
        for b in gl.static_range(own_blocks(S)):
            for s in gl.static_range(SLABS):
                finish_slab(
                    zs[b * SLABS + s],
                    outs,
                    out_bias,
                    first_own_block(S, turn, PARTITION) + b,
                    own_slab_start(S, PARTITION, s),
                    own_slab_width(S, PARTITION, s),
                    S,
                )
    fence_async_shared()

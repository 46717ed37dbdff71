"""ConvFirst on Hopper (sm_90) as a persistent kernel in Gluon: the block of `convfirst.py` with ReLU and groups of 8.

The weights of the whole block stay in shared memory, and a program stays on its processor. The images of a batch are
one tall image of *virtual rows* (`fusion.planner.hopper_tile`). Each partition of a program, four warps, walks down
runs of them, its *streams*, two rows at a time: a *job*. For a job it needs four input rows, which lie in pairs in a
*ring* in shared memory, with zeros for what is outside of the images. A pair comes by TMA while earlier jobs run, or
through registers while the job before it runs.

The ring consists of *slots*, each the 8 channels that a group has of one pixel, 16 bytes. A pair of rows is, for each
slab of channels, `[2 rows, streams, groups, pixels]` of them. So a shift by a column is a shift by a slot, and the
convolution of a group is a product `[block, 96] x [96, 16]`: two pairs of rows, three columns, two rows, 8 channels
to two output rows of 8 channels. Its output, the hidden channels and the sums of the projection stay in registers,
where the sum of one product has the layout that the next one takes as its left operand.

Programmatic dependent launch: the kernel may start before the one ahead of it in the stream has finished, and reads
nothing but weights and biases until it has.
"""

from dataclasses import dataclass
from functools import cache

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    mma_v2,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fusion.planner.hopper_tile import BLOCK_PIXELS, MAX_JOBS, MAX_ROWS, WARPS, HopperTile
from fusion.planner.slabs import NARROWEST
from fusion.triton_kernels.convfirst_hopper_layouts import (
    along,
    copy_layout,
    descriptor_layout,
    fetch_layout,
    hidden_bias_layout,
    matrix_shared_layout,
    operand_layout,
    plain_shared_layout,
    row_layout,
    row_pair_layout,
    store_layout,
    sum_layout,
    thread_layout,
)

MAX_REGISTERS = 255
WORKER_REGISTERS = gl.constexpr(240)
"""Of each thread of the second partition; it leaves as many to the first."""
MARGIN = gl.constexpr(8)
"""Slots of a ring before its first and after its last pair: neighbours of the first and the last pixel."""
BIAS_ROW = gl.constexpr(NARROWEST)
"""Elements of the output's bias that share an index: slabs start at multiples of it."""
JOB_BITS = gl.constexpr(MAX_JOBS.bit_length() - 1)
"""Bits of a job's number; those above make a zero that the compiler cannot see."""


@dataclass(frozen=True)
class Spec:
    """Compile-time constants of the kernel: the block, and how `fusion.planner.hopper_tile.HopperTile` divides it.

    `in_slabs` and `out_slabs` are the widths of the slabs of channels, `streams` and `strips` those of a row of the
    image, `steps` the number of times that `hidden` of the hidden channels are computed.
    """

    height: int
    width: int
    in_channels: int
    out_channels: int
    residual: bool
    in_slabs: tuple[int, ...]
    out_slabs: tuple[int, ...]
    steps: int
    hidden: int
    pixels: int
    streams: int
    strips: int
    stages: int
    partitions: int
    warp_products: int
    bulk_loads: int

    @property
    def groups(self) -> int:
        """Groups of the convolution, without padding."""
        return self.in_channels // 8

    @property
    def tile_width(self) -> int:
        """Pixels of a stream."""
        return self.pixels // self.streams

    @property
    def box_groups(self) -> int:
        """Groups of one TMA copy."""
        return min(self.in_slabs) // 8

    @property
    def pair_slots(self) -> int:
        """Slots of a pair of input rows."""
        return 2 * self.pixels * sum(self.in_slabs) // 8

    @property
    def pair_bytes(self) -> int:
        return 16 * self.pair_slots

    @property
    def ring_slots(self) -> int:
        return self.stages * self.pair_slots + 2 * MARGIN.value

    @property
    def block(self) -> int:
        """Pixels that are computed at once: 64 rows make a warpgroup's product, any number products of warps."""
        return self.pixels if self.warp_products else BLOCK_PIXELS

    @property
    def hidden_bias_start(self) -> int:
        """First element of the hidden bias in the packed weights, which it ends."""
        return self.groups * 96 * 16 + self.steps * self.hidden * (sum(self.in_slabs) + sum(self.out_slabs))

    @property
    def late_weights(self) -> bool:
        """Whether the first convolution hides the wait for the FFN's weights; a second partition could not tell."""
        return not self.bulk_loads and self.partitions == 1

    @property
    def block_streams(self) -> int:
        """Streams that a block has pixels of."""
        return max(1, self.block // self.tile_width)

    @property
    def block_width(self) -> int:
        """Pixels that a block has of each of its streams."""
        return min(self.block, self.tile_width)


@gluon.constexpr_function
def fixed(value):
    """Bounds of a static loop must be constexpr, which arithmetic on attributes of `Spec` alone does not make."""
    return value


@gluon.constexpr_function
def slab_start(slabs, index):
    """First channel of slab `index`."""
    return sum(slabs[:index])


@gluon.constexpr_function
def slab_slot(S, slabs, index):
    """First slot of slab `index` in a pair of rows."""
    return 2 * S.pixels * (sum(slabs[:index]) // 8)


@gluon.constexpr_function
def block_slot(S, block, groups):
    """First slot of block `block` in a row of a slab of `groups` groups."""
    stream, pixel = divmod(block * S.block, S.tile_width)
    return stream * groups * S.tile_width + pixel


@gluon.jit
def first_row_and_column(index, jobs, S: gl.constexpr):
    """First virtual row of stream `index`, and the column of its first pixel."""
    row = index // S.strips * (2 * jobs)
    if S.strips > 1:
        column = index % S.strips * (S.tile_width - 2) - 1  # strips overlap by a column at each side
    else:
        column = 0
    return row, column


@gluon.jit
def activate(h, bias, dtype: gl.constexpr):
    """relu(h + bias) of fp32 sums and a 16-bit bias, in 16 bits, two elements an instruction."""
    if dtype == gl.float16:
        return gl.inline_asm_elementwise(
            "{ .reg .b32 t, one; mov.b32 one, 0x3C003C00; cvt.rn.f16x2.f32 t, $2, $1; "
            "fma.rn.relu.f16x2 $0, t, one, $3; }",
            "=r,r,r,r",
            [h, bias],
            dtype=gl.float16,
            is_pure=True,
            pack=2,
        )
    else:
        return gl.inline_asm_elementwise(
            "{ .reg .b32 t, one; mov.b32 one, 0x3F803F80; cvt.rn.bf16x2.f32 t, $2, $1; "
            "fma.rn.relu.bf16x2 $0, t, one, $3; }",
            "=r,r,r,r",
            [h, bias],
            dtype=gl.bfloat16,
            is_pure=True,
            pack=2,
        )


@gluon.jit
def keep(x, mask):
    """16-bit x where the bits of the mask are set, else zero, whatever x is."""
    return gl.inline_asm_elementwise("and.b32 $0, $1, $2;", "=r,r,r", [x, mask], dtype=x.dtype, is_pure=True, pack=2)


@gluon.jit
def zeros(ROWS: gl.constexpr, COLUMNS: gl.constexpr, LAYOUT: gl.constexpr):
    return gl.zeros((ROWS, COLUMNS), gl.float32, LAYOUT)


@gluon.jit
def join_columns(a, b):
    """[block, n], [block, n] -> [block, 2 n]"""
    return gl.join(a, b).permute((0, 2, 1)).reshape((a.shape[0], 2 * a.shape[1]))


@gluon.jit
def join_groups(ys):
    """A power of two of [block, 8] -> [block, channels]"""
    if len(ys) == 1:
        return ys[0]
    else:
        HALF: gl.constexpr = len(ys) // 2
        return join_columns(join_groups(ys[:HALF]), join_groups(ys[HALF:]))


@gluon.jit
def new_ring(dtype: gl.constexpr, S: gl.constexpr):
    """A partition's ring, [slots, 1, 8], and a barrier for each stage: that TMA has brought its pair of rows."""
    ring = gl.allocate_shared_memory(dtype, [S.ring_slots, 1, 8], plain_shared_layout(2))
    full = gl.allocate_shared_memory(gl.int64, [S.stages, 1], mbarrier.MBarrierLayout())
    if S.bulk_loads:
        for stage in gl.static_range(fixed(S.stages)):
            mbarrier.init(full.index(stage), count=1)
    return ring, full


@gluon.jit
def load_pair(x_desc, ring, full, pair, first, rows, column, jobs, S: gl.constexpr):
    """Start to copy virtual rows first - 1 + 2 pair and the next one, of every stream, to their stage of the ring."""
    stage = pair % S.stages
    barrier = full.index(stage)
    mbarrier.expect(barrier, S.pair_bytes)
    pair_slot = MARGIN + stage * S.pair_slots
    for stream in gl.static_range(fixed(S.streams)):
        for row in gl.static_range(2):
            v = first + stream * (2 * jobs) - 1 + 2 * pair + row
            n = v // (S.height + 1)
            y = v - n * (S.height + 1)
            # Row -1 of the tensor is out of its bounds and comes as zeros.
            source = gl.where((v >= 0) & (v < rows) & (y < S.height), n * S.height + y, -1)
            for s in gl.static_range(len(S.in_slabs)):
                slot = pair_slot + slab_slot(S, S.in_slabs, s)
                for box in gl.static_range(fixed(S.in_slabs[s] // (8 * S.box_groups))):
                    group = (row * S.streams + stream) * (S.in_slabs[s] // 8) + box * S.box_groups
                    target = ring.index(slot + group * S.tile_width)
                    tma.async_copy_global_to_shared(
                        x_desc,
                        [source, slab_start(S.in_slabs, s) // 8 + box * S.box_groups, column, 0],
                        barrier,
                        target._reinterpret(ring.dtype, x_desc.block_shape, x_desc.layout),
                    )


@gluon.jit
def wait_for_pair(full, pair, S: gl.constexpr):
    mbarrier.wait(full.index(pair % S.stages), (pair // S.stages) & 1)


@gluon.jit
def fetch_pair(x_ptr, pair, first, rows, column, jobs, S: gl.constexpr):
    """Virtual rows first - 1 + 2 pair and the next one, of every stream, in registers: slabs of 16 bits."""
    xs = ()
    for s in gl.static_range(len(S.in_slabs)):
        v = first - 1 + 2 * pair
        xs = xs + (fetch_slab(x_ptr, v, rows, column, jobs, slab_start(S.in_slabs, s), S.in_slabs[s], S),)
    return xs


@gluon.jit
def fetch_slab(x_ptr, v0, rows, column0, jobs, FIRST: gl.constexpr, SLAB: gl.constexpr, S: gl.constexpr):
    """[2 rows, streams, groups, pixels of a stream, 8]"""
    LAYOUT: gl.constexpr = fetch_layout(S.streams, SLAB // 8, S.tile_width)
    row = gl.arange(0, 2, along(LAYOUT, 0))[:, None, None, None, None]
    stream = gl.arange(0, S.streams, along(LAYOUT, 1))[None, :, None, None, None]
    c = FIRST + 8 * gl.arange(0, SLAB // 8, along(LAYOUT, 2))[None, None, :, None, None]
    column = column0 + gl.arange(0, S.tile_width, along(LAYOUT, 3))[None, None, None, :, None]
    element = gl.arange(0, 8, along(LAYOUT, 4))[None, None, None, None, :]
    v = v0 + stream * (2 * jobs) + row
    n = v // (S.height + 1)
    y = v - n * (S.height + 1)
    inside = (v >= 0) & (v < rows) & (y < S.height)
    if S.width != S.tile_width:
        inside = inside & (column >= 0) & (column < S.width)
    if S.in_channels < FIRST + SLAB:
        inside = inside & (c < S.in_channels)
    offset = (n * S.height + y).to(gl.int64) * (S.width * S.in_channels) + (column * S.in_channels + c + element)
    inside, offset = gl.broadcast(inside, offset)
    return gl.load(x_ptr + offset, mask=inside, other=0.0)


@gluon.jit
def put_pair(ring, pair, xs, S: gl.constexpr):
    """Store a fetched pair of rows in its stage of the ring."""
    for s in gl.static_range(len(S.in_slabs)):
        slot = MARGIN + pair % S.stages * S.pair_slots + slab_slot(S, S.in_slabs, s)
        put_slab(ring, slot, xs[s], S.in_slabs[s] // 8, S)


@gluon.jit
def put_slab(ring, slot, x, GROUPS: gl.constexpr, S: gl.constexpr):
    SHAPE: gl.constexpr = [2, S.streams, GROUPS, S.tile_width, 8]
    ring.index(slot)._reinterpret(ring.dtype, SHAPE, plain_shared_layout(5)).store(x)


@gluon.jit
def wait_for_previous_kernel():
    """Wait until the kernel ahead in the stream has finished, and let the one behind start."""
    thread = gl.arange(0, 32 * gl.num_warps(), thread_layout())
    gl.inline_asm_elementwise(
        "griddepcontrol.wait; griddepcontrol.launch_dependents; mov.b32 $0, $1;",
        "=r,r",
        [thread],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def edge_masks(BLOCK_INDEX: gl.constexpr, S: gl.constexpr):
    """[block, 16] of bits, none where a pixel is its stream's first, and none where it is the last."""
    LAYOUT: gl.constexpr = operand_layout(16)
    pixel = gl.arange(0, S.block, gl.SliceLayout(1, LAYOUT)) + BLOCK_INDEX * S.block
    column = pixel % S.tile_width
    zero = (gl.arange(0, 16, gl.SliceLayout(0, LAYOUT)) * 0)[None, :]
    left = (gl.where(column == 0, 0, -1)[:, None] + zero).to(gl.int16)
    right = (gl.where(column == S.tile_width - 1, 0, -1)[:, None] + zero).to(gl.int16)
    return left, right


@gluon.jit
def read_row_pair(ring, slot, GROUPS: gl.constexpr, S: gl.constexpr):
    """Pair of rows of one group at a block's pixels, [block, 2 rows x 8]; `slot` is the group's first."""
    view = ring.index(slot)._reinterpret(ring.dtype, [2, S.streams, GROUPS * S.tile_width, 8], plain_shared_layout(4))
    view = view.slice(0, S.block_streams, dim=1).slice(0, S.block_width, dim=2)
    x = view.load(row_pair_layout(S.block_streams, S.block_width)).permute((1, 2, 0, 3)).reshape((S.block, 16))
    return gl.convert_layout(x, operand_layout(16), assert_trivial=True)


@gluon.constexpr_function
def starts_streams(S, block):
    """Whether a block has the first pixel of a stream whose neighbour on the left is outside of the image."""
    return S.strips == 1 and block * S.block % S.tile_width == 0


@gluon.constexpr_function
def ends_streams(S, block):
    """Whether a block has the last pixel of a stream whose neighbour on the right is outside of the image."""
    return S.strips == 1 and (block + 1) * S.block % S.tile_width == 0


@gluon.jit
def read_group(ring, top, bottom, GROUPS: gl.constexpr, left, right, BLOCK_INDEX: gl.constexpr, S: gl.constexpr):
    """What the convolution of a group reads, [block, 64] and [block, 32]; `top`, `bottom`: its slots in two pairs."""
    top_left = read_row_pair(ring, top - 1, GROUPS, S)
    top_center = read_row_pair(ring, top, GROUPS, S)
    top_right = read_row_pair(ring, top + 1, GROUPS, S)
    bottom_left = read_row_pair(ring, bottom - 1, GROUPS, S)
    bottom_center = read_row_pair(ring, bottom, GROUPS, S)
    bottom_right = read_row_pair(ring, bottom + 1, GROUPS, S)
    if starts_streams(S, BLOCK_INDEX):
        top_left = keep(top_left, left)
        bottom_left = keep(bottom_left, left)
    if ends_streams(S, BLOCK_INDEX):
        top_right = keep(top_right, right)
        bottom_right = keep(bottom_right, right)
    x64 = join_columns(join_columns(top_left, top_center), join_columns(top_right, bottom_left))
    x32 = join_columns(bottom_center, bottom_right)
    return (
        gl.convert_layout(x64, operand_layout(16), assert_trivial=True),
        gl.convert_layout(x32, operand_layout(16), assert_trivial=True),
    )


@gluon.jit
def start_group(x64, x32, w64, w32, group, S: gl.constexpr):
    """Start two output rows of a group side by side, [block, 16]."""
    y = warpgroup_mma(x64, w64.index(group), zeros(S.block, 16, sum_layout(16)), use_acc=False, is_async=True)
    return warpgroup_mma(x32, w32.index(group), y, is_async=True)


@gluon.jit
def finish_group(y, PENDING: gl.constexpr, dtype: gl.constexpr, S: gl.constexpr):
    """The two output rows of a group, [block, 8] each, while `PENDING` later products are under way."""
    y = warpgroup_mma_wait(PENDING, deps=[y]).to(dtype)
    return gl.split(y.reshape((S.block, 2, 8)).permute((0, 2, 1)))


@gluon.jit
def conv_slab(
    ring,
    top,
    bottom,
    w64,
    w32,
    zero,
    left,
    right,
    FIRST: gl.constexpr,
    GROUPS: gl.constexpr,
    BLOCK_INDEX: gl.constexpr,
    S: gl.constexpr,
):
    """Two output rows of the groups from `FIRST` on, [block, 8 GROUPS] each.

    While the products of a group are under way, the next group is read, and the one before it is rounded.
    """
    ys0 = ()
    ys1 = ()
    pending = ()
    x64, x32 = read_group(ring, top, bottom, GROUPS, left, right, BLOCK_INDEX, S)
    for g in gl.static_range(GROUPS):
        if FIRST + g < S.groups:
            now64 = x64
            now32 = x32
            if g + 1 < GROUPS and FIRST + g + 1 < S.groups:
                shift = (g + 1) * S.tile_width
                x64, x32 = read_group(ring, top + shift, bottom + shift, GROUPS, left, right, BLOCK_INDEX, S)
            y = start_group(now64, now32, w64, w32, zero + FIRST + g, S)
            if len(pending) > 0:
                y0, y1 = finish_group(pending[0], 2, ring.dtype, S)
                ys0 = ys0 + (y0,)
                ys1 = ys1 + (y1,)
            pending = (y,)
    y0, y1 = finish_group(pending[0], 0, ring.dtype, S)
    ys0 = ys0 + (y0,)
    ys1 = ys1 + (y1,)
    for _ in gl.static_range(fixed(S.groups - FIRST), GROUPS):
        ys0 = ys0 + (gl.zeros_like(y0),)
        ys1 = ys1 + (gl.zeros_like(y1),)
    return join_groups(ys0), join_groups(ys1)


@gluon.jit
def conv_rows(ring, top, bottom, w64, w32, zero, BLOCK_INDEX: gl.constexpr, S: gl.constexpr):
    """Two output rows at a block's pixels, each as slabs [block, slab]; `top`, `bottom`: slots of the pairs of rows."""
    left, right = edge_masks(BLOCK_INDEX, S)
    ys0 = ()
    ys1 = ()
    for s in gl.static_range(len(S.in_slabs)):
        shift = slab_slot(S, S.in_slabs, s) + block_slot(S, BLOCK_INDEX, S.in_slabs[s] // 8)
        y0, y1 = conv_slab(
            ring,
            top + shift,
            bottom + shift,
            w64,
            w32,
            zero,
            left,
            right,
            slab_start(S.in_slabs, s) // 8,
            S.in_slabs[s] // 8,
            BLOCK_INDEX,
            S,
        )
        ys0 = ys0 + (y0,)
        ys1 = ys1 + (y1,)
    return ys0, ys1


@gluon.jit
def hidden_bias(bias, step, S: gl.constexpr):
    """[1, hidden], 16 bits."""
    b = bias.index(step).load(hidden_bias_layout(S.hidden))
    b = b.reshape((4, S.hidden // 8, 2)).permute((1, 0, 2)).reshape((S.hidden,))
    columns: gl.constexpr = gl.SliceLayout(0, sum_layout(S.hidden, S.warp_products))
    return gl.convert_layout(b, columns, assert_trivial=True)[None, :]


@gluon.jit
def expand(ys, us, step, S: gl.constexpr):
    """Start [block, hidden], the sum over slabs."""
    h = zeros(S.block, S.hidden, sum_layout(S.hidden))
    for s in gl.static_range(len(us)):
        h = warpgroup_mma(ys[s], us[s].index(step), h, use_acc=s > 0, is_async=True)
    return h


@gluon.jit
def project(h, vs, step, zs, FIRST: gl.constexpr):
    """Start to add hidden channels to the output's slabs [block, slab], or to replace them with the `FIRST`."""
    sums = ()
    for s in gl.static_range(len(vs)):
        sums = sums + (warpgroup_mma(h, vs[s].index(step), zs[s], use_acc=not FIRST, is_async=True),)
    return sums


@gluon.constexpr_function
def products_after_expand(S, step, row):
    """How many products are started between the expansion of a step and its use, by both rows in turn."""
    expands, projects = len(S.in_slabs), len(S.out_slabs)
    if row == 1:
        # Its expansion came last, and the other row has gone on to its own next step.
        return projects + (expands if step + 1 < S.steps else 0)
    return expands if step == 0 else projects + expands


@gluon.jit
def ffn_by_warpgroup(rows, us, vs, bias, zero, S: gl.constexpr):
    """Expand, activate, project two rows, slabs [block, slab] each, in turn: fp32 slabs [block, slab] of both.

    While one row is activated, products of the other one are under way.
    """
    OPERAND: gl.constexpr = operand_layout(S.hidden)
    ys = ()
    hs = ()
    zs = ()
    for i in gl.static_range(2):
        y = ()
        z = ()
        for s in gl.static_range(len(us)):
            y = y + (gl.convert_layout(rows[i][s], OPERAND, assert_trivial=True),)
        for s in gl.static_range(len(vs)):
            z = z + (zeros(S.block, S.out_slabs[s], sum_layout(S.out_slabs[s])),)
        ys = ys + (y,)
        zs = zs + (z,)
        hs = hs + (expand(y, us, zero, S),)
    for step in gl.static_range(fixed(S.steps)):
        b = hidden_bias(bias, step + zero, S)
        next_hs = ()
        next_zs = ()
        for i in gl.static_range(2):
            h = warpgroup_mma_wait(products_after_expand(S, step, i), deps=[hs[i]])
            h, b_rows = gl.broadcast(h, b)
            activated = gl.convert_layout(activate(h, b_rows, bias.dtype), OPERAND, assert_trivial=True)
            next_zs = next_zs + (project(activated, vs, step + zero, zs[i], step == 0),)
            if step + 1 < S.steps:
                next_hs = next_hs + (expand(ys[i], us, step + 1 + zero, S),)
        hs = next_hs
        zs = next_zs
    sums = warpgroup_mma_wait(0, deps=zs[0] + zs[1])
    return sums[: len(vs)], sums[len(vs) :]


@gluon.jit
def ffn_by_warp(ys, us, vs, bias, zero, S: gl.constexpr):
    """Expand, activate, project one row, slabs [block, slab]: fp32 slabs [block, slab]."""
    SUM: gl.constexpr = sum_layout(S.hidden, S.warp_products)
    LEFT: gl.constexpr = operand_layout(S.hidden, S.warp_products)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, SUM, 2)
    xs = ()
    for s in gl.static_range(len(us)):
        xs = xs + (gl.convert_layout(ys[s], LEFT, assert_trivial=True),)
    zs = ()
    for s in gl.static_range(len(vs)):
        zs = zs + (zeros(S.block, S.out_slabs[s], SUM),)
    for step in gl.static_range(fixed(S.steps)):
        h = zeros(S.block, S.hidden, SUM)
        for s in gl.static_range(len(us)):
            h = mma_v2(xs[s], us[s].index(step + zero).load(RIGHT), h)
        h, b = gl.broadcast(h, hidden_bias(bias, step + zero, S))
        activated = gl.convert_layout(activate(h, b, bias.dtype), LEFT, assert_trivial=True)
        sums = ()
        for s in gl.static_range(len(vs)):
            sums = sums + (mma_v2(activated, vs[s].index(step + zero).load(RIGHT), zs[s]),)
        zs = sums
    return zs


@gluon.jit
def read_row(ring, slot, GROUPS: gl.constexpr, S: gl.constexpr):
    """One row of a slab at a block's pixels, [block, 8 GROUPS]; `slot` is the block's first."""
    view = ring.index(slot)._reinterpret(ring.dtype, [S.block_streams, GROUPS, S.tile_width, 8], plain_shared_layout(4))
    view = view.slice(0, S.block_width, dim=2)
    x = view.load(row_layout(S.block_streams, GROUPS, S.block_width))
    return x.permute((0, 2, 1, 3)).reshape((S.block, 8 * GROUPS))


@gluon.jit
def finish_row(
    ring,
    pair_slot,
    ROW: gl.constexpr,
    zs,
    out_bias,
    out_ptr,
    v0,
    rows,
    column0,
    jobs,
    BLOCK_INDEX: gl.constexpr,
    S: gl.constexpr,
):
    """Round, add bias and input, and store a block of one row of every stream, slabs [block, slab].

    The input is row `ROW` of the pair at `pair_slot`; `v0` is the first stream's virtual row.
    """
    for s in gl.static_range(len(S.out_slabs)):
        slot = pair_slot + slab_slot(S, S.out_slabs, s) + ROW * (S.out_slabs[s] // 8 * S.pixels)
        slot += block_slot(S, BLOCK_INDEX, S.out_slabs[s] // 8)
        z = add_bias_and_input(ring, slot, zs[s], out_bias, slab_start(S.out_slabs, s), S.out_slabs[s], S)
        store_slab(out_ptr, z, v0, rows, column0, jobs, BLOCK_INDEX, slab_start(S.out_slabs, s), S.out_slabs[s], S)


@gluon.jit
def add_bias_and_input(ring, slot, z, out_bias, FIRST: gl.constexpr, SLAB: gl.constexpr, S: gl.constexpr):
    """[block, slab] in 16 bits, where two elements take one instruction."""
    SUM: gl.constexpr = sum_layout(SLAB, S.warp_products)
    added = bias_slab(out_bias, FIRST, SLAB).load(gl.SliceLayout(0, SUM))[None, :]
    if S.residual:
        added = gl.convert_layout(read_row(ring, slot, SLAB // 8, S), SUM, assert_trivial=True) + added
    return z.to(ring.dtype) + added


@gluon.jit
def bias_slab(out_bias, FIRST: gl.constexpr, SLAB: gl.constexpr):
    """[SLAB] of the output's bias."""
    return out_bias.index(FIRST // BIAS_ROW)._reinterpret(out_bias.dtype, [SLAB], plain_shared_layout(1))


@gluon.jit
def store_slab(
    out_ptr,
    z,
    v0,
    rows,
    column0,
    jobs,
    BLOCK_INDEX: gl.constexpr,
    FIRST: gl.constexpr,
    SLAB: gl.constexpr,
    S: gl.constexpr,
):
    LAYOUT: gl.constexpr = store_layout(S.block, SLAB)
    z = gl.convert_layout(z, LAYOUT)
    pixel = BLOCK_INDEX * S.block + gl.arange(0, S.block, gl.SliceLayout(1, LAYOUT))
    k = FIRST + gl.arange(0, SLAB, gl.SliceLayout(0, LAYOUT))
    column = column0 + pixel % S.tile_width
    if S.streams == 1:
        n = v0 // (S.height + 1)
        y = v0 - n * (S.height + 1)
        inside = (v0 < rows) & (y < S.height) & (pixel >= 0)
        row = out_ptr + (n * S.height + y).to(gl.int64) * (S.width * S.out_channels)
        offset = column * S.out_channels  # [block]
    else:
        v = v0 + pixel // S.tile_width * (2 * jobs)  # [block]
        n = v // (S.height + 1)
        y = v - n * (S.height + 1)
        inside = (v < rows) & (y < S.height)
        row = out_ptr
        offset = (n * S.height + y).to(gl.int64) * (S.width * S.out_channels) + column * S.out_channels
    if S.strips > 1:
        inner = pixel % S.tile_width
        inside = inside & (inner >= 1) & (inner < S.tile_width - 1) & (column < S.width)
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
def new_matrices(COUNT: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, dtype: gl.constexpr):
    """[COUNT, ROWS, COLUMNS] in shared memory."""
    return gl.allocate_shared_memory(dtype, [COUNT, ROWS, COLUMNS], matrix_shared_layout(ROWS, COLUMNS, dtype))


@gluon.jit
def load_weights(pointer, dtype: gl.constexpr, S: gl.constexpr):
    """Start to copy `fusion.weights.PackedHopper.weights` to shared memory: the convolution's, then the rest.

    The convolution's products in two parts, [groups, 64, 16] and [groups, 32, 16], for each slab expand
    [steps, slab in, hidden], project [steps, hidden, slab out], and the hidden bias [steps, hidden].
    """
    w64 = new_matrices(S.groups, 64, 16, dtype)
    w32 = new_matrices(S.groups, 32, 16, dtype)
    us = ()
    vs = ()
    for s in gl.static_range(len(S.in_slabs)):
        us = us + (new_matrices(S.steps, S.in_slabs[s], S.hidden, dtype),)
    for s in gl.static_range(len(S.out_slabs)):
        vs = vs + (new_matrices(S.steps, S.hidden, S.out_slabs[s], dtype),)
    bias = gl.allocate_shared_memory(dtype, [S.steps, S.hidden], plain_shared_layout(1))
    bias_ptr = pointer + S.hidden_bias_start
    for step in gl.static_range(fixed(S.steps)):
        bias.index(step).store(gl.load(bias_ptr + step * S.hidden + gl.arange(0, S.hidden, thread_layout())))
    for g in gl.static_range(fixed(S.groups)):
        copy_matrix(w64.index(g), pointer)
        copy_matrix(w32.index(g), pointer + 64 * 16)
        pointer += 96 * 16
    async_copy.commit_group()
    for step in gl.static_range(fixed(S.steps)):
        for s in gl.static_range(len(S.in_slabs)):
            copy_matrix(us[s].index(step), pointer)
            pointer += S.in_slabs[s] * S.hidden
        for s in gl.static_range(len(S.out_slabs)):
            copy_matrix(vs[s].index(step), pointer)
            pointer += S.hidden * S.out_slabs[s]
    async_copy.commit_group()
    return w64, w32, us, vs, bias


@gluon.jit
def load_out_bias(pointer, dtype: gl.constexpr, S: gl.constexpr):
    """[sum of output slabs] in 16 bits, in shared memory."""
    ROWS: gl.constexpr = slab_start(S.out_slabs, len(S.out_slabs)) // BIAS_ROW
    out_bias = gl.allocate_shared_memory(dtype, [ROWS, BIAS_ROW], plain_shared_layout(1))
    for s in gl.static_range(len(S.out_slabs)):
        store_bias_slab(out_bias, pointer, slab_start(S.out_slabs, s), S.out_slabs[s])
    return out_bias


@gluon.jit
def store_bias_slab(out_bias, pointer, FIRST: gl.constexpr, SLAB: gl.constexpr):
    values = gl.load(pointer + FIRST + gl.arange(0, SLAB, thread_layout()))
    bias_slab(out_bias, FIRST, SLAB).store(values.to(out_bias.dtype))


@gluon.constexpr_function
def pending_weights(S):
    """Copies of weights that need not be there when the first convolution starts."""
    return int(S.late_weights)


@gluon.jit
def wait_for_weights(PENDING: gl.constexpr):
    """Until all but `PENDING` of the two copies of weights are there, for products of every warp."""
    async_copy.wait_group(PENDING)
    fence_async_shared()
    gl.thread_barrier()


@gluon.jit
def walk(ring, full, w64, w32, us, vs, bias, out_bias, x_desc, x_ptr, out_ptr, index, jobs, rows, S: gl.constexpr):
    """A partition's part: all jobs of its streams, of which `index` is the first."""
    LAST: gl.constexpr = S.pixels // S.block - 1
    first, column = first_row_and_column(index, jobs, S)
    if S.bulk_loads:
        wait_for_pair(full, 0, S)
    for job in range(0, jobs):
        if S.bulk_loads:
            wait_for_pair(full, job + 1, S)
        gl.thread_barrier()  # every warp is done with the last job, whose first pair is replaced in this one
        if S.bulk_loads:
            load_pair(x_desc, ring, full, job + S.stages - 1, first, rows, column, jobs, S)
        # Were it plainly zero, the compiler would keep all addresses of the weights in registers.
        zero = job >> JOB_BITS
        top = MARGIN + job % S.stages * S.pair_slots
        bottom = MARGIN + (job + 1) % S.stages * S.pair_slots
        v = first + 2 * job
        for block in gl.static_range(LAST + 1):
            ys0, ys1 = conv_rows(ring, top, bottom, w64, w32, zero, block, S)
            if not S.bulk_loads and block == LAST:
                next_pair = fetch_pair(x_ptr, job + 2, first, rows, column, jobs, S)
                gl.thread_barrier()  # keeps the compiler from moving the loads down to where they are used
            if S.late_weights and block == 0:  # noqa: SIM102 (the compiler knows this, not the next)
                if job == 0:
                    wait_for_weights(0)
            if S.warp_products:
                zs = ffn_by_warp(ys0, us, vs, bias, zero, S)
                finish_row(ring, top, 1, zs, out_bias, out_ptr, v, rows, column, jobs, block, S)
                zs = ffn_by_warp(ys1, us, vs, bias, zero, S)
                finish_row(ring, bottom, 0, zs, out_bias, out_ptr, v + 1, rows, column, jobs, block, S)
            else:
                zs0, zs1 = ffn_by_warpgroup((ys0, ys1), us, vs, bias, zero, S)
                finish_row(ring, top, 1, zs0, out_bias, out_ptr, v, rows, column, jobs, block, S)
                finish_row(ring, bottom, 0, zs1, out_bias, out_ptr, v + 1, rows, column, jobs, block, S)
        if not S.bulk_loads:
            if S.stages == 2:
                gl.thread_barrier()  # the pair takes the place of this job's first
            put_pair(ring, job + 2, next_pair, S)
    if S.bulk_loads:  # copies into the memory of a program must not outlive it
        for i in gl.static_range(fixed(S.stages - 2)):
            wait_for_pair(full, jobs + 1 + i, S)


@gluon.jit(do_not_specialize=["rows", "jobs"])
def convfirst_hopper_kernel(
    x_desc,  # x as [N H, C / 8, W, 8] in boxes [1, box_groups, tile_width, 8]
    x_ptr,  # [N, H, W, C]
    weights_ptr,  # fusion.weights.PackedHopper.weights
    project_bias_ptr,  # [sum(out_slabs)], fp32
    out_ptr,  # [N, H, W, K]
    rows,  # virtual rows, N (H + 1)
    jobs,  # of each stream
    S: gl.constexpr,
):
    dtype: gl.constexpr = x_desc.dtype
    out_bias = load_out_bias(project_bias_ptr, dtype, S)
    w64, w32, us, vs, bias = load_weights(weights_ptr, dtype, S)
    index = gl.program_id(0) * (S.partitions * S.streams)
    rings = ()
    fulls = ()
    for _ in gl.static_range(fixed(S.partitions)):
        ring, full = new_ring(dtype, S)
        rings = rings + (ring,)
        fulls = fulls + (full,)
    if S.bulk_loads:
        fence_async_shared()
        gl.thread_barrier()
    wait_for_previous_kernel()
    if S.bulk_loads:
        for pair in gl.static_range(fixed(S.stages - 1)):
            for p in gl.static_range(fixed(S.partitions)):
                first, column = first_row_and_column(index + p * S.streams, jobs, S)
                load_pair(x_desc, rings[p], fulls[p], pair, first, rows, column, jobs, S)
    else:
        pairs = ()
        for p in gl.static_range(fixed(S.partitions)):
            first, column = first_row_and_column(index + p * S.streams, jobs, S)
            for pair in gl.static_range(2):
                pairs = pairs + (fetch_pair(x_ptr, pair, first, rows, column, jobs, S),)
        for p in gl.static_range(fixed(S.partitions)):
            for pair in gl.static_range(2):
                put_pair(rings[p], pair, pairs[2 * p + pair], S)
    wait_for_weights(pending_weights(S))
    if S.partitions == 1:
        walk(rings[0], fulls[0], w64, w32, us, vs, bias, out_bias, x_desc, x_ptr, out_ptr, index, jobs, rows, S)
    else:
        other = index + S.streams
        gl.warp_specialize(
            [
                (
                    walk,
                    (
                        rings[0],
                        fulls[0],
                        w64,
                        w32,
                        us,
                        vs,
                        bias,
                        out_bias,
                        x_desc,
                        x_ptr,
                        out_ptr,
                        index,
                        jobs,
                        rows,
                        S,
                    ),
                ),
                (
                    walk,
                    (
                        rings[1],
                        fulls[1],
                        w64,
                        w32,
                        us,
                        vs,
                        bias,
                        out_bias,
                        x_desc,
                        x_ptr,
                        out_ptr,
                        other,
                        jobs,
                        rows,
                        S,
                    ),
                ),
            ],
            [gl.num_warps()],
            [WORKER_REGISTERS],
        )


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
        steps=tile.steps(hidden_channels),
        hidden=tile.hidden,
        pixels=tile.pixels,
        streams=tile.streams(width),
        strips=tile.strips(width),
        stages=tile.stages,
        partitions=tile.partitions,
        warp_products=tile.warp_products,
        bulk_loads=tile.bulk_loads,
    )


def register_limit(tile: HopperTile) -> int | None:
    """Registers a thread with which `tile.programs` fit on a processor; None if the compiler needs no limit."""
    threads = tile.programs * tile.partitions * WARPS * 32
    limit = 65536 // threads // 8 * 8
    return limit if limit < MAX_REGISTERS else None


def descriptor_box(spec: Spec) -> list[int]:
    """What one copy by TMA brings: of a row, groups and pixels of 8 channels."""
    return [1, spec.box_groups, spec.tile_width, 8]


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
    rows_of_groups = TensorDescriptor(
        x,
        [batch * height, in_channels // 8, width, 8],
        [width * in_channels, 8, in_channels, 1],
        descriptor_box(spec),
        descriptor_layout(),
    )
    convfirst_hopper_kernel[(work.grid,)](
        rows_of_groups,
        x,
        weights,
        project_bias,
        out,
        work.rows,
        work.jobs,
        spec,
        num_warps=WARPS,
        maxnreg=register_limit(tile),
        launch_pdl=True,
    )


@cache
def processor_count(device: int) -> int:
    """Streaming multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count

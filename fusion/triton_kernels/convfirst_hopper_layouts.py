"""Layouts of the Hopper kernel: which thread holds which element, and where elements lie in shared memory.

A *block* of pixels is what is computed at once: the rows of a matrix product, 16 of every 64 in each of four warps.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fusion.planner.hopper_tile import WARPS

WARP_ROWS = 16
"""Rows of a product that a warp holds, of every 64."""


@gluon.constexpr_function
def powers(start, stop):
    """start, 2 start, 4 start ... below stop."""
    values = []
    while start < stop:
        values.append(start)
        start *= 2
    return values


@gluon.constexpr_function
def sum_layout(columns, warp_products=0):
    """[block, columns], the sum of a warpgroup's product, or of a product by each warp."""
    if warp_products:
        return gl.NVMMADistributedLayout([2, 0], [WARPS, 1], [16, 8])
    return gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, columns, 16])


@gluon.constexpr_function
def operand_layout(columns, warp_products=0):
    """[block, columns] in 16 bits, the left operand of a product."""
    return gl.DotOperandLayout(0, sum_layout(columns, warp_products), 2)


@gluon.constexpr_function
def row_pair_layout(streams, width):
    """[2 rows, streams, width, 8], a block of pixels: the left operand with rows and channels as its columns."""

    def at(pixel):
        return [0, pixel // width, pixel % width, 0]

    registers = [
        [0, 0, 0, 1],
        at(8),
        [1, 0, 0, 0],
        *(at(pixel) for pixel in powers(WARP_ROWS * WARPS, streams * width)),
    ]
    lanes = [[0, 0, 0, 2], [0, 0, 0, 4], at(1), at(2), at(4)]
    warps = [at(pixel) for pixel in powers(WARP_ROWS, WARP_ROWS * WARPS)]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [2, streams, width, 8])


@gluon.constexpr_function
def row_layout(streams, groups, width):
    """[streams, groups, width, 8]: a sum with groups and channels as its columns."""

    def at(pixel):
        return [pixel // width, 0, pixel % width, 0]

    registers = [[0, 0, 0, 1], at(8), *([0, group, 0, 0] for group in powers(1, groups))]
    registers += [at(pixel) for pixel in powers(WARP_ROWS * WARPS, streams * width)]
    lanes = [[0, 0, 0, 2], [0, 0, 0, 4], at(1), at(2), at(4)]
    warps = [at(pixel) for pixel in powers(WARP_ROWS, WARP_ROWS * WARPS)]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [streams, groups, width, 8])


@gluon.constexpr_function
def fetch_layout(streams, groups, width):
    """[2 rows, streams, groups, width, 8], 16 bytes a thread.

    Eight threads write 128 bytes of shared memory in a row, and a warp reads whole sectors of global memory.
    """

    def axis(dimension, start, stop):
        return [[0] * dimension + [value] + [0] * (4 - dimension) for value in powers(start, stop)]

    lanes = [*axis(3, 1, 8), *axis(2, 1, min(groups, 4))]
    rest = [*axis(3, 8, width), *axis(1, 1, streams), *axis(2, 4, groups)]
    missing = 5 - len(lanes)
    lanes += rest[:missing]
    rest = [*rest[missing:], [1, 0, 0, 0, 0]]
    warps = len(powers(1, WARPS))
    rest = [[0, 0, 0, 0, 0]] * (warps - len(rest)) + rest
    registers = [*axis(4, 1, 8), *rest[: len(rest) - warps]]
    return gl.DistributedLinearLayout(registers, lanes, rest[len(rest) - warps :], [], [2, streams, groups, width, 8])


@gluon.constexpr_function
def along(layout, axis):
    """Layout of a tensor of five dimensions, for a vector along `axis`."""
    for dimension in range(4, -1, -1):
        if dimension != axis:
            layout = gl.SliceLayout(dimension, layout)
    return layout


@gluon.constexpr_function
def store_layout(pixels, channels):
    """[pixels, channels] of a block: 16 bytes a thread, neighbouring channels in neighbouring threads."""
    registers = [[0, 1], [0, 2], [0, 4]]
    lanes = [[0, channel] for channel in powers(8, channels)]
    rows = powers(1, WARP_ROWS)
    missing = 5 - len(lanes)
    lanes += [[row, 0] for row in rows[:missing]]
    registers += [[row, 0] for row in (*rows[missing:], *powers(WARP_ROWS * WARPS, pixels))]
    warps = [[row, 0] for row in powers(WARP_ROWS, WARP_ROWS * WARPS)]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [pixels, channels])


@gluon.constexpr_function
def hidden_bias_layout(hidden):
    """[4 threads of a quad, hidden / 8, 2] as [hidden]: a quad holds what a row of a sum needs."""
    registers = [[element] for element in powers(1, hidden // 4)]
    lanes = [[hidden // 4], [hidden // 2], [0], [0], [0]]
    return gl.DistributedLinearLayout(registers, lanes, [[0] for _ in powers(1, WARPS)], [], [hidden])


@gluon.constexpr_function
def copy_layout(columns):
    """[rows, columns] copied 16 bytes a thread."""
    lanes = min(columns // 8, 32)
    return gl.BlockedLayout([1, 8], [32 // lanes, lanes], [WARPS, 1], [1, 0])


@gluon.constexpr_function
def thread_layout():
    """[threads]"""
    return gl.BlockedLayout([1], [32], [WARPS], [0])


@gluon.constexpr_function
def plain_shared_layout(rank):
    """Row by row."""
    return gl.SwizzledSharedLayout(1, 1, 1, list(range(rank - 1, -1, -1)))


@gluon.constexpr_function
def matrix_shared_layout(rows, columns, dtype):
    """[rows, columns], the right operand of a warpgroup's product."""
    return gl.NVMMASharedLayout.get_default_for([rows, columns], dtype)


@gluon.constexpr_function
def descriptor_layout():
    """Of the boxes that TMA copies: row by row as well."""
    return gl.NVMMASharedLayout(0, 16, rank=4)

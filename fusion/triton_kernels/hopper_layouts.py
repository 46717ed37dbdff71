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
def sum_layout(columns):
    """[block, columns], the sum of a warpgroup's product."""
    return gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, columns, 16])


@gluon.constexpr_function
def operand_layout(columns):
    """[block, columns] in 16 bits, the left operand of a product."""
    return gl.DotOperandLayout(0, sum_layout(columns), 2)


@gluon.constexpr_function
def channel_layout(columns, unit, block):
    """[block, columns]: the sum of a product whose columns are permuted so that a thread's channels are neighbours.

    Of every `unit` channels each thread of a quad has a fourth.
    """
    own = unit // 4
    registers = [[0, channel] for channel in powers(1, own)]
    registers += [[8, 0], *([0, channel] for channel in powers(unit, columns))]
    registers += [[row, 0] for row in powers(WARP_ROWS * WARPS, block)]
    lanes = [[0, own], [0, 2 * own], [1, 0], [2, 0], [4, 0]]
    warps = [[row, 0] for row in powers(WARP_ROWS, WARP_ROWS * WARPS)]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [block, columns])


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
def plain_layout(rank):
    """In shared memory row by row."""
    return gl.SwizzledSharedLayout(1, 1, 1, list(range(rank - 1, -1, -1)))


@gluon.constexpr_function
def rows_layout(columns):
    """[rows, columns] in shared memory, operand of a warpgroup's product that contracts columns."""
    return gl.NVMMASharedLayout(2 * columns, 16, rank=2)


@gluon.constexpr_function
def box_layout(columns):
    """[pixels, streams, 1, columns], rows that TMA copies."""
    return gl.NVMMASharedLayout(2 * columns, 16, rank=4)


@gluon.constexpr_function
def planes_layout(columns):
    """[1, pixels, streams, 1, columns], even or odd columns of rows that TMA copies."""
    return gl.NVMMASharedLayout(2 * columns, 16, rank=5)


@gluon.constexpr_function
def flat_layout():
    """[rows, 64] as they lie in global memory."""
    return gl.NVMMASharedLayout(0, 16, rank=2)

"""Maximum efficiency of a sequence of kernels on processors of any op:byte ratio (paper figures 4 and 16).

A kernel of n OPs and b bytes takes max(n/R, b/B), which is max(n, r*b) / R on a processor of op:byte r = R/B: the ratio
alone decides which part of the peak R a sequence can attain.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from fusion.planner.waterline import HasKernels

OP_BYTES = tuple(range(0, 601, 5))
"""The ratios of the figures, in OP/byte."""


@dataclass(frozen=True)
class SweepPoint:
    """What a program can attain on a processor of ``op_byte`` OP/byte, as fractions of the peak.

    ``waterline_efficiency`` runs kernel after kernel; ``roofline_efficiency`` is what total OPs over total bytes, the
    mediant, promises. It is never less.
    """

    op_byte: float
    waterline_efficiency: float
    roofline_efficiency: float


def sweep(program: HasKernels, op_bytes: Iterable[float] = OP_BYTES) -> tuple[SweepPoint, ...]:
    """Efficiency of a program, or of anything with ``kernels``, at each of the ratios (in OP/byte).

    Raises ValueError for a program without OPs, and for a ratio that is negative or not finite.
    """
    costs = [(kernel.ops_count, kernel.bytes) for kernel in program.kernels]
    ops = sum(kernel_ops for kernel_ops, _ in costs)
    num_bytes = sum(kernel_bytes for _, kernel_bytes in costs)
    if not ops:
        raise ValueError("a program without OPs has no efficiency")
    points = []
    for op_byte in op_bytes:
        if not 0 <= op_byte < math.inf:
            raise ValueError(f"op:byte must be a finite number of at least 0, got {op_byte!r}")
        sequence = sum(max(kernel_ops, op_byte * kernel_bytes) for kernel_ops, kernel_bytes in costs)
        points.append(SweepPoint(op_byte, ops / sequence, ops / max(ops, op_byte * num_bytes)))
    return tuple(points)

"""What kind of layer a kernel runs: how the paper's waterline plots colour it (figures 3 and 15)."""

from collections.abc import Iterable
from enum import StrEnum

from fusion.planner.graph import CONV_KINDS, Op, OpKind


class LayerKind(StrEnum):
    """Kinds of kernels, from the most to the least intense, and what a legend calls them."""

    FUSED = "fused block"
    CONVOLUTION = "convolution"
    POINTWISE = "point-wise convolution, linear"
    MATMUL = "attention product"
    GROUPED = "grouped convolution"
    DEPTHWISE = "depth-wise convolution"
    OTHER = "pool, multiply, concat, norm"
    UNKNOWN = "unknown, counted by bytes"


def layer_kind(ops: Iterable[Op]) -> LayerKind:
    """The kind of a kernel that runs these ops.

    Free ops do not count next to one that costs OPs; several that do make a fused block, unless all are the products of
    one attention.
    """
    ops = tuple(ops)
    costly = {_op_kind(op) for op in ops if op.ops_count}
    if len(costly) > 1 or (costly != {LayerKind.MATMUL} and sum(op.ops_count > 0 for op in ops) > 1):
        return LayerKind.FUSED
    if costly:
        return costly.pop()
    return LayerKind.UNKNOWN if any(op.kind is OpKind.UNKNOWN for op in ops) else LayerKind.OTHER


def _op_kind(op: Op) -> LayerKind:
    if op.kind is OpKind.MATMUL:
        return LayerKind.MATMUL
    if op.kind is OpKind.LINEAR:
        return LayerKind.POINTWISE
    if op.kind not in CONV_KINDS:
        return LayerKind.OTHER
    weight = op.weights[0]
    if op.is_dense:
        return LayerKind.POINTWISE if weight.size == weight["K"] * weight["T"] else LayerKind.CONVOLUTION
    return LayerKind.DEPTHWISE if op.group_width == 1 else LayerKind.GROUPED

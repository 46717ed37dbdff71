"""The symbols of operations as strokes within a circle of radius 1 around the origin, y upwards."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fusion.planner.graph import CONV_KINDS, Op, OpKind

Stroke = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Symbol:
    """Polylines, and a dot of radius ``dot`` in the middle unless that is 0."""

    strokes: tuple[Stroke, ...]
    dot: float = 0.0


def symbol_of(op: Op) -> Symbol:
    """The symbol of an operation: a product over channels for all dense layers that look at one pixel."""
    if op.kind in CONV_KINDS:
        weight = op.weights[0]
        return PRODUCT if op.is_dense and weight.size == weight["K"] * weight["T"] else CONVOLUTION
    return SYMBOLS.get(op.kind, OTHER)


def _spokes(count: int, inner: float, outer: float, turn: float = 0.0) -> tuple[Stroke, ...]:
    angles = [2 * math.pi * index / count + turn for index in range(count)]
    return tuple(tuple((radius * math.cos(a), radius * math.sin(a)) for radius in (inner, outer)) for a in angles)


def _curve(function: Callable[[float], float], start: float = -3.0, stop: float = 3.0) -> Symbol:
    """A function's graph from ``start`` to ``stop``, scaled to the circle."""
    points = [start + (stop - start) * step / 48 for step in range(49)]
    values = [function(x) for x in points]
    low, high = min(values), max(values)
    across = [0.7 * (2 * (x - start) / (stop - start) - 1) for x in points]
    return Symbol((tuple((x, 0.45 * (2 * (y - low) / (high - low) - 1)) for x, y in zip(across, values, strict=True)),))


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


PRODUCT = Symbol(_spokes(4, 0.0, 1.0, math.pi / 4))
CONVOLUTION = Symbol(_spokes(6, 0.0, 0.6, math.pi / 2))

SYMBOLS: Mapping[OpKind, Symbol] = {
    OpKind.LINEAR: PRODUCT,
    OpKind.MATMUL: PRODUCT,
    OpKind.MULTIPLY: Symbol((), 0.22),
    OpKind.ADD: Symbol(_spokes(4, 0.0, 1.0)),
    OpKind.RELU: _curve(lambda x: max(x, 0.0)),
    OpKind.RELU6: _curve(lambda x: min(max(x, 0.0), 6.0), -4.0, 10.0),
    OpKind.SILU: _curve(lambda x: x * _sigmoid(x), -4.5, 1.2),
    OpKind.GELU: _curve(lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2, -2.5, 0.9),
    OpKind.HARDSWISH: _curve(lambda x: x * min(max(x + 3, 0.0), 6.0) / 6, -4.5, 1.2),
    OpKind.SIGMOID: _curve(_sigmoid, -6.0, 6.0),
    OpKind.GLOBAL_AVERAGE_POOL: Symbol(_spokes(8, 0.35, 0.75), 0.18),
    OpKind.POOL: Symbol(_spokes(8, 0.35, 0.75), 0.18),
    OpKind.BLURPOOL: Symbol((((-0.7, -0.3), (0.0, 0.5), (0.7, -0.3)),)),
    OpKind.CONCAT: Symbol(
        (
            ((-0.6, -0.45), (-0.08, -0.45), (-0.08, 0.45), (-0.6, 0.45), (-0.6, -0.45)),
            ((0.08, -0.45), (0.6, -0.45), (0.6, 0.45), (0.08, 0.45), (0.08, -0.45)),
        )
    ),
}

OTHER = Symbol((((-0.55, -0.3), (-0.2, 0.3), (0.2, -0.3), (0.55, 0.3)),))

import math
from dataclasses import dataclass
from itertools import pairwise

import pytest

from fusion.planner.blocks import convfirst, mbconv
from fusion.planner.layer_kind import LayerKind
from fusion.planner.lower import block_fused, layerwise
from fusion.planner.op_byte_sweep import OP_BYTES, SweepPoint, sweep
from fusion.planner.processor import PROCESSORS
from fusion.planner.waterline import analyze


@dataclass(frozen=True)
class Cost:
    ops_count: int
    bytes: int
    name: str = "kernel"
    layer_kind: LayerKind = LayerKind.OTHER


@dataclass(frozen=True)
class Sequence:
    kernels: tuple[Cost, ...]


def test_points_by_hand():
    # Intensities 2 and 30, of the whole 100 / 8 = 12.5.
    program = Sequence((Cost(10, 5), Cost(90, 3)))
    assert sweep(program, (0, 1, 2, 10, 20, 40)) == (
        SweepPoint(0, 1.0, 1.0),
        SweepPoint(1, 1.0, 1.0),
        SweepPoint(2, 1.0, 1.0),
        SweepPoint(10, 100 / (50 + 90), 1.0),
        SweepPoint(20, 100 / (100 + 90), 100 / 160),
        SweepPoint(40, 100 / (200 + 120), 100 / 320),
    )


def test_kernels_without_ops_or_without_bytes():
    (point,) = sweep(Sequence((Cost(0, 5), Cost(100, 0))), [4])
    assert point == SweepPoint(4, 100 / 120, 1.0)


@pytest.mark.parametrize("graph", [convfirst(128, 64, 64, 32, 6), mbconv(128, 8, 8, 256, 4)], ids=lambda g: g.name)
def test_agrees_with_the_waterline_of_each_processor(graph):
    for lower in (layerwise, block_fused):
        program = lower(graph)
        points = sweep(program, [processor.op_byte for processor in PROCESSORS.values()])
        for processor, point in zip(PROCESSORS.values(), points, strict=True):
            line = analyze(program, processor)
            assert point.waterline_efficiency == pytest.approx(line.max_efficiency)
            assert point.roofline_efficiency == pytest.approx(line.mediant_efficiency)


def test_the_range_of_the_figures():
    points = sweep(layerwise(mbconv(128, 16, 16, 128, 4)))
    assert [point.op_byte for point in points] == list(OP_BYTES) == list(range(0, 601, 5))
    assert points[0] == SweepPoint(0, 1.0, 1.0)
    for before, after in pairwise(points):
        assert after.waterline_efficiency <= before.waterline_efficiency
        assert after.waterline_efficiency <= after.roofline_efficiency + 1e-12 <= 1 + 2e-12


@pytest.mark.parametrize("op_byte", [-1, math.inf, math.nan])
def test_ratios_that_no_processor_has(op_byte):
    with pytest.raises(ValueError, match="finite number of at least 0"):
        sweep(layerwise(convfirst(1, 8, 8, 16, 2)), [op_byte])


@pytest.mark.parametrize("kernels", [(), (Cost(0, 8),)])
def test_programs_without_ops(kernels):
    with pytest.raises(ValueError, match="without OPs"):
        sweep(Sequence(kernels))

import csv
import math
from dataclasses import dataclass
from pathlib import Path

import pytest

from fusion.planner.blocks import convfirst, mbconv
from fusion.planner.layer_kind import LayerKind
from fusion.planner.lower import block_fused, layerwise
from fusion.planner.processor import PROCESSORS, get_processor
from fusion.planner.waterline import analyze, kernel_bound

PAPER = Path(__file__).parents[2] / "bench" / "paper"
UNIT = get_processor("a5000").with_ceilings(peak_ops=10.0, bandwidth=2.0)


@dataclass(frozen=True)
class Cost:
    name: str
    ops_count: int
    bytes: int
    layer_kind: LayerKind = LayerKind.OTHER


@dataclass(frozen=True)
class Sequence:
    kernels: tuple[Cost, ...]


def figure_rows():
    with open(PAPER / "fig8_fig12_waterline.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("lower, column", [(layerwise, "layerwise_us"), (block_fused, "fused_us")])
@pytest.mark.parametrize(
    "row", figure_rows(), ids=lambda row: "-".join(row[key] for key in ("block", "channels", "alpha", "hw"))
)
def test_minimum_latencies_of_figures_8_and_12(row, lower, column):
    block = {"convfirst": convfirst, "mbconv": mbconv}[row["block"]]
    graph = block(128, int(row["hw"]), int(row["hw"]), int(row["channels"]), int(row["alpha"]))
    assert analyze(lower(graph), "a5000").min_latency * 1e6 == pytest.approx(float(row[column]), abs=0.5)


def test_fused_mbconv_ops_by_hand():
    channels, hidden, squeeze, pixels = 128, 512, 32, 128 * 16 * 16
    ops = 2 * pixels * (2 * channels * hidden + 72 * hidden) + 2 * pixels * hidden + 4 * 128 * hidden * squeeze
    assert block_fused(mbconv(128, 16, 16, channels, 4)).ops_count == ops


def test_bound_of_one_kernel():
    memory = kernel_bound(Cost("copy", 10, 8), UNIT)
    assert memory.is_memory_bound
    assert (memory.min_latency, memory.intensity, memory.attainable_ops, memory.max_efficiency) == (4, 1.25, 2.5, 0.25)
    compute = kernel_bound(Cost("product", 100, 10), UNIT)
    assert not compute.is_memory_bound
    assert (compute.min_latency, compute.attainable_ops, compute.max_efficiency) == (10, 10, 1)
    assert kernel_bound(Cost("resident", 100, 0), UNIT).intensity == math.inf


def test_totals_by_hand():
    line = analyze(Sequence((Cost("copy", 10, 8), Cost("product", 90, 2))), UNIT)
    assert (line.ops_count, line.bytes, line.min_latency) == (100, 10, 13)
    assert line.max_efficiency == pytest.approx(10 / 13)
    assert line.mediant_intensity == 10
    assert line.mediant_efficiency == 1
    assert line.memory_bound_share == pytest.approx(4 / 13)


def test_fusion_gain_by_hand():
    line = analyze(Sequence((Cost("copy", 10, 8), Cost("product", 60, 2))), UNIT)
    assert line.min_latency == 10
    assert line.fusion_gain(0) == pytest.approx(1 / (1 - 0.4 + 0.1))
    assert line.fusion_gain(1) == 1


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("graph", [convfirst(128, 64, 64, 32, 6), mbconv(128, 8, 8, 256, 4)], ids=lambda g: g.name)
def test_the_mediant_never_underestimates(graph, processor):
    for lower in (layerwise, block_fused):
        line = analyze(lower(graph), processor)
        assert 0 < line.max_efficiency <= line.mediant_efficiency + 1e-12 <= 1 + 2e-12


def test_prints_a_row_per_kernel_and_the_total():
    lines = str(analyze(layerwise(convfirst(128, 64, 64, 32, 6)), "a5000")).splitlines()
    assert "A5000" in lines[0]
    assert [line.split()[0] for line in lines[2:]] == ["conv", "expand", "project", "total"]
    assert lines[2].endswith("memory")
    assert "1188." in lines[-1] or "1187." in lines[-1]


def test_errors():
    with pytest.raises(ValueError, match="at least one kernel"):
        analyze(Sequence(()), "a5000")
    with pytest.raises(ValueError, match="'tpu' is unknown"):
        analyze(layerwise(convfirst(1, 8, 8, 16, 2)), "tpu")

import csv
from pathlib import Path

import pytest
import torch

from fusion.bench.network_build import count_ops, network_units
from fusion.bench.network_limit import network_limit_ms, network_ops, network_parts, runs_of_equal_parts
from fusion.fusing import fuse
from fusion.modules import FusedBlock
from fusion.planner.plan import block_shape
from fusion.planner.processor import get_processor
from models import create_model
from models.convfirstnet import CONFIGS

LAYERS_CSV = Path(__file__).parents[2] / "bench" / "paper" / "tables5to8_layers.csv"
H200 = get_processor("h200")


@pytest.mark.parametrize(
    "model, limit_ms",
    [
        ("convfirstnet_pico", 0.338),
        ("convfirstnet_nano", 0.652),
        ("convfirstnet_tiny", 1.129),
        ("convfirstnet_small", 1.861),
    ],
)
def test_limits_at_790_tflops_and_4300_gbs(model, limit_ms):
    assert (H200.peak_ops, H200.bandwidth) == (790e12, 4.3e12)
    parts = network_parts(CONFIGS[model], batch=128, size=256)
    # The published limits count the map that the head pools; here it stays in registers: 2 % of Pico's limit.
    assert network_limit_ms(parts, H200) == pytest.approx(limit_ms, rel=0.02)
    assert network_limit_ms(parts, H200) < limit_ms


def test_a_part_moves_its_input_weights_and_output_and_nothing_else():
    stem, block, *_, head, classifier = network_parts(CONFIGS["convfirstnet_small"], batch=2, size=64)
    assert stem.bytes == 2 * (2 * 64 * 64 * 3 + 32 * 3 * 9 + 2 * 32 * 32 * 32)
    assert block.bytes == 2 * (2 * 2 * 32 * 32 * 32 + 32 * 8 * 9 + 2 * 32 * 96)
    assert head.bytes == 2 * (2 * 2 * 2 * 256 + 256 * 1280 + 2 * 1280)
    assert classifier.bytes == 2 * (2 * 1280 + 1280 * 1000 + 2 * 1000)
    assert [part.name for part in (stem, block, head, classifier)] == ["stem", "stages.0.0", "head", "classifier"]
    assert (stem.input_shape, head.input_shape, classifier.input_shape) == ((2, 3, 64, 64), (2, 256, 2, 2), (2, 1280))


@pytest.mark.parametrize("model", sorted(CONFIGS))
def test_runs_are_the_rows_of_tables_5_to_8(model):
    with LAYERS_CSV.open() as file:
        rows = [row for row in csv.DictReader(file) if f"convfirstnet_{row['model']}" == model]
    runs = runs_of_equal_parts(network_parts(CONFIGS[model], batch=1, size=256))
    assert [run[0].kind for run in runs[len(rows) :]] == ["head", "classifier"]
    for run, row in zip(runs, rows, strict=False):
        part = run[0]
        assert (part.kind, len(run)) == (row["block"].lower(), int(row["depth"]))
        assert part.input_shape[1:] == (int(row["in_channels"]), int(row["height"]), int(row["width"]))
        assert (part.stride, part.out_channels) == (int(row["stride"]), int(row["out_channels"]))
        assert network_ops(run) / 1e6 == pytest.approx(float(row["total_mops"]), rel=1e-3, abs=0.05)


def test_parts_count_the_same_ops_as_the_layers_of_the_model():
    with torch.device("meta"):
        model = create_model("convfirstnet_nano").eval()
        image = torch.empty(1, 3, 96, 96)
    assert network_ops(network_parts(CONFIGS["convfirstnet_nano"], 1, 96)) == count_ops(model, image)


@pytest.mark.parametrize("batch, size", [(2, 64), (1, 72)])
def test_parts_are_those_of_the_fused_network(batch, size):
    """What is tuned ahead must be what the fused network asks for."""
    model = create_model("convfirstnet_pico").eval()
    (first, *units) = network_units(fuse(model))
    units = [first.stem, first.block, *units]
    parts = network_parts(CONFIGS["convfirstnet_pico"], batch, size)
    assert len(units) == len(parts)
    assert sum(isinstance(unit, FusedBlock) for unit in units) == len(parts) - 1, "all but the classifier"
    for unit, part in zip(units, parts, strict=True):
        if isinstance(unit, FusedBlock):
            n, channels, height, width = part.input_shape
            graph = unit.graph(n, height, width, channels, torch.float16)
            assert block_shape(graph) == block_shape(part.graph), part.name


def test_sizes_that_are_none():
    with pytest.raises(ValueError, match="must be a positive integer"):
        network_parts(CONFIGS["convfirstnet_pico"], batch=0, size=256)

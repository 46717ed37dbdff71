"""The paper's numbers in the code are those of bench/paper."""

import csv
from dataclasses import astuple
from pathlib import Path

import pytest

from fusion.bench.paper_networks import PAPER_BLOCK_EFFICIENCY, PAPER_NETWORKS, projected_ms

PAPER = Path(__file__).parents[2] / "bench" / "paper"
TABLE4_NAMES = {
    "convnext_femto_288": "convnext_femto",
    "convnext_nano_288": "convnext_nano",
    "convnext_tiny": "convnext_tiny",
    "convnext_small_288": "convnext_small",
    "efficientnet_b1": "efficientnet_b1",
    "efficientnet_b3": "efficientnet_b3",
    "efficientnet_b5": "efficientnet_b5",
    "efficientnetv2_s": "tf_efficientnetv2_s",
}


def rows(name):
    with (PAPER / name).open() as file:
        return list(csv.DictReader(file))


def test_table_4():
    found = {row["model"]: row for row in rows("table4_networks.csv")}
    for name, model in TABLE4_NAMES.items():
        row, paper = found[name], PAPER_NETWORKS[model]
        keys = ("latency_ms", "pct_peak", "top1", "macs_g")
        assert astuple(paper) == tuple(float(row[key]) for key in keys)
        # Latencies are rounded to 0.1 ms.
        assert paper.images_per_s == pytest.approx(float(row["fps"]), rel=0.005)


def test_table_9():
    for row in rows("table9_projection.csv"):
        paper = PAPER_NETWORKS[f"convfirstnet_{row['model']}"]
        assert paper.latency_ms == float(row["batch_ms"])
        assert paper.pct_peak == float(row["pct_peak"])
        assert paper.top1 == float(row["top1"])
        assert paper.macs_g == float(row["macs_g"])


def test_tables_5_to_8():
    layers = rows("tables5to8_layers.csv")
    for model, efficiencies in PAPER_BLOCK_EFFICIENCY.items():
        of_model = [float(row["pct_peak"]) for row in layers if f"convfirstnet_{row['model']}" == model]
        assert list(efficiencies) == of_model


def test_the_projection_on_the_papers_gpu_is_its_own():
    for row in rows("table9_projection.csv"):
        ops = 2e9 * float(row["batch_macs_g"])
        ms = projected_ms(f"convfirstnet_{row['model']}", 128, 256, "float16", ops, 1e12 * float(row["device_tflops"]))
        assert ms == pytest.approx(float(row["batch_ms"]), rel=1e-3)


@pytest.mark.parametrize(
    "case",
    [
        ("convfirstnet_pico", 64, 256, "float16"),
        ("convfirstnet_pico", 128, 224, "float16"),
        ("convfirstnet_pico", 128, 256, "bfloat16"),
        ("convnext_nano", 128, 256, "float16"),
    ],
)
def test_nothing_else_is_projected(case):
    assert projected_ms(*case, 10**9, 1e12) is None

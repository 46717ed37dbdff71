import pytest

from fusion.bench.network_case import CONVFIRSTNETS, NetworkCase
from fusion.bench.network_limit import network_parts, runs_of_equal_parts
from fusion.bench.network_row import network_row
from fusion.bench.network_table import comparisons, print_networks
from fusion.planner.processor import get_processor
from models.convfirstnet import CONFIGS

H200 = get_processor("h200")
META = {
    "timed": True,
    "device": "NVIDIA H200",
    "processor": "NVIDIA H200",
    "dtype": "float16",
    "peak_tflops": 790.0,
    "bandwidth_tbs": 4.3,
    "ceilings_source": "measured",
}
FOUND = {
    "eager_ms": 11.0,
    "inductor_ms": 5.5,
    "fused_ms": 0.5,
    "error": 1e-3,
    "eager_error": 2e-3,
    "agreement": 98.5,
    "eager_agreement": 97.5,
    "agreement_images": 1000,
    "top1_classes": 400,
    "eager_mb": 900.0,
    "inductor_mb": 500.0,
    "fused_mb": 300.0,
    "left_eager": {},
}


def own_row(model="convfirstnet_pico", batch=128, size=256, **found):
    case = NetworkCase(model, batch, size)
    return network_row(case, H200, network_parts(CONFIGS[model], batch, size), {**FOUND, **found})


def rival_row(model="convnext_femto", size=288, inductor_ms=4.0):
    found = {"ops": 333e9, "eager_ms": 10.0, "inductor_ms": inductor_ms, "eager_mb": 700.0, "inductor_mb": 600.0}
    return network_row(NetworkCase(model, 128, size), H200, found=found)


def test_what_follows_from_times():
    row = own_row()
    assert row["speedup"] == 11.0
    assert row["images_per_s"] == pytest.approx(256_000)
    assert row["limit_ms"] == pytest.approx(0.3313, rel=1e-3)
    assert row["pct_limit"] == pytest.approx(100 * row["limit_ms"] / 0.5)
    assert row["pct_peak"] == pytest.approx(100 * 2 * 0.860232192e9 * 128 / 0.5e-3 / 790e12)
    assert row["projected_ms"] == pytest.approx(6.078 * 76.7 / 790, rel=1e-3)
    assert (row["top1"], row["paper_ms"], row["paper_pct_peak"]) == (79.858, 6.078, 47.23)


def test_rivals_are_rows_without_fused_times():
    row = rival_row()
    assert row["fused_ms"] is row["limit_ms"] is row["projected_ms"] is row["speedup"] is row["error"] is None
    assert row["images_per_s"] == 32_000
    assert row["pct_peak"] == pytest.approx(100 * 333e9 / 4e-3 / 790e12)
    assert (row["top1"], row["paper_pct_peak"]) == (78.7, 18.6)
    assert set(row) == set(own_row())
    unknown = rival_row("efficientnetv2_rw_s")
    assert unknown["top1"] is unknown["paper_ms"] is None


def test_other_batches_and_sizes_have_no_projection():
    latency = own_row(batch=1)
    assert latency["projected_ms"] is latency["paper_ms"] is None
    assert latency["top1"] == 79.858
    assert own_row(batch=1, size=512)["top1"] is None


def test_a_failed_network_is_a_row():
    case = NetworkCase("convfirstnet_pico", 128, 256)
    row = network_row(case, H200, network_parts(CONFIGS[case.model], 128, 256), {}, "no answer in 400 s")
    assert row["failed"] == "no answer in 400 s"
    assert row["fused_ms"] is row["images_per_s"] is row["error"] is None
    assert row["limit_ms"] > 0
    print_networks(META, [row, network_row(NetworkCase("convnext_tiny", 128, 288), H200, failed="no")])


def test_tables_of_a_gpu(capsys):
    parts = network_parts(CONFIGS["convfirstnet_pico"], 128, 256)
    blocks = [{"us": 10.0, "kernel": "made_up"} for _ in runs_of_equal_parts(parts)]
    print_networks(META, [own_row(blocks=blocks), rival_row()])
    out = capsys.readouterr().out
    assert "Networks on NVIDIA H200" in out and "790 TFLOP/s and 4.30 TB/s (measured)" in out
    pico, femto = (next(line for line in out.splitlines() if name in line) for name in ("_pico ", "convnext_femto"))
    assert " ".join(pico.split()[3:]) == "11.000 5.500 0.500 11.00x 256000 0.331 66.3 0.590 55.8 47.2 79.9"
    assert " ".join(femto.split()[3:]) == "10.000 4.000 - - 32000 - - - 10.5 18.6 78.7"
    assert "98.5" in out and "1.0e-03" in out and "300" in out
    stage = next(line for line in out.splitlines() if "stages.3.1" in line).split()
    assert stage[:5] == ["stages.3.1", "mbconv", "1", "128x16x16", "128"]
    assert stage[5] == "10" and "46.2" in stage and stage[-2:] == ["0.100", "made_up"]
    assert "together 0.310 ms, the whole network 0.500 ms" in out
    assert "8.00x the images/s of convnext_femto at 288 with Inductor, batch 128 (the paper's projection: 3.8x)" in out


def test_rows_of_blocks():
    parts = network_parts(CONFIGS["convfirstnet_small"], 128, 256)
    runs = runs_of_equal_parts(parts)
    rows = own_row("convfirstnet_small", blocks=[{"us": 100.0, "kernel": "made_up"} for _ in runs])["blocks"]
    assert sum(row["depth"] * row["limit_us"] for row in rows) / 1e3 == pytest.approx(1.8576, rel=1e-3)
    stage = next(row for row in rows if row["name"] == "stages.3.1")
    assert stage["pct_limit"] == pytest.approx(stage["limit_us"])
    assert stage["paper_pct_peak"] == 51.0
    assert stage["projected_us"] == pytest.approx(stage["ops"] / (0.51 * 790e6))
    assert rows[-1]["block"] == "classifier" and rows[-1]["paper_pct_peak"] is None


def test_comparisons_need_both_networks_at_one_batch():
    small, rival = own_row("convfirstnet_small"), rival_row("convnext_small", inductor_ms=20.0)
    (line,) = comparisons([small, rival])
    assert "40.00x" in line and "(the paper's projection: 4.2x)" in line
    assert not comparisons([small]) and not comparisons([own_row("convfirstnet_small", batch=8), rival])
    assert not comparisons([small, rival_row("convnext_small", inductor_ms=None)])


def test_all_convfirstnets_are_known():
    assert sorted(CONVFIRSTNETS) == sorted(CONFIGS)

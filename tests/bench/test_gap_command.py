"""`python -m fusion.bench gap`: the paper's figures 1 and 17 from its table, and saved reports."""

import argparse
import csv
import json
from pathlib import Path

import pytest

from fusion.bench import gap_command
from fusion.bench.paper_networks import PAPER_NETWORKS

ROOT = Path(__file__).resolve().parents[2]
TABLE4 = ROOT / "bench" / "paper" / "table4_networks.csv"
ACCURACIES = ROOT / "bench" / "paper" / "accuracies.csv"
RESULTS = ROOT / "bench" / "results"
NETWORK = RESULTS / "h100" / "network.json"
PEAK = json.loads(NETWORK.read_text())["meta"]["peak_tflops"]


def run(*arguments):
    parser = argparse.ArgumentParser()
    gap_command.register(parser.add_subparsers())
    args = parser.parse_args(["gap", *map(str, arguments)])
    return args.func(args)


def rows_of(tmp_path, *arguments):
    assert run(*arguments, "--json", tmp_path / "gap.json") == 0
    return json.loads((tmp_path / "gap.json").read_text())["rows"]


def table4():
    with TABLE4.open() as file:
        return list(csv.DictReader(file))


def test_computational_efficiency_is_the_papers(tmp_path, capsys):
    rows = rows_of(tmp_path, TABLE4)
    assert len(rows) == len(table4()) == 15
    for row, paper in zip(rows, table4(), strict=True):
        assert row["efficiency_pct"] == pytest.approx(float(paper["pct_peak"]), abs=0.5), row["model"]
        assert row["actual_ms"] == pytest.approx(float(paper["latency_ms"]), abs=0.06)
        assert row["macs_g"] == pytest.approx(float(paper["macs_g"]), abs=0.05)
        assert row["ideal_ms"] == pytest.approx(2 * row["macs_g"] * 128 / 76.7)
        assert row["top1"] == float(paper["top1"])
        assert row["engine"] == ("inductor" if paper["engine"] == "inductor" else "projected")
    out = capsys.readouterr().out
    assert "NVIDIA RTX A5000: 76.7 TFLOP/s, 0.48 TB/s (the paper's ceilings" in out
    assert "fused, projected" in out, "the paper projects ConvFirstNet's latencies"


def test_networks_go_by_the_names_of_the_models_here_and_of_timm(tmp_path):
    models = {row["model"] for row in rows_of(tmp_path, TABLE4)}
    assert set(PAPER_NETWORKS) <= models
    assert {"convnext_pico", "efficientnet_b2", "efficientnet_b4"} == models - set(PAPER_NETWORKS)


FIGURE1 = {"convnext_femto", "convnext_pico", "convnext_nano", "convnext_tiny", "convnext_small"}


@pytest.mark.parametrize(
    "models, expected",
    [
        ("efficientnet,convnext", FIGURE1 | {f"efficientnet_b{n}" for n in range(1, 6)}),
        ("convfirst,convnext", FIGURE1 | {f"convfirstnet_{n}" for n in ("pico", "nano", "tiny", "small")}),
    ],
)
def test_figures_1_and_17(tmp_path, models, expected):
    picture = tmp_path / "figure.svg"
    rows = rows_of(tmp_path, TABLE4, "--models", models, "--plot", picture)
    assert {row["model"] for row in rows} == expected
    text = picture.read_text(encoding="utf-8")
    assert "Efficiency gap on NVIDIA RTX A5000, batch 128" in text and "76.7 TFLOP/s and 0.48 TB/s" in text
    for row in rows:
        assert f"<!-- {row['efficiency_pct']:.0f}% -->" in text
    assert ("fused, projected" in text) is ("convfirst" in models)


def test_a_report_of_network(tmp_path, capsys):
    rows = rows_of(tmp_path, NETWORK)
    report = json.loads(NETWORK.read_text())
    by_name = {(row["model"], row["engine"]): row for row in rows}
    for row in report["rows"]:
        engine = "fused" if row["fused_ms"] is not None else "inductor"
        if row["top1"] is None:
            assert (row["model"], engine) not in by_name
            continue
        found = by_name[row["model"], engine]
        assert found["efficiency_pct"] == pytest.approx(row["pct_peak"])
        assert (found["top1"], found["size"], found["batch"]) == (row["top1"], row["size"], row["batch"])
    assert {row["engine"] for row in rows} == {"eager", "inductor", "fused"}
    out = capsys.readouterr().out
    assert f"NVIDIA H100 80GB HBM3: {PEAK:.4g} TFLOP/s, " in out and "TB/s (measured)" in out
    assert f"left out: efficientnetv2_rw_s of {NETWORK}: its top-1 is unknown: give it with --accuracies" in out


def test_accuracies_are_given_and_overridden(tmp_path, capsys):
    (tmp_path / "mine.csv").write_text("model,top1\nefficientnetv2_rw_s,83.8\nconvnext_tiny,80\n")
    rows = rows_of(tmp_path, NETWORK, "--accuracies", tmp_path / "mine.csv")
    found = {row["model"]: (row["top1"], row["top1_source"]) for row in rows}
    assert found["efficientnetv2_rw_s"] == (83.8, "mine.csv")
    assert found["convnext_tiny"] == (80.0, "mine.csv")
    assert found["convnext_small"] == (83.7, "the paper")
    assert "left out" not in capsys.readouterr().out


def test_the_papers_accuracies_as_a_file():
    with ACCURACIES.open() as file:
        found = {row["model"]: float(row["top1"]) for row in csv.DictReader(file)}
    assert found.items() >= {name: paper.top1 for name, paper in PAPER_NETWORKS.items()}.items()
    of_table = {gap.model: gap.top1 for gap in gap_command.read_paper_table(TABLE4, {})}
    assert found == pytest.approx(of_table, abs=0.05)
    assert gap_command.read_accuracies(ACCURACIES)["convnext_tiny"] == (82.7, "accuracies.csv")


def test_a_report_of_compile_takes_the_papers_macs_and_the_planners_peak(tmp_path, capsys):
    rows = rows_of(tmp_path, RESULTS / "h200" / "compile_pico.json")
    assert [row["engine"] for row in rows] == ["eager", "inductor", "fused", "fusion"]
    assert {row["macs_g"] for row in rows} == {0.86}
    assert {row["top1"] for row in rows} == {79.858}
    assert {(row["device"], row["peak_tflops"]) for row in rows} == {("NVIDIA H200", 790.0)}
    assert "NVIDIA H200: 790 TFLOP/s, 4.3 TB/s (measured: 8192x8192x8192" in capsys.readouterr().out


def test_a_report_of_compile_takes_the_peak_measured_on_the_same_gpu(tmp_path, capsys):
    rows = rows_of(tmp_path, RESULTS / "h100" / "compile_pico.json", NETWORK, RESULTS / "h200" / "compile_pico.json")
    peaks = {(Path(row["report"]).parts[-2:], row["peak_tflops"]) for row in rows}
    assert peaks == {
        (("h100", "compile_pico.json"), PEAK),
        (("h100", "network.json"), PEAK),
        (("h200", "compile_pico.json"), 790.0),
    }
    assert capsys.readouterr().out.count(" TFLOP/s, ") == 3, "the ceilings of each report"


def test_networks_of_unknown_size_are_left_out_with_a_reason(tmp_path, capsys):
    report = RESULTS / "h200" / "compile.json"
    with pytest.raises(ValueError, match="nothing to compare in"):
        run(report)
    out = capsys.readouterr().out
    written = json.loads(report.read_text())
    assert out.count("left out: ") == out.count("its OPs are unknown") == len(written["rows"])
    assert "convfirst_uir" in out and "python -m fusion.bench network" in out
    for row in written["rows"]:
        row["ops"] = 2e9 * 128 * 0.5
    (tmp_path / "compile.json").write_text(json.dumps(written))
    (tmp_path / "top1.csv").write_text("model,top1\nconvfirst_uir,75.5\n")
    rows = rows_of(tmp_path, tmp_path / "compile.json", "--accuracies", tmp_path / "top1.csv")
    assert {(row["model"], row["macs_g"], row["top1"]) for row in rows} == {("convfirst_uir", 0.5, 75.5)}


def test_macs_and_accuracies_of_another_image_size_are_not_taken(tmp_path, capsys):
    written = json.loads((RESULTS / "h200" / "compile_pico.json").read_text())
    written["rows"].append({**written["rows"][0], "size": 224})
    (tmp_path / "compile.json").write_text(json.dumps(written))
    assert {row["size"] for row in rows_of(tmp_path, tmp_path / "compile.json")} == {256}
    assert "its OPs are unknown" in capsys.readouterr().out


def test_a_network_that_failed(tmp_path, capsys):
    written = json.loads(NETWORK.read_text())
    row = written["rows"][0]
    row.update(eager_ms=None, inductor_ms=None, fused_ms=None, failed="fused: out of memory")
    (tmp_path / "network.json").write_text(json.dumps(written))
    assert run(tmp_path / "network.json") == 0
    assert "it has no latency: fused: out of memory" in capsys.readouterr().out


def test_several_gpus_in_one_picture(tmp_path):
    reports = [NETWORK, RESULTS / "h200" / "compile_small.json"]
    assert run(*reports, "--models", "convfirst", "--plot", tmp_path / "gap.svg") == 0
    text = (tmp_path / "gap.svg").read_text(encoding="utf-8")
    assert "Efficiency gap on NVIDIA H100 80GB HBM3 and NVIDIA H200" in text
    assert "NVIDIA H200 790 TFLOP/s" in text and f"{PEAK:.4g} TFLOP/s" in text
    assert "ideal latency of 128 images" not in text, "the second axis is for one peak"


@pytest.mark.parametrize("suffix, magic", [(".png", b"\x89PNG"), (".pdf", b"%PDF")])
def test_formats(tmp_path, suffix, magic):
    picture = tmp_path / "new" / f"gap{suffix}"
    assert run(NETWORK, "--models", "convfirstnet_small", "--plot", picture) == 0
    assert picture.read_bytes().startswith(magic)


def test_the_json_says_how_it_came_about(tmp_path):
    run(NETWORK, "--json", tmp_path / "gap.json")
    meta = json.loads((tmp_path / "gap.json").read_text())["meta"]
    assert meta["device"] == "cpu" and "not timed" in meta["protocol"] and meta["reports"] == [str(NETWORK)]


@pytest.mark.parametrize(
    "name, contents, message",
    [
        ("a.csv", "model,top1\na,1\n", "lacks the columns engine, macs_g, fps"),
        ("a.csv", "model,engine,macs_g,fps,top1\na,tvm,1,1,1\n", "engine 'tvm' is unknown, use inductor or fused"),
        (
            "a.csv",
            "model,engine,macs_g,fps,top1\na,fused,1,1,101\n",
            "top1 of a is '101', no positive number up to 100",
        ),
        ("a.json", "{}", "has no meta data and rows; give a report that `network` or `compile` wrote"),
        ("a.json", '{"meta": {}, "rows": [{"block": "ffn"}]}', "has rows without model, batch"),
        (
            "a.json",
            '{"meta": {"device": "cpu", "timed": false}, "rows": [{"model": "a", "batch": 2}]}',
            "was written without a GPU",
        ),
        (
            "a.json",
            '{"meta": {"device": "AMD Instinct", "timed": true}, "rows": [{"model": "a", "batch": 2}]}',
            "does not say what AMD Instinct reaches at most",
        ),
    ],
)
def test_other_files(tmp_path, name, contents, message):
    (tmp_path / name).write_text(contents)
    with pytest.raises(ValueError, match=message):
        run(tmp_path / name)


def test_other_arguments(tmp_path, capsys):
    with pytest.raises(ValueError, match="no network's name begins with 'vit'; there are convnext_femto"):
        run(TABLE4, "--models", "convnext,vit")
    with pytest.raises(SystemExit):
        run(TABLE4, "--models", "convnext,")
    assert "has an empty name" in capsys.readouterr().err
    with pytest.raises(OSError, match="cannot read"):
        run(TABLE4, "--accuracies", tmp_path / "none.csv")
    (tmp_path / "top1.csv").write_text("network,accuracy\na,1\n")
    with pytest.raises(ValueError, match="lacks the columns model, top1; its first line must name model,top1"):
        run(TABLE4, "--accuracies", tmp_path / "top1.csv")
    with pytest.raises(ValueError, match=r"must end in one of \.png"):
        run(TABLE4, "--plot", tmp_path / "gap.jpg")

"""`python -m fusion.bench bars`: the paper's figures 13 and 14 from its tables, and saved reports."""

import argparse
import csv
import json
from pathlib import Path

import pytest

from fusion.bench import bars_command

ROOT = Path(__file__).resolve().parents[2]
TABLES = {"convfirst": "table1_convfirst.csv", "mbconv": "table2_mbconv.csv"}
RESULTS = ROOT / "bench" / "results" / "h200"


def run(*arguments):
    parser = argparse.ArgumentParser()
    bars_command.register(parser.add_subparsers())
    args = parser.parse_args(["bars", *map(str, arguments)])
    return args.func(args)


@pytest.mark.parametrize("block, name", TABLES.items())
def test_the_papers_tables(block, name, capsys):
    path = ROOT / "bench" / "paper" / name
    meta, rows = bars_command.read_paper_table(path)
    with path.open() as file:
        table = list(csv.DictReader(file))
    assert (meta["peak_tflops"], meta["bandwidth_tbs"], meta["batch"]) == (76.7, 0.48, 128)
    assert [(row["block"], row["channels"], row["hw"]) for row in rows] == [
        (block, int(paper["channels"]), int(paper["height"])) for paper in table
    ]
    for row, paper in zip(rows, table, strict=True):
        fused = row["ops"] / row["fused_us"] / 1e6
        assert fused == pytest.approx(float(paper["fused_tflops"]))
        assert 100 * fused / meta["peak_tflops"] == pytest.approx(float(paper["fused_pct_peak"]), abs=0.15)
        assert row["inductor_us"] / row["fused_us"] == pytest.approx(float(paper["speedup"]), abs=0.1)
        assert row["limit_us"] < row["fused_us"], "nothing is faster than its limit"
        assert row["eager_us"] is None
    assert run(path) == 0
    out = capsys.readouterr().out
    assert "NVIDIA RTX A5000, batch 128, float16; limits at 76.7 TFLOP/s and 0.48 TB/s" in out
    assert "eager" not in out and f"{float(table[0]['fused_tflops']):.1f}" in out


def test_times_of_a_block_are_those_of_the_paper():
    """Table 1 has milliseconds of a block, table 2 of a stage of eight."""
    for name, depth in (("table1_convfirst.csv", 1), ("table2_mbconv.csv", 8)):
        path = ROOT / "bench" / "paper" / name
        with path.open() as file:
            for row, paper in zip(bars_command.read_paper_table(path)[1], csv.DictReader(file), strict=True):
                assert row["fused_us"] == pytest.approx(1e3 * float(paper["fused_ms"]) / depth, rel=0.02)


def test_a_memory_bound_block_has_a_low_limit():
    _, rows = bars_command.read_paper_table(ROOT / "bench" / "paper" / TABLES["convfirst"])
    limits = [row["ops"] / row["limit_us"] / 1e6 for row in rows]
    assert limits[0] == pytest.approx(11_274_289_152 / 134_223_104 * 0.48, rel=1e-3), "OP/byte times bandwidth"
    assert limits[-1] == pytest.approx(76.7)


@pytest.mark.parametrize("name", ["convfirst", "mbconv", "ffn"])
def test_saved_reports(name, tmp_path, capsys):
    path = RESULTS / f"{name}.json"
    assert run(path, "--plot", tmp_path / "bars.svg") == 0
    out = capsys.readouterr().out
    report = json.loads(path.read_text())
    for row in report["rows"]:
        assert f"{row['tflops']:.1f}" in out and f"{row['speedup']:.1f}x" in out and f"{row['pct_limit']:.1f}" in out
    assert "NVIDIA H200" in out and "eager TFLOP/s" in out
    assert f"{report['meta']['peak_tflops']:.4g} TFLOP/s" in (tmp_path / "bars.svg").read_text(encoding="utf-8")


def test_a_report_without_timings_is_predicted(tmp_path, capsys):
    report = json.loads((RESULTS / "mbconv.json").read_text())
    report["meta"]["timed"] = False
    for row in report["rows"]:
        row["fused_us"] = row["inductor_us"] = row["eager_us"] = None
    (tmp_path / "mbconv.json").write_text(json.dumps(report))
    assert run(tmp_path / "mbconv.json", "--plot", tmp_path / "bars.svg") == 0
    out = capsys.readouterr().out
    assert "PREDICTED, NOT TIMED" in out and "predicted TFLOP/s" in out and "Inductor" not in out.split("\n", 1)[1]
    assert "Predicted, not timed" in (tmp_path / "bars.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize("suffix, magic", [(".png", b"\x89PNG"), (".pdf", b"%PDF")])
def test_formats(tmp_path, suffix, magic):
    picture = tmp_path / "new" / f"figure14{suffix}"
    assert run(ROOT / "bench" / "paper" / TABLES["mbconv"], "--plot", picture) == 0
    assert picture.read_bytes().startswith(magic)


def test_the_picture_of_figure_13(tmp_path):
    run(ROOT / "bench" / "paper" / TABLES["convfirst"], "--plot", tmp_path / "figure13.svg")
    text = (tmp_path / "figure13.svg").read_text(encoding="utf-8")
    assert "Throughput of ConvFirst blocks on NVIDIA RTX A5000" in text and "76.7 TFLOP/s and 0.48 TB/s" in text
    for speedup in ("14.2×", "9.9×", "13.2×", "8.6×", "7.0×", "8.4×", "6.8×", "4.5×"):
        assert f"<!-- {speedup} -->" in text
    assert "% of peak" in text and "eager" not in text


@pytest.mark.parametrize(
    "name, contents, message",
    [
        ("a.csv", "channels,alpha\n1,2\n", "lacks the columns height, width, inductor_tflops, fused_tflops"),
        ("a.csv", "channels,alpha,height,width,inductor_tflops,fused_tflops\n", "has no rows"),
        (
            "a.csv",
            "channels,alpha,height,width,inductor_tflops,fused_tflops\n16,3,128,128,fast,9\n",
            "inductor_tflops of 16 is 'fast', no positive number",
        ),
        (
            "a.csv",
            "channels,alpha,height,width,inductor_tflops,fused_tflops\n16,3,128,64,1,9\n",
            "blocks are of square images, not of 128 x 64",
        ),
        ("a.json", "nonsense", "is not JSON"),
        ("a.json", "[]", "has no meta data and rows"),
        ("a.json", '{"meta": {}, "rows": []}', "has no rows"),
        ("a.json", '{"meta": {}, "rows": [{"block": "ffn"}]}', "has rows without channels, alpha"),
    ],
)
def test_other_files(tmp_path, name, contents, message):
    (tmp_path / name).write_text(contents)
    with pytest.raises(ValueError, match=message):
        run(tmp_path / name)


def test_what_cannot_be_read_or_written(tmp_path):
    with pytest.raises(OSError, match="cannot read"):
        run(tmp_path / "none.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not text"):
        run(tmp_path / "binary.json")
    with pytest.raises(ValueError, match=r"must end in one of \.png"):
        run(RESULTS / "ffn.json", "--plot", tmp_path / "bars.jpg")

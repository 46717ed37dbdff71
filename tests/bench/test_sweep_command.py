import json

import pytest

from fusion.bench.__main__ import main


def test_rows_table_and_picture(tmp_path, capsys):
    path, picture = tmp_path / "sweep.json", tmp_path / "sweep.svg"
    arguments = ["sweep", "64,6,32", "mbconv:128,4,16", "--op-byte", "0:600:100"]
    assert main([*arguments, "--json", str(path), "--plot", str(picture)]) == 0
    report = json.loads(path.read_text())
    rows = report["rows"]
    curves = {(row["model"], row["program"]) for row in rows}
    assert curves == {(m, p) for m in ("convfirst:64,6,32", "mbconv:128,4,16") for p in ("layerwise", "fused")}
    assert [row["op_byte"] for row in rows[:7]] == list(range(0, 601, 100))
    for row in rows:
        assert 0 < row["waterline_pct"] <= row["roofline_pct"] <= 100
        assert row["op_byte"] or row["waterline_pct"] == 100
    # By hand: one kernel, so that both models agree, and intensity / op:byte where it is memory-bound.
    network = report["meta"]["networks"][0]
    fused = [row for row in rows if (row["model"], row["program"]) == ("convfirst:64,6,32", "fused")]
    for row in fused:
        bound = 100 * network["fused_mediant_intensity"] / row["op_byte"] if row["op_byte"] else 100
        assert row["waterline_pct"] == pytest.approx(row["roofline_pct"]) == pytest.approx(min(100, bound))
    assert "maximum efficiency" in picture.read_text(encoding="utf-8")
    assert "mbconv:128,4,16, layer by layer" in capsys.readouterr().out


def test_one_program_in_panels(tmp_path):
    path, picture = tmp_path / "sweep.json", tmp_path / "sweep.png"
    arguments = ["sweep", "64,6,32/fused", "32,3,64/fused", "--panels", "--op-byte", "0:300"]
    assert main([*arguments, "--json", str(path), "--plot", str(picture)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert {row["program"] for row in rows} == {"fused"} and len(rows) == 2 * 61
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["64,6,32", "--op-byte", "600"], "'600' is not FROM:TO[:STEP]"),
        (["64,6,32", "--op-byte", "600:0"], "fewer than two ratios"),
        (["64,6,32", "--op-byte", "0:600:0"], "fewer than two ratios"),
        (["ffn:64,4,16/fused"], "no block of ffn:64,4,16 is fused on NVIDIA RTX A5000"),
        (["64,6,32/planned"], "no program is named 'planned', use layerwise or fused"),
        ([], "the following arguments are required: TARGET"),
    ],
)
def test_errors(arguments, message, capsys):
    try:
        assert main(["sweep", *arguments]) == 2
    except SystemExit as stop:
        assert stop.code == 2
    assert message in capsys.readouterr().err

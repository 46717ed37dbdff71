import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from fusion.bench import blocks
from fusion.bench.__main__ import main
from fusion.bench.blocks import FIGURE8, FIGURE12, PAPER_TABLE1, BlockConfig, PaperResult, parse_block

PAPER = Path(__file__).parents[2] / "bench" / "paper"
KEYS = ["block", "channels", "alpha", "hw", "program", "ops", "bytes", "intensity", "minimum_us"]


def paper_rows(name):
    with open(PAPER / name, newline="") as file:
        return list(csv.DictReader(file))


def test_blocks_of_the_figures():
    rows = paper_rows("fig8_fig12_waterline.csv")
    expected = [BlockConfig(r["block"], int(r["channels"]), int(r["alpha"]), int(r["hw"])) for r in rows]
    assert [*FIGURE8, *FIGURE12] == expected


def test_results_of_table_1():
    columns = ("inductor_tflops", "inductor_pct_peak", "fused_tflops", "fused_pct_peak", "speedup")
    expected = {
        BlockConfig("convfirst", int(r["channels"]), int(r["alpha"]), int(r["height"])): PaperResult(
            *(float(r[column]) for column in columns)
        )
        for r in paper_rows("table1_convfirst.csv")
    }
    assert expected == PAPER_TABLE1
    assert tuple(expected) == blocks.TABLE1


def test_all_numbers_of_figures_8_and_12(tmp_path, capsys):
    path = tmp_path / "waterline.json"
    assert main(["waterline", "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    assert (report["meta"]["peak_tflops"], report["meta"]["bandwidth_tbs"], report["meta"]["batch"]) == (
        76.7,
        0.48,
        128,
    )
    assert all(list(row) == KEYS for row in report["rows"])
    latencies = {tuple(map(str, list(row.values())[:5])): row["minimum_us"] for row in report["rows"]}
    expected = {
        (row["block"], row["channels"], row["alpha"], row["hw"], program): float(row[f"{program}_us"])
        for row in paper_rows("fig8_fig12_waterline.csv")
        for program in ("layerwise", "fused")
    }
    assert len(expected) == 38
    assert latencies == pytest.approx(expected, abs=1)
    assert "5.50x" in capsys.readouterr().out


def test_other_processor_batch_and_blocks(tmp_path):
    path = tmp_path / "waterline.json"
    arguments = ["--processor", "h200", "--batch", "1", "--block", "64,6,32", "--block", "mbconv:128,4,16"]
    assert main(["waterline", *arguments, "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [(row["block"], row["hw"], row["program"]) for row in rows] == [
        ("convfirst", 32, "layerwise"),
        ("convfirst", 32, "fused"),
        ("mbconv", 16, "layerwise"),
        ("mbconv", 16, "fused"),
    ]
    assert rows[1]["intensity"] == rows[1]["ops"] / rows[1]["bytes"]


def test_needs_neither_torch_nor_triton():
    code = (
        "import sys; from fusion.bench.__main__ import main; main(['waterline']); "
        "print({'torch', 'triton', 'numpy', 'matplotlib'} & set(sys.modules), file=sys.stderr)"
    )
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert result.stderr.strip() == "set()"


def test_parse_block():
    assert parse_block("64, 6, 32") == BlockConfig("convfirst", 64, 6, 32)
    assert parse_block("mbconv:128,4,16", blocks.BLOCK_TYPES) == BlockConfig("mbconv", 128, 4, 16)
    assert parse_block(str(FIGURE12[0]), tuple(blocks.BLOCK_TYPES)) == FIGURE12[0]


@pytest.mark.parametrize("text", ["", "64", "64,6", "64,6,32,1", "64,x,32", "64,0,32", "64,-6,32", "64,1.5,32"])
def test_malformed_blocks(text):
    with pytest.raises(ValueError, match=r"is not C,ALPHA,HW: .* for example 64,6,32"):
        parse_block(text)


def test_block_type_that_is_not_supported():
    with pytest.raises(ValueError, match="of type 'mbconv'; supported here: convfirst"):
        parse_block("mbconv:128,4,16")

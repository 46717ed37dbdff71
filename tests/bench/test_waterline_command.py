import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fusion
from fusion.bench import blocks
from fusion.bench.__main__ import main
from fusion.bench.blocks import FIGURE8, FIGURE12, PAPER_TABLE1, BlockConfig, PaperResult, parse_block
from models import create_model

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


def test_networks_and_blocks_as_targets(tmp_path, capsys):
    path, picture = tmp_path / "pico.json", tmp_path / "pico.svg"
    arguments = ["waterline", "pico@64", "--processor", "h200"]
    assert main([*arguments, "--json", str(path), "--plot", str(picture)]) == 0
    report = json.loads(path.read_text())
    meta, rows = report["meta"], report["rows"]
    with torch.device("meta"):
        network = create_model("convfirstnet_pico").eval()
    expected = fusion.waterline(network, torch.empty(128, 3, 64, 64, device="meta"), "h200")
    assert meta["layerwise_max_efficiency_pct"] == pytest.approx(100 * expected.layerwise.max_efficiency)
    assert meta["fused_max_efficiency_pct"] == pytest.approx(100 * expected.fused.max_efficiency)
    assert meta["fused_max_efficiency_pct"] > 2 * meta["layerwise_max_efficiency_pct"]
    assert (meta["model"], meta["batch"], meta["peak_tflops"]) == ("convfirstnet_pico, 64×64", 128, 790.0)
    assert [row["program"] for row in rows].count("fused") == len(expected.fused.kernels)
    assert sum(row["ops"] for row in rows if row["program"] == "layerwise") == expected.layerwise.ops_count
    assert picture.read_bytes().startswith(b"<?xml")
    out = capsys.readouterr().out
    assert "convfirstnet_pico, 64×64, float16, on NVIDIA H200" in out and "stages.3.1 to stages.3.10" in out
    assert "stages.3.1.conv" not in out

    assert main(["waterline", "mbconv:128,4,16", "16,3,128", "--kernels", "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    assert [network["model"] for network in report["meta"]["networks"]] == ["mbconv:128,4,16", "convfirst:16,3,128"]
    names = [row["name"] for row in report["rows"] if row["program"] == "layerwise"]
    assert names == ["expand", "conv", "pool", "squeeze", "excite", "gate", "project", "conv", "expand", "project"]
    microseconds = report["meta"]["networks"][0]["layerwise_minimum_us"]
    assert microseconds == pytest.approx(544, abs=1)
    assert "grouped convolution" in capsys.readouterr().out


def test_only_one_program(tmp_path):
    path = tmp_path / "waterline.json"
    assert main(["waterline", "64,6,32/fused", "64,6,32/layerwise", "16,3,64/fused", "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    assert [row["program"] for row in report["rows"]] == ["fused", *["layerwise"] * 3, "fused"]
    assert [network["model"] for network in report["meta"]["networks"]] == ["convfirst:64,6,32", "convfirst:16,3,64"]


def test_other_ceilings(tmp_path):
    path = tmp_path / "waterline.json"
    assert main(["waterline", "64,6,32", "--peak", "100", "--bandwidth", "1000", "--json", str(path)]) == 0
    meta = json.loads(path.read_text())["meta"]
    assert (meta["peak_tflops"], meta["bandwidth_tbs"], meta["ceilings_source"]) == (100.0, 1.0, "as given")
    assert meta["fused_minimum_us"] == pytest.approx(meta["fused_ops"] / 100e6)


def test_one_figure(tmp_path):
    path, picture = tmp_path / "waterline.json", tmp_path / "figure.png"
    assert main(["waterline", "--figure", "12", "--json", str(path), "--plot", str(picture)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == 20 and {row["block"] for row in rows} == {"mbconv"}
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["pico", "--figure", "8"], "give targets, one table each, or --block"),
        (["64,6"], "block '64,6' is not C,ALPHA,HW"),
        (["ffm:64,6,4"], "of type 'ffm'; supported here: convfirst, ffn, mbconv"),
        (["pico@big"], "write the images' size as a number of pixels"),
        (["pico", "nothing_like_it"], "no network is named 'nothing_like_it'"),
        (["pica"], "no network is named 'pica': did you mean pico"),
        (["pico", "--plot", "pico.jpg"], "must end in one of .png, .svg, .pdf"),
        (["pico", "--batch", "0"], "the batch must be a positive number of images, got 0"),
        (["pico", "--peak", "-1"], "no positive number"),
    ],
)
def test_errors(arguments, message, capsys):
    try:
        assert main(["waterline", *arguments]) == 2
    except SystemExit as stop:
        assert stop.code == 2
    assert message in capsys.readouterr().err


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

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from fusion.bench import intensity_command
from fusion.bench.intensity_command import doubled_channels

KEYS = ["convolution", "channels", "out_channels", "kernel_size", "group_width", "ops", "bytes", "intensity"]


def run(*arguments):
    parser = argparse.ArgumentParser()
    intensity_command.register(parser.add_subparsers(required=True))
    args = parser.parse_args(["intensity", *arguments])
    return args.func(args)


def test_report_and_table(tmp_path, capsys):
    path = tmp_path / "intensity.json"
    assert run("--json", str(path)) == 0
    report = json.loads(path.read_text())
    meta = report["meta"]
    assert (meta["batch"], meta["hw"], meta["dtype"], meta["peak_tflops"]) == (128, 28, "float16", 76.7)
    assert meta["op_byte"] == {"NVIDIA RTX A5000": pytest.approx(159.8, abs=0.05)}
    rows = report["rows"]
    assert all(list(row) == KEYS for row in rows)
    assert len(rows) == 5 * 6 - 1, "16 channels do not divide into groups of 32"
    values = {(row["convolution"], row["channels"]): row["intensity"] for row in rows}
    assert values["dense", 64] == pytest.approx(287.2, abs=0.05)
    assert values["pointwise", 256] == pytest.approx(204.4, abs=0.05)
    assert values["depthwise", 512] == pytest.approx(4.5, abs=0.005)
    assert all(row["intensity"] == row["ops"] / row["bytes"] for row in rows)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Operational intensity in OP/byte, batch 128, 28×28, fp16"
    table = {line.split()[0]: line.split()[1:] for line in lines if line.strip()[:1].isdecimal()}
    assert list(table) == ["16", "32", "64", "128", "256", "512"]
    assert table["16"] == ["71.9", "12.8", "-", "36.0", "4.5"]
    assert table["64"] == ["287.2", "51.2", "143.8", "36.0", "4.5"]
    assert any(line.startswith("memory-bound below 160 OP/byte on NVIDIA RTX A5000") for line in lines)


def test_other_sizes_and_processors(tmp_path, capsys):
    path = tmp_path / "intensity.json"
    sizes = ["--channels", "24:100", "--batch", "1", "--hw", "14"]
    assert run(*sizes, "--processor", "h200", "--processor", "a100", "--json", str(path)) == 0
    report = json.loads(path.read_text())
    assert list(report["meta"]["op_byte"]) == ["NVIDIA H200 SXM5 141 GB", "NVIDIA A100 SXM4 80 GB"]
    assert {row["channels"] for row in report["rows"]} == {24, 48, 96}
    dense = next(row for row in report["rows"] if row["convolution"] == "dense" and row["channels"] == 48)
    assert dense["intensity"] == pytest.approx(9 * 48 / (2 + 9 * 48 / 14**2))
    assert "batch 1, 14×14" in capsys.readouterr().out


def test_picture(tmp_path):
    path = tmp_path / "pictures" / "intensity.svg"
    assert run("--plot", str(path), "--channels", "16:64") == 0
    text = path.read_text(encoding="utf-8")
    assert "Operational intensity of convolutions, batch 128, 28×28, fp16" in text
    assert "grouped 3×3, T = 32" in text and "A5000, 160 OP/byte" in text


def test_a_picture_of_channels_that_groups_do_not_divide(tmp_path):
    path = tmp_path / "intensity.svg"
    assert run("--plot", str(path), "--channels", "6:18") == 0
    text = path.read_text(encoding="utf-8")
    assert "dense 3×3" in text and "T = 32" not in text


def test_doubled_channels():
    assert doubled_channels(16, 512) == [16, 32, 64, 128, 256, 512]
    assert doubled_channels(24, 100) == [24, 48, 96]
    assert doubled_channels(7, 7) == [7]


@pytest.mark.parametrize("text", ["16", "16:", ":512", "512:16", "0:16", "16:x", "16:32:64"])
def test_malformed_channels(text, capsys):
    with pytest.raises(SystemExit):
        run("--channels", text)
    assert "are not FIRST:LAST: give two positive integers, for example 16:512" in capsys.readouterr().err


@pytest.mark.parametrize("sizes", [("--batch", "0"), ("--hw", "-3")])
def test_sizes_that_are_not_positive(sizes):
    with pytest.raises(ValueError, match="positive integer"):
        run(*sizes)


def test_other_suffixes(tmp_path):
    with pytest.raises(ValueError, match=r"must end in one of \.png, \.svg, \.pdf"):
        run("--plot", str(tmp_path / "intensity.jpg"))


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot write"):
        run("--json", str(tmp_path / "file" / "intensity.json"))


def test_needs_neither_torch_nor_matplotlib_unless_it_draws():
    code = (
        "import argparse, sys; from fusion.bench import intensity_command as command; "
        "parser = argparse.ArgumentParser(); command.register(parser.add_subparsers()); "
        "args = parser.parse_args(['intensity']); args.func(args); "
        "print({'torch', 'triton', 'numpy', 'matplotlib'} & set(sys.modules), file=sys.stderr)"
    )
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert result.stderr.strip() == "set()"

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fusion.bench import waterline
from fusion.bench.__main__ import main

ROOT = Path(__file__).parents[2]


def run(command, **options):
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **options)


def test_help_is_quick_and_names_commands_and_units():
    code = (
        "import sys\nfrom fusion.bench.__main__ import main\ntry: main(['--help'])\n"
        "finally: print({'torch', 'triton', 'matplotlib', 'rich'} & set(sys.modules), file=sys.stderr)"
    )
    result = run([sys.executable, "-c", code])
    assert result.stderr.strip() == "set()"
    assert all(word in result.stdout for word in ("convfirst", "waterline", "microseconds", "TFLOP/s", "examples"))


def test_help_of_waterline_lists_processors_with_ceilings(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["waterline", "--help"])
    out = capsys.readouterr().out
    assert "a5000    NVIDIA RTX A5000: 76.7 TFLOP/s, 0.48 TB/s" in out
    assert "rtx4090" in out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--block", "65,6,32"], "65 channels do not divide into groups of 8"),
        (["--batch", "0"], "n must be a positive integer, got 0"),
        (["--json", "/"], "cannot write /: it is a directory"),
    ],
)
def test_errors_are_one_line(arguments, message, capsys):
    assert main(["waterline", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fusion.bench: error: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["waterline", "--block", "64,6"]])
def test_usage_errors(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "error:" in capsys.readouterr().err


def test_malformed_block_is_explained(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["waterline", "--block", "64,6"])
    assert "argument --block: block '64,6' is not C,ALPHA,HW" in capsys.readouterr().err


def test_interruption(monkeypatch, capsys):
    def interrupt(config, batch, processor):
        raise KeyboardInterrupt

    monkeypatch.setattr(waterline, "block_rows", interrupt)
    assert main(["waterline"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_a_reader_that_stops_early_gets_no_traceback():
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "fusion.bench", "waterline"]
    with os.fdopen(writing, "wb") as closed:
        result = subprocess.run(command, cwd=ROOT, stdout=closed, stderr=subprocess.PIPE, text=True)
    assert (result.returncode, result.stderr) == (1, "")


def test_ffn_blocks_are_checked_and_reported(tmp_path, capsys):
    arguments = ["--block", "24,3,9", "--batch", "2", "--no-tune", "--processor", "h200"]
    if not torch.cuda.is_available():
        arguments += ["--dtype", "bfloat16"]
    if torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the FFN kernel needs a GPU of compute capability 9.0")
    assert main(["ffn", *arguments, "--json", str(tmp_path / "ffn.json")]) == 0
    report = json.loads((tmp_path / "ffn.json").read_text())
    (row,) = report["rows"]
    assert (row["block"], row["channels"], row["alpha"], row["hw"]) == ("ffn", 24, 3, 9)
    assert row["kernel"] == "ffn_hopper" and row["plan"].startswith("FfnTile(")
    assert 0 < row["error"] <= 2 * row["eager_error"]
    if not torch.cuda.is_available():
        assert "FFN blocks, NOT TIMED (no GPU)" in capsys.readouterr().out
        assert "not the kernel" in report["meta"]["protocol"]
        assert row["fused_us"] is None

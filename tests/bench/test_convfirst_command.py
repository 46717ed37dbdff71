"""`python -m fusion.bench convfirst`, in its own process as a user runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fusion.bench.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
HAS_GPU = torch.cuda.is_available()
CONTRACT = {
    *("block", "channels", "alpha", "hw", "batch", "dtype", "eager_us", "inductor_us", "fused_us", "speedup"),
    *("tflops", "pct_peak", "limit_us", "pct_limit", "error", "eager_error", "kernel", "plan"),
}
TILES = {"convfirst": "ConvFirstTile(", "convfirst_hopper": "HopperTile("}


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fusion.bench", "convfirst", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**variables, **environment})


@pytest.fixture(scope="module")
def two_blocks(tmp_path_factory):
    """A run of two small blocks, its JSON and its picture."""
    folder = tmp_path_factory.mktemp("convfirst")
    result = run(
        *("--block", "16,3,12", "--block", "24,3,9", "--batch", "2", "--no-tune"),
        *("--json", str(folder / "out.json"), "--plot", str(folder / "out.png")),
    )
    assert result.returncode == 0, result.stderr
    return result, json.loads((folder / "out.json").read_text()), folder / "out.png"


def test_the_json_keeps_its_contract(two_blocks):
    _, report, _ = two_blocks
    assert set(report) == {"meta", "rows"}
    assert {"device", "driver", "torch", "triton", "fusion", "commit", "date", "protocol"} <= set(report["meta"])
    assert {"peak_tflops", "bandwidth_tbs"} <= set(report["meta"])
    assert [(row["channels"], row["alpha"], row["hw"]) for row in report["rows"]] == [(16, 3, 12), (24, 3, 9)]
    for row in report["rows"]:
        assert set(row) >= CONTRACT
        assert 0 < row["error"] <= 2 * row["eager_error"]
        assert row["limit_us"] > 0
        assert row["plan"].startswith(TILES[row["kernel"]])


@pytest.mark.skipif(HAS_GPU, reason="for machines without a GPU")
def test_without_a_gpu_nothing_is_timed_and_the_output_says_so(two_blocks):
    result, report, _ = two_blocks
    assert "NOT TIMED" in result.stdout
    assert "interpreter" in result.stdout
    assert report["meta"]["timed"] is False
    for row in report["rows"]:
        assert row["kernel"] == "convfirst", "the interpreter runs no other"
        assert f" {row['kernel']} " in result.stdout
        assert all(row[key] is None for key in ("eager_us", "inductor_us", "fused_us", "speedup", "tflops"))
        assert row["predicted_us"] > row["limit_us"]


@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA GPU")
def test_with_a_gpu_everything_is_timed(two_blocks):
    _, report, _ = two_blocks
    assert report["meta"]["timed"] is True
    for row in report["rows"]:
        assert row["speedup"] == pytest.approx(row["inductor_us"] / row["fused_us"])
        assert 0 < row["pct_limit"] <= 100
        assert row["eager_us"] > 0


def test_the_picture_is_drawn(two_blocks):
    assert two_blocks[2].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--block", "16,3"], "is not C,ALPHA,HW"),
        (["--batch", "0"], "'0' is not a positive integer"),
        (["--dtype", "float64"], "invalid choice: 'float64'"),
        (["--processor", "abacus"], "invalid choice: 'abacus'"),
        (["--plot", "picture.bmp"], "must end in one of .png"),
        (["--json", "/dev/null/x.json"], "cannot write"),
    ],
)
def test_a_mistake_gets_one_clear_line(arguments, message):
    result = run(*arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_block_that_no_kernel_runs_gets_one_clear_line(capsys):
    assert main(["convfirst", "--block", "12,3,8", "--no-tune"]) == 2
    *_, line = capsys.readouterr().err.splitlines()  # after a progress bar
    assert line.startswith("fusion.bench: error: ") and "use a multiple of 8" in line


@pytest.mark.skipif(HAS_GPU, reason="for machines without a GPU")
def test_bfloat16_needs_a_gpu(capsys):
    assert main(["convfirst", "--dtype", "bfloat16"]) == 2
    assert "needs a GPU" in capsys.readouterr().err


def test_help_names_the_options():
    result = run("--help")
    assert result.returncode == 0
    for option in ("--json", "--batch", "--block", "--dtype", "--processor", "--no-tune", "--plot"):
        assert option in result.stdout

"""`python -m fusion.bench mbconv`, in its own process as a user runs it."""

import csv
import json
import os
import subprocess
import sys
from dataclasses import astuple
from pathlib import Path

import pytest
import torch

from fusion.bench.__main__ import main
from fusion.bench.blocks import PAPER_TABLE2, TABLE2

ROOT = Path(__file__).resolve().parents[2]
HAS_GPU = torch.cuda.is_available()


def run(*arguments: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fusion.bench", "mbconv", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A run of two small blocks, its JSON and its picture."""
    folder = tmp_path_factory.mktemp("mbconv")
    result = run(
        *("--block", "16,2,6", "--block", "24,4,5", "--batch", "4", "--no-tune", "--micro-batch", "3"),
        *("--json", str(folder / "out.json"), "--plot", str(folder / "out.png")),
    )
    assert result.returncode == 0, result.stderr
    return result, json.loads((folder / "out.json").read_text()), folder / "out.png"


def test_the_rows(report):
    result, written, picture = report
    rows = written["rows"]
    assert [(row["block"], row["channels"], row["alpha"], row["hw"]) for row in rows] == [
        ("mbconv", 16, 2, 6),
        ("mbconv", 24, 4, 5),
    ]
    for row in rows:
        assert 0 < row["error"] <= 2 * row["eager_error"]
        assert 0 < row["limit_us"] < row["predicted_us"]
        assert row["plan"] in result.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(HAS_GPU, reason="for machines without a GPU")
def test_without_a_gpu_the_portable_kernels_are_interpreted(report):
    result, written, _ = report
    assert "NOT TIMED" in result.stdout and "interpreter" in result.stdout
    for row in written["rows"]:
        assert row["kernel"] == "mbconv" and row["plan"].startswith("MBConvTile(")
        assert row["fused_us"] is row["micro_batched_us"] is None


@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA GPU")
def test_with_a_gpu_micro_batches_are_timed_too(report):
    result, written, _ = report
    assert "micro-batched" in result.stdout
    for row in written["rows"]:
        assert row["speedup"] == pytest.approx(row["inductor_us"] / row["fused_us"])
        assert row["micro_batched_us"] > 0


def test_the_default_blocks_are_the_papers():
    with (ROOT / "bench" / "paper" / "table2_mbconv.csv").open() as file:
        table = list(csv.DictReader(file))
    sizes = [(config.block, config.channels, config.alpha, config.hw) for config in TABLE2]
    assert sizes == [("mbconv", *(int(row[key]) for key in ("channels", "alpha", "height"))) for row in table]
    keys = ("inductor_tflops", "inductor_pct_peak", "fused_tflops", "fused_pct_peak", "speedup")
    for row, paper in zip(table, PAPER_TABLE2.values(), strict=True):
        assert astuple(paper) == tuple(float(row[key]) for key in keys)


@pytest.mark.parametrize("value", ["0", "-1", "some"])
def test_micro_batches_are_positive(value):
    result = run("--micro-batch", value)
    assert result.returncode == 2
    assert f"'{value}' is not a positive integer" in result.stderr


@pytest.mark.skipif(HAS_GPU, reason="for machines without a GPU")
def test_bfloat16_needs_a_gpu(capsys):
    assert main(["mbconv", "--dtype", "bfloat16"]) == 2
    assert "needs a GPU" in capsys.readouterr().err


def test_help_names_the_figure_and_the_options():
    text = " ".join(run("--help").stdout.split())
    for words in ("figure 14", "--micro-batch N|auto", "--no-tune", "the ten of table 2", "SiLU"):
        assert words in text

"""`python -m fusion.bench network`, in its own process as a user runs it."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fusion.bench import network, network_unmeasured
from fusion.bench.__main__ import build_parser, main
from fusion.bench.network_case import RIVALS

ROOT = Path(__file__).resolve().parents[2]
HAS_GPU = torch.cuda.is_available()
CONTRACT = {
    *("model", "batch", "size", "dtype", "eager_ms", "inductor_ms", "fused_ms", "images_per_s", "limit_ms"),
    *("pct_limit", "pct_peak", "projected_ms", "top1", "error", "eager_error", "speedup", "agreement", "failed"),
    *("eager_mb", "inductor_mb", "fused_mb", "left_eager", "ops"),
}


@pytest.fixture(scope="module")
def pico(tmp_path_factory):
    """A run of one network on small images, its JSON and its picture."""
    folder = tmp_path_factory.mktemp("network")
    files = "--json", str(folder / "out.json"), "--plot", str(folder / "out.svg")
    command = [sys.executable, "-m", "fusion.bench", "network", "pico", "--batch", "2", "--no-tune", *files]
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=variables)
    assert result.returncode == 0, result.stdout + result.stderr
    return result, json.loads((folder / "out.json").read_text()), folder / "out.svg"


def test_the_json_keeps_its_contract(pico):
    _, report, _ = pico
    assert {"device", "driver", "torch", "triton", "commit", "protocol", "timm", "timed"} <= set(report["meta"])
    (row,) = report["rows"]
    assert set(row) >= CONTRACT
    assert (row["model"], row["batch"], row["size"], row["dtype"]) == ("convfirstnet_pico", 2, 256, "float16")
    assert 0 < row["error"] <= 2 * row["eager_error"]
    assert row["left_eager"] == {}, "no block is left"
    assert row["top1"] == 79.858 and row["limit_ms"] > 0 and row["failed"] is None


def test_the_picture_says_what_it_shows(pico):
    _, report, picture = pico
    text = picture.read_text(encoding="utf-8")
    assert "ConvFirstNet-Pico" in text
    assert ("NOT TIMED" in text) is not report["meta"]["timed"]


@pytest.mark.skipif(HAS_GPU, reason="for machines without a GPU")
def test_without_a_gpu_nothing_is_timed_and_the_output_says_so(pico):
    result, report, _ = pico
    (row,) = report["rows"]
    assert "NOT TIMED" in result.stdout and "2x3x64x64" in result.stdout
    assert report["meta"]["timed"] is False and "not timed" in report["meta"]["protocol"]
    assert row["checked"] == [2, 3, 64, 64]
    timings = ("eager_ms", "inductor_ms", "fused_ms", "speedup", "images_per_s", "pct_limit", "pct_peak", "fused_mb")
    assert all(row[key] is None for key in timings)


@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA GPU")
def test_with_a_gpu_everything_is_timed(pico):
    _, report, _ = pico
    (row,) = report["rows"]
    assert report["meta"]["timed"] is True
    assert 0 < row["fused_ms"] < row["inductor_ms"] < row["eager_ms"] * 1.5
    assert 0 < row["pct_limit"] < 105 and row["fused_mb"] > 0
    assert row["agreement_images"] == 256


def parse(*arguments):
    return build_parser().parse_args(["network", *arguments])


def test_models_of_a_run(monkeypatch, capsys):
    monkeypatch.setattr(network, "has_timm", lambda: True)
    own = [f"convfirstnet_{name}" for name in ("pico", "nano", "tiny", "small")]
    assert network.choose_models(parse(), timed=True) == [*own, *RIVALS]
    assert network.choose_models(parse("--no-rivals"), timed=True) == own
    assert network.choose_models(parse("--batch", "1,8"), timed=True) == own
    assert network.choose_models(parse("small", "convnext_small"), timed=True) == [
        "convfirstnet_small",
        "convnext_small",
    ]
    assert network.choose_models(parse("pico", "--rivals"), timed=True) == ["convfirstnet_pico", *RIVALS]
    assert network.choose_models(parse(), timed=False) == ["convfirstnet_pico"]
    assert capsys.readouterr().out == ""


def test_without_timm_the_output_says_so(monkeypatch, capsys):
    monkeypatch.setattr(network, "has_timm", lambda: False)
    assert len(network.choose_models(parse(), timed=True)) == 4
    assert "timm is not installed" in capsys.readouterr().out
    for arguments in (["--rivals"], ["convnext_tiny"]):
        with pytest.raises(ValueError, match="pip install timm"):
            network.choose_models(parse(*arguments), timed=True)
    with pytest.raises(ValueError, match="needs a GPU"):
        network.choose_models(parse("convnext_tiny"), timed=False)


def test_several_batches_and_sizes():
    args = parse("pico", "nano", "--batch", "1,8", "--size", "256,512")
    cases = network.network_cases([*args.names, "convnext_tiny"], args.batch, args.size, args.dtype)
    assert [(case.model[-4:], case.batch, case.size) for case in cases] == [
        *(("pico", 1, 256), ("pico", 1, 512), ("nano", 1, 256), ("nano", 1, 512), ("tiny", 1, 288)),
        *(("pico", 8, 256), ("pico", 8, 512), ("nano", 8, 256), ("nano", 8, 512), ("tiny", 8, 288)),
    ]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["picoo"], "no network is named 'picoo': did you mean pico"),
        (["--batch", "0"], "'0' must be one or more integers from 1 up"),
        (["--size", "256,8"], "'256,8' must be one or more integers from 17 up"),
        (["--size", "256x256"], "must be one or more integers"),
        (["--timeout", "soon"], "'soon' is not a positive integer"),
        (["--dtype", "float32"], "invalid choice: 'float32'"),
    ],
)
def test_arguments_that_are_none(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["network", *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--json", "/"], "it is a directory"),
        (["--plot", "gap.jpg"], "must end in one of .png, .svg, .pdf"),
        (["pico", "--size", "224", "--plot", "gap.png"], "accuracies are known at 256 only"),
    ],
)
def test_files_that_cannot_be_written(arguments, message, capsys):
    assert main(["network", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def made_up_runs(monkeypatch):
    """Lets the command "check" networks at once; one that is given an exception raises it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = {}

    def check(case):
        result = found.get(case.model, {})
        if isinstance(result, BaseException):
            raise result
        return {"error": 1e-3, "eager_error": 1e-3, "left_eager": {}, **result}

    monkeypatch.setattr(network_unmeasured, "check_network", check)
    return found


def test_rows_are_written_as_they_come(made_up_runs, tmp_path, capsys):
    made_up_runs["convfirstnet_tiny"] = KeyboardInterrupt()
    path = tmp_path / "out.json"
    assert main(["network", "pico", "nano", "tiny", "small", "--json", str(path)]) == 130
    rows = json.loads(path.read_text())["rows"]
    assert [row["model"] for row in rows] == ["convfirstnet_pico", "convfirstnet_nano"]
    assert "interrupted" in capsys.readouterr().err


def test_an_error_that_is_too_large_is_told(made_up_runs, capsys):
    made_up_runs["convfirstnet_nano"] = {"error": 3e-3, "left_eager": {"stages.0.0": "no kernel"}}
    assert main(["network", "pico", "nano"]) == 1
    out = capsys.readouterr().out
    assert "WRONG: convfirstnet_nano at 256, batch 128 has error 3.0e-03, more than 2 x eager PyTorch's 1.0e-03" in out
    assert "left eager: stages.0.0 of convfirstnet_nano at 256, batch 128: no kernel" in out
    assert "WRONG: convfirstnet_pico" not in out


def test_an_error_that_is_no_number_is_told(made_up_runs, capsys):
    made_up_runs["convfirstnet_pico"] = {"error": float("nan")}
    assert main(["network"]) == 1
    assert "WRONG: convfirstnet_pico" in capsys.readouterr().out


def test_a_failure_is_told(capsys):
    row = {"model": "convnext_tiny", "size": 288, "batch": 128, "error": None, "eager_error": None}
    row |= {"failed": "no answer in 400 s", "left_eager": None}
    assert network._verdict([row]) == 1
    assert "FAILED: convnext_tiny at 288, batch 128: no answer in 400 s" in capsys.readouterr().out


def test_the_command_is_listed(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["network", "--help"])
    out = capsys.readouterr().out
    assert "efficientnet_b5" in out and "448" in out and "appendix" not in out
    assert isinstance(build_parser(), argparse.ArgumentParser)

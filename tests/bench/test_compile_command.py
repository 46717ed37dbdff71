"""`python -m fusion.bench compile`: a real run of a small network, in its own process, and made-up ones."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fusion.bench import compile_command, compile_unmeasured, model_case
from fusion.bench.__main__ import build_parser, main
from fusion.bench.compile_command import model_cases

ROOT = Path(__file__).resolve().parents[2]
HAS_GPU = torch.cuda.is_available()
META = {"device", "torch", "triton", "commit", "protocol", "timm", "timed", "mode", "min_speedup", "cold", "called"}


@pytest.fixture(scope="module")
def pico(tmp_path_factory):
    """A run of one network on small images, and its JSON."""
    path = tmp_path_factory.mktemp("compile") / "out.json"
    command = [sys.executable, "-m", "fusion.bench", "compile", "pico:num_classes=16", "--blocks", "--no-cold"]
    command += ["--batch", "2", "--size", "32", "--json", str(path)]
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    variables["FUSION_CACHE_DIR"] = str(path.parent / "cache")
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=variables)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout, json.loads(path.read_text())


def test_a_network_is_compiled_and_checked(pico):
    out, report = pico
    assert set(report["meta"]) >= META and report["meta"]["timed"] is HAS_GPU and report["meta"]["cold"] is False
    (row,) = report["rows"]
    assert (row["model"], row["batch"], row["size"]) == ("convfirstnet_pico:num_classes=16", 2, 32)
    assert 0 < row["fusion_error"] <= 2 * row["eager_error"]
    assert row["graphs"] == 1 and row["blocks_found"] == row["blocks_fused"] + row["blocks_left"] > 20
    assert len(row["report"]["blocks"]) == row["blocks_found"] and row["failed"] is None and row["warnings"] == []
    assert row["fusion_cold_s"] is row["fusion_warm_s"] is row["inductor_cold_s"] is None
    assert "stages.3.1" in out and "1 graph: " in out, "the report on blocks"


@pytest.mark.skipif(HAS_GPU, reason="for machines without a GPU")
def test_without_a_gpu_only_compiling_is_timed(pico):
    out, report = pico
    (row,) = report["rows"]
    assert "NOT TIMED (no GPU)" in out and "not timed" in report["meta"]["protocol"]
    assert row["blocks_left"] == 0 and row["fusion_here_s"] > 0 and report["meta"]["min_speedup"] == 0
    assert all(row[key] is None for key in ("eager_ms", "inductor_ms", "fusion_ms", "fuse_ms"))


@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA GPU")
def test_with_a_gpu_everything_is_timed(pico):
    _, report = pico
    (row,) = report["rows"]
    assert min(row[key] for key in ("eager_ms", "inductor_ms", "fusion_ms", "fuse_ms")) > 0
    assert row["inductor_error"] > 0 and row["blocks_fused"] > 0


@pytest.fixture
def made_up_runs(monkeypatch):
    """Lets the command "compile" networks at once; results are given by name of the network."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(model_case, "has_timm", lambda: False)
    found = {}

    def check(case, settings):
        result = found.get(case.model, {})
        if isinstance(result, BaseException):
            raise result
        return {"fusion_error": 1e-3, "eager_error": 1e-3, "warnings": [], "report_text": "a table", **result}

    monkeypatch.setattr(compile_unmeasured, "check_model", check)
    return found


def test_rows_are_written_as_they_come(made_up_runs, tmp_path, capsys):
    made_up_runs["convfirstnet_tiny"] = KeyboardInterrupt()
    path = tmp_path / "out.json"
    assert main(["compile", "pico", "nano", "tiny", "small", "--json", str(path)]) == 130
    rows = json.loads(path.read_text())["rows"]
    assert [row["model"] for row in rows] == ["convfirstnet_pico", "convfirstnet_nano"]
    assert "interrupted" in capsys.readouterr().err


def test_errors_failures_and_warnings_are_told(made_up_runs, capsys):
    made_up_runs["convfirstnet_pico"] = {"fusion_error": 3e-3}
    made_up_runs["convfirstnet_nano"] = {"failed": "RuntimeError: no", "fusion_error": None, "eager_error": None}
    made_up_runs["convfirstnet_small"] = {"fusion_error": float("nan")}
    made_up_runs["convfirstnet_tiny"] = {"warnings": ["fusion: it is left"]}
    assert main(["compile", "pico", "nano", "tiny", "small"]) == 1
    out = capsys.readouterr().out
    assert "WRONG: convfirstnet_pico at 64, batch 2 has error 3.0e-03, more than 2 x eager PyTorch's 1.0e-03" in out
    assert "FAILED: convfirstnet_nano at 64, batch 2: RuntimeError: no" in out
    assert "WRONG: convfirstnet_small" in out and "a table" not in out
    assert "warning: convfirstnet_tiny at 64, batch 2: fusion: it is left" in out
    assert "FAILED: convfirstnet_tiny" not in out and "WRONG: convfirstnet_tiny" not in out
    assert main(["compile", "tiny", "--blocks"]) == 0
    assert "convfirstnet_tiny\na table\n" in capsys.readouterr().out


def parse(*arguments):
    return build_parser().parse_args(["compile", *arguments])


def test_cases_of_a_run():
    cases = model_cases(parse("pico", "small:num_classes=10", "convfirstnet_pico"), timed=True)
    assert [(case.model, case.batch, case.size) for case in cases] == [
        ("convfirstnet_pico", 128, 256),
        ("convfirstnet_small:num_classes=10", 128, 256),
    ]
    (case,) = model_cases(parse("pico", "--batch", "8", "--size", "96", "--dtype", "bfloat16"), timed=True)
    assert (case.batch, case.size, case.dtype) == (8, 96, "bfloat16")
    (case,) = model_cases(parse("pico"), timed=False)
    assert (case.batch, case.size) == (2, 64)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["picoo"], "no network is named 'picoo': did you mean pico"),
        (["resnet18"], "pip install timm"),
        (["pico:num_classes"], "is no list of arguments"),
        (["pico", "--json", "/"], "it is a directory"),
        (["pico", "--tune"], "--tune needs a GPU"),
        (["pico", "--min-speedup", "1.1"], "--min-speedup needs a GPU"),
    ],
)
def test_errors_are_one_line(made_up_runs, arguments, message, capsys):
    assert main(["compile", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("fusion.bench: error: ") and message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "the following arguments are required: MODEL"),
        (["pico", "--batch", "0"], "'0' is not a positive integer"),
        (["pico", "--size", "8"], "'8' is not an integer from 17 up"),
        (["pico", "--min-speedup", "-1"], "'-1' is not a number from 0 up"),
        (["pico", "--min-speedup", "fast"], "'fast' is not a number from 0 up"),
        (["pico", "--mode", "fast"], "invalid choice: 'fast'"),
        (["pico", "--dtype", "float32"], "invalid choice: 'float32'"),
    ],
)
def test_arguments_that_are_none(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["compile", *arguments])
    assert message in capsys.readouterr().err


def test_modes_are_pytorchs():
    from torch._inductor import list_mode_options

    modes = list_mode_options()
    assert set(compile_command.MODES) <= set(modes)
    graphs = {mode for mode, options in modes.items() if options.get("triton.cudagraphs")}
    assert {mode for mode in compile_command.MODES if compile_command.CompileSettings(mode).has_graphs} == graphs

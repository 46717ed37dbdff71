"""Rows and tables of compiled networks."""

from fusion.bench.compile_row import compile_row
from fusion.bench.compile_settings import CompileSettings
from fusion.bench.compile_table import print_compiled
from fusion.bench.model_case import ModelCase

CASE = ModelCase("convfirstnet_pico", 128, 256)
REPORT = {"graphs": 1, "errors": [], "blocks": [{"fused": True, "reason": ""}, {"fused": False, "reason": "slow"}]}
FOUND = {
    "eager_ms": 12.0,
    "inductor_ms": 6.0,
    "fusion_ms": 1.5,
    "fuse_ms": 1.2,
    "fusion_error": 1e-3,
    "inductor_error": 3e-3,
    "eager_error": 2e-3,
    "inductor_cold_s": 40.0,
    "fusion_cold_s": 30.5,
    "fusion_warm_s": 5.25,
    "warnings": [],
    "report": REPORT,
    "report_text": "not for the file",
}
META = {"timed": True, "called": False, "device": "NVIDIA H200", "dtype": "float16", "mode": "default"}


def test_what_follows_from_times_and_blocks():
    row = compile_row(CASE, CompileSettings(), FOUND)
    assert (row["speedup_over_eager"], row["speedup_over_inductor"]) == (8.0, 4.0)
    assert abs(row["over_fuse_pct"] - 25) < 1e-9
    assert (row["blocks_found"], row["blocks_fused"], row["blocks_left"], row["graphs"]) == (2, 1, 1, 1)
    assert (row["model"], row["batch"], row["size"], row["mode"]) == ("convfirstnet_pico", 128, 256, "default")
    assert row["failed"] is None and "report_text" not in row


def test_a_failed_network_is_a_row():
    row = compile_row(CASE, CompileSettings(), {"failed": "inductor: no", "fusion_ms": 2.0})
    assert row["failed"] == "inductor: no" and row["fusion_ms"] == 2.0
    for key in ("speedup_over_inductor", "over_fuse_pct", "blocks_found", "blocks_left", "report", "fusion_cold_s"):
        assert row[key] is None
    assert set(row) == set(compile_row(CASE, CompileSettings(), FOUND))


def test_the_table_of_a_gpu(capsys):
    other = compile_row(ModelCase("resnet18", 128, 288), CompileSettings(), {"failed": "no"})
    print_compiled(META, [compile_row(CASE, CompileSettings(), FOUND), other])
    out = capsys.readouterr().out
    assert "torch.compile on NVIDIA H200, float16, mode default without freezing, ms a batch" in out
    line = next(line for line in out.splitlines() if "convfirstnet_pico" in line)
    cells = "256 128 12.000 6.000 1.500 1.200 8.00x 4.00x +25.0 2 1 1 1 1.0e-03 2.0e-03 40.0 30.5 5.2"
    assert " ".join(line.split()[1:]) == cells
    line = next(line for line in out.splitlines() if "resnet18" in line)
    assert set(line.split()[3:]) == {"-"}
    print_compiled({**META, "called": True}, [other])
    assert "ms a call" in capsys.readouterr().out


def test_the_table_of_a_cpu_says_that_nothing_is_timed(capsys):
    row = compile_row(CASE, CompileSettings(), {"report": REPORT, "fusion_here_s": 9.5, "fusion_error": 1e-3})
    print_compiled({**META, "timed": False}, [row])
    out = capsys.readouterr().out
    assert "NOT TIMED (no GPU)" in out and "9.5" in out and "eager ms" not in out


def test_arguments_of_torch_compile():
    assert CompileSettings().arguments("inductor") == {"mode": "default"}
    assert CompileSettings().arguments("fusion") == {"options": {"mode": "default", "min_speedup": 1.0}}
    settings = CompileSettings("max-autotune", min_speedup=1.1, tune=True)
    assert settings.arguments("inductor") == {"mode": "max-autotune"}
    assert settings.arguments("fusion") == {"options": {"mode": "max-autotune", "min_speedup": 1.1, "tune": True}}
    assert settings.has_graphs and not CompileSettings("max-autotune-no-cudagraphs").has_graphs

"""From compiled networks to rows, with made-up processes."""

import os
import sys

import pytest

from fusion.bench import compile_measured
from fusion.bench.case_worker import CaseWorker
from fusion.bench.compile_measured import CACHES, measure_models
from fusion.bench.compile_settings import CompileSettings
from fusion.bench.model_case import ModelCase

# The name of a network says what goes wrong. Seconds of compilation tell how many files are in its cache.
WORKER = """
import json, os, sys
from pathlib import Path
for line in sys.stdin:
    request = json.loads(line)
    model, engine, step = request["case"]["model"], request["engine"], request["do"]
    assert request["settings"] == {"mode": "default", "min_speedup": 1.0, "tune": False}
    reply = {}
    if model == f"no_{engine}":
        reply = {"failed": "RuntimeError: no"}
    elif step == "compile":
        folder = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
        folder.mkdir(parents=True, exist_ok=True)
        reply = {"seconds": float(len(list(folder.iterdir())))}
        (folder / str(os.getpid())).touch()
        if engine == "fusion":
            reply |= {"report": {"graphs": 1, "errors": [], "blocks": []}, "report_text": "blocks", "warnings": []}
    elif model == "half":
        reply = {f"{engine}_ms": 2.0, "failed": "check: out of memory"}
    else:
        reply = {f"{engine}_ms": 2.0, f"{engine}_error": 1e-3, "eager_error": 1e-3}
    print(json.dumps(reply), flush=True)
"""


@pytest.fixture
def started(monkeypatch):
    """The variables of each process that was started."""
    variables = []

    def start(given):
        variables.append(given)
        return CaseWorker([sys.executable, "-c", WORKER], 1, given)

    monkeypatch.setattr(compile_measured, "compile_worker", start)
    return variables


def measure(*models, cold=True):
    rows = []
    cases = [ModelCase(model, 128, 256) for model in models]
    measure_models(cases, CompileSettings(), cold, 30.0, lambda row, table: rows.append((row, table)))
    return rows


def test_cold_and_warm_caches(started):
    ((row, table),) = measure("resnet18")
    assert (row["inductor_cold_s"], row["fusion_cold_s"], row["fusion_warm_s"]) == (0.0, 0.0, 1.0)
    assert (row["inductor_ms"], row["fusion_ms"], row["fusion_error"]) == (2.0, 2.0, 1e-3)
    assert row["failed"] is None and row["blocks_found"] == 0 and table == "blocks"
    inductor, cold, warm = started
    assert cold == warm and set(cold) == set(CACHES)
    assert not set(inductor.values()) & set(cold.values()), "Inductor alone has caches of its own"
    assert not any(map(os.path.exists, (*inductor.values(), *cold.values()))), "they are removed"


def test_without_cold_runs_the_users_caches_serve(started, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    ((row, _),) = measure("resnet18", cold=False)
    assert started == [{}, {}]
    assert row["inductor_cold_s"] is row["fusion_cold_s"] is row["fusion_warm_s"] is None
    assert row["fusion_ms"] == 2.0 and len(list(tmp_path.iterdir())) == 2


def test_an_engine_that_fails_leaves_the_other(started, capsys):
    (inductor, _), (fusion, _), (half, _) = measure("no_inductor", "no_fusion", "half")
    assert inductor["failed"] == "inductor: RuntimeError: no" and inductor["fusion_ms"] == 2.0
    assert fusion["failed"] == "fusion: RuntimeError: no" and fusion["inductor_ms"] == 2.0
    assert fusion["report"] is None and fusion["fusion_warm_s"] is None
    assert half["failed"] == "inductor: check: out of memory; fusion: check: out of memory"
    assert half["fusion_ms"] == 2.0 and half["fusion_cold_s"] == 0.0
    assert len(started) == 3 + 2 + 3, "what does not compile cold is not tried again"
    assert "fusion.bench: fusion on no_fusion at 256, batch 128 failed" in capsys.readouterr().err

"""From cases to rows, with made-up processes and a made-up tuner."""

import sys

import pytest

from fusion.bench import network_measured
from fusion.bench.__main__ import build_parser
from fusion.bench.case_worker import CaseWorker
from fusion.bench.network_case import NetworkCase
from fusion.bench.network_limit import network_ops
from fusion.bench.network_measured import case_parts, measure_networks, tune_parts
from fusion.planner.processor import get_processor

H200 = get_processor("h200")
PICO, FEMTO = NetworkCase("convfirstnet_pico", 128, 256), NetworkCase("convnext_femto", 128, 288)
WORKER = """
import json, sys
for line in sys.stdin:
    request = json.loads(line)
    is_rival = request["case"]["model"].startswith("convnext")
    assert request["by_block"] is not is_rival and request["tune"] is False
    reply = {"ops": 333e9} if request["do"] == "prepare" else {"eager_ms": 10.0, "inductor_ms": 4.0}
    if request["do"] == "measure" and not is_rival:
        reply |= {"fused_ms": 0.5, "error": 1e-3, "eager_error": 1e-3, "blocks": [{"us": 1.0, "kernel": "k"}] * 12}
    print(json.dumps(reply), flush=True)
"""


def test_rows_of_cases(monkeypatch):
    threads = []

    def start(compile_threads):
        threads.append(compile_threads)
        return CaseWorker([sys.executable, "-c", WORKER], compile_threads)

    monkeypatch.setattr(network_measured, "network_worker", start)
    monkeypatch.setattr(network_measured.os, "cpu_count", lambda: 16)
    args = build_parser().parse_args(["network", "--no-tune", "--by-block", "--timeout", "60"])
    rows = []
    measure_networks([PICO, FEMTO], args, H200, rows.append)
    assert threads == [8, 8], "the processor's cores are shared out"
    pico, femto = rows
    assert (pico["model"], pico["fused_ms"], pico["speedup"], femto["model"]) == (PICO.model, 0.5, 8.0, FEMTO.model)
    assert pico["ops"] == network_ops(case_parts(PICO)) and femto["ops"] == 333e9
    assert [block["depth"] for block in pico["blocks"]] == [1, 1, 1, 1, 1, 2, 1, 10, 1, 10, 1, 1]
    assert femto["fused_ms"] is None and "blocks" not in femto
    assert pico["failed"] is femto["failed"] is None


def test_every_block_with_a_kernel_is_tuned_once(monkeypatch):
    tuned = []
    monkeypatch.setattr(network_measured, "tune_blocks", lambda graphs, processor: tuned.extend(graphs))
    tune_parts(case_parts(PICO) + case_parts(PICO) + case_parts(FEMTO), H200)
    assert [graph.name for graph in tuned] == ["conv", *["convfirst"] * 5, *["mbconv"] * 4, "head"]


def test_a_block_that_cannot_be_tuned_does_not_stop_the_rest(monkeypatch, capsys):
    def fail(graphs, processor):
        raise RuntimeError("no tile gives right results")

    monkeypatch.setattr(network_measured, "tune_blocks", fail)
    tune_parts(case_parts(PICO), H200)
    assert "not all blocks are tuned: no tile gives right results" in capsys.readouterr().err


@pytest.mark.parametrize("workers, threads", [(None, 1), (4, 4)])
def test_more_cases_than_cores(monkeypatch, workers, threads):
    started = []
    monkeypatch.setattr(network_measured, "network_worker", started.append)
    monkeypatch.setattr(network_measured, "run_cases", lambda cases, start, *rest: [start(case) for case in cases])
    monkeypatch.setattr(network_measured.os, "cpu_count", lambda: 16)
    args = build_parser().parse_args(["network", "--no-tune", *(["--workers", str(workers)] if workers else [])])
    measure_networks([PICO] * 20, args, H200, lambda row: None)
    assert started == [threads] * 20

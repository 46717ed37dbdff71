"""Processes that measure networks, and what becomes of those that fail."""

import os
import sys
import threading
import time

import pytest

from fusion.bench.case_worker import CaseWorker, network_worker
from fusion.bench.network_case import NetworkCase
from fusion.bench.network_measured import run_cases

# What a made-up worker does with a request, by the name of its network.
WORKER = """
import json, os, sys, time
for line in sys.stdin:
    request = json.loads(line)
    model, phase = request["case"], request["do"]
    if model == "crash" and phase == "prepare":
        print("what went wrong", file=sys.stderr, flush=True)
        os._exit(3)
    if model == "hang" and phase == "prepare":
        time.sleep(60)
    if model == "chatter":
        print("hello", flush=True)
        continue
    if model == "late" and phase == "measure":
        os._exit(4)
    if model == "raise" and phase == "prepare":
        print(json.dumps({"failed": "RuntimeError: no"}), flush=True)
        continue
    if model == "half":
        print(json.dumps({"ops": 1, "failed": "fused: broken", "ms": 5} if phase == "prepare" else {"eager_ms": 2.0}), flush=True)
        continue
    print(json.dumps({"ops": 7} if phase == "prepare" else {"eager_ms": 1.0, "pid": os.getpid()}), flush=True)
"""  # noqa: E501


def worker(*_):
    return CaseWorker([sys.executable, "-c", WORKER])


def cases(*models):
    return [NetworkCase(model, 128, 256) for model in models]


def run(models, seconds=20.0, at_once=4):
    found = {}
    run_cases(
        cases(*models),
        worker,
        lambda case: {"case": case.model},
        at_once,
        seconds,
        lambda case, reply: found.__setitem__(case.model, reply),
    )
    return found


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_failures_cost_their_own_row_only(capfd):
    found = run(["good", "crash", "raise", "chatter", "late", "half", "fine"])
    assert list(found) == ["good", "crash", "raise", "chatter", "late", "half", "fine"], "in the order asked for"
    for name in ("good", "fine"):
        assert (found[name]["ops"], found[name]["eager_ms"]) == (7, 1.0)
        assert "failed" not in found[name]
        assert not is_alive(found[name]["pid"])
    assert found["crash"] == {"failed": "its process died with exit code 3: what went wrong"}
    assert found["raise"] == {"failed": "RuntimeError: no"}
    assert found["chatter"] == {"failed": "an answer that is no JSON: hello"}
    assert found["late"] == {"ops": 7, "failed": "its process died with exit code 4: it said nothing"}
    assert "crash at 256, batch 128 failed, its process said:\nwhat went wrong" in capfd.readouterr().err
    assert found["half"] == {"ops": 1, "ms": 5, "eager_ms": 2.0, "failed": "fused: broken"}


def test_a_worker_that_hangs_is_given_up():
    start = time.monotonic()
    found = run(["hang", "good"], seconds=3.0)
    assert time.monotonic() - start < 30
    assert found["hang"] == {"failed": "no answer in 3 s"}
    assert found["good"]["eager_ms"] == 1.0


def test_more_cases_than_workers_at_once():
    found = run([f"network{i}" for i in range(5)], at_once=2)
    assert [reply["eager_ms"] for reply in found.values()] == [1.0] * 5


def test_all_are_prepared_before_the_first_is_measured():
    log = []

    class Recorder:
        def __init__(self, case):
            self.case = case

        def ask(self, request, seconds):
            log.append((request["do"], self.case.model))
            return {"ops": 1}

        def close(self):
            log.append(("close", self.case.model))

    run_cases(cases("a", "b"), Recorder, lambda case: {}, 2, 1.0, lambda case, found: log.append(("keep", case.model)))
    assert sorted(log[:2]) == [("prepare", "a"), ("prepare", "b")]
    assert log[2:8] == [(what, name) for name in "ab" for what in ("measure", "close", "keep")]


@pytest.mark.parametrize("phase", ["prepare", "measure"])
def test_an_interruption_ends_all_workers(phase):
    started, kept = [], []

    class Recorder(CaseWorker):
        def __init__(self, case):
            super().__init__([sys.executable, "-c", WORKER])
            started.append(self)

        def ask(self, request, seconds):
            reply = super().ask(request, seconds)
            if request["do"] == phase and request["case"] == "stop":
                raise KeyboardInterrupt
            return reply

    models = ["good", "stop", "hang"] if phase == "prepare" else ["good", "stop", "fine"]
    with pytest.raises(KeyboardInterrupt):
        run_cases(
            cases(*models),
            Recorder,
            lambda case: {"case": case.model},
            3,
            50.0,
            lambda case, found: kept.append(case.model),
        )
    assert kept == ([] if phase == "prepare" else ["good"])
    assert all(worker._process is None or worker._process.poll() is not None for worker in started)


def test_a_closed_worker_starts_nothing():
    closed = worker()
    closed.close()
    closed.close()
    assert closed.ask({"case": "good", "do": "prepare"}, 5.0) == {"failed": "its process has ended"}
    assert closed._process is None


def test_closing_from_another_thread_ends_a_request():
    hanging = worker()
    threading.Timer(1.0, hanging.close).start()
    assert "failed" in hanging.ask({"case": "hang", "do": "prepare"}, 50.0)


def test_a_real_worker_says_why_it_cannot():
    real = network_worker(compile_threads=1)
    case = {"model": "convfirstnet_none", "batch": 1, "size": 32}
    reply = real.ask({"case": case, "tune": False, "by_block": False, "do": "prepare"}, 100.0)
    real.close()
    assert reply["failed"].startswith("ValueError: no model is named 'convfirstnet_none'")

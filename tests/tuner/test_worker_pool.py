"""Worker processes that answer, fail, die and hang."""

import sys

import pytest
import torch

from fusion.planner.hopper_tile import HopperTile
from fusion.planner.match import ConvFirstShape
from fusion.planner.tile import ConvFirstTile
from fusion.tuner import pool
from fusion.tuner.pool import Worker, WorkerPool

SHAPE = ConvFirstShape(2, 9, 11, 16, 48, 16, 8, "relu", True, "float16")
DEVICE = torch.device("cuda", 0)

# Answers with the tile's height, or does what its width says.
FAKE_WORKER = """
import json, os, sys, time
print("worker starts", file=sys.stderr)
for line in sys.stdin:
    request = json.loads(line)
    height, width = request["tile"][:2]
    if width == 2:
        print("cannot go on", file=sys.stderr, flush=True)
        os._exit(7)
    if width == 4:
        time.sleep(60)
    if width == 8:
        print(json.dumps({"failed": "wrong result"}), flush=True)
        continue
    if width == 16:
        print(json.dumps({"failed": "CUDA error", "exiting": True}), flush=True)
        sys.exit(1)
    print(json.dumps({"us": height, "pid": os.getpid(), "kernel": request["kernel"]}), flush=True)
"""
DIES, HANGS, IS_WRONG, EXITS = 2, 4, 8, 16


def tile(height: int, width: int = 1) -> ConvFirstTile:
    return ConvFirstTile(height, width, 16, 16, 1)


@pytest.fixture
def worker():
    worker = Worker(DEVICE)
    worker._command = [sys.executable, "-c", FAKE_WORKER]
    yield worker
    worker.close()


def test_a_worker_answers_again_and_again(worker):
    first, second = (worker.ask(SHAPE, tile(height), False) for height in (3, 5))
    assert (first["us"], second["us"]) == (3, 5)
    assert first["pid"] == second["pid"]


def test_a_worker_is_told_which_kernel_the_tile_is_of(worker):
    tiles = tile(3), HopperTile(64, 64, 3, 2, 1, 64, 3)
    assert [worker.ask(SHAPE, asked, False)["kernel"] for asked in tiles] == ["convfirst", "convfirst_hopper"]


def test_a_dead_worker_is_named_with_its_last_words_and_replaced(worker):
    worker.ask(SHAPE, tile(1), False)
    assert worker.ask(SHAPE, tile(1, DIES), False) == {"failed": "worker died with exit code 7: cannot go on"}
    assert worker.ask(SHAPE, tile(9), False)["us"] == 9


def test_a_worker_that_hangs_is_ended_and_replaced(worker, monkeypatch):
    monkeypatch.setattr(pool, "ANSWER_SECONDS", 0.5)
    assert worker.ask(SHAPE, tile(1, HANGS), False) == {"failed": "no answer in 0.5 s"}
    monkeypatch.setattr(pool, "ANSWER_SECONDS", 60)
    assert worker.ask(SHAPE, tile(9), False)["us"] == 9


def test_a_wrong_result_leaves_the_worker_alive_and_an_exception_does_not(worker):
    pid = worker.ask(SHAPE, tile(1), False)["pid"]
    assert worker.ask(SHAPE, tile(1, IS_WRONG), False) == {"failed": "wrong result"}
    assert worker.ask(SHAPE, tile(1), False)["pid"] == pid
    assert worker.ask(SHAPE, tile(1, EXITS), False) == {"failed": "CUDA error"}
    assert worker.ask(SHAPE, tile(1), False)["pid"] != pid


def test_a_pool_compiles_all_jobs_and_reports_each(monkeypatch):
    monkeypatch.setattr(pool, "COMPILERS", 2)
    with WorkerPool(DEVICE) as workers:
        for worker in (*workers._compilers, workers._measurer):
            worker._command = [sys.executable, "-c", FAKE_WORKER]
        done = []
        jobs = [(SHAPE, tile(1, DIES)), (SHAPE, tile(1)), (SHAPE, tile(2)), (SHAPE, tile(3))]
        workers.compile(jobs, lambda: done.append(1))
        assert len(done) == len(jobs)
        assert workers.measure(SHAPE, tile(4))["us"] == 4

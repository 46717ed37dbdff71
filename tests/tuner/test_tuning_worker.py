"""What a worker does with a tile; without a GPU in the interpreter, where nothing is timed."""

from dataclasses import asdict

import pytest
import torch

from fusion.planner.match import ConvFirstShape
from fusion.planner.tile import ConvFirstTile
from fusion.tuner import worker

DEVICE = "cuda:0" if torch.cuda.is_available() else "cpu"
TILE = ConvFirstTile(4, 8, 32, 16, 4)


def shape(**changes) -> ConvFirstShape:
    sizes = {"batch": 2, "height": 5, "width": 7, "in_channels": 24, "hidden_channels": 72, "out_channels": 24}
    options = {"group_width": 8, "activation": "relu", "residual": True, "dtype": "float16"}
    return ConvFirstShape(**{**sizes, **options, **changes})


@pytest.fixture(autouse=True)
def no_timing(monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setattr(worker, "graph_us", lambda run: (run(), 8.0)[1])
        monkeypatch.setattr(worker, "STAGE_DEPTH", 2)
        worker.bench_of.cache_clear()


@pytest.mark.parametrize(
    "changes", [{}, {"activation": "silu"}, {"out_channels": 40, "residual": False}, {"batch": 1, "height": 1}]
)
def test_a_right_tile_is_timed(changes):
    assert worker.answer(asdict(shape(**changes)), TILE.to_ints(), compile_only=False, device=DEVICE)["us"] > 0


def test_a_compilation_times_nothing():
    assert worker.answer(asdict(shape()), TILE.to_ints(), compile_only=True, device=DEVICE) == {}


@pytest.mark.parametrize("damage", ["wrong image", "missing pixel", "race"])
def test_a_wrong_result_is_refused(monkeypatch, damage):
    launch = worker.launch
    runs = []

    def damaged(x, *args, **kwargs):
        launch(x, *args, **kwargs)
        out = args[5]
        runs.append(out)
        if damage == "wrong image":
            out[-1] *= 1.01
        elif damage == "missing pixel":
            out[1, 0, 4, 4] = float("nan")
        elif len(runs) == 2:
            out[0, 0, 0, 0] += 0.01

    monkeypatch.setattr(worker, "launch", damaged)
    reply = worker.answer(asdict(shape()), TILE.to_ints(), compile_only=False, device=DEVICE)
    assert reply["failed"].startswith("wrong result: error")

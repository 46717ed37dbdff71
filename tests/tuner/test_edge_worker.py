"""What a worker does with tiles of a network's stem and head; without a GPU in the interpreter, nothing is timed."""

from dataclasses import asdict

import pytest
import torch

from fusion.planner.head_tile import HeadTile
from fusion.planner.match import HeadShape, StemShape
from fusion.planner.stem_tile import StemTile
from fusion.triton_kernels import head, stem
from fusion.tuner import worker

DEVICE = "cuda:0" if torch.cuda.is_available() else "cpu"
STEM = StemShape(2, 5, 12, 3, 24, "relu", "float16")
HEAD = HeadShape(2, 5, 7, 24, 40, "silu", "float16")


@pytest.fixture(autouse=True)
def no_timing(monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setattr(worker, "graph_us", lambda run: (run(), 8.0)[1])
        monkeypatch.setattr(worker, "STAGE_DEPTH", 2)
        worker.bench_of.cache_clear()


@pytest.mark.parametrize(
    "module, shape, tile",
    [(stem, STEM, StemTile(2, 32, 2, 2)), (head, HEAD, HeadTile(16, 32, 2, 2, 2))],
    ids=["stem", "head"],
)
def test_a_tile_is_packed_checked_and_timed(module, shape, tile, monkeypatch):
    name = module.__name__.rpartition(".")[2]
    arguments = {"shape": asdict(shape), "kernel": name, "tile": tile.to_ints(), "device": DEVICE}
    assert worker.answer(**arguments, compile_only=False)["us"] > 0
    assert worker.answer(**arguments, compile_only=True) == {}

    launch = module.launch

    def damaged(*args, **kwargs):
        launch(*args, **kwargs)
        args[3][-1] *= 1.01  # the last image of the output

    monkeypatch.setattr(module, "launch", damaged)
    assert worker.answer(**arguments, compile_only=False)["failed"].startswith("wrong result: error")

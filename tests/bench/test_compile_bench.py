"""One network compiled, with a made-up clock and a made-up compiler. On a GPU, the command's test has real ones."""

import warnings

import pytest
import torch

from fusion.backend.report import BlockRow, CompileReport
from fusion.bench import compile_bench, recording_backend
from fusion.bench.compile_bench import CompileBench, fusion_warnings
from fusion.bench.compile_settings import CompileSettings
from fusion.bench.model_case import ModelCase
from fusion.bench.recording_backend import RecordingBackend

CASE = ModelCase("convfirstnet_pico:num_classes=9", batch=3, size=32)


class MadeUpGraph:
    report = CompileReport((BlockRow(0, "stages.0.0", "ConvFirst"), BlockRow(0, "head", "head", "slow")))


@pytest.fixture
def made_up(monkeypatch):
    """Compilations that leave a network as it is; they are noted, as (backend, arguments)."""
    compiled = []

    def compile_nothing(model, backend, **arguments):
        compiled.append((backend, arguments))
        if isinstance(backend, RecordingBackend):
            backend(None, [])
            warnings.warn("fusion: the graph\nis left", RuntimeWarning, stacklevel=1)
            warnings.warn("something else", RuntimeWarning, stacklevel=1)
        return model

    def clock(us):
        return lambda run: run() is None or us

    monkeypatch.setattr(torch, "compile", compile_nothing)
    monkeypatch.setattr(recording_backend, "compile_graph", lambda graph, inputs: MadeUpGraph())
    monkeypatch.setattr(compile_bench, "queued_us", clock(3000.0))
    monkeypatch.setattr(compile_bench, "called_us", clock(5000.0))
    return compiled


def bench(engine, **settings):
    return CompileBench(CASE, engine, CompileSettings(**settings), "cpu", calibration_images=4)


def test_inductor_is_measured_with_eager_pytorch(made_up):
    inductor = bench("inductor")
    assert set(inductor.compile()) == {"seconds"}
    found = inductor.measure()
    assert (found["inductor_ms"], found["eager_ms"]) == (3.0, 3.0)
    assert 0 < found["inductor_error"] == found["eager_error"] < 0.1
    assert set(found) == {"inductor_ms", "eager_ms", "inductor_error", "eager_error"}
    assert made_up == [("inductor", {"mode": "default"})]


def test_the_backend_is_measured_with_fuse(made_up):
    fusion = bench("fusion")
    compiled = fusion.compile()
    assert compiled["seconds"] > 0 and compiled["warnings"] == ["fusion: the graph is left"]
    assert [block["name"] for block in compiled["report"]["blocks"]] == ["stages.0.0", "head"]
    assert "1 blocks fused, 1 left" in compiled["report_text"]
    found = fusion.measure()
    assert (found["fusion_ms"], found["fuse_ms"]) == (3.0, 3.0) and "eager_ms" not in found
    assert fusion.check() == {key: found[key] for key in ("fusion_error", "eager_error")}


def test_code_that_runs_as_cuda_graphs_is_called(made_up, monkeypatch):
    inductor = bench("inductor", mode="reduce-overhead")
    inductor.compile()
    assert inductor.measure()["inductor_ms"] == 5.0


def test_a_failure_leaves_the_rest(made_up, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no\nkernel")

    monkeypatch.setattr(compile_bench, "fuse", broken)
    fusion = bench("fusion")
    fusion.compile()
    found = fusion.measure()
    assert found["failed"] == "fuse: RuntimeError: no kernel"
    assert found["fusion_ms"] == 3.0 and "fuse_ms" not in found and found["fusion_error"] > 0


def test_results_that_are_not_finite_have_no_error(made_up):
    inductor = bench("inductor")
    inductor.compile()
    inductor.run = lambda x: inductor.eager(x) * float("nan")
    errors = inductor.check()
    assert errors["inductor_error"] != errors["inductor_error"] and errors["eager_error"] > 0


def test_graphs_are_numbered(monkeypatch):
    monkeypatch.setattr(recording_backend, "compile_graph", lambda graph, inputs: MadeUpGraph())
    backend = RecordingBackend()
    backend(None, [])
    backend(None, [])
    assert [row.graph for row in backend.report.rows] == [0, 0, 1, 1] and backend.report.graphs == 2


def test_warnings_of_others_are_left_out():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for text in ("fusion: a", "fused block 'b'\ncannot run", "fusions", "fusion: a"):
            warnings.warn(text, stacklevel=1)
    assert fusion_warnings(caught) == ["fusion: a", "fused block 'b' cannot run"]

"""Kernels are compiled side by side before blocks are measured; with a made-up GPU."""

import threading
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fusion
from fusion.backend import examine, warm_up
from fusion.backend.judge import CONVOLUTIONS, INDUCTOR, VERDICTS, Verdict
from fusion.backend.region import input_kind
from fusion.launch_record import InputKind
from fusion.planner import blocks
from fusion.planner.plan import plan_block

GPU = torch.device("cuda", 0)
BFLOAT16 = InputKind((2, 16, 8, 8), torch.bfloat16, torch.device("cpu"))


def found(block, device=GPU, shape=(2, 16, 8, 8)):
    node = SimpleNamespace(meta={"example_value": SimpleNamespace(shape=shape, dtype=torch.half, device=device)})
    return SimpleNamespace(block=block, input=node, output=node)


def plan_of(expansion):
    return plan_block(blocks.convfirst(2, 8, 8, 16, expansion), "h200")


@pytest.fixture
def calls(monkeypatch):
    """Blocks that are run in place of their kernels, and in which thread."""
    made = []
    monkeypatch.setattr(warm_up, "_run", lambda found, *_: made.append((found.block, threading.get_ident())))
    return made


@pytest.fixture
def on_cpu(monkeypatch):
    """CPUs taken for GPUs, on which nothing has been measured."""
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(synchronize=lambda: None))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(VERDICTS.__class__, "load", lambda *_: None)


def test_one_block_of_each_plan_runs_once(calls):
    planned = [(found(expansion), plan_of(expansion)) for expansion in (2, 4, 2, 6, 4)]
    planned.append((found("another GPU", torch.device("cuda", 1)), plan_of(2)))
    warm_up.warm_up(planned, 1.0)
    assert {block for block, _ in calls} == {2, 4, 6, "another GPU"} and len(calls) == 4
    assert threading.get_ident() not in {thread for _, thread in calls}


def test_plans_run_side_by_side(monkeypatch):
    barrier = threading.Barrier(3, timeout=60)
    monkeypatch.setattr(warm_up, "WORKERS", 3)
    monkeypatch.setattr(warm_up, "_run", lambda *_: barrier.wait())
    warm_up.warm_up([(found(expansion), plan_of(expansion)) for expansion in (2, 4, 6)], 1.0)
    assert not barrier.broken


def test_nothing_runs_for_cpus(calls, monkeypatch):
    monkeypatch.setattr(warm_up, "ThreadPoolExecutor", None)
    warm_up.warm_up([(found("block", torch.device("cpu")), plan_of(2))], 1.0)
    warm_up.warm_up([], 1.0)
    assert not calls


def test_a_block_runs_as_in_the_model_on_an_input_of_its_kind(on_cpu):
    seen = []

    def block(x):
        seen.append((InputKind.of(x), x.is_contiguous(memory_format=torch.channels_last), torch.is_grad_enabled()))
        seen.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)

    warm_up._run(SimpleNamespace(block=block), plan_of(2), BFLOAT16, 1.0)
    assert seen == [(BFLOAT16, True, False), torch.bfloat16]


@pytest.mark.parametrize(
    ("verdict", "is_run"),
    [
        (Verdict(10.0, 20.0, INDUCTOR), True),
        (Verdict(10.0, 9.0, INDUCTOR), False),
        (Verdict(10.0, 9.0, CONVOLUTIONS), True),
    ],
    ids=["fast", "slow", "to be measured again"],
)
def test_blocks_that_are_left_to_inductor_are_not_compiled(verdict, is_run, on_cpu, monkeypatch):
    monkeypatch.setattr(VERDICTS.__class__, "load", lambda *_: verdict)
    calls = []
    warm_up._run(SimpleNamespace(block=calls.append), plan_of(2), BFLOAT16, 1.0)
    assert len(calls) == is_run
    warm_up._run(SimpleNamespace(block=calls.append), plan_of(2), BFLOAT16, 0)
    assert len(calls) == is_run + 1, "every block is fused"


def test_a_block_that_fails_stops_no_other_and_says_why_when_it_is_measured(random_block, monkeypatch):
    """Examined as on a GPU, where the second of three blocks cannot run."""
    order = []

    def run(found, *_):
        order.append("run")
        if found.block.weights.out_channels == 16:
            raise RuntimeError("no such kernel")

    def judge(graph_module, found, *_):
        run(found)
        order[-1] = "measured"
        return Verdict(1.0, 2.0, INDUCTOR)

    monkeypatch.setattr(warm_up, "input_kind", lambda found: replace(input_kind(found), device=GPU))
    monkeypatch.setattr(warm_up, "_run", run)
    monkeypatch.setattr(examine, "judge", judge)
    monkeypatch.setattr(examine, "_why_no_kernels", lambda *_: None)
    model = nn.Sequential(*(random_block(*sizes, expansion=3) for sizes in ((8, 8), (8, 16), (16, 8)))).eval()
    report = fusion.explain(model, torch.randn(2, 8, 9, 7))
    assert order == ["run"] * 3 + ["measured", "run", "measured"]
    assert [row.name for row in report.fused] == ["0", "2"]
    (left,) = report.left
    assert left.reason == "it cannot be measured (RuntimeError: no such kernel)"

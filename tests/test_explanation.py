"""`FusedModule.explain`."""

import pytest
import torch
from torch import nn

import fusion
from fusion.explanation import NO_PLAN, NOT_A_BLOCK, NOT_RUN
from models import ConvFirst, MBConv


@pytest.fixture(scope="module")
def network():
    layers = MBConv(16, 16), MBConv(16, 16), ConvFirst(16, 24, expansion=2, stride=2), nn.Conv2d(24, 16, 1)
    return nn.Sequential(*layers, MBConv(16, 16, activation=nn.Mish), nn.Flatten(), nn.Linear(192, 5)).eval()


def images(batch=2):
    return torch.randn(batch, 16, 6, 7)


def test_rows_are_in_the_order_of_the_network(network):
    explanation = fusion.fuse(network, images()).explain()
    rows = explanation.rows
    assert [row.name for row in rows] == ["0", "1", "2", "3", "4", "5", "6"]
    assert [row.module for row in rows[:4]] == ["FusedMBConv", "FusedMBConv", "FusedConvFirstDown", "Conv2d"]
    assert [row.input.shape for row in rows] == [
        *[(2, 16, 6, 7)] * 3,
        (2, 24, 3, 4),
        *[(2, 16, 3, 4)] * 2,
        (2, 192),
    ]
    for row in rows[:3]:
        plan = row.plan
        assert (row.program, row.kernel, row.tile) == (plan.program.name, plan.kernel, repr(plan.tile))
        assert (row.ops, row.bytes) == (plan.ops_count, plan.bytes)
        assert (row.predicted_us, row.limit_us) == (plan.predicted_us, plan.limit_us)
        assert row.measured_us is None and row.note == ""
    assert [row.launched_together for row in rows[:3]] == [2, 2, 1]
    assert all(row.plan is None and row.kernel is None and row.ops is None for row in rows[3:])
    assert [row.note for row in rows if row.name != "4"][3:] == [NOT_A_BLOCK] * 3
    assert "Mish" in rows[4].note
    assert explanation.fused == rows[:3]
    assert explanation.total("ops") == sum(row.plan.ops_count for row in rows[:3])
    assert explanation.total("measured_us") is None


def test_the_table_shows_every_row_and_the_sums(network):
    explanation = fusion.fuse(network, images()).explain()
    text = str(explanation)
    lines = text.splitlines()
    for title in ("name", "program", "kernel", "GOP", "MB", "predicted us", "limit us", "measured us"):
        assert title in lines[0]
    assert "2x16x6x7" in lines[2] and "mbconv" in lines[2]
    assert "2 blocks in one launch" in text or explanation.rows[0].launched_together == 1
    assert lines[5].split()[:2] == ["3", "Conv2d"] and lines[5].endswith(NOT_A_BLOCK)
    assert "3 fused" in lines[-1]
    assert f"{explanation.total('predicted_us'):.1f}" in lines[-1]
    assert repr(explanation) == text


def test_an_input_is_explained_and_remembered(network):
    fused = fusion.fuse(network, images())
    assert fused.explain(images(3)).rows[0].input.shape == (3, 16, 6, 7)
    assert fused.explain().rows[0].input.shape == (3, 16, 6, 7)


def test_without_an_input_the_latest_plans_are_told(network):
    fused = fusion.fuse(network)
    rows = fused.explain().rows
    assert [row.name for row in rows] == ["0", "1", "2", "3", "4", "5", "6"]
    assert [row.note for row in rows[:3]] == [NO_PLAN] * 3
    fused(images(4))
    rows = fused.explain().rows
    assert rows[0].plan.shape.batch == 4 and rows[0].note == ""
    assert "4x16x6x7" in str(fused.explain())


def test_measured_times_of_the_tuner_are_told():
    from dataclasses import replace

    fused = fusion.fuse(ConvFirst(16, 16, expansion=2).eval(), images())
    ((device, plan),) = fused.module.plans
    fused.module.adopt_plan(device, replace(plan, measured_us=12.5))
    explanation = fused.explain(images())
    assert explanation.total("measured_us") == 12.5
    assert "(itself)" in str(explanation) and "12.5" in str(explanation)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = ConvFirst(16, 16, expansion=2)
        self.other = ConvFirst(16, 16, expansion=2)
        self.unused = nn.Linear(3, 3)

    def forward(self, x):
        return self.block(self.block(x)[..., :3])


def test_a_block_that_runs_twice_and_layers_that_do_not_run():
    rows = fusion.fuse(Twice().eval(), images()).explain().rows
    assert [(row.name, row.input and row.input.shape) for row in rows] == [
        ("block", (2, 16, 6, 7)),
        ("block", (2, 16, 6, 3)),
        ("other", None),
        ("unused", None),
    ]
    assert [row.note for row in rows] == ["", "", NOT_RUN, f"{NOT_RUN}; {NOT_A_BLOCK}"]
    assert rows[2].plan is None


def test_micro_batches_are_told_one_by_one(network):
    rows = fusion.fuse(network, images(3), micro_batch=2).explain().rows
    assert [row.input.shape[0] for row in rows if row.name == "0"] == [2, 1]


def test_measuring_needs_a_gpu(network):
    fused = fusion.fuse(network)
    with pytest.raises(RuntimeError, match="measuring needs an input on a CUDA GPU: pass one"):
        fused.explain(measure=True)
    with pytest.raises(RuntimeError, match="measuring needs an input on a CUDA GPU, the last one was on cpu"):
        fused.explain(images(), measure=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_measured_on_a_gpu(small_network):
    fused = fusion.fuse(small_network().cuda(), dtype=torch.half)
    explanation = fused.explain(torch.randn(2, 3, 64, 64, device="cuda", dtype=torch.half), measure=True)
    ran = [row for row in explanation.rows if row.note != NOT_RUN]
    assert len(ran) > 8 and all(row.measured_us > 0 for row in ran)
    assert explanation.network_us > 0
    assert f"the whole network, measured: {explanation.network_us:.1f} us" in str(explanation)

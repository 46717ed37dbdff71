"""What happens to one network, with a made-up clock and made-up memory. On a GPU, the command's test has real ones."""

import pytest
import torch
from torch import nn

from fusion.bench import network_bench
from fusion.bench.deferred_inductor import DeferredInductor
from fusion.bench.network_bench import REPEATS, NetworkBench, time_blocks
from fusion.bench.network_build import build_network, count_ops, fuse_network
from fusion.bench.network_case import NetworkCase
from fusion.bench.network_check import compare_logits
from fusion.bench.network_limit import network_ops, network_parts, runs_of_equal_parts
from models.convfirstnet import CONFIGS

CASE = NetworkCase("convfirstnet_pico", batch=2, size=32)
MILLISECOND = 1000.0


@pytest.fixture
def on_a_cpu(monkeypatch):
    """Lets a network be "measured" on a CPU: every graph takes a millisecond."""

    def run_once(run, **_):
        run()
        return MILLISECOND

    monkeypatch.setattr(network_bench, "queued_us", run_once)
    monkeypatch.setattr(network_bench, "_allocated", lambda: 1_000_000)
    monkeypatch.setattr(network_bench, "_peak_bytes", lambda run: run() is None or 3_000_000)
    monkeypatch.setattr(network_bench, "DeferredInductor", lambda module, x: module)
    monkeypatch.setattr(network_bench, "AGREEMENT_IMAGES", 12)


def measure(by_block=False):
    bench = NetworkBench(CASE, tune=False, by_block=by_block, device="cpu")
    prepared = bench.prepare()
    return prepared, bench.measure()


def test_everything_is_found(on_a_cpu):
    prepared, measured = measure(by_block=True)
    parts = network_parts(CONFIGS[CASE.model], CASE.batch, CASE.size)
    assert prepared == {"ops": network_ops(parts), "left_eager": {}}
    for name in ("eager", "inductor", "fused"):
        assert measured[f"{name}_ms"] == 1.0
        assert measured[f"{name}_mb"] == pytest.approx(2.0, abs=0.1)
    assert 0 < measured["error"] <= 2 * measured["eager_error"] < 0.1
    assert measured["agreement_images"] == 12
    assert measured["agreement"] > 80 and measured["eager_agreement"] > 80
    assert measured["top1_classes"] > 1
    runs = runs_of_equal_parts(network_parts(CONFIGS[CASE.model], CASE.batch, CASE.size, joined=True))
    assert [block["us"] for block in measured["blocks"]] == [MILLISECOND / REPEATS / len(run) for run in runs]
    assert measured["blocks"][-1]["kernel"] == "eager", "the classifier"
    assert "failed" not in measured


def test_an_engine_that_fails_leaves_the_others(on_a_cpu, monkeypatch):
    def broken(model, x, tune):
        raise RuntimeError("no\nkernel")

    monkeypatch.setattr(network_bench, "fuse_network", broken)
    prepared, measured = measure()
    assert prepared["failed"] == measured["failed"] == "fused: RuntimeError: no kernel"
    assert (measured["eager_ms"], measured["inductor_ms"]) == (1.0, 1.0)
    assert "fused_ms" not in measured and "error" not in measured


def test_an_engine_that_fails_later(on_a_cpu, monkeypatch):
    class Fragile(nn.Module):
        def forward(self, x):
            raise RuntimeError("out of memory")

    monkeypatch.setattr(network_bench, "DeferredInductor", lambda module, x: Fragile())
    _, measured = measure()
    assert measured["failed"] == "inductor: RuntimeError: out of memory"
    assert measured["fused_ms"] == 1.0 and "inductor_ms" not in measured


def test_blocks_of_another_network(on_a_cpu):
    fused = fuse_network(build_network(CASE, "cpu", calibration_images=2), torch.empty(0), tune=False)
    with pytest.raises(RuntimeError, match="has 30 parts where 38 were expected"):
        time_blocks(fused, NetworkCase("convfirstnet_nano", 2, 32), "cpu")


def test_equal_networks_are_built():
    first, second = (build_network(CASE, "cpu", calibration_images=2) for _ in range(2))
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    assert first.stages[3][2].project_bn.running_var.std() > 0
    assert not any(module.training for module in first.modules())


def test_ops_of_grouped_strided_and_linear_layers():
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    )
    assert count_ops(model, torch.randn(1, 4, 10, 10)) == 2 * (5 * 5 * 8 * 2 * 9 + 8 * 5)


def test_comparison_of_logits():
    exact = torch.eye(4, dtype=torch.float64)
    eager, fused = exact.float() + 0.01, exact.float()
    fused[3] = torch.tensor([9.0, 0, 0, 0])
    found = compare_logits(fused, eager, exact.float(), exact[:2])
    assert (found["agreement"], found["eager_agreement"], found["top1_classes"]) == (75.0, 100.0, 4)
    assert found["error"] == 0 and found["eager_error"] == pytest.approx(0.01 * 8**0.5 / 2**0.5)
    fused[2, 0] = float("inf")
    assert compare_logits(fused, eager, exact.float(), exact[:2])["error"] != found["error"], "any image counts"


def test_inductor_compiles_now_and_runs_later(device):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval().to(device)
    x = torch.randn(2, 3, 8, 8, device=device)
    with torch.no_grad():
        deferred = DeferredInductor(module, x)
        expected = module(x)
        torch.testing.assert_close(deferred(x), expected, rtol=1e-3, atol=1e-3)
        # Frozen: later weights make no difference.
        module[0].weight.zero_()
        torch.testing.assert_close(deferred(x), expected, rtol=1e-3, atol=1e-3)

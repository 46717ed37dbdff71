"""The backend on a GPU: kernels, modes, streams, devices, and measurements that decide."""

import copy
import threading
import warnings

import pytest
import torch
from torch import nn
from triton import knobs

import fusion
from fusion.backend import compile_graph, judge
from fusion.backend.judge import VERDICTS, Verdict, WrongResult
from fusion.modules import FusedMBConv
from fusion.timing import capture
from models import create_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

FUSE_ALL = {"min_speedup": 0, "strict": True}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSION_CACHE_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def network(small_network):
    return small_network().requires_grad_(False)


def on_gpu(network, dtype=torch.float16, device="cuda", memory_format=torch.channels_last):
    return copy.deepcopy(network).to(device=device, dtype=dtype, memory_format=memory_format)


def images(batch=2, height=64, width=64, dtype=torch.float16, device="cuda", seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 3, height, width, generator=generator).to(device, dtype)
    return x.contiguous(memory_format=torch.channels_last)


def compiled(model, mode=None, **options):
    options = {**FUSE_ALL, **options, **({"mode": mode} if mode else {})}
    return torch.compile(model, backend=compile_graph, options=options)


@torch.no_grad()
def assert_right(out, network, model, x, assert_within_rule):
    assert_within_rule(out, model(x), copy.deepcopy(network).to(x.device).double()(x.double()))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@torch.no_grad()
def test_modes_batches_and_sizes(mode, dtype, network, assert_within_rule):
    model = on_gpu(network, dtype)
    fused = compiled(model, mode)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for batch, height in ((2, 64), (3, 64), (40, 64), (3, 64), (1, 33), (2, 64), (2, 64)):
            x = images(batch, height, dtype=dtype, seed=batch)
            assert_right(fused(x).clone(), network, model, x, assert_within_rule)


@torch.no_grad()
def test_contiguous_images_and_weights(network, assert_within_rule):
    model = on_gpu(network, memory_format=torch.contiguous_format)
    x = images().contiguous()
    assert_right(compiled(model)(x), network, model, x, assert_within_rule)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@torch.no_grad()
def test_autocast(dtype, network, assert_within_rule):
    model = on_gpu(network, torch.float32)
    x = images(dtype=torch.float32)
    fused = compiled(model)
    with torch.autocast("cuda", dtype):
        out, eager = fused(x), model(x)
        report = fusion.explain(model, x, options=FUSE_ALL)
    assert len(report.fused) == 11 and not report.left
    assert_within_rule(out, eager, copy.deepcopy(network).cuda().double()(x.double()))


@torch.no_grad()
def test_float32_is_left_alone_with_a_reason(network):
    model, x = on_gpu(network, torch.float32), images(dtype=torch.float32)
    report = fusion.explain(model, x, options=FUSE_ALL)
    assert not report.fused and all("torch.float32" in row.reason for row in report.left)
    torch.testing.assert_close(compiled(model)(x), model(x), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_streams_and_threads(network):
    model = on_gpu(network)
    fused = compiled(model)
    inputs = [images(batch, seed=batch) for batch in (2, 3, 4, 5)]
    expected = [fused(x) for x in inputs]
    torch.cuda.synchronize()
    wrong = []

    def run(x, out):
        stream = torch.cuda.Stream()
        with torch.no_grad(), torch.cuda.stream(stream):
            for _ in range(20):
                distance = (fused(x).float() - out.float()).norm() / out.float().norm()
                if not distance < 0.02:  # sums of the portable squeeze kernels come in any order
                    wrong.append(distance.item())
        stream.synchronize()

    threads = [threading.Thread(target=run, args=pair) for pair in zip(inputs, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@torch.no_grad()
def test_a_model_on_another_gpu_than_the_current_one(network, assert_within_rule):
    model = on_gpu(network, device="cuda:1")
    for mode in ("default", "reduce-overhead"):
        x = images(device="cuda:1")
        out = compiled(model, mode, min_speedup=0.01)(x)
        assert out.device == x.device
        assert_right(out.clone(), network, model, x, assert_within_rule)
        torch.compiler.reset()


@torch.no_grad()
def test_a_graph_of_the_users_own(network, assert_within_rule):
    model, x = on_gpu(network), images()
    fused = compiled(model)
    out = [None]

    def run():
        out[0] = fused(x)

    graph = capture(run)
    x.copy_(images(seed=9))
    graph.replay()
    assert_right(out[0], network, model, x, assert_within_rule)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@torch.no_grad()
def test_weights_that_change_later_count(mode, small_network, network, assert_within_rule):
    model, other = on_gpu(network), small_network(seed=7)
    fused = compiled(model, mode)
    for _ in range(3):
        fused(images())
    model.load_state_dict(other.state_dict())
    x = images()
    assert_right(fused(x).clone(), other, model, x, assert_within_rule)


@torch.no_grad()
def test_slow_blocks_are_left_to_inductor_and_measurements_are_kept(network, folder, monkeypatch):
    model, x = on_gpu(network), images()
    report = fusion.explain(model, x, options={"min_speedup": 1e6})
    assert not report.fused
    assert all("not 1e+06 times as fast" in row.reason for row in report.left)
    assert all(row.verdict.other == judge.INDUCTOR and row.verdict.fused_us > 0 for row in report.left)

    def fail(*_):
        raise AssertionError("measured again")

    monkeypatch.setattr(judge, "_measure", fail)
    assert fusion.explain(model, x, options={"min_speedup": 1e6}) == report
    report = fusion.explain(model, x, options={"min_speedup": 1e-6})
    assert not report.left


@torch.no_grad()
def test_a_bound_is_measured_before_inductor_is(network, monkeypatch):
    def fail(*_):
        raise AssertionError("compiled")

    monkeypatch.setattr(judge, "compile_region", fail)
    report = fusion.explain(on_gpu(network), images(), options={"min_speedup": 1e-3, "strict": True})
    assert not report.left
    assert all(row.verdict.other == judge.CONVOLUTIONS for row in report.fused)


@torch.no_grad()
def test_kernels_are_compiled_in_threads_before_blocks_are_measured(network, folder, monkeypatch):
    threads = set()

    def note(*, cache_hit, **_):
        if not cache_hit:
            threads.add(threading.current_thread())

    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder / "triton"))
    monkeypatch.setattr(knobs.compilation, "listener", note)
    # Of a size that no other test has: what this process has compiled for that is not compiled again.
    report = fusion.explain(on_gpu(network), images(3, 112, 80), options={"min_speedup": 1e-3, "strict": True})
    assert not report.left
    assert threads and threading.current_thread() not in threads


@torch.no_grad()
def test_a_wrong_result_is_no_reason_to_fuse(network, monkeypatch):
    forward = FusedMBConv.forward
    monkeypatch.setattr(FusedMBConv, "forward", lambda self, x: 1.5 * forward(self, x))
    model, x = on_gpu(network), images()
    report = fusion.explain(model, x, options={"min_speedup": 1e-3})
    wrong = [row for row in report.rows if row.kind == "MBConv" and "WrongResult" in row.reason]
    assert len(wrong) == 3
    with pytest.raises(Exception, match="differs from that of the model's layers") as caught:
        fusion.explain(model, x, options={"min_speedup": 1e-3, "strict": True})
    assert WrongResult.__name__ in str(caught.value) or isinstance(caught.value, WrongResult)


@torch.no_grad()
def test_a_stored_measurement_decides(network, monkeypatch):
    model, x = on_gpu(network), images()
    monkeypatch.setattr(VERDICTS.__class__, "load", lambda *_: Verdict(10.0, 9.0, judge.INDUCTOR))
    report = fusion.explain(model, x)
    assert not report.fused and "fused it takes 10.0 us, as Inductor runs it 9.0 us" in report.left[0].reason


@torch.no_grad()
def test_nothing_is_copied_between_inductor_and_fused_blocks(random_block):
    """All kernels of a channels_last model: the blocks' own, and none that only moves data."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
            self.blocks = nn.ModuleList(random_block(16, 16, expansion=3) for _ in range(2))
            self.between = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16))

        def forward(self, x):
            x = self.blocks[0](self.stem(x))
            return self.blocks[1](torch.tanh(self.between(x)))

    model = Model().eval().requires_grad_(False).cuda().half().to(memory_format=torch.channels_last)
    x = torch.randn(8, 16, 64, 64, device="cuda", dtype=torch.half).contiguous(memory_format=torch.channels_last)
    fused = compiled(model)
    for _ in range(3):
        fused(x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        fused(x)
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert sum("convfirst" in name for name in kernels) == 2, kernels
    moves = [
        name for name in kernels if any(word in name.lower() for word in ("copy", "memcpy", "clone", "nchwtonhwc"))
    ]
    assert not moves, kernels
    assert sum("triton" in name for name in kernels) == 2, "one for each batch norm, with its activation"


@torch.no_grad()
def test_the_whole_of_pico_is_as_with_fuse():
    model = create_model("convfirstnet_pico").eval().requires_grad_(False)
    x = images(2, 128, 128)
    fused = fusion.fuse(model, x, dtype=torch.half, device="cuda")
    model = model.cuda().half().to(memory_format=torch.channels_last)
    out = compiled(model)(x)
    assert (out.float() - fused(x).float()).norm() / fused(x).float().norm() < 5e-3

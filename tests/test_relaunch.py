"""What a relaunch passes to Triton's function in C, with all of Triton's own objects made up: no GPU is needed."""

import copy
import inspect
import pickle
import threading
import time
from types import SimpleNamespace

import pytest
import torch
import triton
from triton import knobs

from fusion.relaunch import Relaunches, launch_kernel, launch_key, scratch, taping, zero
from fusion.triton_kernels import cache_keys

BOX = {"swizzle": 3, "elem_size": 2, "elem_type": 6, "block_size": [8, 8], "fp4_padded": False}
FUNCTION, METADATA, STREAM = 77, (4, 1, 1024), 5
BASE = 13
"""Arguments ahead of the kernel's own."""


def signature(x_ptr, x_desc, w_desc, w_ptr, work_ptr, out_ptr, n, S, flag=None):
    """Of the kernel."""


KINDS = (
    "*fp16",
    "tensordesc<fp16[8,8]>",
    "tensordesc<fp16[8,8]>",
    "*fp16",
    "*fp32",
    "*fp16",
    "i32",
    *["constexpr"] * 2,
)


@pytest.fixture
def sent(monkeypatch):
    """The argument lists that reached C."""
    from triton.backends.nvidia import driver as nvidia

    sent = []
    utils = SimpleNamespace(fill_tma_descriptor=lambda address, *box: ("descriptor", address, *box))
    monkeypatch.setattr(triton.runtime.driver, "_active", SimpleNamespace(utils=utils))
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)  # the index of a CPU
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: STREAM, raising=False)
    launcher = object.__new__(nvidia.CudaLauncher)
    launcher.global_scratch_size = launcher.profile_scratch_size = 0
    launcher.launch_cooperative_grid, launcher.launch_pdl = False, True
    launcher.launch = nvidia.wrap_handle_tensordesc(lambda *args: sent.append(args), dict(enumerate(KINDS)), [BOX, BOX])
    return SimpleNamespace(list=sent, launcher=launcher)


class Kernel:
    """Stands for a kernel of Triton that is compiled for these kinds of arguments."""

    def __init__(self, launcher, kinds=KINDS):
        self.signature = inspect.signature(signature)
        self.compiled = SimpleNamespace(
            run=launcher,
            function=FUNCTION,
            packed_metadata=METADATA,
            src=SimpleNamespace(signature=dict(zip(self.signature.parameters, kinds, strict=True))),
            metadata=SimpleNamespace(tensordesc_meta=[BOX, BOX]),
            launch_metadata=lambda grid, stream: ("told", grid, stream),
        )

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.compiled


def described(tensor):
    return SimpleNamespace(base=tensor, shape=[2, 8], strides=[8, 1], padding="zero")


def images():
    return torch.randn(4, 16).half()


def operator(kernel, x, weights):
    """Two launches, each on a half of the images."""
    out, work = torch.empty_like(x), scratch(x, (2, 8), torch.float32)
    scratch(x, (3,))
    zero(work)
    for half in (slice(0, 2), slice(2, 4)):
        args = x[half], described(x), described(weights), weights.view(torch.int16), work
        launch_kernel(kernel, (6,), *args, out_ptr=out[half], n=9, S="constant", num_warps=4)
    return out


def relaunch_of(kernel, x, weights, relaunches=None, run=operator):
    relaunches = relaunches or Relaunches()
    relaunches.record(("key",), x, (weights,), lambda: run(kernel, x, weights))
    return relaunches.get(("key",))


def test_only_what_moved_is_put_in(sent):
    weights = images()
    relaunch = relaunch_of(Kernel(sent.launcher), images(), weights)
    assert not sent.list
    for _ in range(2):
        x = images()
        out = relaunch(x)
        assert (out.shape, out.stride(), out.dtype) == (x.shape, x.stride(), x.dtype)
        calls, sent.list[:] = sent.list[:], []
        assert len(calls) == 2
        for half, args in enumerate(calls):
            assert args[:BASE] == (6, 1, 1, STREAM, FUNCTION, False, True, None, None, METADATA, None, None, None)
            box = (3, 2, 6, [8, 8], [2, 8], [8, 1], 0)
            offset, work = half * 2 * 16 * 2, args[BASE + 12]
            assert args[BASE:] == (
                *(x.data_ptr() + offset, ("descriptor", x.data_ptr(), *box), 2, 8, 8, 1),
                *(("descriptor", weights.data_ptr(), *box), 2, 8, 8, 1, weights.data_ptr()),
                *(work, out.data_ptr() + offset, 9, None, None),
            )
            assert work % 16 == 0
        assert calls[0][BASE + 12] == calls[1][BASE + 12]


def test_scratch_memory_is_zeroed_where_it_was(sent, monkeypatch):
    memory = []

    def dirty(size, **options):
        memory.append(torch.full((size,), 7, **options))
        return memory[-1]

    relaunch = relaunch_of(Kernel(sent.launcher), images(), images())
    monkeypatch.setattr(torch, "empty", dirty)
    relaunch(images())
    (memory,) = memory
    assert sent.list[0][BASE + 12] == memory.data_ptr()
    assert not memory[: 2 * 8 * 4].any() and (memory[2 * 8 * 4 :] == 7).all()
    assert memory.numel() == 2 * 512


@pytest.mark.parametrize(
    "case", ["a copy of x", "other weights", "a tuple", "scratch of Triton", "another Triton", "no launch", "not CUDA"]
)
def test_what_cannot_be_launched_again_runs_by_the_operator(case, sent, monkeypatch):
    x, weights, runs = images(), images(), []
    kinds = (*KINDS[:-1], ("constexpr", "constexpr")) if case == "a tuple" else KINDS
    kernel = Kernel(sent.launcher, kinds)
    if case == "scratch of Triton":
        sent.launcher.global_scratch_size = 16
    if case == "another Triton":
        monkeypatch.setattr(triton, "__version__", "3.7.1")
    if case == "not CUDA":
        kernel.compiled.run = lambda *args: None

    def run(kernel, x, weights):
        runs.append(case)
        if case == "no launch":
            return torch.empty_like(x)
        x = x.clone() if case == "a copy of x" else x
        weights = weights.clone() if case == "other weights" else weights
        return operator(kernel, x, weights)

    relaunches = Relaunches()
    for count in (1, 2):
        assert relaunch_of(kernel, x, weights, relaunches, run) is None
        assert len(runs) == count and not sent.list


def test_hooks_of_a_profiler_are_called(sent, monkeypatch):
    relaunch = relaunch_of(Kernel(sent.launcher), images(), images())
    hook = knobs.HookChain()
    monkeypatch.setattr(knobs.runtime, "launch_enter_hook", hook)
    relaunch(images())
    assert sent.list[-1][10:BASE] == (None, None, None)
    hook.add(print)
    relaunch(images())
    assert sent.list[-1][10:BASE] == (("told", (6, 1, 1), STREAM), hook, knobs.runtime.launch_exit_hook)


def test_threads_do_not_disturb_each_other(sent):
    relaunch = relaunch_of(Kernel(sent.launcher), images(), images())
    inputs = [images() for _ in range(4)]
    threads = [threading.Thread(target=lambda x=x: [relaunch(x) for _ in range(200)]) for x in inputs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(sent.list) == 4 * 200 * 2
    starts = {x.data_ptr() + half for x in inputs for half in (0, 2 * 16 * 2)}
    assert {args[BASE] for args in sent.list} == starts
    assert all(args[BASE] - args[BASE + 1][1] in (0, 2 * 16 * 2) for args in sent.list)


def test_threads_settle_keys_one_after_the_other(sent, monkeypatch):
    inside, most = [], []

    def settle(kernel):
        inside.append(kernel)
        most.append(len(inside))
        time.sleep(0.01)
        inside.pop()

    monkeypatch.setattr(cache_keys, "settle_cache_keys", settle)
    kernel = Kernel(sent.launcher)
    threads = [threading.Thread(target=operator, args=(kernel, images(), images())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 4 * 2 and max(most) == 1


def test_a_copy_has_none(sent):
    relaunches = Relaunches()
    assert relaunch_of(Kernel(sent.launcher), images(), images(), relaunches) is not None
    for twin in (copy.deepcopy(relaunches), pickle.loads(pickle.dumps(relaunches))):
        assert twin.get(("key",)) is None
    relaunches.clear()
    assert relaunches.get(("key",)) is None


def test_cpus_run_operators():
    assert launch_key(torch.randn(1, 8, 2, 2)) is None


def test_a_tape_notes_only_its_own_thread(sent):
    kernel = Kernel(sent.launcher)
    with taping() as tape:
        thread = threading.Thread(target=operator, args=(kernel, images(), images()))
        thread.start()
        thread.join()
        assert not tape.launches and not tape.scratch
        operator(kernel, images(), images())
    operator(kernel, images(), images())
    assert len(tape.launches) == 2 and len(tape.scratch) == 2 and len(tape.zeroed) == 1

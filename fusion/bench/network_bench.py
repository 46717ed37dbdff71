"""One network on a GPU: eager, Inductor's code and fused, checked and timed."""

import copy
import gc
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusion.bench.answers import describe
from fusion.bench.calibrate import image_batches, synthetic_images
from fusion.bench.deferred_inductor import DeferredInductor
from fusion.bench.network_build import build_network, count_ops, fuse_network, network_units
from fusion.bench.network_case import NetworkCase
from fusion.bench.network_check import AGREEMENT_IMAGES, CHECKED_IMAGES, compare_logits
from fusion.bench.network_limit import network_parts, runs_of_equal_parts
from fusion.joined_stem import JoinedStem
from fusion.launch_record import InputKind
from fusion.modules import FusedBlock
from fusion.stage import FusedStage
from fusion.timing import queued_us
from models.convfirstnet import CONFIGS

REPEATS = 8
"""Launches of a part in its graph, whose own launch takes longer than a small part does."""
MOST_BATCHES = 128
"""Batches that agreement is counted on: fewer than `AGREEMENT_IMAGES` images if a batch has few."""


class Engine:
    """A way to run a network on a batch.

    `resident` counts the bytes of GPU memory that it holds between runs, mostly weights.
    """

    def __init__(self, make: Callable[[], Callable[[Tensor], Tensor]]):
        before = _allocated()
        self.run = make()
        self.resident = _allocated() - before

    def first_run(self, x: Tensor) -> None:
        """Run once; what stays is resident."""
        before = _allocated()
        self.run(x)
        self.resident += _allocated() - before

    def ms(self, x: Tensor) -> float:
        """Milliseconds a batch, in a CUDA graph."""
        return queued_us(lambda: self.run(x)) / 1e3

    def peak_mb(self, x: Tensor) -> float:
        """Most memory allocated during a run of this engine alone, in MB: what is resident, `x`, and what it takes."""
        taken = _peak_bytes(lambda: self.run(x)) - _allocated()
        return (self.resident + x.nbytes + taken) / 1e6


class NetworkBench:
    """A network to measure on the current GPU, which is `device`, in two phases.

    `prepare` builds and compiles everything, and lets no algorithm be chosen by timing: other processes may keep the
    GPU busy meanwhile. `measure` needs a quiet GPU. Both return a part of what `fusion.bench.network_row` takes. When
    an engine fails the others still run, and "failed" says what happened.
    """

    def __init__(self, case: NetworkCase, tune: bool, by_block: bool, device: str = "cuda"):
        self.case = case
        self.tune = tune
        self.by_block = by_block
        self.device = device
        self.engines: dict[str, Engine] = {}
        self.failures: list[str] = []
        self.references: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def prepare(self) -> dict:
        case, dtype = self.case, getattr(torch, self.case.dtype)
        torch.backends.cudnn.benchmark = False
        model = build_network(case, self.device)
        found = {"ops": case.batch * count_ops(model, synthetic_images(1, case.size, device=self.device))}
        self.x = next(self._batches()).to(dtype)
        self._try("eager", lambda: copy.deepcopy(model).to(dtype))
        if "eager" in self.engines:
            self._try("inductor", lambda: DeferredInductor(self.engines["eager"].run, self.x))
        if not case.is_rival:
            with self._watch("references"):
                self.references = self._references(model)
            if self._try("fused", lambda: fuse_network(model, self.x, self.tune)):
                found["left_eager"] = dict(self.engines["fused"].run.left_eager)
                if not found["left_eager"]:
                    # Compiles the kernels. With an eager layer, cuDNN would choose its algorithm now.
                    with self._watch("fused"):
                        self.engines["fused"].first_run(self.x)
        torch.cuda.empty_cache()
        return found | self._failed()

    @torch.no_grad()
    def measure(self) -> dict:
        torch.backends.cudnn.benchmark = True
        # What cuBLAS allocates at its first product stays, and is no engine's.
        small = torch.zeros(8, 8, dtype=self.x.dtype, device=self.device)
        F.linear(small, small, small[0])
        found = {}
        for name, engine in list(self.engines.items()):
            with self._watch(name):
                engine.first_run(self.x)
                found[f"{name}_mb"] = engine.peak_mb(self.x)
                found[f"{name}_ms"] = engine.ms(self.x)
        if "inductor_mb" in found:
            # Its frozen weights are copies of the module's, which stay.
            found["inductor_mb"] += self.engines["eager"].resident / 1e6
        if self.references is not None and {"eager", "fused"} <= set(self.engines):
            with self._watch("check"):
                found |= self._check()
        if self.by_block and "fused" in self.engines:
            with self._watch("by block"):
                found["blocks"] = time_blocks(self.engines["fused"].run, self.case, self.device)
        return found | self._failed()

    def _try(self, name: str, make: Callable[[], Callable[[Tensor], Tensor]]) -> bool:
        with self._watch(name):
            self.engines[name] = Engine(make)
        return name in self.engines

    @contextmanager
    def _watch(self, name: str) -> Iterator[None]:
        """Keep what is raised as a failure of the engine `name`, which then is no more."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.engines.pop(name, None)
            self.failures.append(f"{name}: {describe(error)}")

    def _failed(self) -> dict:
        return {"failed": "; ".join(self.failures)} if self.failures else {}

    def _batches(self) -> Iterator[Tensor]:
        batches = min(-(-AGREEMENT_IMAGES // self.case.batch), MOST_BATCHES)
        return image_batches(batches * self.case.batch, self.case.batch, self.case.size, device=self.device)

    def _references(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        """Logits of all images in float32, and of the first in float64."""
        single = torch.cat([model(images) for images in self._batches()])
        first = torch.cat(list(islice(self._batches(), -(-CHECKED_IMAGES // self.case.batch))))[:CHECKED_IMAGES]
        return single, copy.deepcopy(model).double()(first.double())

    def _check(self) -> dict:
        fused, eager = (
            torch.cat([self.engines[name].run(images.to(self.x.dtype)) for images in self._batches()])
            for name in ("fused", "eager")
        )
        return compare_logits(fused, eager, *self.references)


def time_blocks(fused: nn.Module, case: NetworkCase, device: str = "cuda") -> list[dict]:
    """Microseconds of one of each run of equal parts of a fused network, and the kernel that runs it.

    Equal parts that follow each other are timed as a stage, several times in a CUDA graph, on random inputs; the time
    of one is the stage's divided by their number. Raises RuntimeError if the network has other parts than are expected.
    """
    units = network_units(fused)
    is_joined = isinstance(units[0], JoinedStem)
    if is_joined:
        stem = units[0]
        images = InputKind((case.batch, 3, case.size, case.size), getattr(torch, case.dtype), torch.device(device))
        is_joined = stem.runs_together(images)
        units[:1] = [stem.together] if is_joined else [stem.stem, stem.block]
    runs = runs_of_equal_parts(network_parts(CONFIGS[case.model], case.batch, case.size, case.dtype, joined=is_joined))
    expected = sum(map(len, runs))
    if len(units) != expected:
        raise RuntimeError(f"{case.model} has {len(units)} parts where {expected} were expected; leave out --by-block")
    timed = []
    for run in runs:
        stage, units = units[: len(run)], units[len(run) :]
        x = torch.randn(run[0].input_shape, device=device, dtype=getattr(torch, case.dtype))
        if x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        is_fused = all(isinstance(unit, FusedBlock) for unit in stage)
        kernel = stage[0].plan(x).kernel if is_fused else "eager"
        together = FusedStage(stage) if is_fused else nn.Sequential(*stage)
        together(x)
        us = queued_us(lambda together=together, x=x: [together(x) for _ in range(REPEATS)]) / REPEATS
        timed.append({"us": us / len(run), "kernel": kernel})
    return timed


def _allocated() -> int:
    """Bytes that PyTorch's allocator has given out on the current GPU."""
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def _peak_bytes(run: Callable[[], object]) -> int:
    """The most bytes that were given out at a time during `run`."""
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()

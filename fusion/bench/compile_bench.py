"""One network as `torch.compile` makes it: compiled against the clock, checked, timed."""

import copy
import traceback
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from itertools import islice
from time import perf_counter

import torch
from torch import Tensor, nn

from fusion.bench.answers import describe
from fusion.bench.calibrate import image_batches
from fusion.bench.compile_settings import CompileSettings
from fusion.bench.model_build import build_model
from fusion.bench.model_case import ModelCase
from fusion.bench.network_check import CHECKED_IMAGES
from fusion.bench.recording_backend import RecordingBackend
from fusion.fusing import fuse
from fusion.reference import relative_error
from fusion.timing import called_us, queued_us

OWN_WARNINGS = ("fusion: ", "fused block ")
"""How warnings of the backend begin."""


class CompileBench:
    """A network to compile with one of `fusion.bench.compile_settings.ENGINES` on `device`, and to measure then.

    `compile` comes first. Both return a part of what `fusion.bench.compile_row` takes. When one thing cannot be
    measured the others still are, and "failed" says what happened.
    """

    def __init__(
        self,
        case: ModelCase,
        engine: str,
        settings: CompileSettings,
        device: str = "cuda",
        calibration_images: int = 32,
    ):
        self.case = case
        self.engine = engine
        self.settings = settings
        self.device = device
        self.dtype = getattr(torch, case.dtype)
        self.model = build_model(case, device, calibration_images)
        self.eager = copy.deepcopy(self.model).to(self.dtype)
        self.x = next(self._batches()).to(self.dtype)
        self.failures: list[str] = []

    @torch.no_grad()
    def compile(self) -> dict:
        """Seconds from the call of `torch.compile` to the end of the first run, and what the backend reports.

        What is imported, and what libraries choose or load when a network first runs, does not count: it runs eagerly
        before.
        """
        import torch._dynamo
        import torch._inductor.compile_fx

        recorder = RecordingBackend() if self.engine == "fusion" else None
        out = self.eager(self.x)
        if not isinstance(out, Tensor):
            raise TypeError(
                f"{self.case.model} returns a {type(out).__name__}; only networks that return a tensor can be checked"
            )
        self._wait()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            start = perf_counter()
            self.run = torch.compile(self.eager, backend=recorder or "inductor", **self.settings.arguments(self.engine))
            self.run(self.x)
            self._wait()
            seconds = perf_counter() - start
        if recorder is None:
            return {"seconds": seconds}
        return {"seconds": seconds, "warnings": fusion_warnings(caught), **report_entries(recorder)}

    @torch.no_grad()
    def measure(self) -> dict:
        """Milliseconds a batch of what was compiled, and of what it is compared with; and errors."""
        found = {}
        runs: dict[str, Callable[[Tensor], Tensor]] = {self.engine: self.run}
        if self.engine == "inductor":
            runs["eager"] = self.eager
        elif self.case.is_convfirstnet:
            with self._watch("fuse"):
                runs["fuse"] = self._fused()
        clock = called_us if self.settings.has_graphs else queued_us
        for name, run in runs.items():
            with self._watch(name):
                found[f"{name}_ms"] = clock(lambda run=run: run(self.x)) / 1e3
        with self._watch("check"):
            found |= self._check()
        return found | self._failed()

    @torch.no_grad()
    def check(self) -> dict:
        """Errors alone, of what was compiled and of eager PyTorch."""
        with self._watch("check"):
            return self._check()
        return self._failed()

    def _check(self) -> dict:
        """Relative L2 errors of the logits of the first images against float64."""
        count = -(-CHECKED_IMAGES // self.case.batch)
        batches = list(islice(self._batches(), count))
        images = torch.cat(batches)[:CHECKED_IMAGES]
        exact = copy.deepcopy(self.model).double()(images.double())

        def error(run: Callable[[Tensor], Tensor]) -> float:
            # Code in CUDA graphs overwrites what it gave before.
            out = torch.cat([run(batch.to(self.dtype)).clone() for batch in batches])
            return relative_error(out[: len(exact)], exact) if out.isfinite().all() else float("nan")

        return {f"{self.engine}_error": error(self.run), "eager_error": error(self.eager)}

    def _fused(self) -> nn.Module:
        tune = self.settings.tune or self.settings.mode.startswith("max-autotune")
        return fuse(self.model, tune=tune, dtype=self.dtype, device=self.device, cuda_graphs=self.settings.has_graphs)

    def _batches(self):
        return image_batches(CHECKED_IMAGES * self.case.batch, self.case.batch, self.case.size, device=self.device)

    def _wait(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()

    @contextmanager
    def _watch(self, name: str):
        """Keep what is raised as a failure of `name`."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.failures.append(f"{name}: {describe(error)}")

    def _failed(self) -> dict:
        return {"failed": "; ".join(self.failures)} if self.failures else {}


def report_entries(recorder: RecordingBackend) -> dict:
    """A report as data, and as text to print."""
    report = recorder.report
    return {"report": report.to_json(), "report_text": str(report)}


def fusion_warnings(caught: list[warnings.WarningMessage]) -> list[str]:
    """Those of some warnings that the backend raised, in one line each."""
    texts = (" ".join(str(warning.message).split()) for warning in caught)
    return list(dict.fromkeys(text for text in texts if text.startswith(OWN_WARNINGS)))

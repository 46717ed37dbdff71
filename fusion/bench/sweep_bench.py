"""One network of a sweep: Inductor's code and the backend's for it, compared.

python -m fusion.bench.sweep_bench      a process that answers lines of JSON (`fusion.bench.answers`)
"""

import warnings
from collections.abc import Callable, Mapping
from time import perf_counter

import torch
from torch import Tensor

from fusion.bench.answers import answer_requests
from fusion.bench.calibrate import synthetic_images
from fusion.bench.compile_bench import fusion_warnings
from fusion.bench.model_build import build_model
from fusion.bench.model_case import ModelCase
from fusion.bench.recording_backend import RecordingBackend
from fusion.reference import relative_error

CALIBRATION_IMAGES, CALIBRATION_BATCHES = 8, 1
VARIANTS: Mapping[str, Mapping[str, object]] = {"default": {}, "all": {"min_speedup": 0}}
"""Options of the backend: as a user has it, and with every block fused that has a kernel."""


class SweepBench:
    """A network to compile in several ways, in the dtype of the case; what it gives is compared on one batch.

    `build` comes first, then `inductor`: its result and its caches serve the variants, which have the names of
    `VARIANTS`.
    """

    def __init__(self, case: ModelCase, device: str):
        # A reference in TF32 would be none.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        self.device = device
        model = build_model(case, device, CALIBRATION_IMAGES, CALIBRATION_BATCHES)
        images = synthetic_images(case.batch, case.size, device=device).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            self.single = model(images)
        dtype = getattr(torch, case.dtype)
        self.model = model.to(dtype)
        self.x = images.to(dtype)

    def build(self) -> dict:
        """Nothing more: a network that this can be asked has been built, and has run eagerly in float32."""
        return {}

    def inductor(self) -> dict:
        """Seconds of the compilation, and the distance of the result from eager PyTorch's in float32."""
        self.expected, seconds = self._compiled("inductor", {})
        return {"seconds": seconds, "distance": _distance(self.expected, self.single)}

    def default(self) -> dict:
        """The backend as a user has it."""
        return self._variant("default")

    def all(self) -> dict:
        """The backend with every block fused that has a kernel."""
        return self._variant("all")

    def _variant(self, name: str) -> dict:
        recorder = RecordingBackend()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            out, seconds = self._compiled(recorder, {"options": dict(VARIANTS[name])} if VARIANTS[name] else {})
        if (out.shape, out.dtype) != (self.expected.shape, self.expected.dtype):
            mine, theirs = ([*y.shape, str(y.dtype)] for y in (out, self.expected))
            raise RuntimeError(f"the result is {mine}, Inductor's {theirs}")
        return {
            "seconds": seconds,
            "distance": _distance(out, self.expected),
            "warnings": fusion_warnings(caught),
            "report": recorder.report.to_json(),
        }

    @torch.no_grad()
    def _compiled(self, backend: str | Callable, arguments: dict) -> tuple[Tensor, float]:
        torch.compiler.reset()
        start = perf_counter()
        out = torch.compile(self.model, backend=backend, **arguments)(self.x)
        if self.device == "cuda":
            torch.cuda.synchronize()
        seconds = perf_counter() - start
        if not isinstance(out, Tensor):
            raise TypeError(f"the network returns a {type(out).__name__}, not a tensor")
        return out.clone(), seconds


def _distance(out: Tensor, other: Tensor) -> float | None:
    """Relative L2 distance; None, which is JSON, if it is not finite."""
    return relative_error(out, other.double()) if out.isfinite().all() and other.isfinite().all() else None


def make_bench(request: dict) -> SweepBench:
    """The network that a first request names."""
    return SweepBench(ModelCase(**request["case"]), request["device"])


if __name__ == "__main__":
    answer_requests(make_bench)

"""Compiled networks without a GPU: what can be checked on a CPU, in this process; only compiling is timed."""

from collections.abc import Callable, Sequence

import torch

from fusion.bench.answers import describe
from fusion.bench.compile_bench import CompileBench
from fusion.bench.compile_row import Row, compile_row
from fusion.bench.compile_settings import CompileSettings
from fusion.bench.model_case import ModelCase
from fusion.progress import progress_bar

CHECKED_BATCH, CHECKED_PIXELS = 2, 64
CALIBRATION_IMAGES = 8


def check_models(cases: Sequence[ModelCase], settings: CompileSettings, keep: Callable[[Row, str], None]) -> None:
    """Give `keep` a row for each case and the table of its blocks. Inductor alone does not run.

    A fused block on a CPU computes with the folded weights what its kernel would.
    """
    with progress_bar("compiling networks", len(cases)) as bar:
        for case in cases:
            found = check_model(case, settings)
            keep(compile_row(case, settings, found), found.get("report_text", ""))
            bar.advance()


def check_model(case: ModelCase, settings: CompileSettings) -> dict:
    """What `fusion.bench.compile_row` takes of a network that was compared with float64 on a CPU."""
    torch.compiler.reset()
    try:
        bench = CompileBench(case, "fusion", settings, "cpu", CALIBRATION_IMAGES)
        compiled = bench.compile()
        return {**compiled, "fusion_here_s": compiled["seconds"], **bench.check()}
    except Exception as error:
        return {"failed": describe(error)}

"""Compiled networks on a GPU: each compilation in a process of its own, one after the other."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

from fusion.bench.case_worker import CaseWorker
from fusion.bench.compile_row import Row, compile_row
from fusion.bench.compile_settings import CompileSettings
from fusion.bench.model_case import ModelCase
from fusion.progress import progress_bar

CACHES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton", "FUSION_CACHE_DIR": "fusion"}
"""Variables that name the folders where compilers remember what they have done, and folders for them."""

Found = dict[str, object]


def measure_models(
    cases: Sequence[ModelCase], settings: CompileSettings, cold: bool, seconds: float, keep: Callable[[Row, str], None]
) -> None:
    """Give `keep` a row for each case, as soon as there is one, and the table of its blocks.

    With `cold`, caches are empty at first and removed in the end; otherwise they are the user's, and seconds of
    compilation, which would mean nothing, are left out. A process that takes more than `seconds` to answer is given up.
    """
    with progress_bar("compiling networks", len(cases)) as bar:
        for case in cases:
            found = measure_model(case, settings, cold, seconds)
            keep(compile_row(case, settings, found), found.get("report_text", ""))
            bar.advance()


def measure_model(case: ModelCase, settings: CompileSettings, cold: bool, seconds: float) -> Found:
    """What `fusion.bench.compile_row` takes of one network, and the report's text as "report_text".

    Inductor compiles and is timed in one process; "fusion" compiles in a second, and again in a third, with the caches
    that the second left, and is timed there.
    """
    found: Found = {}
    failures: list[str] = []

    def note(engine: str, replies: Mapping[str, Mapping[str, object]], seconds_key: str) -> None:
        for reply in replies.values():
            found.update((key, value) for key, value in reply.items() if key not in ("failed", "seconds"))
            if "failed" in reply:
                failures.append(f"{engine}: {reply['failed']}")
        if cold and "seconds" in replies["compile"]:
            found[seconds_key] = replies["compile"]["seconds"]

    with TemporaryDirectory(prefix="fusion-compile-", ignore_cleanup_errors=True) as folder:

        def ask(engine: str, *steps: str) -> dict[str, Found]:
            return ask_worker(
                case, engine, settings, cache_variables(Path(folder, engine)) if cold else {}, steps, seconds
            )

        note("inductor", ask("inductor", "compile", "measure"), "inductor_cold_s")
        first = ask("fusion", "compile") if cold else {}
        if cold:
            note("fusion", first, "fusion_cold_s")
        if "failed" not in first.get("compile", {}):
            note("fusion", ask("fusion", "compile", "measure"), "fusion_warm_s")
    return found | ({"failed": "; ".join(dict.fromkeys(failures))} if failures else {})


def ask_worker(
    case: ModelCase,
    engine: str,
    settings: CompileSettings,
    variables: Mapping[str, str],
    steps: Sequence[str],
    seconds: float,
) -> dict[str, Found]:
    """The answers of a fresh process to the steps, up to the first that fails."""
    worker = compile_worker(variables)
    request = {"case": asdict(case), "engine": engine, "settings": asdict(settings)}
    replies: dict[str, Found] = {}
    try:
        for step in steps:
            replies[step] = worker.ask({**request, "do": step}, seconds)
            if "failed" in replies[step]:
                break
    finally:
        worker.close()
    if any("failed" in reply for reply in replies.values()):
        print(f"fusion.bench: {engine} on {case} failed, its process said:\n{worker.log}", file=sys.stderr)
    return replies


def cache_variables(folder: Path) -> dict[str, str]:
    """Variables that put all caches into `folder`."""
    return {variable: str(folder / name) for variable, name in CACHES.items()}


def compile_worker(variables: Mapping[str, str]) -> CaseWorker:
    """A process for one compilation (`fusion.bench.compile_worker`), which may use all processor cores."""
    command = [sys.executable, "-m", "fusion.bench.compile_worker"]
    return CaseWorker(command, os.cpu_count() or 1, variables)

"""Compile many small networks with Inductor and with the backend "fusion", and compare: nothing may break.

    python bench/compile_sweep.py --json sweep.json --table sweep.md
    python bench/compile_sweep.py regnety_002 efficientnet_b0:group_size=8

Each network of timm (or of this project: see `python -m fusion.bench compile --help`) is compiled in a process of its
own, several side by side, with random weights, and the backend's result is compared with Inductor's: on a GPU in fp16
as a user has it ("default") and with every block fused that has a kernel ("all"); on a CPU in float32 with "all" only,
where fused blocks compute their references. The backend measures blocks while other processes keep the GPU busy, so
which blocks "default" fuses says little. Networks that Inductor cannot compile either are skipped. The exit code is 1
if a network breaks, or none could be compared.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

import torch

from fusion.bench import report
from fusion.bench.case_worker import CaseWorker
from fusion.bench.model_case import ModelCase, image_size, known_model
from fusion.bench.network_case import timm_version
from fusion.bench.sweep_models import PREFERRED_SIZE, SWEEP
from fusion.bench.sweep_row import (
    BROKEN,
    OK,
    STEPS,
    Row,
    markdown_table,
    summary,
    sweep_cells,
    sweep_columns,
    sweep_row,
)
from fusion.progress import progress_bar

BATCH = 2
PROTOCOL = (
    "every network in a process of its own, several side by side, one compile thread each: random weights, batch norm "
    "calibrated on 8 synthetic images, channels_last; torch.compile in its default mode, then with the backend "
    "'fusion' in the same process; distances: relative L2 of the logits; seconds: compiling and the first run, the "
    "later ones with the caches of the first; nothing is a measurement of speed"
)


def sweep(
    cases: Sequence[ModelCase],
    device: str,
    variants: Sequence[str],
    at_once: int,
    seconds: float,
    keep: Callable[[Row], None],
) -> None:
    """Give `keep` a row for each case. A process that takes more than `seconds` for one compilation is given up."""
    command = [sys.executable, "-m", "fusion.bench.sweep_bench"]
    workers = {case: CaseWorker(command) for case in cases}

    def run(case: ModelCase) -> Row:
        replies: dict[str, dict] = {}
        for step in (*STEPS, *variants):
            replies[step] = workers[case].ask({"case": asdict(case), "device": device, "do": step}, seconds)
            if step in STEPS and "failed" in replies[step]:
                break
        workers[case].close()
        return sweep_row(case, replies)

    pool = ThreadPoolExecutor(at_once)
    try:
        futures = [pool.submit(run, case) for case in cases]
        with progress_bar("compiling networks", len(cases)) as bar:
            for future in as_completed(futures):
                keep(future.result())
                bar.advance()
    finally:
        for worker in workers.values():
            worker.close()
        pool.shutdown(cancel_futures=True)


def installed(models: Sequence[str]) -> tuple[list[str], list[str]]:
    """Full names of those networks that there are, and the others: versions of timm differ."""
    there: list[str] = []
    missing: list[str] = []
    for text in models:
        try:
            there.append(known_model(text))
        except ValueError:
            missing.append(text)
    return there, missing


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"default: {len(SWEEP)} of all families")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 1) - 1), metavar="N")
    parser.add_argument("--timeout", type=int, default=240, metavar="S", help="for one compilation; default: 240")
    parser.add_argument("--json", metavar="PATH", help="write everything as JSON, after every network")
    parser.add_argument("--table", metavar="PATH", help="write the table as Markdown")
    args = parser.parse_args()
    for path in filter(None, (args.json, args.table)):
        report.check_writable(path)
    timed = torch.cuda.is_available()
    device, dtype = ("cuda", "float16") if timed else ("cpu", "float32")
    variants = ("default", "all") if timed else ("all",)
    models, missing = [known_model(text) for text in args.models], []
    if not args.models:
        models, missing = installed(SWEEP)
    cases = [ModelCase(model, BATCH, image_size(model, preferred=PREFERRED_SIZE), dtype) for model in models]
    meta = report.collect_meta(PROTOCOL, dtype=dtype, variants=list(variants), timm=timm_version(), missing=missing)
    rows: list[Row] = []

    def keep(row: Row) -> None:
        rows.append(row)
        if args.json:
            report.write_json(args.json, meta, rows)

    with tempfile.TemporaryDirectory(prefix="fusion-sweep-", ignore_cleanup_errors=True) as folder:
        # What is measured on a GPU that others keep busy must not be remembered.
        os.environ["FUSION_CACHE_DIR"] = folder
        sweep(cases, device, variants, args.workers, args.timeout, keep)
    order = {case.model: index for index, case in enumerate(cases)}
    rows.sort(key=lambda row: order[row["model"]])
    columns, cells = sweep_columns(variants), [sweep_cells(row, variants) for row in rows]
    if args.json:
        report.write_json(args.json, meta, rows)
    if args.table:
        Path(args.table).write_text(markdown_table(columns, cells))
    report.print_table(columns, cells, f"The backend 'fusion' next to Inductor on {meta['device']}, {dtype}")
    print(summary(rows))
    if missing:
        print(f"not in timm {timm_version()}: {', '.join(missing)}")
    for row in rows:
        texts = {text for variant in row["variants"].values() for text in variant.get("warnings", ())}
        for text in sorted(texts):
            print(f"warning: {row['model']}: {text}")
    statuses = {row["status"] for row in rows}
    return 1 if BROKEN in statuses or OK not in statuses else 0


if __name__ == "__main__":
    sys.exit(main())

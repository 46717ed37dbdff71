"""One row of `python -m fusion.bench compile`: its JSON contract, in one place."""

from collections.abc import Mapping

from fusion.bench.compile_settings import CompileSettings
from fusion.bench.model_case import ModelCase

Row = dict[str, object]

MEASURED_KEYS = (
    *("eager_ms", "inductor_ms", "fusion_ms", "fuse_ms", "fusion_error", "inductor_error", "eager_error"),
    *("inductor_cold_s", "fusion_cold_s", "fusion_warm_s", "fusion_here_s", "warnings", "report"),
)
"""What a run finds out about a network; what it did not is None."""


def compile_row(case: ModelCase, settings: CompileSettings, found: Mapping[str, object]) -> Row:
    """A network's row: what was `found`, by `MEASURED_KEYS`, and what follows from that.

    Times are in milliseconds a batch, those that end in `_s` seconds of compilation: in a fresh process with empty
    caches (`cold`), with the caches that it left (`warm`), or in the command's own process with the caches as they were
    (`here`). Errors are relative to float64. `over_fuse_pct` says by how many percent the compiled network takes longer
    than `fusion.fuse`'s. `blocks_found` counts what looks like a block too; the reasons why some are left are in
    `report`, which is `fusion.backend.report.CompileReport.to_json()`.
    """
    measured = {key: found.get(key) for key in MEASURED_KEYS}
    fusion_ms, report = measured["fusion_ms"], measured["report"]
    blocks = report["blocks"] if report else None
    fused = None if blocks is None else sum(block["fused"] for block in blocks)
    over_fuse = _ratio(fusion_ms, measured["fuse_ms"])
    return {
        "model": case.model,
        "batch": case.batch,
        "size": case.size,
        "dtype": case.dtype,
        "mode": settings.mode,
        **measured,
        "speedup_over_eager": _ratio(measured["eager_ms"], fusion_ms),
        "speedup_over_inductor": _ratio(measured["inductor_ms"], fusion_ms),
        "over_fuse_pct": None if over_fuse is None else 100 * (over_fuse - 1),
        "graphs": report["graphs"] if report else None,
        "blocks_found": None if blocks is None else len(blocks),
        "blocks_fused": fused,
        "blocks_left": None if blocks is None else len(blocks) - fused,
        "failed": found.get("failed"),
    }


def _ratio(numerator: float | None, denominator: float | None) -> float | None:
    return None if None in (numerator, denominator) else numerator / denominator

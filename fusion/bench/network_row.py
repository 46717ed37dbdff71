"""One row of a network benchmark: the JSON contract of `python -m fusion.bench network`, in one place."""

from collections.abc import Mapping, Sequence

from fusion.bench.network_case import NetworkCase
from fusion.bench.network_limit import Part, network_limit_ms, network_ops, network_parts, runs_of_equal_parts
from fusion.bench.paper_networks import (
    PAPER_BATCH,
    PAPER_BLOCK_EFFICIENCY,
    PAPER_DTYPE,
    PAPER_NETWORKS,
    PAPER_SIZE,
    projected_ms,
)
from fusion.planner.families import STEM_CONVFIRST_HOPPER
from fusion.planner.processor import Processor
from models.convfirstnet import CONFIGS

Row = dict[str, object]

MEASURED_KEYS = (
    *("eager_ms", "inductor_ms", "fused_ms", "error", "eager_error", "agreement", "eager_agreement"),
    *("agreement_images", "top1_classes", "eager_mb", "inductor_mb", "fused_mb", "left_eager"),
)
"""What a run finds out about a network; what it did not is None."""


def network_row(
    case: NetworkCase,
    processor: Processor,
    parts: Sequence[Part] = (),
    found: Mapping[str, object] | None = None,
    failed: str | None = None,
) -> Row:
    """A network's row: what was `found` of it, by `MEASURED_KEYS`, and what follows from that.

    Times are in milliseconds a batch. `parts` are those of a ConvFirstNet; `found["ops"]` says how many OPs a batch of
    another network takes. `images_per_s`, `pct_peak` and `speedup` are those of the fused network, or of Inductor's
    code where there is none. `error` and `eager_error` are relative to float64, `agreement` is the percentage of images
    whose first logit is eager's, and `eager_agreement` that of eager with float32. Memory is in MB (10^6 bytes).
    `projected_ms` is the paper's projected efficiency at this processor's peak, `paper_ms` what the paper gives for its
    own GPU. `failed` says why there are no results.
    """
    found = found or {}
    ops = network_ops(parts) if parts else found.get("ops")
    row = {
        "model": case.model,
        "batch": case.batch,
        "size": case.size,
        "dtype": case.dtype,
        **{key: found.get(key) for key in MEASURED_KEYS},
    }
    best_ms = row["inductor_ms"] if row["fused_ms"] is None else row["fused_ms"]
    paper = PAPER_NETWORKS.get(case.model)
    limit_ms = network_limit_ms(parts, processor) if parts else None
    peak = processor.peak_ops
    is_papers_size = case.is_rival or case.size == PAPER_SIZE
    is_papers_case = is_papers_size and (case.batch, case.dtype) == (PAPER_BATCH, PAPER_DTYPE)
    row |= {
        "speedup": None if None in (row["inductor_ms"], row["fused_ms"]) else row["inductor_ms"] / row["fused_ms"],
        "images_per_s": None if best_ms is None else 1e3 * case.batch / best_ms,
        "limit_ms": limit_ms,
        "pct_limit": None if None in (limit_ms, row["fused_ms"]) else 100 * limit_ms / row["fused_ms"],
        "pct_peak": None if None in (ops, best_ms) else 1e5 * ops / best_ms / peak,
        "projected_ms": projected_ms(case.model, case.batch, case.size, case.dtype, ops, peak) if ops else None,
        "top1": paper.top1 if paper and is_papers_size else None,
        "paper_ms": paper.latency_ms if paper and is_papers_case else None,
        "paper_pct_peak": paper.pct_peak if paper and is_papers_case else None,
        "ops": ops,
        "failed": failed,
    }
    if "blocks" in found:
        row["blocks"] = block_rows(case, parts, processor, found["blocks"])
    return row


def block_rows(
    case: NetworkCase, parts: Sequence[Part], processor: Processor, found: Sequence[Mapping[str, object]]
) -> list[Row]:
    """One row for each run of equal parts: `found` has the `us` of one of them, and its `kernel`.

    `paper_pct_peak` is the efficiency that the paper gives such a block on its GPU (tables 5 to 8), and `projected_us`
    what that comes to at this processor's peak.
    """
    runs = runs_of_equal_parts(parts)
    paper_runs = {run[0].graph: index for index, run in enumerate(runs)}
    if found[0]["kernel"] == STEM_CONVFIRST_HOPPER.name:
        joined = network_parts(CONFIGS[case.model], case.batch, case.size, case.dtype, joined=True)
        runs = runs_of_equal_parts(joined)
    is_papers_case = (case.batch, case.size, case.dtype) == (PAPER_BATCH, PAPER_SIZE, PAPER_DTYPE)
    paper = PAPER_BLOCK_EFFICIENCY[case.model] if is_papers_case else ()
    rows = []
    for run, timed in zip(runs, found, strict=True):
        part, us = run[0], timed["us"]
        index = paper_runs.get(part.graph, len(paper))
        limit_us = 1e6 * part.bound(processor).min_latency
        pct = paper[index] if index < len(paper) else None
        rows.append(
            {
                "name": part.name,
                "block": part.kind,
                "stride": part.stride,
                "input": list(part.input_shape),
                "out_channels": part.out_channels,
                "depth": len(run),
                "us": us,
                "limit_us": limit_us,
                "pct_limit": None if us is None else 100 * limit_us / us,
                "pct_peak": None if us is None else 1e8 * part.ops_count / us / processor.peak_ops,
                "projected_us": None if pct is None else 1e8 * part.ops_count / pct / processor.peak_ops,
                "paper_pct_peak": pct,
                "kernel": timed["kernel"],
                "ops": part.ops_count,
                "bytes": part.bytes,
            }
        )
    return rows

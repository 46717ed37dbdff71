"""Networks as tables: the paper's table 4 and its appendix A, measured beside projected."""

from collections.abc import Callable, Mapping, Sequence

from fusion.bench import report
from fusion.bench.network_case import COMPARISONS
from fusion.bench.paper_networks import PAPER_NETWORKS
from fusion.bench.report import Column

Row = Mapping[str, object]
Value = str | Callable[[Row], object]

NAMED: tuple[tuple[Column, Value], ...] = (
    (Column("network"), "model"),
    (Column("H=W"), "size"),
    (Column("batch"), "batch"),
)
SPEED: tuple[tuple[Column, Value], ...] = (
    *NAMED,
    (Column("eager ms", "{:.3f}"), "eager_ms"),
    (Column("Inductor ms", "{:.3f}"), "inductor_ms"),
    (Column("fused ms", "{:.3f}"), "fused_ms"),
    (Column("speedup", "{:.2f}x"), "speedup"),
    (Column("images/s", "{:.0f}"), "images_per_s"),
    (Column("limit ms", "{:.3f}"), "limit_ms"),
    (Column("% of limit", "{:.1f}"), "pct_limit"),
    (Column("projected ms", "{:.3f}"), "projected_ms"),
    (Column("% of peak", "{:.1f}"), "pct_peak"),
    (Column("paper's", "{:.1f}"), "paper_pct_peak"),
    (Column("paper's top-1", "{:.1f}"), "top1"),
)
CHECKS: tuple[tuple[Column, Value], ...] = (
    *NAMED,
    (Column("error", "{:.1e}"), "error"),
    (Column("eager error", "{:.1e}"), "eager_error"),
    (Column("top-1 as eager %", "{:.1f}"), "agreement"),
    (Column("eager as float32 %", "{:.1f}"), "eager_agreement"),
    (Column("images"), "agreement_images"),
    (Column("eager MB", "{:.0f}"), "eager_mb"),
    (Column("Inductor MB", "{:.0f}"), "inductor_mb"),
    (Column("fused MB", "{:.0f}"), "fused_mb"),
    (Column("left eager"), lambda row: None if row["left_eager"] is None else len(row["left_eager"])),
)
CHECKED: tuple[tuple[Column, Value], ...] = (
    *NAMED,
    (Column("checked at"), lambda row: "x".join(map(str, row["checked"]))),
    *CHECKS[3:8],
    CHECKS[-1],
    (Column("limit ms", "{:.3f}"), "limit_ms"),
    (Column("projected ms", "{:.3f}"), "projected_ms"),
    (Column("paper's top-1", "{:.1f}"), "top1"),
)
BLOCKS: tuple[tuple[Column, Value], ...] = (
    (Column("part"), "name"),
    (Column("block"), "block"),
    (Column("stride"), "stride"),
    (Column("input"), lambda row: "x".join(map(str, row["input"][1:]))),
    (Column("K"), "out_channels"),
    (Column("depth"), "depth"),
    (Column("µs", "{:.1f}"), "us"),
    (Column("limit µs", "{:.1f}"), "limit_us"),
    (Column("% of limit", "{:.1f}"), "pct_limit"),
    (Column("projected µs", "{:.1f}"), "projected_us"),
    (Column("% of peak", "{:.1f}"), "pct_peak"),
    (Column("paper's", "{:.1f}"), "paper_pct_peak"),
    (Column("all ms", "{:.3f}"), lambda row: row["depth"] * row["us"] / 1e3),
    (Column("kernel"), "kernel"),
)


def print_networks(meta: Row, rows: Sequence[Row]) -> None:
    """Speed, checks and, where they were timed, blocks of every network; without a GPU what was checked."""
    if not meta["timed"]:
        title = (
            f"Networks, NOT TIMED (no GPU): operators' references checked on a CPU; limits for {meta['processor']}, "
            f"{meta['dtype']}"
        )
        _print(CHECKED, rows, title)
        return
    ceilings = f"{meta['peak_tflops']:.0f} TFLOP/s and {meta['bandwidth_tbs']:.2f} TB/s ({meta['ceilings_source']})"
    _print(
        SPEED,
        rows,
        f"Networks on {meta['device']}, {meta['dtype']}, ms a batch; limits at {ceilings}; projected: the paper's "
        "efficiency at that peak; images/s and % of peak: fused, or Inductor's where nothing is fused",
    )
    own = [row for row in rows if row["eager_mb"] is not None or row["error"] is not None]
    _print(CHECKS, own, "Logits against float64, and peak memory in MB: weights, input and what a run allocates")
    for row in rows:
        if row.get("blocks"):
            whole = sum(part["depth"] * part["us"] for part in row["blocks"]) / 1e3
            title = (
                f"{row['model']} at {row['size']}, batch {row['batch']}: parts alone, µs each; together {whole:.3f} "
                f"ms, the whole network {_text(row['fused_ms'])} ms"
            )
            _print(BLOCKS, row["blocks"], title)
    for line in comparisons(rows):
        print(line)


def comparisons(rows: Sequence[Row]) -> list[str]:
    """How many times the images per second of its rival each ConvFirstNet has, here and in the paper."""
    lines = []
    for own, rival in COMPARISONS:
        for first, second in ((a, b) for a in rows for b in rows if (a["model"], b["model"]) == (own, rival)):
            speeds = first["images_per_s"], second["images_per_s"]
            if first["batch"] != second["batch"] or None in speeds:
                continue
            paper = PAPER_NETWORKS[own].images_per_s / PAPER_NETWORKS[rival].images_per_s
            lines.append(
                f"{own} at {first['size']} has {speeds[0] / speeds[1]:.2f}x the images/s of {rival} at "
                f"{second['size']} with Inductor, batch {first['batch']} (the paper's projection: {paper:.1f}x)"
            )
    return lines


def _print(columns: Sequence[tuple[Column, Value]], rows: Sequence[Row], title: str) -> None:
    cells = [[value(row) if callable(value) else row[value] for _, value in columns] for row in rows]
    report.print_table([column for column, _ in columns], cells, title)


def _text(ms: float | None) -> str:
    return "-" if ms is None else f"{ms:.3f}"

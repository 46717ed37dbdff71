"""Compiled networks as a table."""

from collections.abc import Mapping, Sequence

from fusion.bench import report
from fusion.bench.report import Column

Row = Mapping[str, object]

NAMED = (
    (Column("network"), "model"),
    (Column("H=W"), "size"),
    (Column("batch"), "batch"),
)
BLOCKS = (
    (Column("blocks"), "blocks_found"),
    (Column("fused"), "blocks_fused"),
    (Column("left"), "blocks_left"),
    (Column("graphs"), "graphs"),
)
ERRORS = (
    (Column("error", "{:.1e}"), "fusion_error"),
    (Column("eager error", "{:.1e}"), "eager_error"),
)
MEASURED = (
    *NAMED,
    (Column("eager ms", "{:.3f}"), "eager_ms"),
    (Column("Inductor ms", "{:.3f}"), "inductor_ms"),
    (Column("fusion ms", "{:.3f}"), "fusion_ms"),
    (Column("fusion.fuse ms", "{:.3f}"), "fuse_ms"),
    (Column("over eager", "{:.2f}x"), "speedup_over_eager"),
    (Column("over Inductor", "{:.2f}x"), "speedup_over_inductor"),
    (Column("against fuse %", "{:+.1f}"), "over_fuse_pct"),
    *BLOCKS,
    *ERRORS,
    (Column("Inductor cold s", "{:.1f}"), "inductor_cold_s"),
    (Column("fusion cold s", "{:.1f}"), "fusion_cold_s"),
    (Column("fusion warm s", "{:.1f}"), "fusion_warm_s"),
)
CHECKED = (
    *NAMED,
    *BLOCKS,
    *ERRORS,
    (Column("compiling here s", "{:.1f}"), "fusion_here_s"),
)


def print_compiled(meta: Row, rows: Sequence[Row]) -> None:
    """Speed, blocks, errors and seconds of compilation of every network; without a GPU what was checked."""
    if meta["timed"]:
        what = "ms a call" if meta["called"] else "ms a batch"
        title = (
            f"torch.compile on {meta['device']}, {meta['dtype']}, mode {meta['mode']} without freezing, {what}: "
            "backend 'fusion' next to eager PyTorch, Inductor and fusion.fuse; cold and warm: seconds of compilation"
        )
    else:
        title = (
            f"torch.compile, NOT TIMED (no GPU): backend 'fusion' with min_speedup=0, fused blocks as their references "
            f"on a CPU, {meta['dtype']}; seconds of compilation are this process's, with the caches as they were"
        )
    columns = MEASURED if meta["timed"] else CHECKED
    cells = [[row[key] for _, key in columns] for row in rows]
    report.print_table([column for column, _ in columns], cells, title)

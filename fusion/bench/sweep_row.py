"""What became of each network of a sweep, as rows and as tables."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from fusion.bench.model_case import ModelCase
from fusion.bench.report import Column

Row = dict[str, object]
Reply = Mapping[str, object]

STEPS = ("build", "inductor")
"""What a process is asked before the variants."""
OK, BROKEN, SKIPPED = "ok", "broken", "skipped"
LEAST_TOLERANCE = 1e-3
"""Relative L2 distance from Inductor's result that is always allowed."""


def sweep_row(case: ModelCase, replies: Mapping[str, Reply]) -> Row:
    """A network's row, from the answers to "build", "inductor" and the variants, up to one of the first two that fails.

    A network is broken if it cannot be built, or a variant fails where Inductor's code runs, or gives a result further
    than `tolerance` from Inductor's: `LEAST_TOLERANCE`, or twice the distance of Inductor's result from eager PyTorch's
    in float32. It is skipped if Inductor fails too. `why` says what happened. Distances are relative L2; None is one
    that is not finite.
    """
    inductor = replies.get("inductor", {})
    row: Row = {
        "model": case.model,
        "batch": case.batch,
        "size": case.size,
        "dtype": case.dtype,
        "status": OK,
        "why": "",
        "inductor_s": inductor.get("seconds"),
        "inductor_distance": inductor.get("distance"),
        "tolerance": None,
        "variants": {},
    }
    if "failed" in replies["build"]:
        return row | {"status": BROKEN, "why": f"it cannot be built: {replies['build']['failed']}"}
    if "failed" in inductor:
        return row | {"status": SKIPPED, "why": f"Inductor fails too: {inductor['failed']}"}
    if row["inductor_distance"] is None:
        return row | {"status": SKIPPED, "why": "its result is not finite, with Inductor or eager PyTorch"}
    row["tolerance"] = max(LEAST_TOLERANCE, 2 * row["inductor_distance"])
    for name, reply in replies.items():
        if name not in STEPS:
            row["variants"][name] = variant = _variant(reply, row["tolerance"])
            if variant["status"] == BROKEN and row["status"] == OK:
                row |= {"status": BROKEN, "why": f"{name}: {variant['why']}"}
    return row


def _variant(reply: Reply, tolerance: float) -> Row:
    if "failed" in reply:
        return {"status": BROKEN, "why": reply["failed"]}
    distance, why = reply["distance"], ""
    if distance is None:
        why = "its result is not finite"
    elif not distance <= tolerance:
        why = f"its result is {distance:.1e} from Inductor's, more than {tolerance:.1e}"
    blocks = reply["report"]["blocks"]
    fused = sum(block["fused"] for block in blocks)
    return {
        "status": BROKEN if why else OK,
        "why": why,
        "seconds": reply["seconds"],
        "distance": distance,
        "warnings": reply["warnings"],
        "graphs": reply["report"]["graphs"],
        "blocks_found": len(blocks),
        "blocks_fused": fused,
        "blocks_left": len(blocks) - fused,
        "reasons": dict(Counter(block["reason"] for block in blocks if not block["fused"])),
        "report": reply["report"],
    }


def sweep_columns(variants: Sequence[str]) -> list[Column]:
    """The columns of a table of rows with these variants."""
    columns = [Column("network"), Column("H=W"), Column("status"), Column("Inductor s", "{:.1f}")]
    columns.append(Column("from float32", "{:.1e}"))
    for name in variants:
        columns += [
            Column(f"{name}: blocks"),
            Column("fused"),
            Column("s", "{:.1f}"),
            Column("from Inductor", "{:.1e}"),
        ]
    return [*columns, Column("warnings"), Column("why, or why blocks are left")]


def sweep_cells(row: Row, variants: Sequence[str]) -> list[object]:
    """The cells of a row."""
    cells = [row["model"], row["size"], row["status"], row["inductor_s"], row["inductor_distance"]]
    for name in variants:
        variant = row["variants"].get(name, {})
        cells += [variant.get(key) for key in ("blocks_found", "blocks_fused", "seconds", "distance")]
    warned = {text for variant in row["variants"].values() for text in variant.get("warnings", ())}
    return [*cells, len(warned), row["why"] or _reasons(row)]


def _reasons(row: Row) -> str:
    reasons: Counter[str] = Counter()
    for variant in row["variants"].values():
        for reason, count in variant.get("reasons", {}).items():
            reasons[reason] = max(reasons[reason], count)
    return "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common())


def markdown_table(columns: Sequence[Column], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = [[column.title for column in columns], ["---"] * len(columns)]
    lines += [[column.cell(cell) for column, cell in zip(columns, row, strict=True)] for row in rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def summary(rows: Sequence[Row]) -> str:
    """One line: how many networks are ok, broken and skipped, and how many have fused blocks or warnings."""
    counts = Counter(row["status"] for row in rows)
    variants = [list(row["variants"].values()) for row in rows]
    fused = sum(any(variant.get("blocks_fused") for variant in each) for each in variants)
    warned = sum(any(variant.get("warnings") for variant in each) for each in variants)
    return (
        f"{len(rows)} networks: {counts[OK]} ok, {counts[BROKEN]} broken, {counts[SKIPPED]} skipped; {fused} with "
        f"fused blocks, {warned} with warnings"
    )

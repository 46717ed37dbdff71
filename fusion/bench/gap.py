"""The efficiency gap of networks: ideal latency, at the peak of a GPU, and actual latency (section 3 of the paper)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fusion.bench.network_case import RIVALS
from fusion.bench.paper_networks import PAPER_NETWORKS, PAPER_SIZE

Row = Mapping[str, object]

ENGINES = {
    "fused": "fused",
    "projected": "fused, projected",
    "fusion": "backend fusion",
    "inductor": "Inductor",
    "limit": "limit, not timed",
    "eager": "eager PyTorch",
}
"""What runs a network, for people: `fusion.fuse`, the paper's projection of it, `torch.compile` with the backend
"fusion", Inductor, nothing but the network's limit, and eager PyTorch."""

LATENCIES = {
    "eager_ms": "eager",
    "inductor_ms": "inductor",
    "fused_ms": "fused",
    "fuse_ms": "fused",
    "fusion_ms": "fusion",
}
"""Keys of a row of the commands `network` and `compile`, and whose latency they hold."""

PAPER = "the paper"


@dataclass(frozen=True)
class Ceilings:
    """What a GPU can do at most, in dense TFLOP/s and TB/s, and where these two come from."""

    device: str
    peak_tflops: float
    bandwidth_tbs: float
    source: str

    def __str__(self) -> str:
        return f"{self.device}: {self.peak_tflops:.4g} TFLOP/s, {self.bandwidth_tbs:.3g} TB/s ({self.source})"


@dataclass(frozen=True)
class Gap:
    """A network as an engine runs it on a batch of images.

    `macs_g` are multiply-accumulates of one image, in 10^9, `actual_ms` is in milliseconds a batch, `top1` in percent,
    `size` the height = width of the images if it is known.
    """

    model: str
    engine: str
    batch: int
    size: int | None
    dtype: str
    macs_g: float
    actual_ms: float
    top1: float
    top1_source: str
    ceilings: Ceilings

    @property
    def ideal_ms(self) -> float:
        """Milliseconds a batch at the peak: two OPs for a multiply-accumulate."""
        return 2 * self.macs_g * self.batch / self.ceilings.peak_tflops

    @property
    def efficiency(self) -> float:
        """Computational efficiency, ideal over actual latency: a fraction."""
        return self.ideal_ms / self.actual_ms


@dataclass(frozen=True)
class Incomplete:
    """A network that has no gap, and what it lacks."""

    model: str
    reason: str


def own_ceilings(meta: Row) -> Ceilings | None:
    """The ceilings that a report was written with; None if it has none."""
    if meta.get("peak_tflops") is None:
        return None
    device = meta["device"] if meta.get("timed") else meta["processor"]
    return Ceilings(device, meta["peak_tflops"], meta["bandwidth_tbs"], meta["ceilings_source"])


def network_gaps(
    rows: Sequence[Row],
    meta: Row,
    ceilings: Ceilings | None = None,
    top1: Mapping[str, tuple[float, str]] | None = None,
) -> tuple[list[Gap], list[Incomplete]]:
    """One gap for each network and engine of a report of `network` or `compile`, and the networks that have none.

    `ceilings` default to the report's own. `top1` gives, or overrides, accuracies in percent and says where they are
    from. Where nothing was timed, limits stand for latencies.
    """
    ceilings = ceilings or own_ceilings(meta)
    latencies = LATENCIES if meta.get("timed") else {"limit_ms": "limit"}
    gaps, incomplete = [], []
    for row in rows:
        model, batch, size = row["model"], row["batch"], row.get("size")
        macs_g = known_macs(model, size) if row.get("ops") is None else row["ops"] / 2e9 / batch
        accuracy, source = (top1 or {}).get(model) or (row.get("top1") or known_top1(model, size), PAPER)
        found = {engine: row[key] for key, engine in latencies.items() if row.get(key) is not None}
        reason = why_incomplete(row, macs_g, accuracy, found)
        if reason:
            incomplete.append(Incomplete(model, reason))
            continue
        gaps += (
            Gap(model, engine, batch, size, row.get("dtype") or meta["dtype"], macs_g, ms, accuracy, source, ceilings)
            for engine, ms in found.items()
        )
    return gaps, incomplete


def why_incomplete(row: Row, macs_g: float | None, top1: float | None, found: Mapping[str, float]) -> str | None:
    """What a row lacks, and what to do about it; None if it has all that a gap needs."""
    if not found:
        return f"it has no latency{': ' if row.get('failed') else ''}{row.get('failed') or ''}"
    if macs_g is None:
        return (
            "its OPs are unknown: the report counts none, nor does the paper at this size; measure it with "
            '`python -m fusion.bench network`, or add "ops", OPs of a batch, to its row'
        )
    if top1 is None:
        return "its top-1 is unknown: give it with --accuracies, a CSV with the columns model,top1"
    return None


def known_macs(model: str, size: int | None) -> float | None:
    """The paper's 10^9 multiply-accumulates of one image; None for other networks and at other sizes."""
    return PAPER_NETWORKS[model].macs_g if _is_papers(model, size) else None


def known_top1(model: str, size: int | None) -> float | None:
    """The paper's top-1 in percent; None for other networks and at other sizes."""
    return PAPER_NETWORKS[model].top1 if _is_papers(model, size) else None


def _is_papers(model: str, size: int | None) -> bool:
    return model in PAPER_NETWORKS and size == RIVALS.get(model, PAPER_SIZE)

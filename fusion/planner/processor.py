"""Processors: the few numbers of a GPU that the planner needs."""

from dataclasses import dataclass, replace

_KB, _MB = 1024, 1024 * 1024


@dataclass(frozen=True)
class Processor:
    """A GPU as a tensor machine.

    ``peak_ops`` is the fp16 matrix throughput R in OP/s, ``bandwidth`` the DRAM bandwidth B in byte/s (both dense and
    sustained as ``source`` says), ``compute_capability`` e.g. (8, 6), ``processors`` the number of streaming
    multiprocessors. ``local_memory_bytes`` is the shared memory that one program instance may use,
    ``registers_per_processor`` counts 32-bit registers. ``global_memory_bytes`` is the L2 cache and
    ``global_bandwidth`` its bandwidth in byte/s, an estimate that enters predictions but no limit. Raises ValueError
    unless all of them are positive.
    """

    name: str
    title: str
    peak_ops: float
    bandwidth: float
    compute_capability: tuple[int, int]
    processors: int
    local_memory_bytes: int
    global_memory_bytes: int
    global_bandwidth: float
    registers_per_processor: int = 65536
    source: str = "datasheet"

    def __post_init__(self) -> None:
        for field in (
            "peak_ops",
            "bandwidth",
            "processors",
            "local_memory_bytes",
            "global_memory_bytes",
            "global_bandwidth",
            "registers_per_processor",
        ):
            if not getattr(self, field) > 0:
                raise ValueError(f"processor {self.name!r}: {field} must be positive, got {getattr(self, field)!r}")

    @property
    def op_byte(self) -> float:
        """The waterline R/B, in OP/byte."""
        return self.peak_ops / self.bandwidth

    def with_ceilings(self, peak_ops: float, bandwidth: float, source: str = "measured") -> "Processor":
        """The same processor with other ceilings, in OP/s and byte/s."""
        return replace(self, peak_ops=peak_ops, bandwidth=bandwidth, source=source)

    def __str__(self) -> str:
        return (
            f"{self.title}: {self.peak_ops / 1e12:.4g} TFLOP/s, {self.bandwidth / 1e12:.4g} TB/s, "
            f"{self.op_byte:.3g} OP/byte ({self.source})"
        )


PROCESSORS: dict[str, Processor] = {
    processor.name: processor
    for processor in (
        Processor(
            name="a5000",
            title="NVIDIA RTX A5000",
            peak_ops=76.7e12,
            bandwidth=480e9,
            compute_capability=(8, 6),
            processors=64,
            local_memory_bytes=99 * _KB,
            global_memory_bytes=6 * _MB,
            global_bandwidth=1.8e12,
            source="the paper's ceilings, at its lowered clocks",
        ),
        Processor(
            name="a100",
            title="NVIDIA A100 SXM4 80 GB",
            peak_ops=312e12,
            bandwidth=2.039e12,
            compute_capability=(8, 0),
            processors=108,
            local_memory_bytes=163 * _KB,
            global_memory_bytes=40 * _MB,
            global_bandwidth=4.5e12,
        ),
        Processor(
            name="h100",
            title="NVIDIA H100 SXM5 80 GB",
            peak_ops=989e12,
            bandwidth=3.35e12,
            compute_capability=(9, 0),
            processors=132,
            local_memory_bytes=227 * _KB,
            global_memory_bytes=50 * _MB,
            global_bandwidth=5.5e12,
        ),
        Processor(
            name="h200",
            title="NVIDIA H200 SXM5 141 GB",
            peak_ops=790e12,
            bandwidth=4.3e12,
            compute_capability=(9, 0),
            processors=132,
            local_memory_bytes=227 * _KB,
            global_memory_bytes=60 * _MB,
            global_bandwidth=5.5e12,
            source="measured: 8192x8192x8192 fp16 product, device-to-device copy",
        ),
        Processor(
            name="b200",
            title="NVIDIA B200 SXM 180 GB",
            peak_ops=2250e12,
            bandwidth=8e12,
            compute_capability=(10, 0),
            processors=148,
            local_memory_bytes=227 * _KB,
            global_memory_bytes=126 * _MB,
            global_bandwidth=10e12,
        ),
        Processor(
            name="rtx4090",
            title="NVIDIA GeForce RTX 4090",
            peak_ops=165.2e12,
            bandwidth=1.008e12,
            compute_capability=(8, 9),
            processors=128,
            local_memory_bytes=99 * _KB,
            global_memory_bytes=72 * _MB,
            global_bandwidth=4.5e12,
            source="datasheet, fp16 with fp32 accumulation",
        ),
    )
}


def get_processor(processor: str | Processor) -> Processor:
    """The processor of this name in ``PROCESSORS``; a Processor passes through. Raises ValueError for other names."""
    if isinstance(processor, Processor):
        return processor
    try:
        return PROCESSORS[processor]
    except KeyError:
        raise ValueError(
            f"processor {processor!r} is unknown; use one of {', '.join(PROCESSORS)}, or pass a Processor"
        ) from None


def kilobytes(size: int) -> str:
    """A size in bytes, for people."""
    return f"{size / 1024:.0f} KB"


def why_other_capability(processor: Processor, compute_capability: tuple[int, int]) -> str | None:
    """Why a kernel for this compute capability does not run on a processor; None if it does."""
    if processor.compute_capability == compute_capability:
        return None
    needed, found = (".".join(map(str, pair)) for pair in (compute_capability, processor.compute_capability))
    return f"it is for compute capability {needed}, {processor.name} has {found}"

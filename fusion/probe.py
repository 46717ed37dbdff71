"""Measured ceilings of the GPU at hand: matrix throughput and DRAM bandwidth."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from itertools import pairwise

from fusion.disk_cache import Entries, GpuKey
from fusion.planner.processor import PROCESSORS, Processor

MATMUL_SIZE = 8192
MIN_COPY_BYTES = 1 << 30
GLOBAL_TO_DRAM_BANDWIDTH = 2.0
"""L2 to DRAM bandwidth where nothing better is known: between an H200's 1.3 and an RTX 4090's 4.5."""


CEILINGS = Entries("ceilings", format=1, what="measured ceilings", again="measuring again")


@dataclass(frozen=True)
class Ceilings:
    """``peak_ops``: fp16 matrix throughput in OP/s. ``bandwidth``: DRAM bandwidth in byte/s, read plus written."""

    peak_ops: float
    bandwidth: float


def measure_ceilings(device: int | str | None = None) -> Ceilings:
    """Time a large fp16 matrix product and a large device-to-device copy on a GPU (default: the current one).

    The fastest of several runs counts: a ceiling is what the hardware can do, and a hot GPU clocks lower.

    Raises RuntimeError without a CUDA GPU.
    """
    import torch

    device = cuda_device(device)
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    with torch.cuda.device(device):
        # Random operands: a product of constants toggles fewer bits, draws less power and clocks higher.
        a, b = (torch.randn(MATMUL_SIZE, MATMUL_SIZE, device=device, dtype=torch.float16) for _ in range(2))
        product = torch.empty_like(a)
        matmul_seconds = _best_seconds(lambda: torch.matmul(a, b, out=product))
        source = torch.ones(max(MIN_COPY_BYTES, 16 * l2_bytes), device=device, dtype=torch.uint8)
        target = torch.empty_like(source)
        copy_seconds = _best_seconds(lambda: target.copy_(source))
    return Ceilings(peak_ops=2 * MATMUL_SIZE**3 / matmul_seconds, bandwidth=2 * source.numel() / copy_seconds)


def probe_processor(device: int | str | None = None, ceilings: Ceilings | None = None) -> Processor:
    """The GPU at hand (default: the current one) as a Processor with its `ceilings`, which are measured by default.

    Raises RuntimeError without a CUDA GPU.
    """
    import torch

    device = cuda_device(device)
    properties = torch.cuda.get_device_properties(device)
    ceilings = ceilings or measure_ceilings(device)
    return Processor(
        name=properties.name.lower().replace(" ", "-"),
        title=properties.name,
        peak_ops=ceilings.peak_ops,
        bandwidth=ceilings.bandwidth,
        compute_capability=(properties.major, properties.minor),
        processors=properties.multi_processor_count,
        local_memory_bytes=properties.shared_memory_per_block_optin,
        global_memory_bytes=properties.L2_cache_size,
        global_bandwidth=GLOBAL_TO_DRAM_BANDWIDTH * ceilings.bandwidth,
        registers_per_processor=properties.regs_per_multiprocessor,
        source="measured",
    )


@cache
def processor_of(device: int | str | None = None) -> Processor:
    """The known processor that the GPU at hand is, by its name; any other GPU is probed once.

    What is measured is kept on disk (`fusion.disk_cache`), so that plans are the same in every process. Raises
    RuntimeError without a CUDA GPU.
    """
    import torch

    device = cuda_device(device)
    name = torch.cuda.get_device_properties(device).name
    known = (processor for processor in PROCESSORS.values() if processor.name in name.lower().replace(" ", ""))
    processor = next(known, None)
    if processor is None:
        key = GpuKey(name, torch.__version__)
        ceilings = CEILINGS.load(key, lambda entry: Ceilings(float(entry["peak_ops"]), float(entry["bandwidth"])))
        if ceilings is None:
            ceilings = measure_ceilings(device)
            CEILINGS.store(key, asdict(ceilings))
        processor = probe_processor(device, ceilings)
    return processor


def cuda_device(device=None):
    """A GPU as a `torch.device` with an index; by default the current one.

    Raises RuntimeError without a CUDA GPU, and for a device that is none.
    """
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError(
            "measuring needs a CUDA GPU and none is available; plan from shapes instead, with a processor of "
            "fusion.planner.processor.PROCESSORS"
        )
    device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device or "cuda")
    if device.type != "cuda":
        raise RuntimeError(f"measuring needs a CUDA GPU, got device {device}")
    return torch.device("cuda", torch.cuda.current_device()) if device.index is None else device


def _best_seconds(run: Callable[[], object], warmup: int = 10, iterations: int = 30) -> float:
    import torch

    for _ in range(warmup):
        run()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(iterations + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    return min(start.elapsed_time(stop) for start, stop in pairwise(marks)) / 1e3

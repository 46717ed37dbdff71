"""Waterline analysis (paper section 4): how fast a sequence of kernels can be on a processor."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from fusion.planner.layer_kind import LayerKind
from fusion.planner.processor import Processor, get_processor


class HasCost(Protocol):
    """A kernel, as far as the waterline is concerned: what it is, OPs and bytes of DRAM traffic."""

    @property
    def name(self) -> str: ...
    @property
    def layer_kind(self) -> LayerKind: ...
    @property
    def ops_count(self) -> int: ...
    @property
    def bytes(self) -> int: ...


class HasKernels(Protocol):
    """Anything that runs a sequence of kernels: a program, a plan, a network."""

    @property
    def kernels(self) -> Sequence[HasCost]: ...


@dataclass(frozen=True)
class KernelBound:
    """One kernel's limits on a processor. Times are in seconds, ``bytes`` is DRAM traffic."""

    name: str
    layer_kind: LayerKind
    ops_count: int
    bytes: int
    compute_time: float
    memory_time: float

    @property
    def min_latency(self) -> float:
        """max(n/R, b/B), in seconds."""
        return max(self.compute_time, self.memory_time)

    @property
    def intensity(self) -> float:
        """Operational intensity n/b, in OP/byte."""
        return self.ops_count / self.bytes if self.bytes else math.inf

    @property
    def attainable_ops(self) -> float:
        """Attainable throughput min(R, B*n/b), in OP/s."""
        return self.ops_count / self.min_latency

    @property
    def max_efficiency(self) -> float:
        """Attainable throughput as a fraction of the peak."""
        return self.compute_time / self.min_latency

    @property
    def is_memory_bound(self) -> bool:
        """Whether the kernel's intensity is under the waterline."""
        return self.memory_time > self.compute_time


@dataclass(frozen=True)
class Waterline:
    """Kernels that run one after another on ``processor``, each no faster than its own bound."""

    processor: Processor
    kernels: tuple[KernelBound, ...]

    @property
    def ops_count(self) -> int:
        """Arithmetic operations, in OPs."""
        return sum(kernel.ops_count for kernel in self.kernels)

    @property
    def bytes(self) -> int:
        """DRAM traffic, in bytes."""
        return sum(kernel.bytes for kernel in self.kernels)

    @property
    def min_latency(self) -> float:
        """Sum of the kernels' minimum latencies, in seconds."""
        return sum(kernel.min_latency for kernel in self.kernels)

    @property
    def max_efficiency(self) -> float:
        """Compute time as a fraction of the minimum latency."""
        return sum(kernel.compute_time for kernel in self.kernels) / self.min_latency

    @property
    def mediant_intensity(self) -> float:
        """Total OPs over total bytes, in OP/byte: what a roofline of the whole sequence looks at."""
        return self.ops_count / self.bytes if self.bytes else math.inf

    @property
    def mediant_efficiency(self) -> float:
        """The efficiency that the mediant intensity promises; never less than ``max_efficiency``."""
        return min(1.0, self.mediant_intensity / self.processor.op_byte)

    @property
    def memory_bound_share(self) -> float:
        """Fraction of the minimum latency that memory-bound kernels take."""
        return sum(kernel.min_latency for kernel in self.kernels if kernel.is_memory_bound) / self.min_latency

    def fusion_gain(self, index: int) -> float:
        """Most that removing the DRAM traffic of kernel ``index`` can speed up the sequence (appendix B).

        1 / (1 - f_B + f_R), with the kernel's memory and compute times as fractions of the sequence's minimum
        latency; 1 for a kernel that is not memory-bound.
        """
        kernel = self.kernels[index]
        return self.min_latency / (self.min_latency - kernel.min_latency + kernel.compute_time)

    def __str__(self) -> str:
        lines = [
            f"{self.processor}",
            f"{'kernel':<16} {'GOP':>9} {'MB':>9} {'OP/byte':>8} {'us':>9} {'peak':>6}  bound",
        ]
        rows = [(k.name, k.ops_count, k.bytes, k.intensity, k.min_latency, k.max_efficiency) for k in self.kernels]
        bounds = ["memory" if kernel.is_memory_bound else "compute" for kernel in self.kernels]
        total = ("total", self.ops_count, self.bytes, self.mediant_intensity, self.min_latency, self.max_efficiency)
        for (name, ops, num_bytes, intensity, latency, efficiency), bound in zip(
            [*rows, total], [*bounds, ""], strict=True
        ):
            row = f"{name:<16} {ops / 1e9:9.3f} {num_bytes / 1e6:9.3f} {intensity:8.2f} {latency * 1e6:9.1f}"
            lines.append(f"{row} {efficiency:6.1%}  {bound}".rstrip())
        return "\n".join(lines)


def kernel_bound(kernel: HasCost, processor: str | Processor) -> KernelBound:
    """Limits of one kernel. Raises ValueError for an unknown processor."""
    processor = get_processor(processor)
    compute_time, memory_time = kernel.ops_count / processor.peak_ops, kernel.bytes / processor.bandwidth
    return KernelBound(kernel.name, kernel.layer_kind, kernel.ops_count, kernel.bytes, compute_time, memory_time)


def analyze(program: HasKernels, processor: str | Processor) -> Waterline:
    """Waterline of a program, or of anything with ``kernels``. Raises ValueError if it has none."""
    if not program.kernels:
        raise ValueError("a waterline needs at least one kernel")
    processor = get_processor(processor)
    return Waterline(processor, tuple(kernel_bound(kernel, processor) for kernel in program.kernels))

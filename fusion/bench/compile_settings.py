"""What a benchmark passes to `torch.compile`."""

from dataclasses import dataclass

MODES = ("default", "reduce-overhead", "max-autotune-no-cudagraphs", "max-autotune")
GRAPH_MODES = ("reduce-overhead", "max-autotune")
"""Modes in which compiled code runs as CUDA graphs of its own, which cannot be captured in another."""

ENGINES = ("inductor", "fusion")


@dataclass(frozen=True)
class CompileSettings:
    """The mode of both compilers, and options of the backend "fusion" (`fusion.backend.options.BackendOptions`)."""

    mode: str = "default"
    min_speedup: float = 1.0
    tune: bool = False

    @property
    def has_graphs(self) -> bool:
        """Whether compiled code runs as CUDA graphs."""
        return self.mode in GRAPH_MODES

    def arguments(self, engine: str) -> dict[str, object]:
        """Keyword arguments of `torch.compile`, besides the backend. It takes a mode or options, not both."""
        if engine == "inductor":
            return {"mode": self.mode}
        options: dict[str, object] = {"mode": self.mode, "min_speedup": self.min_speedup}
        return {"options": options | ({"tune": True} if self.tune else {})}

"""What `torch.compile(model, backend="fusion", mode=..., options=...)` may ask for."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from fusion.stage import MicroBatch, check_micro_batch

TUNING_MODES = ("max-autotune", "max-autotune-no-cudagraphs")


@dataclass(frozen=True)
class BackendOptions:
    """How the backend fuses, and how Inductor compiles what is left.

    Attributes:
        strict: raise what goes wrong in fusing, instead of a warning and the unchanged graph for Inductor.
        tune: choose the fused kernels' tiles by measurement, once for each shape (`fusion.tuner`). The modes
            "max-autotune" and "max-autotune-no-cudagraphs" turn it on.
        min_speedup: a block is fused if it is measured to be so many times as fast as Inductor's code for it. 0 fuses
            every block that has a kernel, on CPUs too (where a fused block computes the reference), and measures
            nothing.
        micro_batch: run chains of blocks so many images at a time (see `fusion.stage.FusedStage`).
        inductor: options of Inductor by name (`torch._inductor.list_options()`), those of the mode among them.
    """

    strict: bool = False
    tune: bool = False
    min_speedup: float = 1.0
    micro_batch: MicroBatch = None
    inductor: Mapping[str, object] = field(default_factory=dict)

    @classmethod
    def parse(cls, mode: str | None = None, options: Mapping[str, object] | None = None) -> "BackendOptions":
        """What the arguments of `torch.compile` mean.

        `mode` is one of Inductor's: "default", "reduce-overhead" (CUDA graphs), "max-autotune" (tuning and CUDA
        graphs), "max-autotune-no-cudagraphs". `options` are this class's attributes and Inductor's options; as
        `torch.compile` takes either a mode or options, "mode" may be among them.

        Raises:
            ValueError: an option or mode is unknown, or a value is not supported.
        """
        options = dict(options or {})
        mode = options.pop("mode", None) or mode or "default"
        own = {each.name for each in fields(cls)} - {"inductor"}
        given = {name: options.pop(name) for name in own & options.keys()}
        given.setdefault("tune", mode in TUNING_MODES)
        inductor = {**_mode_options(mode), **_known_to_inductor(options, own)}
        return cls(**given, inductor=inductor)

    def __post_init__(self) -> None:
        for name in ("strict", "tune"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"option {name}={getattr(self, name)!r} is not supported, use True or False")
        is_number = isinstance(self.min_speedup, int | float) and not isinstance(self.min_speedup, bool)
        if not is_number or not self.min_speedup >= 0:
            raise ValueError(f"option min_speedup={self.min_speedup!r} is not supported, use a number from 0 up")
        check_micro_batch(self.micro_batch)


def _mode_options(mode: str) -> dict[str, object]:
    from torch._inductor import list_mode_options

    modes = list_mode_options()
    if mode not in modes:
        raise ValueError(f"mode {mode!r} is unknown; use one of {', '.join(modes)}")
    return modes[mode]


def _known_to_inductor(options: dict[str, object], own: set[str]) -> dict[str, object]:
    if not options:
        return {}
    from torch._inductor import list_options

    known = {name.replace("-", "_") for name in list_options()}
    options = {name.replace("-", "_"): value for name, value in options.items()}
    unknown = sorted(options.keys() - known)
    if unknown:
        raise ValueError(
            f"option {', '.join(map(repr, unknown))} of the backend 'fusion' is unknown; known are "
            f"{', '.join(sorted({*own, 'mode'}))}, and Inductor's (torch._inductor.list_options())"
        )
    return options

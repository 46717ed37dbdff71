"""Which networks the command runs, and at what size."""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import metadata
from importlib.util import find_spec

CONVFIRSTNETS = ("convfirstnet_pico", "convfirstnet_nano", "convfirstnet_tiny", "convfirstnet_small")

RIVALS: dict[str, int] = {
    "convnext_femto": 288,
    "convnext_nano": 288,
    "convnext_tiny": 288,
    "convnext_small": 288,
    "efficientnet_b1": 256,
    "efficientnet_b3": 320,
    "efficientnet_b5": 448,
    "efficientnetv2_rw_s": 288,
    "tf_efficientnetv2_s": 384,
}
"""Networks of timm that ConvFirstNet is compared with, and the height = width in pixels at which they are used."""

SHORT_NAMES = {name.removeprefix("convfirstnet_"): name for name in CONVFIRSTNETS}

COMPARISONS = (("convfirstnet_pico", "convnext_femto"), ("convfirstnet_small", "convnext_small"))
"""Whose images per second the paper compares."""


@dataclass(frozen=True)
class NetworkCase:
    """A network to measure on a batch of `size` x `size` images."""

    model: str
    batch: int
    size: int
    dtype: str = "float16"

    @property
    def is_rival(self) -> bool:
        """Whether the network is timm's, and runs with Inductor only."""
        return self.model in RIVALS

    def __str__(self) -> str:
        return f"{self.model} at {self.size}, batch {self.batch}"


def parse_model(text: str) -> str:
    """The full name of a network: "pico" is short for "convfirstnet_pico". Raises ValueError for an unknown one."""
    name = SHORT_NAMES.get(text, text)
    if name not in CONVFIRSTNETS and name not in RIVALS:
        known = [*SHORT_NAMES, *RIVALS]
        close = get_close_matches(text, known)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise ValueError(f"no network is named {text!r}: {hint}use {', '.join(known)}")
    return name


def has_timm() -> bool:
    """Whether timm is installed."""
    return find_spec("timm") is not None


def timm_version() -> str | None:
    """Its version; None if timm is not installed."""
    try:
        return metadata.version("timm")
    except metadata.PackageNotFoundError:
        return None


def network_cases(models: Sequence[str], batches: Sequence[int], sizes: Sequence[int], dtype: str) -> list[NetworkCase]:
    """Every network at every batch; ConvFirstNets at every size, the others at their own."""
    return [
        NetworkCase(model, batch, size, dtype)
        for batch in batches
        for model in dict.fromkeys(models)
        for size in ([RIVALS[model]] if model in RIVALS else sizes)
    ]

"""What the paper says of whole networks: its tables 4, 5 to 8 and 9 (bench/paper has the same as CSV).

Its GPU is an RTX A5000 of 76.7 TFLOP/s and 480 GB/s, its batch 128, its dtype fp16. What it says of ConvFirstNet's
speed is projected from kernels that it measured; the other networks it measured, with Inductor.
"""

from dataclasses import dataclass

PAPER_BATCH = 128
PAPER_SIZE = 256
"""Height = width of ConvFirstNet's images, in pixels."""
PAPER_DTYPE = "float16"


@dataclass(frozen=True)
class PaperNetwork:
    """A network in the paper.

    Milliseconds a batch, efficiency in percent of peak, ImageNet-1k top-1 in percent, and 10^9 multiply-accumulates of
    one image.
    """

    latency_ms: float
    pct_peak: float
    top1: float
    macs_g: float

    @property
    def images_per_s(self) -> float:
        return 1e3 * PAPER_BATCH / self.latency_ms


PAPER_NETWORKS: dict[str, PaperNetwork] = {
    "convfirstnet_pico": PaperNetwork(6.078, 47.23, 79.858, 0.86),
    "convfirstnet_nano": PaperNetwork(13.549, 44.64, 81.834, 1.812),
    "convfirstnet_tiny": PaperNetwork(24.101, 44.69, 82.752, 3.227),
    "convfirstnet_small": PaperNetwork(33.238, 55.16, 83.312, 5.493),
    "convnext_femto": PaperNetwork(23.4, 18.6, 78.7, 1.3),
    "convnext_nano": PaperNetwork(46.7, 29.0, 81.5, 4.1),
    "convnext_tiny": PaperNetwork(80.6, 30.6, 82.7, 7.4),
    "convnext_small": PaperNetwork(138.4, 34.7, 83.7, 14.4),
    "efficientnet_b1": PaperNetwork(49.9, 5.2, 79.1, 0.8),
    "efficientnet_b3": PaperNetwork(107.5, 6.2, 81.6, 2.0),
    "efficientnet_b5": PaperNetwork(385.1, 8.3, 83.6, 9.6),
    "tf_efficientnetv2_s": PaperNetwork(146.0, 19.3, 83.9, 8.4),
}
"""Tables 4 and 9, by the names of the models here and of timm."""

PAPER_BLOCK_EFFICIENCY: dict[str, tuple[float, ...]] = {
    "convfirstnet_pico": (75.0, 35.1, 53.5, 66.9, 53.6, 67.0, 37.0, 46.2, 36.0, 45.0),
    "convfirstnet_nano": (75.0, 40.0, 57.3, 71.6, 61.0, 76.2, 33.5, 41.9, 25.0, 31.3),
    "convfirstnet_tiny": (75.0, 40.0, 57.3, 71.6, 56.0, 70.0, 33.5, 41.9, 25.0, 31.3),
    "convfirstnet_small": (75.0, 46.6, 61.0, 76.2, 55.0, 68.7, 40.8, 51.0, 41.1, 51.4),
}
"""Tables 5 to 8, percent of peak: the stem, then each run of equal blocks; head and classifier are not in them."""


def projected_ms(model: str, batch: int, size: int, dtype: str, ops: int, peak_ops: float) -> float | None:
    """What the paper's projection comes to on another GPU: `ops` OPs at its efficiency (table 9) of `peak_ops` OP/s.

    None for what it does not project: another network than ConvFirstNet, batch, image size or dtype.
    """
    if not model.startswith("convfirstnet") or (batch, size, dtype) != (PAPER_BATCH, PAPER_SIZE, PAPER_DTYPE):
        return None
    return 1e3 * ops / (PAPER_NETWORKS[model].pct_peak / 100 * peak_ops)

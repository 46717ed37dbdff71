"""How the logits of a fused network compare with eager PyTorch's and float64's."""

from torch import Tensor

from fusion.reference import relative_error

AGREEMENT_IMAGES = 1000
"""Images on which the first class of fused and eager networks is compared."""
CHECKED_IMAGES = 8
"""Images whose logits are compared with float64."""


def compare_logits(fused: Tensor, eager: Tensor, single: Tensor, exact: Tensor) -> dict:
    """What a row says of logits `[N, classes]`: fused and eager in one dtype, float32's, and float64's of the first."""
    count = min(AGREEMENT_IMAGES, len(fused))
    best, eager_best, single_best = (logits[:count].argmax(1) for logits in (fused, eager, single))
    return {
        "error": relative_error(fused[: len(exact)], exact) if fused.isfinite().all() else float("nan"),
        "eager_error": relative_error(eager[: len(exact)], exact),
        "agreement": 100 * (best == eager_best).double().mean().item(),
        "eager_agreement": 100 * (eager_best == single_best).double().mean().item(),
        "agreement_images": count,
        "top1_classes": len(eager_best.unique()),
    }

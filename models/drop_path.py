"""Stochastic depth."""

import torch.nn.functional as F
from torch import Tensor, nn


class DropPath(nn.Module):
    """In training, zero a residual branch for each sample with probability `p` and scale the others by 1 / (1 - p).

    `[N, C, H, W] -> [N, C, H, W]`; the identity in eval mode.

    Raises:
        ValueError: `p` is outside [0, 1).
    """

    def __init__(self, p: float = 0.0):
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"the drop-path probability must lie in [0, 1), got {p}")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        return x * F.dropout(x.new_ones(x.shape[0], 1, 1, 1), self.p)

    def extra_repr(self) -> str:
        return f"p={self.p:.3g}"

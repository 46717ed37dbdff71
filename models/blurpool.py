"""Anti-aliased down-sampling by two."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BlurPool(nn.Module):
    """Depth-wise triangle filter ([1, 2, 1] / 4 in each direction) with stride 2 and reflection padding 1.

    `[N, C, H, W] -> [N, C, ceil(H / 2), ceil(W / 2)]`, any floating dtype. H and W must be at least 2, for reflection
    needs a neighbour to reflect (torch raises RuntimeError otherwise). The filter is a constant: neither a parameter
    nor a part of the `state_dict`, and exact in fp16 and bf16.
    """

    filter: Tensor  # [C, 1, 3, 3]

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels
        triangle = torch.tensor([1.0, 2.0, 1.0]) / 4
        self.register_buffer("filter", triangle.outer(triangle).repeat(channels, 1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (1, 1, 1, 1), mode="reflect")
        return F.conv2d(x, self.filter, stride=2, groups=self.channels)

    def extra_repr(self) -> str:
        return f"{self.channels}"

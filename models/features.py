"""Feature maps of a model's stages, for detection, segmentation and the like."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .image_check import check_images, min_image_size

# The check reads sizes, which a symbolic trace does not know: it becomes one node of the graph.
torch.fx.wrap("check_images")


class FeatureInfo(list[dict]):
    """One dict for each feature map: `num_chs`, `reduction` (its stride in the image) and `module` (its name)."""

    def channels(self) -> list[int]:
        return [level["num_chs"] for level in self]

    def reduction(self) -> list[int]:
        return [level["reduction"] for level in self]

    def module_name(self) -> list[str]:
        return [level["module"] for level in self]


class FeatureExtractor(nn.Module):
    """Stem and stages of a model; returns the outputs of the stages in `out_indices`, in order of depth.

    `[N, in_chans, H, W] ->` list of `[N, num_chs, ceil(H / reduction), ceil(W / reduction)]`, described by
    `feature_info`. Stages after the last index are left out. Shares the model's weights, under the same names.

    Raises:
        ValueError: `out_indices` is empty or names a stage that the model lacks; in `forward`, an input that is not
            `[N, in_chans, H, W]` or is too small.
    """

    def __init__(self, model: nn.Module, out_indices: Sequence[int]):
        super().__init__()
        num_stages = len(model.stages)
        if not out_indices or not set(out_indices) <= set(range(num_stages)):
            raise ValueError(
                f"out_indices={tuple(out_indices)} must name one or more of the stages 0 to {num_stages - 1}"
            )
        self.out_indices = tuple(sorted(set(out_indices)))
        self.feature_info = FeatureInfo(model.feature_info[i] for i in self.out_indices)
        self.in_chans = model.in_chans
        self.stem = model.stem
        self.stages = model.stages[: self.out_indices[-1] + 1]

    def forward(self, x: Tensor) -> list[Tensor]:
        x = check_images(x, self.in_chans, min_image_size(len(self.stages) - 1))
        x = self.stem(x)
        features = []
        for index, stage in enumerate(self.stages):
            x = stage(x)
            if index in self.out_indices:
                features.append(x)
        return features

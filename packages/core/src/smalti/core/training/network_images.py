"""Images as pretrained networks take them.

Legend: B batch, C channels, H W pixels.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalti.core.backbones.pretrained import IMAGENET, Statistics

StatisticsOf = Literal["imagenet", "clip"]
# Mean and standard deviation of each channel in [0, 1].
STATISTICS: dict[StatisticsOf, tuple[Statistics, Statistics]] = {
    "imagenet": IMAGENET,
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}


def as_rgb(images: Tensor) -> Tensor:
    """Images `(B, C, H, W)` for a network of three channels: grey ones three times."""
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


class Normalisation(nn.Module):
    """Images in [-1, 1] to [0, 1], resized, less the mean and over the standard deviation of what a network saw.

    They are not clamped, so that what lies outside [-1, 1] keeps its gradient.

    Args:
        size: side of the square in pixels; images of that size are left as they are, None leaves all.
        statistics: mean and standard deviation.
        resize: `nearest`, or `bilinear` with antialiasing.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        size: int | None,
        statistics: StatisticsOf = "imagenet",
        resize: Literal["nearest", "bilinear"] = "bilinear",
    ) -> None:
        super().__init__()
        self.size, self.resize = size, resize
        mean, std = STATISTICS[statistics]
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """`(B, C, H, W)`, C 1 or 3, to `(B, 3, size, size)`."""
        images = as_rgb(images) * 0.5 + 0.5
        if self.size is not None and images.shape[2:] != (self.size, self.size):
            smooth = {"align_corners": False, "antialias": True} if self.resize == "bilinear" else {}
            images = F.interpolate(images, size=(self.size, self.size), mode=self.resize, **smooth)
        return (images - self.mean) / self.std

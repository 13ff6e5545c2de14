"""Blurs in front of and between convolutions.

Legend: B batch, C channels, H W pixels.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Binomial, except for four taps, which are those of StyleGAN2.
TAPS = {3: (1.0, 2.0, 1.0), 4: (1.0, 3.0, 3.0, 1.0), 5: (1.0, 4.0, 6.0, 4.0, 1.0)}


class Blur(nn.Module):
    """A fixed blur of every channel, `(B, C, H, W)` to about the same.

    Args:
        taps: side of the kernel, the outer product of 3, 4 or 5 taps that sum to 1.
        padding: on every side.
        mode: what is padded with.
        stride: of the kernel.
    """

    kernel: Tensor

    def __init__(
        self, taps: int, *, padding: int, mode: Literal["constant", "reflect"] = "constant", stride: int = 1
    ) -> None:
        super().__init__()
        row = torch.tensor(TAPS[taps])
        kernel = row[:, None] * row[None]
        self.register_buffer("kernel", (kernel / kernel.sum())[None, None], persistent=False)
        self.padding, self.mode, self.stride = padding, mode, stride

    def forward(self, images: Tensor) -> Tensor:
        """Blur."""
        channels = images.shape[1]
        padded = F.pad(images, [self.padding] * 4, mode=self.mode)
        return F.conv2d(
            padded, self.kernel.to(images.dtype).expand(channels, -1, -1, -1), stride=self.stride, groups=channels
        )


def gaussian_blur(images: Tensor, sigma: float) -> Tensor:
    """Images blurred by `2^-(x / sigma)^2` over a radius of 3 sigma, `(B, C, H, W)` to the same, borders reflected."""
    radius = int(3.0 * sigma)
    if radius < 1:
        return images
    places = torch.arange(-radius, radius + 1, dtype=torch.float32, device=images.device)
    taps = torch.exp2(-((places / sigma) ** 2))
    taps = (taps / taps.sum()).to(images.dtype)
    channels = images.shape[1]
    padded = F.pad(images, [radius] * 4, mode="reflect")
    rows = F.conv2d(padded, taps.view(1, 1, 1, -1).expand(channels, -1, -1, -1), groups=channels)
    return F.conv2d(rows, taps.view(1, 1, -1, 1).expand(channels, -1, -1, -1), groups=channels)

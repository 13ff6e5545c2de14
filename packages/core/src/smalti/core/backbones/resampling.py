"""Halving and doubling the resolution within convolutional backbones.

Legend: B batch, h w positions.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

Downsampling = Literal["asymmetric", "symmetric", "average"]
Upsampling = Literal["nearest", "shuffle"]


class Downsample(nn.Module):
    """Half the height and width, the same number of channels.

    Args:
        width: channels.
        kind: a 3 x 3 convolution of stride 2 with zeros to the right and below (`asymmetric`, VQGAN) or all round
            (`symmetric`, Open-MAGVIT2); `average` of 2 x 2 positions, without weights (MaskGIT's VQGAN).
    """

    def __init__(self, width: int, kind: Downsampling = "asymmetric") -> None:
        super().__init__()
        self.kind = kind
        if kind != "average":
            self.conv = nn.Conv2d(width, width, 3, stride=2, padding=1 if kind == "symmetric" else 0)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, width, h, w)` to `(B, width, h/2, w/2)`, h and w even."""
        if self.kind == "average":
            return F.avg_pool2d(x, 2)
        halved: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)) if self.kind == "asymmetric" else x)
        return halved


class Upsample(nn.Module):
    """Twice the height and width, the same number of channels.

    Args:
        width: channels.
        kind: `nearest`, every position repeated 2 x 2, then a 3 x 3 convolution; `shuffle`, a 3 x 3 convolution to
            four times the channels, whose four parts, one after the other, are the positions of the 2 x 2 square row
            by row (Open-MAGVIT2).
    """

    def __init__(self, width: int, kind: Upsampling = "nearest") -> None:
        super().__init__()
        self.kind = kind
        self.conv = nn.Conv2d(width, width if kind == "nearest" else 4 * width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, width, h, w)` to `(B, width, 2 h, 2 w)`."""
        if self.kind == "nearest":
            doubled: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
            return doubled
        batch, width, height, breadth = x.shape
        parts: Tensor = self.conv(x).view(batch, 2, 2, width, height, breadth)
        return parts.permute(0, 3, 4, 1, 5, 2).reshape(batch, width, 2 * height, 2 * breadth)

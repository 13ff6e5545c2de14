"""The phi convolutions of multi-scale quantization, which smooth what was enlarged (VAR, section 3.2).

Legend: B batch, C channels, h w latent grid, K scales, n convolutions.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def phi_of_scale(scales: int, convolutions: int, rule: Literal["ticks", "rounded"]) -> tuple[int, ...]:
    """Which of `convolutions` every one of `scales` uses, coarse to fine.

    Scale k lies at k/(K-1). `ticks` is VAR's rule: the nearest of n ticks, the first of two equally near ones;
    ticks are spread evenly over [1/(2n), 1 - 1/(2n)], for n = 4 over [1/12, 11/12]. Some scales lie exactly
    between two ticks (the third and eighth of ten), where rounding decides, so this is computed in double
    precision, in VAR's order of operations. `rounded` is vector-quantize-pytorch's rule: k/(K-1) (n-1), rounded
    half to even.
    """
    places = [scale / (scales - 1) if scales > 1 else 0.0 for scale in range(scales)]
    if rule == "rounded":
        return tuple(round(place * (convolutions - 1)) for place in places)
    start = 1 / 3 / convolutions if convolutions == 4 else 1 / 2 / convolutions
    step = (1 - start - start) / (convolutions - 1) if convolutions > 1 else 0.0
    ticks = [index * step + start for index in range(convolutions)]
    ticks[-1] = 1 - start if convolutions > 1 else start
    return tuple(min(range(convolutions), key=lambda index: abs(ticks[index] - place)) for place in places)


class Phi(nn.Module):
    """x to (1 - r) x + r conv(x), a 3 x 3 convolution with bias that keeps width and size.

    Args:
        width: C.
        ratio: r.
    """

    def __init__(self, width: int, ratio: float) -> None:
        super().__init__()
        self.ratio = ratio
        self.convolution = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, latent: Tensor) -> Tensor:
        """Smooth `(B, C, h, w)`, at least in float32."""
        weight, bias = self.convolution.weight, self.convolution.bias
        assert bias is not None
        dtype = torch.promote_types(latent.dtype, weight.dtype)
        smooth = F.conv2d(latent.to(dtype), weight.to(dtype), bias.to(dtype), padding=1)
        return latent * (1 - self.ratio) + smooth * self.ratio

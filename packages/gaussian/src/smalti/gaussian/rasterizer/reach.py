"""How far a Gaussian is seen, for the backends that visit pixels by tiles."""

from __future__ import annotations

import torch
from torch import Tensor

from smalti.gaussian.rasterizer.backends import Splats, View


def reached_pixels(splats: Splats, view: View) -> tuple[Tensor, Tensor]:
    """First and last (exclusive) pixel along (x, y) that a Gaussian can reach, within its box and the image.

    α ≥ min_alpha asks for u² + v² ≤ 2 log(opacity / min_alpha), so |dx| stays within that many standard
    deviations of x, and |dy| of y. The margins cover rounding: pixels too many cost time, never a value.
    A Gaussian whose opacity is below `min_alpha` is left to the caller.

    Returns:
        [B, N, 2] int64 each; the last is at most the first where nothing is reached.
    """
    p, q, r = splats.whitening.unbind(-1)
    deviations = torch.stack((1 / p, torch.hypot(p, q) / p / r), dim=-1)
    if view.min_alpha > 0:
        squared = 2 * (splats.opacities / view.min_alpha).clamp(min=1).log() + 0.001
        reach = squared.sqrt()[..., None] * deviations * 1.01 + 1
    else:
        reach = torch.full_like(deviations, torch.inf)
    size = reach.new_tensor((view.width, view.height))
    middle = splats.centers - view.pixel_center
    first = (middle - reach).floor().clamp(min=0).minimum(size).long()
    last = (middle + reach).ceil().clamp(min=-1).minimum(size - 1).long() + 1
    return first.maximum(splats.boxes[..., 0::2]), last.minimum(splats.boxes[..., 1::2])

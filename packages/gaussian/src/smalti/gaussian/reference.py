"""The reference backend: every Gaussian at every pixel, in plain torch that autograd differentiates.

Shapes: B images, N Gaussians per image, C channels, H rows, W columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from smalti.gaussian.projection import Projection


def rasterize_reference(
    projection: Projection,
    features: Tensor,
    opacities: Tensor,
    height: int,
    width: int,
    *,
    pixel_center: float,
    min_alpha: float,
) -> Tensor:
    """Sum the Gaussians with tensors of B × N × H × W elements; differentiable any number of times.

    Args:
        projection: of the B × N Gaussians.
        features: [B, N, C].
        opacities: [B, N].
        height: H.
        width: W.
        pixel_center: as in `rasterize_gaussians_2d`.
        min_alpha: as in `rasterize_gaussians_2d`.

    Returns:
        [B, C, H, W].
    """
    columns = torch.arange(width, device=features.device)
    rows = torch.arange(height, device=features.device)
    x, y = projection.centers[..., None].unbind(-2)
    dx = x - (columns.to(features.dtype) + pixel_center)  # [B, N, W]
    dy = y - (rows.to(features.dtype) + pixel_center)  # [B, N, H]
    p, q, r = projection.whitening[..., None].unbind(-2)
    u = (p * dx)[..., None, :]
    v = (q * dx)[..., None, :] + (r * dy)[..., :, None]  # [B, N, H, W]
    alpha = (opacities[..., None, None] * torch.exp(-0.5 * (u * u + v * v))).clamp(max=1)

    left, right, top, bottom = projection.boxes[..., None].unbind(-2)
    across = (columns >= left) & (columns < right)
    down = (rows >= top) & (rows < bottom)
    drawn = across[..., None, :] & down[..., :, None] & (alpha >= min_alpha)
    return torch.einsum("bnc,bnhw->bchw", features, torch.where(drawn, alpha, 0))

"""The reference backend: every Gaussian at every pixel, in plain torch that autograd differentiates.

Shapes: B images, N Gaussians per image, C channels, H rows, W columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from smalti.gaussian.rasterizer.backends import MAX_ALPHA_OVER, MIN_TRANSMITTANCE, Splats, View


def rasterize_reference(splats: Splats, view: View) -> Tensor:
    """Draw with tensors of B × N × H × W elements; differentiable any number of times.

    Returns:
        [B, C, H, W].
    """
    features = splats.features
    columns = torch.arange(view.width, device=features.device)
    rows = torch.arange(view.height, device=features.device)
    x, y = splats.centers[..., None].unbind(-2)
    dx = x - (columns.to(features.dtype) + view.pixel_center)  # [B, N, W]
    dy = y - (rows.to(features.dtype) + view.pixel_center)  # [B, N, H]
    p, q, r = splats.whitening[..., None].unbind(-2)
    u = (p * dx)[..., None, :]
    v = (q * dx)[..., None, :] + (r * dy)[..., :, None]  # [B, N, H, W]
    alpha = splats.opacities[..., None, None] * torch.exp(-0.5 * (u * u + v * v))
    alpha = alpha.clamp(max=MAX_ALPHA_OVER if view.over else 1)

    left, right, top, bottom = splats.boxes[..., None].unbind(-2)
    across = (columns >= left) & (columns < right)
    down = (rows >= top) & (rows < bottom)
    drawn = across[..., None, :] & down[..., :, None] & (alpha >= view.min_alpha)
    alpha = torch.where(drawn, alpha, 0)
    if view.over and alpha.shape[1]:
        left_over = torch.cumprod(1 - alpha, dim=1)
        light = torch.cat((torch.ones_like(alpha[:, :1]), left_over[:, :-1]), dim=1)
        alpha = torch.where(left_over > MIN_TRANSMITTANCE, alpha * light, 0)
    return torch.einsum("bnc,bnhw->bchw", features, alpha)

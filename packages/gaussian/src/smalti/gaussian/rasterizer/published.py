"""The gradients that GaussianToken's published CUDA kernels return instead of the true ones.

They are wrong in two ways, and the published weights were trained with them. Each error is added to the exact
gradient by a term whose value is zero, so images are the same and every backend can serve.

Shapes: B images, N Gaussians per image, C channels, H rows, W columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from smalti.gaussian.rasterizer.backends import Splats, View
from smalti.gaussian.rasterizer.ellipses import Ellipses
from smalti.gaussian.rasterizer.projection import CULL_BLOCK


def count_off_diagonal_twice(ellipses: Ellipses) -> Ellipses:
    """The same ellipses, with the gradient that flows through the covariance's off-diagonal entry doubled.

    For W the whitening: ∂p/∂xy = 0, ∂q/∂xy = -r (p² + q²), ∂r/∂xy = -q r².
    """
    p, q, r = ellipses.whitening.detach().unbind(-1)
    slope = torch.stack((torch.zeros_like(p), -r * (p * p + q * q), -q * r * r), dim=-1)
    off_diagonal = ellipses.covariances[..., 1:2]
    finite = slope.isfinite().all(-1, keepdim=True)
    once_more = (off_diagonal - off_diagonal.detach()) * torch.where(finite, slope, 0)
    return ellipses._replace(whitening=ellipses.whitening + once_more)


def forget_last_of_blocks(image: Tensor, splats: Splats, view: View) -> Tensor:
    """The same sum, without the gradient of a block of 16 × 16 pixels to the last Gaussian drawn there.

    The published kernels for other than 3 channels start their loop over the Gaussians of a block one too late.

    Args:
        image: [B, C, H, W], the sum.
        splats: what was drawn.
        view: how.
    """
    last = _last_of_blocks(splats.boxes, view)  # [B, rows of blocks, columns of blocks]
    rows = torch.arange(view.height, device=image.device)
    columns = torch.arange(view.width, device=image.device)
    index = last[:, rows // CULL_BLOCK][:, :, columns // CULL_BLOCK]  # [B, H, W]
    batch = torch.arange(len(index), device=image.device)[:, None, None]
    some = index.clamp(min=0)
    x, y = splats.centers[batch, some].unbind(-1)
    p, q, r = splats.whitening[batch, some].unbind(-1)
    dx = x - (columns.to(x.dtype) + view.pixel_center)
    dy = y - (rows.to(y.dtype) + view.pixel_center)[:, None]
    u, v = p * dx, q * dx + r * dy
    alpha = (splats.opacities[batch, some] * torch.exp(-0.5 * (u * u + v * v))).clamp(max=1)
    alpha = torch.where((index >= 0) & (alpha >= view.min_alpha), alpha, 0)
    of_last = (alpha[..., None] * splats.features[batch, some]).movedim(-1, 1)
    return image + (of_last.detach() - of_last)


def _last_of_blocks(boxes: Tensor, view: View) -> Tensor:
    """The last Gaussian of every block, -1 where there is none."""
    left, right, top, bottom = boxes[..., None].unbind(-2)
    columns = CULL_BLOCK * torch.arange(-(-view.width // CULL_BLOCK), device=boxes.device)
    rows = CULL_BLOCK * torch.arange(-(-view.height // CULL_BLOCK), device=boxes.device)
    across, down = (columns >= left) & (columns < right), (rows >= top) & (rows < bottom)
    count = boxes.shape[1]
    if count == 0:
        return boxes.new_full((len(boxes), len(rows), len(columns)), -1)
    order = torch.arange(count, device=boxes.device)[:, None, None]
    return torch.where(down[..., :, None] & across[..., None, :], order, -1).amax(1)

"""Projection: from means and ellipses to the pixel grid, and where a Gaussian is cut off.

Shapes: B images, N Gaussians per image.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from smalti.gaussian.rasterizer.ellipses import Ellipses, or_circle

# The edge of the pixel blocks that the original kernel culls by; it is compiled into that kernel.
CULL_BLOCK = 16
# The floor of b² - det in the radius (see `project`): it inflates round and tiny Gaussians.
MIN_SPREAD = 0.1**0.5


class Projection(NamedTuple):
    """Gaussians on the pixel grid.

    Args:
        centers: [B, N, 2], x and y in pixels.
        whitening: [B, N, 3], as in `Ellipses`.
        radii: [B, N], whole numbers in the dtype of the centres: the culling radius in pixels.
        boxes: [B, N, 4], int64: left, right (exclusive), top, bottom (exclusive), the pixels a Gaussian is
            drawn on, in whole blocks of 16 and so possibly reaching past the image; empty where the Gaussian
            is dropped.
    """

    centers: Tensor
    whitening: Tensor
    radii: Tensor
    boxes: Tensor


def project(means: Tensor, ellipses: Ellipses, height: int, width: int, *, cull_sigmas: float = 3.0) -> Projection:
    """Place ellipses on the pixel grid.

    The centre is (width (x + 1) / 2, height (y + 1) / 2). With b the mean of the eigenvalues and det their
    product, the culling radius is ceil(cull_sigmas √(b + √max(0.1, b² - det))); the Gaussian is drawn on the
    16-pixel blocks that the square of that radius around the centre touches (as in the kernels of
    GaussianImage, arXiv 2403.08551, and GaussianToken, arXiv 2501.15619). A Gaussian is dropped, and gets no
    gradient, when it touches no block, when it is not valid, or when it is so far away or so small (about 1e-17
    pixels in float32) that a squared distance in standard deviations overflows. Radii and boxes are constants
    for the gradient.

    Args:
        means: [B, N, 2], x and y; [-1, 1] spans the image.
        ellipses: B × N.
        height: rows of the image.
        width: columns of the image.
        cull_sigmas: the culling radius in standard deviations; infinite means no culling.
    """
    centers = 0.5 * (means + 1) * torch.stack((means.new_full((), width), means.new_full((), height)))
    with torch.no_grad():
        reach = centers.abs().amax(-1) + height + width
        greatest = ellipses.whitening.abs().amax(-1)
        regular = ellipses.valid & (2 * reach * greatest).square().isfinite()
        radii = _radii(ellipses.covariances, cull_sigmas)
        boxes = _boxes(torch.where(regular[..., None], centers, 0), radii, height, width) * regular[..., None]
    # Degenerate Gaussians become harmless ones, so that no infinity reaches a gradient.
    centers = torch.where(regular[..., None], centers, 0)
    return Projection(centers, or_circle(ellipses.whitening, regular), radii, boxes)


def _radii(covariances: Tensor, cull_sigmas: float) -> Tensor:
    # b + √(b² - det) is the greater eigenvalue, and b² - det = ((xx - yy) / 2)² + xy².
    xx, xy, yy = covariances.unbind(-1)
    spread = torch.hypot((xx - yy) / 2, xy).clamp(min=MIN_SPREAD)
    return (cull_sigmas * ((xx + yy) / 2 + spread).sqrt()).ceil()


def _boxes(centers: Tensor, radii: Tensor, height: int, width: int) -> Tensor:
    blocks = torch.stack([centers.new_full((), -(-size // CULL_BLOCK)) for size in (width, height)])
    middle, extent = centers / CULL_BLOCK, radii[..., None] / CULL_BLOCK
    first = (middle - extent).trunc().clamp(min=0).minimum(blocks)
    last = (middle + extent + 1).trunc().clamp(min=0).minimum(blocks)
    return torch.stack((first, last), dim=-1).flatten(-2).long() * CULL_BLOCK

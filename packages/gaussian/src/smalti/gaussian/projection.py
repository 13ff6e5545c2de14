"""Projection: from scales and rotations to the pixel grid, the ellipse of a Gaussian and where it is cut off.

Shapes: B images, N Gaussians per image.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# The edge of the pixel blocks that the original kernel culls by; it is compiled into that kernel.
CULL_BLOCK = 16
# The floor of b² - det in the radius (see `project`): it inflates round and tiny Gaussians.
MIN_SPREAD = 0.1**0.5


class Projection(NamedTuple):
    """Gaussians on the pixel grid.

    Args:
        centers: [B, N, 2], x and y in pixels.
        whitening: [B, N, 3], the entries (p, q, r) of the lower triangular matrix that turns an offset
            (dx, dy) in pixels into standard deviations, (p dx, q dx + r dy); p and r are positive.
        radii: [B, N], whole numbers in the dtype of the centres: the culling radius in pixels.
        boxes: [B, N, 4], int64: left, right (exclusive), top, bottom (exclusive), the pixels a Gaussian is
            drawn on, in whole blocks of 16 and so possibly reaching past the image; empty where the Gaussian
            is dropped.
    """

    centers: Tensor
    whitening: Tensor
    radii: Tensor
    boxes: Tensor


def project(
    means: Tensor, scales: Tensor, rotations: Tensor, height: int, width: int, *, cull_sigmas: float = 3.0
) -> Projection:
    """Project Gaussians with the covariance R diag(sx², sy²) Rᵀ, R = [[cos θ, sin θ], [-sin θ, cos θ]].

    The centre is (width (x + 1) / 2, height (y + 1) / 2). With b the mean of the eigenvalues and det their
    product, the culling radius is ceil(cull_sigmas √(b + √max(0.1, b² - det))); the Gaussian is drawn on the
    16-pixel blocks that the square of that radius around the centre touches (as in the kernels of
    GaussianImage, arXiv 2403.08551, and GaussianToken, arXiv 2501.15619). A Gaussian is dropped, and gets no
    gradient, when it touches no block or when a scale is zero or so small (about 1e-17 pixels in float32) that
    its inverse square overflows. Radii and boxes are constants for the gradient.

    Args:
        means: [B, N, 2], x and y; [-1, 1] spans the image.
        scales: [B, N, 2], standard deviations along the axes of the ellipse, in pixels, not negative.
        rotations: [B, N], θ in radians.
        height: rows of the image.
        width: columns of the image.
        cull_sigmas: the culling radius in standard deviations; infinite means no culling.
    """
    centers = 0.5 * (means + 1) * means.new_tensor((width, height))
    with torch.no_grad():
        radii = _radii(scales, cull_sigmas)
        boxes = _boxes(centers, radii, height, width)
        reach = centers.abs().amax(-1) + height + width
        regular = torch.isfinite(reach / scales.amin(-1).square())[..., None]
        boxes = boxes * regular
    # Degenerate Gaussians become harmless ones, so that no infinity reaches a gradient.
    centers = torch.where(regular, centers, 0)
    whitening = _whitening(torch.where(regular, scales, 1), rotations)
    return Projection(centers, whitening, radii, boxes)


def conics(whitening: Tensor) -> Tensor:
    """The inverse covariances: entries (xx, xy, yy).

    Args:
        whitening: [..., 3], as in `Projection`.

    Returns:
        [..., 3], per square pixel.
    """
    p, q, r = whitening.unbind(-1)
    return torch.stack((p * p + q * q, q * r, r * r), dim=-1)


def _whitening(scales: Tensor, rotations: Tensor) -> Tensor:
    # The conic is XᵀX with rows (cos, -sin)/sx and (sin, cos)/sy. Its triangular factor comes from sums of
    # squares alone, so it neither cancels nor overflows where conic or determinant would.
    sx, sy = scales.unbind(-1)
    cos, sin = rotations.cos(), rotations.sin()
    a, b = sin / sx, cos / sy
    r = torch.hypot(a, b)
    q = (b / r) * (sin / sy) - (a / r) * (cos / sx)
    p = 1 / torch.hypot(cos * sx, sin * sy)
    return torch.stack((p, q, r), dim=-1)


def _radii(scales: Tensor, cull_sigmas: float) -> Tensor:
    # b + √(b² - det) is the greater eigenvalue.
    mean = scales.square().mean(-1)
    spread = scales.amax(-1).square().maximum(mean + MIN_SPREAD)
    return (cull_sigmas * spread.sqrt()).ceil()


def _boxes(centers: Tensor, radii: Tensor, height: int, width: int) -> Tensor:
    blocks = centers.new_tensor((-(-width // CULL_BLOCK), -(-height // CULL_BLOCK)))
    middle, extent = centers / CULL_BLOCK, radii[..., None] / CULL_BLOCK
    first = (middle - extent).trunc().clamp(min=0).minimum(blocks)
    last = (middle + extent + 1).trunc().clamp(min=0).minimum(blocks)
    return torch.stack((first, last), dim=-1).flatten(-2).long() * CULL_BLOCK

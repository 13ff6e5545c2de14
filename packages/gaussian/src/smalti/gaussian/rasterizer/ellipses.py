"""Ellipses: the shape of a Gaussian from scales and rotation, a Cholesky factor or a covariance.

Shapes: B images, N Gaussians per image.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Ellipses(NamedTuple):
    """Shapes of Gaussians, in pixels.

    Args:
        whitening: [B, N, 3], the entries (p, q, r) of the lower triangular matrix that turns an offset
            (dx, dy) in pixels into standard deviations, (p dx, q dx + r dy); p and r are positive.
        covariances: [B, N, 3], the entries (xx, xy, yy).
        valid: [B, N], whether covariance and squared whitening are finite; where not, the others are those of
            some harmless ellipse and without gradient.
    """

    whitening: Tensor
    covariances: Tensor
    valid: Tensor


def from_scales(scales: Tensor, rotations: Tensor) -> Ellipses:
    """The covariance R diag(sx², sy²) Rᵀ with R = [[cos θ, sin θ], [-sin θ, cos θ]].

    Args:
        scales: [B, N, 2], standard deviations along the axes of the ellipse.
        rotations: [B, N], θ in radians.
    """
    valid = (scales > 0).all(-1) & _squares_finite(1 / scales, scales) & rotations.isfinite()
    sx, sy = torch.where(valid[..., None], scales, 1).unbind(-1)
    angles = torch.where(valid, rotations, 0)
    cos, sin = angles.cos(), angles.sin()
    # The conic is XᵀX with rows (cos, -sin)/sx and (sin, cos)/sy. Its triangular factor comes from sums of
    # squares alone, so it neither cancels nor overflows where conic or determinant would.
    a, b = sin / sx, cos / sy
    r = torch.hypot(a, b)
    q = (b / r) * (sin / sy) - (a / r) * (cos / sx)
    p = 1 / torch.hypot(cos * sx, sin * sy)
    xx = (cos * sx).square() + (sin * sy).square()
    xy = cos * sin * (sy - sx) * (sy + sx)
    yy = (sin * sx).square() + (cos * sy).square()
    return Ellipses(torch.stack((p, q, r), dim=-1), torch.stack((xx, xy, yy), dim=-1), valid)


def from_cholesky(cholesky: Tensor) -> Ellipses:
    """The covariance L Lᵀ.

    Args:
        cholesky: [B, N, 3], the entries (l11, l21, l22) of the lower triangular L; neither diagonal entry is 0.
    """
    l11, l21, l22 = cholesky.detach().unbind(-1)
    valid = _squares_finite(torch.stack((1 / l11, 1 / l22, l21 / l11 / l22), dim=-1), cholesky)
    l11, l21, l22 = or_circle(cholesky, valid).unbind(-1)
    # The rows of the inverse of L, with the signs that make p and r positive.
    r = 1 / l22.abs()
    whitening = torch.stack((1 / l11.abs(), -l21 / l11 * r, r), dim=-1)
    covariances = torch.stack((l11.square(), l11 * l21, l21.square() + l22.square()), dim=-1)
    return Ellipses(whitening, covariances, valid)


def from_covariances(covariances: Tensor) -> Ellipses:
    """The covariance itself.

    Args:
        covariances: [B, N, 3], its entries (xx, xy, yy); positive definite.
    """
    valid = positive_definite(covariances)
    xx, xy, yy = or_circle(covariances, valid).unbind(-1)
    r = (yy - xy / xx * xy).rsqrt()
    whitening = torch.stack((xx.rsqrt(), -xy / xx * r, r), dim=-1)
    return Ellipses(whitening, torch.stack((xx, xy, yy), dim=-1), valid)


def or_circle(entries: Tensor, valid: Tensor) -> Tensor:
    """Three entries each of [B, N, 3], those of the unit circle where not valid."""
    first, second, third = entries.unbind(-1)
    return torch.stack((torch.where(valid, first, 1), torch.where(valid, second, 0), torch.where(valid, third, 1)), -1)


def positive_definite(covariances: Tensor) -> Tensor:
    """Which of [B, N, 3] are: [B, N]."""
    xx, xy, yy = covariances.detach().unbind(-1)
    slope = xy / xx
    rest = yy - slope * xy
    # The squares of its whitening must be finite too.
    squares = torch.stack((xx, 1 / xx, 1 / rest, slope * slope / rest), dim=-1)
    return (xx > 0) & (rest > 0) & covariances.detach().isfinite().all(-1) & squares.isfinite().all(-1)


@torch.no_grad()
def _squares_finite(*entries: Tensor) -> Tensor:
    return torch.cat(entries, dim=-1).square().isfinite().all(-1)

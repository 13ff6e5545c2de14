"""Pairwise image metrics: PSNR and SSIM of images against their references.

Legend: B batch, C channels, H W pixels, F filter positions. Both metrics take float images
`(B, C, H, W)` in [-1, 1] or uint8 images of that shape, bring them to [0, 1], and compute in float64.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from smalti.core.errors import UserError

PSNR_CAP = 100.0
PSNR_DEFINITION = (
    "10 log10(1 / MSE) of each image over all pixels and channels, values in [0, 1], data range 1, at most "
    f"{PSNR_CAP:g} dB; mean over images"
)
SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
SSIM_DEFINITION = (
    "Wang et al. 2004: 11x11 Gaussian window of sigma 1.5, K1 = 0.01, K2 = 0.03, values in [0, 1], data range 1, "
    "window positions inside the image only, mean over positions and channels; mean over images"
)


def psnr(images: Tensor, references: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, float64 `(B,)`.

    An image equal to its reference has no noise and would be infinite; it counts as `PSNR_CAP`, which is
    also the most that any other image gets, so that a mean over images stays finite.

    Raises:
        UserError: other shapes or types than the module takes, or two different ones.
    """
    images, references = _unit_range(images, references)
    error = (images - references).square().flatten(1).mean(1)
    return (-10 * torch.log10(error)).clamp(max=PSNR_CAP)


def pooled_psnr(images: Tensor, references: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of the mean error of all images in dB, a float64 scalar.

    It is at most the mean of `psnr`, and depends on which images are given together. For figures of others
    (GaussianToken, torchmetrics).

    Raises:
        UserError: as `psnr`.
    """
    images, references = _unit_range(images, references)
    return (-10 * torch.log10((images - references).square().mean())).clamp(max=PSNR_CAP)


def ssim(images: Tensor, references: Tensor, *, window: Literal["gaussian", "uniform"] = "gaussian") -> Tensor:
    """Structural similarity of each image, float64 `(B,)` in [-1, 1], 1 for equal images.

    Wang, Bovik, Sheikh and Simoncelli 2004, eq. 13 and section III.C, with the data range 1.

    Args:
        images: see the module.
        references: the same.
        window: `gaussian`, that of the paper; `uniform`, 7 x 7 with unbiased variances, what scikit-image does where
            it is told nothing else.

    Raises:
        UserError: as `psnr`, or images smaller than the window.
    """
    images, references = _unit_range(images, references)
    height, width = images.shape[2:]
    weights = _gaussian_window() if window == "gaussian" else torch.full((7,), 1 / 7, dtype=torch.float64)
    side = len(weights)
    if min(height, width) < side:
        raise UserError(f"SSIM needs images of {side} x {side} pixels or more, got {height} x {width}")
    rows, columns = (_filter_matrix(size, weights).to(images.device) for size in (height, width))
    unbiased = 1.0 if window == "gaussian" else side**2 / (side**2 - 1)

    def blurred(values: Tensor) -> Tensor:
        return rows @ values @ columns.T

    c1, c2 = 0.01**2, 0.03**2
    mean_x, mean_y = blurred(images), blurred(references)
    variance_x = unbiased * (blurred(images.square()) - mean_x.square())
    variance_y = unbiased * (blurred(references.square()) - mean_y.square())
    covariance = unbiased * (blurred(images * references) - mean_x * mean_y)
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (luminance * structure).flatten(1).mean(1)


def _gaussian_window() -> Tensor:
    offsets = torch.arange(SSIM_WINDOW, dtype=torch.float64) - SSIM_WINDOW // 2
    window = torch.exp(-offsets.square() / (2 * SSIM_SIGMA**2))
    return window / window.sum()


def _filter_matrix(size: int, window: Tensor) -> Tensor:
    """A window as a banded matrix `(F, size)`: the filters are separable, so each is two products."""
    matrix = torch.zeros(size - len(window) + 1, size, dtype=torch.float64)
    for position, row in enumerate(matrix):
        row[position : position + len(window)] = window
    return matrix


def _unit_range(images: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
    """Both as float64 in [0, 1]."""
    if images.shape != references.shape or images.ndim != 4:
        raise UserError(
            f"images and references must both be (B, C, H, W), got {tuple(images.shape)} and {tuple(references.shape)}"
        )
    if images.dtype != references.dtype:
        raise UserError(f"images are {images.dtype} and references {references.dtype}: bring both to one type")
    if images.dtype == torch.uint8:
        return images.double() / 255, references.double() / 255
    if not torch.is_floating_point(images):
        raise UserError(f"images must be float in [-1, 1] or uint8, got {images.dtype}")
    return (images.double() + 1) / 2, (references.double() + 1) / 2

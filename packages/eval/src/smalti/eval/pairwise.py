"""Pairwise image metrics: PSNR and SSIM of images against their references.

Legend: B batch, C channels, H W pixels, F positions of the window along an axis. All metrics take float images
`(B, C, H, W)` in [-1, 1] or uint8 images of that shape, bring them to [0, 1], and compute in float64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from smalti.core.errors import UserError

PSNR_CAP = 100.0
PSNR_DEFINITION = (
    "10 log10(1 / MSE) of each image over all pixels and channels, values in [0, 1], data range 1, at most "
    f"{PSNR_CAP:g} dB; mean over images"
)
POOLED_PSNR_DEFINITION = (
    "10 log10(1 / MSE) of all images of a batch together, values in [0, 1], data range 1; mean over batches, and so "
    "dependent on their size (GaussianToken)"
)
SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
SSIM_DEFINITION = (
    "Wang et al. 2004: 11x11 Gaussian window of sigma 1.5, K1 = 0.01, K2 = 0.03, values in [0, 1], data range 1, "
    "window positions inside the image only, mean over positions and channels; mean over images"
)

UNIFORM_WINDOW = 7
SSIM_UNIFORM_DEFINITION = (
    "scikit-image's defaults: 7x7 uniform window, variances with n - 1, K1 = 0.01, K2 = 0.03, values in [0, 1], data "
    "range 1, window positions inside the image only, mean over positions and channels; mean over images"
)

SSIM_REFLECTED_DEFINITION = (
    "torchmetrics' defaults: the Gaussian window and the constants of Wang et al. 2004 (11x11, sigma 1.5, K1 = 0.01, "
    "K2 = 0.03), values in [0, 1], data range 1, at every pixel of images mirrored at their borders, mean over "
    "positions and channels; mean over images"
)


def psnr(images: Tensor, references: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, float64 `(B,)`.

    An image equal to its reference has no noise and would be infinite; it counts as `PSNR_CAP`, which is
    also the most that any other image gets, so that a mean over images stays finite.

    Raises:
        UserError: other shapes or types than the module takes, or two different ones.
    """
    images, references = unit_range(images, references)
    error = (images - references).square().flatten(1).mean(1)
    return (-10 * torch.log10(error)).clamp(max=PSNR_CAP)


def pooled_psnr(images: Tensor, references: Tensor) -> Tensor:
    """The PSNR of the error of a whole batch in dB, a float64 scalar, at most `PSNR_CAP`.

    It depends on which images share a batch; papers that report it name their batch size. For anything else there is
    `psnr`.

    Raises:
        UserError: as `psnr`.
    """
    images, references = unit_range(images, references)
    return (-10 * torch.log10((images - references).square().mean())).clamp(max=PSNR_CAP)


def ssim(images: Tensor, references: Tensor) -> Tensor:
    """Structural similarity of each image, float64 `(B,)` in [-1, 1], 1 for equal images.

    Wang, Bovik, Sheikh and Simoncelli 2004, eq. 13 and section III.C, with the data range 1.

    Raises:
        UserError: as `psnr`, or images smaller than the window.
    """
    images, references = unit_range(images, references)
    luminance, structure = similarity_maps(images, references, gaussian_window())
    return (luminance * structure).flatten(1).mean(1)


def ssim_uniform(images: Tensor, references: Tensor) -> Tensor:
    """Structural similarity as scikit-image computes it by default, float64 `(B,)`.

    Windows of 7 x 7 equally weighted pixels, whose variances are divided by 48. Values are a few hundredths above
    those of `ssim` where windows differ little, and must not be compared with them.

    Raises:
        UserError: as `psnr`, or images smaller than the window.
    """
    images, references = unit_range(images, references)
    window = torch.full((UNIFORM_WINDOW,), 1 / UNIFORM_WINDOW, dtype=torch.float64)
    pixels = UNIFORM_WINDOW**2
    luminance, structure = similarity_maps(images, references, window, unbiased=pixels / (pixels - 1))
    return (luminance * structure).flatten(1).mean(1)


def ssim_reflected(images: Tensor, references: Tensor) -> Tensor:
    """Structural similarity as torchmetrics computes it by default, float64 `(B,)`.

    `ssim` with a window at every pixel, for which images are mirrored at their borders: the smaller the images, the
    further from `ssim`.

    Raises:
        UserError: as `psnr`, or images smaller than the window.
    """
    images, references = unit_range(images, references)
    reach = SSIM_WINDOW // 2
    if min(images.shape[2:]) >= SSIM_WINDOW:
        images, references = (F.pad(pixels, (reach,) * 4, mode="reflect") for pixels in (images, references))
    luminance, structure = similarity_maps(images, references, gaussian_window())
    return (luminance * structure).flatten(1).mean(1)


def gaussian_window() -> Tensor:
    """The window of Wang et al. along one axis, float64 `(11,)`."""
    offsets = torch.arange(SSIM_WINDOW, dtype=torch.float64) - SSIM_WINDOW // 2
    window = torch.exp(-offsets.square() / (2 * SSIM_SIGMA**2))
    return window / window.sum()


def similarity_maps(images: Tensor, references: Tensor, window: Tensor, unbiased: float = 1.0) -> tuple[Tensor, Tensor]:
    """The two factors of SSIM at every position of a window: of luminance, and of contrast and structure.

    Args:
        images: float64 `(B, C, H, W)` in [0, 1].
        references: the same.
        window: weights along one axis, the same for rows and columns.
        unbiased: multiplies variances and covariances.

    Raises:
        UserError: images smaller than the window.
    """
    height, width = images.shape[2:]
    if min(height, width) < len(window):
        raise UserError(f"SSIM needs images of {len(window)} x {len(window)} pixels or more, got {height} x {width}")
    rows, columns = (_filter_matrix(window, size).to(images.device) for size in (height, width))

    def blurred(values: Tensor) -> Tensor:
        return rows @ values @ columns.T

    c1, c2 = 0.01**2, 0.03**2
    mean_x, mean_y = blurred(images), blurred(references)
    variance_x = unbiased * (blurred(images.square()) - mean_x.square())
    variance_y = unbiased * (blurred(references.square()) - mean_y.square())
    covariance = unbiased * (blurred(images * references) - mean_x * mean_y)
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return luminance, structure


def _filter_matrix(window: Tensor, size: int) -> Tensor:
    """The window as a banded matrix `(F, size)`: the filter is separable, so it is two products."""
    matrix = torch.zeros(size - len(window) + 1, size, dtype=torch.float64)
    for position, row in enumerate(matrix):
        row[position : position + len(window)] = window
    return matrix


def unit_range(images: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
    """Both as float64 in [0, 1].

    Raises:
        UserError: images of other shapes or types than the module takes, or two different ones.
    """
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

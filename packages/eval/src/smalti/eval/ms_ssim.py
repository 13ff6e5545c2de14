"""Multi-scale structural similarity of images and their references (Wang, Simoncelli and Bovik 2003).

Legend: B batch, C channels, H W pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from smalti.core.errors import UserError
from smalti.eval.pairwise import SSIM_WINDOW, gaussian_window, similarity_maps, unit_range

# Of contrast and structure from fine to coarse; the luminance of the coarsest scale has the last one, too.
EXPONENTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
SMALLEST = SSIM_WINDOW * 2 ** (len(EXPONENTS) - 1)
MS_SSIM_DEFINITION = (
    "Wang, Simoncelli and Bovik 2003: five scales by the mean of 2x2 pixels, window and constants of SSIM (11x11 "
    "Gaussian of sigma 1.5), means over positions and channels, negative ones as 0, values in [0, 1], data range 1; "
    "mean over images"
)


def ms_ssim(images: Tensor, references: Tensor) -> Tensor:
    """MS-SSIM of each image, float64 `(B,)` in [0, 1], 1 for equal images.

    Args:
        images: `(B, C, H, W)` float in [-1, 1] or uint8, 176 pixels or more.
        references: the same.

    Raises:
        UserError: other shapes or types, or images too small for five scales.
    """
    images, references = unit_range(images, references)
    height, width = images.shape[2:]
    if min(height, width) < SMALLEST:
        raise UserError(f"MS-SSIM needs images of {SMALLEST} x {SMALLEST} pixels or more, got {height} x {width}")
    window = gaussian_window()
    product = torch.ones(len(images), dtype=torch.float64, device=images.device)
    for scale, exponent in enumerate(EXPONENTS):
        luminance, structure = similarity_maps(images, references, window)
        last = scale == len(EXPONENTS) - 1
        mean = (luminance * structure if last else structure).flatten(1).mean(1)
        product = product * mean.clamp(min=0) ** exponent
        images, references = F.avg_pool2d(images, 2), F.avg_pool2d(references, 2)
    return product

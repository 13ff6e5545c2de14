"""Where the Gaussians of a fit begin: many where the picture changes, each with its colour and a fitting size.

Shapes: N Gaussians, C channels, H W pixels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from smalti.gaussian.fitting.picture import GaussianPicture

# The share of Gaussians that are spread evenly, whatever the picture shows.
EVEN = 0.1
# Side in pixels of the window over which changes are averaged.
WINDOW = 7
# Standard deviation of a Gaussian in distances to its neighbours.
OVERLAP = 0.5


def starting_picture(image: Tensor, gaussians: int, seed: int) -> GaussianPicture:
    """Round Gaussians whose sum is about the picture, blurred most where it changes least.

    Centres are drawn from a density that follows the size of the picture's gradient; the scale of each is a fixed share
    of the distance to its neighbours there, and colours are divided by how many Gaussians overlap.

    Args:
        image: [C, H, W] in [0, 1].
        gaussians: N.
        seed: of the centres; the same on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    _, height, width = image.shape
    density = _density(image.cpu()).flatten()
    # One draw from each of N equal parts of the distribution: as random as needed, without clumps.
    draws = (torch.arange(gaussians) + torch.rand(gaussians, generator=generator, dtype=torch.float64)) / gaussians
    pixels = torch.searchsorted(density.cumsum(0), draws).clamp(max=height * width - 1)
    within = torch.rand(gaussians, 2, generator=generator)
    centres = torch.stack((pixels % width, pixels // width), -1) + within
    neighbours = (gaussians * density[pixels]).float()  # per pixel
    scales = OVERLAP / neighbours.sqrt()
    colours = image.cpu().flatten(1)[:, pixels].T / (2 * math.pi * scales.square() * neighbours)[:, None]
    return GaussianPicture(
        means=centres / torch.tensor((width, height)) * 2 - 1,
        scales=scales[:, None].repeat(1, 2),
        rotations=torch.zeros(gaussians),
        colours=colours,
        height=height,
        width=width,
    )


def _density(image: Tensor) -> Tensor:
    """How likely a centre lies in each pixel, [H, W], float64, sums to 1."""
    changes = image.new_zeros(image.shape[1:])
    changes[:, :-1] += image.diff(dim=2).square().sum(0)
    changes[:-1] += image.diff(dim=1).square().sum(0)
    strength = changes.sqrt()[None, None]
    smooth = F.avg_pool2d(strength, WINDOW, 1, WINDOW // 2, count_include_pad=False)[0, 0].double()
    even = torch.full_like(smooth, 1 / smooth.numel())
    total = smooth.sum()
    return even if total == 0 else EVEN * even + (1 - EVEN) * smooth / total

"""What a discriminator sees instead of the images: DiffAugment and a blur that fades.

Legend: B batch, C channels, H W pixels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from smalti.core.discriminators.blur import gaussian_blur
from smalti.core.training.options import Augmentation

TRANSLATION = 0.125  # of the side
CUTOUT = 0.2  # of the side


def augmented(images: Tensor, options: Augmentation, step: int) -> Tensor:
    """Images `(B, C, H, W)` in [-1, 1] as the discriminator gets them at an update, with gradients.

    Each transformation is applied to the whole batch or not at all, with amounts of its own for every image.
    """
    images = blurred(images, blur_strength(options, step))
    for transformation in (translated, coloured, cut_out):
        if torch.rand(()) < options.probability:
            images = transformation(images)
    return images


def blur_strength(options: Augmentation, step: int) -> float:
    """1 until `blur_until`, then down to 0 within `blur_fade` updates."""
    if step < options.blur_until:
        return 1.0
    if options.blur_until == 0:
        return 0.0
    return max(0.0, 1.0 - (step - options.blur_until + 1) / (options.blur_fade + 1))


def blurred(images: Tensor, strength: float) -> Tensor:
    """Images under a blur that takes all but a few pixels' worth of detail at strength 1, and nothing at 0."""
    return gaussian_blur(images, strength * math.sqrt(images.shape[2] / 2))


def translated(images: Tensor) -> Tensor:
    """Every image moved by up to an eighth of its sides; what comes in is grey, 0."""
    batch, _, height, width = images.shape
    limits = (round(TRANSLATION * side) for side in (height, width))
    down, across = (_integers(batch, -limit, limit, images) for limit in limits)
    rows = torch.arange(height, device=images.device)[None] - down[:, None]
    columns = torch.arange(width, device=images.device)[None] - across[:, None]
    inside = _inside(rows, height)[:, None, :, None] & _inside(columns, width)[:, None, None, :]
    sample = torch.arange(batch, device=images.device)[:, None, None]
    rows, columns = rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None]
    moved = images.permute(0, 2, 3, 1)[sample, rows, columns]
    return moved.permute(0, 3, 1, 2) * inside


def coloured(images: Tensor) -> Tensor:
    """Every image with a brightness of up to 0.5 more or less, 0 to 2 times the saturation, 0.5 to 1.5 the contrast."""
    amount = torch.rand(3, len(images), 1, 1, 1, device=images.device, dtype=images.dtype)
    images = images + amount[0] - 0.5
    grey = images.mean(1, keepdim=True)
    images = grey + (images - grey) * 2.0 * amount[1]
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + (images - mean) * (0.5 + amount[2])


def cut_out(images: Tensor) -> Tensor:
    """Every image with a square of a fifth of its sides set to 0, somewhere, perhaps partly outside."""
    batch, _, height, width = images.shape
    struck = []
    for side in (height, width):
        size = round(CUTOUT * side)
        first = _integers(batch, -size + 1, side - 1, images)
        places = torch.arange(side, device=images.device)[None] - first[:, None]
        struck.append(_inside(places, size))
    hole = struck[0][:, None, :, None] & struck[1][:, None, None, :]
    return images * ~hole


def _integers(batch: int, low: int, high: int, like: Tensor) -> Tensor:
    return torch.randint(low, high + 1, (batch,), device=like.device)


def _inside(places: Tensor, side: int) -> Tensor:
    return (places >= 0) & (places < side)

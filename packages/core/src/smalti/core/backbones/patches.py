"""Between images and a grid of patch vectors.

Legend: B batch, C image channels, H W pixels, p patch side, h w = H/p W/p grid, D width.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from smalti.core.contracts import check_images
from smalti.core.errors import UserError

ImageRange = Literal["symmetric", "unit"]


def to_image_range(images: Tensor, image_range: ImageRange) -> Tensor:
    """Images in [-1, 1] in the range a network was trained on: `symmetric` is [-1, 1], `unit` [0, 1]."""
    return (images + 1) / 2 if image_range == "unit" else images


def from_image_range(images: Tensor, image_range: ImageRange) -> Tensor:
    """The way back, to [-1, 1]."""
    return images * 2 - 1 if image_range == "unit" else images


class PatchEmbedding(nn.Module):
    """One linear map of every patch, as a convolution whose stride is its kernel; images of one size only.

    Args:
        channels: C.
        width: D.
        patch: p.
        grid: h and w.
        image_range: range that the patches are taken in.
    """

    def __init__(self, channels: int, width: int, patch: int, grid: tuple[int, int], image_range: ImageRange) -> None:
        super().__init__()
        self.channels = channels
        self.patch = patch
        self.grid = grid
        self.image_range: ImageRange = image_range
        self.projection = nn.Conv2d(channels, width, patch, stride=patch)

    def forward(self, images: Tensor) -> Tensor:
        """Images `(B, C, H, W)` in [-1, 1] to `(B, h w, D)`, rows first."""
        check_images(images, self.channels)
        self.check_size((images.shape[2], images.shape[3]))
        grid: Tensor = self.projection(to_image_range(images, self.image_range))
        return grid.flatten(2).transpose(1, 2)

    def check_size(self, image_size: tuple[int, int]) -> None:
        """Raise a `UserError` for images of another size than this network is for."""
        height, width = (side * self.patch for side in self.grid)
        if tuple(image_size) != (height, width):
            raise UserError(
                f"an image of {image_size[0]}x{image_size[1]} cannot be encoded: this encoder is for {height}x{width}"
            )


def from_patches(patches: Tensor, patch: int) -> Tensor:
    """Patches `(B, h, w, p p C)` to images `(B, C, H, W)`; a patch lists its rows, their pixels, their channels."""
    pixels = patches.unflatten(-1, (patch, patch, -1))
    images: Tensor = pixels.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
    return images


class PatchPixels(nn.Module):
    """Pixels of every patch by one linear map, then a 3 x 3 convolution over the image that smooths the seams.

    Args:
        channels: C.
        width: D.
        patch: p.
        image_range: range that the convolution gives.
    """

    def __init__(self, channels: int, width: int, patch: int, image_range: ImageRange) -> None:
        super().__init__()
        self.patch = patch
        self.image_range: ImageRange = image_range
        self.projection = nn.Linear(width, patch * patch * channels)
        self.smoothing = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, grid: Tensor) -> Tensor:
        """`(B, h, w, D)` to images `(B, C, H, W)` in [-1, 1]."""
        images = from_patches(self.projection(grid), self.patch)
        return from_image_range(self.smoothing(images), self.image_range)

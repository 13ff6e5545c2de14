"""What chance does to an image in training: a crop, and the mirror image.

It takes the place of the tokenizer's own fitting, which stays as it is for everything after the training.

Legend: C channels, H W pixels, S side of the square that comes out.
"""

from __future__ import annotations

import math
import random
from abc import abstractmethod
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from smalti.core.data.geometry import Filter, Resize, adm_resized, cut, quickly_resized, short_side_resized
from smalti.core.data.picture import Pixels
from smalti.core.options import Options

Positive = Annotated[float, Field(gt=0)]


class Crop(Options):
    """A way to cut a square out of an image."""

    name: str

    @abstractmethod
    def apply(self, pixels: Pixels, size: int, draws: random.Random, resize: Resize = quickly_resized) -> Pixels:
        """Pixels `(H, W, C)` to `(S, S, C)`.

        Args:
            pixels: of the whole image.
            size: S.
            draws: where chance comes from.
            resize: how it is resampled.
        """


class RandomCrop(Crop):
    """The short side resized to S, then a square anywhere along the long side (TiTok).

    Args:
        filter: of the resizing.
    """

    name: Literal["random"] = "random"
    filter: Filter = "bicubic"

    def apply(self, pixels: Pixels, size: int, draws: random.Random, resize: Resize = quickly_resized) -> Pixels:
        """Resize, then draw the place."""
        return _somewhere(short_side_resized(pixels, size, self.filter, resize), size, draws)


class RandomScaleCrop(Crop):
    """ADM's random crop (Dhariwal and Nichol 2021), which LlamaGen, FQGAN and visual-tokenizer-pytorch share.

    The short side is drawn from the whole numbers between `shortest` times S and `longest` times S, both rounded
    up and included; the image is halved while it is at least twice that, resized bicubic, and cut anywhere.

    Args:
        shortest: at least 1.
        longest: at least `shortest`.
    """

    name: Literal["random-scale"] = "random-scale"
    shortest: Annotated[float, Field(ge=1)] = 1.0
    longest: float = 1.25

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.longest < self.shortest:
            raise ValueError(f"longest is {self.longest}, below shortest, which is {self.shortest}")
        return self

    def apply(self, pixels: Pixels, size: int, draws: random.Random, resize: Resize = quickly_resized) -> Pixels:
        """Draw the short side, then row and column."""
        short = draws.randrange(math.ceil(size * self.shortest), math.ceil(size * self.longest) + 1)
        return _somewhere(adm_resized(pixels, short, resize), size, draws)


class RandomResizedCrop(Crop):
    """A rectangle of random area and shape, resized to the square (Szegedy et al. 2015; as torchvision draws it).

    Args:
        area: smallest and largest share of the image's area.
        ratio: smallest and largest width over height; its logarithm is uniform.
        filter: of the resizing.
    """

    name: Literal["random-resized"] = "random-resized"
    area: tuple[Positive, Positive] = (0.08, 1.0)
    ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)
    filter: Filter = "bilinear"

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.area[0] > self.area[1] or self.ratio[0] > self.ratio[1]:
            raise ValueError("the smallest value comes first, then the largest")
        return self

    def apply(self, pixels: Pixels, size: int, draws: random.Random, resize: Resize = quickly_resized) -> Pixels:
        """Draw rectangles until one fits, ten times at most; then take the largest one in the middle."""
        left, top, width, height = self._rectangle(pixels.shape[1], pixels.shape[0], draws)
        return resize(pixels[top : top + height, left : left + width], size, size, self.filter)

    def _rectangle(self, width: int, height: int, draws: random.Random) -> tuple[int, int, int, int]:
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for _ in range(10):
            area = width * height * draws.uniform(*self.area)
            ratio = math.exp(draws.uniform(low, high))
            wide, tall = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < wide <= width and 0 < tall <= height:
                top = draws.randrange(height - tall + 1)
                return draws.randrange(width - wide + 1), top, wide, tall
        ratio = min(max(width / height, self.ratio[0]), self.ratio[1])
        wide, tall = min(width, round(height * ratio)), min(height, round(width / ratio))
        return (width - wide) // 2, (height - tall) // 2, wide, tall


class Augmentation(Options):
    """What training does to every image.

    All chance comes from (seed, epoch, place of the image in the epoch), so that neither workers nor processes
    nor restarts change an image.

    Args:
        crop: by chance; None fits the image as the tokenizer's preprocessing does.
        flip: mirror half of the images.
    """

    crop: Annotated[RandomCrop | RandomScaleCrop | RandomResizedCrop, Field(discriminator="name")] | None = None
    flip: bool = False


def _somewhere(pixels: Pixels, size: int, draws: random.Random) -> Pixels:
    top = draws.randrange(pixels.shape[0] - size + 1)
    left = draws.randrange(pixels.shape[1] - size + 1)
    return cut(pixels, left, top, size)

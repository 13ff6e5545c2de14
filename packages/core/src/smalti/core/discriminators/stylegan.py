"""The residual discriminator of StyleGAN2 (Karras et al. 2020), without equalised rates and minibatch statistics.

Legend: B batch, C image channels, H W pixels.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor, nn

from smalti.core.discriminators.blur import Blur
from smalti.core.errors import UserError
from smalti.core.options import DiscriminatorOptions

SLOPE = 0.2
LAST = 4  # pixels that the residual blocks end with


class StyleGANOptions(DiscriminatorOptions):
    """Options of `StyleGAN`.

    Args:
        image_size: side of the images in pixels, a power of 2.
        block: `blurred-skip`, blur before the strided convolutions of both ways, with 4 taps (StyleGAN2,
            visual-tokenizer-pytorch); `strided-skip`, only of the main way, with 3 taps and after two convolutions
            (LlamaGen, XQ-GAN).
        width_multiplier: channels at 64 pixels and more are 16384 times this over the resolution, 512 at most
            (StyleGAN2 has 2, LlamaGen 1).
    """

    name: Literal["stylegan"] = "stylegan"
    image_size: Annotated[int, Field(ge=8)] = 256
    block: Literal["blurred-skip", "strided-skip"] = "blurred-skip"
    width_multiplier: Annotated[int, Field(ge=1)] = 2

    @model_validator(mode="after")
    def _power_of_two(self) -> Self:
        if self.image_size & (self.image_size - 1):
            raise ValueError(f"image_size must be a power of 2, got {self.image_size}")
        return self

    def build(self, channels: int) -> StyleGAN:
        """Build it for images of `channels` channels."""
        return StyleGAN(self, channels)


class StyleGAN(nn.Module):
    """Images `(B, C, H, W)` in [-1, 1] to one logit each, `(B, 1)`: residual blocks that halve down to 4 pixels."""

    def __init__(self, options: StyleGANOptions, channels: int) -> None:
        super().__init__()
        self.options = options
        halvings = int(math.log2(options.image_size // LAST))
        sizes = [options.image_size >> halving for halving in range(halvings + 1)]
        widths = [_width(size, options.width_multiplier) for size in sizes]
        block = BlurredSkip if options.block == "blurred-skip" else StridedSkip
        self.first = nn.Sequential(nn.Conv2d(channels, widths[0], 3, padding=1), nn.LeakyReLU(SLOPE))
        self.blocks = nn.Sequential(*(block(width, wider) for width, wider in pairwise(widths)))
        last = widths[-1]
        self.last = nn.Sequential(nn.Conv2d(last, last, 3, padding=1), nn.LeakyReLU(SLOPE))
        self.head = nn.Sequential(nn.Linear(last * LAST**2, 512), nn.LeakyReLU(SLOPE), nn.Linear(512, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Judge the images."""
        size = self.options.image_size
        if images.shape[2:] != (size, size):
            raise UserError(
                f"this stylegan discriminator is for images of {size}x{size}, got {images.shape[2]}x{images.shape[3]}"
            )
        logits: Tensor = self.head(self.last(self.blocks(self.first(images))).flatten(1))
        return logits


class BlurredSkip(nn.Module):
    """Half the resolution on two ways, both blurred before their stride; their sum over sqrt 2."""

    def __init__(self, width: int, wider: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.LeakyReLU(SLOPE),
            Blur(4, padding=2),
            nn.Conv2d(width, wider, 3, stride=2),
            nn.LeakyReLU(SLOPE),
        )
        self.skip = nn.Sequential(Blur(4, padding=1), nn.Conv2d(width, wider, 1, stride=2, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """`(B, width, H, W)` to `(B, wider, H/2, W/2)`."""
        y: Tensor = (self.main(x) + self.skip(x)) / math.sqrt(2)
        return y


class StridedSkip(nn.Module):
    """Half the resolution on two ways, the main one blurred before its stride; their sum over sqrt 2."""

    def __init__(self, width: int, wider: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(width, wider, 3, padding=1),
            nn.LeakyReLU(SLOPE),
            nn.Conv2d(wider, wider, 3, padding=1),
            nn.LeakyReLU(SLOPE),
            Blur(3, padding=1, mode="reflect"),
            nn.Conv2d(wider, wider, 3, stride=2, padding=1),
        )
        self.skip = nn.Conv2d(width, wider, 1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, width, H, W)` to `(B, wider, H/2, W/2)`."""
        y: Tensor = (self.main(x) + self.skip(x)) / math.sqrt(2)
        return y


def _width(size: int, multiplier: int) -> int:
    return 512 if size <= 32 else min(512, 16384 * multiplier // size)

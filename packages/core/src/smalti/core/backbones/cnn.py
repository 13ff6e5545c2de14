"""A plain residual CNN between images and a latent grid.

Legend: B batch, C image channels, H W pixels, f downsampling factor. Latents are channel-last, `(B, H/f, W/f, width)`.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor, nn

from smalti.core.backbones.residual_block import ResidualBlock
from smalti.core.contracts import Decoder, Encoder, check_images, check_latent, grid_of
from smalti.core.options import DecoderOptions, EncoderOptions, Options

Widths = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)]


class _Levels(Options):
    """What encoder and decoder have in common.

    Args:
        widths: channels of each level, from fine to coarse; every level halves the resolution of the one before.
        blocks: residual blocks of a level.
        groups: of the group normalisation.
    """

    widths: Widths = (32, 64)
    blocks: Annotated[int, Field(ge=0)] = 2
    groups: Annotated[int, Field(ge=1)] = 8

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        for width in self.widths:
            if width % self.groups:
                raise ValueError(f"width {width} cannot be divided into {self.groups} normalisation groups")
        return self


class CNNEncoderOptions(_Levels, EncoderOptions):
    """Options of `CNNEncoder`: `widths` and `blocks` of its levels, `groups` of its normalisation."""

    name: Literal["cnn"] = "cnn"

    def build(self, channels: int) -> CNNEncoder:
        """Build it for images of `channels` channels."""
        return CNNEncoder(self, channels)


class CNNDecoderOptions(_Levels, DecoderOptions):
    """Options of `CNNDecoder`: as `CNNEncoderOptions`, levels in the same order."""

    name: Literal["cnn"] = "cnn"

    def build(self, channels: int) -> CNNDecoder:
        """Build it for images of `channels` channels."""
        return CNNDecoder(self, channels)


def _block(width: int, groups: int) -> ResidualBlock:
    """A residual block that starts as the identity."""
    block = ResidualBlock(width, width, groups=groups, eps=1e-5)
    nn.init.zeros_(block.conv2.weight)
    assert block.conv2.bias is not None
    nn.init.zeros_(block.conv2.bias)
    return block


class CNNEncoder(Encoder):
    """Convolutions 4 x 4 of stride 2, each followed by residual blocks; f = 2 ** levels."""

    def __init__(self, options: CNNEncoderOptions, channels: int) -> None:
        super().__init__()
        self.options: CNNEncoderOptions = options
        self.channels = channels
        self.width = options.widths[-1]
        self.factor = 2 ** len(options.widths)
        layers: list[nn.Module] = []
        for before, width in pairwise((channels, *options.widths)):
            layers.append(nn.Conv2d(before, width, 4, stride=2, padding=1))
            layers += [_block(width, options.groups) for _ in range(options.blocks)]
        self.layers = nn.Sequential(*layers, nn.GroupNorm(options.groups, self.width), nn.SiLU())

    def forward(self, images: Tensor) -> Tensor:
        """Images `(B, C, H, W)` to `(B, H/f, W/f, width)`."""
        check_images(images, self.channels)
        self.latent_space((images.shape[2], images.shape[3]))
        latent: Tensor = self.layers(images)
        return latent.permute(0, 2, 3, 1)

    def latent_space(self, image_size: tuple[int, int]) -> tuple[int, ...]:
        """`(H/f, W/f)`."""
        return grid_of(image_size, self.factor)


class CNNDecoder(Decoder):
    """Residual blocks, each level followed by a pixel shuffle (Shi et al. 2016) that doubles the resolution."""

    def __init__(self, options: CNNDecoderOptions, channels: int) -> None:
        super().__init__()
        self.options: CNNDecoderOptions = options
        self.width = options.widths[-1]
        layers: list[nn.Module] = [nn.Conv2d(self.width, self.width, 3, padding=1)]
        for width, after in pairwise((*reversed(options.widths), None)):
            assert width is not None
            layers += [_block(width, options.groups) for _ in range(options.blocks)]
            if after is not None:
                layers += [nn.Conv2d(width, 4 * after, 1), nn.PixelShuffle(2)]
        first = options.widths[0]
        self.layers = nn.Sequential(
            *layers,
            nn.GroupNorm(options.groups, first),
            nn.SiLU(),
            nn.Conv2d(first, 4 * channels, 3, padding=1),
            nn.PixelShuffle(2),
        )

    def forward(self, latent: Tensor) -> Tensor:
        """Latent `(B, h, w, width)` to images `(B, C, f h, f w)`."""
        check_latent(latent, "cnn", self.width)
        images: Tensor = self.layers(latent.permute(0, 3, 1, 2))
        return images

"""Encoder and decoder of ViT-VQGAN: a vision transformer between images and a latent grid (Yu et al. 2022).

Legend: B batch, h w grid of patches, D width.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from smalti.core.backbones.patches import ImageRange, PatchEmbedding, PatchPixels
from smalti.core.backbones.token_sequence import (
    ClassToken,
    Count,
    Grid,
    TokenSequence,
    TransformerOptions,
    initialise_linear,
)
from smalti.core.contracts import Decoder, Encoder
from smalti.core.errors import UserError
from smalti.core.options import DecoderOptions, EncoderOptions


class _GridOptions(TransformerOptions):
    """What encoder and decoder have in common.

    Args:
        grid: rows and columns of patches.
        patch: side of a patch in pixels.
        image_range: what the network itself takes or gives: `symmetric`, [-1, 1], or `unit`, [0, 1]. The contract's
            images are in [-1, 1] either way.
    """

    grid: Grid = (32, 32)
    patch: Count = 8
    image_range: ImageRange = "symmetric"
    class_token: ClassToken = "none"
    norm_pre: bool = False


class ViTVQGANEncoderOptions(_GridOptions, EncoderOptions):
    """Options of `ViTVQGANEncoder`."""

    name: Literal["vit-vqgan"] = "vit-vqgan"

    def build(self, channels: int) -> ViTVQGANEncoder:
        """Build it for images of `channels` channels."""
        return ViTVQGANEncoder(self, channels)


class ViTVQGANDecoderOptions(_GridOptions, DecoderOptions):
    """Options of `ViTVQGANDecoder`."""

    name: Literal["vit-vqgan"] = "vit-vqgan"

    def build(self, channels: int) -> ViTVQGANDecoder:
        """Build it for images of `channels` channels."""
        return ViTVQGANDecoder(self, channels)


class ViTVQGANEncoder(Encoder):
    """Patches, a transformer, and a perceptron with one tanh at every place; images of one size only."""

    def __init__(self, options: ViTVQGANEncoderOptions, channels: int) -> None:
        super().__init__()
        self.options: ViTVQGANEncoderOptions = options
        self.width = options.width
        self.patches = PatchEmbedding(channels, options.width, options.patch, options.grid, options.image_range)
        self.sequence = TokenSequence(options, options.grid)
        self.mlp = _tanh_mlp(options.width)

    def forward(self, images: Tensor) -> Tensor:
        """Images `(B, C, H, W)` in [-1, 1] to `(B, h, w, D)`."""
        grid: Tensor = self.mlp(self.sequence(self.patches(images)).grid)
        return grid.reshape(len(images), *self.options.grid, self.width)

    def latent_space(self, image_size: tuple[int, int]) -> tuple[int, ...]:
        """`(h, w)`."""
        self.patches.check_size(image_size)
        return self.options.grid


class ViTVQGANDecoder(Decoder):
    """A transformer, the same perceptron, and the pixels of every patch."""

    def __init__(self, options: ViTVQGANDecoderOptions, channels: int) -> None:
        super().__init__()
        self.options: ViTVQGANDecoderOptions = options
        self.width = options.width
        self.sequence = TokenSequence(options, options.grid)
        self.mlp = _tanh_mlp(options.width)
        self.norm = nn.LayerNorm(options.width, eps=options.norm_eps)
        self.head = PatchPixels(channels, options.width, options.patch, options.image_range)

    def forward(self, latent: Tensor) -> Tensor:
        """Latent `(B, h, w, D)` to images `(B, C, H, W)`."""
        if tuple(latent.shape[1:]) != (*self.options.grid, self.width):
            height, width = self.options.grid
            raise UserError(
                f"the vit-vqgan decoder takes a latent (B, {height}, {width}, {self.width}), got {tuple(latent.shape)}"
            )
        grid = self.norm(self.mlp(self.sequence(latent.flatten(1, 2)).grid))
        images: Tensor = self.head(grid.reshape(latent.shape))
        return images


def _tanh_mlp(width: int) -> nn.Sequential:
    layers = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))
    layers.apply(initialise_linear)
    return layers

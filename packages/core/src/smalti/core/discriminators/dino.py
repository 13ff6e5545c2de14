"""Judging images by what a frozen DINO sees in them (Projected GANs, Sauer et al. 2021; StyleGAN-T, 2023; XQ-GAN).

Legend: B batch, C image channels, H W pixels, D width of DINO, N patches, R read-outs.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from smalti.core.errors import UserError
from smalti.core.options import DiscriminatorOptions
from smalti.core.training.frozen import Frozen
from smalti.core.training.frozen_vit import load_frozen_vit
from smalti.core.training.network_images import Normalisation

SLOPE = 0.2


class DINODiscriminatorOptions(DiscriminatorOptions):
    """Options of `DINODiscriminator`.

    Args:
        source: weights of DINO ViT-S/16: a timm name, a hub repository or a path.
        image_size: side of the images that DINO sees, in pixels.
        depths: numbers of blocks after which features are read; they are always read before the first, too.
        kernel: of the convolution along the patches in every head, odd.
        norm_group: samples that a head normalises together.
    """

    name: Literal["dino"] = "dino"
    source: str = "vit_small_patch16_224.dino"
    image_size: Annotated[int, Field(ge=16)] = 224
    depths: tuple[Annotated[int, Field(ge=1)], ...] = (3, 6, 9, 12)
    kernel: Annotated[int, Field(ge=1)] = 9
    norm_group: Annotated[int, Field(ge=1)] = 8

    @model_validator(mode="after")
    def _odd_kernel(self) -> Self:
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, got {self.kernel}")
        return self

    def build(self, channels: int) -> DINODiscriminator:
        """Build it; it takes images of 1 or 3 channels.

        Raises:
            UserError: the weights of DINO cannot be had, or it has fewer blocks or patches than the options ask for.
        """
        del channels
        return DINODiscriminator(self)


class DINODiscriminator(nn.Module):
    """Images `(B, C, H, W)` in [-1, 1] to logits `(B, R N)` of heads on the features of several depths.

    Larger images than DINO's are in training one time of two cut out at random instead of resized.
    """

    def __init__(self, options: DINODiscriminatorOptions) -> None:
        super().__init__()
        self.options = options
        network = load_frozen_vit(options.source, image_size=options.image_size, activation="gelu-tanh")
        self.depths = (0, *sorted(set(options.depths)))
        blocks, patches = len(network.blocks), network.grid**2
        if max(self.depths) > blocks:
            raise UserError(f"dino: depth {max(self.depths)} is beyond the {blocks} blocks of {options.source}")
        if options.kernel // 2 > patches:
            raise UserError(
                f"dino: a kernel of {options.kernel} is too long for {patches} patches; give a larger image_size"
            )
        self.network = Frozen(network)
        self.heads = nn.ModuleList(
            PatchHead(network.width, options.kernel, options.norm_group) for _ in range(len(self.depths))
        )
        self.prepared = Normalisation(None)

    def forward(self, images: Tensor) -> Tensor:
        """Judge the images."""
        features = self.features(self._fitted(images))
        return torch.cat([head(read) for head, read in zip(self.heads, features, strict=True)], dim=1)

    def features(self, images: Tensor) -> list[Tensor]:
        """Images `(B, C, size, size)` in [-1, 1] to R read-outs `(B, D, N)`, the class token added to all patches."""
        tokens = self.network(self.prepared(images), self.depths)
        return [(read[:, 1:] + read[:, :1]).transpose(1, 2) for read in tokens]

    def _fitted(self, images: Tensor) -> Tensor:
        size = self.options.image_size
        height, width = images.shape[2:]
        if (height, width) == (size, size):
            return images
        if min(height, width) < size:
            return F.interpolate(images, size=(size, size), mode="bicubic", align_corners=False)
        if self.training and torch.rand(()) < 0.5:
            top, left = (int(torch.randint(side - size + 1, ())) for side in (height, width))
            return images[:, :, top : top + size, left : left + size]
        return F.interpolate(images, size=(size, size), mode="area")


class PatchHead(nn.Module):
    """Features `(B, D, N)` to logits `(B, N)`: spectrally normalised convolutions along the patches."""

    def __init__(self, width: int, kernel: int, group: int) -> None:
        super().__init__()
        self.first = _layer(width, 1, group)
        self.second = _layer(width, kernel, group)
        self.last = spectral_norm(nn.Conv1d(width, 1, 1), eps=1e-12)

    def forward(self, features: Tensor) -> Tensor:
        """Judge every patch."""
        x = self.first(features)
        x = (self.second(x) + x) / math.sqrt(2)
        logits: Tensor = self.last(x)
        return logits.flatten(1)


class LocalBatchNorm(nn.Module):
    """Batch normalisation by the statistics of small groups of a batch, in training and after (StyleGAN-T).

    Args:
        width: D.
        group: samples in a group, where the batch can be cut so; else fewer.
    """

    def __init__(self, width: int, group: int) -> None:
        super().__init__()
        self.group = group
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """`(B, D, N)` to the same."""
        batch = len(x)
        count = next(count for count in range(math.ceil(batch / self.group), batch + 1) if batch % count == 0)
        grouped = x.unflatten(0, (count, -1))
        variance, mean = torch.var_mean(grouped, dim=(1, 3), keepdim=True, correction=0)
        normed = ((grouped - mean) / torch.sqrt(variance + 1e-6)).flatten(0, 1)
        scaled: Tensor = normed * self.weight[:, None] + self.bias[:, None]
        return scaled


def _layer(width: int, kernel: int, group: int) -> nn.Sequential:
    convolution = nn.Conv1d(width, width, kernel, padding=kernel // 2, padding_mode="circular")
    return nn.Sequential(spectral_norm(convolution, eps=1e-12), LocalBatchNorm(width, group), nn.LeakyReLU(SLOPE))

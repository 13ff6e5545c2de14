"""The convolutional encoder and decoder of VQGAN (Esser et al. 2021) and of the systems that descend from it.

One family: VQGAN itself, LlamaGen, FQGAN's trunk, VAR, IBQ, Open-MAGVIT2 and MaskGIT's VQGAN differ only in the
options below. Legend: B batch, C image channels, H W pixels, h w latent grid, f downsampling factor.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from smalti.core.backbones.adaptive_norm import AdaptiveGroupNorm
from smalti.core.backbones.patches import ImageRange, from_image_range, to_image_range
from smalti.core.backbones.resampling import Downsample, Downsampling, Upsample, Upsampling
from smalti.core.backbones.residual_block import ResidualBlock, Shortcut
from smalti.core.backbones.spatial_attention import SpatialAttention
from smalti.core.contracts import Decoder, Encoder, check_images, check_latent, grid_of
from smalti.core.options import DecoderOptions, EncoderOptions, Options

Count = Annotated[int, Field(ge=1)]


class LevelsOptions(Options):
    """What encoder and decoder have in common; levels count from the finest, 0.

    Args:
        width: channels at multiplier 1.
        multipliers: of `width`, one per level; between levels the resolution changes by 2.
        blocks: residual blocks of a level.
        groups: of all group normalisations.
        attention_levels: levels with attention after every residual block; -1 is the coarsest.
        attention_eps: of the normalisation in attention.
        middle_blocks: residual blocks at the coarsest resolution, beside the level's own.
        middle_attention: attention between those.
        bias: whether the convolutions of residual blocks, and the encoder's first one, have a bias.
        shortcut: see `ResidualBlock`.
        dropout: within residual blocks.
        image_range: what the network itself takes and gives: `symmetric`, [-1, 1], or `unit`, [0, 1]. The
            contract's images are in [-1, 1] either way.
    """

    width: Count = 128
    multipliers: Annotated[tuple[Count, ...], Field(min_length=1)] = (1, 1, 2, 2, 4)
    blocks: Count = 2
    groups: Count = 32
    attention_levels: tuple[int, ...] = (-1,)
    attention_eps: Annotated[float, Field(gt=0)] = 1e-6
    middle_blocks: Annotated[int, Field(ge=0)] = 2
    middle_attention: bool = True
    bias: bool = True
    shortcut: Shortcut = "input"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    image_range: ImageRange = "symmetric"

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for width in self.widths:
            if width % self.groups:
                raise ValueError(f"width {width} cannot be divided into {self.groups} normalisation groups")
        levels = len(self.multipliers)
        for level in self.attention_levels:
            if not -levels <= level < levels:
                raise ValueError(f"attention_levels has {level}, but there are {levels} levels, 0 to {levels - 1}")
        return self

    def counted(self) -> Self:
        """The same with levels of attention counted from the finest, as published files tell them."""
        levels = sorted({level % len(self.multipliers) for level in self.attention_levels})
        return self.model_copy(update={"attention_levels": tuple(levels)})

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of the levels, from fine to coarse."""
        return tuple(self.width * multiplier for multiplier in self.multipliers)

    @property
    def factor(self) -> int:
        """How many pixels one latent position spans along each side."""
        return int(2 ** (len(self.multipliers) - 1))


class TrunkOptions(LevelsOptions):
    """Options of `VQGANTrunk`.

    Args:
        downsampling: see `Downsample`.
    """

    downsampling: Downsampling = "asymmetric"


class VQGANEncoderOptions(TrunkOptions, EncoderOptions):
    """Options of `VQGANEncoder`.

    Args:
        latent_width: channels of the latent.
        last_kernel: side of the convolution to the latent.
    """

    name: Literal["vqgan"] = "vqgan"
    latent_width: Count = 256
    last_kernel: Literal[1, 3] = 3

    def build(self, channels: int) -> VQGANEncoder:
        """Build it for images of `channels` channels."""
        return VQGANEncoder(self, channels)


class VQGANDecoderOptions(LevelsOptions, DecoderOptions):
    """Options of `VQGANDecoder`.

    Args:
        latent_width: channels of the latent.
        upsampling: see `Upsample`.
        adaptive: before each level, a normalisation by the latent's statistics, see `AdaptiveGroupNorm`.
    """

    name: Literal["vqgan"] = "vqgan"
    blocks: Count = 3
    latent_width: Count = 256
    upsampling: Upsampling = "nearest"
    adaptive: bool = False

    def build(self, channels: int) -> VQGANDecoder:
        """Build it for images of `channels` channels."""
        return VQGANDecoder(self, channels)


class VQGANTrunk(nn.Module):
    """A first convolution, levels from fine to coarse, and the middle: images to features.

    Attributes:
        width: channels of the features.
    """

    def __init__(self, options: TrunkOptions, channels: int) -> None:
        super().__init__()
        self.options = options
        self.channels = channels
        first, self.width = options.width, options.widths[-1]
        self.conv_in = nn.Conv2d(channels, first, 3, padding=1, bias=options.bias)
        last = len(options.widths) - 1
        self.levels = nn.ModuleList(
            _Level(options, inputs, level, nn.Identity() if level == last else Downsample(width, options.downsampling))
            for level, (inputs, width) in enumerate(pairwise((first, *options.widths)))
        )
        self.middle = _middle(options)

    def forward(self, images: Tensor) -> Tensor:
        """Images `(B, C, H, W)` in [-1, 1] to features `(B, width, H/f, W/f)`."""
        check_images(images, self.channels)
        self.latent_space((images.shape[2], images.shape[3]))
        x: Tensor = self.conv_in(_laid_out(to_image_range(images, self.options.image_range)))
        for level in self.levels:
            x = level(x)
        features: Tensor = self.middle(x)
        return features

    def latent_space(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """`(H/f, W/f)`; a `UserError` where f does not divide them."""
        return grid_of(image_size, self.options.factor)


class VQGANEncoder(Encoder):
    """The trunk and a head to the latent."""

    def __init__(self, options: VQGANEncoderOptions, channels: int) -> None:
        super().__init__()
        self.options: VQGANEncoderOptions = options.counted()
        self.width = options.latent_width
        self.trunk = VQGANTrunk(options, channels)
        self.head = ConvolutionHead(self.trunk.width, self.width, options.last_kernel, options.groups)

    def forward(self, images: Tensor) -> Tensor:
        """Images `(B, C, H, W)` to `(B, H/f, W/f, width)`."""
        latent: Tensor = self.head(self.trunk(images))
        return latent.permute(0, 2, 3, 1)

    def latent_space(self, image_size: tuple[int, int]) -> tuple[int, ...]:
        """`(H/f, W/f)`."""
        return self.trunk.latent_space(image_size)


class VQGANDecoder(Decoder):
    """A first convolution, the middle, levels from coarse to fine, and a head to the image.

    `head.conv.weight` is the last layer by which a discriminator's weight is balanced.
    """

    def __init__(self, options: VQGANDecoderOptions, channels: int) -> None:
        super().__init__()
        self.options: VQGANDecoderOptions = options.counted()
        self.width = options.latent_width
        widths = options.widths[::-1]
        coarse, fine = widths[0], widths[-1]
        self.conv_in = nn.Conv2d(self.width, coarse, 3, padding=1)
        self.middle = _middle(options)
        inputs = (coarse, *widths)
        self.levels = nn.ModuleList(
            _Level(options, before, level, Upsample(width, options.upsampling) if level else nn.Identity())
            for level, (before, width) in zip(reversed(range(len(widths))), pairwise(inputs), strict=True)
        )
        self.adaptive = nn.ModuleList(
            AdaptiveGroupNorm(width, self.width, groups=options.groups)
            for width in (inputs[:-1] if options.adaptive else ())
        )
        self.head = ConvolutionHead(fine, channels, 3, options.groups)

    def forward(self, latent: Tensor) -> Tensor:
        """Latent `(B, h, w, width)` to images `(B, C, f h, f w)`."""
        check_latent(latent, "vqgan", self.width)
        latent = _laid_out(latent.permute(0, 3, 1, 2))
        x: Tensor = self.middle(self.conv_in(latent))
        for place, level in enumerate(self.levels):
            x = level(self.adaptive[place](x, latent) if self.options.adaptive else x)
        images: Tensor = self.head(x)
        return from_image_range(images, self.options.image_range)


def _laid_out(x: Tensor) -> Tensor:
    """The same `(B, C, h, w)`; on a CPU with channels last in memory, which makes these networks a fifth faster."""
    return x.contiguous(memory_format=torch.channels_last) if x.device.type == "cpu" else x


class ConvolutionHead(nn.Module):
    """Group normalisation, SiLU and a convolution: what ends an encoder, a branch of it, or a decoder."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, groups: int = 32) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, inputs, 1e-6)
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, inputs, h, w)` to `(B, outputs, h, w)`."""
        result: Tensor = self.conv(F.silu(self.norm(x)))
        return result


class _Level(nn.Module):
    """Residual blocks, each followed by attention where the level has it, then a change of resolution."""

    def __init__(self, options: LevelsOptions, inputs: int, level: int, resampling: nn.Module) -> None:
        super().__init__()
        width, levels = options.widths[level], len(options.widths)
        attends = level in {index % levels for index in options.attention_levels}
        self.blocks = nn.ModuleList(
            _block(options, inputs if index == 0 else width, width) for index in range(options.blocks)
        )
        self.attentions = nn.ModuleList(
            _attention(options, width) if attends else nn.Identity() for _ in range(options.blocks)
        )
        self.resampling = resampling

    def forward(self, x: Tensor) -> Tensor:
        """`(B, inputs, h, w)` to `(B, width, h', w')`."""
        for block, attention in zip(self.blocks, self.attentions, strict=True):
            x = attention(block(x))
        result: Tensor = self.resampling(x)
        return result


def _block(options: LevelsOptions, inputs: int, outputs: int) -> ResidualBlock:
    return ResidualBlock(
        inputs,
        outputs,
        groups=options.groups,
        bias=options.bias,
        shortcut=options.shortcut,
        dropout=options.dropout,
    )


def _attention(options: LevelsOptions, width: int) -> SpatialAttention:
    return SpatialAttention(width, groups=options.groups, eps=options.attention_eps)


def _middle(options: LevelsOptions) -> nn.Sequential:
    width = options.widths[-1]
    layers: list[nn.Module] = []
    for index in range(options.middle_blocks):
        if index and options.middle_attention:
            layers.append(_attention(options, width))
        layers.append(_block(options, width, width))
    return nn.Sequential(*layers)

"""VQGAN's encoder with several branches behind one trunk, each with an adapter of its own (FQGAN, Bai et al. 2024).

Legend: B batch, C image channels, H W pixels, f downsampling factor, h w latent grid, N = h w.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from smalti.core.backbones.positioned_transformer import PositionedTransformer
from smalti.core.backbones.vqgan import ConvolutionHead, Count, TrunkOptions, VQGANTrunk
from smalti.core.contracts import Encoder
from smalti.core.errors import UserError
from smalti.core.options import EncoderOptions


class BranchedVQGANEncoderOptions(TrunkOptions, EncoderOptions):
    """Options of `BranchedVQGANEncoder`: those of VQGAN's trunk, and of the branches.

    Args:
        branches: their names, in the order of their channels in the latent.
        image_size: side of the square images whose grid the adapters have positions for.
        adapter_depth: transformer blocks of an adapter.
        adapter_heads: of its attention.
        latent_width: channels behind the adapter.
        code_width: channels of each branch in the latent.
    """

    name: Literal["branched-vqgan"] = "branched-vqgan"
    branches: Annotated[tuple[Annotated[str, Field(pattern=r"^\w+$")], ...], Field(min_length=1)] = ("vis", "sem")
    image_size: Count = 256
    adapter_depth: Count = 6
    adapter_heads: Count = 8
    latent_width: Count = 256
    code_width: Count = 8

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if len(set(self.branches)) < len(self.branches):
            raise ValueError(f"every branch needs a name of its own, got {', '.join(self.branches)}")
        if self.image_size % self.factor:
            raise ValueError(f"image_size {self.image_size} must be a multiple of {self.factor}")
        if self.widths[-1] % self.adapter_heads:
            raise ValueError(f"width {self.widths[-1]} cannot be divided among {self.adapter_heads} adapter_heads")
        return self

    @property
    def places(self) -> int:
        """N of the adapters."""
        return (self.image_size // self.factor) ** 2

    def build(self, channels: int) -> BranchedVQGANEncoder:
        """Build it for images of `channels` channels."""
        return BranchedVQGANEncoder(self, channels)


class BranchedVQGANEncoder(Encoder):
    """One trunk; per branch an adapter, a head and a projection to the codes.

    The adapters' positions are bound to the number of places, so images of another area are refused.

    Attributes:
        branches: by name.
    """

    def __init__(self, options: BranchedVQGANEncoderOptions, channels: int) -> None:
        super().__init__()
        self.options: BranchedVQGANEncoderOptions = options.counted()
        self.width = len(options.branches) * options.code_width
        self.trunk = VQGANTrunk(options, channels)
        self.branches = nn.ModuleDict({name: Branch(options, self.trunk.width) for name in options.branches})

    def forward(self, images: Tensor) -> Tensor:
        """Images `(B, C, H, W)` to `(B, h, w, branches * code_width)`, the branches in their order."""
        features = self._features(images)
        return torch.cat([branch(features) for branch in self.branches.values()], dim=-1)

    def read(self, images: Tensor) -> dict[str, Tensor]:
        """Images `(B, C, H, W)` to every branch's `(B, h, w, latent_width)`, before the projection to the codes."""
        features = self._features(images)
        return {name: cast("Branch", branch).read(features) for name, branch in self.branches.items()}

    def _features(self, images: Tensor) -> Tensor:
        if images.ndim == 4:
            self.latent_space((images.shape[2], images.shape[3]))
        features: Tensor = self.trunk(images)
        return features

    def latent_space(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """`(H/f, W/f)`, of as many places as the adapters have positions."""
        space, places = self.trunk.latent_space(image_size), self.options.places
        if math.prod(space) != places:
            side = self.options.image_size
            raise UserError(
                f"an image of {image_size[0]}x{image_size[1]} cannot be encoded: it has {math.prod(space)} places, the "
                f"adapters have learned positions for {places}, those of {side}x{side}"
            )
        return space


class Branch(nn.Module):
    """An adapter over all places, without a way around it, a head and a linear projection."""

    def __init__(self, options: BranchedVQGANEncoderOptions, width: int) -> None:
        super().__init__()
        self.adapter = PositionedTransformer(
            options.places, width, depth=options.adapter_depth, heads=options.adapter_heads
        )
        self.head = ConvolutionHead(width, options.latent_width, groups=options.groups)
        self.to_code = nn.Linear(options.latent_width, options.code_width)

    def read(self, features: Tensor) -> Tensor:
        """`(B, width, h, w)` to `(B, h, w, latent_width)`."""
        adapted = self.adapter(features.flatten(2).transpose(1, 2))
        latent: Tensor = self.head(adapted.transpose(1, 2).reshape(features.shape))
        return latent.permute(0, 2, 3, 1)

    def forward(self, features: Tensor) -> Tensor:
        """`(B, width, h, w)` to `(B, h, w, code_width)`."""
        codes: Tensor = self.to_code(self.read(features))
        return codes

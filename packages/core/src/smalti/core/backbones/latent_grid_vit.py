"""Vision transformers between images and grids of latent tokens that attend together with the patches (XQ-GAN).

Legend: B batch, C image channels, H W pixels, P branches, h w latent grid, D width of the transformer.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from smalti.core.backbones.patches import from_patches
from smalti.core.backbones.positions import resampled
from smalti.core.backbones.pretrained import fill, load_vit, part
from smalti.core.backbones.token_sequence import Count, initialise_linear, learned
from smalti.core.backbones.vit_block import ViTBlock
from smalti.core.contracts import Decoder, Encoder, check_images, check_latent, grid_of
from smalti.core.errors import UserError
from smalti.core.options import DecoderOptions, EncoderOptions, Options


class _LatentGridOptions(Options):
    """What encoder and decoder have in common.

    Args:
        width: D.
        depth: number of transformer blocks.
        heads: of the attention.
        patch: side of a patch in pixels.
        image_size: side of the square images that the learned positions are made for.
        grid: side of their latent grid.
        positions: of the latent tokens: `shared`, those of the patches, resampled to the latent grid, and one
            more learned vector that tells the latent from the patches; `learned`, a table of their own.
        layer_scale: start value of LayerScale.
        drop_path: stochastic depth of the last block; it grows linearly from 0 at the first.
        pretrained: where the transformer starts, a timm name (`vit_base_patch14_dinov2.lvd142m`), a hub repository or
            a path. What is built says null here: a saved tokenizer does not need the source again.
    """

    width: Count = 768
    depth: Count = 12
    heads: Count = 12
    patch: Count = 16
    image_size: Count = 256
    grid: Count = 16
    positions: Literal["shared", "learned"] = "shared"
    layer_scale: Annotated[float, Field(gt=0)] = 1e-5
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    pretrained: str | None = None

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} cannot be divided among {self.heads} heads")
        if self.image_size % self.patch:
            raise ValueError(f"image_size {self.image_size} cannot be divided into patches of {self.patch}")
        return self

    @property
    def image_step(self) -> int:
        """Sides of images are multiples of this: whole patches, and whole places of the latent grid."""
        return math.lcm(self.patch, self.image_size // math.gcd(self.image_size, self.grid))


class LatentGridEncoderOptions(_LatentGridOptions, EncoderOptions):
    """Options of `LatentGridEncoder`.

    Args:
        branches: P, latent grids that are read side by side.
        code_width: the width that one projection, shared by all branches, brings every latent token to; without it
            latents keep the width D.
    """

    name: Literal["latent-grid-vit"] = "latent-grid-vit"
    branches: Count = 1
    code_width: Count | None = None

    def build(self, channels: int) -> LatentGridEncoder:
        """Build it for images of `channels` channels."""
        return LatentGridEncoder(self, channels)


class LatentGridDecoderOptions(_LatentGridOptions, DecoderOptions):
    """Options of `LatentGridDecoder`, those that it shares with the encoder."""

    name: Literal["latent-grid-vit"] = "latent-grid-vit"

    def build(self, channels: int) -> LatentGridDecoder:
        """Build it for images of `channels` channels."""
        return LatentGridDecoder(self, channels)


class PrefixedTransformer(nn.Module):
    """Class token, learned positions of class token and patches, pre-norm blocks and a last norm, as in DINOv2.

    Attributes:
        class_token: `(1, 1, D)`.
        positions: `(1, 1 + places, D)`, those of the class token first.
    """

    def __init__(self, options: _LatentGridOptions) -> None:
        super().__init__()
        places = (options.image_size // options.patch) ** 2
        self.class_token = learned(1, 1, options.width)
        self.positions = learned(1, 1 + places, options.width)
        self.blocks = nn.ModuleList(
            ViTBlock(
                options.width,
                options.heads,
                eps=1e-6,
                layer_scale=options.layer_scale,
                drop_path=options.drop_path * block / max(options.depth - 1, 1),
            )
            for block in range(options.depth)
        )
        self.norm = nn.LayerNorm(options.width, eps=1e-6)
        self.blocks.apply(initialise_linear)

    def start(self, options: _LatentGridOptions) -> dict[str, Tensor]:
        """Take the weights of the pretrained source, in which a lacking LayerScale is 1; return all of them."""
        assert options.pretrained is not None
        side = options.image_size // options.patch
        loaded = load_vit(
            options.pretrained,
            width=options.width,
            depth=options.depth,
            patch_size=options.patch,
            grid=(side, side),
        )
        own = {name: tensor for name, tensor in loaded.items() if not name.startswith("patch.")}
        scales = {name for name in self.state_dict() if name.endswith((".scale1", ".scale2"))}
        unscaled = {name: torch.ones(options.width) for name in scales - own.keys()}
        fill(self, {**unscaled, **own}, options.pretrained, "latent-grid-vit")
        return loaded

    def prefixed(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """The class token before tokens `(B, h w, D)` of a grid, all with their positions: `(B, 1 + h w, D)`."""
        tokens = torch.cat([self.class_token.expand(len(tokens), -1, -1), tokens], dim=1)
        return tokens + resampled(self.positions, grid, prefix=1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Blocks and norm over `(B, N, D)`."""
        for block in self.blocks:
            tokens = block(tokens)
        normed: Tensor = self.norm(tokens)
        return normed


class LatentGridEncoder(Encoder):
    """A vision transformer that reads an image into P grids of learned latent tokens (ImageFolder, XQ-GAN).

    Patches and latent tokens attend to each other; the latent tokens after the last norm are the result, the
    branches next to each other on channels. Images of other sizes than the trained one have resampled positions and
    latent tokens, in grids that grow with the image.

    Attributes:
        latent_tokens: `(1, P grid^2, D)`, branch after branch.
    """

    def __init__(self, options: LatentGridEncoderOptions, channels: int) -> None:
        super().__init__()
        self.options: LatentGridEncoderOptions = options.model_copy(update={"pretrained": None})
        self.channels = channels
        self.width = options.branches * (options.code_width or options.width)
        self.patches = nn.Conv2d(channels, options.width, options.patch, stride=options.patch)
        count = options.branches * options.grid**2
        self.latent_tokens = nn.Parameter(1e-6 * torch.randn(1, count, options.width))
        if options.positions == "shared":
            self.levels = learned(options.branches + 1, options.width)
        else:
            self.latent_positions = learned(1, count, options.width)
        self.transformer = PrefixedTransformer(options)
        self.to_code = nn.Linear(options.width, options.code_width) if options.code_width else nn.Identity()
        if options.pretrained is not None:
            loaded = self.transformer.start(options)
            fill(self.patches, part(loaded, "patch"), options.pretrained, "latent-grid-vit")

    def forward(self, images: Tensor) -> Tensor:
        """Images `(B, C, H, W)` to `(B, h, w, P * code_width)`."""
        codes: Tensor = self.to_code(self.read(images))
        return codes.permute(0, 2, 3, 1, 4).flatten(3)

    def read(self, images: Tensor) -> Tensor:
        """Images `(B, C, H, W)` to the latent tokens of every branch before their projection, `(B, P, h, w, D)`."""
        check_images(images, self.channels)
        height, width = self.latent_space((images.shape[2], images.shape[3]))
        patches = self.patches(images)
        latents = self._latents((height, width)).expand(len(images), -1, -1)
        read = self.transformer.prefixed(patches.flatten(2).transpose(1, 2), (patches.shape[2], patches.shape[3]))
        if self.options.positions == "shared":
            read = read + self.levels[0]
        read = self.transformer(torch.cat([read, latents], dim=1))[:, -latents.shape[1] :]
        branches: Tensor = read.unflatten(1, (self.options.branches, height, width))
        return branches

    def _latents(self, grid: tuple[int, int]) -> Tensor:
        """The latent tokens `(1, P h w, D)` of a grid, with all that tells them apart."""
        parts = []
        for branch, tokens in enumerate(self.latent_tokens.chunk(self.options.branches, dim=1)):
            part = resampled(tokens, grid)
            if self.options.positions == "shared":
                part = part + resampled(self.transformer.positions, grid, prefix=1)[:, 1:] + self.levels[branch + 1]
            else:
                part = part + resampled(self.latent_positions.chunk(self.options.branches, dim=1)[branch], grid)
            parts.append(part)
        return torch.cat(parts, dim=1)

    def latent_space(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """The latent grid, which is to `grid` as the image is to `image_size`."""
        grid_of(image_size, self.options.image_step)
        height, width = (size * self.options.grid // self.options.image_size for size in image_size)
        return height, width


class LatentGridDecoder(Decoder):
    """A vision transformer that fills the patches of an image, all of them masked, from a latent grid (XQ-GAN).

    With shared positions the latent has a second class token in front, as in the published models.

    Attributes:
        mask_token: `(1, 1, D)`.
    """

    def __init__(self, options: LatentGridDecoderOptions, channels: int) -> None:
        super().__init__()
        self.options: LatentGridDecoderOptions = options.model_copy(update={"pretrained": None})
        self.width = options.width
        self.mask_token = learned(1, 1, options.width)
        if options.positions == "shared":
            self.levels = learned(2, options.width)
        else:
            self.latent_positions = learned(1, options.grid**2, options.width)
        self.transformer = PrefixedTransformer(options)
        self.to_pixels = nn.Linear(options.width, options.patch**2 * channels)
        if options.pretrained is not None:
            self.transformer.start(options)

    def forward(self, latent: Tensor) -> Tensor:
        """Latent `(B, h, w, D)` to images `(B, C, H, W)`."""
        check_latent(latent, "latent-grid-vit", self.width)
        grid = (latent.shape[1], latent.shape[2])
        rows, columns = self._patch_grid(grid)
        patches = self.mask_token.expand(len(latent), rows * columns, -1)
        prefixed, latent = self.transformer.prefixed(patches, (rows, columns)), latent.flatten(1, 2)
        if self.options.positions == "shared":
            prefixed = prefixed + self.levels[0]
            latent = self.transformer.prefixed(latent, grid) + self.levels[1]
        else:
            latent = latent + resampled(self.latent_positions, grid)
        filled = self.transformer(torch.cat([prefixed, latent], dim=1))[:, 1 : 1 + rows * columns]
        return from_patches(self.to_pixels(filled).unflatten(1, (rows, columns)), self.options.patch)

    def _patch_grid(self, grid: tuple[int, int]) -> tuple[int, int]:
        options = self.options
        step = options.image_step * options.grid // options.image_size
        if any(side % step or side < 1 for side in grid):
            raise UserError(
                f"a latent of {grid[0]}x{grid[1]} cannot be decoded: both sides must be multiples of {step}"
            )
        rows, columns = (side * options.image_size // (options.grid * options.patch) for side in grid)
        return rows, columns

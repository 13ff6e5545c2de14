"""A transformer over the sequence of an image: class token, grid, latent tokens, extra context.

This one sequence is what 1-D tokenizers share (TiTok, Yu et al. 2024, and those after it): an encoder reads the
patches in its grid and answers in its latent tokens, a decoder reads latent tokens and answers in its grid. Without
latent tokens it is a plain vision transformer.

Legend: B batch, h w grid, N latent tokens, M tokens of extra context, D width.
"""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from smalti.core.backbones.vit_block import Activation, ViTBlock
from smalti.core.errors import UserError
from smalti.core.options import Options

ClassToken = Literal["placed", "unplaced", "none"]
Count = Annotated[int, Field(ge=1)]
Grid = tuple[Count, Count]


class TransformerOptions(Options):
    """Options of the transformer.

    Args:
        width: D.
        layers: blocks.
        heads: of the attention; they divide the width.
        mlp_width: of the hidden layer of a block, 4 D by default.
        class_token: in front of the grid: `placed`, with a position of its own; `unplaced`, without; `none`.
        norm_pre: whether the sequence is normalised before the first block.
        norm_eps: of the layer normalisations.
        qkv_bias: whether the projection to query, key and value has a bias.
        activation: of the hidden layer of a block.
    """

    width: Count
    layers: Count
    heads: Count
    mlp_width: Count | None = None
    class_token: ClassToken = "placed"
    norm_pre: bool = True
    norm_eps: Annotated[float, Field(gt=0)] = 1e-5
    qkv_bias: bool = True
    activation: Activation = "gelu"

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} cannot be divided among {self.heads} heads")
        return self


class SequenceParts(NamedTuple):
    """A sequence taken apart, without its class token: `(B, h w, D)`, `(B, N, D)`, `(B, M, D)`; N and M may be 0."""

    grid: Tensor
    latents: Tensor
    extra: Tensor


class SequenceEmbedding(nn.Module):
    """Joins `[class, grid, latents, extra]` to one sequence, each part with learned positions.

    Args:
        width: D.
        grid: h and w.
        class_token: see `TransformerOptions`.
        latents: N, how many positions there are for latent tokens; 0 where they carry none.
        extra: M, how many there are for extra context.
    """

    def __init__(
        self, width: int, grid: tuple[int, int], *, class_token: ClassToken = "placed", latents: int = 0, extra: int = 0
    ) -> None:
        super().__init__()
        self.area = grid[0] * grid[1]
        self.class_token = learned(1, width) if class_token != "none" else None
        self.class_placed = class_token == "placed"
        self.grid_positions = learned(self.area + self.class_placed, width)
        self.latent_positions = learned(latents, width) if latents else None
        self.extra_positions = learned(extra, width) if extra else None

    def forward(self, grid: Tensor, latents: Tensor | None = None, extra: Tensor | None = None) -> Tensor:
        """Join them.

        Args:
            grid: `(B, h w, D)`.
            latents: `(B, n, D)`; where they have positions, n may be less than N, they take the first ones.
            extra: `(B, M, D)`.

        Returns:
            `(B, 1 + h w + n + M, D)`, without the 1 where there is no class token.

        Raises:
            UserError: more latent tokens than there are positions.
        """
        parts = [grid + self.grid_positions[self.class_placed :]]
        if self.class_token is not None:
            token = self.class_token + self.grid_positions[:1] if self.class_placed else self.class_token
            parts.insert(0, token.expand(len(grid), 1, -1))
        if latents is not None:
            if self.latent_positions is not None:
                if latents.shape[1] > len(self.latent_positions):
                    raise UserError(
                        f"{latents.shape[1]} latent tokens do not fit: there are {len(self.latent_positions)} positions"
                    )
                latents = latents + self.latent_positions[: latents.shape[1]]
            parts.append(latents)
        if extra is not None:
            parts.append(extra if self.extra_positions is None else extra + self.extra_positions)
        return torch.cat(parts, dim=1)

    def split(self, sequence: Tensor, latents: int) -> SequenceParts:
        """Take apart a sequence `(B, length, D)` with that many latent tokens."""
        start = int(self.class_token is not None)
        extra = sequence.shape[1] - start - self.area - latents
        return SequenceParts(*sequence[:, start:].split([self.area, latents, extra], dim=1))


class TokenSequence(nn.Module):
    """The transformer: the joined sequence, normalisation, blocks, normalisation.

    Args:
        options: of the transformer.
        grid: h and w.
        latents: as for `SequenceEmbedding`.
        extra: as for `SequenceEmbedding`.
    """

    def __init__(self, options: TransformerOptions, grid: tuple[int, int], *, latents: int = 0, extra: int = 0) -> None:
        super().__init__()
        width, eps = options.width, options.norm_eps
        self.embedding = SequenceEmbedding(width, grid, class_token=options.class_token, latents=latents, extra=extra)
        self.norm_pre = nn.LayerNorm(width, eps=eps) if options.norm_pre else nn.Identity()
        self.blocks = nn.Sequential(
            *(
                ViTBlock(
                    width,
                    options.heads,
                    mlp_width=options.mlp_width,
                    eps=eps,
                    qkv_bias=options.qkv_bias,
                    activation=options.activation,
                )
                for _ in range(options.layers)
            )
        )
        self.norm_post = nn.LayerNorm(width, eps=eps)
        self.apply(initialise_linear)

    def forward(self, grid: Tensor, latents: Tensor | None = None, extra: Tensor | None = None) -> SequenceParts:
        """`(B, h w, D)`, `(B, n, D)`, `(B, M, D)` to the same three parts."""
        sequence = self.norm_post(self.blocks(self.norm_pre(self.embedding(grid, latents, extra))))
        return self.embedding.split(sequence, 0 if latents is None else latents.shape[1])


def learned(*shape: int) -> nn.Parameter:
    """A learned vector or table, drawn with the standard deviation 0.02 that is usual for transformers."""
    return nn.Parameter(torch.randn(shape) * 0.02)


def initialise_linear(module: nn.Module) -> None:
    """Give a linear layer the usual initial weights of vision transformers; leave other modules as they are."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)

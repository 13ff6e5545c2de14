"""A convolutional decoder of latent tokens without a place in the image (after TiTok, Yu et al. 2024).

Legend: B batch, C image channels, h w grid, N latent tokens, D width of the tokens, F channels of the coarsest level.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from smalti.core.backbones.token_sequence import Count, Grid, SequenceEmbedding, learned
from smalti.core.backbones.vqgan import VQGANDecoder, VQGANDecoderOptions
from smalti.core.contracts import Decoder, check_latent
from smalti.core.options import DecoderOptions


class TokenCNNDecoderOptions(DecoderOptions):
    """Options of `TokenCNNDecoder`.

    Args:
        width: D.
        tokens: N, the latent tokens of an image.
        grid: h and w, where the upsampling begins.
        channels: of the convolutions at multiplier 1.
        multipliers: of `channels`, one per level from the finest on; between levels the resolution doubles.
        blocks: residual blocks of a level.
        attention_levels: levels with attention after every residual block; -1 is the coarsest.
    """

    name: Literal["token-cnn"] = "token-cnn"
    width: Count = 768
    tokens: Count = 64
    grid: Grid = (16, 16)
    channels: Count = 128
    multipliers: Annotated[tuple[Count, ...], Field(min_length=1)] = (1, 1, 2, 2, 4)
    blocks: Count = 3
    attention_levels: tuple[int, ...] = (-1,)

    @model_validator(mode="after")
    def _fits_the_cnn(self) -> Self:
        self.cnn()
        return self

    def cnn(self) -> VQGANDecoderOptions:
        """Options of the convolutions."""
        return VQGANDecoderOptions(
            width=self.channels,
            multipliers=self.multipliers,
            blocks=self.blocks,
            attention_levels=self.attention_levels,
            latent_width=self.width,
        )

    def build(self, channels: int) -> TokenCNNDecoder:
        """Build it for images of `channels` channels."""
        return TokenCNNDecoder(self, channels)


class TokenCNNDecoder(Decoder):
    """VQGAN's decoder, whose first layers run over the sequence `[class, mask tokens, latent tokens]`.

    The sequence is taken as an image one pixel wide; its residual blocks and attention carry what the latent tokens
    know to the mask tokens, which then are the grid that the levels upsample. Images have one size, that of the grid
    times 2 for every level but one.
    """

    def __init__(self, options: TokenCNNDecoderOptions, channels: int) -> None:
        super().__init__()
        self.options: TokenCNNDecoderOptions = options
        self.width = options.width
        self.mask = learned(1, options.width)
        self.embedding = SequenceEmbedding(options.width, options.grid, latents=options.tokens)
        self.cnn = VQGANDecoder(options.cnn(), channels)

    def forward(self, latent: Tensor) -> Tensor:
        """Latent `(B, n, D)`, n of N tokens, to images `(B, C, H, W)`.

        Raises:
            UserError: a latent of another shape, or of more than N tokens.
        """
        check_latent(latent, "token-cnn", self.width, "N")
        height, width = self.options.grid
        sequence = self.embedding(self.mask.expand(len(latent), height * width, -1), latent)
        column = sequence.transpose(1, 2).unsqueeze(-1)  # (B, D, 1 + h w + n, 1)
        mixed = self.cnn.middle(self.cnn.conv_in(column)).squeeze(-1).transpose(1, 2)
        x = self.embedding.split(mixed, latent.shape[1]).grid.transpose(1, 2).unflatten(2, (height, width))
        for level in self.cnn.levels:
            x = level(x)
        images: Tensor = self.cnn.head(x)
        return images

"""A tokenizer whose tokens are 2-D Gaussians: a code for what each carries, and its geometry in bits.

Legend: B images, N Gaussians of an image, G numbers of a Gaussian's geometry, S streams of tokens, Z channels of a
Gaussian's feature, h w feature map.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from smalti.core.contracts import Drawing, Tokenizer, TokenizerOutput, check_images, check_tokens
from smalti.core.errors import UserError
from smalti.core.layout import TokenLayout
from smalti.core.options import DecoderOptions, EncoderOptions, QuantizerOptions, Slot, TokenizerOptions
from smalti.gaussian.gaussians import Gaussians
from smalti.gaussian.gaussiantoken.embed import Embedded, GaussianEmbedOptions
from smalti.gaussian.gaussiantoken.geometry import dequantized, quantized


class GaussianTokenizerOptions(TokenizerOptions):
    """Options of `GaussianTokenizer`.

    Args:
        encoder: images to a feature map.
        embed: feature map to Gaussians.
        quantizer: of the features that these carry; of the decoder's width.
        decoder: of a map that Gaussians are drawn on, to images.
        geometry_bits: of each of x, y, two scales, angle and perhaps opacity, as tokens.
        gradient: of drawing, see `rasterize_gaussians_2d`; published weights were trained with `published`, which is
            wrong.
    """

    name: Literal["gaussiantoken"] = "gaussiantoken"
    encoder: Annotated[EncoderOptions, Slot("encoder")]
    embed: GaussianEmbedOptions = GaussianEmbedOptions()
    quantizer: Annotated[QuantizerOptions, Slot("quantizer")]
    decoder: Annotated[DecoderOptions, Slot("decoder")]
    geometry_bits: Annotated[int, Field(ge=1, le=16)] = 8
    gradient: Literal["exact", "published"] = "exact"

    def build(self) -> GaussianTokenizer:
        """Build it."""
        return GaussianTokenizer(self)


class GaussianTokenizer(Tokenizer):
    """GaussianToken (Dong et al. 2025, arXiv 2501.15619), with tokens that are whole.

    An encoder's feature map becomes N Gaussians, whose features are quantized; they are drawn on an empty map of the
    same size, by summation, and that is decoded.

    A token has the streams of its code, then x, y, two scales, angle and perhaps opacity, each a cell of its range.
    The original keeps these as floating-point numbers beside the code, and so does `forward`: its images are
    those of the numbers themselves, `decode` gives those of the middles of their cells.

    Token n is always that of the n-th learned Gaussian; images have the size of the preprocessing.
    """

    options: GaussianTokenizerOptions

    def __init__(self, options: GaussianTokenizerOptions) -> None:
        super().__init__()
        channels = options.preprocessing.channels
        self.encoder = options.encoder.build(channels)
        self.quantizer = options.quantizer.build()
        self.decoder = options.decoder.build(channels)
        # What was built tells its options: a part that started from pretrained weights is saved without that start.
        parts = {"encoder": self.encoder.options, "quantizer": self.quantizer.options, "decoder": self.decoder.options}
        self.options = options.model_copy(update=parts)
        if self.decoder.width != self.quantizer.dim:
            raise UserError(
                f"the decoder takes a map of width {self.decoder.width}, but the quantizer's codes have the width "
                f"{self.quantizer.dim}: make them equal"
            )
        self.embed = options.embed.build(self.encoder.width, self.quantizer.dim)
        size = self.preprocessing.image_size
        space = self.encoder.latent_space((size, size))
        if len(space) != 2:
            raise UserError(f"Gaussians are made of a feature map, but the encoder's latent has the space {space}")
        self.map_size = (space[0], space[1])
        count = options.embed.gaussians
        geometry = [2**options.geometry_bits] * options.embed.numbers
        self._layout = TokenLayout.sequence(count, (*self.quantizer.layout((count,)).vocab, *geometry))

    @property
    def drawings(self) -> Mapping[str, Drawing]:
        """`gaussians`: the ellipses on the decoded image."""
        return {"gaussians": self._ellipses}

    @property
    def codebooks(self) -> int:
        """The streams of the code; those of the geometry come after them."""
        return len(self.quantizer.vocab)

    def layout(self, image_size: tuple[int, int] | None = None) -> TokenLayout:
        """The layout of an image, which must have the preprocessing's size."""
        size = self.preprocessing.image_size
        if image_size not in (None, (size, size)):
            given = "x".join(map(str, image_size or ()))
            raise UserError(f"these Gaussians are those of images of {size}x{size}, not of {given}")
        return self._layout

    def forward(self, images: Tensor) -> TokenizerOutput:
        """Encode, quantize the features, draw and decode, with the geometry as it is.

        `features` has `latent`, the quantized features `(B, N, Z)`, and `map`, the Gaussians on it, `(B, h, w, Z)`.
        """
        embedded = self.embedded(images)
        latent = self.quantizer(embedded.gaussians.features)
        drawn = self.drawn(embedded.gaussians.carrying(latent.latent))
        tokens = self._tokens(latent.tokens, embedded)
        features = {"latent": latent.latent, "map": drawn}
        return TokenizerOutput(self.decoder(drawn), tokens, latent.losses, features)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images `(B, C, H, W)` to tokens `(B, N, S)`."""
        embedded = self.embedded(images)
        return self._tokens(self.quantizer(embedded.gaussians.features).tokens, embedded)

    @torch.no_grad()
    def decode(self, tokens: Tensor, layout: TokenLayout | None = None) -> Tensor:
        """Tokens `(B, N, S)` to images `(B, C, H, W)`."""
        if layout is not None and layout != self._layout:
            raise UserError(f"the tokens of this tokenizer are {self._layout}, not {layout}")
        images: Tensor = self.decoder(self.drawn(self.gaussians(tokens)))
        return images.clamp(-1.0, 1.0)

    def embedded(self, images: Tensor) -> Embedded:
        """The Gaussians of images `(B, C, H, W)` before their features are quantized, and their geometry."""
        check_images(images, self.preprocessing.channels)
        self.layout((images.shape[2], images.shape[3]))
        found: Embedded = self.embed(self.encoder(images))
        return found

    def gaussians(self, tokens: Tensor) -> Gaussians:
        """The Gaussians that tokens `(B, N, S)` stand for, on the feature map, with codes as features.

        Scales are in places of the feature map, of which `map_size` tells height and width:
        `.enlarged(image_size / map_size[0])` has them in pixels.

        Raises:
            UserError: tokens of another shape or type, or out of range.
        """
        check_tokens(tokens, self._layout.vocab)
        if tokens.shape[1] != self._layout.positions:
            raise UserError(f"there are {self._layout.positions} Gaussians in an image, got {tokens.shape[1]} tokens")
        codes = self.codebooks
        features = self.quantizer.decode(tokens[..., :codes], (tokens.shape[1],))
        return self.embed.gaussians(dequantized(tokens[..., codes:], self.options.geometry_bits), features)

    def drawn(self, gaussians: Gaussians) -> Tensor:
        """Gaussians on the map `(B, h, w, Z)` that the decoder takes."""
        features = gaussians.features.to(gaussians.means.dtype)
        drawn = gaussians.carrying(features).rasterize(*self.map_size, gradient=self.options.gradient)
        return drawn.permute(0, 2, 3, 1)

    def _ellipses(self, tokens: Tensor, layout: TokenLayout, size: tuple[int, int]) -> Tensor:
        from smalti.gaussian.drawing import draw_on_images  # Pillow is an extra

        return draw_on_images(self.gaussians(tokens), self.decode(tokens, layout), self.map_size, size)

    def _tokens(self, codes: Tensor, embedded: Embedded) -> Tensor:
        return torch.cat([codes, quantized(embedded.geometry, self.options.geometry_bits)], dim=-1)

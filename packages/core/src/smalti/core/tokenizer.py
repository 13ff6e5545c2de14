"""The tokenizer that is composed of an encoder, a quantizer and a decoder."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from smalti.core.contracts import Tokenizer, TokenizerOutput, check_images
from smalti.core.layout import TokenLayout
from smalti.core.options import DecoderOptions, EncoderOptions, QuantizerOptions, Slot, TokenizerOptions


class ComposedOptions(TokenizerOptions):
    """Options of `ComposedTokenizer`.

    Args:
        encoder: images to a latent.
        quantizer: a latent of its own width to tokens and back.
        decoder: a latent to images.
    """

    name: Literal["composed"] = "composed"
    encoder: Annotated[EncoderOptions, Slot("encoder")]
    quantizer: Annotated[QuantizerOptions, Slot("quantizer")]
    decoder: Annotated[DecoderOptions, Slot("decoder")]

    def build(self) -> ComposedTokenizer:
        """Build it."""
        return ComposedTokenizer(self)


class ComposedTokenizer(Tokenizer):
    """Encoder, linear projection to the quantizer's width, quantizer, linear projection, decoder.

    The projections are those of VQGAN (Esser et al. 2021): 1 x 1 convolutions with bias.
    """

    def __init__(self, options: ComposedOptions) -> None:
        super().__init__()
        channels = options.preprocessing.channels
        self.options: ComposedOptions = options
        self.encoder = options.encoder.build(channels)
        self.quantizer = options.quantizer.build()
        self.decoder = options.decoder.build(channels)
        self.to_codes = nn.Linear(self.encoder.width, self.quantizer.dim)
        self.from_codes = nn.Linear(self.quantizer.dim, self.decoder.width)
        self.layout()  # an image size that the encoder cannot take shall be known before any work

    def layout(self, image_size: tuple[int, int] | None = None) -> TokenLayout:
        """The layout of an image of `(H, W)`."""
        size = self.preprocessing.image_size
        return self.quantizer.layout(self.encoder.latent_space(image_size or (size, size)))

    def forward(self, images: Tensor) -> TokenizerOutput:
        """Encode, quantize and decode."""
        check_images(images, self.preprocessing.channels)
        quantized = self.quantizer(self.to_codes(self.encoder(images)))
        reconstructions = self.decoder(self.from_codes(quantized.latent))
        return TokenizerOutput(reconstructions, quantized.tokens, quantized.losses)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images `(B, C, H, W)` to tokens `(B, L, S)`."""
        check_images(images, self.preprocessing.channels)
        tokens: Tensor = self.quantizer(self.to_codes(self.encoder(images))).tokens
        return tokens

    @torch.no_grad()
    def decode(self, tokens: Tensor, layout: TokenLayout | None = None) -> Tensor:
        """Tokens `(B, L, S)` to images `(B, C, H, W)`."""
        layout = layout or self.layout()
        images: Tensor = self.decoder(self.from_codes(self.quantizer.decode(tokens, layout.shape[-1])))
        return images.clamp(-1.0, 1.0)

"""Tokenizer and autoencoder whose decoder also reads a text (TA-TiTok, Kim et al. 2025).

The text comes as features of its tokens. The published models take those of the text tower of OpenAI's CLIP
ViT-L/14-336 after its last normalisation, 77 for every text, without a padding mask; the tower has the activation
`x sigmoid(1.702 x)`.

Legend: B batch, N latent tokens, M text tokens, T width of a text feature, D latent width.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from smalti.core.autoencoder import (
    Autoencoder,
    AutoencoderOutput,
    DiagonalGaussian,
    check_latents,
    divergence_losses,
)
from smalti.core.backbones.titok import TiTokDecoder, TiTokDecoderOptions
from smalti.core.contracts import Tokenizer, TokenizerOutput, check_images
from smalti.core.errors import UserError
from smalti.core.layout import TokenLayout
from smalti.core.options import (
    AutoencoderOptions,
    EncoderOptions,
    Options,
    QuantizerOptions,
    Slot,
    TokenizerOptions,
)


class TextOptions(Options):
    """How a text is given.

    Args:
        tokens: M.
        width: T.
    """

    tokens: Annotated[int, Field(ge=1)] = 77
    width: Annotated[int, Field(ge=1)] = 768


class TextAwareDecoder(nn.Module):
    """TiTok's decoder with projected text features as extra context.

    Args:
        options: of the decoder.
        text: how a text is given.
        width: D.
        channels: of the images.
    """

    def __init__(self, options: TiTokDecoderOptions, text: TextOptions, width: int, channels: int) -> None:
        super().__init__()
        self.text = text
        self.decoder = TiTokDecoder(options, channels, extra=text.tokens)
        self.from_latent = nn.Linear(width, options.width)
        self.from_text = nn.Linear(text.width, options.width)

    def forward(self, latent: Tensor, text: Tensor | None) -> Tensor:
        """Latent `(B, n, D)` and text `(B, M, T)` to images `(B, C, H, W)`, about [-1, 1].

        Raises:
            UserError: no text, or one of another shape.
        """
        expected = (len(latent), self.text.tokens, self.text.width)
        if text is None or tuple(text.shape) != expected:
            raise UserError(
                f"a text-aware decoder needs text features {expected}, got "
                f"{'none' if text is None else tuple(text.shape)}"
            )
        images: Tensor = self.decoder(self.from_latent(latent), self.from_text(text))
        return images


class TextAwareOptions(TokenizerOptions):
    """Options of `TextAwareTokenizer`.

    Args:
        encoder: images to a sequence.
        quantizer: a latent to tokens and back.
        decoder: latent and text to images.
        text: how a text is given.
    """

    name: Literal["text-aware"] = "text-aware"
    encoder: Annotated[EncoderOptions, Slot("encoder")]
    quantizer: Annotated[QuantizerOptions, Slot("quantizer")]
    decoder: TiTokDecoderOptions
    text: TextOptions = TextOptions()

    def build(self) -> TextAwareTokenizer:
        """Build it."""
        return TextAwareTokenizer(self)


class TextAwareTokenizer(Tokenizer):
    """Encoder, projection, quantizer, and a decoder of tokens and text."""

    def __init__(self, options: TextAwareOptions) -> None:
        super().__init__()
        channels = options.preprocessing.channels
        self.encoder = options.encoder.build(channels)
        self.quantizer = options.quantizer.build()
        # What was built tells its options: a part that started from pretrained weights is saved without that start.
        parts = {"encoder": self.encoder.options, "quantizer": self.quantizer.options}
        self.options: TextAwareOptions = options.model_copy(update=parts)
        self.to_codes = nn.Linear(self.encoder.width, self.quantizer.dim)
        self.decoder = TextAwareDecoder(options.decoder, options.text, self.quantizer.dim, channels)
        self.layout()  # an image size that the encoder cannot take shall be known before any work

    def layout(self, image_size: tuple[int, int] | None = None) -> TokenLayout:
        """The layout of an image of `(H, W)`."""
        size = self.preprocessing.image_size
        return self.quantizer.layout(self.encoder.latent_space(image_size or (size, size)))

    def forward(self, images: Tensor, text: Tensor | None = None) -> TokenizerOutput:
        """Encode, quantize and decode with text `(B, M, T)`."""
        check_images(images, self.preprocessing.channels)
        quantized = self.quantizer(self.to_codes(self.encoder(images)))
        reconstructions = self.decoder(quantized.latent, text)
        return TokenizerOutput(reconstructions, quantized.tokens, quantized.losses, {"latent": quantized.latent})

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images `(B, C, H, W)` to tokens `(B, N, S)`; no text is needed."""
        check_images(images, self.preprocessing.channels)
        tokens: Tensor = self.quantizer(self.to_codes(self.encoder(images))).tokens
        return tokens

    @torch.no_grad()
    def decode(self, tokens: Tensor, layout: TokenLayout | None = None, *, text: Tensor | None = None) -> Tensor:
        """Tokens `(B, N, S)` and text `(B, M, T)` to images `(B, C, H, W)`."""
        layout = layout or self.layout()
        images: Tensor = self.decoder(self.quantizer.decode(tokens, layout.shape[-1]), text)
        return images.clamp(-1.0, 1.0)


class TextAwareAutoencoderOptions(AutoencoderOptions):
    """Options of `TextAwareAutoencoder`.

    Args:
        encoder: images to a sequence.
        decoder: latent and text to images.
        width: D, of the latent.
        text: how a text is given.
        divergence_weight: of the divergence from the standard normal distribution, summed over an image's latent.
    """

    name: Literal["text-aware"] = "text-aware"
    encoder: Annotated[EncoderOptions, Slot("encoder")]
    decoder: TiTokDecoderOptions
    width: Annotated[int, Field(ge=1)]
    text: TextOptions = TextOptions()
    divergence_weight: Annotated[float, Field(ge=0)] = 1e-6

    def build(self) -> TextAwareAutoencoder:
        """Build it."""
        return TextAwareAutoencoder(self)


class TextAwareAutoencoder(Autoencoder):
    """Encoder, linear map to the moments, and a decoder of latent and text."""

    def __init__(self, options: TextAwareAutoencoderOptions) -> None:
        super().__init__()
        channels = options.preprocessing.channels
        self.width = options.width
        self.encoder = options.encoder.build(channels)
        # As in the tokenizer: what was built tells its options.
        self.options: TextAwareAutoencoderOptions = options.model_copy(update={"encoder": self.encoder.options})
        self.to_moments = nn.Linear(self.encoder.width, 2 * options.width)
        self.decoder = TextAwareDecoder(options.decoder, options.text, options.width, channels)
        self.latent_space()  # an image size that the encoder cannot take shall be known before any work

    def latent_space(self, image_size: tuple[int, int] | None = None) -> tuple[int, ...]:
        """The `space` of the latent of an image of `(H, W)`."""
        size = self.preprocessing.image_size
        return self.encoder.latent_space(image_size or (size, size))

    def posterior(self, images: Tensor) -> DiagonalGaussian:
        """Images `(B, C, H, W)` to the distribution of their latents; no text is needed."""
        check_images(images, self.preprocessing.channels)
        return DiagonalGaussian.from_moments(self.to_moments(self.encoder(images)))

    @torch.no_grad()
    def decode(self, latents: Tensor, *, text: Tensor | None = None) -> Tensor:
        """Latents `(B, N, D)` and text `(B, M, T)` to images `(B, C, H, W)`."""
        check_latents(latents, self.width)
        images: Tensor = self.decoder(latents, text)
        return images.clamp(-1.0, 1.0)

    def forward(self, images: Tensor, text: Tensor | None = None) -> AutoencoderOutput:
        """Encode, sample in training and take the mean else, decode with text `(B, M, T)`."""
        posterior = self.posterior(images)
        latents = posterior.sample() if self.training else posterior.mean
        losses = divergence_losses(posterior, self.options.divergence_weight) if self.training else {}
        return AutoencoderOutput(self.decoder(latents, text), posterior, losses)

"""The tokenizer that is composed of an encoder, a quantizer and a decoder."""

from __future__ import annotations

from typing import Annotated, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from smalti.core.contracts import Tokenizer, TokenizerOutput, check_images
from smalti.core.errors import UserError
from smalti.core.layout import TokenLayout
from smalti.core.options import DecoderOptions, EncoderOptions, QuantizerOptions, Slot, TokenizerOptions

Projection = Literal["linear", "convolution", "none"]


class ComposedOptions(TokenizerOptions):
    """Options of `ComposedTokenizer`.

    Args:
        encoder: images to a latent.
        quantizer: a latent of its own width to tokens and back.
        decoder: a latent to images.
        to_codes: between encoder and quantizer: `linear` at every position, VQGAN's 1 x 1 convolution (Esser et al.
            2021); `convolution`, 3 x 3, of grids only (VAR, Tian et al. 2024); `none`, where the widths are equal.
        from_codes: the same between quantizer and decoder.
    """

    name: Literal["composed"] = "composed"
    encoder: Annotated[EncoderOptions, Slot("encoder")]
    quantizer: Annotated[QuantizerOptions, Slot("quantizer")]
    decoder: Annotated[DecoderOptions, Slot("decoder")]
    to_codes: Projection = "linear"
    from_codes: Projection = "linear"

    def build(self) -> ComposedTokenizer:
        """Build it."""
        return ComposedTokenizer(self)


@runtime_checkable
class CodePredictor(Protocol):
    """A decoder that predicts the codes of another tokenizer on its way to pixels (TiTok's proxy codes)."""

    @property
    def proxy_codes(self) -> int | None:
        """K, how many there are; None where this one predicts none."""

    def code_logits(self, latent: Tensor) -> Tensor:
        """A latent `(B, *space, width)` to logits `(B, K, h, w)`."""


class ComposedTokenizer(Tokenizer):
    """Encoder, projection to the quantizer's width, quantizer, projection to the decoder's width, decoder.

    `forward` and `decode` hand what a decoder needs beside the latent through to it, by name: `text=...`.
    """

    def __init__(self, options: ComposedOptions) -> None:
        super().__init__()
        channels = options.preprocessing.channels
        self.encoder = options.encoder.build(channels)
        self.quantizer = options.quantizer.build()
        self.decoder = options.decoder.build(channels)
        # What was built tells its options: a part that started from pretrained weights is saved without that start.
        parts = {"encoder": self.encoder.options, "quantizer": self.quantizer.options, "decoder": self.decoder.options}
        self.options: ComposedOptions = options.model_copy(update=parts)
        self.to_codes = _projection(options.to_codes, "to_codes", self.encoder.width, self.quantizer.dim)
        self.from_codes = _projection(options.from_codes, "from_codes", self.quantizer.dim, self.decoder.width)
        layout = self.layout()  # an image size that the encoder cannot take shall be known before any work
        if layout.kind == "sequence" and "convolution" in (options.to_codes, options.from_codes):
            raise UserError("to_codes and from_codes: a sequence of latents has no grid to convolve, use linear")

    def layout(self, image_size: tuple[int, int] | None = None) -> TokenLayout:
        """The layout of an image of `(H, W)`."""
        size = self.preprocessing.image_size
        return self.quantizer.layout(self.encoder.latent_space(image_size or (size, size)))

    def forward(self, images: Tensor, *, proxy: bool = False, **context: Tensor) -> TokenizerOutput:
        """Encode, quantize and decode.

        Args:
            images: `(B, C, H, W)`.
            proxy: stop before the pixels: in the place of images come a `CodePredictor`'s logits `(B, K, h, w)`.
            context: what the decoder reads beside the latent.
        """
        check_images(images, self.preprocessing.channels)
        quantized = self.quantizer(self.to_codes(self.encoder(images)))
        latent = self.from_codes(quantized.latent)
        if proxy:
            assert isinstance(self.decoder, CodePredictor), "the decoder predicts no codes"
            decoded = self.decoder.code_logits(latent)
        else:
            decoded = self.decoder(latent, **context)
        return TokenizerOutput(decoded, quantized.tokens, quantized.losses, {"latent": quantized.latent})

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images `(B, C, H, W)` to tokens `(B, L, S)`."""
        check_images(images, self.preprocessing.channels)
        tokens: Tensor = self.quantizer(self.to_codes(self.encoder(images))).tokens
        return tokens

    @torch.no_grad()
    def decode(self, tokens: Tensor, layout: TokenLayout | None = None, **context: Tensor) -> Tensor:
        """Tokens `(B, L, S)` to images `(B, C, H, W)`."""
        layout = layout or self.layout()
        return self.decode_latent(self.quantizer.decode(tokens, layout.shape[-1]), **context)

    @torch.no_grad()
    def decode_latent(self, latent: Tensor, **context: Tensor) -> Tensor:
        """A latent `(B, *space, D)` of the quantizer's width, which need not be that of tokens, to images."""
        images: Tensor = self.decoder(self.from_codes(latent), **context)
        return images.clamp(-1.0, 1.0)


class ChannelLastConvolution(nn.Conv2d):
    """A 3 x 3 convolution of `(B, h, w, inputs)` to `(B, h, w, outputs)`."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1)

    def forward(self, latent: Tensor) -> Tensor:
        """Convolve."""
        return super().forward(latent.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def _projection(kind: Projection, option: str, inputs: int, outputs: int) -> nn.Module:
    if kind == "linear":
        return nn.Linear(inputs, outputs)
    if kind == "convolution":
        return ChannelLastConvolution(inputs, outputs)
    if inputs != outputs:
        raise UserError(
            f"{option} is none, but widths {inputs} and {outputs} meet there: make them equal or use linear"
        )
    return nn.Identity()

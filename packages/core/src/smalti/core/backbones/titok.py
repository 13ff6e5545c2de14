"""Encoder and decoder of 1-D tokenizers: an image as a short sequence of latent tokens (TiTok, Yu et al. 2024).

With other options they are the networks of TA-TiTok's encoder (Kim et al. 2025) and of the TiTok in
visual-tokenizer-pytorch, and the encoder of the 1-D tokenizer after pretrained vision transformers.

Legend: B batch, h w grid of patches, N latent tokens, D width, K codes of a proxy codebook.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from smalti.core.backbones.patches import ImageRange, PatchEmbedding, PatchPixels
from smalti.core.backbones.token_sequence import (
    Count,
    Grid,
    SequenceParts,
    TokenSequence,
    TransformerOptions,
    initialise_linear,
    learned,
)
from smalti.core.contracts import Decoder, Encoder, check_latent
from smalti.core.errors import UserError
from smalti.core.options import DecoderOptions, EncoderOptions, Options, Slot


def reread(tokens: Tensor) -> Tensor:
    """TiTok's first models read the numbers of N tokens in another order; their weights were trained with it.

    The memory of `(B, N, D)` is taken as `(B, D, N)` without moving a number, so that what is then called token i
    holds the elements i, i + N, i + 2 N, ... of the N x D numbers of an image.

    Returns:
        `(B, N, D)`.
    """
    batch, count, width = tokens.shape
    return tokens.reshape(batch, width, count).transpose(1, 2)


class _LatentTokens(TransformerOptions):
    """What encoder and decoder have in common.

    Args:
        grid: rows and columns of patches.
        tokens: N, the latent tokens of an image.
    """

    grid: Grid = (16, 16)
    tokens: Count = 32


class TiTokEncoderOptions(_LatentTokens, EncoderOptions):
    """Options of `TiTokEncoder`, beside those of the transformer.

    Args:
        patch: side of a patch in pixels.
        image_range: what the network itself takes: `symmetric`, [-1, 1], or `unit`, [0, 1]. The contract's images are
            in [-1, 1] either way.
        latent_positions: whether the latent tokens have positions beside their own learned vectors.
        reread: whether tokens leave in the mixed order of TiTok's first models, see `reread`.
    """

    name: Literal["titok"] = "titok"
    patch: Count = 16
    image_range: ImageRange = "symmetric"
    latent_positions: bool = True
    reread: bool = False

    def build(self, channels: int) -> TiTokEncoder:
        """Build it for images of `channels` channels."""
        return TiTokEncoder(self, channels)


class PixelHeadOptions(Options):
    """Options of the head that gives pixels at once: `PatchPixels`.

    Args:
        patch: side of a patch in pixels.
        image_range: what the network itself gives, as for the encoder.
    """

    name: Literal["pixels"] = "pixels"
    patch: Count = 16
    image_range: ImageRange = "symmetric"


class LogitsHeadOptions(Options):
    """Options of the head that gives proxy codes and no image: `LogitsHead`.

    Args:
        codes: K, of the codebook of the tokenizer that is distilled.
    """

    name: Literal["logits"] = "logits"
    codes: Annotated[int, Field(ge=2)] = 1024


class ProxyHeadOptions(Options):
    """Options of the head that gives the image of proxy codes: `ProxyHead`.

    Args:
        codes: K, of the codebook of the tokenizer that was distilled.
        decoder: of that tokenizer, from codes to images.
        mixture: `soft`, codes weighted by their probabilities; `likeliest`, the one of the largest logit.
    """

    name: Literal["proxy"] = "proxy"
    codes: Annotated[int, Field(ge=2)] = 1024
    decoder: Annotated[DecoderOptions, Slot("decoder")]
    mixture: Literal["soft", "likeliest"] = "soft"


HeadOptions = Annotated[PixelHeadOptions | LogitsHeadOptions | ProxyHeadOptions, Field(discriminator="name")]


class TiTokDecoderOptions(_LatentTokens, DecoderOptions):
    """Options of `TiTokDecoder`, beside those of the transformer.

    Args:
        head: from the grid to images.
    """

    name: Literal["titok"] = "titok"
    head: HeadOptions = PixelHeadOptions()

    def build(self, channels: int) -> TiTokDecoder:
        """Build it for images of `channels` channels."""
        return TiTokDecoder(self, channels)


class TiTokEncoder(Encoder):
    """Learned latent tokens read the patches through a transformer and leave as the latent; images of one size only."""

    def __init__(self, options: TiTokEncoderOptions, channels: int) -> None:
        super().__init__()
        self.options: TiTokEncoderOptions = options
        self.width = options.width
        self.patches = PatchEmbedding(channels, options.width, options.patch, options.grid, options.image_range)
        self.latents = learned(options.tokens, options.width)
        positions = options.tokens if options.latent_positions else 0
        self.sequence = TokenSequence(options, options.grid, latents=positions)

    def forward(self, images: Tensor) -> Tensor:
        """Images `(B, C, H, W)` in [-1, 1] to `(B, N, D)`."""
        latents = self.latents.expand(len(images), -1, -1)
        tokens = self.sequence(self.patches(images), latents).latents
        return reread(tokens) if self.options.reread else tokens

    def latent_space(self, image_size: tuple[int, int]) -> tuple[int, ...]:
        """`(N,)`."""
        self.patches.check_size(image_size)
        return (self.options.tokens,)


class TiTokDecoder(Decoder):
    """Mask tokens read the latent tokens through a transformer and become a grid, of which a head makes the image.

    Args:
        options: of the decoder.
        channels: C.
        extra: M, how many tokens of extra context every image has.
    """

    def __init__(self, options: TiTokDecoderOptions, channels: int, extra: int = 0) -> None:
        super().__init__()
        self.options: TiTokDecoderOptions = options
        self.width = options.width
        self.mask = learned(1, options.width)
        self.sequence = TokenSequence(options, options.grid, latents=options.tokens, extra=extra)
        self.head = _head(options.head, options.width, channels)

    def forward(self, latent: Tensor, extra: Tensor | None = None) -> Tensor:
        """Latent `(B, n, D)`, n of N tokens, and extra context `(B, M, D)` to images `(B, C, H, W)`."""
        images: Tensor = self.head(self.grid(latent, extra))
        return images

    @property
    def proxy_codes(self) -> int | None:
        """K, of the proxy codes that it predicts; None with a head of pixels."""
        head = self.options.head
        return None if isinstance(head, PixelHeadOptions) else head.codes

    def code_logits(self, latent: Tensor) -> Tensor:
        """Latent `(B, n, D)` to logits over the proxy codes, `(B, K, h, w)`: decoding without its last part, pixels."""
        assert isinstance(self.head, LogitsHead | ProxyHead), "there are no proxy codes"
        logits: Tensor = self.head.logits(self.grid(latent))
        return logits.movedim(-1, 1)

    def grid(self, latent: Tensor, extra: Tensor | None = None) -> Tensor:
        """The same as far as the grid `(B, h, w, D)` that the head takes.

        Raises:
            UserError: a latent of another shape, or of more than N tokens.
        """
        check_latent(latent, "titok", self.width, "N")
        height, width = self.options.grid
        masks = self.mask.expand(len(latent), height * width, -1)
        parts: SequenceParts = self.sequence(masks, latent, extra)
        return parts.grid.reshape(len(latent), height, width, self.width)


class LogitsHead(nn.Module):
    """Logits over the codes of another tokenizer: a TiTok of the first stage, as published (TiTok section 3.3).

    `logits` takes `(B, h, w, D)` to `(B, h, w, K)`. Pixels are the business of `ProxyHead`, whose logits are the same.
    """

    def __init__(self, options: LogitsHeadOptions, width: int) -> None:
        super().__init__()
        self.logits = _logits(width, options.codes)

    def forward(self, grid: Tensor) -> Tensor:
        """Raise a `UserError`: there is no image."""
        del grid
        raise UserError(
            "this decoder ends in logits over proxy codes: for pixels it needs the head proxy, with the decoder of "
            "the tokenizer that was distilled"
        )


class ProxyHead(nn.Module):
    """Logits over the codes of another tokenizer, whose decoder makes the image (TiTok section 3.3).

    Args:
        options: of the head.
        width: D.
        channels: C.
    """

    def __init__(self, options: ProxyHeadOptions, width: int, channels: int) -> None:
        super().__init__()
        self.options = options
        self.logits = _logits(width, options.codes)
        self.decoder = options.decoder.build(channels)
        self.codebook = learned(options.codes, self.decoder.width)

    def forward(self, grid: Tensor) -> Tensor:
        """`(B, h, w, D)` to images `(B, C, H, W)`."""
        images: Tensor = self.decoder(self.mixed(self.logits(grid)))
        return images

    def mixed(self, logits: Tensor) -> Tensor:
        """Logits `(B, h, w, K)` to what the decoder takes, `(B, h, w, width)`."""
        if self.options.mixture == "likeliest":
            return self.codebook[logits.argmax(-1)]
        mixed: Tensor = torch.softmax(logits, dim=-1) @ self.codebook
        return mixed


def _head(options: PixelHeadOptions | LogitsHeadOptions | ProxyHeadOptions, width: int, channels: int) -> nn.Module:
    match options:
        case PixelHeadOptions():
            return PatchPixels(channels, width, options.patch, options.image_range)
        case LogitsHeadOptions():
            return LogitsHead(options, width)
        case ProxyHeadOptions():
            return ProxyHead(options, width, channels)


def _logits(width: int, codes: int) -> nn.Sequential:
    layers = nn.Sequential(nn.Linear(width, 2 * width), nn.Tanh(), nn.Linear(2 * width, codes))
    layers.apply(initialise_linear)
    return layers

"""TiTok's decoder that also reads a text (TA-TiTok, Kim et al. 2025).

The text comes as features of its tokens. The published models take those of the text tower of OpenAI's CLIP
ViT-L/14-336 after its last normalisation, 77 for every text, without a padding mask; the tower has the activation
`x sigmoid(1.702 x)`.

Legend: B batch, N latent tokens, M text tokens, T width of a text feature, D width.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from smalti.core.backbones.titok import TiTokDecoder, TiTokDecoderOptions
from smalti.core.backbones.token_sequence import Count
from smalti.core.errors import UserError


class TextTiTokDecoderOptions(TiTokDecoderOptions):
    """Options of `TextTiTokDecoder`, beside those of `TiTokDecoder`.

    Args:
        text_tokens: M.
        text_width: T.
    """

    name: Literal["text-titok"] = "text-titok"  # type: ignore[assignment]
    text_tokens: Count = 77
    text_width: Count = 768

    def build(self, channels: int) -> TextTiTokDecoder:
        """Build it for images of `channels` channels."""
        return TextTiTokDecoder(self, channels)


class TextTiTokDecoder(TiTokDecoder):
    """TiTok's decoder with projected text features as extra context.

    A tokenizer or autoencoder hands them through: `decode(tokens, text=...)`, `forward(images, text=...)`.
    """

    def __init__(self, options: TextTiTokDecoderOptions, channels: int) -> None:
        super().__init__(options, channels, extra=options.text_tokens)
        self._text = (options.text_tokens, options.text_width)
        self.from_text = nn.Linear(options.text_width, options.width)

    def forward(self, latent: Tensor, text: Tensor | None = None) -> Tensor:
        """Latent `(B, n, D)`, n of N tokens, and text `(B, M, T)` to images `(B, C, H, W)`, about [-1, 1].

        Raises:
            UserError: no text, or one of another shape.
        """
        expected = (len(latent), *self._text)
        if text is None or tuple(text.shape) != expected:
            raise UserError(
                f"a text-aware decoder needs text features {expected}, got "
                f"{'none' if text is None else tuple(text.shape)}"
            )
        return super().forward(latent, self.from_text(text))

"""A quantizer in a rotated frame: correlated channels are spread over all of the unit's.

Legend: B batch, L token positions, S streams, D latent width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from smalti.core.contracts import Quantized, Quantizer
from smalti.core.layout import TokenLayout
from smalti.core.options import QuantizerOptions
from smalti.quant.inputs import checked_latent, float32_or_wider, full_precision
from smalti.quant.units import Unit


class RotatedOptions(QuantizerOptions):
    """Options of a rotated quantizer.

    Args:
        quantizer: the unit.
    """

    name: Literal["rotated"] = "rotated"
    quantizer: Unit

    def build(self) -> Rotated:
        """Build it."""
        return Rotated(self)


class Rotated(Quantizer):
    """The unit between a fixed random orthogonal matrix R and its inverse: what it gets is z R.

    Attributes:
        unit: the quantizer in the rotated frame.
        rotation: R, `(D, D)`, a buffer.
    """

    options: RotatedOptions
    rotation: Tensor

    def __init__(self, options: RotatedOptions) -> None:
        super().__init__()
        self.options = options
        self.unit = options.quantizer.build()
        self.dim = self.unit.dim
        self.vocab = self.unit.vocab
        self.register_buffer("rotation", nn.init.orthogonal_(torch.empty(self.dim, self.dim)))

    def forward(self, latent: Tensor) -> Quantized:
        """Quantize `(B, *space, D)`.

        Raises:
            UserError: another width than D, a type that is not float, an empty training batch.
        """
        with checked_latent(latent, self.dim, training=self.training) as channels:
            quantized = self.unit(self._turned(channels, self.rotation))
            return Quantized(self._back(quantized.latent), quantized.tokens, quantized.losses)

    def decode(self, tokens: Tensor, space: tuple[int, ...]) -> Tensor:
        """Latent `(B, *space, D)` of tokens `(B, L, S)`.

        Raises:
            UserError: tokens of another shape or type, out of range, or that do not fill `space`.
        """
        with full_precision(tokens):
            return self._back(self.unit.decode(tokens, space))

    def layout(self, space: tuple[int, ...]) -> TokenLayout:
        """The unit's."""
        return self.unit.layout(space)

    def _turned(self, latent: Tensor, rotation: Tensor) -> Tensor:
        latent, rotation = float32_or_wider(latent), float32_or_wider(rotation)
        dtype = torch.promote_types(latent.dtype, rotation.dtype)
        return latent.to(dtype) @ rotation.to(dtype)

    def _back(self, latent: Tensor) -> Tensor:
        return self._turned(latent, self.rotation.T).to(self.rotation.dtype)

"""Latent quantization: every channel of a token is the nearest of a few learned scalars (Hsu et al. 2023).

Legend: B batch, L token positions, D latent width, n values of a channel.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from smalti.core.contracts import Quantized, Quantizer
from smalti.core.options import QuantizerOptions
from smalti.quant.estimators import straight_through
from smalti.quant.inputs import checked_latent, float32_or_wider
from smalti.quant.packing import Levels, Packing


class LatentOptions(QuantizerOptions):
    """Options of latent quantization.

    Args:
        levels: n of every channel; the first channel varies fastest with the token.
        learned: the codebook loss moves the values; else they stay where they started.
        commitment_weight: of the mean squared distance that pulls tokens to their values.
        codebook_weight: of the one that pulls values to their tokens.
    """

    name: Literal["latent"] = "latent"
    levels: Levels
    learned: bool = True
    commitment_weight: Annotated[float, Field(ge=0)] = 0.1
    codebook_weight: Annotated[float, Field(ge=0)] = 0.1

    def build(self) -> LatentQuantizer:
        """Build it."""
        return LatentQuantizer(self)


class LatentQuantizer(Quantizer):
    """Latent quantization, with a straight-through gradient.

    The losses in training are `commitment`, mean (z - sg(q))^2, and, where values are learned, `codebook`, mean
    (sg(z) - q)^2, over all elements, weighted. (In vector-quantize-pytorch the second one reaches the latent
    instead of the values, and takes the first one's gradient back.)

    Attributes:
        values: `(n,)` for every channel, evenly from -1/2 to 1/2, without 1/2 itself where n is even.
    """

    options: LatentOptions

    def __init__(self, options: LatentOptions) -> None:
        super().__init__()
        self.options = options
        self.dim = len(options.levels)
        self.packing = Packing(options.levels)
        self.vocab = self.packing.vocab
        starts = [torch.arange(levels) / (levels - levels % 2) - 0.5 for levels in options.levels]
        self.values = nn.ParameterList(nn.Parameter(start, requires_grad=options.learned) for start in starts)

    def forward(self, latent: Tensor) -> Quantized:
        """Quantize `(B, *space, D)`.

        Raises:
            UserError: another width than D, a type that is not float, an empty training batch.
        """
        with checked_latent(latent, self.dim, training=self.training) as channels:
            digits = self._nearest(channels.detach())
            codes = self._codes(digits)
            losses = self._losses(channels, codes) if self.training else {}
            return Quantized(straight_through(channels, codes), self.packing.pack(digits), losses)

    def decode(self, tokens: Tensor, space: tuple[int, ...]) -> Tensor:
        """Codes `(B, *space, D)` of tokens `(B, L, 1)`.

        Raises:
            UserError: tokens of another shape or type, out of range, or that do not fill `space`.
        """
        return self._codes(self.packing.unpack(tokens, space))

    @torch.no_grad()
    def _nearest(self, channels: Tensor) -> Tensor:
        pairs = zip(channels.unbind(-1), self.values, strict=True)
        distances = ((channel[..., None] - float32_or_wider(values)).abs() for channel, values in pairs)
        return torch.stack([distance.argmin(-1) for distance in distances], dim=-1)

    def _codes(self, digits: Tensor) -> Tensor:
        pairs = zip(digits.unbind(-1), self.values, strict=True)
        return torch.stack([values[digit] for digit, values in pairs], dim=-1)

    def _losses(self, channels: Tensor, codes: Tensor) -> dict[str, Tensor]:
        codes = codes.to(channels.dtype)
        losses = {"commitment": self.options.commitment_weight * F.mse_loss(channels, codes.detach())}
        if self.options.learned:
            losses["codebook"] = self.options.codebook_weight * F.mse_loss(codes, channels.detach())
        return losses

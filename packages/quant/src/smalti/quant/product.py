"""Product quantization: groups of channels, each with a quantizer of its own (Jegou et al. 2011; HiFi-Codec, XQ-GAN).

Legend: B batch, L token positions, S streams, D latent width, d width of one group, G groups.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from smalti.core.contracts import Quantized, Quantizer
from smalti.core.layout import TokenLayout
from smalti.core.options import QuantizerOptions
from smalti.quant.inputs import check_latent, check_tokens
from smalti.quant.units import Unit, Units, joined_layout, summed


class ProductOptions(QuantizerOptions):
    """Options of product quantization.

    Args:
        quantizers: the units, which decide the widths of the groups: consecutive channels, in order.
        branches: repeat the row of units so many times.
        shared: one unit, with one codebook, for all groups.
    """

    name: Literal["product"] = "product"
    quantizers: Annotated[tuple[Unit, ...], Field(min_length=1)]
    branches: Annotated[int, Field(ge=1)] = 1
    shared: bool = False

    def build(self) -> Product:
        """Build it."""
        return Product(self)


class Product(Quantizer):
    """Every group of channels through its unit; streams and latents are concatenated in the order of groups.

    Losses are averaged over the groups, as in XQ-GAN. A product of residual quantizers is grouped residual
    quantization (HiFi-Codec); one of multi-scale quantizers is that of XQ-GAN.

    Attributes:
        units: one per group, or with `shared` one for all.
    """

    options: ProductOptions

    def __init__(self, options: ProductOptions) -> None:
        super().__init__()
        self.options = options
        self.units = Units(options.quantizers, options.branches, shared=options.shared)
        self.widths = [unit.dim for unit in self.units.row()]
        self.dim = sum(self.widths)
        self.vocab = tuple(size for unit in self.units.row() for size in unit.vocab)

    def forward(self, latent: Tensor) -> Quantized:
        """Quantize `(B, *space, D)`.

        Raises:
            UserError: another width than D, a type that is not float, an empty training batch.
        """
        check_latent(latent, self.dim, training=self.training)
        if self.options.shared:
            return self._folded(latent)
        groups = latent.split(self.widths, -1)
        parts: list[Quantized] = [unit(group) for unit, group in zip(self.units, groups, strict=True)]
        losses = summed(part.losses for part in parts)
        return Quantized(
            torch.cat([part.latent for part in parts], -1),
            torch.cat([part.tokens for part in parts], -1),
            {name: loss / len(parts) for name, loss in losses.items()},
        )

    def decode(self, tokens: Tensor, space: tuple[int, ...]) -> Tensor:
        """Latent `(B, *space, D)` of tokens `(B, L, S)`; fewer positions where the units can decode that.

        Raises:
            UserError: tokens of another shape or type, out of range, or that do not fill `space`.
        """
        check_tokens(tokens, self.vocab)
        return torch.cat([unit.decode(part, space) for unit, part in self._parts(tokens)], -1)

    def layout(self, space: tuple[int, ...]) -> TokenLayout:
        """The units' positions, with the streams of all groups."""
        return joined_layout(self.units.row(), space)

    def codes(self, tokens: Tensor, scale: int) -> Tensor:
        """Those of the units `(B, N, D)`, side by side."""
        return torch.cat([unit.codes(part, scale) for unit, part in self._parts(tokens)], -1)

    def advance(self, total: Tensor | None, codes: Tensor, scale: int) -> tuple[Tensor, Tensor | None]:
        """Every unit for itself, with its channels of the latent so far and of the codes."""
        units = self.units.row()
        totals = [None] * len(units) if total is None else total.split(self.widths, -1)
        parts = zip(units, totals, codes.split(self.widths, -1), strict=True)
        latents, inputs = zip(*(unit.advance(own, part, scale) for unit, own, part in parts), strict=True)
        following = [part for part in inputs if part is not None]
        return torch.cat(latents, -1), torch.cat(following, -1) if following else None

    def _parts(self, tokens: Tensor) -> list[tuple[Quantizer, Tensor]]:
        units = self.units.row()
        return list(zip(units, tokens.split([len(unit.vocab) for unit in units], -1), strict=True))

    def _folded(self, latent: Tensor) -> Quantized:
        # The groups of an image become images of their own, so that the shared unit sees all of them at once.
        batch, groups = len(latent), self.units.places
        folded = latent.unflatten(-1, (groups, -1)).movedim(-2, 1).flatten(0, 1)
        quantized: Quantized = self.units[0](folded)
        return Quantized(
            quantized.latent.unflatten(0, (batch, groups)).movedim(1, -2).flatten(-2),
            quantized.tokens.unflatten(0, (batch, groups)).movedim(1, -2).flatten(-2),
            quantized.losses,
        )

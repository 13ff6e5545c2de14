"""Factorized codebooks: independent sub-codebooks, each on a latent of its own (FQGAN, Bai et al. 2024).

Legend: B batch, L token positions, S streams, D latent width, d width of one branch.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from smalti.core.contracts import Quantized, Quantizer
from smalti.core.layout import TokenLayout
from smalti.core.options import QuantizerOptions
from smalti.quant.inputs import float32_or_wider, full_precision
from smalti.quant.product import ProductOptions
from smalti.quant.units import Unit


class FactorizedOptions(QuantizerOptions):
    """Options of factorized codebooks.

    Args:
        quantizers: the units of the branches; their latents lie next to each other on channels.
        branches: repeat the row of units so many times.
        disentanglement_weight: of the squared cosine between the codes of two branches at one position (0.1
            in FQGAN); needs units of one width.
    """

    name: Literal["factorized"] = "factorized"
    quantizers: Annotated[tuple[Unit, ...], Field(min_length=1)]
    branches: Annotated[int, Field(ge=1)] = 1
    disentanglement_weight: Annotated[float, Field(ge=0)] = 0.0

    def build(self) -> Factorized:
        """Build it."""
        return Factorized(self)


class Factorized(Quantizer):
    """A product of units whose losses are summed, with a term that keeps the branches apart.

    Attributes:
        product: the units, one per branch.
    """

    options: FactorizedOptions

    def __init__(self, options: FactorizedOptions) -> None:
        super().__init__()
        self.options = options
        self.product = ProductOptions(quantizers=options.quantizers, branches=options.branches).build()
        self.dim = self.product.dim
        self.vocab = self.product.vocab

    def forward(self, latent: Tensor) -> Quantized:
        """Quantize `(B, *space, D)`, the branches' latents next to each other.

        Raises:
            UserError: another width than D, a type that is not float, an empty training batch.
        """
        quantized = self.product(latent)
        losses = {name: self.product.units.places * loss for name, loss in quantized.losses.items()}
        if self.training and self.options.disentanglement_weight > 0:
            branches = quantized.latent.split(self.product.widths, -1)
            losses["disentanglement"] = self.options.disentanglement_weight * disentanglement(branches)
        return Quantized(quantized.latent, quantized.tokens, losses)

    def decode(self, tokens: Tensor, space: tuple[int, ...]) -> Tensor:
        """Latent `(B, *space, D)` of tokens `(B, L, S)`."""
        return self.product.decode(tokens, space)

    def layout(self, space: tuple[int, ...]) -> TokenLayout:
        """The units' positions, with the streams of all branches."""
        return self.product.layout(space)


def disentanglement(branches: Sequence[Tensor]) -> Tensor:
    """Mean squared cosine between two branches' vectors at one position, averaged over all pairs (FQGAN).

    Args:
        branches: at least two tensors `(..., d)`.
    """
    with full_precision(branches[0]):
        units = [F.normalize(float32_or_wider(branch), dim=-1) for branch in branches]
        pairs = [(first * second).sum(-1).square().mean() for first, second in combinations(units, 2)]
        return torch.stack(pairs).mean()

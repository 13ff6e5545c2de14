"""A quantizer behind a linear projection and in front of another one.

Legend: B batch, L token positions, S streams, D latent width, d width of the unit.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from smalti.core.contracts import Quantized, Quantizer
from smalti.core.layout import TokenLayout
from smalti.core.options import QuantizerOptions
from smalti.quant.inputs import checked_latent, float32_or_wider, full_precision
from smalti.quant.units import Unit


class ProjectedOptions(QuantizerOptions):
    """Options of a projected quantizer.

    Args:
        dim: D, width of the latent.
        quantizer: the unit, which decides d.
        bias: of both projections.
        layer_norm: normalise what the unit gets, by a LayerNorm with weights (eps 1e-5).
        cosine: make the unit's input this number times the cosines between the token and the d columns of
            the projection, so that its range is known; null takes the plain products. The input projection
            has no bias then.
    """

    name: Literal["projected"] = "projected"
    dim: Annotated[int, Field(ge=1)]
    quantizer: Unit
    bias: bool = True
    layer_norm: bool = False
    cosine: Annotated[float, Field(gt=0)] | None = None

    def build(self) -> Projected:
        """Build it."""
        return Projected(self)


class Projected(Quantizer):
    """Linear D to d, the unit, linear d to D (ViT-VQGAN section 3.2; both are computed in float32).

    Tokens, layout and losses are those of the unit; the gradient of the latent passes both projections.

    Attributes:
        unit: the quantizer between the projections.
    """

    options: ProjectedOptions

    def __init__(self, options: ProjectedOptions) -> None:
        super().__init__()
        self.options = options
        self.unit = options.quantizer.build()
        self.dim = options.dim
        self.vocab = self.unit.vocab
        self.project_in = nn.Linear(self.dim, self.unit.dim, bias=options.bias and options.cosine is None)
        self.layer_norm = nn.LayerNorm(self.unit.dim) if options.layer_norm else None
        self.project_out = nn.Linear(self.unit.dim, self.dim, bias=options.bias)

    def forward(self, latent: Tensor) -> Quantized:
        """Quantize `(B, *space, D)`.

        Raises:
            UserError: another width than D, a type that is not float, an empty training batch.
        """
        with checked_latent(latent, self.dim, training=self.training) as channels:
            quantized = self.unit(self._inner(channels))
            return Quantized(self._outer(quantized.latent), quantized.tokens, quantized.losses)

    def decode(self, tokens: Tensor, space: tuple[int, ...]) -> Tensor:
        """Latent `(B, *space, D)` of tokens `(B, L, S)`, whatever part of them the unit can decode.

        Raises:
            UserError: tokens of another shape or type, out of range, or that do not fill `space`.
        """
        with full_precision(tokens):
            return self._outer(self.unit.decode(tokens, space))

    def layout(self, space: tuple[int, ...]) -> TokenLayout:
        """The unit's."""
        return self.unit.layout(space)

    def _inner(self, latent: Tensor) -> Tensor:
        if self.options.cosine is not None:
            weight = F.normalize(_like(latent, self.project_in.weight), dim=1)
            inner = self.options.cosine * F.linear(F.normalize(latent, dim=-1), weight)
        else:
            inner = _linear(latent, self.project_in)
        if self.layer_norm is None:
            return inner
        norm = self.layer_norm
        return F.layer_norm(inner, norm.normalized_shape, _like(inner, norm.weight), _like(inner, norm.bias), norm.eps)

    def _outer(self, latent: Tensor) -> Tensor:
        return _linear(float32_or_wider(latent), self.project_out).to(self.project_out.weight.dtype)


def _like(value: Tensor, weight: Tensor) -> Tensor:
    return weight.to(torch.promote_types(value.dtype, weight.dtype))


def _linear(value: Tensor, linear: nn.Linear) -> Tensor:
    weight = _like(value, linear.weight)
    bias = None if linear.bias is None else linear.bias.to(weight.dtype)
    return F.linear(value.to(weight.dtype), weight, bias)

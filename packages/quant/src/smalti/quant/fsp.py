"""Finite scalar perturbation: channels made uniform by an activation, cut into equal bins, with noise in training.

Legend: B batch, L token positions, D latent width, n levels of a channel, N tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from smalti.core.contracts import Quantized, Quantizer
from smalti.core.options import QuantizerOptions
from smalti.quant.estimators import straight_through
from smalti.quant.inputs import checked_latent
from smalti.quant.packing import Levels, Packing

Weight = Annotated[float, Field(ge=0)]


class FiniteScalarPerturbationOptions(QuantizerOptions):
    """Options of finite scalar perturbation.

    Args:
        levels: n of every channel; the first channel varies fastest with the token.
        activation: distribution whose cumulative function F takes a channel to (0, 1): `tanh` is (tanh(z) + 1) / 2.
        output: of the bins' centres a, `uniform`: sqrt(12) (a - 1/2), of variance 1; `inverse`: F^-1(a).
        noise: probability that a channel in training is not put into its bin's centre but moved by uniform noise as
            wide as a bin, unless that leads out of (0, 1). Tokens are always those without noise.
        variance: that a channel is to have; null takes that of the activation's distribution.
        mean_weight: of the squared mean of a channel.
        variance_weight: of its squared difference from `variance`.
        skewness_weight: of its squared skewness.
        kurtosis_weight: of its squared excess kurtosis.
    """

    name: Literal["fsp"] = "fsp"
    levels: Levels
    activation: Literal["tanh", "sigmoid", "normal", "laplace", "cauchy"] = "tanh"
    output: Literal["uniform", "inverse"] = "uniform"
    noise: Annotated[float, Field(ge=0, le=1)] = 1.0
    variance: Annotated[float, Field(gt=0)] | None = None
    mean_weight: Weight = 0.1
    variance_weight: Weight = 0.07
    skewness_weight: Weight = 0.0
    kurtosis_weight: Weight = 0.0

    @model_validator(mode="after")
    def _has_variance(self) -> Self:
        if self.activation == "cauchy" and self.variance is None and self.variance_weight > 0:
            raise ValueError("a Cauchy distribution has no variance, give one or variance_weight: 0")
        return self

    def build(self) -> FiniteScalarPerturbation:
        """Build it."""
        return FiniteScalarPerturbation(self)


class _Distribution(NamedTuple):
    cumulative: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]
    variance: float


def _laplace(values: Tensor) -> Tensor:
    tail = torch.exp(-values.abs()) / 2
    return torch.where(values < 0, tail, 1 - tail)


def _inverse_laplace(shares: Tensor) -> Tensor:
    return -torch.sign(shares - 0.5) * torch.log1p(-2 * (shares - 0.5).abs())


DISTRIBUTIONS = {
    "tanh": _Distribution(lambda x: (torch.tanh(x) + 1) / 2, lambda p: torch.logit(p) / 2, math.pi**2 / 12),
    "sigmoid": _Distribution(torch.sigmoid, torch.logit, math.pi**2 / 3),
    "normal": _Distribution(torch.special.ndtr, torch.special.ndtri, 1.0),
    "laplace": _Distribution(_laplace, _inverse_laplace, 2.0),
    "cauchy": _Distribution(
        lambda x: torch.atan(x) / math.pi + 0.5, lambda p: torch.tan(math.pi * (p - 0.5)), math.inf
    ),
}


class FiniteScalarPerturbation(Quantizer):
    """FSP, with a straight-through gradient of the binning; there are no weights.

    The loss in training is `moments`: weighted squared errors of the moments of every channel over the batch,
    averaged over channels.
    """

    options: FiniteScalarPerturbationOptions
    like: Tensor

    def __init__(self, options: FiniteScalarPerturbationOptions) -> None:
        super().__init__()
        self.options = options
        self.dim = len(options.levels)
        self.packing = Packing(options.levels)
        self.vocab = self.packing.vocab
        self.distribution = DISTRIBUTIONS[options.activation]
        # Codes come in its type.
        self.register_buffer("like", torch.empty(0), persistent=False)

    def forward(self, latent: Tensor) -> Quantized:
        """Quantize `(B, *space, D)`.

        Raises:
            UserError: another width than D, a type that is not float, an empty training batch.
        """
        with checked_latent(latent, self.dim, training=self.training) as channels:
            shares = self.distribution.cumulative(channels)
            below_one = 1 - torch.finfo(shares.dtype).eps
            digits = (shares.detach().clamp(max=below_one) * self.packing.levels).long()
            centres, losses = self._centres(digits, shares.dtype), {}
            if self.training:
                centres = self._perturbed(shares.detach(), centres)
                losses["moments"] = self._moments(channels.reshape(-1, self.dim))
            # F^-1(F(z)) is z itself.
            source = self._uniform(shares) if self.options.output == "uniform" else channels
            return Quantized(straight_through(source, self._outputs(centres)), self.packing.pack(digits), losses)

    def decode(self, tokens: Tensor, space: tuple[int, ...]) -> Tensor:
        """Codes `(B, *space, D)` of tokens `(B, L, 1)`.

        Raises:
            UserError: tokens of another shape or type, out of range, or that do not fill `space`.
        """
        digits = self.packing.unpack(tokens, space)
        return self._outputs(self._centres(digits, torch.promote_types(self.like.dtype, torch.float32)))

    def _centres(self, digits: Tensor, dtype: torch.dtype) -> Tensor:
        return (digits.to(dtype) + 0.5) / self.packing.levels

    def _uniform(self, shares: Tensor) -> Tensor:
        return math.sqrt(12) * (shares - 0.5)

    def _outputs(self, shares: Tensor) -> Tensor:
        outputs = self._uniform if self.options.output == "uniform" else self.distribution.inverse
        return outputs(shares).to(self.like.dtype)

    def _perturbed(self, shares: Tensor, centres: Tensor) -> Tensor:
        moved = shares + (torch.rand_like(shares) - 0.5) / self.packing.levels
        chosen = (torch.rand_like(shares) < self.options.noise) & (moved > 0) & (moved < 1)
        return torch.where(chosen, moved, centres)

    def _moments(self, channels: Tensor) -> Tensor:
        options = self.options
        mean = channels.mean(0)
        loss = options.mean_weight * mean.square()
        # One token has no spread.
        if len(channels) > 1:
            variance = self.distribution.variance if options.variance is None else options.variance
            deviation = channels.std(0)
            standard = (channels - mean) / deviation.clamp(min=1e-8)
            if options.variance_weight > 0:
                loss = loss + options.variance_weight * (deviation.square() - variance).square()
            loss = loss + options.skewness_weight * standard.pow(3).mean(0).square()
            loss = loss + options.kurtosis_weight * (standard.pow(4).mean(0) - 3).square()
        return loss.mean()

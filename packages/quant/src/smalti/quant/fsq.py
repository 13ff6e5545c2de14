"""Finite scalar quantization: every channel of a token is rounded to one of a few levels (Mentzer et al. 2023).

Legend: B batch, L token positions, D latent width, n levels of a channel.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from smalti.core.contracts import Quantized, Quantizer
from smalti.core.options import QuantizerOptions
from smalti.quant.estimators import straight_through
from smalti.quant.inputs import checked_latent
from smalti.quant.packing import Levels, Packing

FARTHEST = 0.49  # steps beyond the middle of an outer level


class FiniteScalarOptions(QuantizerOptions):
    """Options of finite scalar quantization.

    Args:
        levels: how many values each channel takes; the first channel varies fastest with the token.
        symmetric: values from -1 to 1 for even levels, too (Parker et al. 2024, "Scaling transformers for low-bitrate
            high-quality speech coding"); else those of Mentzer et al., from -1 to 1 - 2/n. A channel of
            2 levels needs it.
        bound: how a channel gets into its range: `tanh`, or `clamp` to [-1, 1], with no gradient outside.
        margin: by what share the range of the asymmetric form goes beyond the middles of the outer levels, which is
            never as far as half a step. Models of visual-tokenizer-pytorch from before 29 October 2024 need -1e-3.
        noise: of the symmetric form, the probability that a channel in training is not rounded, but gets uniform noise
            as wide as the step between its levels (Parker et al.). Tokens are always the rounded ones.
    """

    name: Literal["fsq"] = "fsq"
    levels: Levels
    symmetric: bool = False
    bound: Literal["tanh", "clamp"] = "tanh"
    margin: Annotated[float, Field(gt=-0.01, lt=0.01)] = 1e-3
    noise: Annotated[float, Field(ge=0, le=1)] = 0.0

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if 2 in self.levels and not self.symmetric:
            raise ValueError("a channel of 2 levels needs symmetric: true")
        if self.noise > 0 and not self.symmetric:
            raise ValueError("noise needs symmetric: true")
        return self

    def build(self) -> FiniteScalarQuantizer:
        """Build it."""
        return FiniteScalarQuantizer(self)


class FiniteScalarQuantizer(Quantizer):
    """FSQ, with a straight-through gradient of the rounding; there are no weights and no losses."""

    options: FiniteScalarOptions
    like: Tensor

    def __init__(self, options: FiniteScalarOptions) -> None:
        super().__init__()
        self.options = options
        self.dim = len(options.levels)
        self.packing = Packing(options.levels)
        self.vocab = self.packing.vocab
        # Codes come in its type.
        self.register_buffer("like", torch.empty(0), persistent=False)

    def forward(self, latent: Tensor) -> Quantized:
        """Quantize `(B, *space, D)`.

        Raises:
            UserError: another width than D, a type that is not float, an empty training batch.
        """
        with checked_latent(latent, self.dim, training=self.training) as channels:
            steps = self._steps(channels)
            # The original rounds half to even in one form and half up in the other.
            rounded = torch.floor(steps + 0.5) if self.options.symmetric else torch.round(steps)
            tokens = self.packing.pack(rounded.detach().long() - self._lowest())
            codes = straight_through(self._values(steps), self._codes(rounded))
            if self.training and self.options.noise > 0:
                noisy = self._values(steps + torch.rand_like(steps) - 0.5)
                codes = torch.where(torch.rand_like(steps) < self.options.noise, noisy.to(codes.dtype), codes)
            return Quantized(codes, tokens, {})

    def decode(self, tokens: Tensor, space: tuple[int, ...]) -> Tensor:
        """Codes `(B, *space, D)` of tokens `(B, L, 1)`.

        Raises:
            UserError: tokens of another shape or type, out of range, or that do not fill `space`.
        """
        digits = self.packing.unpack(tokens, space)
        return self._codes((digits + self._lowest()).to(torch.promote_types(self.like.dtype, torch.float32)))

    def _steps(self, latent: Tensor) -> Tensor:
        """The latent within its range, where levels are whole numbers: 0 to n - 1 if symmetric, else around 0."""
        squash, inverse = (torch.tanh, torch.atanh) if self.options.bound == "tanh" else (_clamp, _same)
        gaps = self.packing.levels.to(latent.dtype) - 1
        if self.options.symmetric:
            return gaps * (squash(latent) + 1) / 2
        half = gaps * ((1 + self.options.margin) / 2)
        if self.options.margin * max(self.options.levels) > 2 * FARTHEST:
            # The margin of so many levels would reach further ones, which there are not.
            half = half.minimum(gaps / 2 + FARTHEST)
        # Even levels have no middle one: half a step to the left of it lies the zero of the latent.
        offset = 0.5 * (self.packing.levels % 2 == 0)
        return squash(latent + inverse(offset / half)) * half - offset

    def _lowest(self) -> Tensor | int:
        return 0 if self.options.symmetric else -(self.packing.levels // 2)

    def _values(self, steps: Tensor) -> Tensor:
        """Steps to the range of the codes, [-1, 1]."""
        if self.options.symmetric:
            return steps * 2 / (self.packing.levels - 1) - 1
        return steps / (self.packing.levels // 2)

    def _codes(self, rounded: Tensor) -> Tensor:
        return self._values(rounded).to(self.like.dtype)


def _clamp(values: Tensor) -> Tensor:
    return values.clamp(-1, 1)


def _same(values: Tensor) -> Tensor:
    return values

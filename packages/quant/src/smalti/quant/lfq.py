"""Lookup-free quantization: every channel of a token is one bit, its sign.

LFQ puts the codes on the corners of a cube (MAGVIT-v2, Yu et al. 2023, section 3.1), BSQ on a sphere (Zhao et al.
2024, "Image and video tokenization with binary spherical quantization").

Legend: B batch, L token positions, S streams, D latent width and number of bits of a token.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from smalti.core.contracts import Quantized, Quantizer
from smalti.core.options import QuantizerOptions
from smalti.quant.entropy import LogFloor, bits_entropy
from smalti.quant.estimators import straight_through
from smalti.quant.inputs import as_tokens, check_token_space, checked_latent
from smalti.quant.packing import pack_digits, place_values, unpack_digits

# The mean distribution over the strings of a group is a table of 2^bits.
LARGEST_GROUP = 24


class BitsOptions(QuantizerOptions):
    """Options that LFQ and BSQ share.

    Args:
        bits: of each stream's tokens: `[18]` for one stream of 2^18 codes, `[6, 12]` for the factorized tokens of
            Open-MAGVIT2. The first channels are those of the first stream; D is the sum. The entropy is that of
            all bits together: for codebooks of their own take a product of quantizers.
        bit_order: `lsb`, the first channel of a stream is the least significant bit (Open-MAGVIT2); `msb`, the
            most significant one (vector-quantize-pytorch).
        scale: s; codes are s times the corners of the cube [-1, 1]^D, or lie on the sphere of radius s.
        soft_clamp: c, if the latent goes through c tanh(z / c) first.
        commitment_weight: of the mean squared distance that pulls tokens to their codes.
        entropy_weight: of the entropy term, sample_weight H(token) - batch_weight H(mean of tokens).
        sample_weight: of the tokens' own entropy within it.
        batch_weight: of the entropy of their mean within it.
        entropy_temperature: T in the distribution of a token over the codes c, softmax(2 z.c / T).
        entropy_group: take the mean distribution over the strings of so many bits only and add up the groups, where
            all 2^D strings are too many; 1 is the form of XQ-GAN, the paper of BSQ takes groups as well.
        entropy_floor: the logarithm of small means, see `smalti.quant.entropy.LogFloor`.
        entropy_offset: o, if the entropy term e goes through softplus(e + o), which keeps it above 0.
    """

    bits: Annotated[tuple[Annotated[int, Field(ge=1, le=62)], ...], Field(min_length=1)]
    bit_order: Literal["lsb", "msb"] = "lsb"
    scale: Annotated[float, Field(gt=0)] = 1.0
    soft_clamp: Annotated[float, Field(gt=0)] | None = None
    commitment_weight: Annotated[float, Field(ge=0)] = 0.25
    entropy_weight: Annotated[float, Field(ge=0)] = 0.1
    sample_weight: Annotated[float, Field(ge=0)] = 1.0
    batch_weight: Annotated[float, Field(ge=0)] = 1.0
    entropy_temperature: Annotated[float, Field(gt=0)] = 0.01
    entropy_group: Annotated[int, Field(ge=1)] | None = None
    entropy_floor: LogFloor = "add"
    entropy_offset: float | None = None

    @model_validator(mode="after")
    def _group_fits(self) -> Self:
        total = sum(self.bits)
        group = total if self.entropy_group is None else self.entropy_group
        if total % group:
            raise ValueError(f"entropy_group {group} must divide the {total} bits")
        if self.entropy_weight > 0 and group > LARGEST_GROUP:
            raise ValueError(
                f"the entropy of {group} bits at once needs a table of 2^{group}, "
                f"give an entropy_group of at most {LARGEST_GROUP} that divides {total}"
            )
        return self

    def build(self) -> LookupFreeQuantizer:
        """Build it."""
        return LookupFreeQuantizer(self)


class LookupFreeOptions(BitsOptions):
    """Options of lookup-free quantization, see `BitsOptions`."""

    name: Literal["lfq"] = "lfq"


class BinarySphericalOptions(BitsOptions):
    """Options of binary spherical quantization, see `BitsOptions`: the latent is scaled to length s first.

    Codes are s / sqrt(D) times the corners of the cube. The temperature is 1, since neighbouring codes lie close.
    """

    name: Literal["bsq"] = "bsq"
    entropy_temperature: Annotated[float, Field(gt=0)] = 1.0


class LookupFreeQuantizer(Quantizer):
    """LFQ or BSQ, with a straight-through gradient; there are no weights.

    The losses in training are `commitment`, mean (z - sg(q))^2 over all elements, and `entropy`, weighted, each where
    its weight is not 0; z is the latent after clamping and scaling. A channel at 0 is a bit that is not set.
    """

    options: BitsOptions
    corner: Tensor
    places: Tensor

    def __init__(self, options: BitsOptions) -> None:
        super().__init__()
        self.options = options
        self.dim = sum(options.bits)
        self.vocab = tuple(2**bits for bits in options.bits)
        self.spherical = isinstance(options, BinarySphericalOptions)
        # The value of a set bit. A buffer: codes come on its device and in its type.
        self._corner = options.scale / math.sqrt(self.dim) if self.spherical else options.scale
        self.register_buffer("corner", torch.tensor(self._corner), persistent=False)
        order = -1 if options.bit_order == "msb" else 1
        places = [place for bits in options.bits for place in place_values([2] * bits)[::order]]
        self.register_buffer("places", torch.tensor(places), persistent=False)

    def forward(self, latent: Tensor) -> Quantized:
        """Quantize `(B, *space, D)`.

        Raises:
            UserError: another width than D, a type that is not float, an empty training batch.
        """
        with checked_latent(latent, self.dim, training=self.training) as channels:
            bounded = self._bounded(channels)
            positive = bounded > 0
            codes = self._codes(positive)
            losses = self._losses(bounded, codes) if self.training else {}
            tokens = as_tokens(self._tokens(positive), latent, len(self.vocab))
            return Quantized(straight_through(bounded, codes), tokens, losses)

    def decode(self, tokens: Tensor, space: tuple[int, ...]) -> Tensor:
        """Codes `(B, *space, D)` of tokens `(B, L, S)`.

        Raises:
            UserError: tokens of another shape or type, out of range, or that do not fill `space`.
        """
        check_token_space(tokens, space, self.vocab)
        streams = zip(tokens.unbind(-1), self.places.split(self.options.bits), strict=True)
        bits = torch.cat([unpack_digits(some, places, 2) for some, places in streams], dim=-1)
        return self._codes(bits > 0).view(len(tokens), *space, self.dim)

    def _bounded(self, latent: Tensor) -> Tensor:
        clamp = self.options.soft_clamp
        if clamp is not None:
            latent = clamp * torch.tanh(latent / clamp)
        return self.options.scale * F.normalize(latent, dim=-1, eps=1e-12) if self.spherical else latent

    def _codes(self, positive: Tensor) -> Tensor:
        return torch.where(positive, self.corner, -self.corner)

    def _tokens(self, positive: Tensor) -> Tensor:
        streams = zip(positive.split(self.options.bits, dim=-1), self.places.split(self.options.bits), strict=True)
        return torch.stack([pack_digits(bits, places) for bits, places in streams], dim=-1)

    def _losses(self, bounded: Tensor, codes: Tensor) -> dict[str, Tensor]:
        options, losses = self.options, {}
        if options.commitment_weight > 0:
            losses["commitment"] = options.commitment_weight * F.mse_loss(bounded, codes.to(bounded.dtype))
        if options.entropy_weight > 0:
            logits = (4 * self._corner / options.entropy_temperature) * bounded.reshape(-1, self.dim)
            entropies = bits_entropy(logits, group=options.entropy_group, floor=options.entropy_floor)
            entropy = entropies.loss(options.sample_weight, options.batch_weight)
            if options.entropy_offset is not None:
                entropy = F.softplus(entropy + options.entropy_offset)
            losses["entropy"] = options.entropy_weight * entropy
        return losses

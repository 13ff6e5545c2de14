"""Binary mapper: independent bits drawn from their log-odds, as one-hot codes that carry gradients.

It makes one-hot vectors rather than a latent of the width it was given, and so is a part of models, not a `Quantizer`.
Free bits as in Kingma et al. 2016 ("Improved variational inference with inverse autoregressive flow", section C.8).

Legend: d bits, K = 2^d codes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalti.core.errors import UserError
from smalti.quant.entropy import bit_entropies, bit_strings
from smalti.quant.estimators import straight_through
from smalti.quant.inputs import float32_or_wider, full_precision
from smalti.quant.packing import pack_digits, place_values, unpack_digits

LARGEST = 20


class Mapped(NamedTuple):
    """`one_hot` `(..., K)`, with the gradient of the distribution over all codes; `tokens`, int64 `(...)`; `loss`."""

    one_hot: Tensor
    tokens: Tensor
    loss: Tensor


class BinaryMapper(nn.Module):
    """Log-odds of d bits to one of K codes; the first bit is the least significant one.

    Args:
        bits: d, 1 to 20.
        free_nats: how far, in nats, the distribution over the codes may be from the uniform one at no loss.

    Raises:
        UserError: so many bits that codes cannot be one-hot vectors.
    """

    places: Tensor

    def __init__(self, bits: int, free_nats: float = math.log(2)) -> None:
        super().__init__()
        if not 1 <= bits <= LARGEST:
            raise UserError(f"one-hot codes can have 1 to {LARGEST} bits, got {bits}")
        self.bits = bits
        self.free_nats = free_nats
        self.register_buffer("places", torch.tensor(place_values([2] * bits)), persistent=False)

    def forward(self, logits: Tensor, *, sample: bool) -> Mapped:
        """Choose a code for every `(..., d)` log-odds.

        The loss is the mean of max(0, KL - free nats), KL being that from the uniform distribution over the codes.

        Args:
            logits: float `(..., d)`.
            sample: draw the bits from torch's generator; else a bit is set where that is the likelier.

        Raises:
            UserError: another width than d, a type that is not float.
        """
        self._check(logits)
        with full_precision(logits):
            logits = float32_or_wider(logits)
            chances = torch.sigmoid(logits.detach())
            bits = torch.rand_like(chances) < chances if sample else chances > 0.5
            tokens = pack_digits(bits.long(), self.places)
            one_hot = F.one_hot(tokens, 2**self.bits).to(logits.dtype)
            divergence = self.bits * math.log(2) - bit_entropies(logits).sum(-1)
            loss = F.relu(divergence - self.free_nats).mean()
            return Mapped(straight_through(bit_strings(logits), one_hot), tokens, loss)

    def log_prob(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """Log-probability `(...)` of tokens `(...)` under log-odds `(..., d)`."""
        self._check(logits)
        with full_precision(logits):
            signs = 2 * unpack_digits(tokens, self.places, 2) - 1
            return F.logsigmoid(signs * float32_or_wider(logits)).sum(-1)

    def _check(self, logits: Tensor) -> None:
        if logits.ndim == 0 or logits.shape[-1] != self.bits or not logits.is_floating_point():
            raise UserError(f"log-odds must be float (..., {self.bits}), got {logits.dtype} {tuple(logits.shape)}")

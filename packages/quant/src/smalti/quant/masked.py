"""Quantizing sequences of different lengths: padding is neither quantized nor learnt from.

Legend: B batch, L token positions, S streams, D latent width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from smalti.core.contracts import Quantized, Quantizer
from smalti.core.errors import UserError

PADDING = -1


def quantize_masked(quantizer: Quantizer, latent: Tensor, mask: Tensor) -> Quantized:
    """Quantize those positions of a batch of sequences where the mask is true.

    For quantizers that treat every position alone. Elsewhere the latent is 0 and the tokens are -1; losses and
    statistics do not see these positions.

    Args:
        quantizer: over sequences.
        latent: float `(B, L, D)`.
        mask: bool `(B, L)`.

    Raises:
        UserError: a mask that does not fit.
    """
    if latent.ndim != 3 or mask.shape != latent.shape[:2] or mask.dtype != torch.bool:
        raise UserError(
            "a mask over a latent (B, L, D) must be bool (B, L), "
            f"got {mask.dtype} {tuple(mask.shape)} for a latent of {tuple(latent.shape)}"
        )
    kept = quantizer(latent[mask][None])
    where = mask.flatten().nonzero().flatten()
    whole = kept.latent.new_zeros(mask.numel(), latent.shape[2]).index_copy(0, where, kept.latent[0])
    tokens = kept.tokens.new_full((mask.numel(), kept.tokens.shape[2]), PADDING).index_copy(0, where, kept.tokens[0])
    return Quantized(whole.view(latent.shape), tokens.view(*mask.shape, -1), kept.losses)

"""Smooth sampling of scales: mixtures of codes instead of codes (VAR's `more_smooth`).

Legend: B batch, N positions of a scale, K codes, C width of the latent, n scales.
"""

from __future__ import annotations

import torch
from torch import Tensor

from smalti.core.contracts import Quantizer
from smalti.generation.masking import gumbel
from smalti.generation.sampling import TokenSampler


def smoothed_codes(quantizer: Quantizer, sampler: TokenSampler, logits: Tensor, scale: int, scales: int) -> Tensor:
    """The codes of a scale, weighted by a Gumbel softmax (Jang et al. 2017) that sharpens from scale to scale.

    Logits are guided and filtered as for a draw, and multiplied by 1 + t, t from 0 at the first scale to 1 at the
    last; the softmax has the temperature 0.27 (1 - 0.95 t), at least 0.005.

    Args:
        quantizer: with one stream of codes.
        sampler: of the call.
        logits: `(B, N, K)`; with guidance 2B rows.
        scale: 0 to n - 1.
        scales: n.

    Returns:
        `(B, N, C)`.
    """
    progress = scale / max(scales - 1, 1)
    filtered = sampler.filtered(logits, scale, progress=progress)
    size = filtered.shape[-1]
    # The draws of tokens have the steps below n.
    uniform = sampler.uniform(scales + scale, filtered.shape[1] * size).view(filtered.shape)
    temperature = max(0.27 * (1 - 0.95 * progress), 0.005)
    weights = ((filtered * (1 + progress) + gumbel(uniform)) / temperature).softmax(-1)
    codebook = quantizer.codes(torch.arange(size, device=logits.device)[None, :, None], scale)[0]
    return weights.to(codebook.dtype) @ codebook

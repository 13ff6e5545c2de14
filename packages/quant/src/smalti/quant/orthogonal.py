"""Regularisers of the codebook and of its use that are no entropy of single tokens.

Legend: B batch, L token positions, K codes, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def orthogonal_loss(codebook: Tensor) -> Tensor:
    """How far the codes are from pairwise orthogonal: the mean squared cosine of all pairs, less that with oneself.

    sum_ij cos^2(e_i, e_j) / K^2 - 1 / K (after Shin et al. 2021, "Translation-equivariant image quantizer").

    Args:
        codebook: float `(K, D)`, or several codebooks `(..., K, D)`, over which the mean is taken.
    """
    codes = F.normalize(codebook, dim=-1, eps=1e-12)
    # The squared norm of the K x K matrix of cosines is that of the D x D one.
    gram = codes.transpose(-1, -2) @ codes
    size = codebook.shape[-2]
    return gram.square().sum((-1, -2)).mean() / size**2 - 1 / size


def diversity_loss(distances: Tensor, temperature: float) -> Tensor:
    """Minus the entropy of the codes' shares at a position, averaged over the positions.

    The share of a code is the mean over the batch of softmax(-distance / temperature). In nats; -log K is the least.

    Args:
        distances: float `(B, L, K)`, of tokens to codes.
        temperature: above 0.
    """
    shares = torch.softmax(-distances / temperature, dim=-1).mean(0)
    entropy: Tensor = torch.special.entr(shares).sum(-1).mean()
    return -entropy

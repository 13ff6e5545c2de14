"""Affine codebooks: all codes move with the mean and spread of the tokens (Huh et al. 2023).

Codes that are never chosen follow the others, since every code is shifted and scaled by what is common to all.

Legend: N vectors of this process, K codes, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from smalti.core.distributed import all_reduce_sum

SMALLEST_VARIANCE = 1e-5


class AffineCodebook(nn.Module):
    """Standardises codes by the codebook's moving moments and gives them those of the tokens.

    A code e is used as (e - m_c) sqrt(v_b / v_c) + m_b, with the means m and biased variances v of the codebook and
    of the tokens of all processes. The moments start at those of the first training batch.

    Args:
        dim: D.
        batch_decay: weight of the past in the moments of the tokens.
        codebook_decay: weight of the past in those of the codebook.
    """

    seen: Tensor
    batch_mean: Tensor
    batch_variance: Tensor
    codebook_mean: Tensor
    codebook_variance: Tensor

    def __init__(self, dim: int, batch_decay: float = 0.99, codebook_decay: float = 0.9) -> None:
        super().__init__()
        self.batch_decay = batch_decay
        self.codebook_decay = codebook_decay
        self.register_buffer("seen", torch.tensor(False))
        for name in ("batch", "codebook"):
            self.register_buffer(f"{name}_mean", torch.zeros(dim))
            self.register_buffer(f"{name}_variance", torch.ones(dim))

    @torch.no_grad()
    def observe(self, vectors: Tensor, codebook: Tensor) -> None:
        """Take in the tokens `(N, D)` of a training batch and the codebook `(K, D)`."""
        total = all_reduce_sum(torch.cat([vectors.new_tensor([len(vectors)]), vectors.sum(0)]))
        count, mean = total[0], total[1:] / total[0]
        variance = all_reduce_sum((vectors - mean).square().sum(0)) / count
        self._average(self.batch_mean, mean, self.batch_decay)
        self._average(self.batch_variance, variance, self.batch_decay)
        self._average(self.codebook_mean, codebook.mean(0), self.codebook_decay)
        self._average(self.codebook_variance, codebook.var(0, unbiased=False), self.codebook_decay)
        self.seen.fill_(True)

    def _average(self, past: Tensor, now: Tensor, decay: float) -> None:
        weight = torch.where(self.seen, 1 - decay, 1.0).to(past.dtype)
        past.lerp_(now.to(past.dtype), weight)

    def _scale(self) -> Tensor:
        spread = self.batch_variance.clamp(min=SMALLEST_VARIANCE) / self.codebook_variance.clamp(min=SMALLEST_VARIANCE)
        return spread.sqrt()

    def forward(self, codes: Tensor) -> Tensor:
        """Codes `(..., D)` as they are used."""
        return (codes - self.codebook_mean) * self._scale() + self.batch_mean

    def inverse(self, vectors: Tensor) -> Tensor:
        """What `forward` makes `vectors` `(..., D)` of."""
        return (vectors - self.batch_mean) / self._scale() + self.codebook_mean

"""Codebook statistics by exponential moving average, an online k-means (VQ-VAE, appendix A.1).

Legend: N vectors, K codes, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from smalti.quant.clusters import cluster_sums

LAPLACE = 1e-5


class EmaStatistics(nn.Module):
    """Moving counts and sums of the vectors that each code was chosen for; their ratio is the codebook.

    Counts are summed with those of the other processes, so that all hold the same. Laplace smoothing keeps
    the division safe: the count of code k is taken as (n_k + eps) / (sum n + K eps) * sum n, eps = 1e-5.

    Args:
        codebook: `(K, D)`, where the statistics start, with a count of 1 each.
        decay: weight of the past at every update.
    """

    counts: Tensor
    sums: Tensor

    def __init__(self, codebook: Tensor, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("counts", codebook.new_ones(len(codebook)))
        self.register_buffer("sums", codebook.detach().clone())

    @torch.no_grad()
    def update(self, tokens: Tensor, vectors: Tensor) -> Tensor:
        """Take in vectors `(N, D)` with their codes `(N,)`; returns how many each code got, `(K,)`, everywhere."""
        sums, counts = cluster_sums(tokens, vectors, len(self.counts))
        self.counts.lerp_(counts.to(self.counts.dtype), 1 - self.decay)
        self.sums.lerp_(sums.to(self.sums.dtype), 1 - self.decay)
        return counts

    def codebook(self, *, smoothing: bool = True) -> Tensor:
        """The codes `(K, D)` that the statistics tell; without smoothing not finite where a count is 0."""
        if not smoothing:
            return self.sums / self.counts[:, None]
        total = self.counts.sum()
        smoothed = (self.counts + LAPLACE) / (total + len(self.counts) * LAPLACE) * total
        return self.sums / smoothed[:, None]

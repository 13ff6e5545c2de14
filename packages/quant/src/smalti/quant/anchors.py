"""Codes that are rarely used move to the token nearest to them (CVQ-VAE, Zheng and Vedaldi 2023).

Legend: N tokens of this process, K codes, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from smalti.core.distributed import all_gather_cat, all_reduce_sum
from smalti.quant.lookup import nearest_code

STEEPNESS = 10.0
FLOOR = 1e-3


class Anchors(nn.Module):
    """The running usage of every code, by which codes are pulled to their nearest token, their anchor.

    Args:
        size: K.
        decay: weight of the past in the usage.
    """

    usage: Tensor

    def __init__(self, size: int, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("usage", torch.zeros(size))

    @torch.no_grad()
    def update(self, codebook: Tensor, tokens: Tensor, searched: Tensor, codes: Tensor, vectors: Tensor) -> None:
        """Take in a batch and pull: e <- (1 - a) e + a x, a = exp(-10 K p / (1 - decay) - 0.001) for the usage p.

        A code that the batch's share of 1/K or more goes to hardly moves.

        Args:
            codebook: `(K, D)`, is written to.
            tokens: int64 `(N,)`, the codes that were found.
            searched: `(N, D)`, the tokens as the search saw them.
            codes: `(K, D)`, the codes as the search saw them.
            vectors: `(N, D)`, the tokens that codes are pulled to.
        """
        counts = all_reduce_sum(torch.bincount(tokens, minlength=len(codebook))).to(self.usage.dtype)
        self.usage.lerp_(counts / counts.sum(), 1 - self.decay)
        pull = torch.exp(-STEEPNESS * len(codebook) * self.usage / (1 - self.decay) - FLOOR)
        codebook.lerp_(_nearest(codes, searched, vectors).to(codebook.dtype), pull[:, None].to(codebook.dtype))


def _nearest(codes: Tensor, searched: Tensor, vectors: Tensor) -> Tensor:
    """Of the vectors of all processes, the one whose searched form is nearest to each code, `(K, D)`."""
    rows = nearest_code(codes, searched)
    distances = (codes - searched[rows]).square().sum(1, keepdim=True)
    candidates = all_gather_cat(torch.cat([vectors[rows], distances], dim=1)).view(-1, len(codes), vectors.shape[1] + 1)
    best = candidates[:, :, -1].argmin(0)
    return candidates[best, torch.arange(len(codes), device=codes.device), :-1]

"""Beam search through the levels of residual quantization, instead of the nearest code at each level.

Legend: B batch, L token positions, D latent width, K codes, Q levels, N = B * L, b beams.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from smalti.quant.inputs import float32_or_wider, full_precision
from smalti.quant.vector import VectorQuantizer


@torch.no_grad()
def beam_search(units: Sequence[VectorQuantizer], latent: Tensor, beams: int) -> Tensor:
    """The tokens int64 `(B, L, Q)` of the best path found.

    Of all ways to take one code per level, the `beams` best are kept after every level: those with the smallest
    sum, over the levels so far, of the squared distance between residual and code.

    Args:
        units: one per level.
        latent: float `(B, *space, D)`.
        beams: b, at least 1; with 1 every level takes its nearest code.
    """
    with full_precision(latent):
        rest = float32_or_wider(latent).reshape(-1, 1, latent.shape[-1])
        paths = torch.zeros(len(rest), 1, 0, dtype=torch.int64, device=latent.device)
        scores = rest.new_zeros(len(rest), 1)
        for unit in units:
            totals = (scores[..., None] + unit.distances(rest)).flatten(1)
            scores, best = totals.topk(min(beams, totals.shape[1]), dim=1, largest=False)
            size = unit.vocab[0]
            parents, tokens = best // size, best % size
            codes = unit.decode(tokens[..., None], (tokens.shape[1],))
            rest = rest.take_along_dim(parents[..., None], 1) - codes
            paths = torch.cat([paths.take_along_dim(parents[..., None], 1), tokens[..., None]], -1)
        return paths[:, 0].view(len(latent), -1, len(units))

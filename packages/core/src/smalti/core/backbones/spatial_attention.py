"""Attention between the positions of a convolutional backbone.

Legend: B batch, h w positions.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class SpatialAttention(nn.Module):
    """`x + out(attention(qkv(norm(x))))`: one head over all positions, projections 1 x 1 (VQGAN, Esser et al. 2021).

    Args:
        width: channels; scores are scaled by its inverse square root.
        groups: of the normalisation.
        eps: of the normalisation.
    """

    def __init__(self, width: int, *, groups: int = 32, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, width, h, w)` to the same."""
        projected: Tensor = self.qkv(self.norm(x))
        rows = projected.flatten(2).transpose(1, 2).unsqueeze(1)  # one head: (B, 1, h w, 3 width)
        query, key, value = rows.chunk(3, dim=-1)
        mixed = F.scaled_dot_product_attention(query, key, value)
        result: Tensor = x + self.out(mixed.squeeze(1).transpose(1, 2).reshape(x.shape))
        return result

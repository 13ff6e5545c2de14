"""A transformer over a fixed number of places, with learned positions.

Legend: B batch, N places, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from smalti.core.backbones.vit_block import ViTBlock


class PositionedTransformer(nn.Module):
    """Learned positions, a norm, pre-norm blocks and a last norm; nothing leads around it.

    Args:
        places: N.
        width: D.
        depth: number of blocks.
        heads: of the attention.

    Attributes:
        positions: `(N, D)`.
    """

    def __init__(self, places: int, width: int, *, depth: int, heads: int) -> None:
        super().__init__()
        self.positions = nn.Parameter(width**-0.5 * torch.randn(places, width))
        self.norm_in = nn.LayerNorm(width)
        self.blocks = nn.Sequential(*(ViTBlock(width, heads) for _ in range(depth)))
        self.norm_out = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        """`(B, N, D)` to the same."""
        y: Tensor = self.norm_out(self.blocks(self.norm_in(tokens + self.positions)))
        return y

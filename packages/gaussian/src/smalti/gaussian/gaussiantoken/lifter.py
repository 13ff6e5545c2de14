"""From a feature map to tokens with positions.

Legend: B images, H W feature map, C channels that come in, E width.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from smalti.core.errors import UserError

Positions = Literal["sine", "learned"]
LARGEST = 100
"""Rows, and columns, that learned positions know."""


class Lifter(nn.Module):
    """A linear layer at every place, then group normalisation over the map.

    Args:
        inputs: C.
        width: E, a multiple of 32.
        positions: `sine`, of places in the map; `learned`, one vector per row and one per column.
    """

    def __init__(self, inputs: int, width: int, positions: Positions = "sine") -> None:
        super().__init__()
        self.width = width
        self.project = nn.Conv2d(inputs, width, 1)
        self.norm = nn.GroupNorm(32, width)
        self.rows = nn.Embedding(LARGEST, width // 2) if positions == "learned" else None
        self.columns = nn.Embedding(LARGEST, width // 2) if positions == "learned" else None

    def forward(self, features: Tensor) -> Tensor:
        """`(B, H, W, C)` to tokens `(B, H W, E)`, row by row."""
        # With channels last in memory, the CPU's normalisation would round more.
        lifted: Tensor = self.norm(self.project(features.permute(0, 3, 1, 2)).contiguous())
        return lifted.flatten(2).transpose(1, 2)

    def positions(self, height: int, width: int) -> Tensor:
        """The positions `(H W, E)` of a map, row by row.

        Raises:
            UserError: learned positions do not reach that far.
        """
        weight = self.project.weight
        if self.rows is None or self.columns is None:
            half = self.width // 2
            parts = _waves(height, half, weight), _waves(width, half, weight)
        else:
            if max(height, width) > LARGEST:
                raise UserError(f"learned positions reach {LARGEST} rows and columns, not {height} x {width}")
            parts = self.columns.weight[:width], self.rows.weight[:height]
        by_row = self.rows is None  # which of the parts comes first, as published
        rows, columns = parts if by_row else parts[::-1]
        down, across = rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)
        return torch.cat([down, across] if by_row else [across, down], dim=-1).flatten(0, 1)


def _waves(size: int, half: int, like: Tensor) -> Tensor:
    """Sines and cosines `(size, half)`, alternating, of the middles of `size` places on a circle (DETR)."""
    places = (torch.arange(size, device=like.device, dtype=like.dtype) + 0.5) / (size + 1e-6) * (2 * math.pi)
    number = torch.arange(half, device=like.device)
    angles = places[:, None] / 10_000 ** (2 * (number // 2) / half)
    return torch.where(number % 2 == 0, angles.sin(), angles.cos())

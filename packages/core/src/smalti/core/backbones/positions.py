"""Learned position tables of token grids, brought to another grid.

Legend: N positions, D width, h w grid.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from smalti.core.errors import UserError


def resampled(positions: Tensor, grid: tuple[int, int], *, prefix: int = 0) -> Tensor:
    """A learned table of a square grid, brought to another grid: bicubic with antialiasing, in float32, rows first.

    Args:
        positions: `(1, prefix + h w, D)`, h = w.
        grid: the height and width wanted.
        prefix: entries in front that belong to no place (class token), kept as they are.

    Returns:
        `(1, prefix + height * width, D)`, in the dtype of `positions`; the same tensor where the grid fits.

    Raises:
        UserError: the table is of no square grid.
    """
    count = positions.shape[1] - prefix
    side = math.isqrt(max(count, 0))
    if side * side != count or count < 1:
        raise UserError(f"a position table of {count} places is of no square grid")
    if (side, side) == tuple(grid):
        return positions
    table = positions[:, prefix:].float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    # Contiguous: torch 2.12 interpolates channel-last memory wrongly where a result is one column wide.
    table = table.contiguous()
    table = F.interpolate(table, size=grid, mode="bicubic", antialias=True, align_corners=False)
    table = table.permute(0, 2, 3, 1).reshape(1, grid[0] * grid[1], -1).to(positions.dtype)
    return torch.cat([positions[:, :prefix], table], dim=1)

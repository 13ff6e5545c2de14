"""Rotary position embedding (Su et al. 2021): tables of rotations, and their application to queries and keys.

A table has one row for the prefix token (the class) and one for each of the L token positions. Position p of the
input sequence `[prefix, token 0, ..., token L-2]` takes row p, so the input that predicts grid cell n carries
the rotation of cell n-1, and the last row is never used.

Legend: B batch, T positions, L token positions, H heads, d width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from smalti.core.layout import TokenLayout

BASE = 10_000.0


def rotary_table(layout: TokenLayout, head_dim: int, device: torch.device | None = None) -> Tensor:
    """The rotations for a layout, as unit complex numbers `(1 + L, d/2)`, complex64.

    Grids take LlamaGen's two-dimensional table, sequences the one of Llama.
    """
    if layout.kind == "grid":
        height, width = layout.shape[0]
        return grid_rotary(height, width, head_dim, device)
    assert layout.kind == "sequence", f"there is no rotary embedding for {layout}"
    return sequence_rotary(layout.positions, head_dim, device)


def grid_rotary(height: int, width: int, head_dim: int, device: torch.device | None = None) -> Tensor:
    """LlamaGen's table of a grid, rows in raster order: `(1 + height * width, d/2)`.

    The first d/4 pairs turn by row * f_j, the others by column * f_j, f_j = 10000^(-2j / (d/2)). The prefix
    row is zero, not the identity: published weights were trained with prefix queries and keys that vanish.
    """
    assert head_dim % 4 == 0, f"head width {head_dim} is not divisible by 4"
    frequencies = _frequencies(head_dim // 2, device)
    rows = torch.arange(height, device=device)[:, None, None] * frequencies
    columns = torch.arange(width, device=device)[None, :, None] * frequencies
    size = (height, width, head_dim // 4)
    angles = torch.cat([rows.expand(size), columns.expand(size)], dim=-1).flatten(0, 1)
    prefix = torch.zeros(1, head_dim // 2, dtype=torch.complex64, device=device)
    return torch.cat([prefix, torch.polar(torch.ones_like(angles), angles)])


def sequence_rotary(length: int, head_dim: int, device: torch.device | None = None) -> Tensor:
    """Llama's table of a sequence, the prefix at position 0: `(1 + length, d/2)`.

    Pair j turns by position * f_j, f_j = 10000^(-2j / d).
    """
    angles = torch.arange(1 + length, device=device)[:, None] * _frequencies(head_dim, device)
    return torch.polar(torch.ones_like(angles), angles)


def _frequencies(width: int, device: torch.device | None) -> Tensor:
    return BASE ** -(torch.arange(0, width, 2, device=device, dtype=torch.float32) / width)


def rotate(vectors: Tensor, table: Tensor) -> Tensor:
    """Turn the neighbouring pairs (x0, x1), (x2, x3), ... of each vector; in float32, cast back.

    Args:
        vectors: `(B, T, H, d)`.
        table: `(T, d/2)`, complex.

    Returns:
        `(B, T, H, d)`.
    """
    pairs = torch.view_as_complex(vectors.float().view(*vectors.shape[:-1], vectors.shape[-1] // 2, 2))
    return torch.view_as_real(pairs * table[:, None]).flatten(-2).type_as(vectors)

"""Rotary position embedding (Su et al. 2021): tables of rotations, and their application to queries and keys.

A table has a row for each position of the prefix (the class, or a caption) and one for each of the L token positions.
Position p of the input sequence `[prefix, token 0, ..., token L-2]` takes row p, so the input that predicts grid cell n
carries the rotation of cell n-1, and the last row is never used.

Legend: B batch, T positions, P prefix positions, L token positions, H heads, d width of a head.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from smalti.core.layout import TokenLayout

BASE = 10_000.0


def rotary_table(
    layout: TokenLayout,
    head_dim: int,
    base: float = BASE,
    *,
    prefix: int = 1,
    repeats: int = 1,
    device: torch.device | None = None,
) -> Tensor:
    """The rotations for a layout, as unit complex numbers `(P + repeats * L, d/2)`, complex64.

    Grids take LlamaGen's two-dimensional table, sequences the one of Llama. A table is made once and kept; a compiled
    model holds it as a constant.

    Args:
        layout: a grid or a sequence.
        head_dim: d.
        base: of the frequencies.
        prefix: P.
        repeats: inputs in a row that share the rotation of a token position.
        device: of the table.
    """
    table: Tensor = _table(layout.kind, layout.shape, head_dim, base, prefix, repeats, device)
    return table


# Dynamo looks through caches and takes what this gives as a constant, for arguments that are constants: no layout.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _table(*key: Any) -> Tensor:
    return _kept_table(*key)


@lru_cache(maxsize=16)
def _kept_table(
    kind: str,
    shape: tuple[tuple[int, ...], ...],
    head_dim: int,
    base: float,
    prefix: int,
    repeats: int,
    device: torch.device | None,
) -> Tensor:
    # Never an inference tensor: those cannot be used in training.
    with torch.inference_mode(mode=False):
        if kind == "grid":
            height, width = shape[0]
            table = grid_rotary(height, width, head_dim, base, prefix, device)
        else:
            assert kind == "sequence", f"there is no rotary embedding for {kind}"
            table = sequence_rotary(prefix + shape[0][0], head_dim, base, device)
        return torch.cat([table[:prefix], table[prefix:].repeat_interleave(repeats, dim=0)])


def grid_rotary(
    height: int, width: int, head_dim: int, base: float = BASE, prefix: int = 1, device: torch.device | None = None
) -> Tensor:
    """LlamaGen's table of a grid, rows in raster order: `(P + height * width, d/2)`.

    The first d/4 pairs turn by row * f_j, the others by column * f_j, f_j = base^(-2j / (d/2)). The prefix rows are
    zero, not the identity: published weights were trained with prefix queries and keys that vanish.
    """
    assert head_dim % 4 == 0, f"head width {head_dim} is not divisible by 4"
    frequencies = _frequencies(head_dim // 2, base, device)
    rows = torch.arange(height, device=device)[:, None, None] * frequencies
    columns = torch.arange(width, device=device)[None, :, None] * frequencies
    size = (height, width, head_dim // 4)
    angles = torch.cat([rows.expand(size), columns.expand(size)], dim=-1).flatten(0, 1)
    zeros = torch.zeros(prefix, head_dim // 2, dtype=torch.complex64, device=device)
    return torch.cat([zeros, torch.polar(torch.ones_like(angles), angles)])


def sequence_rotary(length: int, head_dim: int, base: float = BASE, device: torch.device | None = None) -> Tensor:
    """Llama's table of a sequence: `(length, d/2)`.

    Pair j turns by position * f_j, f_j = base^(-2j / d).
    """
    angles = torch.arange(length, device=device)[:, None] * _frequencies(head_dim, base, device)
    return torch.polar(torch.ones_like(angles), angles)


def _frequencies(width: int, base: float, device: torch.device | None) -> Tensor:
    return base ** -(torch.arange(0, width, 2, device=device, dtype=torch.float32) / width)


def rotate(vectors: Tensor, table: Tensor) -> Tensor:
    """Turn the neighbouring pairs (x0, x1), (x2, x3), ... of each vector; in float32, cast back.

    Args:
        vectors: `(B, H, T, d)`.
        table: `(T, d/2)`, complex.

    Returns:
        `(B, H, T, d)`.
    """
    pairs = torch.view_as_complex(vectors.float().view(*vectors.shape[:-1], vectors.shape[-1] // 2, 2))
    return torch.view_as_real(pairs * table).flatten(-2).type_as(vectors)

"""The geometry of Gaussians in the unit interval, and as tokens.

Legend: B images, N Gaussians of an image, G numbers of a Gaussian: x, y, two scales, angle, perhaps opacity.
"""

from __future__ import annotations

import torch
from torch import Tensor

LIMIT = 9.21024  # sigmoid(LIMIT) is 0.9999

GEOMETRY = 5
"""How many numbers there are without opacity: x, y, two scales, angle."""


def unit(values: Tensor) -> Tensor:
    """The sigmoid, kept within [1e-4, 1 - 1e-4], in the shape of `values`."""
    return values.clamp(-LIMIT, LIMIT).sigmoid()


def quantized(geometry: Tensor, bits: int) -> Tensor:
    """Numbers of [0, 1] to tokens in `[0, 2 ** bits)`: the cell that each lies in, all cells being equally wide.

    Args:
        geometry: `(B, N, G)`.
        bits: of every number.
    """
    cells: int = 2**bits
    return (geometry.detach() * cells).long().clamp(max=cells - 1)


def dequantized(tokens: Tensor, bits: int) -> Tensor:
    """The middles `(B, N, G)` of the cells that tokens `(B, N, G)` stand for."""
    cells: int = 2**bits
    return (tokens.to(torch.float32) + 0.5) / cells

"""Norms of transformers, plain and modulated by a condition (AdaLN).

Legend: B batch, T positions, D width of the model, C width of the condition.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NormKind = Literal["rms", "layer", "plain-layer"]
"""Root mean square with weight; LayerNorm with weight and bias; LayerNorm without either."""


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang and Sennrich 2019) over the last axis; in float32, cast back, then weighted."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """`(..., D)` to `(..., D)`."""
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).type_as(x) * self.weight


def build_norm(kind: NormKind, dim: int, eps: float) -> nn.Module:
    """The norm of a kind over the last axis of width `dim`."""
    if kind == "rms":
        return RMSNorm(dim, eps)
    return nn.LayerNorm(dim, eps, elementwise_affine=kind == "layer")


class Modulation(nn.Module):
    """A condition to factors and offsets: linear(silu(condition)) in `parts` parts of width D.

    Args:
        condition: C.
        dim: D.
        parts: 6 for a block, in the order gate of attention, gate of the feed-forward, scale of attention, scale of the
            feed-forward, shift of attention, shift of the feed-forward; 2 for a final norm, scale and shift.
    """

    def __init__(self, condition: int, dim: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.linear = nn.Linear(condition, parts * dim)

    def forward(self, condition: Tensor) -> Tensor:
        """`(B, T, C)`, or with T = 1 the same for all positions, to `(B, T, parts, D)`."""
        modulation: Tensor = self.linear(F.silu(condition)).unflatten(-1, (self.parts, -1))
        return modulation


class ModulatedNorm(nn.Module):
    """norm(x) * (1 + scale) + shift, with scale and shift of a condition: what stands before the output.

    Args:
        kind: of the norm.
        dim: D.
        eps: of the norm.
        condition: C.
    """

    def __init__(self, kind: NormKind, dim: int, eps: float, condition: int) -> None:
        super().__init__()
        self.norm = build_norm(kind, dim, eps)
        self.modulation = Modulation(condition, dim, 2)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """`(B, T, D)` to `(B, T, D)`; `modulation` is what `self.modulation` made of the condition."""
        scale, shift = modulation.unbind(-2)
        return modulated(self.norm(x), scale, shift)


def modulated(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Norm's output x to x * (1 + scale) + shift."""
    return torch.addcmul(shift, x, 1 + scale)

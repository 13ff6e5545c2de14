"""Objectives that bring pairs of vectors together, over the batch of all processes where asked.

Legend: B batch, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from smalti.core import distributed


def contrastive(first: Tensor, second: Tensor, scale: float = 1.0, *, both_ways: bool = True) -> Tensor:
    """The contrastive loss of pairs, negatives being the other pairs of the batch (InfoNCE; CLIP, Radford et al. 2021).

    Args:
        first: `(B, D)`.
        second: `(B, D)`, its partners row by row.
        scale: the inner products are multiplied by it (one over the temperature).
        both_ways: mean of both cross entropies; else only that of finding the partner of a row of `first`.
    """
    logits = scale * first.float() @ second.float().T
    partners = torch.arange(len(logits), device=logits.device)
    loss = F.cross_entropy(logits, partners)
    return 0.5 * (loss + F.cross_entropy(logits.T, partners)) if both_ways else loss


def gathered(features: Tensor) -> Tensor:
    """`features` `(B, D)` of all processes, joined along the first axis, with gradients to every one of them.

    Gradients are summed over the processes: each computes the loss of the whole batch, and data-parallel training
    averages what they get.
    """
    if distributed.world_size() == 1:
        return features
    joined: Tensor = _Gathered.apply(features)  # type: ignore[no-untyped-call]
    return joined


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor) -> Tensor:
        ctx.rows = len(features)
        return distributed.all_gather_cat(features)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        start = distributed.rank() * ctx.rows
        return distributed.all_reduce_sum(gradients[0].contiguous().clone())[start : start + ctx.rows]

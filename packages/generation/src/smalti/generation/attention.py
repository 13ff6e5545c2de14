"""Attention: the one place that chooses a kernel.

A kernel is a function of `(query, key, value, causal)` with the shapes of `attend`; to add one, write it and
let `attend` choose it by device, dtype or shape.

Legend: B batch, T query positions, N key positions, H heads, d width of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(query: Tensor, key: Tensor, value: Tensor, *, causal: bool) -> Tensor:
    """Scaled dot-product attention (Vaswani et al. 2017, equation 1), scale d^-0.5.

    Args:
        query: `(B, T, H, d)`.
        key: `(B, N, H, d)`.
        value: `(B, N, H, d)`.
        causal: the T queries are the last of the N positions and see nothing after their own; else they
            see everything.

    Returns:
        `(B, T, H, d)`.
    """
    return _scaled_dot_product(query, key, value, causal)


def _scaled_dot_product(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    """Torch's own kernels."""
    new, seen = query.shape[1], key.shape[1]
    assert not causal or new <= seen, f"{new} queries cannot be the last of {seen} positions"
    mask = None
    # A single query is the last position and sees all; torch's own causal mask is aligned at the first one.
    if causal and 1 < new < seen:
        mask = torch.ones(new, seen, dtype=torch.bool, device=query.device).tril(seen - new)
    attended = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal and 1 < new == seen,
    )
    return attended.transpose(1, 2)

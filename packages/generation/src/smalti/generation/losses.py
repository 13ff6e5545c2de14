"""The training objective of generators that predict tokens.

Legend: B batch, L token positions, S streams, K codes of a stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor


def stream_losses(logits: Sequence[Tensor], tokens: Tensor, over: Literal["mean", "sum"] = "mean") -> dict[str, Tensor]:
    """Mean cross entropy of each stream, weighted so that their sum is the mean over streams, or their sum.

    Args:
        logits: for each stream `(B, L, K)`.
        tokens: `(B, L, S)`.
        over: how streams are put together.

    Returns:
        As `named_terms`.
    """
    weight = 1 / len(logits) if over == "mean" else 1.0
    terms = [F.cross_entropy(part.flatten(0, 1), tokens[:, :, s].flatten()) for s, part in enumerate(logits)]
    return named_terms([weight * term for term in terms])


def named_terms(terms: Sequence[Tensor]) -> dict[str, Tensor]:
    """Terms of the streams by name: `cross_entropy` for one stream, else `cross_entropy_0`, `cross_entropy_1`, ..."""
    if len(terms) == 1:
        return {"cross_entropy": terms[0]}
    return {f"cross_entropy_{stream}": term for stream, term in enumerate(terms)}

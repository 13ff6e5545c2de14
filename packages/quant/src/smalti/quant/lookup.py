"""Nearest-code search that never holds the matrix of all distances.

Legend: N vectors, K codes, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from smalti.core.errors import UserError
from smalti.quant.inputs import float32_or_wider, full_precision

# Scores of one block of vectors. On a CPU they should stay in the second-level cache between the product and
# the argmax; a GPU wants enough work per kernel. Fewer than MIN_ROWS vectors at once would make the product
# a sequence of passes over the codebook.
CPU_BLOCK = 1 << 19
GPU_BLOCK = 1 << 25
MIN_ROWS = 16


@torch.no_grad()
def nearest_code(vectors: Tensor, codebook: Tensor) -> Tensor:
    """The index of the code at the smallest Euclidean distance from every vector.

    Since |x - e|^2 = |x|^2 - 2 (x.e - |e|^2 / 2) and |x|^2 is the same for all codes, the score
    x.e - |e|^2 / 2 is maximised, for a block of vectors at a time. Runs in float32 under autocast as well
    (float64 stays float64); the first of several equally near codes wins. For vectors and codes of unit
    length this is the largest cosine.

    Args:
        vectors: float `(N, D)`; N may be 0.
        codebook: float `(K, D)`, K at least 1.

    Returns:
        int64 `(N,)` in `[0, K)`, without gradient.

    Raises:
        UserError: shapes that do not fit.
    """
    _check(vectors, codebook)
    with full_precision(vectors):
        vectors, codebook = float32_or_wider(vectors), float32_or_wider(codebook)
        dtype = torch.promote_types(vectors.dtype, codebook.dtype)
        vectors, codebook = vectors.to(dtype), codebook.to(dtype)
        columns = codebook.t().contiguous()
        bias = codebook.square().sum(1).mul_(-0.5)
        block = GPU_BLOCK if vectors.is_cuda else CPU_BLOCK
        rows = max(MIN_ROWS, block // len(codebook))
        scores = vectors.new_empty(min(rows, len(vectors)), len(codebook))
        nearest = vectors.new_empty(len(vectors), dtype=torch.int64)
        for start in range(0, len(vectors), rows):
            some = vectors[start : start + rows]
            torch.addmm(bias, some, columns, out=scores[: len(some)])
            torch.argmax(scores[: len(some)], dim=1, out=nearest[start : start + rows])
        return nearest


@torch.no_grad()
def nearest_code_plain(vectors: Tensor, codebook: Tensor) -> Tensor:
    """What `nearest_code` computes, by definition: the argmin of the whole N x K matrix of squared distances."""
    _check(vectors, codebook)
    with full_precision(vectors):
        difference = float32_or_wider(vectors)[:, None] - float32_or_wider(codebook)[None]
        return difference.square().sum(2).argmin(1)


def _check(vectors: Tensor, codebook: Tensor) -> None:
    if vectors.ndim != 2 or codebook.ndim != 2 or vectors.shape[1] != codebook.shape[1] or len(codebook) == 0:
        raise UserError(
            "the nearest code is searched for vectors (N, D) among codes (K, D) with K at least 1, "
            f"got {tuple(vectors.shape)} and {tuple(codebook.shape)}"
        )

"""Nearest-code search that never holds the matrix of all distances.

Legend: N vectors, K codes, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from smalti.core.errors import UserError
from smalti.core.matmul import has_packed_products, true_float32
from smalti.quant.inputs import float32_or_wider, full_precision

# Scores of one block of vectors. On a CPU they should stay in the cache between the product and the argmax; a
# GPU wants enough work per kernel. Fewer than MIN_ROWS vectors at once would make the product a sequence of
# passes over the codebook; more than MAX_ROWS gain nothing but cost memory.
CPU_BLOCK = 1 << 21
GPU_BLOCK = 1 << 25
MIN_ROWS = 16
MAX_ROWS = 320
# Codes of one group of the argmax on a CPU; with fewer than MIN_GROUPS it goes over single codes.
GROUP = 128
MIN_GROUPS = 4


@torch.no_grad()
def nearest_code(vectors: Tensor, codebook: Tensor) -> Tensor:
    """The index of the code at the smallest Euclidean distance from every vector.

    Since |x - e|^2 = |x|^2 - 2 (x.e - |e|^2 / 2) and |x|^2 is the same for all codes, the score
    x.e - |e|^2 / 2 is maximised. Runs in float32 under autocast as well (float64 stays float64), and in true
    float32 where PyTorch is told to be less precise; the first of several equally near codes wins. For
    vectors and codes of unit length this is the largest cosine. CUDA tensors go through one fused Triton
    kernel if Triton is installed, all others through blocks of vectors.

    Args:
        vectors: float `(N, D)`; N may be 0.
        codebook: float `(K, D)`, K at least 1.

    Returns:
        int64 `(N,)` in `[0, K)`, without gradient.

    Raises:
        UserError: shapes that do not fit.
    """
    _check(vectors, codebook)
    found: Tensor = _nearest_code(vectors, codebook)
    return found


# One operator, so that torch.compile neither unrolls the blocks nor breaks its graph at them.
@torch.library.custom_op("smalti::nearest_code", mutates_args=())
def _nearest_code(vectors: Tensor, codebook: Tensor) -> Tensor:
    with full_precision(vectors):
        dtype = torch.promote_types(float32_or_wider(vectors).dtype, float32_or_wider(codebook).dtype)
        vectors, codebook = vectors.to(dtype), codebook.to(dtype)
        fused = _fused_search() if vectors.is_cuda and dtype == torch.float32 else None
        return nearest_code_in_blocks(vectors, codebook) if fused is None else fused(vectors, codebook)


@_nearest_code.register_fake
def _(vectors: Tensor, codebook: Tensor) -> Tensor:
    return vectors.new_empty(len(vectors), dtype=torch.int64)


@cache
def _fused_search() -> Callable[[Tensor, Tensor], Tensor] | None:
    if find_spec("triton") is None:
        return None
    search: Callable[[Tensor, Tensor], Tensor] = import_module("smalti.quant.triton_lookup").nearest_code_fused
    return search


def nearest_code_in_blocks(vectors: Tensor, codebook: Tensor) -> Tensor:
    """What `nearest_code` computes, on any device: scores of a block of vectors at a time.

    Args:
        vectors: float32 or float64 `(N, D)`.
        codebook: `(K, D)` of the same type.
    """
    size = len(codebook)
    largest = GPU_BLOCK // size if vectors.is_cuda else min(CPU_BLOCK // size, MAX_ROWS)
    rows = max(MIN_ROWS, largest)
    group = GROUP if vectors.device.type == "cpu" and size >= MIN_GROUPS * GROUP else 1
    # The last code again and again fills up the last group; whoever finds a copy found the code.
    codes = torch.cat([codebook, codebook[-1:].expand(-size % group, -1)]) if size % group else codebook
    with true_float32():
        scores = _scores(codes, min(rows, len(vectors)))
        nearest = vectors.new_empty(len(vectors), dtype=torch.int64)
        for start in range(0, len(vectors), rows):
            block = slice(start, start + rows)
            nearest[block] = _first_largest(scores(vectors[block]), group)
    return nearest.clamp_(max=size - 1)


def _scores(codes: Tensor, rows: int) -> Callable[[Tensor], Tensor]:
    """A function from up to `rows` vectors `(n, D)` to their scores `(n, K)`, valid until its next call."""
    # A few codes at a time: their squares would be a second codebook in memory. (A batched product needs none, but
    # it may round equal codes differently, and the first of them would not always win.)
    bias = torch.cat([some.square().sum(1) for some in codes.split(64)]).mul_(-0.5)
    if codes.device.type == "cpu" and codes.dtype == torch.float32 and has_packed_products():
        # Weights in oneDNN's own order: twice the speed of addmm on some processors, never less.
        weight = torch.ops.mkldnn._reorder_linear_weight(codes.contiguous(), rows)
        return lambda vectors: torch.ops.mkldnn._linear_pointwise(vectors, weight, bias, "none", [], "")
    columns = codes.t().contiguous()
    buffer = codes.new_empty(rows, len(codes))
    return lambda vectors: torch.addmm(bias, vectors, columns, out=buffer[: len(vectors)])


def _first_largest(scores: Tensor, group: int) -> Tensor:
    """The index `(n,)` of the first largest of scores `(n, K)`, K a multiple of `group`.

    PyTorch's maximum is vectorised on a CPU and its argmax is not: the maximum of every group comes first,
    then the argmax over groups, then that within the group it found.
    """
    if group == 1:
        return scores.argmax(1)
    groups = scores.view(-1, group)
    count = scores.shape[1] // group
    best = groups.amax(1).view(-1, count).argmax(1)
    within = groups.index_select(0, best + torch.arange(0, len(groups), count)).argmax(1)
    return within.add_(best, alpha=group)


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

"""Nearest-code search as one fused Triton kernel: scores and their running argmax, nothing of it in memory.

Imported only where Triton is installed. With `TRITON_INTERPRET=1` it runs on the CPU.

Legend: N vectors, K codes, D width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Vectors of one program, and codes and elements of their width that it takes at once.
ROWS, CODES, MAX_WIDTH = 64, 64, 64
NARROWEST = 16  # of a product in Triton


@triton.jit  # type: ignore[untyped-decorator]
def _search(
    vectors: tl.tensor,
    codebook: tl.tensor,
    half_norms: tl.tensor,
    nearest: tl.tensor,
    count: tl.tensor,
    size: tl.tensor,
    width: tl.constexpr,
    row_block: tl.constexpr,
    code_block: tl.constexpr,
    width_block: tl.constexpr,
) -> None:
    rows = tl.program_id(0).to(tl.int64) * row_block + tl.arange(0, row_block)
    best = tl.full((row_block,), float("-inf"), tl.float32)
    best_code = tl.zeros((row_block,), tl.int64)
    for first in range(0, size, code_block):
        codes = first + tl.arange(0, code_block)
        scores = tl.zeros((row_block, code_block), tl.float32)
        for start in tl.static_range(0, width, width_block):
            columns = start + tl.arange(0, width_block)
            here = columns < width
            x = tl.load(
                vectors + rows[:, None] * width + columns[None],
                mask=(rows < count)[:, None] & here[None],
                other=0.0,
            )
            e = tl.load(
                codebook + codes[:, None].to(tl.int64) * width + columns[None],
                mask=(codes < size)[:, None] & here[None],
                other=0.0,
            )
            scores = tl.dot(x, tl.trans(e), scores, input_precision="ieee")
        # What lies beyond the codebook is infinitely far away.
        scores -= tl.load(half_norms + codes, mask=codes < size, other=float("inf"))[None]
        largest = tl.max(scores, 1)
        # The first of equal ones: the smallest index here, and later blocks must be strictly better.
        code = tl.min(tl.where(scores == largest[:, None], codes[None], size), 1)
        better = largest > best
        best = tl.where(better, largest, best)
        best_code = tl.where(better, code.to(tl.int64), best_code)
    tl.store(nearest + rows, best_code, mask=rows < count)


def nearest_code_fused(vectors: Tensor, codebook: Tensor) -> Tensor:
    """What `smalti.quant.lookup.nearest_code` computes.

    The score x.e - |e|^2 / 2 is summed in float32, by multiplications that keep all its bits (no TF32). The
    first of several equally near codes wins. A vector with a NaN gets code 0.

    Args:
        vectors: float32 `(N, D)` on a GPU.
        codebook: float32 `(K, D)` there.

    Returns:
        int64 `(N,)`.
    """
    count, width = vectors.shape
    nearest = vectors.new_empty(count, dtype=torch.int64)
    if count == 0:
        return nearest
    half_norms = codebook.square().sum(1).mul_(0.5)
    block = min(MAX_WIDTH, max(NARROWEST, triton.next_power_of_2(width)))
    with torch.cuda.device_of(vectors):
        _search[(triton.cdiv(count, ROWS),)](
            vectors.contiguous(),
            codebook.contiguous(),
            half_norms,
            nearest,
            count,
            len(codebook),
            width,
            row_block=ROWS,
            code_block=CODES,
            width_block=block,
            # Blocks read ahead must fit the shared memory of small cards, 99 KiB.
            num_stages=3 if width <= MAX_WIDTH else 1,
        )
    return nearest

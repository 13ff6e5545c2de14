"""Run by test_triton_lookup.py in a process of its own: the fused kernel against the definition."""

from __future__ import annotations

import itertools
import sys

import torch
import torch.nn.functional as F

from smalti.quant.lookup import nearest_code_in_blocks, nearest_code_plain
from smalti.quant.triton_lookup import nearest_code_fused


def main(device: str, sizes: list[tuple[int, int, int]]) -> None:
    generator = torch.Generator().manual_seed(0)
    for count, codes, dim in sizes:
        # Small whole numbers: all arithmetic on them is exact, and equally near codes are common.
        vectors, codebook = (
            torch.randint(-3, 4, (rows, dim), generator=generator).float().to(device) for rows in (count, codes)
        )
        assert torch.equal(nearest_code_fused(vectors, codebook), nearest_code_plain(vectors, codebook)), (codes, dim)
        for cosine in (False, True):
            vectors, codebook = (torch.randn(rows, dim, generator=generator).to(device) for rows in (count, codes))
            if cosine:
                vectors, codebook = F.normalize(vectors), F.normalize(codebook)
            found = nearest_code_fused(vectors, codebook)
            exact = nearest_code_in_blocks(vectors.double(), codebook.double())
            assert torch.equal(found, exact), (codes, dim, cosine)
    vectors, codebook = torch.randn(4, 3, device=device), torch.randn(70, 3, device=device)
    vectors[1, 0], vectors[2, 0] = float("nan"), float("inf")
    found = nearest_code_fused(vectors, codebook)
    assert 0 <= found.min() <= found.max() < 70
    # Rows of a wider tensor, as a product quantizer's halves are.
    wide = torch.randn(20, 8, device=device)
    assert torch.equal(nearest_code_fused(wide[:, :3], codebook), nearest_code_plain(wide[:, :3], codebook))
    assert nearest_code_fused(vectors[:0], codebook).shape == (0,)


if __name__ == "__main__":
    main("cpu", list(itertools.product((1, 64, 75), (1, 64, 150), (1, 8, 16, 100))))
    print("all equal", file=sys.stdout)

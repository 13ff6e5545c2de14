"""Nearest-code search beside vector-quantize-pytorch in evaluation and `torch.cdist` with `argmin`, in the same run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from comparison import Comparison, Ours

from smalti.quant.lookup import nearest_code

pytestmark = pytest.mark.benchmark(group="Nearest-code search")
TOKENS = 8192
BARS = {"vector-quantize-pytorch": 10.0, "cdist and argmin": 3.0}


@pytest.mark.parametrize(("codes", "dim", "cosine"), [(16384, 8, True), (4096, 32, False), (1024, 256, False)])
def test_nearest_code(compare: Comparison, library: Any, codes: int, dim: int, cosine: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    vectors, codebook = (torch.randn(rows, dim, generator=generator) for rows in (TOKENS, codes))
    if cosine:
        vectors, codebook = F.normalize(vectors), F.normalize(codebook)
    module = library.VectorQuantize(dim=dim, codebook_size=codes, use_cosine_sim=cosine).eval()
    module._codebook.embed.data.copy_(codebook[None])

    def by_library() -> torch.Tensor:
        with torch.no_grad():
            return module(vectors[None])[1][0]

    def by_cdist() -> torch.Tensor:
        return torch.cdist(vectors, codebook).argmin(1)

    def ours() -> torch.Tensor:
        return nearest_code(vectors, codebook)

    exact = torch.cdist(vectors.double(), codebook.double()).argmin(1)
    assert torch.equal(ours(), exact)
    assert (by_library() == exact).double().mean() > 0.999
    work = Ours(
        f"{codes} codes x {dim}{', cosine' * cosine}",
        ours,
        bars=BARS,
        megabytes=TOKENS * codes * 4 / 10 / 1e6,  # a tenth of the matrix of distances
    )
    compare([work], dict(zip(BARS, (by_library, by_cdist), strict=True)), memory_rounds=3)


@pytest.mark.gpu
@pytest.mark.parametrize("threads", [1])
@pytest.mark.parametrize(("codes", "dim"), [(16384, 8), (4096, 32), (1024, 256), (16384, 256)])
def test_fused_kernel(compare: Comparison, codes: int, dim: int) -> None:
    """Beside product and argmax on the same GPU, and beside the floor: arithmetic in float32, or memory."""
    generator = torch.Generator().manual_seed(0)
    vectors, codebook = (torch.randn(rows, dim, generator=generator).cuda() for rows in (1 << 16, codes))
    norms = codebook.square().sum(1) / 2

    def peer() -> torch.Tensor:
        return (vectors @ codebook.t() - norms).argmax(1)

    def ours() -> torch.Tensor:
        return nearest_code(vectors, codebook)

    assert (ours() == peer()).double().mean() > 0.999
    floors = {
        "TFLOP": 2 * len(vectors) * codes * dim / 1e12,
        "GB": 4 * (len(vectors) * (dim + 2) + codes * dim) / 1e9,
    }
    work = Ours(f"{len(vectors)} tokens, {codes} codes x {dim}", ours, amounts=floors)
    compare([work], {"product and argmax": peer}, rounds=20, memory_rounds=3)

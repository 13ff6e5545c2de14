"""Nearest-code search beside vector-quantize-pytorch in evaluation and `torch.cdist` with `argmin`, in the same run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture

from smalti.quant.lookup import nearest_code

TOKENS = 8192


@pytest.mark.parametrize(("codes", "dim", "cosine"), [(16384, 8, True), (4096, 32, False), (1024, 256, False)])
def test_nearest_code(compare: Any, library: Any, codes: int, dim: int, cosine: bool) -> None:
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
    compare(ours, {"vector_quantize_pytorch": by_library, "cdist": by_cdist})


@pytest.mark.gpu
@pytest.mark.parametrize(("codes", "dim"), [(16384, 8), (4096, 32), (1024, 256), (16384, 256)])
def test_fused_kernel(benchmark: BenchmarkFixture, codes: int, dim: int) -> None:
    """Beside product and argmax on the same GPU, and beside the floor: arithmetic in float32, or memory."""
    generator = torch.Generator().manual_seed(0)
    vectors, codebook = (torch.randn(rows, dim, generator=generator).cuda() for rows in (1 << 16, codes))
    norms = codebook.square().sum(1) / 2

    def timed(action: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        action()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000

    def peer() -> torch.Tensor:
        return (vectors @ codebook.t() - norms).argmax(1)

    def ours() -> torch.Tensor:
        return nearest_code(vectors, codebook)

    assert (ours() == peer()).double().mean() > 0.999
    taken = [(timed(ours), timed(peer)) for _ in range(20)]
    seconds, info = min(own for own, _ in taken), benchmark.extra_info
    info["ratio_product_and_argmax"] = min(other for _, other in taken) / seconds
    info["teraflops"] = 2 * len(vectors) * codes * dim / seconds / 1e12
    info["gigabytes_per_second"] = 4 * (len(vectors) * (dim + 2) + codes * dim) / seconds / 1e9
    info["device"] = torch.cuda.get_device_name()
    benchmark.pedantic(timed, (ours,), rounds=20)

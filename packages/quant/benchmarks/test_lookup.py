"""Nearest-code search against `torch.cdist` with `argmin`, in the same run: `pytest packages/quant/benchmarks`."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from smalti.quant.lookup import nearest_code

TOKENS = 8192
ROUNDS = 5


def _seconds(function: Callable[[], object]) -> float:
    """The best of some rounds after one to warm up."""
    function()
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


@pytest.mark.parametrize(("codes", "dim"), [(16384, 8), (4096, 32)])
def test_nearest_code(benchmark: BenchmarkFixture, codes: int, dim: int) -> None:
    generator = torch.Generator().manual_seed(0)
    vectors, codebook = torch.randn(TOKENS, dim, generator=generator), torch.randn(codes, dim, generator=generator)

    def peer() -> torch.Tensor:
        return torch.cdist(vectors, codebook).argmin(1)

    found = benchmark.pedantic(nearest_code, (vectors, codebook), rounds=ROUNDS, warmup_rounds=1)
    benchmark.extra_info["threads"] = torch.get_num_threads()
    benchmark.extra_info["peer_seconds"] = peer_seconds = _seconds(peer)
    benchmark.extra_info["ratio"] = peer_seconds / benchmark.stats.stats.min
    # Both round differently: a near tie may fall either way.
    assert (found == peer()).double().mean() > 0.999

"""Our Frechet distance beside `scipy.linalg.sqrtm`, the usual way, on the same statistics in the same run."""

from __future__ import annotations

import time

import numpy as np
import pytest
import scipy.linalg
import torch

from smalti.eval.frechet import GaussianStatistics, frechet_distance

WIDTH = 512


def statistics(seed: int) -> GaussianStatistics:
    """Of as many vectors as make a covariance definite, correlated as features are."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64) / WIDTH**0.5
    found = GaussianStatistics()
    found.update(torch.randn(4 * WIDTH, WIDTH, generator=generator, dtype=torch.float64) @ mixing)
    return found


def by_sqrtm(a: GaussianStatistics, b: GaussianStatistics) -> float:
    """The definition, with a general matrix root."""
    root = scipy.linalg.sqrtm(a.covariance.numpy() @ b.covariance.numpy()).real
    shift = (a.mean - b.mean).square().sum()
    return float(shift + a.covariance.trace() + b.covariance.trace() - 2 * np.trace(root))


def test_frechet_distance(benchmark):
    a, b = statistics(0), statistics(1)
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        expected = by_sqrtm(a, b)
        seconds.append(time.perf_counter() - started)
    found = benchmark.pedantic(frechet_distance, (a, b), rounds=5, warmup_rounds=1)
    assert found == pytest.approx(expected, rel=1e-9)
    ours = benchmark.stats.stats.min
    benchmark.extra_info.update(peer="scipy.linalg.sqrtm", width=WIDTH, peer_seconds=min(seconds))
    benchmark.extra_info["ratio"] = min(seconds) / ours

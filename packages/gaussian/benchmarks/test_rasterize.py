"""Tiles against the reference: 256 Gaussians on 256 × 256 pixels, forward and forward + backward, one thread."""

import time
from collections.abc import Callable, Iterator

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from smalti.gaussian import rasterize_gaussians_2d

GAUSSIANS, SIZE = 256, 256


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """A ratio that does not depend on what else the machine does with its other cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _inputs(*, requires_grad: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(1, GAUSSIANS, *shape, generator=generator)

    values = [2 * uniform(2) - 1, 0.3 + 11.7 * uniform(2), torch.pi * uniform(), uniform(3), uniform()]
    return [value.requires_grad_(requires_grad) for value in values]


def _forward(backend: str) -> Callable[[], object]:
    inputs = _inputs(requires_grad=False)
    return lambda: rasterize_gaussians_2d(*inputs, SIZE, SIZE, backend=backend)


def _forward_backward(backend: str) -> Callable[[], object]:
    inputs = _inputs(requires_grad=True)
    upstream = torch.linspace(-1, 1, 3 * SIZE * SIZE).view(1, 3, SIZE, SIZE)
    return lambda: torch.autograd.grad(rasterize_gaussians_2d(*inputs, SIZE, SIZE, backend=backend), inputs, upstream)


def _least_seconds(run: Callable[[], object], runs: int) -> float:
    """The least processor time of a few runs, after one to warm up: what the machine can do undisturbed."""
    run()
    seconds = []
    for _ in range(runs):
        start = time.process_time()
        run()
        seconds.append(time.process_time() - start)
    return min(seconds)


@pytest.mark.slow
@pytest.mark.benchmark(timer=time.process_time)
@pytest.mark.parametrize("work", [_forward, _forward_backward], ids=["forward", "forward_backward"])
def test_tiles_against_reference(benchmark: BenchmarkFixture, work: Callable[[str], Callable[[], object]]) -> None:
    tiles, reference = work("tiles"), work("reference")
    ratio = _least_seconds(reference, 2) / _least_seconds(tiles, 10)
    benchmark.extra_info["reference_over_tiles"] = ratio
    benchmark.pedantic(tiles, rounds=20)
    assert ratio > 20

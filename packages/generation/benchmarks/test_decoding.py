"""Decoding with the cache against computing the whole sequence again at every step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from smalti.core.layout import TokenLayout
from smalti.core.sampling_settings import SamplingSettings
from smalti.generation.ar import AR, AROptions
from smalti.generation.sampling import guided, next_tokens

SETTINGS = SamplingSettings(guidance_scale=2.0, top_k=100, top_p=0.95)
ROUNDS = 3


@torch.inference_mode()
def uncached(model: AR, labels: Tensor, settings: SamplingSettings) -> Tensor:
    """The plain twin of `AR.sample`."""
    tokens = torch.zeros(len(labels), model.token_layout.positions, 1, dtype=torch.int64)
    rows = torch.cat([labels, torch.full_like(labels, model.classes)])
    for step in range(model.token_layout.positions):
        logits = model.logits(tokens[:, : step + 1].repeat(2, 1, 1), rows)[:, step]
        drawn = next_tokens(guided(logits, settings.guidance_scale), settings, torch.arange(len(labels)), step)
        tokens[:, step, 0] = drawn
    return tokens


def median_seconds(call: Callable[[], object]) -> float:
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


@pytest.mark.parametrize("batch", [1, 32])
def test_cached_decoding(benchmark: BenchmarkFixture, batch: int) -> None:
    torch.manual_seed(0)
    options = AROptions(layers=6, dim=128, heads=4, ffn_multiple=32)
    model = options.build(TokenLayout.grid(8, 8, (512,)), classes=10).eval()
    torch.nn.init.normal_(model.output.weight, std=0.2)
    labels = torch.arange(batch) % 10
    tokens = benchmark.pedantic(model.sample, (labels, SETTINGS), rounds=ROUNDS, warmup_rounds=1)
    assert torch.equal(tokens, uncached(model, labels, SETTINGS))
    peer = median_seconds(lambda: uncached(model, labels, SETTINGS))
    benchmark.extra_info["images per second"] = batch / benchmark.stats.stats.median
    benchmark.extra_info["times as fast as uncached"] = peer / benchmark.stats.stats.median

"""Guidance, temperature, filters and the draw, against plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from smalti.core.noise import uniform
from smalti.core.sampling_settings import SamplingSettings
from smalti.generation.sampling import at_temperature, guided, inverse_cdf, next_tokens, top_k, top_p

quick = settings(deadline=None, max_examples=60)
# Quarters, so that equal logits are common.
values = st.integers(-12, 12).map(lambda value: value / 4)


@st.composite
def rows(draw: st.DrawFn) -> Tensor:
    """Logits `(B, K)`."""
    size = draw(st.integers(2, 12))
    return torch.tensor(draw(st.lists(st.lists(values, min_size=size, max_size=size), min_size=1, max_size=4)))


def plain_top_k(row: list[float], k: int) -> list[float]:
    smallest = sorted(row, reverse=True)[min(k, len(row)) - 1]
    return [value if value >= smallest else -math.inf for value in row]


def plain_masses(row: list[float]) -> list[float]:
    """For every code, the probability of all codes that are more likely."""
    weights = [math.exp(value) for value in row]
    return [
        sum(weight for other, weight in zip(row, weights, strict=True) if other > value) / sum(weights) for value in row
    ]


@quick
@given(rows(), st.integers(1, 14))
def test_top_k_is_the_plain_one(logits: Tensor, k: int) -> None:
    before = logits.clone()
    assert top_k(logits, k).tolist() == [plain_top_k(row, k) for row in before.tolist()]
    assert torch.equal(logits, before)


@quick
@given(rows(), st.integers(0, 14), st.floats(0.01, 0.99))
def test_top_p_after_top_k_is_the_plain_one(logits: Tensor, k: int, p: float) -> None:
    before = logits.clone()
    plain = [plain_top_k(row, k) if k else row for row in before.tolist()]
    masses = [plain_masses(row) for row in plain]
    assume(all(abs(mass - p) > 1e-5 for row in masses for mass in row))
    expected = [
        [value if mass <= p else -math.inf for value, mass in zip(row, under, strict=True)]
        for row, under in zip(plain, masses, strict=True)
    ]
    filtered = top_k(logits, k) if k else logits
    assert top_p(filtered, p, among=k).tolist() == expected
    assert torch.equal(logits, before)


@quick
@given(rows(), st.floats(0.01, 0.99))
def test_the_most_likely_code_always_stays(logits: Tensor, p: float) -> None:
    kept = top_p(logits, p).isfinite()
    assert bool(kept.gather(1, logits.argmax(1, keepdim=True)).all())


@quick
@given(rows(), st.floats(0, 10))
def test_guidance_is_the_plain_one(conditional: Tensor, scale: float) -> None:
    null = conditional.flip(-1) / 3
    both = torch.cat([conditional, null])
    before = both.clone()
    expected = [
        [u + (c - u) * scale for c, u in zip(row, other, strict=True)]
        for row, other in zip(conditional.tolist(), null.tolist(), strict=True)
    ]
    torch.testing.assert_close(guided(both, scale), torch.tensor(expected))
    assert torch.equal(both, before)


@quick
@given(rows(), st.floats(0.05, 5))
def test_temperature_is_the_plain_one(logits: Tensor, temperature: float) -> None:
    before = logits.clone()
    expected = (logits.double() / temperature).softmax(-1)
    torch.testing.assert_close(at_temperature(logits, temperature).softmax(-1).double(), expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(logits, before)


def test_the_smallest_temperature_is_greedy_and_finite() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    assert at_temperature(logits, 1e-40).softmax(-1).tolist() == [[0.0, 1.0, 0.0]]


@quick
@given(rows())
def test_draws_follow_the_probabilities(logits: Tensor) -> None:
    """Of n evenly spaced uniform numbers, a code of probability q gets n q, give or take one."""
    n = 1000
    evenly = (torch.arange(n, dtype=torch.float64)[:, None] + 0.5) / n
    for row in logits:
        counts = torch.bincount(inverse_cdf(row.expand(n, -1), evenly), minlength=len(row))
        expected = n * row.double().softmax(-1)
        assert bool(((counts - expected).abs() <= 1 + 1e-3).all())


@pytest.mark.parametrize("number", [0.0, 1 - 2.0**-53])
def test_draws_nothing_that_is_filtered_out(number: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(500, 9, generator=generator)
    logits[:, [0, 1, 7, 8]] = -torch.inf
    drawn = inverse_cdf(logits, torch.full((500, 1), number, dtype=torch.float64))
    assert set(drawn.tolist()) == {2 if number == 0 else 6}


def test_one_uniform_number_of_seed_sample_and_step() -> None:
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    indices = torch.tensor([4, 0, 11, 2, 9, 7])
    chosen = SamplingSettings(seed=8, temperature=0.7, top_k=20, top_p=0.9)
    filtered = top_p(top_k(at_temperature(logits, 0.7), 20), 0.9)
    expected = inverse_cdf(filtered, uniform(8, indices, 5))
    assert torch.equal(next_tokens(logits, chosen, indices, 5), expected)


def test_temperature_zero_takes_the_most_likely() -> None:
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    drawn = next_tokens(logits, SamplingSettings(temperature=0, top_k=3, top_p=0.5), torch.arange(6), 0)
    assert torch.equal(drawn, logits.argmax(-1))

"""Guidance, temperature, filters and the draw, against plain loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from smalti.core.layout import TokenLayout
from smalti.core.noise import uniform
from smalti.core.sampling_settings import SamplingSettings
from smalti.generation.ar import AROptions
from smalti.generation.sampling import TokenSampler, at_temperature, guided, inverse_cdf, next_tokens, top_k, top_p

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


@pytest.mark.parametrize("codes", [1, 2, 9, 250, 16384])
def test_a_draw_is_the_first_code_beyond_the_number(codes: int) -> None:
    """What a single cumulative sum over all codes would find, at numbers in the middle between its steps."""
    logits = 3 * torch.randn(1, codes, generator=torch.Generator().manual_seed(codes))
    logits[:, 1::7] = -torch.inf
    probabilities = logits.softmax(-1).double()[0]
    ends = probabilities.cumsum(-1) / probabilities.sum()
    numbers = (ends - probabilities / 2)[:, None]
    possible = probabilities > 1e-12
    drawn = inverse_cdf(logits.expand(codes, -1), numbers)
    assert torch.equal(drawn[possible], torch.arange(codes)[possible])


def test_noise_of_tokens_one_by_one_is_that_of_their_steps() -> None:
    logits, indices = torch.randn(3, 30, generator=torch.Generator().manual_seed(1)), torch.tensor([5, 0, 7])
    chosen = SamplingSettings(seed=4)
    sampler = TokenSampler(chosen, indices, 6, streams=2)
    drawn = [sampler.draw(logits, step, stream) for step in range(6) for stream in range(2)]
    assert all(torch.equal(one, next_tokens(logits, chosen, indices, number)) for number, one in enumerate(drawn))


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


@pytest.mark.parametrize(
    ("chosen", "weights"),
    [
        ({"guidance_scale": 3.0}, [3.0, 3.0, 3.0, 3.0]),
        ({"guidance_scale": 3.0, "guidance_steps": 2}, [3.0, 3.0, 1.0, 1.0]),
        ({"guidance_scale": 3.0, "guidance": "linear"}, [1.0, 1.5, 2.0, 2.5]),
        ({"guidance_scale": 3.0, "guidance": "power-cosine"}, [1.0, 1 + (1 - math.cos(math.pi / 4)), 2.0,
                                                               1 + (1 + math.cos(math.pi / 4))]),
        ({"guidance_scale": 3.0, "guidance": "power-cosine", "guidance_power": 2.0},
         [1.0, 2 - math.cos(math.pi / 16), 2 - math.cos(math.pi / 4), 2 - math.cos(math.pi * 9 / 16)]),
        ({"guidance_scale": 3.0, "guidance": "power-cosine", "guidance_power": 0.0}, [3.0, 3.0, 3.0, 3.0]),
    ],
)  # fmt: skip
def test_guidance_over_the_steps(chosen: dict[str, Any], weights: list[float]) -> None:
    settings = SamplingSettings(**chosen)
    assert [settings.guidance_weight(step, step / 4) for step in range(4)] == pytest.approx(weights)
    sampler = TokenSampler(settings, torch.arange(2), steps=4)
    logits = torch.randn(4, 7)
    for step, weight in enumerate(weights):
        torch.testing.assert_close(sampler.guided(logits, step), logits[2:] + weight * (logits[:2] - logits[2:]))
    if not settings.guidance_steps:
        torch.testing.assert_close(sampler.guided(logits, 1, progress=0.5), sampler.guided(logits, 2))


def test_a_sampler_draws_several_positions_at_once() -> None:
    """As many as there are, each with noise of its own, whatever else is drawn."""
    logits = torch.randn(2, 5, 9, generator=torch.Generator().manual_seed(0))
    settings = SamplingSettings(seed=4, top_k=6)
    drawn = TokenSampler(settings, torch.tensor([3, 8]), steps=2, streams=2).draw(logits, step=1, stream=1)
    noise = uniform(4, torch.tensor([3, 8]), 3, lanes=5)
    for sample in range(2):
        for position in range(5):
            expected = inverse_cdf(top_k(logits[sample, position, None], 6), noise[sample, position, None, None])
            assert drawn[sample, position] == expected


def test_drawn_tokens_have_the_exact_probabilities(p_value: Callable[[Tensor, Tensor], float]) -> None:
    """Chi-square test of a whole toy model: every sequence of two tokens, guided, with filters."""
    torch.manual_seed(0)
    model = AROptions(layers=1, dim=16, heads=2, ffn_multiple=8).build(TokenLayout.sequence(2, (4,)), 2).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape), alpha=0.1)
    settings = SamplingSettings(guidance_scale=1.5, temperature=0.9, top_k=3, top_p=0.95, seed=2)
    count, label = 20_000, 1
    drawn = model.sample(torch.full((count,), label), settings)[:, :, 0]
    sequences = torch.cartesian_prod(torch.arange(4), torch.arange(4))[:, :, None]
    with torch.no_grad():
        both = torch.cat([model.logits(sequences, torch.full((16,), which))[0] for which in (label, model.classes)])
    null, conditional = both[16:].double(), both[:16].double()
    logits = (null + (conditional - null) * 1.5).flatten(0, 1) / 0.9
    plain = [plain_top_k(row, 3) for row in logits.tolist()]
    masses = [plain_masses(row) for row in plain]
    kept = torch.tensor([
        [value if mass <= 0.95 else -math.inf for value, mass in zip(row, under, strict=True)]
        for row, under in zip(plain, masses, strict=True)
    ]).view(16, 2, 4)  # fmt: skip
    chosen = kept.softmax(-1).gather(2, sequences)[:, :, 0].prod(1)
    counts = torch.bincount(drawn[:, 0] * 4 + drawn[:, 1], minlength=16)
    possible = chosen > 0
    assert not counts[~possible].any()
    assert int(possible.sum()) >= 6
    assert p_value(counts[possible], chosen[possible]) > 1e-4

"""Schedules of masked generation, masks of training, and which tokens stay."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smalti.generation.masking import (
    Schedule,
    gumbel,
    least_confident,
    masked_counts,
    masked_share,
    random_mask,
)

quick = settings(deadline=None, max_examples=60)
schedules = st.sampled_from(get_args(Schedule))


@pytest.mark.parametrize(
    ("schedule", "half"),
    [("arccos", 2 / 3), ("cosine", 0.5**0.5), ("linear", 0.5), ("square", 0.75), ("root", 1 - 0.5**0.5)],
)
def test_shares_fall_from_one_to_none(schedule: Schedule, half: float) -> None:
    shares = masked_share(torch.linspace(0, 1, 101, dtype=torch.float64), schedule)
    assert shares[[0, 50, 100]].tolist() == pytest.approx([1.0, half, 0.0], abs=1e-12)
    assert bool((shares.diff() < 0).all())


@quick
@given(st.integers(1, 80), st.integers(1, 80), schedules)
def test_every_step_fixes_some_and_leaves_some(length: int, steps: int, schedule: Schedule) -> None:
    counts = [length, *masked_counts(length, steps, schedule)]
    assert len(counts) == steps + 1
    assert counts[-1] == 0
    for before, after in pairwise(counts[:-1]):
        assert 1 <= after <= max(before - 1, 1)


def test_counts_of_titok() -> None:
    # floor(32 arccos(r) / (pi / 2)) for r = 1/8 to 7/8
    assert masked_counts(32, 8, "arccos") == [29, 26, 24, 21, 18, 14, 10, 0]


@quick
@given(st.integers(1, 8), st.integers(1, 20), schedules, st.integers(0, 99))
def test_a_mask_has_one_token_at_least(batch: int, length: int, schedule: Schedule, seed: int) -> None:
    torch.manual_seed(seed)
    mask = random_mask(batch, length, schedule, torch.device("cpu"))
    assert mask.shape == (batch, length)
    assert bool(mask.any(1).all())


@pytest.mark.parametrize(("schedule", "mean"), [("arccos", 2 / math.pi), ("cosine", 2 / math.pi), ("linear", 0.5)])
def test_masks_have_the_density_of_the_schedule(schedule: Schedule, mean: float) -> None:
    torch.manual_seed(0)
    mask = random_mask(20_000, 64, schedule, torch.device("cpu")).double()
    # no place is masked more often than another
    assert mask.mean(0).tolist() == pytest.approx([mean] * 64, abs=0.02)


def test_the_first_ones_among_equals_are_masked() -> None:
    confidence = torch.tensor([[1.0, 0.0, 0.0, 0.0], [math.inf, 2.0, -1.0, 2.0]])
    assert least_confident(confidence, 2).tolist() == [[False, True, True, False], [False, True, True, False]]


def test_gumbel_noise_is_finite_and_has_its_moments() -> None:
    noise = gumbel((torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000)
    assert float(noise.mean()) == pytest.approx(0.5772, abs=1e-3)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, abs=1e-2)
    assert bool(gumbel(torch.tensor([0.0, 1.0], dtype=torch.float64)).isfinite().all())

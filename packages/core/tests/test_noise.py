import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smalti.core.noise import mixed_seed, uniform, uniform_steps


def test_it_is_uniform_and_independent():
    values = uniform(7, torch.arange(20_000), 3, lanes=2)
    assert values.dtype == torch.float64
    assert float(values.min()) >= 0
    assert float(values.max()) < 1
    counts = np.histogram(values.numpy().ravel(), bins=100, range=(0, 1))[0]
    chi_square = float(((counts - 400) ** 2 / 400).sum())
    assert 55 < chi_square < 160  # 99 degrees of freedom, beyond four standard deviations either way
    neighbours = [
        values[:, 0],
        values[:, 1],
        uniform(7, torch.arange(20_000), 4)[:, 0],
        uniform(8, torch.arange(20_000), 3)[:, 0],
    ]
    correlation = torch.corrcoef(torch.stack([*neighbours, values[:, 0].roll(1)]))
    assert float((correlation - torch.eye(5)).abs().max()) < 0.03


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**63 - 1), st.integers(0, 2**31), st.lists(st.integers(0, 10**9), min_size=1, max_size=5))
def test_a_value_depends_on_its_own_coordinates_alone(seed, step, samples):
    together = uniform(seed, torch.tensor(samples), step, lanes=3)
    steps = range(max(step - 2, 0), step + 2)
    assert torch.equal(uniform_steps(seed, torch.tensor(samples), steps, lanes=3)[:, steps.index(step)], together)
    for row, sample in zip(together, samples, strict=True):
        assert torch.equal(uniform(seed, torch.tensor([sample]), step, lanes=3)[0], row)
        assert torch.equal(uniform(seed, torch.tensor([sample]), step)[0], row[:1])


def test_known_values_stay():
    """A changed mixing function would change every published sample."""
    found = uniform(1, torch.tensor([0, 1]), 0)[:, 0].tolist()
    assert found == [0.9441346619014952, 0.35513735080125874]


def test_seeds_beyond_64_bits_are_seeds_too():
    samples = torch.arange(3)
    assert not torch.equal(uniform(2**63 + 1, samples, 0), uniform(1, samples, 0))
    assert torch.equal(uniform(2**64 + 1, samples, 0), uniform(1, samples, 0))


def test_mixed_seed():
    assert mixed_seed(1, "a", 2) == mixed_seed(1, "a", 2)
    assert len({mixed_seed(1, "a", 2), mixed_seed(1, "a", 3), mixed_seed(1, "b", 2), mixed_seed(2, "a", 2)}) == 4
    assert 0 <= mixed_seed("x") < 2**63

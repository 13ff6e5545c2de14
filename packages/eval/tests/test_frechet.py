from typing import NamedTuple

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smalti.core.errors import UserError
from smalti.eval.frechet import GaussianStatistics, frechet_distance, frechet_distance_of_rows, statistics_of


class Given(NamedTuple):
    mean: torch.Tensor
    covariance: torch.Tensor


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthogonal(size, seed=0):
    return torch.linalg.qr(normal(size, size, seed=seed))[0]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(0, 1), st.permutations(range(4)))
def test_statistics_do_not_depend_on_the_batches(sizes, single, order):
    features = 1000 + normal(sum(sizes) + 3, 4)[:, order]
    streamed, rest = GaussianStatistics(), GaussianStatistics()
    *parts, last = features.split([*sizes, 3])
    for index, part in enumerate(parts):
        (rest if single and index % 2 else streamed).update(part)
    rest.update(last)
    streamed.merge(rest)
    assert streamed.n == len(features)
    np.testing.assert_allclose(streamed.mean, features.numpy().mean(0), rtol=1e-13)
    np.testing.assert_allclose(streamed.covariance, np.cov(features.numpy(), rowvar=False), rtol=1e-8, atol=1e-10)


def test_merging_leaves_the_other_alone():
    first, other = GaussianStatistics(), statistics_of(normal(5, 3))
    mean, covariance = other.mean, other.covariance
    first.merge(GaussianStatistics())
    assert first.n == 0
    first.merge(other)
    first.update(normal(7, 3, seed=1))
    assert other.n == 5
    assert torch.equal(other.mean, mean)
    assert torch.equal(other.covariance, covariance)


def test_half_precision_features_are_summed_in_double():
    features = normal(300, 2).half() + 8
    expected = np.cov(features.double().numpy(), rowvar=False)
    np.testing.assert_allclose(statistics_of(features).covariance, expected, rtol=1e-12)


def test_distance_of_full_rank_statistics_is_that_of_sqrtm():
    mixing = normal(20, 20, seed=3)
    a, b = statistics_of(normal(200, 20)), statistics_of(normal(150, 20, seed=1) @ mixing + 0.3)
    root = scipy.linalg.sqrtm(a.covariance.numpy() @ b.covariance.numpy())
    expected = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * np.trace(root).real
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-11)
    assert frechet_distance(b, a) == pytest.approx(float(expected), rel=1e-11)


def test_equal_covariances_leave_the_means():
    basis, spectrum = orthogonal(32), torch.logspace(0, -12, 32, dtype=torch.float64)
    covariance = basis * spectrum @ basis.T
    a, b = Given(torch.zeros(32).double(), covariance), Given(torch.full((32,), 0.5).double(), covariance)
    assert frechet_distance(a, b) == pytest.approx(0.25 * 32, abs=1e-8)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-8)


@pytest.mark.parametrize("decades", [2, 10, 14])
def test_commuting_covariances(decades):
    """With one basis the distance is that of the axes: the sum of (root a - root b)^2."""
    basis = orthogonal(64, seed=5)
    spectrum_a = torch.logspace(0, -decades, 64, dtype=torch.float64)
    spectrum_b = 2 * spectrum_a.flip(0)
    a = Given(torch.zeros(64).double(), basis * spectrum_a @ basis.T)
    b = Given(torch.zeros(64).double(), basis * spectrum_b @ basis.T)
    expected = float((spectrum_a.sqrt() - spectrum_b.sqrt()).square().sum())
    assert frechet_distance(a, b) == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("ranks", [(16, 16), (64, 16), (16, 64), (64, 1)])
def test_rank_deficient_covariances(ranks):
    basis = orthogonal(64, seed=7)
    spectra = [torch.where(torch.arange(64) < rank, 1.0 + torch.arange(64), 0.0).double() for rank in ranks]
    a, b = (Given(torch.zeros(64).double(), basis * spectrum @ basis.T) for spectrum in spectra)
    expected = float((spectra[0].sqrt() - spectra[1].sqrt()).square().sum())
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-7, abs=1e-6)


def test_fewer_vectors_than_dimensions():
    a, b = normal(10, 40), normal(12, 40, seed=1)
    centred_a, centred_b = a - a.mean(0), b - b.mean(0)
    # The nuclear norm of the two centred sets' product needs no square matrix of the features' width.
    root = np.linalg.svd((centred_a @ centred_b.T).numpy(), compute_uv=False).sum() / np.sqrt(9 * 11)
    traces = centred_a.square().sum() / 9 + centred_b.square().sum() / 11
    expected = (a.mean(0) - b.mean(0)).square().sum() + traces - 2 * root
    assert frechet_distance(statistics_of(a), statistics_of(b)) == pytest.approx(float(expected), rel=1e-8)
    assert frechet_distance(statistics_of(a), statistics_of(a)) == pytest.approx(0, abs=1e-6)


def test_one_dimension():
    a, b = Given(torch.ones(1).double(), torch.full((1, 1), 9.0).double()), statistics_of(normal(50, 1))
    expected = float((1 - b.mean[0]) ** 2 + (3 - b.covariance[0, 0].sqrt()) ** 2)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("action", "sentence"),
    [
        (lambda: GaussianStatistics().update(torch.zeros(3)), "features must be float (B, D), got torch.float32 (3,)"),
        (lambda: GaussianStatistics().mean, "a mean needs at least one feature vector, got none"),
        (lambda: statistics_of(torch.zeros(1, 2)).covariance, "a covariance needs at least 2 feature vectors, got 1"),
        (
            lambda: statistics_of(torch.zeros(2, 2)).update(torch.zeros(2, 3)),
            "features of 3 values do not go with earlier ones of 2",
        ),
        (
            lambda: statistics_of(torch.zeros(2, 2)).update(torch.tensor([[0.0, 0.0], [torch.nan, 0.0]])),
            "features must be finite, but vector 3 is not",
        ),
        (
            lambda: frechet_distance(statistics_of(torch.zeros(2, 2)), statistics_of(torch.zeros(2, 3))),
            "features of 2 and of 3 values cannot be compared",
        ),
    ],
)
def test_what_cannot_be_computed_is_refused(action, sentence):
    with pytest.raises(UserError) as error:
        action()
    assert str(error.value) == sentence


def test_rows_give_the_same_without_square_matrices():
    a, b = normal(30, 50), 1.4 * normal(25, 50, seed=1) + 0.2
    expected = frechet_distance(statistics_of(a), statistics_of(b))
    assert frechet_distance_of_rows(a.float(), b.float()) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance_of_rows(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance_of_rows(a, a) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("decades", [0, 8, 16])
def test_identical_sets_are_at_distance_zero(decades):
    features = normal(400, 128) * torch.logspace(1, 1 - decades / 2, 128, dtype=torch.float64) @ orthogonal(128)
    assert frechet_distance(statistics_of(features), statistics_of(features.flip(0))) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("decades", [8, 12, 16])
def test_ill_conditioned_covariances_keep_their_digits(decades):
    """Many small eigenvalues, whose roots a product of covariances loses."""
    basis = orthogonal(128, seed=2)
    spectrum = torch.full((128,), 10.0**-decades, dtype=torch.float64)
    spectrum[:8] = 1
    a = Given(torch.zeros(128).double(), basis * spectrum @ basis.T)
    b = Given(torch.zeros(128).double(), 4 * a.covariance)
    assert frechet_distance(a, b) == pytest.approx(float(spectrum.sum()), rel=1e-9)


def test_statistics_that_are_not_finite_are_refused():
    broken = Given(torch.zeros(2).double(), torch.full((2, 2), torch.nan).double())
    with pytest.raises(UserError) as error:
        frechet_distance(broken, statistics_of(normal(9, 2)))
    assert str(error.value) == "the statistics of features must be finite, but a mean or covariance is not"


def test_statistics_move_and_come_back():
    statistics = statistics_of(normal(1500, 3)).to("cpu")
    restored = GaussianStatistics()
    restored.load_state_dict(statistics.state_dict())
    restored.update(normal(10, 3, seed=1))
    assert (statistics.n, restored.n) == (1500, 1510)
    np.testing.assert_allclose(statistics.covariance, np.cov(normal(1500, 3).numpy(), rowvar=False), rtol=1e-12)

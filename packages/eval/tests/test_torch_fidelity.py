"""The same figures as torch-fidelity's routines on the same features, where the definitions are the same."""

import numpy as np
import pytest
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from smalti.eval.frechet import frechet_distance, statistics_of
from smalti.eval.inception_score import inception_score
from smalti.eval.kernel_distance import kernel_distance_of_subsets
from smalti.eval.precision_recall import precision_recall

RELATIVE = 1e-9


@pytest.fixture
def sets():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(24, 24, generator=generator, dtype=torch.float64)
    samples, references = (torch.randn(n, 24, generator=generator, dtype=torch.float64) for n in (300, 260))
    return 0.8 * samples @ mixing + 0.1, references @ mixing


def test_frechet_distance(sets):
    expected = fid_statistics_to_metric(*map(fid_features_to_statistics, sets), verbose=False)
    found = frechet_distance(*map(statistics_of, sets))
    assert found == pytest.approx(expected["frechet_inception_distance"], rel=RELATIVE)


@pytest.mark.parametrize(("splits", "shuffle"), [(10, True), (7, True), (1, False)])
def test_inception_score(sets, splits, shuffle):
    expected = isc_features_to_metric(sets[0], splits, shuffle, 2020)
    found = inception_score(sets[0], splits, 2020 if shuffle else None)
    assert found.mean == pytest.approx(expected["inception_score_mean"], rel=RELATIVE)
    assert found.std == pytest.approx(expected["inception_score_std"], rel=RELATIVE, abs=1e-12)


def test_kernel_distance(sets):
    expected = kid_features_to_metric(*sets, kid_subsets=5, kid_subset_size=100, rng_seed=7, verbose=False)
    found = kernel_distance_of_subsets(*sets, subsets=5, size=100, seed=7)
    assert found.mean == pytest.approx(expected["kernel_inception_distance_mean"], rel=RELATIVE)
    assert found.std == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-6)


def test_precision_and_recall(sets):
    samples, references = (rows.float() for rows in sets)
    expected = prc_features_to_metric(samples, references, prc_neighborhood=3, verbose=False)
    found = precision_recall(samples, references, 3)
    np.testing.assert_allclose(found, [expected["precision"], expected["recall"]], rtol=1e-6)
    assert 0 < found.precision < 1
    assert 0 < found.recall < 1

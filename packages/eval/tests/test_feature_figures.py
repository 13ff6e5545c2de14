"""Inception Score, density and coverage, kernel distances, figures of classes, and confidence: against plain twins."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smalti.core.errors import UserError
from smalti.eval.class_metrics import accuracy, bias_warning, class_frechet_distances
from smalti.eval.confidence import bootstrap, frechet_infinity
from smalti.eval.density_coverage import density_coverage
from smalti.eval.frechet import frechet_distance, statistics_of
from smalti.eval.inception_score import adm_inception_score, inception_score
from smalti.eval.kernel_distance import cmmd, kernel_distance, kernel_distance_of_subsets

ZEROS = torch.zeros(9, dtype=torch.int64)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_adm_inception_score_takes_consecutive_samples():
    logits = 2 * normal(100, 9)
    probabilities = logits.softmax(1).numpy()
    parts = []
    for part in np.split(probabilities, [40, 80]):
        divergence = part * (np.log(part) - np.log(part.mean(0, keepdims=True)))
        parts.append(np.exp(divergence.sum(1).mean()))
    found = adm_inception_score(logits, 40)
    assert found == pytest.approx((np.mean(parts), np.std(parts)), rel=1e-12)
    assert adm_inception_score(logits[torch.arange(100).flip(0)], 40).mean != pytest.approx(found.mean, rel=1e-6)


def test_inception_score_of_certain_decisions_is_the_number_of_classes():
    logits = 1e5 * torch.eye(8).repeat(5, 1)
    assert inception_score(logits, 1).mean == pytest.approx(8)
    assert inception_score(torch.zeros(40, 8), 4) == pytest.approx((1, 0))


def distances(a, b):
    return ((a[:, None] - b[None]) ** 2).sum(2)


@settings(deadline=None, max_examples=15)
@given(st.integers(6, 30), st.integers(6, 30), st.integers(1, 5), st.integers(1, 4), st.integers(0, 100))
def test_density_and_coverage_by_definition(count, others, width, neighbours, seed):
    samples, references = normal(count, width, seed=seed), 0.7 * normal(others, width, seed=seed + 1)
    between = distances(references.numpy(), references.numpy())
    radii = np.sort(between, axis=1)[:, neighbours]
    inside = distances(samples.numpy(), references.numpy()) <= radii
    expected = inside.sum() / (neighbours * count), inside.any(0).mean()
    assert density_coverage(samples, references, neighbours) == pytest.approx(expected)


def cubic(a, b):
    return (a @ b.T / a.shape[1] + 1) ** 3


def test_kernel_distance_is_that_of_all_pairs():
    samples, references = normal(30, 6), 1.2 * normal(21, 6, seed=1)
    own, others = cubic(samples, samples).fill_diagonal_(0), cubic(references, references).fill_diagonal_(0)
    expected = own.sum() / (30 * 29) + others.sum() / (21 * 20) - 2 * cubic(samples, references).mean()
    assert kernel_distance(samples, references) == pytest.approx(float(expected), rel=1e-11)
    many = kernel_distance_of_subsets(samples, references, subsets=400, size=15)
    assert many.mean == pytest.approx(float(expected), abs=4 * many.std / 20)


def test_cmmd_is_that_of_vectors_of_unit_length():
    samples, references = normal(20, 6), normal(17, 6, seed=1) + 0.5
    a, b = (rows / rows.norm(dim=1, keepdim=True) for rows in (samples, references))

    def kernel(x, y):
        return np.exp(-distances(x.numpy(), y.numpy()) / 200).mean()

    expected = 1000 * (kernel(a, a) + kernel(b, b) - 2 * kernel(a, b))
    assert cmmd(samples, 3 * references) == pytest.approx(expected, rel=1e-9)
    assert cmmd(samples, samples) == pytest.approx(0, abs=1e-9)


def test_classes_have_distances_of_their_own():
    samples, references = normal(60, 8), normal(90, 8, seed=1)
    labels, given_labels = torch.arange(60) % 3, torch.arange(90) % 3
    samples[labels == 1] += 1
    found = class_frechet_distances(samples, labels, references, given_labels)
    for label in range(3):
        expected = frechet_distance(
            statistics_of(samples[labels == label]), statistics_of(references[given_labels == label])
        )
        assert found.by_class[label] == pytest.approx(expected, rel=1e-9)
    assert found.mean == pytest.approx(sum(found.by_class.values()) / 3)
    assert max(found.by_class, key=found.by_class.get) == 1
    assert found.warning == (
        "a Frechet distance of 20 vectors of 8 values is biased upwards: compare it only with one of the same counts"
    )
    assert bias_warning(80, 8) == ""


def test_accuracy_and_equal_logits():
    logits = torch.tensor([[3.0, 1, 2], [0, 5, 5], [1, 1, 1]])
    assert accuracy(logits, torch.tensor([0, 2, 0])) == pytest.approx(2 / 3)
    assert accuracy(logits, torch.tensor([2, 2, 1]), top=2) == 1
    assert accuracy(logits, torch.tensor([1, 0, 2]), top=2) == 0


def test_bootstrap_of_a_mean_is_its_standard_error():
    samples = normal(400, 1)
    found = bootstrap(lambda rows: float(rows.mean()), samples, repeats=300)
    error = float(samples.std()) / 20
    assert found.value == float(samples.mean())
    assert found.deviation == pytest.approx(error, rel=0.15)
    assert found.high - found.value == pytest.approx(1.959964 * found.deviation, rel=1e-6)
    assert found.value - found.low == pytest.approx(found.high - found.value)
    assert bootstrap(lambda rows: float(rows.mean()), samples, repeats=300) == found


def test_extrapolation_takes_the_bias_away():
    samples, reference = normal(6000, 24), statistics_of(normal(200_000, 24, seed=1))
    found = frechet_infinity(samples, reference, points=8, smallest=300)
    biased = frechet_distance(statistics_of(samples[:300]), reference)
    assert biased > 0.5
    assert abs(found.value) < 0.05
    assert found.slope == pytest.approx(300 * biased, rel=0.2)
    assert found.residual < 0.05


@pytest.mark.parametrize(
    ("action", "sentence"),
    [
        (
            lambda: inception_score(normal(5, 3), splits=10),
            "an Inception Score of 10 parts needs at least 1 part and as many samples, got 5",
        ),
        (
            lambda: adm_inception_score(normal(0, 3)),
            "an Inception Score needs samples in parts of 1 or more, got 0 in 5000",
        ),
        (lambda: kernel_distance(normal(1, 3), normal(9, 3)), "at least 2 samples are needed, got 1"),
        (
            lambda: kernel_distance_of_subsets(normal(99, 3), normal(9, 3), 2, 50),
            "at least 50 references are needed, got 9",
        ),
        (
            lambda: kernel_distance_of_subsets(normal(9, 3), normal(9, 3), 0, 5),
            "a kernel distance needs 1 subset of 2 vectors or more, got 0 of 5",
        ),
        (
            lambda: density_coverage(normal(9, 3), normal(4, 3)),
            "5 neighbours need more vectors than that, got 4 references",
        ),
        (
            lambda: cmmd(normal(9, 3), torch.full((2, 3), torch.nan)),
            "features must be finite, but those of the references are not",
        ),
        (
            lambda: class_frechet_distances(normal(9, 3), ZEROS, normal(9, 3), ZEROS + 1),
            "class 0 has 9 samples and 0 references: a Frechet distance needs 2 of each",
        ),
        (
            lambda: class_frechet_distances(normal(9, 3), ZEROS[:8], normal(9, 3), ZEROS),
            "9 samples need as many labels, got (8,)",
        ),
        (
            lambda: accuracy(normal(2, 3), torch.tensor([0, 3])),
            "labels must be 0 to 2, as there are 3 logits",
        ),
        (lambda: accuracy(normal(2, 3), torch.tensor([0, 1]), top=4), "the top 4 of 3 classes do not exist"),
        (
            lambda: bootstrap(lambda rows: 0.0, normal(9, 3), level=1),
            "a bootstrap needs 2 samples, 2 repeats and a level between 0 and 1, got 9, 100 and 1",
        ),
        (
            lambda: frechet_infinity(normal(9, 3), statistics_of(normal(9, 3))),
            "an extrapolation needs 2 points or more, and more samples than the smallest subset's 5000, got 15 points "
            "and 9 samples",
        ),
    ],
)
def test_what_cannot_be_computed_is_refused(action, sentence):
    with pytest.raises(UserError) as error:
        action()
    assert str(error.value) == sentence

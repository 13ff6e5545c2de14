"""Metrics of sets as objects: batches, processes, states."""

import itertools

import pytest
import torch

from smalti.core.contracts import Features
from smalti.core.errors import UserError
from smalti.core.testing.processes import run_in_processes
from smalti.eval.frechet import frechet_distance, statistics_of
from smalti.eval.metric import merged_over_processes
from smalti.eval.set_metrics import (
    CMMD,
    AdmInceptionScore,
    DensityAndCoverage,
    FrechetDistance,
    InceptionScore,
    KernelDistance,
    KernelDistanceOfSubsets,
    PrecisionAndRecall,
)

METRICS = {
    "frechet": FrechetDistance,
    "inception score": lambda: InceptionScore(splits=3),
    "adm inception score": lambda: AdmInceptionScore(split_size=40),
    "precision and recall": PrecisionAndRecall,
    "adm precision and recall": lambda: PrecisionAndRecall(distances="float16"),
    "density and coverage": DensityAndCoverage,
    "kernel distance": KernelDistance,
    "kernel distance of subsets": lambda: KernelDistanceOfSubsets(subsets=3, size=50),
    "cmmd": CMMD,
}
every_metric = pytest.mark.parametrize("name", METRICS)


def features(count, seed, width=12):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator) @ torch.randn(width, width, generator=generator)


def fed(metric, order, size, samples, references):
    """The metric after batches of `size` in some order of the samples."""
    for batch in order.split(size):
        metric.update(samples[batch], indices=batch)
    for batch in torch.arange(len(references)).split(size):
        metric.update(references[batch], real=True, indices=batch)
    return metric


def same(found, expected):
    assert torch.tensor(found).tolist() == pytest.approx(torch.tensor(expected).tolist(), rel=1e-9, abs=1e-12)


@every_metric
def test_batches_and_order_make_no_difference(name):
    samples, references = features(130, 0), features(110, 1)
    expected = fed(METRICS[name](), torch.arange(130), 130, samples, references).compute()
    for size, seed in ((1, 2), (7, 3), (64, 4)):
        order = torch.randperm(130, generator=torch.Generator().manual_seed(seed))
        same(fed(METRICS[name](), order, size, samples, references).compute(), expected)


@every_metric
def test_metrics_merge_exactly_and_start_again(name):
    samples, references = features(130, 0), features(110, 1)
    expected = fed(METRICS[name](), torch.arange(130), 32, samples, references).compute()
    parts = [METRICS[name]() for _ in range(3)]
    for part, shared in zip(parts, torch.arange(130).tensor_split(3), strict=True):
        fed(part, shared, 7, samples, references[:0])
    for part, shared in zip(parts[:2], torch.arange(110).tensor_split(2), strict=True):
        part.update(references[shared], real=True, indices=shared)
    first, *others = parts
    for other in others:
        first.merge(other)
    same(first.compute(), expected)
    restored = METRICS[name]()
    restored.load_state_dict(first.state_dict())
    same(restored.compute(), expected)
    first.reset()
    with pytest.raises(UserError):
        first.compute()
    same(fed(first, torch.arange(130), 50, samples, references).compute(), expected)


def measured(rank, names):
    found = {}
    samples, references = features(130, 0), features(110, 1)
    for name in names:
        metric = METRICS[name]()
        for start in range(0, 130, 8):
            batch = torch.arange(start, min(start + 8, 130))
            if start // 8 % 2 == rank:
                metric.update(samples[batch], indices=batch)
        batch = torch.arange(110)[rank::2]
        metric.update(references[batch], real=True, indices=batch)
        found[name] = merged_over_processes(metric).compute()
    return found


def test_processes_together_see_what_one_would():
    names = ["frechet", "kernel distance of subsets", "adm inception score"]
    results = run_in_processes(measured, names)
    assert results[0] == results[1]
    samples, references = features(130, 0), features(110, 1)
    for name in names:
        same(results[0][name], fed(METRICS[name](), torch.arange(130), 130, samples, references).compute())


class Means(Features):
    """Mean colours, and nothing else."""

    def forward(self, images):
        return {"pool": images.double().mean((1, 2)), "logits": images.double().mean((1, 2))}


def test_images_go_through_the_extractor():
    generator = torch.Generator().manual_seed(0)
    images, others = (torch.randint(0, 256, (20, 4, 4, 3), dtype=torch.uint8, generator=generator) for _ in "ab")
    statistics, reference = (statistics_of(pixels.double().mean((1, 2))) for pixels in (images, others))
    expected = frechet_distance(statistics, reference)
    assert FrechetDistance(reference, extractor=Means()).update(images).compute() == pytest.approx(expected, rel=1e-12)
    assert InceptionScore(2, extractor=Means()).update(images).compute().mean > 1
    with pytest.raises(UserError) as error:
        FrechetDistance(extractor=Means(), output="spatial").update(images)
    assert str(error.value) == "the extractor gives no 'spatial', only pool, logits"


def test_references_do_not_count_as_samples():
    metric = InceptionScore(splits=1).update(features(10, 0))
    expected = metric.compute()
    assert metric.update(features(10, 1), real=True).compute() == expected


def test_given_statistics_take_no_more_images():
    metric = FrechetDistance(statistics_of(features(20, 0))).update(features(20, 1)).update(features(5, 2), real=True)
    with pytest.raises(UserError) as error:
        metric.compute()
    assert str(error.value) == "a Frechet distance was given statistics to compare with and 5 images"


@pytest.mark.parametrize(
    ("batches", "sentence"),
    [
        ([(4, [0, 1, 2, 3]), (2, [9, 3])], "image 3 was given twice: a sampler may have padded the set"),
        ([(4, [0, 1, 2, 3]), (2, None)], "give indices with every batch of features or with none"),
        ([(4, None), (2, [0, 1])], "give indices with every batch of features or with none"),
        (
            [(4, [0, 1])],
            "indices must be int64 (4,), one for each feature vector, got torch.int64 (2,)",
        ),
        ([], "there are no features yet: call update(features) first"),
    ],
)
def test_wrong_indices_are_refused(batches, sentence):
    def feed():
        metric = KernelDistance()
        for seed, (count, indices) in enumerate(batches):
            metric.update(features(count, seed), indices=None if indices is None else torch.tensor(indices))
        metric.compute()

    with pytest.raises(UserError) as error:
        feed()
    assert str(error.value) == sentence


@every_metric
def test_features_that_are_not_finite_are_refused(name):
    metric = METRICS[name]().update(features(3, 0))
    broken = features(3, 1)
    broken[1, 2] = torch.nan
    with pytest.raises(UserError) as error:
        metric.update(broken)
    assert str(error.value) == "features must be finite, but vector 4 is not"


def test_every_figure_has_a_definition_of_its_own():
    definitions = [make().definition for make in METRICS.values()]
    assert all(first != second for first, second in itertools.combinations(definitions, 2))

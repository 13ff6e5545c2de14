"""The figures that `smalti evaluate images` can tell of two sets of features, by name.

Legend: N samples, D feature width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

from torch import Tensor

from smalti.core.contracts import PairMetric
from smalti.core.errors import UserError
from smalti.core.plugins import registry
from smalti.eval import density_coverage, inception_score, kernel_distance, precision_recall
from smalti.eval.confidence import bootstrap, frechet_infinity
from smalti.eval.extraction import Extracted, Wanted
from smalti.eval.frechet import FRECHET_DEFINITION, GaussianStatistics, frechet_distance
from smalti.eval.protocols import Protocol

KERNEL_SUBSETS, KERNEL_SIZE = 100, 1000  # of torch-fidelity and clean-fid
POOLED = "psnr-pooled"


class Finding(NamedTuple):
    """A number with what it means; `interval` is a 95 % confidence interval."""

    name: str
    title: str
    value: float
    definition: str
    better: Literal["higher", "lower"] = "lower"
    unit: str = ""
    interval: tuple[float, float] | None = None


class Measure(NamedTuple):
    """What is needed of samples and of references, and how it becomes findings.

    Attributes:
        samples: features of the samples.
        references: features of the references.
        compute: samples, references, protocol and bootstrap repeats to findings.
    """

    samples: Wanted
    references: Wanted
    compute: Callable[[Extracted, Extracted, Protocol, int], Iterable[Finding]]


def _frechet(name: str, title: str, feature: str) -> Measure:
    def compute(samples: Extracted, references: Extracted, protocol: Protocol, repeats: int) -> Iterable[Finding]:
        reference = references.statistics[feature]
        interval = None
        if repeats:
            found = bootstrap(
                lambda rows: frechet_distance(_statistics(rows), reference), samples.rows[feature], repeats
            )
            interval = (found.low, found.high)
        value = frechet_distance(samples.statistics[feature], reference)
        yield Finding(name, title, value, FRECHET_DEFINITION, interval=interval)

    wanted = Wanted(statistics=frozenset({feature}))
    return Measure(wanted, wanted, compute)


def _statistics(rows: Tensor) -> GaussianStatistics:
    statistics = GaussianStatistics()
    statistics.update(rows)
    return statistics


def _infinity(samples: Extracted, references: Extracted, protocol: Protocol, repeats: int) -> Iterable[Finding]:
    found = frechet_infinity(samples.rows["pool"], references.statistics["pool"], seed=protocol.seed)
    text = f"{FRECHET_DEFINITION}; extrapolated to infinitely many samples (Chong and Forsyth 2020)"
    yield Finding("fid-infinity", "FID∞", found.value, text)


def _inception_score(samples: Extracted, references: Extracted, protocol: Protocol, repeats: int) -> Iterable[Finding]:
    if protocol.inception_score == "adm":
        score = inception_score.adm_inception_score(samples.rows["logits"])
        parts = "parts of 5000 consecutive samples"
    else:
        score = inception_score.inception_score(samples.rows["logits"], seed=protocol.seed)
        parts = f"10 equal parts of the samples, shuffled with seed {protocol.seed}"
    text = f"{inception_score.DEFINITION}; mean over {parts}, their standard deviation {score.std:.4g}"
    yield Finding("is", "Inception Score", score.mean, text, better="higher")


def _kernel(samples: Extracted, references: Extracted, protocol: Protocol, repeats: int) -> Iterable[Finding]:
    own, others = samples.rows["pool"], references.rows["pool"]
    size = min(KERNEL_SIZE, len(own), len(others))
    score = kernel_distance.kernel_distance_of_subsets(own, others, KERNEL_SUBSETS, size, protocol.seed)
    text = (
        f"{kernel_distance.KERNEL_DEFINITION}; mean of unbiased estimates from {KERNEL_SUBSETS} subsets of {size}, "
        f"seed {protocol.seed}, their standard deviation {score.std:.4g}"
    )
    yield Finding("kid", "KID", score.mean, text)


def _precision_recall(samples: Extracted, references: Extracted, protocol: Protocol, repeats: int) -> Iterable[Finding]:
    own, others = samples.rows["pool"], references.rows["pool"]
    found = precision_recall.precision_recall(own, others, protocol.neighbours, protocol.distances)
    text = precision_recall.definition(protocol.neighbours, protocol.distances)
    yield Finding("precision", "Precision", found.precision, text, "higher", "share")
    yield Finding("recall", "Recall", found.recall, text, "higher", "share")


def _density_coverage(samples: Extracted, references: Extracted, protocol: Protocol, repeats: int) -> Iterable[Finding]:
    found = density_coverage.density_coverage(samples.rows["pool"], references.rows["pool"])
    text = density_coverage.definition(5)
    yield Finding("density", "Density", found.density, text, "higher")
    yield Finding("coverage", "Coverage", found.coverage, text, "higher", "share")


def _cmmd(samples: Extracted, references: Extracted, protocol: Protocol, repeats: int) -> Iterable[Finding]:
    value = kernel_distance.cmmd(samples.rows["pool"], references.rows["pool"])
    yield Finding("cmmd", "CMMD", value, kernel_distance.CMMD_DEFINITION)


_POOL = Wanted(rows=frozenset({"pool"}))
_POOL_STATISTICS = Wanted(statistics=frozenset({"pool"}))
MEASURES: dict[str, Measure] = {
    "fid": _frechet("fid", "FID", "pool"),
    "sfid": _frechet("sfid", "sFID", "spatial"),
    "fd": _frechet("fd", "Fréchet distance", "pool"),
    "fid-infinity": Measure(_POOL, _POOL_STATISTICS, _infinity),
    "is": Measure(Wanted(rows=frozenset({"logits"})), Wanted(), _inception_score),
    "kid": Measure(_POOL, _POOL, _kernel),
    "precision-recall": Measure(_POOL, _POOL, _precision_recall),
    "density-coverage": Measure(_POOL, _POOL, _density_coverage),
    "cmmd": Measure(_POOL, _POOL, _cmmd),
}


def chosen_metrics(names: Sequence[str]) -> tuple[dict[str, Measure], dict[str, PairMetric]]:
    """What the names stand for: measures of this module, and metrics of pairs, components of the kind `metric`.

    `psnr-pooled` is made of what `psnr` gives.

    Raises:
        UserError: an unknown name, or a metric whose weights are missing.
    """
    measures, pairs = {}, {}
    for name in names:
        if name in MEASURES:
            measures[name] = MEASURES[name]
            continue
        component = "psnr" if name == POOLED else name
        if component not in registry().names("metric"):
            known = ", ".join([*MEASURES, *registry().names("metric"), POOLED])
            raise UserError(f"unknown metric {name!r}; there are {known}")
        pairs[name] = registry().options("metric", component)().build()
    return measures, pairs


def union(parts: Iterable[Wanted]) -> Wanted:
    """All that any of them wants."""
    whole = Wanted()
    for part in parts:
        whole |= part
    return whole

"""The figures that `smalti evaluate images` can tell of two sets of features, by name.

Legend: N samples, D feature width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Literal, NamedTuple

from torch import Tensor

from smalti.core.contracts import PairMetric
from smalti.core.errors import UserError
from smalti.core.plugins import registry
from smalti.eval import class_metrics, density_coverage, inception_score, kernel_distance, precision_recall
from smalti.eval.confidence import bootstrap, bootstrap_of_mean, frechet_infinity
from smalti.eval.extraction import Extracted, Wanted
from smalti.eval.frechet import FRECHET_DEFINITION, frechet_distance, statistics_of
from smalti.eval.protocols import Protocol

KERNEL_SUBSETS, KERNEL_SIZE = 100, 1000  # of torch-fidelity and clean-fid
DENSITY_NEIGHBOURS = 5  # of the authors
POOLED = "psnr-pooled"


class Finding(NamedTuple):
    """A number with what it means, as in `smalti.eval.figures.Figure`."""

    name: str
    title: str
    value: float
    definition: str
    better: Literal["higher", "lower"] = "lower"
    unit: str = ""
    interval: tuple[float, float] | None = None
    parts: Mapping[str, float] = MappingProxyType({})
    warning: str = ""


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
                lambda rows: frechet_distance(statistics_of(rows), reference), samples.rows[feature], repeats
            )
            interval = found.ends
        value = frechet_distance(samples.statistics[feature], reference)
        yield Finding(name, title, value, FRECHET_DEFINITION, interval=interval)

    wanted = Wanted(statistics=frozenset({feature}))
    return Measure(wanted, wanted, compute)


def _infinity(samples: Extracted, references: Extracted, protocol: Protocol, repeats: int) -> Iterable[Finding]:
    found = frechet_infinity(samples.rows["pool"], references.statistics["pool"], seed=protocol.seed)
    text = f"{FRECHET_DEFINITION}; extrapolated to infinitely many samples (Chong and Forsyth 2020)"
    yield Finding("fid-infinity", "FID∞", found.value, text)


def _inception_score(samples: Extracted, references: Extracted, protocol: Protocol, repeats: int) -> Iterable[Finding]:
    logits = samples.rows["logits"]
    if protocol.inception_score == "adm":
        measure, text = inception_score.adm_inception_score, inception_score.adm_definition()
    else:
        measure = partial(inception_score.inception_score, seed=protocol.seed)
        text = inception_score.definition(seed=protocol.seed)
    score = measure(logits)
    interval = bootstrap(lambda rows: measure(rows).mean, logits, repeats).ends if repeats else None
    text += f", their standard deviation {score.std:.4g}"
    yield Finding("is", "Inception Score", score.mean, text, better="higher", interval=interval)


def _kernel(samples: Extracted, references: Extracted, protocol: Protocol, repeats: int) -> Iterable[Finding]:
    own, others = samples.rows["pool"], references.rows["pool"]
    size = min(KERNEL_SIZE, len(own), len(others))

    def measure(rows: Tensor) -> inception_score.Score:
        return kernel_distance.kernel_distance_of_subsets(rows, others, KERNEL_SUBSETS, size, protocol.seed)

    score = measure(own)
    interval = bootstrap(lambda rows: measure(rows).mean, own, repeats).ends if repeats else None
    text = kernel_distance.definition_of_subsets(KERNEL_SUBSETS, size, protocol.seed)
    text += f", their standard deviation {score.std:.4g}"
    yield Finding("kid", "KID", score.mean, text, interval=interval)


def _precision_recall(samples: Extracted, references: Extracted, protocol: Protocol, repeats: int) -> Iterable[Finding]:
    own, others = samples.rows["pool"], references.rows["pool"]
    found = precision_recall.memberships(own, others, protocol.neighbours, protocol.distances)
    value = precision_recall.shares(found)
    text = precision_recall.definition(protocol.neighbours, protocol.distances)
    ends = [bootstrap_of_mean(inside, repeats).ends if repeats else None for inside in found]
    yield Finding("precision", "Precision", value.precision, text, "higher", "share", ends[0])
    yield Finding("recall", "Recall", value.recall, text, "higher", "share", ends[1])


def _density_coverage(samples: Extracted, references: Extracted, protocol: Protocol, repeats: int) -> Iterable[Finding]:
    found = density_coverage.balls(samples.rows["pool"], references.rows["pool"], DENSITY_NEIGHBOURS)
    value = density_coverage.shares(found, DENSITY_NEIGHBOURS)
    text = density_coverage.definition(DENSITY_NEIGHBOURS)
    each = (found.counts / DENSITY_NEIGHBOURS, found.covered)
    ends = [bootstrap_of_mean(values, repeats).ends if repeats else None for values in each]
    yield Finding("density", "Density", value.density, text, "higher", interval=ends[0])
    yield Finding("coverage", "Coverage", value.coverage, text, "higher", "share", ends[1])


def _cmmd(samples: Extracted, references: Extracted, protocol: Protocol, repeats: int) -> Iterable[Finding]:
    own, others = samples.rows["pool"], references.rows["pool"]
    value = kernel_distance.cmmd(own, others)
    interval = bootstrap(lambda rows: kernel_distance.cmmd(rows, others), own, repeats).ends if repeats else None
    yield Finding("cmmd", "CMMD", value, kernel_distance.CMMD_DEFINITION, interval=interval)


def _by_class(name: str, title: str) -> Measure:
    def compute(samples: Extracted, references: Extracted, protocol: Protocol, repeats: int) -> Iterable[Finding]:
        found = class_metrics.class_frechet_distances(
            samples.rows["pool"], samples.labels, references.rows["pool"], references.labels
        )
        parts = {f"class {label}": value for label, value in found.by_class.items()}
        text = f"{class_metrics.CLASS_FRECHET_DEFINITION}; mean over {len(parts)} classes"
        yield Finding(name, title, found.mean, text, parts=parts, warning=found.warning)

    wanted = Wanted(rows=frozenset({"pool"}), labels=True)
    return Measure(wanted, wanted, compute)


def _accuracy(samples: Extracted, references: Extracted, protocol: Protocol, repeats: int) -> Iterable[Finding]:
    logits, labels = samples.rows["logits"], samples.labels
    value = class_metrics.accuracy(logits, labels)
    parts = {
        f"class {label}": class_metrics.accuracy(logits[labels == label], labels[labels == label])
        for label in labels.unique().tolist()
    }
    text = "share of the images to which the classifier gives the class that they are of, or were drawn for"
    ends = bootstrap_of_mean(logits.argmax(1) == labels, repeats).ends if repeats else None
    yield Finding("accuracy", "Classifier accuracy", value, text, "higher", "share", ends, parts)


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
    "class-fid": _by_class("class-fid", "FID by class"),
    "class-fd": _by_class("class-fd", "FD by class"),
    "accuracy": Measure(Wanted(rows=frozenset({"logits"}), labels=True), Wanted(), _accuracy),
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

"""From two sets of images to figures that carry their protocol.

Legend: N images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from smalti.core import distributed
from smalti.core.contracts import Features
from smalti.core.errors import UserError, few
from smalti.core.options import Preprocessing
from smalti.core.progress import Reporter
from smalti.eval.evaluation_record import extractor_record, protocol_record, reference_record, warnings
from smalti.eval.evaluation_sides import (
    Asked,
    opened_images,
    opened_references,
    opened_statistics,
    opened_tokenizer,
)
from smalti.eval.extraction import Extracted, Wanted, extract
from smalti.eval.figures import Figure, library_versions
from smalti.eval.image_pairs import ImagePairs, PairResults
from smalti.eval.image_source import ImageSource
from smalti.eval.inception import Inception
from smalti.eval.measures import Measure, chosen_metrics, union
from smalti.eval.reference_statistics import StatisticsFile


@dataclass(frozen=True)
class Evaluation:
    """Figures, what they depend on as plain data, and what the report shows beside them.

    Attributes:
        figures: what was measured.
        record: all that they depend on; a result that may be compared has `smalti.eval.comparison.DECIDING`.
        title: of the report.
        summary: its first sentence.
        pairs: images beside their references.
        code_counts: of each stream of tokens, how often each of its K codes occurs.
        warnings: what makes the figures less than they seem.
    """

    figures: list[Figure]
    record: dict[str, Any]
    title: str = ""
    summary: str = ""
    pairs: PairResults | None = None
    code_counts: Sequence[Sequence[int]] = ()
    warnings: list[str] = field(default_factory=list)

    def content(self) -> dict[str, Any]:
        """The result as JSON."""
        figures = {figure.name: figure.model_dump(mode="json", exclude={"name"}) for figure in self.figures}
        return {**self.record, "warnings": self.warnings, "figures": figures}


@torch.inference_mode()
def evaluate_images(asked: Asked, reporter: Reporter) -> Evaluation:
    """Measure images against a reference; all processes must call it, the first one gets the figures.

    Whatever can be wrong without looking at an image is told first: names, weights, files.

    Raises:
        UserError: anything that is missing, broken or does not go together.
    """
    protocol = asked.protocol
    measures, pair_metrics = chosen_metrics(asked.metrics or protocol.metrics)
    extractor = protocol.extractor.build().to(asked.device).eval()
    statistics = opened_statistics(asked.reference, extractor, protocol)
    tokenizer = opened_tokenizer(asked)
    preprocessing = protocol.preprocessing or (tokenizer.preprocessing if tokenizer is not None else None)
    references = opened_references(asked, statistics, measures, preprocessing, needed=bool(pair_metrics or tokenizer))
    images = opened_images(asked, tokenizer, references, preprocessing)
    pairs = None
    if pair_metrics:
        assert references is not None  # they were needed
        _check_pairs(min(pair_metrics), images, references)
        pairs = ImagePairs(pair_metrics, references, asked.batch_size, asked.device)
    if "accuracy" in measures and isinstance(extractor, Inception):
        raise UserError(
            "accuracy needs a classifier of the images' own classes, and FID's Inception has 1008 others: take "
            "--protocol classifier extractor.folder=RUN/evaluation/classifier"
        )
    _check_classes(images, references, measures)
    given = _measured_references(asked, references, statistics, extractor, measures, reporter, paired=pairs is not None)
    wanted = union(measure.samples for measure in measures.values())
    if asked.repeats:
        wanted |= Wanted(rows=wanted.statistics)
    watch = pairs.watch if pairs is not None else None
    found = extract(images, extractor, wanted, asked.batch_size, asked.device, reporter, watch=watch)
    results = pairs.results(protocol.batch_size, asked.repeats) if pairs is not None else None
    if distributed.rank() != 0:
        return Evaluation([], {})
    return _evaluation(asked, measures, extractor, images, found, statistics, given, results, preprocessing)


def _check_pairs(name: str, images: ImageSource, references: ImageSource) -> None:
    """Raise a `UserError` unless the images can have counterparts."""
    if images.made_by == "generator":
        raise UserError(f"{name} compares pairs, but samples of a generator have no counterparts")
    if len(images) != len(references):
        raise UserError(f"{name} compares pairs, but there are {len(images)} images and {len(references)} references")


def _check_classes(images: ImageSource, references: ImageSource | None, measures: Mapping[str, Measure]) -> None:
    """Raise a `UserError` where classes are wanted that a source does not tell, or that are others on both sides."""
    for name, measure in measures.items():
        if measure.samples.labels:
            _check_labels(images)
        if measure.references.labels:
            assert references is not None
            _check_labels(references)
            if images.classes and references.classes and images.classes != references.classes:
                raise UserError(
                    f"{name} compares class by class, but {images.title} has the classes {few(images.classes)} and "
                    f"{references.title} {few(references.classes)}"
                )


def _check_labels(source: ImageSource) -> None:
    labels = source.labels  # a `UserError` where it does not tell them
    assert len(labels) == len(source)


def _measured_references(
    asked: Asked,
    references: ImageSource | None,
    statistics: StatisticsFile | None,
    extractor: Features,
    measures: Mapping[str, Measure],
    reporter: Reporter,
    *,
    paired: bool,
) -> Extracted:
    """Features of the reference; statistics of a file take the place of those of its images.

    References that are only counterparts are counted and hashed: results with others are not comparable.
    """
    wanted = union(measure.references for measure in measures.values())
    if statistics is not None:
        wanted, paired = Wanted(rows=wanted.rows, labels=wanted.labels), False  # the file is hashed
    if references is None or not (wanted.rows or wanted.statistics or paired):
        found = Extracted(0)
    else:
        found = extract(references, extractor, wanted, asked.batch_size, asked.device, reporter, "reference")
    if statistics is not None:
        found.statistics = statistics.statistics
    return found


def _evaluation(
    asked: Asked,
    measures: Mapping[str, Measure],
    extractor: Features,
    images: ImageSource,
    found: Extracted,
    statistics: StatisticsFile | None,
    given: Extracted,
    pairs: PairResults | None,
    preprocessing: Preprocessing | None,
) -> Evaluation:
    protocol = asked.protocol
    reference = reference_record(asked.reference, statistics, given)
    identity = extractor_record(extractor, protocol)
    measured = f"{found.count} images: {images.title}"
    against = f"{reference['count'] or 'an unknown number of'} images: {reference['source']}"
    figures = [
        Figure(
            **finding._asdict(),
            measured=measured,
            reference="" if measure.references == Wanted() else against,
            extractor=f"{identity['name']} {identity['fingerprint']}",
        )
        for measure in measures.values()
        for finding in measure.compute(found, given, protocol, asked.repeats)
    ]
    figures += [
        Figure(**finding._asdict(), measured=measured, reference=f"their counterparts in {against}")
        for finding in (pairs.findings if pairs is not None else [])
    ]
    record = {
        "protocol": protocol_record(protocol, preprocessing),
        "extractor": identity,
        "images": {
            "source": images.title,
            "made_by": images.made_by,
            "count": found.count,
            "sha256": found.sha256,
            "jpegs": found.jpegs,
        },
        "reference": reference,
        "batch_size": asked.batch_size,
        "processes": distributed.world_size(),
        "device": asked.device,
        "libraries": library_versions(),
    }
    told = warnings(asked.protocol, extractor, images, found, statistics)
    told += [f"{figure.title}: {figure.warning}" for figure in figures if figure.warning]
    title = f"{found.count} images, protocol {protocol.name}"
    if statistics is None:
        about = f"{given.count} images" if given.count else "which no figure looks at"
    else:
        about = f"statistics of {statistics.count or 'an unknown number of'} images"
    summary = f"{images.title} against {asked.reference} ({about})."
    return Evaluation(figures, record, title, summary, pairs, warnings=told)

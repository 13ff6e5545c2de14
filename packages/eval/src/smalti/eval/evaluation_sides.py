"""The two sides of an evaluation: what is measured, and what it is measured against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from smalti.core.contracts import Features, Tokenizer
from smalti.core.errors import UserError
from smalti.core.options import Preprocessing
from smalti.eval.evaluation_record import protocol_record
from smalti.eval.image_source import ImageSource, stored_images
from smalti.eval.made_images import GeneratorImages, TokenizerImages
from smalti.eval.measures import Measure, union
from smalti.eval.npz_images import IMAGES, array_names
from smalti.eval.protocols import Protocol
from smalti.eval.reference_statistics import StatisticsFile, is_statistics, read_statistics

TOKENIZER, GENERATOR = "tokenizer:", "generator:"


@dataclass(frozen=True)
class Asked:
    """What an evaluation is asked for.

    Args:
        images: a folder, tar shards, an `.npz` file, `tokenizer:NAME` or `generator:RUN`.
        reference: a folder, tar shards, or an `.npz` file of images, statistics or both.
        protocol: how.
        metrics: names instead of the protocol's.
        count: take only so many images, the first ones; of a generator, draw so many.
        batch_size: images taken at once.
        repeats: resamplings of confidence intervals, 0 for none.
        device: of all networks.
    """

    images: str
    reference: str
    protocol: Protocol
    metrics: Sequence[str] = ()
    count: int | None = None
    batch_size: int = 32
    repeats: int = 0
    device: str = "cpu"


def opened_statistics(reference: str, extractor: Features, protocol: Protocol) -> StatisticsFile | None:
    """The reference's statistics, None where it holds images only.

    Raises:
        UserError: damaged, or made by another extractor or with another preprocessing.
    """
    path = Path(reference)
    if not reference.endswith(".npz") or not is_statistics(path):
        return None
    found = read_statistics(path)
    if found.protocol is not None:
        try:
            made, known = found.protocol["extractor"]["fingerprint"], found.protocol["protocol"]["preprocessing"]
        except (KeyError, TypeError):
            raise UserError(f"{path} is damaged: what it says of its making lacks extractor or preprocessing") from None
        if made != extractor.fingerprint:
            raise UserError(
                f"{path} was made with the extractor {made}, protocol {protocol.name} has {extractor.fingerprint}: "
                f"make others with `smalti evaluate stats --protocol {protocol.name}`"
            )
        wanted = protocol_record(protocol, protocol.preprocessing)
        if known != wanted["preprocessing"]:
            raise UserError(
                f"{path} was made with the preprocessing {known}, protocol {protocol.name} has "
                f"{wanted['preprocessing']}"
            )
    return found


def opened_tokenizer(asked: Asked) -> Tokenizer | None:
    """The tokenizer whose reconstructions are measured, None where others are."""
    if not asked.images.startswith(TOKENIZER):
        return None
    return Tokenizer.from_pretrained(asked.images.removeprefix(TOKENIZER)).to(asked.device)


def opened_references(
    asked: Asked,
    statistics: StatisticsFile | None,
    measures: Mapping[str, Measure],
    preprocessing: Preprocessing | None,
    *,
    needed: bool,
) -> ImageSource | None:
    """The reference's images, None where its statistics are enough.

    Raises:
        UserError: images or statistics that are needed are missing.
    """
    for prefix in (TOKENIZER, GENERATOR):
        if asked.reference.startswith(prefix):
            raise UserError(f"the reference must be stored images or statistics, got {asked.reference}")
    count = asked.count if asked.images.startswith(TOKENIZER) else None
    if statistics is None:
        return stored_images(asked.reference, preprocessing, count)
    wanted = union(measure.references for measure in measures.values())
    missing = sorted(wanted.statistics - statistics.statistics.keys())
    if missing:
        raise UserError(f"{statistics.path} has no statistics of the features {missing[0]!r}")
    if not wanted.rows and not needed:
        return None
    if not statistics.images:
        name = next((name for name, measure in measures.items() if measure.references.rows), "a reconstruction")
        raise UserError(f"{name} needs the images of the reference, but {statistics.path} holds statistics only")
    return stored_images(asked.reference, preprocessing, count)


def opened_images(
    asked: Asked, tokenizer: Tokenizer | None, references: ImageSource | None, preprocessing: Preprocessing | None
) -> ImageSource:
    """The images that are measured; errors as their sources."""
    if asked.images.startswith(GENERATOR):
        return GeneratorImages(Path(asked.images.removeprefix(GENERATOR)), asked.count, asked.device)
    if tokenizer is not None:
        assert references is not None
        return TokenizerImages(tokenizer, asked.images.removeprefix(TOKENIZER), references, asked.device)
    path = Path(asked.images)
    if path.suffix == ".npz" and is_statistics(path) and IMAGES not in array_names(path):
        raise UserError(f"{asked.images} holds statistics: give images first, the reference second")
    return stored_images(asked.images, preprocessing, asked.count)

"""What a result says beside its figures: all that they depend on, and what makes them less than they seem."""

from __future__ import annotations

from typing import Any

from smalti.core.contracts import Features
from smalti.core.options import Preprocessing
from smalti.eval.extraction import Extracted
from smalti.eval.image_source import ImageSource
from smalti.eval.inception import Inception
from smalti.eval.protocols import Protocol
from smalti.eval.reference_statistics import StatisticsFile
from smalti.eval.resize_for_inception import RESIZE_DEFINITIONS

FEWEST = 10_000
VIRTUAL_IMAGES = 10_000  # beside the statistics in ADM's reference batches


def extractor_record(extractor: Features, protocol: Protocol) -> dict[str, Any]:
    """What identifies an extractor in results."""
    record = {"name": protocol.extractor.name, "fingerprint": extractor.fingerprint}
    if isinstance(extractor, Inception):
        options = extractor.options
        record |= {
            "weights_sha256": extractor.weights_sha256,
            "resize": RESIZE_DEFINITIONS[options.resize],
            "precision": options.precision,
        }
    return record


def protocol_record(protocol: Protocol, preprocessing: Preprocessing | None) -> dict[str, Any]:
    """A protocol as plain data, with the preprocessing that was really used."""
    record = protocol.model_dump(mode="json", exclude={"extractor"})
    return record | {"preprocessing": preprocessing.model_dump(mode="json") if preprocessing else None}


def reference_record(source: str, statistics: StatisticsFile | None, given: Extracted) -> dict[str, Any]:
    """What identifies the reference."""
    if statistics is None:
        return {"source": source, "kind": "images", "count": given.count, "sha256": given.sha256}
    return {
        "source": source,
        "kind": "statistics",
        "count": statistics.count,
        "sha256": statistics.sha256,
        "images": given.count if given.rows else None,
    }


def warnings(
    protocol: Protocol, extractor: Features, images: ImageSource, found: Extracted, statistics: StatisticsFile | None
) -> list[str]:
    """What makes the figures less than they seem."""
    told = []
    if found.count < FEWEST:
        told.append(
            f"{found.count} images are fewer than {FEWEST}: distances are biased upwards, compare them only with "
            "those of as many images"
        )
    elif found.count != protocol.images:
        told.append(f"{found.count} images, published figures of protocol {protocol.name} have {protocol.images}")
    is_reconstruction = images.made_by == "tokenizer" or protocol.name.startswith("rfid")
    if is_reconstruction and statistics is not None and statistics.images == VIRTUAL_IMAGES:
        told.append(
            f"{statistics.path} looks like ADM's virtual batch, a reference for samples (gFID): rFID is measured "
            "against the originals themselves"
        )
    if found.jpegs:
        told.append(f"{found.jpegs} of {found.count} images are stored as JPEG, whose artefacts change the figures")
    if isinstance(extractor, Inception) and not extractor.published_weights:
        told.append("the Inception weights are not the published ones: no figure in their features is FID")
    if isinstance(extractor, Inception) and extractor.options.precision == "bfloat16":
        told.append("bfloat16 features are off by some thousandths: for screening only")
    return told

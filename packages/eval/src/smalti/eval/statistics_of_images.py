"""Making the statistics of a reference once, in a file whose name tells what they are."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from smalti.core import distributed
from smalti.core.progress import Reporter
from smalti.eval.evaluation_record import extractor_record, protocol_record
from smalti.eval.extraction import Wanted, extract
from smalti.eval.figures import library_versions
from smalti.eval.image_source import stored_images
from smalti.eval.inception import Inception
from smalti.eval.protocols import Protocol
from smalti.eval.reference_statistics import write_statistics


@torch.inference_mode()
def statistics_of_images(
    images: str, protocol: Protocol, folder: Path, count: int | None, batch_size: int, device: str, reporter: Reporter
) -> Path:
    """Write `NAME-PROTOCOL-COUNT-HASH.npz`; the first process writes, all must call it.

    The hash is that of all pixels in order. The file also tells the protocol, the extractor and the versions.

    Raises:
        UserError: missing weights, missing or broken images.
    """
    extractor = protocol.extractor.build().to(device).eval()
    source = stored_images(images, protocol.preprocessing, count)
    features = {"pool", "spatial"} if isinstance(extractor, Inception) else {"pool"}
    found = extract(source, extractor, Wanted(frozenset(features)), batch_size, device, reporter)
    name = re.sub(r"[^\w.]+", "-", f"{Path(images).stem} {protocol.name} {found.count} {found.sha256[:8]}")
    path = folder / f"{name}.npz"
    if distributed.rank() == 0:
        record = {
            "protocol": protocol_record(protocol, protocol.preprocessing),
            "extractor": extractor_record(extractor, protocol),
            "images": {"source": images, "count": found.count, "sha256": found.sha256},
            "libraries": library_versions(),
        }
        write_statistics(path, found.statistics, found.count, record)
    return path

"""Features of all images of a source, by any number of processes.

Legend: N images, B batch, D feature width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from smalti.core import distributed
from smalti.core.contracts import Features
from smalti.core.errors import UserError
from smalti.core.progress import Reporter
from smalti.eval.feature_rows import check_features
from smalti.eval.frechet import Gaussian, GaussianStatistics
from smalti.eval.image_source import ImageBatch, ImageSource


@dataclass(frozen=True)
class Wanted:
    """Names of the features whose mean and covariance are wanted, of those wanted one by one, and whether classes."""

    statistics: frozenset[str] = frozenset()
    rows: frozenset[str] = frozenset()
    labels: bool = False

    def __or__(self, other: Wanted) -> Wanted:
        return Wanted(self.statistics | other.statistics, self.rows | other.rows, self.labels or other.labels)


@dataclass
class Extracted:
    """What was found out about the images of a source; on the first process all of it.

    Attributes:
        count: how many images there are.
        statistics: mean and covariance by name of the feature.
        rows: features `(N, D)` by name, in the order of the images.
        labels: their classes, int64 `(N,)`; empty unless they are wanted.
        sha256: of size and pixels of all images in order.
        jpegs: how many are stored as JPEG.
    """

    count: int
    statistics: Mapping[str, Gaussian] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    labels: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    sha256: str = ""
    jpegs: int = 0


def extract(
    source: ImageSource,
    extractor: Features,
    wanted: Wanted,
    batch_size: int,
    device: str,
    reporter: Reporter,
    title: str = "images",
    watch: Callable[[ImageBatch], None] | None = None,
) -> Extracted:
    """Show all images to the extractor, where features are wanted, and each batch to `watch`.

    Every process takes its share of the batches. Statistics are merged in float64 and rows come in the order of the
    images, so that neither the batch size nor the number of processes matters beyond what the network's own
    rounding makes of it. All processes must call it.

    Raises:
        UserError: an extractor without a wanted feature, features that are not finite, or what the source raises.
    """
    rank, world_size = distributed.rank(), distributed.world_size()
    names = wanted.statistics | wanted.rows
    statistics = {name: GaussianStatistics() for name in sorted(wanted.statistics)}
    rows: dict[str, Tensor] = {}
    digests: dict[int, bytes] = {}
    jpegs, seen = 0, 0
    share = source.share(batch_size, rank, world_size)
    order: list[Tensor] = []
    with reporter.progress(title, share, unit="image") as advance:
        for batch in source.batches(batch_size, rank, world_size):
            features = extractor(batch.images.to(device)) if names else {}
            missing = names - features.keys()
            if missing:
                raise UserError(f"the extractor gives no {min(missing)!r}, only {', '.join(features)}")
            for name, accumulator in statistics.items():
                accumulator.update(features[name])
            for name in wanted.rows:
                check_features(features[name], seen)
                rows[name] = _with(rows.get(name), seen, features[name].float().cpu(), share)
            order.append(batch.indices)
            for place, image in zip(batch.indices.tolist(), batch.images, strict=True):
                digests[place] = _digest(image)
            jpegs, seen = jpegs + batch.jpegs, seen + len(batch.images)
            advance(len(batch.images))
            if watch is not None:
                watch(batch)
    places = torch.cat(order) if order else torch.empty(0, dtype=torch.int64)
    own = {name: rows.get(name, torch.empty(0, 0)) for name in sorted(wanted.rows)}
    labels = source.labels if wanted.labels else torch.empty(0, dtype=torch.int64)
    return _merged(Extracted(seen, statistics, own, labels, "", jpegs), places, digests)


def _with(rows: Tensor | None, seen: int, features: Tensor, share: int) -> Tensor:
    """`rows` with features from row `seen` on; room for all is made once, and nothing is copied at the end."""
    if rows is None:
        rows = features.new_empty(share, features.shape[1])
    rows[seen : seen + len(features)] = features
    return rows


def _digest(image: Tensor) -> bytes:
    digest = hashlib.sha256(f"{image.shape[0]}x{image.shape[1]}".encode())
    digest.update(image.contiguous().numpy().data)
    return digest.digest()


def _merged(found: Extracted, places: Tensor, digests: dict[int, bytes]) -> Extracted:
    """What all processes found, in the order of the images; rows on the first process only."""
    parts = distributed.gather_objects((found.count, found.statistics, found.jpegs, digests))
    statistics = {name: GaussianStatistics() for name in found.statistics}
    for _, others, *_ in parts:
        for name, accumulator in statistics.items():
            other = others[name]
            assert isinstance(other, GaussianStatistics)
            accumulator.merge(other)
    known = {place: digest for *_, own in parts for place, digest in own.items()}
    whole = hashlib.sha256(b"".join(known[place] for place in sorted(known)))
    return Extracted(
        sum(count for count, *_ in parts),
        statistics,
        {name: gathered_rows(values, places) for name, values in found.rows.items()},
        found.labels,
        whole.hexdigest(),
        sum(jpegs for _, _, jpegs, _ in parts),
    )


def gathered_rows(rows: Tensor, places: Tensor) -> Tensor:
    """Rows `(B, ...)` of all processes in the order of their `places` `(B,)`; on the first process, elsewhere empty."""
    if not dist.is_initialized():
        return rows if bool((places[1:] > places[:-1]).all()) else rows[places.argsort()]
    first = distributed.rank() == 0
    parts: list[tuple[Tensor, Tensor]] | None = [(rows, places)] * distributed.world_size() if first else None
    dist.gather_object((rows, places), parts)
    if parts is None:
        return rows[:0]
    joined = torch.cat([part for part, _ in parts if len(part)])
    return joined[torch.cat([order for part, order in parts if len(part)]).argsort()]

"""Images against their references, one by one: every metric of pairs, and which images came out worst and best.

Legend: N images, B batch, C channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from smalti.core import distributed
from smalti.core.contracts import PairMetric
from smalti.core.errors import UserError
from smalti.eval.confidence import bootstrap, bootstrap_of_mean
from smalti.eval.extraction import gathered_rows
from smalti.eval.image_source import ImageBatch, ImageSource
from smalti.eval.measures import POOLED, Finding
from smalti.eval.pairwise import POOLED_PSNR_DEFINITION, PSNR_CAP, psnr

SHOWN = 8
TITLES = {
    "psnr": "PSNR",
    "ssim": "SSIM",
    "ms-ssim": "MS-SSIM",
    "lpips": "LPIPS",
    "ssim-uniform": "SSIM, flat window",
    "ssim-reflected": "SSIM, mirrored borders",
}
LOWER = ("lpips",)


class Pair(NamedTuple):
    """An image and its reference, uint8 `(H, W, 3)`, with its PSNR and its place."""

    psnr: float
    place: int
    name: str
    image: Tensor
    reference: Tensor


class PairResults(NamedTuple):
    """Findings, the PSNR of every image `(N,)`, and the images with the lowest and the highest."""

    findings: list[Finding]
    psnr: Tensor
    worst: list[Pair]
    best: list[Pair]


class ImagePairs:
    """Watches the batches of one source and takes its counterparts from another one.

    Args:
        metrics: by name, on their device.
        references: as many images as are watched, in the same order.
        batch_size: the same as that of the watched batches.
        device: of the metrics.
    """

    def __init__(
        self, metrics: Mapping[str, PairMetric], references: ImageSource, batch_size: int, device: str
    ) -> None:
        self.metrics, self.device = metrics, device
        self._others = references.batches(batch_size, distributed.rank(), distributed.world_size())
        self._title = references.title
        self._values: dict[str, list[Tensor]] = {name: [] for name in metrics}
        self._psnr: list[Tensor] = []
        self._places: list[Tensor] = []
        self._worst: list[Pair] = []
        self._best: list[Pair] = []

    def watch(self, batch: ImageBatch) -> None:
        """Compare a batch.

        Raises:
            UserError: the counterparts have other names or sizes.
        """
        other = self._counterparts(batch)
        planes = [part.movedim(-1, 1).to(self.device) for part in (batch.images, other.images)]
        for name, metric in self.metrics.items():
            self._values[name].append(metric.compute(*planes).double().cpu())
        noise = psnr(*planes).cpu()
        self._psnr.append(noise)
        self._places.append(batch.indices)
        for place, value in enumerate(noise.tolist()):
            self._keep(value, batch, other, place)

    def _counterparts(self, batch: ImageBatch) -> ImageBatch:
        other = next(self._others)
        own, given = batch.images.shape, other.images.shape
        if own != given:
            # A batch holds images of one size: the shorter of two ends where the sizes part.
            place = int(batch.indices[0]) + (min(own[0], given[0]) if own[1:] == given[1:] else 0)
            raise UserError(
                f"image {place} and its counterpart in {self._title} are of different sizes: metrics of pairs need "
                "both of one size, as a protocol with a crop makes them"
            )
        for name, counterpart in zip(batch.names, other.names, strict=True):
            if name.isdecimal() or counterpart.isdecimal():
                continue
            if PurePath(name).stem != PurePath(counterpart).stem:
                raise UserError(
                    f"metrics of pairs need the images in the same order, but {name} would be compared with "
                    f"{counterpart}: give the reconstructions the names of their originals"
                )
        return other

    def _keep(self, value: float, batch: ImageBatch, other: ImageBatch, place: int) -> None:
        full = len(self._worst) == SHOWN
        if full and self._worst[-1].psnr <= value <= self._best[-1].psnr:
            return
        pair = Pair(
            value,
            int(batch.indices[place]),
            batch.names[place],
            batch.images[place].clone(),
            other.images[place].clone(),
        )
        self._worst = sorted([*self._worst, pair], key=lambda known: (known.psnr, known.place))[:SHOWN]
        self._best = sorted([*self._best, pair], key=lambda known: (-known.psnr, known.place))[:SHOWN]

    def results(self, pooled_batch: int, repeats: int = 0) -> PairResults:
        """What was found by all processes; every process must call it, the first one gets all.

        Args:
            pooled_batch: images whose error makes one value of `psnr-pooled`.
            repeats: resamplings of confidence intervals, 0 for none.
        """
        places = _joined(self._places, torch.int64)
        noise = gathered_rows(_joined(self._psnr), places)
        findings = []
        for name, metric in self.metrics.items():
            values = gathered_rows(_joined(self._values[name]), places)
            if not len(values):
                continue
            if name == POOLED:
                findings.append(_pooled(values, pooled_batch, repeats))
                continue
            better: Literal["higher", "lower"] = "lower" if name in LOWER else "higher"
            unit = metric.unit if metric.unit != "1" else ""
            title = TITLES.get(name, name)
            ends = bootstrap_of_mean(values, repeats).ends if repeats else None
            findings.append(Finding(name, title, float(values.mean()), metric.definition, better, unit, ends))
        kept = distributed.gather_objects((self._worst, self._best))
        worst = sorted((pair for part, _ in kept for pair in part), key=lambda pair: (pair.psnr, pair.place))
        best = sorted((pair for _, part in kept for pair in part), key=lambda pair: (-pair.psnr, pair.place))
        return PairResults(findings, noise, worst[:SHOWN], best[:SHOWN])


def _pooled(values: Tensor, batch: int, repeats: int) -> Finding:
    """PSNR of the errors of batches, from the PSNR of each image `(N,)`."""

    def measure(rows: Tensor) -> float:
        errors = (10 ** (-rows[:, 0] / 10)).split(batch)
        return float(torch.stack([-10 * part.mean().log10() for part in errors]).clamp(max=PSNR_CAP).mean())

    ends = bootstrap(measure, values[:, None], repeats).ends if repeats else None
    text = f"{POOLED_PSNR_DEFINITION}; batches of {batch}, mean over them"
    return Finding(POOLED, "PSNR, pooled", measure(values[:, None]), text, "higher", "dB", ends)


def _joined(parts: list[Tensor], dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.cat(parts) if parts else torch.empty(0, dtype=dtype)

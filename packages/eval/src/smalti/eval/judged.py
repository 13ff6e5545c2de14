"""What a classifier makes of labelled images, and the figures that follow from it.

Legend: N M images, B batch, H W pixels, D feature width.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from smalti.core.contracts import Features
from smalti.core.errors import UserError
from smalti.core.progress import Advance
from smalti.eval.figures import Figure
from smalti.eval.frechet import FRECHET_DEFINITION, frechet_distance, statistics_of
from smalti.eval.precision_recall import definition, precision_recall


class Judged(NamedTuple):
    """Of N images: `pool` float32 `(N, D)`, `labels` as given and `decisions` of the classifier, int64 `(N,)`."""

    pool: Tensor
    labels: Tensor
    decisions: Tensor

    @property
    def agreement(self) -> float:
        """Share of the images whose decision is their label."""
        return float((self.decisions == self.labels).double().mean())

    def of_class(self, label: int) -> Judged:
        """The images with this label."""
        chosen = self.labels == label
        return Judged(self.pool[chosen], self.labels[chosen], self.decisions[chosen])


def judge(
    classifier: Features, batches: Iterable[tuple[Tensor, Tensor]], what: str, device: str, advance: Advance
) -> Judged:
    """Show images to a classifier.

    Args:
        classifier: with features `pool` and `logits`.
        batches: of images uint8 `(B, H, W, 3)` and labels `(B,)`.
        what: names the images in errors, e.g. `validation images`.
        device: of the classifier.
        advance: told about every batch.

    Raises:
        UserError: fewer than two images.
    """
    pool, labels, decisions = [], [], []
    for images, given in batches:
        features = classifier(images.to(device))
        pool.append(features["pool"].float().cpu())
        labels.append(given)
        decisions.append(features["logits"].argmax(1).cpu())
        advance(len(images))
    if sum(map(len, labels)) < 2:
        raise UserError(f"an evaluation needs 2 {what} or more, got {sum(map(len, labels))}")
    return Judged(torch.cat(pool), torch.cat(labels), torch.cat(decisions))


def measure_samples(
    samples: Judged, validation: Judged, training: Judged, neighbours: int, extractor: str
) -> list[Figure]:
    """Figures of samples against held-out real images, in the features of one classifier.

    Args:
        samples: drawn images, with the labels they were drawn for.
        validation: the reference.
        training: other real images, for what perfect samples would get.
        neighbours: k of precision and recall.
        extractor: names the classifier.
    """
    drawn, held_out = f"{len(samples.labels)} samples", f"{len(validation.labels)} validation images"
    alike = f"{len(training.labels)} training images, of each class as many as in the reference"
    judged = partial(Figure, extractor=extractor)
    compared = partial(judged, reference=f"{held_out}, which the classifier has not seen")
    real = statistics_of(validation.pool)
    shares = precision_recall(samples.pool, validation.pool, neighbours)
    return [
        judged(
            name="classified_as_intended",
            title="Classified as intended",
            value=samples.agreement,
            unit="share",
            definition="share of the samples to which the classifier gives the class that they were drawn for",
            measured=drawn,
        ),
        judged(
            name="classifier_accuracy",
            title="Classifier accuracy",
            value=validation.agreement,
            unit="share",
            definition="share of the images to which the classifier gives their class",
            measured=held_out,
        ),
        compared(
            name="frechet_distance",
            title="Fréchet distance",
            value=frechet_distance(statistics_of(samples.pool), real),
            better="lower",
            definition=FRECHET_DEFINITION,
            measured=drawn,
        ),
        compared(
            name="frechet_distance_real",
            title="Fréchet distance of real images",
            value=frechet_distance(statistics_of(training.pool), real),
            better="lower",
            definition=FRECHET_DEFINITION,
            measured=alike,
        ),
        *(
            compared(
                name=name,
                title=name.title(),
                value=share,
                unit="share",
                definition=definition(neighbours),
                measured=drawn,
            )
            for name, share in shares._asdict().items()
        ),
    ]

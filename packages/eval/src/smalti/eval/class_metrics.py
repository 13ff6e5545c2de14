"""Figures of class-conditional samples: the Frechet distance of every class, and what a classifier says.

Legend: N samples, M references, D width of their features, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from smalti.core.errors import UserError
from smalti.eval.feature_rows import check_features, check_sets
from smalti.eval.frechet import frechet_distance, frechet_distance_of_rows, statistics_of

CLASS_FRECHET_DEFINITION = "Frechet distance of the samples of a class from the references of the same class"
# Up to here the features of a class are compared without a D x D matrix.
FEW = 1000


@dataclass(frozen=True)
class ClassDistances:
    """The Frechet distance `by_class` of every class that has samples, and what to think of them.

    Attributes:
        by_class: the class's label to its distance.
        warning: why the values must not be set beside other FIDs, with the counts; empty where they may.
    """

    by_class: dict[int, float]
    warning: str

    @property
    def mean(self) -> float:
        """The mean over the classes."""
        return fmean(self.by_class.values())


def class_frechet_distances(
    samples: Tensor, labels: Tensor, references: Tensor, reference_labels: Tensor
) -> ClassDistances:
    """The Frechet distance of every class.

    A class has few images, and the distance of few is too large: with n vectors of D values it grows about as D / n,
    whatever the generator does. Values are comparable only for equal counts of samples and of references.

    Args:
        samples: `(N, D)`.
        labels: int64 `(N,)`, the classes that the samples were drawn for.
        references: `(M, D)`.
        reference_labels: int64 `(M,)`.

    Raises:
        UserError: other shapes, values that are not finite, or a class of the samples with fewer than 2 vectors.
    """
    check_sets(samples, references, at_least=2)
    for name, features, given in (("samples", samples, labels), ("references", references, reference_labels)):
        if given.shape != (len(features),):
            raise UserError(f"{len(features)} {name} need as many labels, got {tuple(given.shape)}")
    found, fewest = {}, len(samples)
    for label in labels.unique().tolist():
        own, others = samples[labels == label], references[reference_labels == label]
        fewest = min(fewest, len(own), len(others))
        if min(len(own), len(others)) < 2:
            raise UserError(
                f"class {label} has {len(own)} samples and {len(others)} references: a Frechet distance needs 2 of each"
            )
        found[label] = _distance(own, others)
    return ClassDistances(found, bias_warning(fewest, samples.shape[1]))


def bias_warning(count: int, width: int) -> str:
    """What to say of a Frechet distance of `count` vectors of `width` values; empty from ten times as many on."""
    if count >= 10 * width:
        return ""
    return (
        f"a Frechet distance of {count} vectors of {width} values is biased upwards: compare it only with one of "
        "the same counts"
    )


def _distance(own: Tensor, others: Tensor) -> float:
    if max(len(own), len(others)) <= FEW:
        return frechet_distance_of_rows(own, others)
    return frechet_distance(statistics_of(own), statistics_of(others))


def accuracy(logits: Tensor, labels: Tensor, top: int = 1) -> float:
    """Share of the images whose label is among the `top` classes with the largest logits.

    Args:
        logits: `(N, K)`.
        labels: int64 `(N,)`.
        top: 1 or more; equal logits go to the class with the smaller number.

    Raises:
        UserError: no images, logits that are not finite, or labels that do not go with them.
    """
    check_features(logits)
    if not len(logits) or labels.shape != (len(logits),):
        raise UserError(
            f"accuracy needs logits (N, K) and labels (N,), got {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    if not 1 <= top <= logits.shape[1]:
        raise UserError(f"the top {top} of {logits.shape[1]} classes do not exist")
    if bool(((labels < 0) | (labels >= logits.shape[1])).any()):
        raise UserError(f"labels must be 0 to {logits.shape[1] - 1}, as there are {logits.shape[1]} logits")
    own = logits.gather(1, labels[:, None])
    places = torch.arange(logits.shape[1], device=logits.device)
    before = (logits > own) | ((logits == own) & (places < labels[:, None]))
    return float((before.sum(1) < top).double().mean())

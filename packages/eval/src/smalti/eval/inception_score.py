"""The Inception Score (Salimans et al. 2016) of samples, from the logits of a classifier.

Legend: N samples, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from smalti.core.errors import UserError
from smalti.eval.feature_rows import check_features

DEFINITION = "exp of the mean divergence of the class probabilities of a sample from their mean (Salimans et al. 2016)"


class Score(NamedTuple):
    """Mean and standard deviation (divided by the number of parts) over parts of the samples."""

    mean: float
    std: float


def definition(splits: int = 10, seed: int | None = 2020) -> str:
    """The definition of `inception_score` in words, for protocols."""
    order = "as they come" if seed is None else f"shuffled with seed {seed}"
    return f"{DEFINITION}; mean over {splits} equal parts of the samples, {order}"


def adm_definition(split_size: int = 5000) -> str:
    """That of `adm_inception_score`."""
    return f"{DEFINITION}; mean over parts of {split_size} consecutive samples"


def inception_score(logits: Tensor, splits: int = 10, seed: int | None = 2020) -> Score:
    """The score over equal parts of shuffled samples, as torch-fidelity computes it.

    Args:
        logits: `(N, K)`.
        splits: number of parts; part i has the samples from `i * N // splits` on.
        seed: of NumPy's `RandomState`, whose permutation puts the samples in order; None leaves them as they are.

    Raises:
        UserError: logits that are not finite, or fewer samples than parts.
    """
    check_features(logits)
    count = len(logits)
    if not 1 <= splits <= count:
        raise UserError(f"an Inception Score of {splits} parts needs at least 1 part and as many samples, got {count}")
    if seed is not None:
        order = torch.from_numpy(np.random.RandomState(seed).permutation(count))
        logits = logits[order.to(logits.device)]
    bounds = [part * count // splits for part in range(splits + 1)]
    return _score([logits[start:stop] for start, stop in pairwise(bounds)])


def adm_inception_score(logits: Tensor, split_size: int = 5000) -> Score:
    """The score over parts of consecutive samples, as ADM's evaluator computes it; the last part may be smaller.

    The order of the samples matters: parts that hold a few classes only score less.

    Args:
        logits: `(N, K)`, of an Inception without the bias of its last layer where figures are to agree with ADM's.
        split_size: samples of a part.

    Raises:
        UserError: logits that are not finite, or no samples.
    """
    check_features(logits)
    if not len(logits) or split_size < 1:
        raise UserError(f"an Inception Score needs samples in parts of 1 or more, got {len(logits)} in {split_size}")
    return _score(logits.split(split_size))


def _score(parts: Sequence[Tensor]) -> Score:
    """In float64, and in logarithms, so that no probability is lost."""
    scores = []
    for logits in parts:
        logarithms = logits.double().log_softmax(1)
        mean = logarithms.logsumexp(0) - np.log(len(logits))
        scores.append(float((logarithms.exp() * (logarithms - mean)).sum(1).mean().exp()))
    return Score(float(np.mean(scores)), float(np.std(scores)))

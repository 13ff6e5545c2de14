"""How sure a figure is: bootstrap intervals, and the Frechet distance of infinitely many samples.

Legend: N samples, D width of their features.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from smalti.core.errors import UserError
from smalti.eval.feature_rows import check_features
from smalti.eval.frechet import Gaussian, frechet_distance, statistics_of


class Interval(NamedTuple):
    """A figure with its confidence interval `low` to `high` and the standard `deviation` that this follows from."""

    value: float
    low: float
    high: float
    deviation: float

    @property
    def ends(self) -> tuple[float, float]:
        """`low` and `high`."""
        return self.low, self.high


class Extrapolation(NamedTuple):
    """A figure for infinitely many samples.

    `slope`: of the figure over 1 / N; `residual`: root of the mean squared distance of the points from the line.
    """

    value: float
    slope: float
    residual: float


def bootstrap(
    measure: Callable[[Tensor], float], samples: Tensor, repeats: int = 100, level: float = 0.95, seed: int = 0
) -> Interval:
    """A confidence interval of a figure of samples (Efron 1979): the figure, give or take its spread over resamplings.

    Samples are drawn with replacement, as many as there are. Such a set has fewer different vectors, which shifts
    distances and shares; so the interval lies around the figure of the samples themselves, with the normal
    distribution's multiple of the resamplings' standard deviation, and not between their quantiles.

    Args:
        measure: features `(N, D)` to the figure.
        samples: `(N, D)`.
        repeats: resamplings, 2 or more.
        level: share of such intervals that hold the true value, between 0 and 1.
        seed: of the draws.

    Raises:
        UserError: fewer than 2 samples or repeats, a level outside (0, 1), or values that are not finite.
    """
    check_features(samples)
    if len(samples) < 2 or repeats < 2 or not 0 < level < 1:
        raise UserError(
            "a bootstrap needs 2 samples, 2 repeats and a level between 0 and 1, got "
            f"{len(samples)}, {repeats} and {level}"
        )
    random = np.random.default_rng(seed)
    found = []
    for _ in range(repeats):
        # In their order, which the Inception Score of consecutive samples looks at.
        drawn = torch.from_numpy(np.sort(random.integers(len(samples), size=len(samples)))).to(samples.device)
        found.append(measure(samples[drawn]))
    value, deviation = measure(samples), float(np.std(found, ddof=1))
    reach = NormalDist().inv_cdf((1 + level) / 2) * deviation
    return Interval(value, value - reach, value + reach, deviation)


def bootstrap_of_mean(values: Tensor, repeats: int = 100, level: float = 0.95, seed: int = 0) -> Interval:
    """The same of the mean of one number for each image, `(N,)`; errors as `bootstrap`."""
    return bootstrap(lambda rows: float(rows.mean()), values.double()[:, None], repeats, level, seed)


def frechet_infinity(
    samples: Tensor, reference: Gaussian, points: int = 15, smallest: int = 5000, seed: int = 0
) -> Extrapolation:
    """The Frechet distance of infinitely many samples (Chong and Forsyth 2020, section 3).

    The distance of N samples is too large by about a constant over N. It is measured for random subsets of evenly
    spaced sizes up to all samples; a line through them over 1 / N is read at 0. The reference's own bias stays.

    Args:
        samples: `(N, D)`.
        reference: statistics to compare with.
        points: subsets, 2 or more.
        smallest: samples of the smallest subset, at least 2.
        seed: of the draws.

    Raises:
        UserError: no more samples than `smallest`, fewer than 2 points, or values that are not finite.
    """
    check_features(samples)
    if points < 2 or smallest < 2 or len(samples) <= smallest:
        raise UserError(
            f"an extrapolation needs 2 points or more, and more samples than the smallest subset's {smallest}, got "
            f"{points} points and {len(samples)} samples"
        )
    random = np.random.default_rng(seed)
    sizes = np.linspace(smallest, len(samples), points).astype(int)
    values = []
    for size in sizes.tolist():
        drawn = torch.from_numpy(random.permutation(len(samples))[:size]).to(samples.device)
        values.append(frechet_distance(statistics_of(samples[drawn]), reference))
    design = np.stack([np.ones(points), 1 / sizes], axis=1)
    (value, slope), *_ = np.linalg.lstsq(design, np.array(values), rcond=None)
    residual = np.sqrt(np.mean((design @ [value, slope] - values) ** 2))
    return Extrapolation(float(value), float(slope), float(residual))

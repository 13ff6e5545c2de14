"""The metrics of reconstructions that are computed, and their values.

Legend: B batch, C channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from smalti.core.contracts import PairMetric
from smalti.core.errors import UserError
from smalti.core.plugins import registry


def pair_metrics(names: Sequence[str] = ()) -> dict[str, PairMetric]:
    """Metrics by name; where none are named, the routine ones of all that are installed.

    Raises:
        UserError: a metric that is not installed, or one that lacks something, such as weights.
    """
    found = {name: registry().options("metric", name) for name in names or registry().names("metric")}
    return {name: options().build() for name, options in found.items() if names or options.routine}


def values_of(metric: PairMetric, images: Tensor, references: Tensor) -> list[float] | None:
    """The numbers of B images and references, uint8 `(B, C, H, W)`; None where these are too small for the metric."""
    try:
        values: list[float] = metric.compute(images, references).tolist()
    except UserError:
        return None
    return values

"""The metrics of reconstructions that are computed."""

from __future__ import annotations

from collections.abc import Sequence

from smalti.core.contracts import PairMetric
from smalti.core.plugins import registry


def pair_metrics(names: Sequence[str] = ()) -> dict[str, PairMetric]:
    """Metrics by name; where none are named, the routine ones of all that are installed.

    Raises:
        UserError: a metric that is not installed, or one that lacks something, such as weights.
    """
    found = {name: registry().options("metric", name) for name in names or registry().names("metric")}
    return {name: options().build() for name, options in found.items() if names or options.routine}

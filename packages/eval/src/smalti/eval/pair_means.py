"""The mean of a metric of images and their references, gathered batch by batch.

Legend: N images of the set, B batch, C channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

from torch import Tensor

from smalti.core.contracts import PairMetric
from smalti.eval.feature_rows import FeatureRows


class PairMean:
    """A number for every image against its reference, and their mean.

    Args:
        metric: gives the numbers, for instance that of the component `psnr`.
    """

    def __init__(self, metric: PairMetric) -> None:
        self.metric = metric
        self._found = FeatureRows()

    @property
    def definition(self) -> str:
        """The figure in words, for protocols."""
        return self.metric.definition

    @property
    def values(self) -> Tensor:
        """The number of every image, float64 `(N,)`, by index or in the order of arrival.

        Raises:
            UserError: there are no images, or one was given twice.
        """
        return self._found.rows[:, 0]

    def update(self, images: Tensor, references: Tensor, indices: Tensor | None = None) -> Self:
        """Take in images and references, each uint8 `(B, C, H, W)`, with their places `(B,)` in the whole set.

        Raises:
            UserError: images that the metric cannot take.
        """
        self._found.update(self.metric.compute(images, references).double()[:, None], indices)
        return self

    def compute(self) -> float:
        """The mean over the images that this process saw."""
        return float(self.values.mean())

    def reset(self) -> None:
        """Forget all images."""
        self._found = FeatureRows()

    def merge(self, other: Self) -> None:
        """Take in what another one has seen."""
        self._found.merge(other._found)

    def state_dict(self) -> dict[str, Tensor]:
        """All it has seen."""
        return self._found.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` gave."""
        self._found.load_state_dict(state)

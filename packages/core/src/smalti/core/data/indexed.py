"""Data sets whose records can be had by number."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator

import numpy as np

from smalti.core.data.dataset import ImageDataset, Record


class IndexedDataset(ImageDataset):
    """A set of images that can be read in any order; orders are permutations that PCG64 draws."""

    @abstractmethod
    def record(self, index: int) -> Record:
        """The record with a number in `[0, len(self))`; its image is read when it is asked for."""

    def records(self, order: int | None = None) -> Iterator[Record]:
        """Every record once."""
        return self.records_from(0, order)

    def records_from(self, start: int, order: int | None = None, step: int = 1) -> Iterator[Record]:
        """As promised, at once."""
        indices = np.arange(len(self))
        if order is not None:
            from smalti.core.noise import mixed_seed  # here, because it needs torch, which a stored order does not

            indices = np.random.Generator(np.random.PCG64(mixed_seed(order))).permutation(len(self))
        return map(self.record, indices[start::step].tolist())

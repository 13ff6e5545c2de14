"""A part of a data set with the class counts of another one."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from smalti.core.data.dataset import ImageDataset, Record


class SameClasses(ImageDataset):
    """Of each class as many records as `labels` has, or as many as there are.

    Args:
        dataset: where the records come from.
        labels: int64 `(N,)`.
        order: seed of the order in which records are looked through.
    """

    def __init__(self, dataset: ImageDataset, labels: Tensor, order: int) -> None:
        self.dataset = dataset
        self.name, self.classes = dataset.name, dataset.classes
        self.counts: list[int] = torch.bincount(labels, minlength=len(dataset.classes)).tolist()
        self.order = order

    def records(self, order: int | None = None) -> Iterator[Record]:
        """The chosen records; `order` overrides the seed, and so chooses others."""
        left, missing = list(self.counts), sum(self.counts)
        for record in self.dataset.records(self.order if order is None else order):
            if not missing:
                return
            if left[record.label]:
                left[record.label] -= 1
                missing -= 1
                yield record

    def __len__(self) -> int:
        return sum(self.counts)

"""Sampled images in ADM's layout: one `.npz` with `arr_0`, the images, and `arr_1`, the labels.

Legend: N images, B images of a batch, H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from smalti.core.errors import UserError
from smalti.eval.npz_images import LABELS, NpzImages


class SampleArchive:
    """An `.npz` whose images are read in batches and never lie in memory as a whole.

    Args:
        path: the file.
        classes: labels must lie in `[0, classes)`.

    Raises:
        UserError: no such file, damaged, of another layout, without samples, or a label out of range.

    Attributes:
        shape: `(N, H, W, 3)`.
        labels: int64 `(N,)`.
    """

    def __init__(self, path: str | Path, classes: int) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise UserError(f"{self.path} does not exist: run `smalti sample` first")
        self._images = NpzImages(self.path)
        self.shape = self._images.shape
        labels = self._images.labels()
        if labels is None:
            raise UserError(f"{self.path} has no array {LABELS}")
        if not len(labels):
            raise UserError(f"{self.path} holds no samples: run `smalti sample` again")
        outside = (labels < 0) | (labels >= classes)
        if outside.any():
            first = int(outside.argmax())
            raise UserError(
                f"{self.path}: image {first} has the label {labels[first]}: with {classes} classes, labels are "
                f"0 to {classes - 1}"
            )
        self.labels = torch.from_numpy(labels)

    def __len__(self) -> int:
        return self.shape[0]

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images uint8 `(B, H, W, 3)` with labels `(B,)`, in order; the last batch may be smaller."""
        for start, images in self._images.batches(size):
            yield torch.from_numpy(images), self.labels[start : start + size]

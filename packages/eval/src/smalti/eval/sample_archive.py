"""Sampled images in ADM's layout: one `.npz` with `arr_0`, the images, and `arr_1`, the labels.

Legend: N images, B images of a batch, H W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from smalti.core.errors import UserError
from smalti.eval.npz_images import IMAGES, exactly, opened_member, values_of

LAYOUT = "arr_0 uint8 (N, H, W, 3) and arr_1 integer (N,)"


class SampleArchive:
    """An `.npz` whose images are read in batches and never lie in memory as a whole.

    Args:
        path: the file.
        classes: labels must lie in `[0, classes)`.

    Raises:
        UserError: no such file, damaged, of another layout, or a label out of range.

    Attributes:
        shape: `(N, H, W, 3)`.
        labels: int64 `(N,)`.
    """

    def __init__(self, path: str | Path, classes: int) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise UserError(f"{self.path} does not exist: run `smalti sample` first")
        with opened_member(self.path, "arr_1") as (file, shape, dtype):
            if len(shape) != 1 or dtype.kind not in "iu":
                raise self._wrong(f"its arr_1 is {dtype} {shape}")
            labels = values_of(self.path, file, shape, dtype)
        with opened_member(self.path, IMAGES) as (_, self.shape, dtype):
            if len(self.shape) != 4 or self.shape[3] != 3 or dtype != np.uint8:
                raise self._wrong(f"its arr_0 is {dtype} {self.shape}")
        if len(labels) != self.shape[0] or not len(labels):
            raise self._wrong(f"it holds {self.shape[0]} images and {len(labels)} labels")
        outside = (labels < 0) | (labels >= classes)
        if outside.any():
            first = int(outside.argmax())
            raise UserError(
                f"{self.path}: image {first} has the label {labels[first]}: with {classes} classes, labels are "
                f"0 to {classes - 1}"
            )
        self.labels = torch.from_numpy(labels.astype(np.int64))

    def __len__(self) -> int:
        return self.shape[0]

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images uint8 `(B, H, W, 3)` with labels `(B,)`, in order; the last batch may be smaller."""
        pixels = self.shape[1:]
        with opened_member(self.path, IMAGES) as (file, _, _):
            for labels in self.labels.split(size):
                content = exactly(self.path, file, len(labels) * math.prod(pixels))
                images = np.frombuffer(content, np.uint8).reshape(len(labels), *pixels)
                yield torch.from_numpy(images.copy()), labels

    def _wrong(self, found: str) -> UserError:
        return UserError(f"{self.path} is not in ADM's layout, {LAYOUT}: {found}")

"""Batches of images: endless and shuffled to train on, or once in stored order.

Legend: B batch, C channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smalti.core.data.dataset import ImageDataset, Record
from smalti.core.data.decode import UndecodableImageError, decode
from smalti.core.errors import UserError
from smalti.core.noise import mixed_seed
from smalti.core.options import Preprocessing


class Batch(NamedTuple):
    """`images` float32 `(B, C, H, W)` in [-1, 1], `labels` int64 `(B,)`, `keys` B names."""

    images: Tensor
    labels: Tensor
    keys: list[str]


class IndexedBatch(NamedTuple):
    """As `Batch`; `indices` int64 `(B,)` are the places of the records in stored order."""

    images: Tensor
    labels: Tensor
    keys: list[str]
    indices: Tensor


class TrainBatches:
    """Batches without end for one of several processes, each of `batch_size` images.

    Epoch e reads the records in the order of `mixed_seed(seed, "data", e)`; its record i belongs to process
    `i % world_size`, which alone decodes it. Batches run across the borders of epochs. With the same
    arguments, a loader that takes over another's state continues exactly where that one was.

    Args:
        dataset: where the records come from.
        preprocessing: how they become tensors.
        batch_size: B, of this process.
        seed: of the orders.
        rank: of this process.
        world_size: how many processes share the records.
        max_undecodable: images of one epoch that this process may leave out.
        warn: told about each image that is left out, once.

    Raises:
        UserError: while iterating: an epoch without an image for this process, too many undecodable images,
            or what the dataset raises.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        preprocessing: Preprocessing,
        batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        max_undecodable: int,
        warn: Callable[[str], None],
    ) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self.rank, self.world_size = rank, world_size
        self._decoder = _Decoder(dataset.name, preprocessing, max_undecodable, warn)
        self._epoch = 0
        self._position = 0
        self._stream = self._images()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        rows = [next(self._stream) for _ in range(self.batch_size)]
        return Batch(*_joined(rows))

    def state_dict(self) -> dict[str, int]:
        """Where this process is: the epoch, the records of it that are consumed, those left out."""
        return {"epoch": self._epoch, "records": self._position, "undecodable": self._decoder.left_out}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where a loader with the same arguments was; what it consumed is read over, not decoded."""
        self._epoch, self._position = state["epoch"], state["records"]
        self._decoder.left_out = state["undecodable"]
        self._stream = self._images()

    def _images(self) -> Iterator[tuple[Record, NDArray[np.uint8]]]:
        while True:
            consumed, decoded = self._position, 0
            for index, record in enumerate(self.dataset.records(mixed_seed(self.seed, "data", self._epoch))):
                if index < consumed:
                    continue
                self._position = index + 1
                pixels = self._decoder(record) if index % self.world_size == self.rank else None
                if pixels is not None:
                    decoded += 1
                    yield record, pixels
            if not (consumed or decoded):
                raise UserError(
                    f"{self.dataset.name} has no image to train on for process {self.rank} of {self.world_size}: "
                    f"it holds {self._position} records, {self._decoder.left_out} of them undecodable here"
                )
            self._epoch, self._position, self._decoder.left_out = self._epoch + 1, 0, 0


def read_images(
    dataset: ImageDataset,
    preprocessing: Preprocessing,
    batch_size: int,
    start: int = 0,
    stop: int | None = None,
    *,
    max_undecodable: int,
    warn: Callable[[str], None],
) -> Iterator[IndexedBatch]:
    """The records `start` to `stop` (exclusive; None for the last) in stored order; the last batch may be smaller.

    Args:
        dataset: where the records come from.
        preprocessing: how they become tensors.
        batch_size: B.
        start: index of the first record.
        stop: index after the last record.
        max_undecodable: images that may be left out.
        warn: told about each image that is left out.

    Raises:
        UserError: too many undecodable images, or what the dataset raises.
    """
    decoder = _Decoder(dataset.name, preprocessing, max_undecodable, warn)
    rows: list[tuple[Record, NDArray[np.uint8]]] = []
    indices: list[int] = []
    records = dataset.records_from(start)
    if stop is not None:
        records = islice(records, max(stop - start, 0))
    for index, record in enumerate(records, start):
        pixels = decoder(record)
        if pixels is None:
            continue
        rows.append((record, pixels))
        indices.append(index)
        if len(rows) == batch_size:
            yield IndexedBatch(*_joined(rows), torch.tensor(indices))
            rows, indices = [], []
    if rows:
        yield IndexedBatch(*_joined(rows), torch.tensor(indices))


class _Decoder:
    """Records to pixels; counts the undecodable ones and stops where there are too many."""

    def __init__(
        self, name: str, preprocessing: Preprocessing, max_undecodable: int, warn: Callable[[str], None]
    ) -> None:
        self.name = name
        self.preprocessing = preprocessing
        self.max_undecodable = max_undecodable
        self.warn = warn
        self.left_out = 0
        self._told: set[str] = set()

    def __call__(self, record: Record) -> NDArray[np.uint8] | None:
        """Pixels uint8 `(C, H, W)`, or None where the image is left out."""
        try:
            return decode(record.image, self.preprocessing)
        except UndecodableImageError as error:
            self._leave_out(record.key, str(error))
            return None
        except UserError as error:
            raise UserError(f"image {record.key!r} of {self.name}: {error}") from None

    def _leave_out(self, key: str, reason: str) -> None:
        self.left_out += 1
        if self.left_out > self.max_undecodable:
            raise UserError(
                f"{self.left_out} images of {self.name} cannot be decoded and {self.max_undecodable} may be left out, "
                f"the last one is {key!r} ({reason}): mend it or raise data.max_undecodable"
            )
        if key not in self._told:
            self._told.add(key)
            self.warn(f"image {key!r} of {self.name} cannot be decoded and is left out: {reason}")


def _joined(rows: list[tuple[Record, NDArray[np.uint8]]]) -> tuple[Tensor, Tensor, list[str]]:
    pixels = torch.from_numpy(np.stack([pixels for _, pixels in rows]))
    labels = torch.tensor([record.label for record, _ in rows])
    return pixels.to(torch.float32) / 127.5 - 1, labels, [record.key for record, _ in rows]

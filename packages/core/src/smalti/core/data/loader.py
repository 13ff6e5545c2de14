"""Batches of images: endless and shuffled to train on, or once in stored order.

Legend: B batch, C channels, H W pixels, V views.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from functools import partial
from itertools import islice
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smalti.core.data.augmentation import Augmentation
from smalti.core.data.dataset import ImageDataset, Record
from smalti.core.data.decode import decode, decode_augmented
from smalti.core.data.parallel import ahead, in_order
from smalti.core.data.picture import UndecodableImageError
from smalti.core.data.position import Position, Shared
from smalti.core.data.texts import Text, text_of
from smalti.core.data.views import Views
from smalti.core.errors import UserError
from smalti.core.noise import mixed_seed
from smalti.core.options import Preprocessing

Result = NDArray[np.uint8] | UserError
BATCHES_AHEAD = 2


class Batch(NamedTuple):
    """`images` float32 `(B, C, H, W)` in [-1, 1], `labels` int64 `(B,)`, `keys` B names, `texts` B of them, or none."""

    images: Tensor
    labels: Tensor
    keys: list[str]
    texts: Sequence[Text] = ()


class IndexedBatch(NamedTuple):
    """As `Batch`; `indices` int64 `(B,)` are the places of the records in stored order; perhaps V views an image."""

    images: Tensor
    labels: Tensor
    keys: list[str]
    texts: Sequence[Text]
    indices: Tensor


class _Made(NamedTuple):
    """A batch and the position after it."""

    batch: Batch
    position: Position


class TrainBatches:
    """Batches without end for one of several processes, each of `batch_size` images.

    Epoch e reads the records in the order of `mixed_seed(seed, "data", e)`. The epochs, one after the other, are
    one endless stream, whose record g belongs to process `g % world_size`, which alone reads and decodes it.
    With the same arguments, a loader that takes over another's state continues exactly where that one was, whatever
    the number of workers; `position.merged` makes a state for another number of processes.

    Args:
        dataset: where the records come from.
        preprocessing: how they become tensors.
        batch_size: B, of this process.
        seed: of the orders and of the augmentation.
        rank: of this process.
        world_size: how many processes share the records.
        max_undecodable: images of one epoch that this process may leave out.
        warn: told about each image that is left out, once; perhaps by another thread.
        augment: what chance does to each image; of views it draws one.
        workers: threads that decode, and one more that makes batches ahead of time; 0 does it all when asked.

    Raises:
        UserError: while iterating: no image at all for this process, too many undecodable images, or what the
            dataset raises.
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
        augment: Augmentation | Views | None = None,
        workers: int = 0,
    ) -> None:
        left_out = _LeftOut(dataset.name, max_undecodable, warn)
        self._reader = _Reader(dataset, preprocessing, batch_size, seed, rank, world_size, left_out, augment, workers)
        self._position = Position()
        self._stream = self._reader.batches(self._position)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        batch, self._position = next(self._stream)
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Where this process is, as plain data, see `Position`."""
        return self._position._asdict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a loader with the same arguments was; what it consumed is neither read nor decoded."""
        self._stream.close()
        self._position = Position(**state)
        self._stream = self._reader.batches(self._position)


class _Reader(NamedTuple):
    """What makes the batches; it does not know the loader, so that threads end when the loader is dropped."""

    dataset: ImageDataset
    preprocessing: Preprocessing
    batch_size: int
    seed: int
    rank: int
    world_size: int
    left_out: _LeftOut
    augment: Augmentation | Views | None
    workers: int

    def batches(self, start: Position) -> Generator[_Made, None, None]:
        """The batches from a position on."""
        made = self._made(start)
        return ahead(made, BATCHES_AHEAD) if self.workers else made

    def _made(self, start: Position) -> Generator[_Made, None, None]:
        rows: list[tuple[Record, NDArray[np.uint8]]] = []
        left_out = self.left_out
        left_out.count, epoch = start.undecodable, start.epoch
        in_a_row = 0  # undecodable ones
        with closing(in_order(self._attempt, self._items(start), self.workers)) as results:
            for (position, record), result in results:
                if position.epoch != epoch:
                    epoch, left_out.count = position.epoch, 0
                if isinstance(result, UserError):
                    left_out.add(record.key, result)
                    in_a_row += 1
                    if in_a_row == 2 * len(self.dataset):  # among fewer there may be no whole epoch
                        raise self._nothing(left_out.count)
                    continue
                in_a_row = 0
                rows.append((record, result))
                if len(rows) == self.batch_size:
                    after = position._replace(undecodable=left_out.count)
                    yield _Made(Batch(*_joined(rows)), after)
                    rows = []

    def _items(self, position: Position) -> Iterator[tuple[Position, Record]]:
        """The records of this process, each with the position after it."""
        shared = Shared(position, self.rank, self.world_size)
        while True:
            epoch, start = shared.epoch, shared.start()
            order = mixed_seed(self.seed, "data", epoch)
            records = self.dataset.records_from(start, order, self.world_size)
            for index, record in enumerate(records):
                place = start + index * self.world_size
                if not shared.is_consumed(place):
                    yield shared.after(place), record
            if not len(self.dataset):
                raise self._nothing(0)
            shared.next_epoch(len(self.dataset))

    def _attempt(self, item: tuple[Position, Record]) -> tuple[tuple[Position, Record], Result]:
        position, record = item
        if self.augment is None:
            return item, _attempt(partial(decode, preprocessing=self.preprocessing), record)
        draws = random.Random(mixed_seed(self.seed, "augment", position.epoch, position.records))
        decoder: Callable[..., NDArray[np.uint8]]
        if isinstance(self.augment, Views):
            view = draws.randrange(len(self.augment.names))
            decoder = partial(self.augment.decode, preprocessing=self.preprocessing, view=view)
        else:
            decoder = partial(
                decode_augmented, preprocessing=self.preprocessing, augmentation=self.augment, draws=draws
            )
        return item, _attempt(decoder, record)

    def _nothing(self, undecodable: int) -> UserError:
        return UserError(
            f"{self.dataset.name} has no image to train on for process {self.rank} of {self.world_size}: "
            f"it holds {len(self.dataset)} records, {undecodable} of them undecodable here"
        )


def read_images(
    dataset: ImageDataset,
    preprocessing: Preprocessing,
    batch_size: int,
    start: int = 0,
    stop: int | None = None,
    *,
    max_undecodable: int,
    warn: Callable[[str], None],
    views: Views | None = None,
    workers: int = 0,
) -> Iterator[IndexedBatch]:
    """The records `[start, stop)` in stored order, once; the last batch may be smaller.

    Args:
        dataset: where the records come from.
        preprocessing: how they become tensors.
        batch_size: B.
        start: index of the first record.
        stop: index after the last record.
        max_undecodable: images that may be left out.
        warn: told about each image that is left out.
        views: all of these of each image; images are then `(B, V, C, H, W)`.
        workers: threads that decode.

    Raises:
        UserError: too many undecodable images, or what the dataset raises.
    """
    left_out = _LeftOut(dataset.name, max_undecodable, warn)
    decoder = partial(decode if views is None else views.decode_all, preprocessing=preprocessing)
    rows: list[tuple[Record, NDArray[np.uint8]]] = []
    indices: list[int] = []
    records = dataset.records_from(start)
    if stop is not None:
        records = islice(records, max(stop - start, 0))
    results = in_order(lambda record: (record, _attempt(decoder, record)), records, workers)
    for index, (record, result) in enumerate(results, start):
        if isinstance(result, UserError):
            left_out.add(record.key, result)
            continue
        rows.append((record, result))
        indices.append(index)
        if len(rows) == batch_size:
            yield IndexedBatch(*_joined(rows), torch.tensor(indices))
            rows, indices = [], []
    if rows:
        yield IndexedBatch(*_joined(rows), torch.tensor(indices))


def _attempt(decoder: Callable[..., NDArray[np.uint8]], record: Record) -> Result:
    """Pixels of a record, or the error, to be raised in its turn."""
    try:
        return decoder(record.image, box=record.box)
    except UserError as error:
        return error


class _LeftOut:
    """Counts undecodable images, and stops where there are too many."""

    def __init__(self, name: str, allowed: int, warn: Callable[[str], None]) -> None:
        self.name = name
        self.allowed = allowed
        self.warn = warn
        self.count = 0
        self._told: set[str] = set()

    def add(self, key: str, error: UserError) -> None:
        """Leave one more out, or raise what is not about one damaged image."""
        if not isinstance(error, UndecodableImageError):
            raise UserError(f"image {key!r} of {self.name}: {error}") from None
        self.count += 1
        if self.count > self.allowed:
            raise UserError(
                f"{self.count} images of {self.name} cannot be decoded and {self.allowed} may be left out, "
                f"the last one is {key!r} ({error}): mend it or raise data.max_undecodable"
            )
        if key not in self._told:
            self._told.add(key)
            self.warn(f"image {key!r} of {self.name} cannot be decoded and is left out: {error}")


def _joined(rows: list[tuple[Record, NDArray[np.uint8]]]) -> tuple[Tensor, Tensor, list[str], list[Text]]:
    images = np.empty((len(rows), *rows[0][1].shape), np.float32)
    for image, (_, pixels) in zip(images, rows, strict=True):  # one by one they stay in the processor's cache
        np.divide(pixels, np.float32(127.5), out=image, dtype=np.float32)
        np.subtract(image, np.float32(1), out=image)
    labels = torch.tensor([record.label for record, _ in rows])
    records = [record for record, _ in rows]
    return torch.from_numpy(images), labels, [record.key for record in records], [text_of(record) for record in records]

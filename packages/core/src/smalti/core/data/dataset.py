"""What a set of labelled images is: undecoded records in an order that the seed fixes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple


class Record(NamedTuple):
    """One image as it lies in its file: `key` names it in messages and in token shards."""

    key: str
    image: bytes
    label: int


class ImageDataset(ABC):
    """A set of labelled images.

    Attributes:
        name: for messages and protocols.
        classes: the names of the classes; labels lie in `[0, len(classes))`.
    """

    name: str
    classes: tuple[str, ...]

    @abstractmethod
    def records(self, order: int | None = None) -> Iterator[Record]:
        """Every record once: in stored order, or shuffled by the seed `order`, the same each time.

        Raises:
            UserError: while iterating, where a file is missing or damaged (names it), or a label is out of
                range.
        """

    def records_from(self, start: int) -> Iterator[Record]:
        """The records in stored order without the first `start`; override it where that saves reading them."""
        return islice(self.records(), start, None)

    @abstractmethod
    def __len__(self) -> int:
        """How many records there are."""

"""What a set of labelled images is: undecoded records in an order that the seed fixes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple, Protocol

from smalti.core.errors import UserError

Box = tuple[int, int, int, int]


class Content(Protocol):
    """Where the bytes of an image lie; a thread of its own may read them."""

    def read(self) -> bytes:
        """The bytes; a `UserError` names the file where they are not there."""


class Record(NamedTuple):
    """One image as it lies in its file.

    Attributes:
        key: names it in messages and in token shards.
        content: its bytes, or where they are read from.
        label: below the number of classes.
        box: left, top, right, bottom in pixels: the part that counts, where it is not the whole image.
        text: its caption in UTF-8, or features of one as a `.npy` file has them; None without.
    """

    key: str
    content: bytes | Content
    label: int
    box: Box | None = None
    text: bytes | Content | None = None

    @property
    def image(self) -> bytes:
        """The bytes of the image file."""
        return self.content if isinstance(self.content, bytes) else self.content.read()

    @property
    def text_bytes(self) -> bytes | None:
        """The bytes of the text."""
        return self.text if self.text is None or isinstance(self.text, bytes) else self.text.read()


class FilePart(NamedTuple):
    """`size` bytes of a file from `offset` on, or all of it; opened for each reading, so that threads may share it."""

    path: str
    offset: int = 0
    size: int = -1

    def read(self) -> bytes:
        """The bytes.

        Raises:
            UserError: the file is missing, cannot be read, or ends before the part does.
        """
        try:
            with open(self.path, "rb") as file:  # noqa: PTH123  # for each image; a Path would cost as much again
                if self.offset:
                    file.seek(self.offset)
                content = file.read(self.size)
        except FileNotFoundError:
            raise UserError(f"{self.path} does not exist") from None
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error.strerror}") from None
        except ValueError as error:  # a list may hold what is no path
            raise UserError(f"{self.path} cannot be read: {error}") from None
        if len(content) < self.size:
            raise UserError(f"{self.path} is damaged: it ends before byte {self.offset + self.size}")
        return content


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

    def records_from(self, start: int, order: int | None = None, step: int = 1) -> Iterator[Record]:
        """Of `records(order)` those numbered `start`, `start + step`, ...; override it where that saves reading."""
        return islice(self.records(order), start, None, step)

    def parts(self) -> list[Iterator[Record]]:
        """The records in stored order, in parts of which each can be read where another is damaged."""
        return [self.records()]

    @abstractmethod
    def __len__(self) -> int:
        """How many records there are."""

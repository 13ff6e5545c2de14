"""Where the images of an evaluation come from: folders, tar shards, `.npz` files, a tokenizer, a generator.

Legend: B batch, H W pixels.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import groupby, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from smalti.core.data.dataset import Content, FilePart
from smalti.core.data.decode import decode
from smalti.core.data.listed import DIGITS, class_folders, images_below, is_image, is_shard
from smalti.core.data.parallel import in_order
from smalti.core.data.picture import Pixels, read_picture
from smalti.core.errors import UserError
from smalti.core.options import Preprocessing
from smalti.eval.npz_images import NpzImages

WORKERS = min(4, os.cpu_count() or 1)
JPEG = b"\xff\xd8\xff"
ACCEPTED = "a folder of images, tar shards, or an .npz file of ADM's layout"


class ImageBatch(NamedTuple):
    """Images of one size, uint8 `(B, H, W, 3)`; their places in the source, int64 `(B,)`; their names; JPEG or not."""

    images: Tensor
    indices: Tensor
    names: list[str]
    jpegs: int = 0


class ImageFile(NamedTuple):
    """An image file and, where it lies in a shard, its label beside it."""

    name: str
    content: Content | bytes
    label: Content | bytes | None = None


class ImageSource(ABC):
    """Images in a fixed order, which several processes can share.

    Attributes:
        title: what it is called in results.
        made_by: `stored`, `tokenizer` or `generator`.
        classes: names of the classes, where the source has some.
    """

    title: str
    made_by: str = "stored"
    classes: tuple[str, ...] = ()

    @property
    def labels(self) -> Tensor:
        """The classes of all images, int64 `(N,)`, in order.

        Raises:
            UserError: the source does not tell them.
        """
        raise UserError(
            f"{self.title} does not tell the classes of its images: a folder has a folder for each class, tar shards "
            "have .cls, an .npz file has arr_1"
        )

    @abstractmethod
    def __len__(self) -> int:
        """How many images there are."""

    def share(self, size: int, rank: int, world_size: int) -> int:
        """How many images `batches` gives."""
        return share_of(len(self), size, rank, world_size)

    @abstractmethod
    def batches(self, size: int, rank: int, world_size: int) -> Iterator[ImageBatch]:
        """The blocks `rank`, `rank + world_size`, ... of `size` images, each in as many batches as it has shapes.

        Raises:
            UserError: while iterating, where an image is missing or broken (names it).
        """


class FileImages(ImageSource):
    """Image files of a folder or of tar shards.

    Grey is repeated, transparency dropped, 16 bits reduced to their high bytes.

    Args:
        path: the folder, or what names the shards: a path, glob or brace range.
        preprocessing: brings all to one size; None leaves them as they are.
        count: take only so many, the first ones.

    Raises:
        UserError: nothing there, or no image in it.
    """

    def __init__(self, path: str, preprocessing: Preprocessing | None = None, count: int | None = None) -> None:
        self.title, self.preprocessing = path, preprocessing
        folder = Path(path)
        self._files = [*islice(_folder_files(folder) if folder.is_dir() else _shard_files(path), count)]
        if not self._files:
            raise UserError(f"{path} holds no image, expected {ACCEPTED}")
        self.classes = tuple(class_folders(folder)) if folder.is_dir() else ()

    @cached_property
    def labels(self) -> Tensor:
        """As promised: the place of a file's class among the folders, or what lies beside it in its shard."""
        found = [self._label(file) for file in self._files]
        return super().labels if None in found else torch.tensor(found)

    def _label(self, file: ImageFile) -> int | None:
        if self.classes:
            folder, _, rest = file.name.partition("/")
            return self.classes.index(folder) if rest and folder in self.classes else None
        if file.label is None:
            return None
        content = (file.label if isinstance(file.label, bytes) else file.label.read()).strip()
        if not (content.isdigit() and len(content) <= DIGITS):
            raise UserError(
                f"the label of image {file.name} of {self.title} is {content[:20]!r}, expected a number of at most "
                f"{DIGITS} digits"
            )
        return int(content)

    def __len__(self) -> int:
        return len(self._files)

    def batches(self, size: int, rank: int, world_size: int) -> Iterator[ImageBatch]:
        """As promised; threads decode ahead."""
        places = (place for place in range(len(self)) if place // size % world_size == rank)
        decoded = in_order(self._decoded, places, WORKERS)
        for _, block in groupby(decoded, key=lambda item: item[0] // size):
            for _, alike in groupby(block, key=lambda item: item[1].shape):
                items = list(alike)
                yield ImageBatch(
                    torch.from_numpy(np.stack([pixels for _, pixels, _ in items])),
                    torch.tensor([place for place, _, _ in items]),
                    [self._files[place].name for place, _, _ in items],
                    sum(jpeg for _, _, jpeg in items),
                )

    def _decoded(self, place: int) -> tuple[int, Pixels, bool]:
        """Pixels `(H, W, 3)` of a file, and whether it is a JPEG."""
        name, found, _ = self._files[place]
        content = found if isinstance(found, bytes) else found.read()
        try:
            if self.preprocessing is None:
                pixels = read_picture(content, 3)
            else:
                pixels = decode(content, self.preprocessing).transpose(1, 2, 0)
        except UserError as error:
            raise UserError(f"image {name} of {self.title} cannot be read: {error}") from None
        return place, np.broadcast_to(pixels, (*pixels.shape[:2], 3)), content.startswith(JPEG)


class NpzSource(ImageSource):
    """The images of an `.npz` file of ADM's layout.

    Args:
        path: the file.
        size: what the protocol wants the side of its images to be; None takes any.
        count: take only so many, the first ones.

    Raises:
        UserError: missing, damaged, another layout or another size.
    """

    def __init__(self, path: str, size: int | None = None, count: int | None = None) -> None:
        self.title = path
        self._file = NpzImages(Path(path))
        if size is not None and self._file.shape[1:3] != (size, size):
            height, width = self._file.shape[1:3]
            raise UserError(f"{path} holds images of {width} x {height} pixels, the protocol wants {size} x {size}")
        self._count = len(self._file) if count is None else min(count, len(self._file))
        if not self._count:
            raise UserError(f"{path} holds no image, expected {ACCEPTED}")

    @cached_property
    def labels(self) -> Tensor:
        """As promised: `arr_1`."""
        labels = self._file.labels()
        return super().labels if labels is None else torch.from_numpy(labels[: self._count])

    def __len__(self) -> int:
        return self._count

    def batches(self, size: int, rank: int, world_size: int) -> Iterator[ImageBatch]:
        """As promised; the names are the places."""
        for start, images in self._file.batches(size, rank, world_size):
            if start >= self._count:
                return
            kept = torch.from_numpy(images)[: self._count - start]
            indices = torch.arange(start, start + len(kept))
            yield ImageBatch(kept, indices, [str(index) for index in indices.tolist()])


def share_of(count: int, size: int, rank: int, world_size: int) -> int:
    """How many of `count` images lie in the blocks `rank`, `rank + world_size`, ... of `size`."""
    return sum(min(size, count - start) for start in range(0, count, size)[rank::world_size])


def stored_images(path: str, preprocessing: Preprocessing | None = None, count: int | None = None) -> ImageSource:
    """The images at `path`, whatever holds them; errors as the classes here."""
    if path.endswith(".npz"):
        return NpzSource(path, preprocessing.image_size if preprocessing else None, count)
    if not Path(path).is_dir() and not is_shard(path):
        known = "is a file" if Path(path).is_file() else "does not exist"
        raise UserError(f"{path} {known}, expected {ACCEPTED}")
    return FileImages(path, preprocessing, count)


def _folder_files(folder: Path) -> Iterable[ImageFile]:
    return (ImageFile(name, FilePart(str(folder / name))) for name in images_below(folder))


def _shard_files(pattern: str) -> Iterator[ImageFile]:
    from smalti.core.data.tar_shards import index_shard, is_plain, read_shard
    from smalti.core.data.webdataset import find_shards

    for shard in find_shards(pattern):
        for sample in index_shard(shard) if is_plain(shard) else read_shard(shard):
            for extension, content in sample.items():
                if is_image(f"x.{extension}"):
                    yield ImageFile(f"{sample['__key__']}.{extension}", content, sample.get("cls"))

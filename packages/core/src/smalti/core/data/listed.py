"""Sets of image files that are known by a list: of a folder's entries, or of a file's lines."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from smalti.core.data.dataset import Box, FilePart, Record
from smalti.core.data.indexed import IndexedDataset
from smalti.core.errors import UserError

DIGITS = 7  # of the number of a class
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")
SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")


class ListedImages(IndexedDataset):
    """Image files with labels.

    The key of a file is its path below `root` without the ending; with it where two would be one.

    Args:
        name: of the data set.
        classes: their names.
        root: where relative paths begin.
        files: paths.
        labels: of the files; None for sets without, all of whose labels are 0.
        box: the part of every image that counts.
        texts: captions of the files.

    Raises:
        UserError: a label is out of range, or there is no file.
    """

    def __init__(
        self,
        name: str,
        classes: Sequence[str],
        root: Path,
        files: Sequence[str],
        labels: Sequence[int] | None = None,
        box: Box | None = None,
        texts: Sequence[str] | None = None,
    ) -> None:
        if not files:
            raise UserError(f"{name} in {root} holds no image")
        self.name, self.classes = name, tuple(classes)
        self.root, self.box = str(root), box
        self._files, self._texts = files, texts
        self._labels = np.zeros(len(files), np.int64) if labels is None else np.array(labels, np.int64)
        assert len(self._labels) == len(files)
        outside = np.flatnonzero((self._labels < 0) | (self._labels >= len(self.classes)))
        if len(outside):
            file, label = files[outside[0]], self._labels[outside[0]]
            raise UserError(
                f"image {file} of {name} has the label {label}: with {len(self.classes)} classes, "
                f"labels are 0 to {len(self.classes) - 1}"
            )
        self._whole_keys = len({os.path.splitext(file)[0] for file in files}) < len(files)  # noqa: PTH122

    def record(self, index: int) -> Record:
        """One of the images."""
        file = self._files[index]
        key = file if self._whole_keys else os.path.splitext(file)[0]  # noqa: PTH122
        content = FilePart(os.path.join(self.root, file))  # noqa: PTH118
        # JSON may hold halves of characters, which UTF-8 has not: `text_of` tells of them.
        text = None if self._texts is None else self._texts[index].encode(errors="surrogatepass")
        return Record(key, content, int(self._labels[index]), self.box, text)

    def __len__(self) -> int:
        return len(self._files)


def lines_of_words(path: Path) -> list[list[str]]:
    """The words of each line of a text file; commas part words, too, and a `.csv` begins with names of columns.

    Raises:
        UserError: the file cannot be read, or is no text.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as text: {error}") from None
    lines = [words for line in text.splitlines() if (words := line.replace(",", " ").split())]
    return lines[1:] if path.suffix == ".csv" else lines


def label_number(text: str) -> int:
    """A label that is a number; a `ValueError` where it is none, or larger than any number of classes."""
    if len(text) > DIGITS:
        raise ValueError(f"{text[:20]!r} is no number of a class")
    return int(text)


def images_below(folder: Path) -> list[str]:
    """Paths of all image files below a folder, relative to it, in the order in which torchvision lists them."""
    found = []
    for parent, _, names in sorted(os.walk(folder, followlinks=True)):
        prefix = os.path.relpath(parent, folder)
        inner = "" if prefix == "." else f"{prefix}/"
        found += [inner + name for name in sorted(names) if is_image(name)]
    return found


def is_image(name: str) -> bool:
    """Whether a file's ending is that of an image."""
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def is_shard(name: str) -> bool:
    """Whether a file's ending is that of a tar shard, plain or compressed."""
    return name.lower().endswith(SHARD_SUFFIXES)


def class_folders(folder: Path) -> list[str]:
    """The names of the folders in a folder, sorted."""
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))

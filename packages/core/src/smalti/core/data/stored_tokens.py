"""Tokens of images that other projects stored, to be turned into token shards as if they had been made here.

Legend: N images, V views of an image, L positions, S streams.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate, islice
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from smalti.core.data.array_file import Tokens, check_stored_tokens, parse_array
from smalti.core.errors import UserError
from smalti.core.files import parse_json
from smalti.core.layout import TokenLayout
from smalti.core.options import Options

# FQGAN stores each sub-code in a file of its own; in the order of its tokenizer's streams.
SUFFIXES = (("",), ("_vis", "_sem"), ("_vis", "_sem_mid", "_sem_high"))


class TokenSamples(NamedTuple):
    """Some images' tokens: n keys, tokens `(n, V, L, S)`, n labels."""

    keys: list[str]
    tokens: Tokens
    labels: list[int]


class TokenSource(NamedTuple):
    """What stored tokens are, beside the tokens.

    Attributes:
        name: for messages and `layout.json`.
        classes: names; labels are below their number.
        views: V names.
        samples: N.
    """

    name: str
    classes: tuple[str, ...]
    views: tuple[str, ...]
    samples: int


class StoredTokens(Options):
    """Options of stored tokens; that they are of the recipe's tokenizer, nobody can check.

    Args:
        classes: how many there are.
    """

    name: str
    classes: Annotated[int, Field(ge=1)] = 1000

    @abstractmethod
    def source(self) -> TokenSource:
        """What there is.

        Raises:
            UserError: nothing is there, or not what was expected.
        """

    @abstractmethod
    def read(self, layout: TokenLayout, start: int, stop: int) -> TokenSamples:
        """The images `[start, stop)` in stored order, with tokens of `layout`.

        Raises:
            UserError: a file is damaged, or holds tokens of another shape.
        """

    def _checked(self, label: int, where: str) -> int:
        if not 0 <= label < self.classes:
            raise UserError(
                f"{where} has the label {label}: with {self.classes} classes, labels are 0 to {self.classes - 1}"
            )
        return label

    def _class_names(self) -> tuple[str, ...]:
        return tuple(map(str, range(self.classes)))


class ArrayTokens(StoredTokens):
    """Codes of LlamaGen, FQGAN and XQ-GAN: `{i}.npy`, or `{i}_vis.npy` and `{i}_sem.npy`, of shape `(1, V, L)`.

    Args:
        codes: folders of the same images; the views of all of them count, e.g. those of two ranges of ten crops.
        labels: folder of `{i}.npy`, of shape `(1,)`.
        count: images, where later files are a sampler's padding; None takes all that `labels` holds.
    """

    name: Literal["npy"] = "npy"
    codes: Annotated[tuple[str, ...], Field(min_length=1)]
    labels: str
    count: Annotated[int, Field(ge=1)] | None = None

    def source(self) -> TokenSource:
        """Counts labels, and looks at the codes of image 0 of each folder."""
        found = sum(1 for path in _folder(self.labels).iterdir() if path.suffix == ".npy")
        if not found or (self.count is not None and found < self.count):
            raise UserError(
                f"{self.labels} holds labels of {found} images, expected {self.count or '0.npy, 1.npy, ...'}"
            )
        views = [
            f"{Path(folder).name} {view}"
            for folder in self.codes
            for view in range(_codes(_folder(folder), 0, _suffixes(Path(folder))).shape[0])
        ]
        samples = found if self.count is None else self.count
        return TokenSource(self.codes[0], self._class_names(), tuple(views), samples)

    def read(self, layout: TokenLayout, start: int, stop: int) -> TokenSamples:
        """Files by number."""
        folders = [(Path(folder), _suffixes(Path(folder))) for folder in self.codes]
        rows, labels = [], []
        for number in range(start, stop):
            rows.append(np.concatenate([_codes(folder, number, suffixes) for folder, suffixes in folders]))
            path = Path(self.labels) / f"{number}.npy"
            labels.append(self._checked(int(_array(path).reshape(-1)[0]), str(path)))
        _check(rows, layout, f"the codes of images {start} to {stop - 1} in {self.codes[0]}")
        return TokenSamples([f"{number:08d}" for number in range(start, stop)], np.stack(rows), labels)


class LineTokens(StoredTokens):
    """RAR's JSON lines, `{"class_id": 3, "tokens": [...]}`, one of each view of an image.

    Args:
        path: of the file.
    """

    name: Literal["jsonl"] = "jsonl"
    path: str

    def source(self) -> TokenSource:
        """Counts lines."""
        if not Path(self.path).is_file():
            raise UserError(f"{self.path} does not exist; expected lines with class_id and tokens there")
        return TokenSource(self.path, self._class_names(), ("line",), len(_line_starts(self.path)))

    def read(self, layout: TokenLayout, start: int, stop: int) -> TokenSamples:
        """Lines by number."""
        rows: list[Tokens] = []
        labels = []
        for number, line in enumerate(self._lines(start, stop), start + 1):
            try:
                content = parse_json(line)
                row = np.asarray(content["tokens"])
                label = int(content["class_id"])
                if row.dtype.kind != "i":
                    raise ValueError(f"the tokens are {row.dtype}")
            except (ValueError, KeyError, TypeError, OverflowError) as error:
                told = f"{type(error).__name__}: {error}"
                raise UserError(
                    f"line {number} of {self.path} is damaged: expected class_id and tokens ({told})"
                ) from None
            rows.append(row[None, :, None] if row.ndim == 1 else row[None])
            labels.append(self._checked(label, f"line {number} of {self.path}"))
        if len(rows) != stop - start:
            raise UserError(f"{self.path} ends before line {stop}, though it did not when its lines were counted")
        _check(rows, layout, f"lines {start + 1} to {stop} of {self.path}")
        return TokenSamples([f"{number:08d}" for number in range(start, stop)], np.stack(rows), labels)

    def _lines(self, start: int, stop: int) -> Iterator[bytes]:
        with Path(self.path).open("rb") as file:
            file.seek(int(_line_starts(self.path)[start]))
            yield from islice(file, stop - start)


@lru_cache(maxsize=1)
def _line_starts(path: str) -> NDArray[np.int64]:
    """The offset of every line."""
    with Path(path).open("rb") as file:
        ends = np.fromiter(accumulate(len(line) for line in file), np.int64)
    return np.concatenate([[0], ends[:-1]]) if len(ends) else ends


def _check(rows: list[Tokens], layout: TokenLayout, where: str) -> None:
    for row in rows:
        if row.ndim != 3 or row.shape[1:] != (layout.positions, layout.streams) or row.shape[0] != rows[0].shape[0]:
            expected = f"({rows[0].shape[0]}, {layout.positions}, {layout.streams})"
            raise UserError(
                f"{where}: expected tokens of shape (views, positions, streams) {expected}, as the recipe's tokenizer "
                f"makes them, got {row.shape}"
            )
    check_stored_tokens(np.stack(rows), layout, where)


def _folder(name: str) -> Path:
    path = Path(name)
    if not path.is_dir():
        raise UserError(f"{path} does not exist; expected a folder of 0.npy, 1.npy, ...")
    return path


def _suffixes(folder: Path) -> tuple[str, ...]:
    """What the names of an image's files end with; the longest that are all there."""
    for suffixes in reversed(SUFFIXES):
        if all((folder / f"0{suffix}.npy").exists() for suffix in suffixes):
            return suffixes
    raise UserError(f"{folder} holds no codes of image 0: expected 0.npy, or 0_vis.npy and 0_sem.npy")


def _codes(folder: Path, number: int, suffixes: tuple[str, ...]) -> Tokens:
    """The tokens `(V, L, S)` of an image."""
    streams = [_array(folder / f"{number}{suffix}.npy") for suffix in suffixes]
    for suffix, stream in zip(suffixes, streams, strict=True):
        if stream.ndim != 3 or stream.shape != streams[0].shape or len(stream) != 1:
            raise UserError(
                f"{folder / f'{number}{suffix}.npy'}: expected shape (1, views, positions), got {stream.shape}"
            )
    return np.stack([stream[0] for stream in streams], axis=-1)


def _array(path: Path) -> Tokens:
    try:
        array: Tokens = parse_array(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist, though others of its kind do") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    if not np.issubdtype(array.dtype, np.integer) or not array.size:
        raise UserError(f"{path}: expected integers, got {array.dtype} {array.shape}")
    return array

"""Images in WebDataset tar shards, local or on object storage.

A sample is the files of one key: an image (`.png`, `.jpg`, `.jpeg`, `.webp`) and a label (`.cls` with a
number, or `.json` with a number under `label`), or in its place a text. A `dataset.json` beside local shards may
tell the name, the classes and how many samples each shard holds.
"""

from __future__ import annotations

import glob
import os
import random
import re
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from smalti.core.data.dataset import Content, ImageDataset, Record
from smalti.core.data.places import what_is_there
from smalti.core.errors import UserError
from smalti.core.files import parse_json, read_json
from smalti.core.options import DatasetOptions, sentences

ASSETS = Path(__file__).parent.parent / "assets"
EMBEDDED = "embedded:"
CARD = "dataset.json"
IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp")
KEPT_BYTES = 128 << 20
INDEX_BYTES = 300  # of memory for a record whose image is read when it is asked for


class WebDatasetOptions(DatasetOptions):
    """Images in WebDataset tar shards.

    Args:
        shards: one or several of: a path, a glob, a brace range `train-{0000..0127}.tar`, a URL or
            `pipe:command` as `webdataset.gopen` takes them, `embedded:fashion-mnist/train-*.tar.gz` for the
            images that come with smalti.
        classes: how many, or their names; None takes them from the `dataset.json` beside the shards.
        shuffle_buffer: undecoded records held to shuffle within and across shards.
        text: ending of the file of a sample that holds its text: a caption, `txt`, or features of one, `npy`. Samples
            with a text need no label.
    """

    name: Literal["webdataset"] = "webdataset"
    shards: str | Annotated[tuple[str, ...], Field(min_length=1)]
    classes: Annotated[int, Field(ge=1)] | Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    shuffle_buffer: Annotated[int, Field(ge=1)] = 10_000
    text: str | None = None

    def build(self) -> WebDataset:
        """Find the shards; nothing is read but `dataset.json`."""
        if find_spec("webdataset") is None:
            raise UserError("reading tar shards needs the extra smalti-core[data], which is not installed")
        return WebDataset(self)


class DatasetCard(BaseModel):
    """What `dataset.json` tells: `shards` has the number of samples by file name; more keys are welcome."""

    model_config = ConfigDict(frozen=True)

    name: str
    classes: Annotated[tuple[str, ...], Field(min_length=1)]
    shards: dict[str, Annotated[int, Field(ge=0, le=2**40)]] = {}


class WebDataset(ImageDataset):
    """A set of labelled images in tar shards.

    Of plain local files only the headers are read, and each image when it is asked for. All others are read as
    streams. What was read of the first shards is kept in memory, undecoded, up to `KEPT_BYTES`.

    Raises:
        UserError: no shard where `options.shards` points, or classes that are neither given nor on the card.
    """

    def __init__(self, options: WebDatasetOptions) -> None:
        patterns = (options.shards,) if isinstance(options.shards, str) else options.shards
        self.options = options
        self.shards = [url for pattern in patterns for url in find_shards(pattern)]
        self._card = _read_card(self.shards[0])
        self.name = self._card.name if self._card else patterns[0]
        self.classes = self._class_names()
        sizes = self._card.shards if self._card else {}
        beside = {Path(self.shards[0]).parent / name: size for name, size in sizes.items()}
        self._told = {url: beside[Path(url)] for url in self.shards if Path(url) in beside}
        self._counts = dict(self._told)
        self._kept: dict[str, list[Record]] = {}
        self._room = KEPT_BYTES

    def _class_names(self) -> tuple[str, ...]:
        classes, card = self.options.classes, self._card
        if isinstance(classes, tuple):
            return classes
        if card is not None and classes in (None, len(card.classes)):
            return card.classes
        if classes is None and self.options.text is not None:
            return ("all",)
        if classes is None:
            raise UserError(f"{self.name} has no {CARD} beside its shards: give the option classes, how many there are")
        return tuple(str(label) for label in range(classes))

    def records(self, order: int | None = None) -> Iterator[Record]:
        """Every record once, in stored order, or with shards and a buffer of records shuffled by `order`."""
        if order is None:
            return self._stored(self.shards)
        from webdataset.filters import shuffle

        generator = random.Random(order)
        shards = generator.sample(self.shards, len(self.shards))
        size = self.options.shuffle_buffer
        shuffled: Iterator[Record] = shuffle(size, initial=size, rng=generator)(self._stored(shards))
        return shuffled

    def records_from(self, start: int, order: int | None = None, step: int = 1) -> Iterator[Record]:
        """As promised; in stored order, shards of known size before the start are not read."""
        if order is not None:
            return super().records_from(start, order, step)
        for place, shard in enumerate(self.shards):
            if start < self._counts.get(shard, start + 1):
                return islice(self._stored(self.shards[place:]), start, None, step)
            start -= self._counts[shard]
        return iter(())

    def parts(self) -> list[Iterator[Record]]:
        """The records shard by shard."""
        return [self._stored([shard]) for shard in self.shards]

    def _stored(self, shards: Iterable[str]) -> Iterator[Record]:
        for shard in shards:
            yield from self._kept[shard] if shard in self._kept else self._read(shard)

    def _read(self, shard: str) -> Iterator[Record]:
        from smalti.core.data.tar_shards import index_shard, is_plain, read_shard

        count, size, kept = 0, 0, []
        for sample in index_shard(shard) if is_plain(shard) else read_shard(shard):
            record = _record(sample, shard, len(self.classes), self.options.text)
            yield record
            count += 1
            parts = [record.content, *([] if record.text is None else [record.text])]
            size += sum(len(part) if isinstance(part, bytes) else INDEX_BYTES for part in parts)
            if size <= self._room:
                kept.append(record)
        if self._told.get(shard, count) != count:
            raise UserError(f"shard {shard} holds {count} samples, the {CARD} beside it says {self._told[shard]}")
        self._counts[shard] = count
        if len(kept) == count and shard not in self._kept:
            self._kept[shard] = kept
            self._room -= size

    def __len__(self) -> int:
        """The number of records; one pass over the shards where the card does not tell it."""
        for shard in self.shards:
            if shard not in self._counts:
                self._counts[shard] = sum(1 for _ in self._read(shard))
        return sum(self._counts[shard] for shard in self.shards)


def find_shards(pattern: str) -> list[str]:
    """The shards that a path, glob, brace range or URL stands for; globs in the order of names.

    `${NAME}` in it is the environment variable `WDS_NAME`.

    Raises:
        UserError: a local pattern matches nothing (says what is there), an environment variable is not set, braces
            do not close, or stars stand where they may not.
    """
    from webdataset.shardlists import expand_urls

    try:
        expanded: list[str] = expand_urls(pattern)
    except AssertionError:
        named = (f"WDS_{name}" for name in re.findall(r"\$\{(\w+)\}", pattern))
        unset = ", ".join(name for name in named if name not in os.environ)
        raise UserError(f"shards {pattern!r} need the environment variable {unset}, which is not set") from None
    except ValueError as error:  # unbalanced braces
        raise UserError(f"shards {pattern!r} cannot be expanded: {error}") from None
    return [url for part in expanded for url in _matches(part)]


def _matches(url: str) -> list[str]:
    if url.startswith(EMBEDDED):
        url = str(ASSETS / url.removeprefix(EMBEDDED))
    elif re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*:", url):
        return [url]
    path = Path(url)
    if path.is_file():
        return [url]
    try:
        paths = Path(path.anchor).glob(str(path.relative_to(path.anchor))) if glob.has_magic(url) else ()
        found = sorted(map(str, paths))
    except ValueError as error:  # stars that stand wrong
        raise UserError(f"shards {url!r} cannot be expanded: {error}") from None
    if not found:
        hint = f"it is a folder, its shards would be {path}/*.tar" if path.is_dir() else what_is_there(path)
        raise UserError(f"no shard matches {url}: {hint}")
    return found


def _read_card(shard: str) -> DatasetCard | None:
    path = Path(shard).parent / CARD
    if not path.is_file():
        return None
    try:
        return DatasetCard.model_validate(read_json(path, "the card of a dataset"))
    except ValidationError as error:
        raise UserError(f"{path} cannot be used: {sentences(error)}") from None


def _record(sample: dict[str, Any], shard: str, classes: int, text: str | None) -> Record:
    where = f"sample {sample['__key__']!r} of shard {shard}"
    images = [sample[extension] for extension in IMAGE_EXTENSIONS if extension in sample]
    if not images:
        expected = ", ".join(f".{name}" for name in IMAGE_EXTENSIONS)
        raise UserError(f"{where} has no image: expected one of {expected}, found {_extensions(sample)}")
    if text is not None and text not in sample:
        raise UserError(f"{where} has no text: expected .{text}, found {_extensions(sample)}")
    label = 0 if text is not None and not {"cls", "json"} & sample.keys() else _label(sample, where)
    if not 0 <= label < classes:
        raise UserError(f"{where} has the label {label}: with {classes} classes, labels are 0 to {classes - 1}")
    return Record(sample["__key__"], images[0], label, text=None if text is None else sample[text])


def _extensions(sample: dict[str, Any]) -> str:
    return ", ".join(f".{name}" for name in sample if not name.startswith("__"))


def _label(sample: dict[str, Any], where: str) -> int:
    if "cls" in sample:
        content = _bytes(sample["cls"])
        try:
            return int(content)
        except ValueError:
            shown = repr(content[:20].decode(errors="replace"))
            raise UserError(f"{where} has the label {shown}: expected an integer") from None
    if "json" in sample:
        try:
            label = parse_json(_bytes(sample["json"]))["label"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{where} has no number under `label` in its .json") from None
        if type(label) is not int:
            raise UserError(f"{where} has the label {label!r:.50}: expected an integer")
        return label
    raise UserError(f"{where} has no label: expected .cls, or .json with `label`")


def _bytes(content: bytes | Content) -> bytes:
    return content if isinstance(content, bytes) else content.read()

"""Data sets of Hugging Face as they lie on disk: folders of Arrow files (`save_to_disk`, or the hub's cache).

pyarrow maps the files into memory; an image is read when it is asked for.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

from smalti.core.data.dataset import FilePart, ImageDataset, Record
from smalti.core.data.indexed import IndexedDataset
from smalti.core.data.listings import numbered
from smalti.core.data.places import located, wrong_place
from smalti.core.errors import UserError
from smalti.core.files import parse_json
from smalti.core.options import DatasetOptions

IMAGE_COLUMNS, LABEL_COLUMNS = ("image", "img", "jpg", "png"), ("label", "labels", "fine_label", "cls")


class HuggingFaceOptions(DatasetOptions):
    """A data set of Hugging Face on disk.

    Args:
        path: a folder with `.arrow` files, or one with a folder per split; None takes the environment's
            `DATASET_ROOT`.
        split: the folder of the split, where there is one per split.
        image: column of the images; None takes the first of the usual names that is there.
        label: column of the labels; None as for `image`, and without such a column all labels are 0.
    """

    name: Literal["huggingface"] = "huggingface"
    path: str | None = None
    split: str = "train"
    image: str | None = None
    label: str | None = None

    def build(self) -> ImageDataset:
        """Map the files; the labels are read."""
        if find_spec("pyarrow") is None:
            raise UserError("reading Arrow files needs the extra smalti-core[arrow], which is not installed")
        return ArrowImages(self)


class Cell(NamedTuple):
    """The image in one row of a column: `{"bytes": ..., "path": ...}`, or bytes."""

    column: Any
    row: int

    def read(self) -> bytes:
        """The bytes, out of the table or out of the file it names."""
        try:
            value = self.column[self.row].as_py()
        except ValueError as error:  # names of fields are not looked at when a file is opened
            raise UserError(f"row {self.row} is damaged: {error}") from None
        if isinstance(value, dict):
            content = value.get("bytes")
            value = FilePart(str(value.get("path"))).read() if content is None else content
        if not isinstance(value, bytes):
            raise UserError(f"row {self.row} holds no image but {type(value).__name__}")
        return value


class ArrowImages(IndexedDataset):
    """The rows of a folder of Arrow files.

    Raises:
        UserError: no such folder or column, or a damaged file.
    """

    def __init__(self, options: HuggingFaceOptions) -> None:
        expected = "a folder with .arrow files, or one with a folder of them per split"
        root = located(options.path, "DATASET_ROOT", expected)
        folders = [folder for folder in (root / options.split, root) if any(folder.glob("*.arrow"))]
        if not folders:
            raise wrong_place(root, f"{expected} ({options.split})")
        self.name = root.absolute().name
        table = _table(folders[0])
        image = _column(table, options.image, IMAGE_COLUMNS, folders[0])
        label = None
        if options.label is not None or any(name in table.column_names for name in LABEL_COLUMNS):
            label = _column(table, options.label, LABEL_COLUMNS, folders[0])
        self._images = table.column(image)
        self.classes, self._labels = ("all",), [0] * len(self._images)
        if label is not None:
            labels, names = table.column(label).to_pylist(), _class_names(table, label)
            self.classes, self._labels = numbered(labels, names, str(folders[0]))
        if not all(0 <= number < len(self.classes) for number in self._labels):
            raise UserError(f"{folders[0]} holds a label that is none of the {len(self.classes)} classes")

    def record(self, index: int) -> Record:
        """One of the rows."""
        return Record(f"{index:08d}", Cell(self._images, index), self._labels[index])

    def __len__(self) -> int:
        return len(self._labels)


def _table(folder: Path) -> Any:
    pa = import_module("pyarrow")
    tables = []
    for path in sorted(folder.glob("*.arrow")):
        try:
            table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
            table.validate(full=True)  # offsets that point outside of the file would be followed
        except (pa.ArrowException, OSError, ValueError) as error:
            raise UserError(f"{path} is damaged or no Arrow stream: {' '.join(str(error).split())[:300]}") from None
        tables.append(table)
    try:
        return pa.concat_tables(tables)
    except pa.ArrowException:
        raise UserError(f"the .arrow files in {folder} have different columns, expected those of one split") from None


def _column(table: Any, wanted: str | None, known: tuple[str, ...], folder: Path) -> str:
    names = known if wanted is None else (wanted,)
    found = next((name for name in names if name in table.column_names), None)
    if found is None:
        raise UserError(f"{folder} has no column {' or '.join(names)}: there are {', '.join(table.column_names)}")
    return found


def _class_names(table: Any, label: str) -> tuple[str, ...] | None:
    """The names in the features that `datasets` writes into the schema, if they are there."""
    try:
        features = parse_json(table.schema.metadata[b"huggingface"])["info"]["features"]
        return tuple(map(str, features[label]["names"]))
    except (KeyError, TypeError, ValueError):
        return None

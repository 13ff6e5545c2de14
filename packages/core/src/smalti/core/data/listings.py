"""Images that a file lists: text, csv, json or json lines; among them mini-ImageNet's tables."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from smalti.core.data.dataset import ImageDataset
from smalti.core.data.listed import DIGITS, ListedImages, label_number
from smalti.core.data.places import located, wrong_place
from smalti.core.errors import UserError
from smalti.core.files import parse_json
from smalti.core.options import DatasetOptions

COLUMNS = ("image", "filename", "file_name", "file", "image_path", "path", "name")
Rows = list[dict[str, Any]]


class ListOptions(DatasetOptions):
    """Images listed in a file, for instance BDD100K's.

    `.txt`: a path a line, with `label` followed by white space and the label. `.csv`: with a first line of column
    names. `.json`: a list of paths or of objects, or labels by path. `.jsonl`: an object or a path a line.

    Args:
        path: of the list; None takes the environment's `DATASET_ROOT`.
        root: where relative paths begin; None is the folder of the list.
        image: column of the paths; None takes the first of `COLUMNS` that is there.
        label: column of the labels, for `.txt` any name; None: all labels are 0.
        classes: how many, or their names; None: labels that are numbers go up to the largest one, names are sorted.
        text: column of the images' captions; not in `.txt`.
    """

    name: Literal["list"] = "list"
    path: str | None = None
    root: str | None = None
    image: str | None = None
    label: str | None = None
    classes: Annotated[int, Field(ge=1)] | Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    text: str | None = None

    def build(self) -> ImageDataset:
        """Read the list; no image is looked at."""
        expected = "a list of images in .txt, .csv, .json or .jsonl"
        path = located(self.path, "DATASET_ROOT", expected)
        if not path.is_file():
            raise wrong_place(path, expected)
        rows = read_rows(path, labelled=self.label is not None)
        files = [str(value) for value in _column(rows, self.image, COLUMNS, path)]
        root = path.parent if self.root is None else Path(self.root).expanduser()
        if not root.is_dir():
            raise wrong_place(root, f"the folder of the images that {path} lists")
        texts = None
        if self.text is not None:
            if path.suffix == ".txt":
                raise UserError(f"{path} cannot hold texts beside its images: take .csv, .json or .jsonl")
            texts = [str(text) for text in _column(rows, self.text, (), path)]
        if self.label is None:
            return ListedImages(path.stem, ["all"], root, files, texts=texts)
        classes, labels = numbered(_column(rows, self.label, ("label",), path), self.classes, str(path))
        return ListedImages(path.stem, classes, root, files, labels, texts=texts)


class MiniImageNetOptions(DatasetOptions):
    """mini-ImageNet: `images/`, and `train.csv`, `val.csv`, `test.csv` with the columns `filename,label`.

    The splits have classes of their own: 64, 16 and 20; labels number the split's classes in the order of names.

    Args:
        path: holds these; None takes the environment's `MINI_IMAGENET_ROOT`, then `DATASET_ROOT`.
        split: which table.
    """

    name: Literal["mini-imagenet"] = "mini-imagenet"
    path: str | None = None
    split: Literal["train", "val", "test"] = "train"

    def build(self) -> ImageDataset:
        """Read the table; no image is looked at."""
        expected = f"the folder of mini-ImageNet, with images/ and {self.split}.csv"
        root = located(self.path, "MINI_IMAGENET_ROOT", expected)
        table = root / f"{self.split}.csv"
        if not (root / "images").is_dir() or not table.is_file():
            raise wrong_place(root, expected)
        rows = read_rows(table, labelled=True)
        classes, labels = numbered(_column(rows, "label", (), table), None, str(table))
        files = [str(file) for file in _column(rows, "filename", (), table)]
        return ListedImages("mini-imagenet", classes, root / "images", files, labels)


def read_rows(path: Path, *, labelled: bool) -> Rows:
    """The rows of a list; those of a text file have `image` and perhaps `label`.

    Raises:
        UserError: the file cannot be read, is damaged or of an unknown kind, or holds no row.
    """
    try:
        rows = _rows(path, labelled=labelled)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (csv.Error, ValueError) as error:
        raise UserError(f"{path} is damaged, expected a list of images: {error}") from None
    if not rows:
        raise UserError(f"{path} lists no image")
    return rows


def _rows(path: Path, *, labelled: bool) -> Rows:
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8-sig") as file:
            return list(csv.DictReader(file))
    text = path.read_text(encoding="utf-8-sig")
    lines = [line.strip() for line in text.split("\n") if line.strip()]  # captions may hold what else splits lines
    match path.suffix:
        case ".txt":
            return [_text_row(line, path, labelled=labelled) for line in lines]
        case ".json":
            content = parse_json(text)
            if isinstance(content, dict):
                content = [{"image": file, "label": label} for file, label in content.items()]
        case ".jsonl":
            content = [parse_json(line) for line in lines]
        case _:
            raise UserError(f"{path} is no list of images: expected .txt, .csv, .json or .jsonl")
    if not isinstance(content, list) or not all(isinstance(entry, str | dict) for entry in content):
        raise UserError(f"{path} is no list of images: expected paths or objects")
    return [{"image": entry} if isinstance(entry, str) else entry for entry in content]


def _text_row(line: str, path: Path, *, labelled: bool) -> dict[str, Any]:
    if not labelled:
        return {"image": line}
    image, *label = line.rsplit(maxsplit=1)
    if not label:
        raise UserError(f"{path} has the line {line!r}: expected a path, white space and a label")
    return {"image": image, "label": label[0]}


def _column(rows: Rows, wanted: str | None, known: Sequence[str], path: Path) -> list[Any]:
    names = (wanted,) if wanted is not None and path.suffix != ".txt" else known
    found = next((name for name in names if name in rows[0]), None)
    if found is None:
        there = ", ".join(map(str, rows[0]))
        raise UserError(f"{path} has no column {' or '.join(names)}: there are {there}")
    values = [row.get(found) for row in rows]
    if None in values:
        raise UserError(f"{path} has no {found!r} in entry {values.index(None) + 1}")
    return values


def numbered(
    labels: Sequence[Any], classes: int | tuple[str, ...] | None, where: str
) -> tuple[tuple[str, ...], list[int]]:
    """The names of the classes, and every label as a number.

    Args:
        labels: numbers, or names of classes.
        classes: how many, or their names; None tells it from the labels.
        where: for errors.

    Raises:
        UserError: a label is missing, or neither a number from 0 on nor the name of a class.
    """
    texts = ["" if label is None else str(label).strip() for label in labels]
    if "" in texts:
        raise UserError(f"{where} has no label in entry {texts.index('') + 1}")
    if isinstance(classes, tuple):
        names = classes
    elif all(text.removeprefix("-").isdecimal() for text in texts):
        wrong = next((text for text in texts if text.startswith("-") or len(text) > DIGITS), None)
        if wrong is not None:
            raise UserError(
                f"{where} has the label {wrong[:20]}, expected numbers from 0 on of at most {DIGITS} digits, or names"
            )
        names = tuple(map(str, range(classes or max(map(int, texts)) + 1)))
    else:
        names = tuple(sorted(set(texts)))
        if classes not in (None, len(names)):
            raise UserError(f"{where} has {len(names)} classes, the option classes says {classes}")
    numbers = {name: number for number, name in enumerate(names)}
    found = []
    for text in texts:
        try:
            found.append(numbers[text] if text in numbers else label_number(text))
        except ValueError:
            raise UserError(f"{where} has the label {text[:50]!r}, which is none of the {len(names)} classes") from None
    return names, found

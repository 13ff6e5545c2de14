"""Images in folders: one folder per class, or one folder of all; and ImageNet's ways of labelling them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from smalti.core.data.dataset import ImageDataset
from smalti.core.data.listed import ListedImages, class_folders, images_below, label_number, lines_of_words
from smalti.core.data.places import located, wrong_place
from smalti.core.errors import UserError
from smalti.core.files import read_json
from smalti.core.options import DatasetOptions

CLASS_INDEX = "ImageNet_class_index.json"
VALIDATION_LABELS = ("val_label.txt", "val_labels.txt", "val_label.json", "val_labels.json", "LOC_val_solution.csv")


class FolderOptions(DatasetOptions):
    """Image files in folders, looked for at any depth.

    Args:
        path: of the folder; None takes the environment's `DATASET_ROOT`.
        labels: `folders`: each folder in `path` is a class, in the order of names; `none`: all labels are 0.
    """

    name: Literal["folder"] = "folder"
    path: str | None = None
    labels: Literal["folders", "none"] = "folders"

    def build(self) -> ImageDataset:
        """List the files."""
        if self.labels == "none":
            root = located(self.path, "DATASET_ROOT", "a folder with images")
            files = images_below(root) if root.is_dir() else []
            if not files:
                raise wrong_place(root, "a folder with images")
            return ListedImages(root.absolute().name, ["all"], root, files)
        expected = "a folder with one folder of images per class"
        root = located(self.path, "DATASET_ROOT", expected)
        return by_class_folder(root.absolute().name, root, expected)


class ImageNetOptions(DatasetOptions):
    """ImageNet: `train/` and `val/` with a folder per class, or `val/` flat with a file of labels beside it.

    Classes are the folders' names in order; an `ImageNet_class_index.json` in `path` replaces their names and
    order. Labels of a flat `val/` are looked for in `path` as `val_label.txt` (lines `file label`, or one label a
    line in the order of file names), `val_label.json` (labels by file), or Kaggle's `LOC_val_solution.csv`; a
    label is a number or a folder's name.

    Args:
        path: holds `train/` and `val/`; None takes the environment's `IMAGENET_ROOT`, then `DATASET_ROOT`.
        split: `train` or `val`.
    """

    name: Literal["imagenet"] = "imagenet"
    path: str | None = None
    split: Literal["train", "val"] = "train"

    def build(self) -> ImageDataset:
        """List the files."""
        expected = "the folder of ImageNet, with train/ and val/"
        root = located(self.path, "IMAGENET_ROOT", expected)
        folder = root / self.split
        if not folder.is_dir():
            raise wrong_place(root, expected)
        synsets, names = _class_index(root)
        if class_folders(folder):
            dataset = by_class_folder("imagenet", folder, "a folder with one folder of images per class", synsets)
            dataset.classes = names or dataset.classes
            return dataset
        if not synsets and not (root / "train").is_dir():
            raise wrong_place(root, f"a folder with {CLASS_INDEX} or train/, which tell the classes of val/")
        synsets = synsets or class_folders(root / "train")
        files = images_below(folder)
        return ListedImages(
            "imagenet", names or synsets, folder, files, _validation_labels(root, folder, files, synsets)
        )


def by_class_folder(name: str, root: Path, expected: str, classes: Sequence[str] | None = None) -> ListedImages:
    """All images below the folders of `root`, each a class; `classes` tells the order, otherwise names do."""
    found = class_folders(root) if root.is_dir() else []
    order = {folder: label for label, folder in enumerate(classes or found)}
    unknown = [folder for folder in found if folder not in order]
    if unknown:
        raise UserError(f"{root / unknown[0]} is no class of {CLASS_INDEX}, which tells of {len(order)}")
    files, labels = [], []
    for folder in found:
        inside = [f"{folder}/{file}" for file in images_below(root / folder)]
        files += inside
        labels += [order[folder]] * len(inside)
    if not files:
        raise wrong_place(root, expected)
    return ListedImages(name, list(order), root, files, labels)


def _class_index(root: Path) -> tuple[list[str], tuple[str, ...]]:
    """Folder names and class names in the order of labels, where the class index lies in `root`; else empty."""
    path = root / CLASS_INDEX
    if not path.exists():
        return [], ()
    content = read_json(path, "folder and name of every class by label")
    try:
        pairs = [content[str(label)] for label in range(len(content))]
        return [str(synset) for synset, _ in pairs], tuple(f"{synset} {name}" for synset, name in pairs)
    except (KeyError, TypeError, ValueError):
        raise UserError(f'{path} is damaged, expected {{"0": ["n01440764", "tench"], ...}}') from None


def _validation_labels(root: Path, folder: Path, files: list[str], synsets: list[str]) -> list[int]:
    paths = [root / name for name in VALIDATION_LABELS if (root / name).exists()]
    if not paths:
        raise wrong_place(root, f"the labels of {folder}, in {VALIDATION_LABELS[0]} or folders by class")
    path = paths[0]
    labels = _told_labels(path, f"a label for each image of {folder}")
    if all(file == "" for file, _ in labels) and len(labels) == len(files):
        labels = [(file, label) for file, (_, label) in zip(files, labels, strict=True)]
    by_stem = {Path(file).stem: label for file, label in labels}
    numbers = {synset: number for number, synset in enumerate(synsets)}
    try:
        found = [by_stem[Path(file).stem] for file in files]
        return [numbers[label] if label in numbers else label_number(label) for label in found]
    except KeyError as error:
        raise UserError(f"{path} has no label for {error.args[0]} of {folder}") from None
    except ValueError as error:
        raise UserError(f"{path}: a label is neither a number nor a class of {root}: {error}") from None


def _told_labels(path: Path, expected: str) -> list[tuple[str, str]]:
    """File (empty where the line has none) and label."""
    if path.suffix == ".json":
        content = read_json(path, expected)
        if not isinstance(content, dict):
            raise UserError(f"{path} is damaged, expected {expected}")
        return [(file, str(label)) for file, label in content.items()]
    return [("", line[0]) if len(line) == 1 else (line[0], line[1]) for line in lines_of_words(path)]

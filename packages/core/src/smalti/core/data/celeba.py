"""CelebA with its split file (Liu et al. 2015)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from smalti.core.data.dataset import ImageDataset
from smalti.core.data.listed import ListedImages, lines_of_words
from smalti.core.data.places import located, wrong_place
from smalti.core.errors import UserError
from smalti.core.options import DatasetOptions

SPLIT_FILES = ("list_eval_partition.txt", "list_eval_partition.csv")
FACE = (25, 57, 153, 185)  # 128 x 128 of the 178 x 218 pixels


class CelebAOptions(DatasetOptions):
    """Aligned CelebA: `img_align_celeba/` and `list_eval_partition.txt` (or `.csv`), at most two folders deep.

    Args:
        path: holds these; None takes the environment's `CELEBA_ROOT`, then `DATASET_ROOT`.
        split: 162 770, 19 867 or 19 962 images.
        crop: `face`: the 128 x 128 pixels from (25, 57) on, as visual-tokenizer-pytorch takes; `none`: all pixels.
    """

    name: Literal["celeba"] = "celeba"
    path: str | None = None
    split: Literal["train", "val", "test"] = "train"
    crop: Literal["face", "none"] = "face"

    def build(self) -> ImageDataset:
        """Read the split file; no image is looked at."""
        expected = f"the folder of CelebA, with img_align_celeba/ and {SPLIT_FILES[0]}"
        root = located(self.path, "CELEBA_ROOT", expected)
        folder = _first(root, "img_align_celeba")
        if folder is not None and (folder / folder.name).is_dir():  # as Kaggle packs it
            folder = folder / folder.name
        table = next((found for name in SPLIT_FILES if (found := _first(root, name)) is not None), None)
        if folder is None or table is None:
            raise wrong_place(root, expected)
        number = ("train", "val", "test").index(self.split)
        files = [file for file, split in _splits(table) if split == number]
        return ListedImages("celeba", ["face"], folder, files, box=FACE if self.crop == "face" else None)


def _first(root: Path, name: str) -> Path | None:
    return next((path for depth in ("", "*/", "*/*/") for path in sorted(root.glob(depth + name))), None)


def _splits(table: Path) -> list[tuple[str, int]]:
    """File and number of the split of every image."""
    lines = lines_of_words(table)
    try:
        return [(file, int(split)) for file, split in lines]
    except ValueError:
        raise UserError(f"{table} is damaged, expected lines with a file and the number of its split") from None

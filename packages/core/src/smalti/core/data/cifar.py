"""CIFAR-10 and CIFAR-100 from the published Python batches (Krizhevsky 2009).

The batches are pickles. They are read by an unpickler that knows NumPy arrays and plain values and nothing else.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from smalti.core.data.dataset import ImageDataset, Record
from smalti.core.data.indexed import IndexedDataset
from smalti.core.data.places import located, wrong_place
from smalti.core.errors import UserError
from smalti.core.options import DatasetOptions

SIDE = 32
_HEADER = f"P6\n{SIDE} {SIDE}\n255\n".encode()  # of a PPM file: the plain bytes of an image


class CIFAR10Options(DatasetOptions):
    """CIFAR-10: the folder `cifar-10-batches-py`, or the one that holds it.

    Args:
        path: of either; None takes the environment's `CIFAR10_ROOT`, then `DATASET_ROOT`.
        split: 50 000 or 10 000 images.
    """

    name: Literal["cifar10"] = "cifar10"
    path: str | None = None
    split: Literal["train", "test"] = "train"

    def build(self) -> ImageDataset:
        """Read all images into memory."""
        folder = _folder(self.path, "CIFAR10_ROOT", "cifar-10-batches-py")
        names = [f"data_batch_{number}" for number in range(1, 6)] if self.split == "train" else ["test_batch"]
        return CIFAR(self.name, folder, names, "batches.meta", b"label_names", b"labels")


class CIFAR100Options(DatasetOptions):
    """CIFAR-100: the folder `cifar-100-python`, or the one that holds it.

    Args:
        path: of either; None takes the environment's `CIFAR100_ROOT`, then `DATASET_ROOT`.
        split: 50 000 or 10 000 images.
        labels: the 100 fine classes or the 20 coarse ones.
    """

    name: Literal["cifar100"] = "cifar100"
    path: str | None = None
    split: Literal["train", "test"] = "train"
    labels: Literal["fine", "coarse"] = "fine"

    def build(self) -> ImageDataset:
        """Read all images into memory."""
        folder = _folder(self.path, "CIFAR100_ROOT", "cifar-100-python")
        kind = self.labels.encode()
        return CIFAR(self.name, folder, [self.split], "meta", kind + b"_label_names", kind + b"_labels")


class CIFAR(IndexedDataset):
    """The images of some batches, in memory.

    Args:
        name: of the data set.
        folder: of the files.
        batches: names of files.
        meta: name of the file with the names of classes.
        names: key of these.
        labels: key of the labels in a batch.

    Raises:
        UserError: a file is missing, damaged, or holds something else.
    """

    def __init__(self, name: str, folder: Path, batches: list[str], meta: str, names: bytes, labels: bytes) -> None:
        self.name = name
        (told,) = _entries(folder / meta, (names, list))
        try:
            self.classes = tuple(map(bytes.decode, told))
        except (TypeError, UnicodeDecodeError):
            raise UserError(f"{folder / meta} is damaged: its {names.decode()} are no names") from None
        images, numbers = [], []
        for batch in batches:
            pixels, own = _entries(folder / batch, (b"data", np.ndarray), (labels, list))
            if pixels.dtype != np.uint8 or pixels.shape != (len(own), 3 * SIDE * SIDE):
                raise UserError(f"{folder / batch} holds {pixels.dtype} {pixels.shape} for {len(own)} labels")
            images.append(pixels.reshape(-1, 3, SIDE, SIDE))
            numbers += own
        self._images: NDArray[np.uint8] = np.concatenate(images)
        self._labels: list[int] = numbers
        if not all(isinstance(label, int) and 0 <= label < len(self.classes) for label in numbers):
            raise UserError(f"{folder} holds a label that is none of the {len(self.classes)} classes")

    def record(self, index: int) -> Record:
        """One of the images."""
        content = _HEADER + self._images[index].transpose(1, 2, 0).tobytes()
        return Record(f"{index:05d}", content, self._labels[index])

    def __len__(self) -> int:
        return len(self._labels)


def _folder(path: str | None, variable: str, name: str) -> Path:
    expected = f"the folder {name}, or the one that holds it"
    root = located(path, variable, expected)
    for folder in (root / name, root):
        if folder.is_dir() and folder.absolute().name == name:
            return folder
    raise wrong_place(root, expected)


def _entries(path: Path, *wanted: tuple[bytes, type]) -> list[Any]:
    """The values of some keys in a batch file, each of the type that is wanted."""
    try:
        with path.open("rb") as file:
            content = _PlainUnpickler(file, encoding="bytes").load()
    except FileNotFoundError:
        raise wrong_place(path, "a batch of CIFAR") from None
    except Exception as error:  # noqa: BLE001  # broken pickles raise errors of all types
        raise UserError(f"{path} is damaged or no batch of CIFAR: {' '.join(str(error).split())[:200]}") from None
    values = content if isinstance(content, dict) else {}
    for key, kind in wanted:
        if not isinstance(values.get(key), kind):
            raise UserError(f"{path} is no batch of CIFAR: it has no {key.decode()}")
    return [values[key] for key, _ in wanted]


def _array(*_: object) -> NDArray[np.uint8]:
    return np.empty(0, np.uint8)


def _encoded(text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"the encoding {encoding} is not expected here")
    return text.encode("latin1")


# Functions of our own, because a pickle can set attributes of what it finds. NumPy 2 renamed its module.
_FOUND: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _encoded,
    ("numpy.core.multiarray", "_reconstruct"): _array,
    ("numpy._core.multiarray", "_reconstruct"): _array,
}


class _PlainUnpickler(pickle.Unpickler):
    """Makes NumPy arrays and plain values, and refuses every other name."""

    def find_class(self, module: str, name: str) -> Any:
        """One of the names that an array needs."""
        if (module, name) not in _FOUND:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _FOUND[module, name]

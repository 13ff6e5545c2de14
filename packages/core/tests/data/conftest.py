"""Helpers that the tests of data share."""

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from smalti.core.data.dataset import ImageDataset, Record
from smalti.core.noise import mixed_seed


@pytest.fixture(scope="session")
def memory_dataset(make_png) -> type[ImageDataset]:
    class MemoryDataset(ImageDataset):
        """Tiny grey images, or what `contents` puts in their place."""

        def __init__(self, count: int, contents: dict[int, bytes] | None = None) -> None:
            self.name = "memory"
            self.classes = ("even", "odd")
            images = {i: make_png(np.full((4, 4), i % 256, np.uint8)) for i in range(count)} | (contents or {})
            self.items = [Record(f"k{i}", image, i % 2) for i, image in images.items()]

        def records(self, order: int | None = None) -> Iterator[Record]:
            indices = np.arange(len(self.items))
            if order is not None:
                indices = np.random.Generator(np.random.PCG64(mixed_seed(order))).permutation(indices)
            return (self.items[index] for index in indices)

        def __len__(self) -> int:
            return len(self.items)

    return MemoryDataset


@pytest.fixture
def shard_folder(tmp_path: Path, make_png, make_tar) -> Callable[..., Path]:
    """Write shards of `sizes` samples with labels i % 3, perhaps gzipped, perhaps with a card."""

    def write(*sizes: int, packed: bool = False, card: bool = False) -> Path:
        folder = tmp_path / "data"
        folder.mkdir(exist_ok=True)
        first, names = 0, {}
        for number, size in enumerate(sizes):
            files: dict[str, bytes] = {}
            for index in range(first, first + size):
                files[f"s{index:03d}.cls"] = str(index % 3).encode()
                files[f"s{index:03d}.png"] = make_png(np.full((4, 4), index, np.uint8))
            name = f"train-{number:04d}.tar" + (".gz" if packed else "")
            content = make_tar(files)
            (folder / name).write_bytes(gzip.compress(content, mtime=0) if packed else content)
            names[name], first = size, first + size
        if card:
            content = {"name": "threes", "classes": ["a", "b", "c"], "shards": names}
            (folder / "dataset.json").write_text(json.dumps(content))
        return folder

    return write

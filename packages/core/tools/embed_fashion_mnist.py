"""Make the embedded Fashion-MNIST subset out of the published test files.

    python tools/embed_fashion_mnist.py t10k-images-idx3-ubyte.gz t10k-labels-idx1-ubyte.gz \
        src/smalti/core/assets/fashion-mnist

Two WebDataset shards, balanced over the ten classes: 7,500 images to train on and 1,000 held out. The same
input gives the same bytes. PNGs are stored uncompressed because gzip over the whole shard packs them better.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image
from webdataset import TarWriter

CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
PER_CLASS = {"train": 750, "validation": 100}
SEED = 20_170_825
LICENSE = """The MIT License (MIT)

Copyright (c) 2017 Zalando SE, https://tech.zalando.com

Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal
in the Software without restriction, including without limitation the rights
to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all
copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
SOFTWARE.
"""


def read_idx(path: Path, axes: int) -> np.ndarray:
    """The uint8 array of an IDX file; its header holds a magic number and one size per axis, big-endian."""
    content = gzip.decompress(path.read_bytes())
    header = np.frombuffer(content, ">u4", 1 + axes)
    assert header[0] == 0x0800 + axes, f"{path} is not an IDX file of {axes} axes of bytes"
    return np.frombuffer(content, np.uint8, offset=header.nbytes).reshape(header[1:])


def png(pixels: np.ndarray) -> bytes:
    """A grey image `(H, W)` as an uncompressed PNG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


def write_shard(path: Path, images: np.ndarray, labels: np.ndarray, chosen: np.ndarray) -> None:
    """Write the images `chosen` by index; the key tells the index in the published file."""
    with (
        path.open("wb") as file,
        gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as packed,
        TarWriter(packed, mtime=0, encoder=False, compress=False) as tar,
    ):
        for index in chosen:
            label = str(labels[index]).encode()
            tar.write({"__key__": f"t10k-{index:05d}", "cls": label, "png": png(images[index])})


def main() -> None:
    """Read the command line and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in ("images", "labels", "out"):
        parser.add_argument(name, type=Path)
    arguments = parser.parse_args()
    images, labels = read_idx(arguments.images, 3), read_idx(arguments.labels, 1)
    arguments.out.mkdir(parents=True, exist_ok=True)

    generator = np.random.Generator(np.random.PCG64(SEED))
    of_class = [generator.permutation(np.flatnonzero(labels == label)) for label in range(len(CLASSES))]
    shards, taken = {}, 0
    for split, count in PER_CLASS.items():
        chosen = np.concatenate([indices[taken : taken + count] for indices in of_class])
        name = f"{split}-0000.tar.gz"
        write_shard(arguments.out / name, images, labels, generator.permutation(chosen))
        shards[name], taken = len(chosen), taken + count

    card = {
        "name": "fashion-mnist",
        "classes": CLASSES,
        "shards": shards,
        "image_size": 28,
        "channels": 1,
        "source": "the 10,000 test images of Fashion-MNIST (Xiao, Rasul and Vollgraf 2017, arXiv:1708.07747), "
        "https://github.com/zalandoresearch/fashion-mnist",
        "licence": "MIT, see LICENSE",
    }
    (arguments.out / "dataset.json").write_text(json.dumps(card, indent=2) + "\n")
    (arguments.out / "LICENSE").write_text(LICENSE)


if __name__ == "__main__":
    main()

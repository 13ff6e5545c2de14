"""What the documentation's blocks work with: small data, and small published files of random weights."""

from __future__ import annotations

import io
import json
import math
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from smalti.core.checkpoints.importing import export_file
from smalti.core.checkpoints.zoo import zoo_model
from smalti.core.data.webdataset import ASSETS
from smalti.core.layout import TokenLayout
from smalti.core.plugins import registry
from smalti.core.recipe import load_recipe
from smalti.core.shrink import from_scratch

# Sizes of published models, made as small as their layouts can tell.
SMALL = {"width": 64, "dim": 64, "layers": 1, "heads": 1, "codebook_size": 64, "blocks": 1, "ffn_multiple": 64}


def smaller(options: Any) -> Any:
    """Plain data of options with small sizes."""
    if isinstance(options, list):
        return [smaller(each) for each in options]
    if not isinstance(options, dict):
        return options
    capped = {
        name: min(value, SMALL[name]) if name in SMALL and type(value) is int else smaller(value)
        for name, value in options.items()
    }
    if "mlp_width" in capped:
        capped["mlp_width"] = 4 * capped["width"]
    if isinstance(capped.get("multipliers"), list):
        capped["multipliers"] = [1] * len(capped["multipliers"])
    return capped


def write_published(name: str, path: Path) -> None:
    """A file as the publisher of a model of the zoo would have written it, of a small model with random weights."""
    published, recipe = zoo_model(name), load_recipe(name)
    torch.manual_seed(0)
    if published.kind == "generator":
        assert published.tokens is not None
        vocab = tuple(min(size, SMALL["codebook_size"]) for size in published.tokens.vocab)
        layout = TokenLayout(kind=published.tokens.kind, shape=published.tokens.shape, vocab=vocab)
        options = registry().options("generator", recipe.generator.name)
        model = options.model_validate(smaller(recipe.generator.model_dump(mode="json"))).build(layout, 1000)
    else:
        content = from_scratch(smaller(recipe.tokenizer.model_dump(mode="json")))
        model = registry().options("tokenizer", content["name"]).model_validate(content).build()
    export_file(model.eval(), published.layout, path)


def pictures(count: int, side: int) -> np.ndarray:
    """Smooth pictures of many colours, uint8 `(count, side, side, 3)`."""
    random = np.random.default_rng(count + side)
    coarse = random.integers(0, 256, (count, 6, 6, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(each).resize((side, side))) for each in coarse])


def folder(path: Path, count: int = 6, classes: tuple[str, ...] = ("",)) -> None:
    """Images of 64 pixels, in a folder of each class."""
    for index, picture in enumerate(pictures(count, 64)):
        place = path / classes[index % len(classes)]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(place / f"{index:03d}.png")


def cifar_batches(path: Path) -> None:
    """CIFAR-10 as it is published, of four images in each batch."""
    path.mkdir()
    names = b"airplane automobile bird cat deer dog frog horse ship truck".split()
    (path / "batches.meta").write_bytes(pickle.dumps({b"label_names": names}))
    for batch in ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"):
        data = pictures(4, 32).transpose(0, 3, 1, 2).reshape(4, -1)
        (path / batch).write_bytes(pickle.dumps({b"data": data, b"labels": [0, 1, 8, 9]}))


# What a page may find in its folder, by the name under which its blocks speak of it.
MAKERS: dict[str, Callable[[Path], None]] = {
    "photos": lambda path: folder(path, 12, ("cat", "dog")),
    "held-out": lambda path: folder(path, 6, ("cat", "dog")),
    "imagenet/val": lambda path: folder(path, 12),
    "reconstructed": lambda path: folder(path, 8),
    "cifar-10-batches-py": cifar_batches,
    "photo.jpg": lambda path: Image.fromarray(pictures(1, 48)[0]).save(path),
    "samples.npz": lambda path: np.savez(path, arr_0=pictures(12, 64)),
    "VIRTUAL_imagenet256_labeled.npz": lambda path: np.savez(path, arr_0=pictures(13, 64)),
    "vq_ds16_c2i.pt": lambda path: write_published("llamagen-vq-ds16", path),
    "c2i_B_256.pt": lambda path: write_published("llamagen-b-256", path),
    "last.ckpt": lambda path: write_published("gaussiantoken-cifar-f4-gs64-cb1024", path),
}


@pytest.fixture(scope="session")
def stock_names() -> list[str]:
    """The names that `stock` knows."""
    return list(MAKERS)


@pytest.fixture(scope="session")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The file or folder of a name among `MAKERS`, made once; it is to be copied or linked."""
    root = tmp_path_factory.mktemp("stock")

    def get(name: str) -> Path:
        path = root / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            MAKERS[name](path)
        return path

    return get


@pytest.fixture(scope="session")
def published_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any], Path]:
    """In the place of the hub: the file of a model of the zoo."""
    root = tmp_path_factory.mktemp("hub")

    def fetch(model: Any) -> Path:
        path = root / f"{model.name}.pt"
        if not path.exists():
            write_published(model.name, path)
        return path

    return fetch


@pytest.fixture(scope="session")
def few_images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Forty of the embedded images, four of each class, as a data set of recipes."""
    path = tmp_path_factory.mktemp("few") / "few-0000.tar"
    source = ASSETS / "fashion-mnist"
    wanted = dict.fromkeys(range(10), 4)
    with tarfile.open(source / "validation-0000.tar.gz") as images, tarfile.open(path, "w") as few:
        contents = {member.name: images.extractfile(member).read() for member in images if member.isfile()}  # type: ignore[union-attr]
        for name, content in contents.items():
            if not name.endswith(".cls") or wanted[int(content)] == 0:
                continue
            wanted[int(content)] -= 1
            key = name.removesuffix(".cls")
            for ending in (".png", ".cls"):
                info = tarfile.TarInfo(key + ending)
                info.size = len(contents[key + ending])
                few.addfile(info, io.BytesIO(contents[key + ending]))
    classes = json.loads((source / "dataset.json").read_text())["classes"]
    return {"name": "webdataset", "shards": str(path), "classes": classes}


@pytest.fixture(scope="session")
def torch_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of torch that holds the file of FID's Inception, with random weights that keep features alive."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Network

    generator = torch.Generator().manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(Network, "load_state_dict", lambda self, state: None)
        network = Network("seeded", ["2048"])
    state = network.state_dict()
    for name, weight in state.items():
        if weight.ndim > 1:
            weight.normal_(0, math.sqrt(2 / math.prod(weight.shape[1:])), generator=generator)
        elif name.endswith(("running_var", "bn.weight")):
            weight.fill_(1.0)
    home = tmp_path_factory.mktemp("torch")
    (home / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(state, home / "hub" / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth")
    return home

"""Decoded training images per second from tar shards, beside torchvision's ImageFolder in the same run.

Both read the same JPEGs, draw the same kind of crop, mirror half, and give shuffled float batches in [-1, 1]; both
have two workers: threads here, processes there.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comparison import Comparison, Ours
from PIL import Image

from smalti.core.data.augmentation import Augmentation, RandomCrop, RandomResizedCrop, RandomScaleCrop
from smalti.core.data.folders import FolderOptions
from smalti.core.data.loader import TrainBatches
from smalti.core.data.make_shards import ShardSettings, make_shards
from smalti.core.data.webdataset import WebDatasetOptions
from smalti.core.options import Preprocessing

pytestmark = pytest.mark.benchmark(group="Data")
COUNT, BATCH, WORKERS = 384, 32, 2
SIZES = {"256": (256, 256), "500x375": (500, 375)}
CROPS = {
    "centre": None,
    "random": RandomCrop(),
    "random-scale": RandomScaleCrop(),
    "random-resized": RandomResizedCrop(),
}


@pytest.fixture(scope="module", params=SIZES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEGs in two class folders: smooth colours with grain, about as many bytes a pixel as photographs have."""
    root = tmp_path_factory.mktemp(request.param, numbered=False)
    random = np.random.default_rng(0)
    width, height = SIZES[request.param]
    for index in range(COUNT):
        coarse = np.clip(random.normal(128, 60, (height // 16 + 2, width // 16 + 2, 3)), 0, 255).astype(np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), np.float32)
        pixels = np.clip(smooth + random.normal(0, 4, smooth.shape), 0, 255).astype(np.uint8)
        path = root / "images" / f"class{index % 2}" / f"{index:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, quality=92)
    source = FolderOptions(path=str(root / "images"))
    make_shards(
        source.build(),
        root / "shards",
        ShardSettings(samples=128),
        source=source.model_dump(),
        workers=WORKERS,
        max_undecodable=0,
        warn=print,
        advance=lambda _: None,
    )
    return root


@pytest.fixture
def peer(folder: Path) -> Callable[[str], Iterable[Any]]:
    """ImageFolder with the transform of a name and a loader that keeps its workers."""
    transforms = importlib.import_module("torchvision.transforms")
    datasets = importlib.import_module("torchvision.datasets")
    bicubic = transforms.InterpolationMode.BICUBIC
    crops = {
        "centre": [transforms.Resize(256, bicubic), transforms.CenterCrop(256)],
        "random": [transforms.Resize(256, bicubic), transforms.RandomCrop(256)],
        "random-scale": [transforms.Lambda(_random_scale_crop)],
        "random-resized": [transforms.RandomResizedCrop(256)],
    }

    def loader(name: str) -> Iterable[Any]:
        to_tensor = [transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(0.5, 0.5)]
        images = datasets.ImageFolder(folder / "images", transforms.Compose([*crops[name], *to_tensor]))
        return torch.utils.data.DataLoader(
            images, BATCH, shuffle=True, num_workers=WORKERS, persistent_workers=True, drop_last=True
        )

    return loader


def _random_scale_crop(picture: Image.Image) -> Image.Image:
    """ADM's random crop as the published code draws it, with Pillow."""
    short = int(torch.randint(256, 321, ()))
    while min(picture.size) >= 2 * short:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = short / min(picture.size)
    size = (round(picture.width * scale), round(picture.height * scale))
    picture = picture.resize(size, Image.Resampling.BICUBIC)
    top, left = (int(torch.randint(0, side - 255, ())) for side in (picture.height, picture.width))
    return picture.crop((left, top, left + 256, top + 256))


@pytest.mark.parametrize("crop", CROPS)
def test_images_per_second(folder: Path, peer: Callable[[str], Iterable[Any]], compare: Comparison, crop: str) -> None:
    dataset = WebDatasetOptions(shards=f"{folder}/shards/*.tar").build()
    # ADM's centre crop and torchvision's are the same thing where nothing is halved: 256 and 375 pixels.
    augment = Augmentation(crop=CROPS[crop], flip=True)

    def ours() -> None:
        batches = TrainBatches(
            dataset, Preprocessing(image_size=256), BATCH, 0, 0, 1, 0, print, augment=augment, workers=WORKERS
        )
        for batch in itertools.islice(batches, COUNT // BATCH):
            assert batch.images.shape == (BATCH, 3, 256, 256)

    theirs = peer(crop)

    def other() -> None:
        for images, _ in theirs:
            assert images.shape == (BATCH, 3, 256, 256)

    other()  # starts the workers
    ours()  # reads the headers
    work = Ours(
        f"JPEG of {folder.name} pixels, {crop} crop", ours, amounts={"images": COUNT}, bars={"ImageFolder": 2.0}
    )
    compare([work], {"ImageFolder": other})

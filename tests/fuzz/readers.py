"""The readers of files, each with small files that it reads, and with the call that a user makes."""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import json
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from smalti.core.checkpoints.file import read_checkpoint
from smalti.core.checkpoints.importing import export_checkpoint, import_checkpoint
from smalti.core.contracts import Generator, Tokenizer
from smalti.core.data import stored_tokens
from smalti.core.data.arrow import HuggingFaceOptions
from smalti.core.data.celeba import CelebAOptions
from smalti.core.data.cifar import CIFAR10Options
from smalti.core.data.dataset import ImageDataset, Record
from smalti.core.data.decode import decode, decode_whole
from smalti.core.data.folders import ImageNetOptions
from smalti.core.data.listings import ListOptions
from smalti.core.data.loader import read_images
from smalti.core.data.stored_tokens import ArrayTokens, LineTokens
from smalti.core.data.texts import text_of
from smalti.core.data.token_shards import (
    ShardEntry,
    TokenManifest,
    read_token_shards,
    shard_name,
    write_manifest,
    write_token_shard,
)
from smalti.core.data.webdataset import WebDatasetOptions
from smalti.core.errors import UserError
from smalti.core.layout import TokenLayout
from smalti.core.options import Preprocessing
from smalti.core.recipe import load_recipe
from smalti.core.run_folder import RunFolder
from smalti.core.training.loop import train
from smalti.core.training.options import Optimization
from smalti.core.training.task import Task
from smalti.eval.comparison import compared
from smalti.eval.evaluation_sides import opened_statistics
from smalti.eval.image_source import stored_images
from smalti.eval.protocols import Protocol
from smalti.eval.sample_archive import SampleArchive
from smalti.gaussian.fitting.input import read_image

LAYOUT = TokenLayout.grid(4, 4, (16, 300))
SIZE = Preprocessing(image_size=8, fit="center-crop")


class Reader(NamedTuple):
    """Something that reads files of strangers.

    Attributes:
        seed: writes whole files into an empty folder.
        read: reads them, and checks that what comes is what may come.
    """

    seed: Callable[[Path], None]
    read: Callable[[Path], object]


def _only(folder: Path, pattern: str = "*") -> Path:
    """The one file of a folder with several whole ones that this input is about: the one written last."""
    return max(folder.glob(pattern), key=lambda path: path.stat().st_mtime_ns)


def _picture(mode: str, side: int = 12) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 255, (side, side, 4), np.uint8)
    match mode:
        case "I;16":
            return Image.fromarray(values[:, :, 0].astype(np.uint16) * 257)
        case "1" | "L":
            return Image.fromarray(values[:, :, 0]).convert(mode)
        case "P":
            return Image.fromarray(values[:, :, :3]).quantize(16)
        case "LA" | "RGBA":
            return Image.fromarray(values).convert(mode)
        case "CMYK":
            return Image.fromarray(values[:, :, :3]).convert("CMYK")
    return Image.fromarray(values[:, :, :3])


def _file(mode: str, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    _picture(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def _tar(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def _look(dataset: ImageDataset, most: int = 50) -> None:
    """Every record, decoded as for training; damaged images may be left out."""
    for batch in read_images(dataset, SIZE, 4, 0, most, max_undecodable=most, warn=lambda _: None):
        assert batch.images.shape[1:] == (3, 8, 8)
        assert bool((batch.images.abs() <= 1).all())
        assert bool(((batch.labels >= 0) & (batch.labels < len(dataset.classes))).all())


# --- pictures


def _seed_pictures(folder: Path) -> None:
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        (folder / f"{mode.replace(';', '')}.png").write_bytes(_file(mode, "PNG"))
    (folder / "palette.png").write_bytes(_file("P", "PNG", transparency=0))
    for mode in ("L", "RGB", "CMYK"):
        (folder / f"{mode}.jpg").write_bytes(_file(mode, "JPEG"))
    (folder / "progressive.jpg").write_bytes(_file("RGB", "JPEG", progressive=True))
    (folder / "lossless.webp").write_bytes(_file("RGBA", "WEBP", lossless=True))
    (folder / "lossy.webp").write_bytes(_file("RGB", "WEBP"))
    (folder / "x.bmp").write_bytes(_file("RGB", "BMP"))
    (folder / "x.ppm").write_bytes(_file("RGB", "PPM"))
    (folder / "x.tif").write_bytes(_file("RGB", "TIFF", compression="tiff_lzw"))


def _read_picture(folder: Path) -> None:
    path = _only(folder)
    content = path.read_bytes()
    try:
        for channels in (1, 3):
            assert decode(content, SIZE.model_copy(update={"channels": channels})).shape == (channels, 8, 8)
        assert decode_whole(content, 3).dtype == np.uint8
    except UserError as error:  # who reads it names the file
        raise UserError(f"{path}: {error}") from None


def _read_picture_to_fit(folder: Path) -> None:
    pixels = read_image(_only(folder), 16)
    assert len(pixels) in (1, 3)
    assert bool(((pixels >= 0) & (pixels <= 1)).all())


def _read_picture_folder(folder: Path) -> None:
    for batch in stored_images(str(folder), SIZE).batches(4, 0, 1):
        assert batch.images.shape[1:] == (8, 8, 3)


# --- shards of images, lists, known data sets


def _members(kind: str = "PNG") -> dict[str, bytes]:
    members = {}
    for index in range(6):
        members[f"{index:04d}.{kind.lower()}"] = _file("L" if index % 2 else "RGB", kind)
        if index % 3:
            members[f"{index:04d}.cls"] = str(index % 3).encode()
        else:
            members[f"{index:04d}.json"] = json.dumps({"label": index % 3, "more": [1]}).encode()
        members[f"{index:04d}.npy"] = _npy(np.ones((2, 3), np.float32))
    return members


def _seed_shards(folder: Path) -> None:
    (folder / "a.tar").write_bytes(_tar(_members()))
    (folder / "b.tar.gz").write_bytes(gzip.compress(_tar(_members("WEBP"))))
    (folder / "dataset.json").write_text(
        json.dumps({"name": "toy", "classes": ["a", "b", "c"], "shards": {"a.tar": 6}})
    )


def _read_shards(folder: Path) -> None:
    dataset = WebDatasetOptions(shards=str(folder / "*.tar*"), classes=3, text="npy", shuffle_buffer=4).build()
    assert len(dataset) >= 0
    _look(dataset)
    for record in dataset.records(1):
        text_of(record)


def _seed_lists(folder: Path) -> None:
    names = [f"{index}.png" for index in range(4)]
    for name in names:
        (folder / name).write_bytes(_file("L", "PNG"))
    rows = [{"image": name, "label": index % 2, "text": f"picture {index}"} for index, name in enumerate(names)]
    (folder / "list.json").write_text(json.dumps(rows))
    (folder / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "list.txt").write_text("".join(f"{row['image']} {row['label']}\n" for row in rows))
    with (folder / "list.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _read_list(folder: Path) -> None:
    path = _only(folder)
    if path.suffix == ".png":
        path = folder / "list.csv"
    text = None if path.suffix == ".txt" else "text"
    dataset = ListOptions(path=str(path), label="label", text=text).build()
    _look(dataset)


def _seed_imagenet(folder: Path) -> None:
    (folder / "val").mkdir()
    for index in range(4):
        (folder / "val" / f"{index}.jpg").write_bytes(_file("RGB", "JPEG"))
    (folder / "ImageNet_class_index.json").write_text(json.dumps({"0": ["n01", "tench"], "1": ["n02", "cock"]}))
    (folder / "val_label.json").write_text(json.dumps({f"{index}.jpg": index % 2 for index in range(4)}))
    (folder / "val_label.txt").write_text("".join(f"{index}.jpg n0{index % 2 + 1}\n" for index in range(4)))
    (folder / "LOC_val_solution.csv").write_text(
        "ImageId,Prediction\n" + "".join(f"{i},n01 1 2 3 4\n" for i in range(4))
    )
    (folder / "list_eval_partition.txt").write_text("".join(f"{index}.jpg {index % 3}\n" for index in range(4)))
    (folder / "img_align_celeba").mkdir()


def _read_imagenet(folder: Path) -> None:
    path = _only(folder, "*.*")
    if path.name.startswith("list_eval"):
        CelebAOptions(path=str(folder)).build()
        return
    _look(ImageNetOptions(path=str(folder), split="val").build())


def _seed_cifar(folder: Path) -> None:
    inside = folder / "cifar-10-batches-py"
    inside.mkdir()
    (inside / "batches.meta").write_bytes(pickle.dumps({b"label_names": [b"a", b"b"]}, 2))
    data = np.random.default_rng(0).integers(0, 255, (3, 3072), np.uint8)
    (inside / "test_batch").write_bytes(pickle.dumps({b"data": data, b"labels": [0, 1, 0]}, 2))


def _read_cifar(folder: Path) -> None:
    _look(CIFAR10Options(path=str(folder), split="test").build())


def _seed_arrow(folder: Path) -> None:
    import pyarrow as pa

    rows = [{"bytes": _file("RGB", "PNG"), "path": None} for _ in range(6)]
    image = pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    table = pa.table({"image": image, "label": pa.array([0, 1, 2, 0, 1, 2])})
    features = {"image": {"_type": "Image"}, "label": {"names": ["a", "b", "c"], "_type": "ClassLabel"}}
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    with pa.OSFile(str(folder / "data.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=4)


def _read_arrow(folder: Path) -> None:
    dataset = HuggingFaceOptions(path=str(folder)).build()
    _look(dataset, len(dataset))


# --- tokens


def _seed_tokens(folder: Path) -> None:
    random = np.random.default_rng(0)
    entries = []
    for number in range(2):
        tokens = random.integers(0, 16, (3, 2, LAYOUT.positions, LAYOUT.streams))
        keys = [f"{number}-{index}" for index in range(3)]
        entries.append(write_token_shard(folder / shard_name(number), keys, tokens, [0, 1, 2], LAYOUT))
    assert isinstance(entries[0], ShardEntry)
    write_manifest(folder, TokenManifest(
        layout=LAYOUT, classes=("a", "b", "c"), tokenizer="0" * 16, dataset="toy", samples=6,
        views=("original", "flip"), shards=tuple(entries)))  # fmt: skip


def _read_tokens(folder: Path) -> None:
    os.chdir(folder)  # then names in it are paths as they stand, and might be commands
    found = read_token_shards(".")
    assert found.tokens.shape[2:] == (found.layout.positions, found.layout.streams)
    assert all((found.tokens[..., stream] < size).all() for stream, size in enumerate(found.layout.vocab))
    assert ((found.labels >= 0) & (found.labels < max(len(found.classes), 1))).all()


def _seed_codes(folder: Path) -> None:
    for name in ("codes", "labels"):
        (folder / name).mkdir()
    for index in range(3):
        codes = np.arange(32).reshape(1, 2, 16) + index
        for suffix in ("_vis", "_sem"):
            (folder / "codes" / f"{index}{suffix}.npy").write_bytes(_npy(codes % 16))
        (folder / "labels" / f"{index}.npy").write_bytes(_npy(np.array([index])))


def _read_codes(folder: Path) -> None:
    _stored(ArrayTokens(codes=(str(folder / "codes"),), labels=str(folder / "labels"), classes=3))


def _seed_lines(folder: Path) -> None:
    lines = [{"class_id": index % 3, "tokens": [[index, 20 + index]] * 16} for index in range(4)]
    (folder / "tokens.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _read_lines(folder: Path) -> None:
    stored_tokens._line_starts.cache_clear()  # the same name, but another file each time
    _stored(LineTokens(path=str(folder / "tokens.jsonl"), classes=3))


def _stored(options: ArrayTokens | LineTokens) -> None:
    """As the stage `tokenize` takes them over, to the shard that is written of them."""
    source = options.source()
    if source.samples:
        samples = options.read(LAYOUT, 0, min(source.samples, 10))
        write_token_shard(Path("scratch", "tokens-000000.tar"), samples.keys, samples.tokens, samples.labels, LAYOUT)


# --- models and checkpoints

_OPTIONS = {
    "name": "composed",
    "preprocessing": {"image_size": 8, "channels": 1, "fit": "pad"},
    "encoder": {"name": "cnn", "widths": [8, 8], "blocks": 1, "groups": 2},
    "quantizer": {"name": "vq", "dim": 4, "codebook_size": 8},
    "decoder": {"name": "cnn", "widths": [8, 8], "blocks": 1, "groups": 2},
}


def _tokenizer() -> Tokenizer:
    return Tokenizer.from_config({"kind": "tokenizer", "options": _OPTIONS})


def _seed_tokenizer(folder: Path) -> None:
    tokenizer = _tokenizer()
    tokenizer.save_pretrained(folder, tokenizer.state_dict())


def _read_tokenizer(folder: Path) -> None:
    assert isinstance(Tokenizer.from_pretrained(folder), Tokenizer)


def _generator() -> Generator:
    options = {"name": "ar", "layers": 1, "dim": 8, "heads": 2, "ffn_multiple": 4}
    layout = TokenLayout.grid(2, 2, (8,)).model_dump(mode="json")
    return Generator.from_config({"kind": "generator", "options": options, "layout": layout, "classes": 3})


def _seed_generator(folder: Path) -> None:
    _generator().save_pretrained(folder)


def _read_generator(folder: Path) -> None:
    assert isinstance(Generator.from_pretrained(folder), Generator)


_PUBLISHED = {
    "name": "composed",
    "preprocessing": {"image_size": 16, "fit": "center-crop"},
    "encoder": {"name": "vqgan", "width": 32, "multipliers": [1], "blocks": 1, "groups": 32, "latent_width": 8},
    "decoder": {"name": "vqgan", "width": 32, "multipliers": [1], "blocks": 2, "groups": 32, "latent_width": 8},
    "quantizer": {"name": "vq", "dim": 4, "codebook_size": 8, "cosine": True},
}


def _published_state() -> dict[str, torch.Tensor]:
    return export_checkpoint(Tokenizer.from_config({"kind": "tokenizer", "options": _PUBLISHED}), "llamagen-vq")


def _seed_published(folder: Path) -> None:
    save_file(_published_state(), folder / "a.safetensors")


def _read_published(folder: Path) -> None:
    assert isinstance(import_checkpoint(_only(folder)), Tokenizer)


def _seed_pickles(folder: Path) -> None:
    """Little beside the pickles, so that most mutations meet them."""
    state = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.ones(2, dtype=torch.bfloat16)}
    torch.save({"model": state, "args": argparse.Namespace(lr=0.1, betas=(0.9, 0.95))}, folder / "a.pt")
    torch.save({"state_dict": state}, folder / "b.pt", pickle_protocol=4)
    torch.save({"module": {"model": state}}, folder / "c.pth", _use_new_zipfile_serialization=False)
    torch.save({"best": np.float64(1.5), "ema": state, "seen": {1, 2}}, folder / "d.bin")


def _read_pickle(folder: Path) -> None:
    found = read_checkpoint(_only(folder))
    assert all(isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in found.items())
    for tensor in found.values():
        if tensor.is_floating_point():
            tensor.isfinite().all()  # its memory must be there to be read


# --- what a run goes on with


class _Numbers:
    """Batches that count."""

    position = 0

    def __next__(self) -> tuple[torch.Tensor]:
        return (torch.ones(4, 3),)

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = int(state["position"])


class _Linear(Task):
    def __init__(self) -> None:
        torch.manual_seed(0)
        self.models = {"model": torch.nn.Linear(3, 3)}

    def objectives(self, models, batch, step):
        yield "model", {"mean": models["model"](batch[0]).mean()}


class _Context(NamedTuple):
    run: RunFolder
    recipe: object
    reporter: object
    device: str = "cpu"


def _trained(folder: Path) -> None:
    from types import SimpleNamespace

    from smalti.core.progress import Reporter

    context = _Context(RunFolder(folder), SimpleNamespace(seed=0), Reporter(quiet=True))
    optimization = Optimization(steps=1, batch_size=4, learning_rate=1e-3, ema_decay=0.9)
    train(_Linear(), _Numbers(), optimization, stage="train-tokenizer", context=context)


def _seed_run(folder: Path) -> None:
    (folder / "state").mkdir()
    _trained(folder)
    (folder / "state" / "stages.json").write_text(json.dumps({"tokenize": {"fingerprint": "0" * 16, "done": True}}))


def _read_run(folder: Path) -> None:
    _trained(folder)
    run = RunFolder(folder)
    assert all(isinstance(known, dict) for known in run.stages().values())
    assert all(line["stage"] == "train-tokenizer" for line in run.metrics("train-tokenizer"))


# --- recipes

_RECIPE = """\
name: toy
summary: for tests
seed: 3
data:
  train: {name: webdataset, shards: images.tar, classes: 3}
  validation: {name: folder, path: images}
tokenizer:
  name: composed
  preprocessing: {image_size: 8, channels: 1, fit: pad}
  encoder: {name: cnn, widths: [8, 8], blocks: 1, groups: 2}
  quantizer: {name: vq, dim: 4, codebook_size: 16}
  decoder:
    name: cnn
    widths: [8, 8]
    blocks: 1
train:
  tokenizer:
    steps: 8
    batch_size: 8
    learning_rate: 0.003
    losses:
      - {name: l2}
      - {name: l1, weight: 0.2}
  generator:
    steps: 8
    batch_size: 8
    learning_rate: 0.003
generator: {name: ar, layers: 1, dim: 8, heads: 2}
tokenize: {batch_size: 4, flip: true}
sample: {count: 12, classes: [1, 2]}
evaluate: {}
"""


def _seed_recipes(folder: Path) -> None:
    (folder / "recipe.yaml").write_text(_RECIPE)
    (folder / "table.yaml").write_text(_RECIPE.replace("name: toy\n", "") + "variants:\n  a: {}\n  b:\n    seed: 4\n"
                                       "    tokenizer: {quantizer: {codebook_size: 32}}\n")  # fmt: skip
    (folder / "whole.yaml").write_text(yaml.safe_dump(yaml.safe_load(_RECIPE)))


def _read_recipe(folder: Path) -> None:
    path = _only(folder)
    load_recipe(f"{path}:b" if path.name == "table.yaml" else path, ["seed=1"])


# --- evaluation


def _seed_npz(folder: Path) -> None:
    images, labels = np.random.default_rng(0).integers(0, 255, (5, 8, 8, 3), np.uint8), np.arange(5) % 3
    np.savez(folder / "plain.npz", arr_0=images, arr_1=labels)
    np.savez_compressed(folder / "packed.npz", arr_0=images, arr_1=labels)
    sigma = np.eye(4)
    np.savez(folder / "stats.npz", mu=np.zeros(4), sigma=sigma, mu_s=np.ones(4), sigma_s=sigma)
    protocol = json.dumps({"protocol": {"preprocessing": None}, "extractor": {"fingerprint": "f"}})
    np.savez(
        folder / "both.npz", arr_0=images, mu=np.zeros(4), sigma=sigma, count=np.array(5), protocol=np.array(protocol)
    )


class _Extractor(NamedTuple):
    fingerprint: str = "f"


def _read_npz(folder: Path) -> None:
    path = _only(folder)
    protocol = Protocol.model_construct(name="toy", extractor=_Extractor(), preprocessing=None)
    if path.name in ("stats.npz", "both.npz"):
        found = opened_statistics(str(path), _Extractor(), protocol)
        if found is not None:
            assert all(bool(value.isfinite().all()) for value in found.statistics["pool"])
    if path.name != "stats.npz":
        source = stored_images(str(path))
        assert sum(len(batch.images) for batch in source.batches(2, 0, 1)) == len(source)
    if path.name in ("plain.npz", "packed.npz"):
        archive = SampleArchive(path, 3)
        assert sum(len(images) for images, _ in archive.batches(2)) == len(archive)


def _seed_results(folder: Path) -> None:
    result = {
        "protocol": {"name": "toy", "neighbours": 3, "preprocessing": None},
        "extractor": {"name": "small", "fingerprint": "f"},
        "reference": {"source": "b", "kind": "images", "count": 40, "sha256": "0"},
        "images": {"source": "a", "count": 40},
        "figures": {name: {"title": name, "value": 1.5, "better": "lower"} for name in ("FID", "KID")},
    }
    for name in ("one.json", "two.json"):
        (folder / name).write_text(json.dumps(result, indent=2))


def _read_results(folder: Path) -> None:
    for row in compared(folder / "one.json", folder / "two.json"):
        assert row.title.isprintable()
        assert isinstance(row.second - row.first, float)


def _read_texts(folder: Path) -> None:
    path = _only(folder)
    text_of(Record(str(path), b"", 0, None, path.read_bytes()))


def _seed_texts(folder: Path) -> None:
    (folder / "a.npy").write_bytes(_npy(np.ones((3, 4), np.float16)))
    (folder / "b.txt").write_bytes("a café".encode())


READERS = {
    "pictures": Reader(_seed_pictures, _read_picture),
    "fit": Reader(_seed_pictures, _read_picture_to_fit),
    "folder": Reader(_seed_pictures, _read_picture_folder),
    "shards": Reader(_seed_shards, _read_shards),
    "lists": Reader(_seed_lists, _read_list),
    "imagenet": Reader(_seed_imagenet, _read_imagenet),
    "cifar": Reader(_seed_cifar, _read_cifar),
    "arrow": Reader(_seed_arrow, _read_arrow),
    "texts": Reader(_seed_texts, _read_texts),
    "tokens": Reader(_seed_tokens, _read_tokens),
    "codes": Reader(_seed_codes, _read_codes),
    "lines": Reader(_seed_lines, _read_lines),
    "tokenizer": Reader(_seed_tokenizer, _read_tokenizer),
    "generator": Reader(_seed_generator, _read_generator),
    "published": Reader(_seed_published, _read_published),
    "pickles": Reader(_seed_pickles, _read_pickle),
    "run": Reader(_seed_run, _read_run),
    "recipes": Reader(_seed_recipes, _read_recipe),
    "npz": Reader(_seed_npz, _read_npz),
    "results": Reader(_seed_results, _read_results),
}

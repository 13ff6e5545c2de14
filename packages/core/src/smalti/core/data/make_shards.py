"""Any data set into tar shards: `train-000000.tar`, ..., and the `dataset.json` that tells of them.

Shards are made one by one, whole or not at all, by several threads; what a killed run has made stays. The same
data set and settings give the same bytes.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from PIL import Image
from pydantic import Field

from smalti.core.data.dataset import ImageDataset, Record
from smalti.core.data.decode import decode_whole
from smalti.core.data.geometry import short_side_resized
from smalti.core.data.parallel import in_order
from smalti.core.data.picture import Pixels, UndecodableImageError, is_grey
from smalti.core.data.tar_shards import index_shard, write_shard
from smalti.core.data.texts import is_features
from smalti.core.data.webdataset import CARD
from smalti.core.errors import UserError
from smalti.core.files import read_json, remove_temporaries, write_json
from smalti.core.options import Options

PLAN = "making.json"
_KINDS = {b"\xff\xd8\xff": "jpg", b"\x89PNG": "png", b"RIFF": "webp"}


class ShardSettings(Options):
    """How shards are made.

    Args:
        name: of the data set they make; None takes that of the source.
        prefix: of the shards' names.
        samples: of one shard.
        shuffle: seed of the order of the records; None keeps the stored one.
        short_side: images with a longer one are reduced to it, bicubic; None reduces none.
        encode: `keep` copies the bytes of PNG, JPEG and WebP files that are not reduced or cut, writes those that
            are as what they were, and everything else as PNG; `jpg` and `png` encode what is not of that kind.
        quality: of JPEG, 1 to 100.
    """

    name: str | None = None
    prefix: Annotated[str, Field(pattern=r"^[\w-]+$")] = "train"
    samples: Annotated[int, Field(ge=1)] = 1000
    shuffle: int | None = 0
    short_side: Annotated[int, Field(ge=1)] | None = None
    encode: Literal["keep", "jpg", "png"] = "keep"
    quality: Annotated[int, Field(ge=1, le=100)] = 95


class _Shard(NamedTuple):
    path: Path
    records: list[Record]


def make_shards(
    dataset: ImageDataset,
    folder: Path,
    settings: ShardSettings,
    *,
    source: dict[str, Any],
    workers: int,
    max_undecodable: int,
    warn: Callable[[str], None],
    advance: Callable[[int], None],
) -> dict[str, int]:
    """Write the shards that are missing, then the card.

    Args:
        dataset: what is read.
        folder: where the shards are written; a run that was killed is continued there.
        settings: how.
        source: the data set's options, by which a run that goes on is told from another one.
        workers: threads; 0 makes all shards in this one.
        max_undecodable: images that may be left out. Copied bytes are not decoded.
        warn: told about each image that is left out.
        advance: told how many records are done.

    Returns:
        How many samples each shard holds, by name.

    Raises:
        UserError: the folder holds other shards; two neighbours of one key; too many undecodable images; a full
            disk; what the data set raises.
    """
    plan = {"source": source, "settings": settings.model_dump(mode="json"), "records": len(dataset)}
    if (folder / CARD).exists():
        card = read_json(folder / CARD, "the card of a data set")
        if not isinstance(card, dict) or card.get("made_from") != plan:
            raise UserError(f"{folder} holds another data set already: give another folder, or remove it first")
        advance(len(dataset))
        return dict(card["shards"])
    if (folder / PLAN).exists() and read_json(folder / PLAN, "the plan of shards") != plan:
        raise UserError(f"{folder} holds shards of other options, half made: give another folder, or remove it first")
    remove_temporaries(folder)
    write_json(folder / PLAN, plan)
    write = partial(_written, encoded=partial(_encoded, settings=settings))
    counts: dict[str, int] = {}
    left_out = 0
    for name, count, damaged in in_order(write, _shards(dataset, folder, settings), workers, chunk=1):
        counts[name] = count
        left_out += len(damaged)
        for sentence in damaged:
            warn(sentence)
        if left_out > max_undecodable:
            raise UserError(
                f"{left_out} images of {dataset.name} cannot be decoded and {max_undecodable} may be left out: "
                f"mend them or raise --max-undecodable"
            )
        advance(count + len(damaged))
    card = {"name": settings.name or dataset.name, "classes": dataset.classes, "shards": counts, "made_from": plan}
    write_json(folder / CARD, card)
    (folder / PLAN).unlink()
    return counts


def _shards(dataset: ImageDataset, folder: Path, settings: ShardSettings) -> Iterator[_Shard]:
    records = dataset.records(settings.shuffle)
    for number in range(-(-len(dataset) // settings.samples)):
        yield _Shard(folder / f"{settings.prefix}-{number:06d}.tar", list(islice(records, settings.samples)))


def _written(shard: _Shard, encoded: Callable[[Record], tuple[str, bytes]]) -> tuple[str, int, list[str]]:
    """Write a shard that is missing, or that images were left out of, which may be mended by now.

    Returns:
        Its name, the samples in it, and a sentence about each image that is left out.
    """
    path, records = shard
    if path.exists() and len(index_shard(str(path))) == len(records):
        return path.name, len(records), []
    damaged: list[str] = []
    count = write_shard(path, _samples(records, encoded, damaged))
    return path.name, count, damaged


def _samples(
    records: list[Record], encoded: Callable[[Record], tuple[str, bytes]], damaged: list[str]
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and files of each record; a sentence about each that is left out goes to `damaged`."""
    for record in records:
        try:
            ending, content = encoded(record)
        except UndecodableImageError as error:
            damaged.append(f"image {record.key!r} cannot be decoded and is left out: {error}")
            continue
        text = record.text_bytes
        texts = {} if text is None else {"npy" if is_features(text) else "txt": text}
        yield record.key, {ending: content, "cls": str(record.label).encode()} | texts


def _encoded(record: Record, settings: ShardSettings) -> tuple[str, bytes]:
    """Ending and bytes of an image in a shard."""
    content = record.image
    kind = next((kind for magic, kind in _KINDS.items() if content.startswith(magic)), None)
    wanted = settings.encode if settings.encode != "keep" else kind or "png"
    if kind == wanted and record.box is None and settings.short_side is None:
        return wanted, content
    pixels = decode_whole(content, 1 if is_grey(content) else 3, record.box).transpose(1, 2, 0)
    if settings.short_side is not None and min(pixels.shape[:2]) > settings.short_side:
        pixels = short_side_resized(pixels, settings.short_side, "bicubic")
    elif kind == wanted and record.box is None:
        return wanted, content
    return wanted, _file(pixels, wanted, settings.quality)


def _file(pixels: Pixels, kind: str, quality: int) -> bytes:
    picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    buffer = io.BytesIO()
    match kind:
        case "jpg":
            picture.save(buffer, "JPEG", quality=quality)
        case "webp":
            picture.save(buffer, "WEBP", lossless=True)
        case _:
            picture.save(buffer, "PNG")
    return buffer.getvalue()

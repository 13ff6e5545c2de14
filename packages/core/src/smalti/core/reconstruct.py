"""Images beside what a tokenizer makes of them: pictures, tokens and metrics in a folder.

    0000-NAME.png   the image as the tokenizer saw it, its reconstruction, and a drawing of its tokens where wanted
    0000-NAME.npz   `tokens` int64 (L, S), `layout` as JSON
    grid.png        the first images with their reconstructions
    metrics.json    every installed metric, by image and in the mean

Legend: B batch, C channels, H W pixels, L token positions, S streams.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import groupby, islice
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smalti.core.contracts import Drawing, Tokenizer
from smalti.core.errors import UserError
from smalti.core.files import write_bytes, write_json
from smalti.core.layout import TokenLayout
from smalti.core.metrics import pair_metrics, values_of
from smalti.core.weights import fingerprint

SHOWN = 32
GRID_COLUMNS = 4  # images of a row, each with what belongs to it

Size = int | Literal["original"] | None


@dataclass(frozen=True)
class Summary:
    """How many images there were, and the mean of each metric."""

    images: int
    means: dict[str, float]


def image_size(text: str) -> Size:
    """A number of pixels, `original`, or empty for the tokenizer's own.

    Raises:
        UserError: anything else.
    """
    if text in ("", "original"):
        return "original" if text else None
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"size must be a number of pixels or `original`, got {text!r}")
    return int(text)


@torch.inference_mode()
def reconstruct_images(
    tokenizer: Tokenizer,
    inputs: Sequence[str],
    folder: Path,
    size: Size = None,
    batch_size: int = 8,
    draw: str | None = None,
) -> Summary:
    """Reconstruct all images of `inputs` and write the files of this module's head to `folder`.

    Args:
        tokenizer: in evaluation mode, on its device.
        inputs: image files, folders of image files, tar shards.
        folder: an existing one.
        size: side in pixels instead of the tokenizer's own, or `original` to leave the images as they are.
        batch_size: images of one size that are encoded at once.
        draw: one of the tokenizer's drawings, to be shown as a third picture.

    Raises:
        UserError: an input that is missing or no image, a size that the tokenizer cannot take, or a drawing that it
            does not have.
    """
    drawing = None if draw is None else _drawing(tokenizer, draw)
    if find_spec("PIL") is None:
        raise UserError("reading images needs the extra smalti-core[data], which is not installed")
    device = next((parameter.device for parameter in tokenizer.parameters()), torch.device("cpu"))
    metrics = pair_metrics()
    entries: list[dict[str, Any]] = []
    shown: list[NDArray[np.uint8]] = []
    for batch in _batches(_decoded(tokenizer, inputs, size), batch_size):
        keys = [key for key, _ in batch]
        originals = torch.from_numpy(np.stack([pixels for _, pixels in batch]))
        tokens, copies, layout = _reconstructed(tokenizer, originals.to(device), keys[0])
        pictures = [_enlarged(pixels) for pixels in (originals, copies)]
        if drawing is not None:
            pictures.append(drawing(tokens, layout, (pictures[0].shape[2], pictures[0].shape[3])).cpu())
        found = {name: values_of(metric, copies, originals) for name, metric in metrics.items()}
        for place, key in enumerate(keys):
            name = f"{len(entries):04d}-{Path(key).stem}"
            strip = [_picture(pixels[place]) for pixels in pictures]
            shown += strip if len(shown) < len(strip) * SHOWN else []
            _save_grid(folder / f"{name}.png", strip, len(strip))
            stored = {"tokens": tokens[place].cpu().numpy(), "layout": np.array(layout.model_dump_json())}
            write_bytes(folder / f"{name}.npz", _npz(**stored))
            entries.append(
                {"image": key, "file": f"{name}.png", "size": list(originals.shape[-2:])}
                | {metric: None if values is None else values[place] for metric, values in found.items()}
            )
    if not entries:
        raise UserError(f"there is no image in {', '.join(inputs)}")
    _save_grid(folder / "grid.png", shown, len(pictures) * GRID_COLUMNS)
    means = {
        name: fmean(numbers)
        for name in metrics
        if (numbers := [entry[name] for entry in entries if entry[name] is not None])
    }
    write_json(
        folder / "metrics.json",
        {
            "tokenizer": fingerprint(tokenizer, tokenizer.config()),
            "images": len(entries),
            "means": means,
            "definitions": {name: f"{metric.definition}; unit: {metric.unit}" for name, metric in metrics.items()},
            "by_image": entries,
        },
    )
    return Summary(len(entries), means)


def _drawing(tokenizer: Tokenizer, name: str) -> Drawing:
    if name not in tokenizer.drawings:
        raise UserError(
            f"{type(tokenizer).__name__} has no drawing {name!r} of its tokens; "
            f"it has: {', '.join(sorted(tokenizer.drawings)) or 'none'}"
        )
    return tokenizer.drawings[name]


def _reconstructed(tokenizer: Tokenizer, pixels: Tensor, key: str) -> tuple[Tensor, Tensor, TokenLayout]:
    """Tokens `(B, L, S)`, reconstructions uint8 `(B, C, H, W)` and the layout, of pixels uint8 `(B, C, H, W)`."""
    from smalti.core.data.images import to_uint8

    height, width = pixels.shape[-2:]
    try:
        layout = tokenizer.layout((height, width))
        tokens = tokenizer.encode(pixels.float() / 127.5 - 1)
        images = tokenizer.decode(tokens, layout)
    except UserError as error:
        raise UserError(f"{key}, {height} x {width} pixels: {error}") from None
    copies = to_uint8(images)[..., : pixels.shape[1]].movedim(-1, 1)
    return tokens, copies.cpu(), layout


def _batches(
    images: Iterable[tuple[str, NDArray[np.uint8]]], size: int
) -> Iterator[list[tuple[str, NDArray[np.uint8]]]]:
    """Neighbouring images of one shape, at most `size` of them."""
    for _, same in groupby(images, key=lambda item: item[1].shape):
        while batch := list(islice(same, size)):
            yield batch


def _decoded(tokenizer: Tokenizer, inputs: Sequence[str], size: Size) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """Name and pixels uint8 `(C, H, W)` of every image."""
    from smalti.core.data.decode import decode, decode_whole

    preprocessing = tokenizer.preprocessing
    if isinstance(size, int):
        preprocessing = preprocessing.model_copy(update={"image_size": size})
    for key, content in (item for source in inputs for item in _files(Path(source))):
        try:
            whole = size == "original"
            yield key, decode_whole(content, preprocessing.channels) if whole else decode(content, preprocessing)
        except UserError as error:
            raise UserError(f"{key}: {error}") from None


def _files(source: Path) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of every image file in a source."""
    from smalti.core.data.dataset import FilePart
    from smalti.core.data.listed import images_below, is_image, is_shard

    if source.is_dir():
        for name in images_below(source):
            yield str(source / name), FilePart(str(source / name)).read()
    elif not source.exists():
        raise UserError(f"{source} does not exist: give image files, folders of them, or tar shards")
    elif is_shard(source.name):
        from smalti.core.data.tar_shards import read_shard

        for sample in read_shard(str(source)):
            for extension, content in sample.items():
                if is_image(f"x.{extension}"):
                    yield f"{source}/{sample['__key__']}", content
    else:
        yield str(source), FilePart(str(source)).read()


def _enlarged(pixels: Tensor) -> Tensor:
    """Images `(B, C, H, W)` by the whole factor that makes them visible."""
    from smalti.core.data.images import enlargement

    factor = enlargement(pixels.shape[-2:])
    return pixels.repeat_interleave(factor, 2).repeat_interleave(factor, 3)


def _picture(pixels: Tensor) -> NDArray[np.uint8]:
    """Uint8 `(C, H, W)` as `(H, W, 3)`."""
    return np.ascontiguousarray(pixels.expand(3, -1, -1).permute(1, 2, 0).numpy())


def _save_grid(path: Path, pictures: Sequence[NDArray[np.uint8]], columns: int) -> None:
    """Pictures of any sizes in a grid, each in the upper left of its place."""
    from smalti.core.data.images import save_grid

    height, width = (max(picture.shape[axis] for picture in pictures) for axis in (0, 1))
    places = np.full((len(pictures), height, width, 3), 255, np.uint8)
    for place, picture in zip(places, pictures, strict=True):
        place[: picture.shape[0], : picture.shape[1]] = picture
    save_grid(path, places, min(columns, len(pictures)))


def _npz(**arrays: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()

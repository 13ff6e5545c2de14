"""Image files to pixels of the size that a tokenizer takes.

Legend: C channels, H W pixels, both `Preprocessing.image_size`; V views.
"""

from __future__ import annotations

import random

import numpy as np

from smalti.core.data.augmentation import Augmentation
from smalti.core.data.dataset import Box
from smalti.core.data.geometry import (
    Resize,
    adm_resized,
    centre,
    cut,
    quickly_resized,
    resized,
    short_side_resized,
    torchvision_centre,
)
from smalti.core.data.picture import Pixels, UndecodableImageError, read_picture
from smalti.core.errors import UserError
from smalti.core.options import Preprocessing


def decode(image: bytes, preprocessing: Preprocessing, box: Box | None = None) -> Pixels:
    """An image file as uint8 `(C, H, W)`, the same on every machine.

    Args:
        image: the bytes of the file; `read_picture` tells how its colours are read.
        preprocessing: how it is fitted into the size.
        box: the part of the image that is fitted, see `Record.box`.

    Raises:
        UndecodableImageError: the bytes are damaged or no image, the box lies outside of it, or it is so long that
            resizing its short side would make it vast.
        UserError: the image is larger than `image_size` and `fit` is `pad`.
    """
    return _channels_first(_fitted(_opened(image, preprocessing.channels, box), preprocessing))


def decode_whole(image: bytes, channels: int, box: Box | None = None) -> Pixels:
    """An image file as uint8 `(C, H, W)` of its own size, otherwise as `decode`.

    Raises:
        UndecodableImageError: the bytes are damaged or no image, or the box lies outside of it.
    """
    return _channels_first(_opened(image, channels, box))


def decode_augmented(
    image: bytes,
    preprocessing: Preprocessing,
    box: Box | None,
    augmentation: Augmentation,
    draws: random.Random,
) -> Pixels:
    """An image file as uint8 `(C, H, W)`, cropped and mirrored by chance; errors as `decode`.

    Whatever is resized is resized quickly, see `geometry.quickly_resized`.
    """
    pixels = _opened(image, preprocessing.channels, box)
    if augmentation.crop is None:
        pixels = _fitted(pixels, preprocessing, quickly_resized)
    else:
        pixels = augmentation.crop.apply(pixels, preprocessing.image_size, draws)
    if augmentation.flip and draws.random() < 0.5:
        pixels = pixels[:, ::-1]
    return _channels_first(pixels)


def ten_views(crop_range: float) -> tuple[str, ...]:
    """Names of the views of `decode_ten_crops`, in their order."""
    places = ("top left", "top right", "bottom left", "bottom right", "middle")
    return tuple(f"{side}{place} of {crop_range:g}" for side in ("", "mirrored ") for place in places)


def decode_ten_crops(
    image: bytes, preprocessing: Preprocessing, box: Box | None = None, crop_range: float = 1.1
) -> Pixels:
    """Ten views of an image file for pretokenization (LlamaGen, FQGAN), uint8 `(V, C, H, W)`.

    The image is fitted into a square `int(crop_range * image_size)` pixels wide; the views are its corners (top
    left, top right, bottom left, bottom right), its middle, and the same five of its mirror image.

    Raises:
        UndecodableImageError: the bytes are damaged or no image, or the box lies outside of it.
    """
    size = preprocessing.image_size
    larger = preprocessing.model_copy(update={"image_size": int(size * crop_range)})
    pixels = _fitted(_opened(image, preprocessing.channels, box), larger)
    return np.stack([_channels_first(view) for side in (pixels, pixels[:, ::-1]) for view in _five(side, size)])


def _five(pixels: Pixels, size: int) -> list[Pixels]:
    last = len(pixels) - size
    corners = [cut(pixels, left, top, size) for top in (0, last) for left in (0, last)]
    return [*corners, torchvision_centre(pixels, size, 0)]


def _opened(image: bytes, channels: int, box: Box | None) -> Pixels:
    pixels = read_picture(image, channels)
    if box is None:
        return pixels
    left, top, right, bottom = box
    height, width = pixels.shape[:2]
    if right > width or bottom > height:
        raise UndecodableImageError(f"it has {width}x{height} pixels, the box {box} reaches beyond")
    return np.ascontiguousarray(pixels[top:bottom, left:right])


def _fitted(pixels: Pixels, preprocessing: Preprocessing, resize: Resize = resized) -> Pixels:
    size, background = preprocessing.image_size, preprocessing.background
    match preprocessing.fit:
        case "pad":
            return _padded(pixels, size, background)
        case "center-crop":
            return centre(adm_resized(pixels, size, resize), size)
        case "native-crop":
            return torchvision_centre(pixels, size, background)
        case "bicubic-crop":
            return torchvision_centre(short_side_resized(pixels, size, "bicubic", resize), size, background)
        case "bilinear-crop":
            return torchvision_centre(short_side_resized(pixels, size, "bilinear", resize), size, background)


def _padded(pixels: Pixels, size: int, background: int) -> Pixels:
    height, width, channels = pixels.shape
    if max(height, width) > size:
        raise UserError(
            f"an image of {width}x{height} pixels does not fit into image_size {size}: "
            f"choose a larger one, or fit: center-crop"
        )
    canvas = np.full((size, size, channels), background, np.uint8)
    left, top = (size - width) // 2, (size - height) // 2
    canvas[top : top + height, left : left + width] = pixels
    return canvas


def _channels_first(pixels: Pixels) -> Pixels:
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))

"""Image files to pixels of the size that a tokenizer takes.

Legend: C channels, H W pixels, both `Preprocessing.image_size`.
"""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from smalti.core.errors import UserError
from smalti.core.options import Preprocessing


class UndecodableImageError(UserError):
    """The bytes of one image are damaged or of no known format; training may go on without it."""


def decode(image: bytes, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """An image file as uint8 `(C, H, W)`.

    Transparency is dropped, 16-bit grey is reduced to its high bytes, orientation tags are not followed.

    Raises:
        UndecodableImageError: the bytes are damaged or no image.
        UserError: the image is larger than `image_size` and `fit` is `pad`.
    """
    # Pillow's readers raise errors of many types on broken bytes: to us they all mean the same.
    try:
        with Image.open(io.BytesIO(image)) as file:
            picture = _converted(file, preprocessing.channels)
    except Exception as error:
        raise UndecodableImageError(" ".join(str(error).split()) or type(error).__name__) from error
    size = preprocessing.image_size
    fitted = _padded(picture, size, preprocessing.background) if preprocessing.fit == "pad" else _cropped(picture, size)
    pixels = np.asarray(fitted).reshape(size, size, preprocessing.channels)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _converted(file: Image.Image, channels: int) -> Image.Image:
    mode = "L" if channels == 1 else "RGB"
    if file.mode == mode:
        file.load()
        return file
    if file.mode.startswith("I;16"):  # Pillow would clip these at 255
        return Image.fromarray((np.asarray(file) >> 8).astype(np.uint8)).convert(mode)
    if "transparency" in file.info:  # Pillow wants the palette's transparency spelt out before it is dropped
        return file.convert("RGBA").convert(mode)
    return file.convert(mode)


def _padded(picture: Image.Image, size: int, background: int) -> Image.Image:
    width, height = picture.size
    if max(picture.size) > size:
        raise UserError(
            f"an image of {width}x{height} pixels does not fit into image_size {size}: "
            f"choose a larger one, or fit: center-crop"
        )
    canvas = Image.new(picture.mode, (size, size), background if picture.mode == "L" else (background,) * 3)
    canvas.paste(picture, ((size - width) // 2, (size - height) // 2))
    return canvas


def _cropped(picture: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop (Dhariwal and Nichol 2021), as `Preprocessing.fit` describes it."""
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return picture.crop((left, top, left + size, top + size))

"""Image files to arrays of pixels.

Legend: C channels, H W pixels.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from smalti.core.errors import UserError

T = TypeVar("T")
Pixels = NDArray[np.uint8]

# simplejpeg calls libjpeg-turbo directly and returns what Pillow does, bit for bit, in three quarters of the time.
_SIMPLEJPEG = import_module("simplejpeg") if find_spec("simplejpeg") else None
_JPEG = b"\xff\xd8\xff"
_GREY = ("1", "L", "LA", "I")


class UndecodableImageError(UserError):
    """The bytes of one image are damaged or of no known format; training may go on without it."""


def read_picture(image: bytes, channels: int) -> Pixels:
    """An image file as uint8 `(H, W, C)` of its own size.

    Transparency is dropped, 16-bit grey is reduced to its high bytes, orientation tags are not followed.

    Raises:
        UndecodableImageError: the bytes are damaged or no image.
    """
    if _SIMPLEJPEG is not None and channels == 3 and image.startswith(_JPEG):
        pixels = _colour_jpeg(_SIMPLEJPEG, image)
        if pixels is not None:
            return pixels
    picture = _opened(image, lambda file: _converted(file, channels))
    return np.array(picture).reshape(picture.height, picture.width, channels)


def is_grey(image: bytes) -> bool:
    """Whether an image file has no colours.

    Raises:
        UndecodableImageError: the bytes are damaged or no image.
    """
    return _opened(image, lambda file: file.mode in _GREY or file.mode.startswith("I;16"))


def _opened(image: bytes, look: Callable[[Image.Image], T]) -> T:
    """What `look` gives of an image file as Pillow opens it; any error of it means that the file is damaged."""
    # Pillow's readers raise errors of many types on broken bytes: to us they all mean the same.
    stream = io.BytesIO(image)
    try:
        with Image.open(stream) as file:
            most = Image.MAX_IMAGE_PIXELS or file.width * file.height
            if file.width * file.height > most:  # Pillow itself refuses those of twice as many
                raise ValueError(f"it has {file.width} x {file.height} pixels, more than {most}")
            return look(file)
    except Exception as error:
        told = str(error).replace(repr(stream), "")  # Pillow names it by its address
        raise UndecodableImageError(" ".join(told.split()) or type(error).__name__) from error


def _colour_jpeg(library: ModuleType, image: bytes) -> Pixels | None:
    """The pixels of a usual colour JPEG; None of any other, and where Pillow is to tell what is wrong."""
    try:
        height, width, kind, _ = library.decode_jpeg_header(image)
        if kind != "YCbCr" or height * width > (Image.MAX_IMAGE_PIXELS or height * width):
            return None
        return np.asarray(library.decode_jpeg(image, "RGB"))
    except ValueError:
        return None


def _converted(file: Image.Image, channels: int) -> Image.Image:
    mode = "L" if channels == 1 else "RGB"
    if file.mode == mode:
        file.load()
        return file
    if file.mode.startswith("I;16") or (file.mode, file.format) == ("I", "PPM"):  # Pillow would clip these at 255
        return Image.fromarray((np.asarray(file) >> 8).astype(np.uint8)).convert(mode)
    if "transparency" in file.info:  # Pillow wants the palette's transparency spelt out before it is dropped
        return file.convert("RGBA").convert(mode)
    return file.convert(mode)

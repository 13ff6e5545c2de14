"""The picture that is to be fitted: an image file of any kind as a tensor.

Shapes: C channels, H W pixels.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from smalti.core.errors import UserError

GREY = ("1", "L", "LA", "La")


def read_image(path: Path, size: int | None = None) -> Tensor:
    """Read an image file, float32 [C, H, W] in [0, 1]: C is 1 where it is grey, else 3.

    Orientation tags are followed, transparent pixels are laid on white, 16-bit grey keeps its depth.

    Args:
        path: of the file.
        size: the longer side is resized to this many pixels; None leaves the image as it is.

    Raises:
        UserError: the file is missing, or is no image that can be read.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist: give an image file" if not path.exists() else f"{path} is not a file")
    # Pillow's readers raise errors of many types on broken bytes: to us they all mean the same.
    try:
        with Image.open(path) as file:
            channels = _channels(ImageOps.exif_transpose(file))
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} cannot be read as an image: {reason}") from error
    if size is not None:
        width, height = channels[0].size
        factor = size / max(width, height)
        wanted = (max(1, round(width * factor)), max(1, round(height * factor)))
        channels = [channel.resize(wanted, Image.Resampling.LANCZOS) for channel in channels]
    return torch.from_numpy(np.stack([np.asarray(channel) for channel in channels])).clamp(0, 1)


def _channels(picture: Image.Image) -> list[Image.Image]:
    """One picture of floats (mode F) in [0, 1] for each channel."""
    if picture.mode.startswith("I;16"):
        return [_floats(np.asarray(picture).astype(np.float32) / 65535)]
    if picture.mode in ("I", "F"):  # 32-bit: of 16-bit PNGs, too, in older versions of Pillow
        values = np.asarray(picture).astype(np.float32)
        return [_floats(values / max(float(values.max()), 65535.0 if picture.mode == "I" else 1.0))]
    grey = picture.mode in GREY
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    levels = np.asarray(picture.convert("L" if grey else "RGB")).astype(np.float32) / 255
    return [_floats(channel) for channel in np.atleast_3d(levels).transpose(2, 0, 1)]


def _floats(values: np.ndarray) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(values), "F")

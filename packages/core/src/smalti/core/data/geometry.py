"""Cutting and resizing arrays of pixels.

Legend: C channels, H W pixels, S side of a square.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
from PIL import Image

from smalti.core.data.picture import Pixels, UndecodableImageError

Filter = Literal["bicubic", "bilinear"]
Resize = Callable[[Pixels, int, int, Filter], Pixels]
_PILLOW = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
LARGEST = 1 << 28  # pixels; one that is long and a pixel high would be enlarged to any number


def resized(pixels: Pixels, width: int, height: int, kind: Filter) -> Pixels:
    """Pixels `(H, W, C)` resampled by Pillow, antialiased: what the published figures were made with."""
    if pixels.shape[:2] == (height, width):
        return pixels
    return _array(_picture(pixels).resize((width, height), _PILLOW[kind]), pixels)


def quickly_resized(pixels: Pixels, width: int, height: int, kind: Filter) -> Pixels:
    """As `resized` in about a quarter of the time, by torch's kernel for bytes.

    Its weights have 15 bits where Pillow's have 22: one value in a hundred differs, as a rule by one grey level.
    Where one side grows and the other shrinks, Pillow may take the sides in the other order, and a quarter of the
    values differ by one. More than three levels never occurred.
    """
    if pixels.shape[:2] == (height, width):
        return pixels
    import torch  # here, because commands that only read images do without
    from torch.nn import functional as F

    # In one piece, because torch would start threads of its own in every worker to copy the pieces together.
    batch = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]
    batch = F.interpolate(batch, (height, width), mode=kind, align_corners=False, antialias=True)
    view: Pixels = batch[0].permute(1, 2, 0).numpy()  # of channels first, which is wanted in the end
    return view


def halved(pixels: Pixels, size: int) -> Pixels:
    """Half the sides by means of 2 x 2 pixels, as often as the short side stays at least `size`."""
    while min(pixels.shape[:2]) >= 2 * size:
        height, width = pixels.shape[:2]
        pixels = _array(_picture(pixels).resize((width // 2, height // 2), Image.Resampling.BOX), pixels)
    return pixels


def adm_resized(pixels: Pixels, size: int, resize: Resize = resized) -> Pixels:
    """ADM's resizing (Dhariwal and Nichol 2021): `halved`, then bicubic to a short side of `size`."""
    pixels = halved(pixels, size)
    height, width = pixels.shape[:2]
    scale = size / min(height, width)
    return resize(pixels, *_possible(round(width * scale), round(height * scale)), "bicubic")


def short_side_resized(pixels: Pixels, size: int, kind: Filter, resize: Resize = resized) -> Pixels:
    """Resized to a short side of `size`, the other one rounded down, as torchvision does it."""
    height, width = pixels.shape[:2]
    short = min(height, width)
    return resize(pixels, *_possible(size * width // short, size * height // short), kind)


def cut(pixels: Pixels, left: int, top: int, size: int) -> Pixels:
    """The square of side `size` at a place."""
    return pixels[top : top + size, left : left + size]


def centre(pixels: Pixels, size: int) -> Pixels:
    """The square in the middle; where a pixel remains, it is cut off at the right and below (ADM)."""
    height, width = pixels.shape[:2]
    return cut(pixels, (width - size) // 2, (height - size) // 2, size)


def torchvision_centre(pixels: Pixels, size: int, background: int) -> Pixels:
    """The square in the middle as torchvision cuts it: half pixels to even; what lacks is `background`."""
    height, width = pixels.shape[:2]
    short_y, short_x = max(size - height, 0), max(size - width, 0)
    if short_y or short_x:
        around = ((short_y // 2, short_y - short_y // 2), (short_x // 2, short_x - short_x // 2), (0, 0))
        pixels = np.pad(pixels, around, constant_values=background)
        height, width = pixels.shape[:2]
    return cut(pixels, round((width - size) / 2), round((height - size) / 2), size)


def _possible(width: int, height: int) -> tuple[int, int]:
    if width * height > LARGEST:
        raise UndecodableImageError(f"it would be resized to {width} x {height} pixels, more than {LARGEST}")
    return width, height


def _picture(pixels: Pixels) -> Image.Image:
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def _array(picture: Image.Image, like: Pixels) -> Pixels:
    return np.array(picture).reshape(picture.height, picture.width, like.shape[2])

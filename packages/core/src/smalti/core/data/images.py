"""Images out to files: floats to bytes, PNG pictures of one image or of many in a grid, and animations.

Legend: N images, C channels, H W pixels.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from smalti.core.errors import UserError
from smalti.core.files import write_bytes

GAP = 2
VISIBLE = 128  # pixels: smaller images are enlarged in pictures by whole factors
VISIBLE_OF_MANY = 64  # the same, where a picture shows many


def to_uint8(images: Tensor) -> Tensor:
    """Images float `(N, C, H, W)` in [-1, 1] to uint8 `(N, H, W, 3)`, grey repeated.

    `clamp(127.5 x + 128, 0, 255)`, truncated, as LlamaGen and DiT write samples: bytes that became `v / 127.5 - 1`
    come back exactly.
    """
    values = (images.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8)
    return values.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous()


def png_bytes(image: NDArray[Any] | Tensor) -> bytes:
    """An image uint8 `(H, W, 3)` or `(H, W)` as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(np.asarray(image))).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def grid(images: NDArray[Any] | Tensor, columns: int, scale: int = 1) -> NDArray[Any]:
    """Images uint8 `(N, H, W, 3)` row by row on white, uint8 `(H', W', 3)`.

    Args:
        images: in reading order; what the last row lacks stays white.
        columns: images of a row.
        scale: every pixel becomes a square of this side.

    Raises:
        UserError: not uint8 images of three channels, or none.
    """
    array = np.asarray(images)
    if array.ndim != 4 or array.shape[3] != 3 or array.dtype != np.uint8 or not len(array):
        raise UserError(f"a grid needs uint8 images (N, H, W, 3), got {array.dtype} {array.shape}")
    array = array.repeat(scale, axis=1).repeat(scale, axis=2)
    count, height, width, _ = array.shape
    rows = -(-count // columns)
    canvas = np.full((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3), 255, dtype=np.uint8)
    for index, image in enumerate(array):
        top, left = index // columns * (height + GAP), index % columns * (width + GAP)
        canvas[top : top + height, left : left + width] = image
    return canvas


def save_grid(path: str | Path, images: NDArray[Any] | Tensor, columns: int, scale: int = 1) -> None:
    """Write `grid(images, columns, scale)` as a PNG file, whole or not at all."""
    write_bytes(path, png_bytes(grid(images, columns, scale)))


def enlargement(sides: Sequence[int], visible: int = VISIBLE) -> int:
    """The whole factor by which images of H x W pixels are enlarged, so that neither exceeds `visible`; 1 at least."""
    return max(1, visible // max(sides))


def gif_bytes(frames: Sequence[Image.Image], milliseconds: int, last_milliseconds: int) -> bytes:
    """Frames as an endless GIF, each shown for so long, and the last one for its own time."""
    durations = [milliseconds] * (len(frames) - 1) + [last_milliseconds]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)
    return buffer.getvalue()

"""The ways in which FID's implementations bring an image to 299 x 299 pixels; they are why their figures differ.

Legend: B batch, H W pixels, S 299.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from smalti.eval.inception_network import SIDE

Resize = Literal["tensorflow", "pytorch", "clean"]
RESIZE_DEFINITIONS: dict[Resize, str] = {
    "tensorflow": "bilinear as in TensorFlow 1, aligned at the upper left corner, no antialiasing; (x - 128) / 128",
    "pytorch": "bilinear, align_corners false, no antialiasing; 2 x / 255 - 1",
    "clean": "Pillow's bicubic with antialiasing, each channel as float, clipped to [0, 255]; (x - 128) / 128",
}


def resized_for_inception(images: Tensor, resize: Resize) -> Tensor:
    """Images uint8 `(B, H, W, 3)` as float32 `(B, 3, S, S)`, normalised as the implementation does it."""
    if resize == "clean":
        return (torch.stack([_antialiased(image) for image in images.cpu()]).to(images.device) - 128) / 128
    values = images.movedim(-1, 1).float()
    if resize == "pytorch":
        return 2 * F.interpolate(values / 255, (SIDE, SIDE), mode="bilinear", align_corners=False) - 1
    rows, columns = (_tensorflow_matrix(size).to(images.device) for size in images.shape[1:3])
    return (rows @ values @ columns.T - 128) / 128


@lru_cache(maxsize=32)
def _tensorflow_matrix(size: int) -> Tensor:
    """The interpolation as a matrix `(S, size)`; places and shares are computed in float32, as in TensorFlow."""
    places = torch.arange(SIDE, dtype=torch.float32) * torch.tensor(size / SIDE, dtype=torch.float32)
    low = places.long()
    share = (places - low.float())[:, None]
    matrix = torch.zeros(SIDE, size)
    matrix.scatter_add_(1, low[:, None], 1 - share)
    matrix.scatter_add_(1, (low + 1).clamp(max=size - 1)[:, None], share)
    return matrix


def _antialiased(image: Tensor) -> Tensor:
    """Uint8 `(H, W, 3)` to float `(3, S, S)` in [0, 255]."""
    if image.shape[:2] == (SIDE, SIDE):
        return image.movedim(-1, 0).float()
    planes = image.movedim(-1, 0).float().numpy()
    resized = [Image.fromarray(plane).resize((SIDE, SIDE), Image.Resampling.BICUBIC) for plane in planes]
    return torch.from_numpy(np.stack([np.asarray(plane) for plane in resized]).clip(0, 255))

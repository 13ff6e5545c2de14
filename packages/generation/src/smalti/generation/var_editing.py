"""Editing of images by their scales of tokens: what is kept, and where (VAR, Tian et al. 2024, section 5.3).

Legend: B batch, L token positions, S streams, h w latent grid.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from smalti.core.errors import UserError
from smalti.core.layout import TokenLayout

ALWAYS_KEPT = 3
"""Scales of so many tokens or fewer are kept whole: they hold the colours of the whole image."""


class Kept(NamedTuple):
    """Tokens `(B, L, S)` of images, and the positions `(L,)` at which they are kept, true or false."""

    tokens: Tensor
    mask: Tensor


def inside_box(layout: TokenLayout, top: float, left: float, bottom: float, right: float) -> Tensor:
    """True inside a box on the last scale's grid, bool `(h, w)`: what out-painting keeps; in-painting keeps the rest.

    Args:
        layout: of the tokens.
        top: edge of the box as a fraction of the height, 0 at the top; rounded on the grid.
        left: as a fraction of the width.
        bottom: as `top`.
        right: as `left`.

    Raises:
        UserError: a box that is not inside the image, or holds no cell of the grid.
    """
    if not (0 <= top < bottom <= 1 and 0 <= left < right <= 1):
        raise UserError(f"a box has 0 <= top < bottom <= 1 and 0 <= left < right <= 1, got {top, left, bottom, right}")
    height, width = layout.shape[-1]
    rows = slice(round(top * height), round(bottom * height))
    columns = slice(round(left * width), round(right * width))
    if rows.start == rows.stop or columns.start == columns.stop:
        raise UserError(f"a box holds at least one cell of the grid {height}x{width}, got {top, left, bottom, right}")
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[rows, columns] = True
    return mask


def kept_positions(mask: Tensor, layout: TokenLayout) -> Tensor:
    """The positions `(L,)` of all scales that a mask of the last scale's grid keeps.

    It is enlarged or reduced to every grid bilinearly, and keeps where that is above one half; the coarsest scales are
    kept whole.

    Args:
        mask: bool `(h, w)`, true where images are kept.
        layout: of the tokens.

    Raises:
        UserError: a mask of another type or grid.
    """
    if mask.dtype != torch.bool or tuple(mask.shape) != layout.shape[-1]:
        raise UserError(
            f"the mask must be bool {layout.shape[-1]}, the grid of the last scale, got {mask.dtype} "
            f"{tuple(mask.shape)}"
        )
    kept = []
    for height, width in layout.shape:
        if height * width <= ALWAYS_KEPT:
            kept.append(torch.ones(height * width, dtype=torch.bool, device=mask.device))
        else:
            resized = F.interpolate(mask[None, None].float(), (height, width), mode="bilinear", align_corners=False)
            kept.append(resized.flatten() > 0.5)
    return torch.cat(kept)

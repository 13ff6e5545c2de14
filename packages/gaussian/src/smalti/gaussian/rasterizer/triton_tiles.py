"""The lists of the Triton backend: which Gaussians each tile of 16 × 16 pixels draws, in order.

Shapes: B images, N Gaussians per image, K tiles, P pairs of a tile and a Gaussian.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from smalti.gaussian.rasterizer.backends import Splats, View
from smalti.gaussian.rasterizer.reach import reached_pixels

# Boxes are multiples of 16, so that a tile lies either within a box or outside.
TILE = 16


class Pairs(NamedTuple):
    """All pairs of a tile and a Gaussian that may be seen on it.

    Args:
        gaussians: [P], int64, among the B × N, by tile and then ascending.
        tiles: [P], int32, ascending; the tiles of all images are numbered image by image and row by row.
        slots: [P], int64: the place of each pair in the order by Gaussian.
        bounds: [K + 1], int64; tile k owns the pairs bounds[k] to bounds[k + 1].
        counts: [B × N], int64, pairs of each Gaussian.
    """

    gaussians: Tensor
    tiles: Tensor
    slots: Tensor
    bounds: Tensor
    counts: Tensor


def tile_grid(view: View) -> tuple[int, int]:
    """Rows and columns of tiles of one image."""
    return -(-view.height // TILE), -(-view.width // TILE)


@torch.no_grad()
def tile_pairs(splats: Splats, view: View) -> Pairs:
    """Pair tiles with the Gaussians whose box touches them and that may reach `min_alpha` there."""
    images, per_image = splats.opacities.shape
    device = splats.opacities.device
    rows, columns = tile_grid(view)
    first, last = _tile_ranges(splats, view)
    across, down = (last - first).clamp(min=0).unbind(-1)
    counts = (across * down).flatten()
    gaussians = torch.repeat_interleave(counts)
    rank = torch.arange(len(gaussians), device=device) - (counts.cumsum(0) - counts)[gaussians]
    first_column, first_row = first.flatten(0, 1)[gaussians].unbind(-1)
    across = across.flatten()[gaussians]
    row, column = first_row + rank // across, first_column + rank % across
    tile = (gaussians // max(per_image, 1) * rows + row) * columns + column
    tiles, slots = tile.to(torch.int32).sort(stable=True)
    edges = torch.arange(images * rows * columns + 1, dtype=torch.int32, device=device)
    return Pairs(gaussians[slots], tiles, slots, torch.searchsorted(tiles, edges), counts)


def _tile_ranges(splats: Splats, view: View) -> tuple[Tensor, Tensor]:
    """First and last (exclusive) tile of every Gaussian along (x, y): [B, N, 2] each."""
    first, last = reached_pixels(splats, view)
    last = (last + TILE - 1) // TILE
    return first // TILE, last.masked_fill((splats.opacities < view.min_alpha)[..., None], 0)

"""The lists of the Triton backend: which Gaussians each tile of 16 × 16 pixels draws, in order.

Shapes: B images, N Gaussians per image, K tiles, P pairs of a tile and a Gaussian.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from smalti.gaussian.rasterizer.backends import Splats, View
from smalti.gaussian.rasterizer.reach import pairs_with_tiles, reached_pixels

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
    rows, columns = tile_grid(view)
    found = pairs_with_tiles(*reached_pixels(splats, view), (TILE, TILE), (rows, columns))
    tiles, slots = found.tiles.to(torch.int32).sort(stable=True)
    edges = torch.arange(len(splats.boxes) * rows * columns + 1, dtype=torch.int32, device=tiles.device)
    return Pairs(found.gaussians[slots], tiles, slots, torch.searchsorted(tiles, edges), found.counts)

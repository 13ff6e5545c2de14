"""How far a Gaussian is seen, in pixels and in tiles, for the backends that visit pixels by tiles.

Shapes: B images, N Gaussians per image, P pairs of a tile and a Gaussian.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from smalti.gaussian.rasterizer.backends import Splats, View


def reached_pixels(splats: Splats, view: View) -> tuple[Tensor, Tensor]:
    """First and last (exclusive) pixel along (x, y) that a Gaussian can reach, within its box and the image.

    α ≥ min_alpha asks for u² + v² ≤ 2 log(opacity / min_alpha), so |dx| stays within that many standard
    deviations of x, and |dy| of y. The margins cover rounding: pixels too many cost time, never a value.

    Returns:
        [B, N, 2] int64 each; the last is 0 where nothing is reached.
    """
    p, q, r = splats.whitening.unbind(-1)
    deviations = torch.stack((1 / p, torch.hypot(p, q) / p / r), dim=-1)
    if view.min_alpha > 0:
        squared = 2 * (splats.opacities / view.min_alpha).clamp(min=1).log() + 0.001
        reach = squared.sqrt()[..., None] * deviations * 1.01 + 1
    else:
        reach = torch.full_like(deviations, torch.inf)
    size = reach.new_tensor((view.width, view.height))
    middle = splats.centers - view.pixel_center
    first = (middle - reach).floor().clamp(min=0).minimum(size).long().maximum(splats.boxes[..., 0::2])
    last = ((middle + reach).ceil().clamp(min=-1).minimum(size - 1).long() + 1).minimum(splats.boxes[..., 1::2])
    empty = (first >= last).any(-1) | (splats.opacities < view.min_alpha)
    return first, last.masked_fill(empty[..., None], 0)


class TilePairs(NamedTuple):
    """All pairs of a tile and a Gaussian that reaches it, Gaussian by Gaussian.

    Args:
        gaussians: [P], int64, among the B × N, ascending.
        rows: [P], int64, of the tile in its image.
        columns: [P], the same.
        tiles: [P], int64; the tiles of all images are numbered image by image and row by row.
        counts: [B × N], int64, pairs of each Gaussian.
    """

    gaussians: Tensor
    rows: Tensor
    columns: Tensor
    tiles: Tensor
    counts: Tensor


def pairs_with_tiles(first: Tensor, last: Tensor, tile: tuple[int, int], grid: tuple[int, int]) -> TilePairs:
    """Pair Gaussians with the tiles that they reach.

    Args:
        first: [B, N, 2], as `reached_pixels` gives it.
        last: the same.
        tile: its height and width in pixels.
        grid: rows and columns of tiles of one image.
    """
    (height, width), (rows, columns) = tile, grid
    (left, top), (right, bottom) = first.flatten(0, 1).unbind(-1), last.flatten(0, 1).unbind(-1)
    first_column, first_row = left // width, top // height
    across = ((right + width - 1) // width - first_column).clamp(min=0)
    down = ((bottom + height - 1) // height - first_row).clamp(min=0)
    counts = across * down
    gaussians = torch.repeat_interleave(counts)
    rank = torch.arange(len(gaussians), device=counts.device) - (counts.cumsum(0) - counts)[gaussians]
    across = across[gaussians]
    row, column = first_row[gaussians] + rank // across, first_column[gaussians] + rank % across
    tiles = (gaussians // max(first.shape[1], 1) * rows + row) * columns + column
    return TilePairs(gaussians, row, column, tiles, counts)

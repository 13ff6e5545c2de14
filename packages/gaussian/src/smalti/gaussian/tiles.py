"""The tile backend: each 32-pixel tile sums only the Gaussians that reach it, in a buffer that stays in cache.

Forward and backward loop over the pairs of a tile and a Gaussian, sorted by tile; nothing of the size
Gaussians × pixels exists. The arithmetic per pair is that of the reference, operation by operation, so both
agree on which contributions fall below `min_alpha`.

Shapes: B images, N Gaussians per image, C channels, P pairs, K tiles, h × w pixels per tile, n pairs at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from smalti.gaussian.projection import Projection

TILE = 32
# Pairs at a time: 64 × 32 × 32 numbers in float32 are 256 KiB, which the second-level cache holds.
CHUNK = 64


def rasterize_tiles(
    projection: Projection,
    features: Tensor,
    opacities: Tensor,
    height: int,
    width: int,
    *,
    pixel_center: float,
    min_alpha: float,
) -> Tensor:
    """Sum the Gaussians tile by tile; differentiable once.

    Args:
        projection: of the B × N Gaussians.
        features: [B, N, C].
        opacities: [B, N].
        height: rows of the image.
        width: columns of the image.
        pixel_center: as in `rasterize_gaussians_2d`.
        min_alpha: as in `rasterize_gaussians_2d`.

    Returns:
        [B, C, height, width].
    """
    grid = _Grid(features.shape[0], height, width, min(TILE, height), min(TILE, width))
    boxes = _tight_boxes(projection, opacities, grid, pixel_center, min_alpha)
    image: Tensor = _TileSum.apply(  # type: ignore[no-untyped-call]
        projection.centers, projection.whitening, features, opacities, boxes, grid, pixel_center, min_alpha
    )
    return image


class _Grid(NamedTuple):
    """The tiles of all images: K = images × rows × columns, numbered in that order."""

    images: int
    height: int
    width: int
    tile_height: int
    tile_width: int

    @property
    def rows(self) -> int:
        return -(-self.height // self.tile_height)

    @property
    def columns(self) -> int:
        return -(-self.width // self.tile_width)

    @property
    def tiles(self) -> int:
        return self.images * self.rows * self.columns

    def split(self, image: Tensor) -> Tensor:
        """[B, C, height, width] to [K, C, h w], zeros where a tile reaches past the image."""
        h, w = self.tile_height, self.tile_width
        padded = F.pad(image, (0, self.columns * w - self.width, 0, self.rows * h - self.height))
        parts = padded.reshape(self.images, image.shape[1], self.rows, h, self.columns, w)
        return parts.permute(0, 2, 4, 1, 3, 5).reshape(self.tiles, image.shape[1], h * w)

    def join(self, tiles: Tensor) -> Tensor:
        """The inverse of `split`."""
        h, w, channels = self.tile_height, self.tile_width, tiles.shape[1]
        parts = tiles.reshape(self.images, self.rows, self.columns, channels, h, w).permute(0, 3, 1, 4, 2, 5)
        padded = parts.reshape(self.images, channels, self.rows * h, self.columns * w)
        return padded[..., : self.height, : self.width].contiguous()


class _Pairs(NamedTuple):
    """What each pair of a tile and a Gaussian needs, with the offsets (dx, dy) = centre - pixel of its tile.

    Args:
        gaussians: [P], index among the B × N Gaussians.
        bounds: K + 1 positions; tile k owns the pairs bounds[k] to bounds[k + 1].
        dx: [P, w].
        dy: [P, h].
        u2: [P, w], (p dx)², infinite outside the Gaussian's box.
        vx: [P, w], q dx.
        vy: [P, h], r dy.
        opacities: [P, h], zero outside the Gaussian's box.
    """

    gaussians: Tensor
    bounds: list[int]
    dx: Tensor
    dy: Tensor
    u2: Tensor
    vx: Tensor
    vy: Tensor
    opacities: Tensor

    def chunks(self) -> Iterator[tuple[int, slice]]:
        """Tile by tile, at most CHUNK of its pairs at a time."""
        for tile, (start, end) in enumerate(zip(self.bounds, self.bounds[1:], strict=False)):
            for first in range(start, end, CHUNK):
                yield tile, slice(first, min(first + CHUNK, end))

    def deviation(self, part: slice) -> Tensor:
        """The second whitened offset, v = q dx + r dy: [n, h, w]."""
        return self.vx[part, None, :] + self.vy[part, :, None]

    def alpha(self, part: slice, v_squared: Tensor) -> Tensor:
        """Opacity × exp(-(u² + v²) / 2), not clamped: [n, h, w], written over `v_squared`."""
        exponent = v_squared.add_(self.u2[part, None, :]).mul_(-0.5)
        return exponent.exp_().mul_(self.opacities[part, :, None])


class _TileSum(torch.autograd.Function):
    """The sum over Gaussians with its exact gradient; boxes and thresholds are constants."""

    @staticmethod
    def forward(
        ctx: Any,
        centers: Tensor,
        whitening: Tensor,
        features: Tensor,
        opacities: Tensor,
        boxes: Tensor,
        grid: _Grid,
        pixel_center: float,
        min_alpha: float,
    ) -> Tensor:
        ctx.save_for_backward(centers, whitening, features, opacities, boxes)
        ctx.grid, ctx.pixel_center, ctx.min_alpha = grid, pixel_center, min_alpha
        pairs = _pairs(centers, whitening, opacities, boxes, grid, pixel_center)
        pair_features = features.flatten(0, 1)[pairs.gaussians].T  # [C, P]
        below = _just_below(min_alpha, features.dtype)
        saturates = bool((opacities > 1).any())

        tiles = features.new_zeros(grid.tiles, features.shape[2], grid.tile_height * grid.tile_width)
        for tile, part in pairs.chunks():
            alpha = pairs.alpha(part, pairs.deviation(part).square_())
            if saturates:
                alpha.clamp_(max=1)
            torch.threshold_(alpha, below, 0.0)
            tiles[tile].addmm_(pair_features[:, part], alpha.flatten(1))
        return grid.join(tiles)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_image: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad_image.device.type, enabled=False):
            return (*_gradients(ctx, grad_image), None, None, None, None)


def _gradients(ctx: Any, grad_image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients to centres, whitening, features and opacities.

    With ∂L/∂α = Σ_c feature_c ∂L/∂image_c and weight = α ∂L/∂α where the Gaussian is drawn and not
    saturated, ∂L/∂opacity = Σ weight / opacity and ∂L/∂σ = -weight for σ = (u² + v²) / 2, u = p dx,
    v = q dx + r dy; everything else follows from sums of weight and weight × v over columns and rows.
    """
    centers, whitening, features, opacities, boxes = ctx.saved_tensors
    grid: _Grid = ctx.grid
    # A Gaussian of opacity 0 is differentiated as one of opacity 1, whose results are then scaled by 0.
    divisors = torch.where(opacities == 0, 1, opacities)
    pairs = _pairs(centers, whitening, divisors, boxes, grid, ctx.pixel_center)
    pair_features = features.flatten(0, 1)[pairs.gaussians]  # [P, C]
    below = _just_below(ctx.min_alpha, features.dtype)
    saturates = bool((opacities > 1).any())
    grad_tiles = grid.split(grad_image)

    grad_features = torch.empty_like(pair_features)
    weight_columns, moment_columns, moment_rows = (torch.empty_like(x) for x in (pairs.dx, pairs.dx, pairs.dy))
    for tile, part in pairs.chunks():
        v = pairs.deviation(part)
        alpha = pairs.alpha(part, v.square())
        torch.threshold_(alpha, below, 0.0)
        drawn = alpha.clamp(max=1) if saturates else alpha
        grad_features[part] = drawn.flatten(1) @ grad_tiles[tile].T
        if saturates:
            alpha.masked_fill_(alpha > 1, 0)
        weight = (pair_features[part] @ grad_tiles[tile]).view_as(alpha).mul_(alpha)
        weight_columns[part] = weight.sum(1)
        moment = v.mul_(weight)
        moment_columns[part] = moment.sum(1)
        moment_rows[part] = moment.sum(2)

    weight_sum, moment_sum = weight_columns.sum(1), moment_columns.sum(1)
    weight_dx = weight_columns * pairs.dx
    pair_sums = torch.stack(
        (
            weight_sum,
            weight_dx.sum(1),
            (weight_dx * pairs.dx).sum(1),
            moment_sum,
            (moment_columns * pairs.dx).sum(1),
            (moment_rows * pairs.dy).sum(1),
        ),
        dim=1,
    )
    count = opacities.numel()
    sums = pair_sums.new_zeros(count, 6).index_add_(0, pairs.gaussians, pair_sums).view(*opacities.shape, 6)
    weight, weight_x, weight_xx, moment, moment_x, moment_y = sums.unbind(-1)

    scale = opacities / divisors
    p, q, r = whitening.unbind(-1)
    to_centers = torch.stack((p * p * weight_x + q * moment, r * moment), dim=-1)
    to_whitening = torch.stack((p * weight_xx, moment_x, moment_y), dim=-1)
    to_features = pair_features.new_zeros(count, features.shape[2]).index_add_(0, pairs.gaussians, grad_features)
    return (
        -scale[..., None] * to_centers,
        -scale[..., None] * to_whitening,
        scale[..., None] * to_features.view_as(features),
        weight / divisors,
    )


def _just_below(min_alpha: float, dtype: torch.dtype) -> float:
    # torch.threshold_ keeps what is greater; the neighbour below min_alpha makes that "at least min_alpha".
    value = torch.tensor(min_alpha, dtype=dtype)
    return torch.nextafter(value, torch.full_like(value, -torch.inf)).item()


@torch.no_grad()
def _tight_boxes(
    projection: Projection, opacities: Tensor, grid: _Grid, pixel_center: float, min_alpha: float
) -> Tensor:
    """The pixels where a Gaussian can reach min_alpha, within its culling box and the image: [B, N, 4].

    α ≥ min_alpha asks for u² + v² ≤ 2 log(opacity / min_alpha), so |dx| stays within that many standard
    deviations of x, and |dy| of y. The margins cover rounding: pixels too many cost time, never a value.
    """
    p, q, r = projection.whitening.unbind(-1)
    deviations = torch.stack((1 / p, torch.hypot(p, q) / p / r), dim=-1)
    if min_alpha > 0:
        squared = 2 * (opacities / min_alpha).clamp(min=1).log() + 0.001
        reach = squared.sqrt()[..., None] * deviations * 1.01 + 1
    else:
        reach = torch.full_like(deviations, torch.inf)
    size = reach.new_tensor((grid.width, grid.height))
    middle = projection.centers - pixel_center
    first = (middle - reach).floor().clamp(min=0).minimum(size).long()
    last = (middle + reach).ceil().clamp(min=-1).minimum(size - 1).long() + 1
    first = first.maximum(projection.boxes[..., 0::2])
    last = last.minimum(projection.boxes[..., 1::2])
    empty = (first >= last).any(-1) | (opacities < min_alpha)
    return torch.stack((first, last), dim=-1).flatten(-2).masked_fill(empty[..., None], 0)


@torch.no_grad()
def _pairs(
    centers: Tensor, whitening: Tensor, opacities: Tensor, boxes: Tensor, grid: _Grid, pixel_center: float
) -> _Pairs:
    """All pairs of a tile and a Gaussian whose box touches it, by tile and then by Gaussian."""
    h, w = grid.tile_height, grid.tile_width
    per_image = opacities.shape[1]
    left, right, top, bottom = boxes.flatten(0, 1).unbind(-1)
    first_column, across = left // w, (right + w - 1) // w - left // w
    first_row, down = top // h, (bottom + h - 1) // h - top // h
    counts = across * down
    gaussians = torch.repeat_interleave(counts)
    rank = torch.arange(len(gaussians), device=boxes.device) - (counts.cumsum(0) - counts)[gaussians]
    row = first_row[gaussians] + rank // across[gaussians]
    column = first_column[gaussians] + rank % across[gaussians]
    tile = (gaussians // max(per_image, 1) * grid.rows + row) * grid.columns + column
    tile, order = tile.sort(stable=True)
    gaussians, row, column = gaussians[order], row[order], column[order]
    bounds = torch.searchsorted(tile, torch.arange(grid.tiles + 1, device=boxes.device)).tolist()

    xs = column[:, None] * w + torch.arange(w, device=boxes.device)
    ys = row[:, None] * h + torch.arange(h, device=boxes.device)
    x, y = centers.flatten(0, 1)[gaussians, :, None].unbind(1)
    dx = x - (xs.to(x.dtype) + pixel_center)
    dy = y - (ys.to(y.dtype) + pixel_center)
    left, right, top, bottom = boxes.flatten(0, 1)[gaussians, :, None].unbind(1)
    p, q, r = whitening.flatten(0, 1)[gaussians, :, None].unbind(1)
    u = p * dx
    return _Pairs(
        gaussians=gaussians,
        bounds=bounds,
        dx=dx,
        dy=dy,
        u2=torch.where((xs >= left) & (xs < right), u * u, torch.inf),
        vx=q * dx,
        vy=r * dy,
        opacities=torch.where((ys >= top) & (ys < bottom), opacities.flatten()[gaussians, None], 0),
    )

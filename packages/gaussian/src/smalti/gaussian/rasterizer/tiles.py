"""The tile backend: each 32-pixel tile draws only the Gaussians that reach it, in a buffer that stays in cache.

Forward and backward loop over the pairs of a tile and a Gaussian, sorted by tile; nothing of the size
Gaussians × pixels exists. The arithmetic per pair is that of the reference, operation by operation, so both
agree on which contributions fall below `min_alpha`.

Shapes: B images, N Gaussians per image, C channels, P pairs, K tiles, h × w pixels per tile, n pairs at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from smalti.gaussian.rasterizer.backends import MAX_ALPHA_OVER, MIN_TRANSMITTANCE, Gradients, Splats, View
from smalti.gaussian.rasterizer.reach import pairs_with_tiles, reached_pixels

TILE = 32
# Pairs at a time: 64 × 32 × 32 numbers in float32 are 256 KiB, which the second-level cache holds.
CHUNK = 64


def forward(splats: Splats, view: View) -> Tensor:
    """Draw the image: [B, C, H, W]."""
    features = splats.features
    grid = _Grid.of(features.shape[0], view)
    pairs = _pairs(splats, view, grid, splats.opacities)
    pair_features = features.flatten(0, 1)[pairs.gaussians].T  # [C, P]
    limits = _Limits.of(splats.opacities, view)
    padded = features.new_zeros(grid.padded(features.shape[2]))
    tiles = grid.tiled(padded)
    light = padded.new_empty(0)
    buffer = pairs.buffer(grid)
    for tile, part, begins in pairs.chunks():
        weight = limits.cut_(pairs.alpha(part, pairs.deviation(part, buffer).square_())).flatten(1)
        if view.over:
            light = torch.ones_like(weight[0]) if begins else light
            weight, _, left = _composite(weight, light)
            light = left[-1]
        drawn = tiles[grid.place(tile)]
        drawn += (pair_features[:, part] @ weight).view_as(drawn)
    return padded[..., : view.height, : view.width].contiguous()


def backward(splats: Splats, view: View, image: Tensor, grad_image: Tensor) -> Gradients:
    """The gradients of forward.

    With slope = ∂L/∂α, in a sum Σ_c feature_c ∂L/∂image_c, and weight = α slope where the Gaussian is drawn and
    not limited, ∂L/∂opacity = Σ weight / opacity and ∂L/∂σ = -weight for σ = (u² + v²) / 2, u = p dx,
    v = q dx + r dy; everything else follows from sums of weight and weight × v over columns and rows.
    """
    features, opacities = splats.features, splats.opacities
    # A Gaussian of opacity 0 is differentiated as one of opacity ½, whose results are then scaled by 0.
    divisors = torch.where(opacities == 0, 0.5, opacities)
    scale = opacities / divisors
    grid = _Grid.of(features.shape[0], view)
    pairs = _pairs(splats, view, grid, divisors)
    pair_features = features.flatten(0, 1)[pairs.gaussians]  # [P, C]
    pair_scale = scale.flatten()[pairs.gaussians, None]
    limits = _Limits.of(opacities, view)
    grad_tiles = grid.split(grad_image)
    # Of compositing: the loss of all that is drawn at a pixel, as if linear in it, less what has been passed.
    behind = grid.split((image * grad_image).sum(1, keepdim=True))[:, 0] if view.over else grad_tiles[:, 0]
    light = behind.new_empty(0)

    grad_features = torch.empty_like(pair_features)
    weight_columns, moment_columns, moment_rows = (torch.empty_like(x) for x in (pairs.vx, pairs.vx, pairs.vy))
    buffer = pairs.buffer(grid)
    for tile, part, begins in pairs.chunks():
        v = pairs.deviation(part, buffer)
        alpha = pairs.alpha(part, v.square())
        drawn = limits.cut_(alpha.clone() if limits.saturates else alpha).flatten(1)
        slope = pair_features[part] @ grad_tiles[tile]  # [n, h w]
        if view.over:
            light = torch.ones_like(slope[0]) if begins else light
            alive_alpha = drawn * pair_scale[part]
            drawn, before, left = _composite(alive_alpha, light)
            light = left[-1]
            after = behind[tile] - (drawn * slope).cumsum(0)
            behind[tile] = after[-1]
            slope = before * slope - after / (1 - alive_alpha)
            slope.masked_fill_(left <= MIN_TRANSMITTANCE, 0)
        grad_features[part] = drawn @ grad_tiles[tile].T
        weight = limits.where_free_(alpha).mul_(slope.view_as(alpha))
        weight_columns[part] = weight.sum(1)
        moment = v.mul_(weight)
        moment_columns[part] = moment.sum(1)
        moment_rows[part] = moment.sum(2)

    weight_sum, moment_sum = weight_columns.sum(1), moment_columns.sum(1)
    dx, dy = pairs.offsets(grid, view)
    weight_dx = weight_columns * dx
    pair_sums = torch.stack(
        (
            weight_sum,
            weight_dx.sum(1),
            (weight_dx * dx).sum(1),
            moment_sum,
            (moment_columns * dx).sum(1),
            (moment_rows * dy).sum(1),
        ),
        dim=1,
    )
    count = opacities.numel()
    sums = pair_sums.new_zeros(count, 6).index_add_(0, pairs.gaussians, pair_sums).view(*opacities.shape, 6)
    weight, weight_x, weight_xx, moment, moment_x, moment_y = sums.unbind(-1)
    p, q, r = splats.whitening.unbind(-1)
    to_centers = torch.stack((p * p * weight_x + q * moment, r * moment), dim=-1)
    to_whitening = torch.stack((p * weight_xx, moment_x, moment_y), dim=-1)
    to_features = pair_features.new_zeros(count, features.shape[2]).index_add_(0, pairs.gaussians, grad_features)
    # What compositing draws is scaled already.
    to_features = to_features.view_as(features) * (1 if view.over else scale[..., None])
    return Gradients(-scale[..., None] * to_centers, -scale[..., None] * to_whitening, to_features, weight / divisors)


def _composite(alpha: Tensor, light: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights α T, and the transmittance T before and after each of some Gaussians in order: all [n, h w]."""
    left = (1 - alpha).cumprod(0).mul_(light)
    before = torch.cat((light[None], left[:-1]))
    return (alpha * before).masked_fill_(left <= MIN_TRANSMITTANCE, 0), before, left


class _Limits(NamedTuple):
    """Where α is cut and limited.

    Args:
        below: the greatest number that is less than min_alpha.
        greatest: what α is limited to.
        saturates: whether some opacity is beyond that.
    """

    below: float
    greatest: float
    saturates: bool

    @classmethod
    def of(cls, opacities: Tensor, view: View) -> _Limits:
        # torch.threshold_ keeps what is greater; the neighbour below min_alpha makes that "at least min_alpha".
        value = torch.tensor(view.min_alpha, dtype=opacities.dtype)
        below = torch.nextafter(value, torch.full_like(value, -torch.inf)).item()
        greatest = MAX_ALPHA_OVER if view.over else 1.0
        return cls(below, greatest, bool((opacities > greatest).any()))

    def cut_(self, alpha: Tensor) -> Tensor:
        """α as it is drawn, in place."""
        if self.saturates:
            alpha.clamp_(max=self.greatest)
        return torch.threshold_(alpha, self.below, 0.0)

    def where_free_(self, alpha: Tensor) -> Tensor:
        """α where it depends on opacity and shape, otherwise 0, in place."""
        if self.saturates:
            alpha.masked_fill_(alpha > self.greatest, 0)
        return torch.threshold_(alpha, self.below, 0.0)


class _Grid(NamedTuple):
    """The tiles of all images: K = images × rows × columns, numbered in that order."""

    images: int
    height: int
    width: int
    tile_height: int
    tile_width: int

    @classmethod
    def of(cls, images: int, view: View) -> _Grid:
        return cls(images, view.height, view.width, min(TILE, view.height), min(TILE, view.width))

    @property
    def rows(self) -> int:
        return -(-self.height // self.tile_height)

    @property
    def columns(self) -> int:
        return -(-self.width // self.tile_width)

    @property
    def tiles(self) -> int:
        return self.images * self.rows * self.columns

    def padded(self, channels: int) -> tuple[int, int, int, int]:
        """The shape of images of whole tiles."""
        return self.images, channels, self.rows * self.tile_height, self.columns * self.tile_width

    def tiled(self, padded: Tensor) -> Tensor:
        """A view of images of whole tiles, [B, C, height, width], as [B, rows, columns, C, h, w]."""
        h, w = self.tile_height, self.tile_width
        return padded.view(self.images, padded.shape[1], self.rows, h, self.columns, w).permute(0, 2, 4, 1, 3, 5)

    def place(self, tile: int) -> tuple[int, int, int]:
        """Image, row and column of a tile."""
        return tile // (self.rows * self.columns), tile // self.columns % self.rows, tile % self.columns

    def split(self, image: Tensor) -> Tensor:
        """[B, C, height, width] to [K, C, h w], zeros where a tile reaches past the image."""
        *_, height, width = self.padded(1)
        padded = F.pad(image, (0, width - self.width, 0, height - self.height)).contiguous()
        return self.tiled(padded).reshape(self.tiles, image.shape[1], self.tile_height * self.tile_width)


class _Pairs(NamedTuple):
    """What each pair of a tile and a Gaussian needs, with the offsets (dx, dy) = centre - pixel of its tile.

    The offsets themselves are needed once, at the end of a backward pass, and are not kept.

    Args:
        gaussians: [P], index among the B × N Gaussians.
        bounds: K + 1 positions; tile k owns the pairs bounds[k] to bounds[k + 1].
        x: [P, 1], of the centre.
        y: [P, 1].
        first_x: [P, 1], the first column of the tile, in pixels.
        first_y: [P, 1].
        u2: [P, w], (p dx)², infinite outside the Gaussian's box.
        vx: [P, w], q dx.
        vy: [P, h], r dy.
        opacities: [P, h], zero outside the Gaussian's box.
    """

    gaussians: Tensor
    bounds: list[int]
    x: Tensor
    y: Tensor
    first_x: Tensor
    first_y: Tensor
    u2: Tensor
    vx: Tensor
    vy: Tensor
    opacities: Tensor

    def chunks(self) -> Iterator[tuple[int, slice, bool]]:
        """Tile by tile, at most CHUNK of its pairs at a time, and whether they are its first."""
        for tile, (start, end) in enumerate(zip(self.bounds, self.bounds[1:], strict=False)):
            for first in range(start, end, CHUNK):
                yield tile, slice(first, min(first + CHUNK, end)), first == start

    def offsets(self, grid: _Grid, view: View) -> tuple[Tensor, Tensor]:
        """Of columns, dx [P, w], and of rows, dy [P, h]."""
        return (
            _offsets(self.x, self.first_x, grid.tile_width, view),
            _offsets(self.y, self.first_y, grid.tile_height, view),
        )

    def buffer(self, grid: _Grid) -> Tensor:
        """Room for the largest chunk: made anew, chunks of many sizes would leave holes in memory."""
        most = max((end - start for start, end in zip(self.bounds, self.bounds[1:], strict=False)), default=0)
        return self.vx.new_empty(min(most, CHUNK), grid.tile_height, grid.tile_width)

    def deviation(self, part: slice, buffer: Tensor) -> Tensor:
        """The second whitened offset, v = q dx + r dy: [n, h, w], in the buffer."""
        chunk = buffer[: part.stop - part.start]
        return torch.add(self.vx[part, None, :], self.vy[part, :, None], out=chunk)

    def alpha(self, part: slice, v_squared: Tensor) -> Tensor:
        """Opacity × exp(-(u² + v²) / 2), not clamped: [n, h, w], written over `v_squared`."""
        exponent = v_squared.add_(self.u2[part, None, :]).mul_(-0.5)
        return exponent.exp_().mul_(self.opacities[part, :, None])


def _pairs(splats: Splats, view: View, grid: _Grid, opacities: Tensor) -> _Pairs:
    """All pairs of a tile and a Gaussian that reaches it, by tile and then by Gaussian."""
    h, w = grid.tile_height, grid.tile_width
    first, last = reached_pixels(splats, view)
    gaussians, row, column, tile, _ = pairs_with_tiles(first, last, (h, w), (grid.rows, grid.columns))
    tile, order = tile.sort(stable=True)
    gaussians, row, column = gaussians[order], row[order], column[order]
    bounds = torch.searchsorted(tile, torch.arange(grid.tiles + 1, device=tile.device)).tolist()

    x, y = splats.centers.flatten(0, 1)[gaussians, :, None].unbind(1)
    p, q, r = splats.whitening.flatten(0, 1)[gaussians, :, None].unbind(1)
    left, top = first.flatten(0, 1)[gaussians, :, None].unbind(1)
    right, bottom = last.flatten(0, 1)[gaussians, :, None].unbind(1)
    first_x, first_y = column[:, None] * w, row[:, None] * h
    dx = _offsets(x, first_x, w, view)
    vx, u2 = q * dx, dx.mul_(p).square_()
    vy = _offsets(y, first_y, h, view).mul_(r)
    return _Pairs(
        gaussians=gaussians,
        bounds=bounds,
        x=x,
        y=y,
        first_x=first_x,
        first_y=first_y,
        u2=u2.masked_fill_(_outside(first_x, w, left, right), torch.inf),
        vx=vx,
        vy=vy,
        opacities=opacities.flatten()[gaussians, None].masked_fill(_outside(first_y, h, top, bottom), 0),
    )


def _offsets(center: Tensor, first: Tensor, size: int, view: View) -> Tensor:
    """The centre's from so many pixels beginning with the first: [P, size]."""
    pixels = first.to(center.dtype) + torch.arange(size, dtype=center.dtype, device=center.device)
    return torch.sub(center, pixels.add_(view.pixel_center), out=pixels)


def _outside(first: Tensor, size: int, start: Tensor, end: Tensor) -> Tensor:
    """Which of so many pixels beginning with the first are not of start to end: [P, size]."""
    steps = torch.arange(size, device=first.device)
    return (steps < start - first).logical_or_(steps >= end - first)

"""The Triton backend: one program per tile draws its list of Gaussians, one per pair of both differentiates.

Nothing is added atomically, so that the same inputs give the same bytes on one device: every pair of a tile and a
Gaussian writes its own gradients, which are then summed by Gaussian. With `TRITON_INTERPRET=1` it runs on the CPU.

Shapes: B images, N Gaussians per image, C channels, H rows, W columns, K tiles, P pairs of a tile and a Gaussian.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from smalti.core.errors import UserError
from smalti.gaussian.rasterizer.backends import MAX_ALPHA_OVER, MIN_TRANSMITTANCE, Gradients, Splats, View
from smalti.gaussian.rasterizer.triton_tiles import TILE, tile_grid, tile_pairs

# Channels at a time: 256 pixels × 16 channels fill a quarter of the registers that 128 threads can have.
CHANNELS = 16
# Sums of a pair before those of its features: opacity, then with the gradient to σ = (u² + v²) / 2
# u, v, u dx, v dx and v dy.
SUMS: tl.constexpr = tl.constexpr(6)


def forward(splats: Splats, view: View) -> Tensor:
    """The image, [B, C, H, W]; see `smalti.gaussian.rasterizer.backends`.

    Raises:
        UserError: the Gaussians are not on a CUDA device, and Triton does not interpret.
    """
    _check_device(splats.features)
    images, _, channels = splats.features.shape
    pairs = tile_pairs(splats, view)
    rows, columns = tile_grid(view)
    image = splats.features.new_empty(images, channels, view.height, view.width)
    settings = _settings(view, channels)
    grid = (images * rows * columns, triton.cdiv(channels, settings["channel_block"]))
    with torch.cuda.device_of(image):
        _draw[grid](*splats[:4], pairs.gaussians, pairs.bounds, image, channels, view.height, view.width, **settings)
    return image


def backward(splats: Splats, view: View, image: Tensor, grad_image: Tensor) -> Gradients:
    """The gradients; see `smalti.gaussian.rasterizer.backends`."""
    channels = splats.features.shape[2]
    pairs = tile_pairs(splats, view)
    # Compositing goes through the list of a tile in order; for sums each pair is a list of its own.
    if view.over:
        tiles = torch.arange(len(pairs.bounds) - 1, dtype=torch.int32, device=image.device)
        bounds = pairs.bounds
    else:
        tiles, bounds = pairs.tiles, torch.arange(len(pairs.tiles) + 1, device=image.device)
    by_pair = image.new_empty(len(pairs.tiles), SUMS.value + channels)
    with torch.cuda.device_of(image):
        _differentiate[(len(tiles),)](
            *splats[:4],
            pairs.gaussians,
            pairs.slots,
            tiles,
            bounds,
            image,
            grad_image,
            by_pair,
            channels,
            view.height,
            view.width,
            **_settings(view, channels),
        )
    # Unsafe as in unchecked: the lengths are right, and checking them would wait for the GPU.
    sums = torch.segment_reduce(by_pair, "sum", lengths=pairs.counts, axis=0, unsafe=True, initial=0)
    sums = sums.unflatten(0, splats.opacities.shape)
    opacities, u, v, u_dx, v_dx, v_dy = sums[..., : SUMS.value].unbind(-1)
    p, q, r = splats.whitening.unbind(-1)
    return Gradients(
        centers=torch.stack((p * u + q * v, r * v), dim=-1),
        whitening=torch.stack((u_dx, v_dx, v_dy), dim=-1),
        features=sums[..., SUMS.value :].clone(memory_format=torch.contiguous_format),
        opacities=opacities.clone(memory_format=torch.contiguous_format),
    )


def _check_device(features: Tensor) -> None:
    if not features.is_cuda and not knobs.runtime.interpret:
        raise UserError(f"backend 'triton' runs on a CUDA device, but the Gaussians are on {features.device}")


def _settings(view: View, channels: int) -> dict[str, Any]:
    return {
        "pixel_center": view.pixel_center,
        "min_alpha": view.min_alpha,
        "max_alpha": MAX_ALPHA_OVER if view.over else 1.0,
        "min_transmittance": MIN_TRANSMITTANCE,
        "over": view.over,
        "tile_size": TILE,
        "channel_block": min(CHANNELS, triton.next_power_of_2(max(channels, 1))),
    }


@triton.jit  # type: ignore[untyped-decorator]
def _pixels(tile: tl.tensor, height: tl.tensor, width: tl.tensor, tile_size: tl.constexpr) -> Any:
    """The image of a tile, rows and columns of its pixels, and which of them exist."""
    columns = tl.cdiv(width, tile_size)
    rows = tl.cdiv(height, tile_size)
    pixel = tl.arange(0, tile_size * tile_size)
    x = (tile % columns) * tile_size + pixel % tile_size
    y = (tile // columns % rows) * tile_size + pixel // tile_size
    return tile // columns // rows, y, x, (y < height) & (x < width)


@triton.jit  # type: ignore[untyped-decorator]
def _deviations(centers: tl.tensor, whitening: tl.tensor, gaussian: tl.tensor, x: tl.tensor, y: tl.tensor) -> Any:
    """Offsets from the pixels to the centre of a Gaussian, in pixels and in standard deviations."""
    dx = tl.load(centers + 2 * gaussian) - x
    dy = tl.load(centers + 2 * gaussian + 1) - y
    p = tl.load(whitening + 3 * gaussian)
    q = tl.load(whitening + 3 * gaussian + 1)
    r = tl.load(whitening + 3 * gaussian + 2)
    return dx, dy, p * dx, q * dx + r * dy


@triton.jit  # type: ignore[untyped-decorator]
def _draw(
    centers: tl.tensor,
    whitening: tl.tensor,
    features: tl.tensor,
    opacities: tl.tensor,
    gaussians: tl.tensor,
    bounds: tl.tensor,
    image: tl.tensor,
    channels: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    pixel_center: tl.constexpr,
    min_alpha: tl.constexpr,
    max_alpha: tl.constexpr,
    min_transmittance: tl.constexpr,
    over: tl.constexpr,
    tile_size: tl.constexpr,
    channel_block: tl.constexpr,
) -> None:
    kind: tl.constexpr = image.dtype.element_ty
    # Plain numbers would be rounded to float32.
    least = tl.full((), min_alpha, kind)
    greatest = tl.full((), max_alpha, kind)
    least_left = tl.full((), min_transmittance, kind)
    tile = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * channel_block + tl.arange(0, channel_block)
    number, row, column, inside = _pixels(tile, height, width, tile_size)
    x = column.to(kind) + tl.full((), pixel_center, kind)
    y = row.to(kind) + tl.full((), pixel_center, kind)

    total = tl.zeros((channel_block, tile_size * tile_size), kind)
    transmittance = tl.full((tile_size * tile_size,), 1, kind)
    alive = inside
    for place in range(tl.load(bounds + tile), tl.load(bounds + tile + 1)):
        gaussian = tl.load(gaussians + place)
        _, _, u, v = _deviations(centers, whitening, gaussian, x, y)
        raw = tl.load(opacities + gaussian) * tl.exp(-0.5 * (u * u + v * v))
        alpha = tl.minimum(raw, greatest)
        # Not a number is no alpha, which the minimum alone would forget.
        drawn = alive & (raw >= least) & (alpha >= least)
        weight = alpha
        if over:
            left = transmittance * (1 - alpha)
            alive = alive & ((left > least_left) | ~drawn)
            drawn = drawn & alive
            weight = alpha * transmittance
            transmittance = tl.where(drawn, left, transmittance)
        feature = tl.load(features + gaussian * channels + channel, mask=channel < channels, other=0)
        total += feature[:, None] * tl.where(drawn, weight, 0)[None]
    offset = ((number * channels + channel[:, None]) * height + row[None]) * width + column[None]
    tl.store(image + offset, total, mask=(channel < channels)[:, None] & inside[None])


@triton.jit  # type: ignore[untyped-decorator]
def _differentiate(
    centers: tl.tensor,
    whitening: tl.tensor,
    features: tl.tensor,
    opacities: tl.tensor,
    gaussians: tl.tensor,
    slots: tl.tensor,
    tiles: tl.tensor,
    bounds: tl.tensor,
    image: tl.tensor,
    grad_image: tl.tensor,
    by_pair: tl.tensor,
    channels: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    pixel_center: tl.constexpr,
    min_alpha: tl.constexpr,
    max_alpha: tl.constexpr,
    min_transmittance: tl.constexpr,
    over: tl.constexpr,
    tile_size: tl.constexpr,
    channel_block: tl.constexpr,
) -> None:
    kind: tl.constexpr = image.dtype.element_ty
    least = tl.full((), min_alpha, kind)
    greatest = tl.full((), max_alpha, kind)
    least_left = tl.full((), min_transmittance, kind)
    program = tl.program_id(0).to(tl.int64)
    tile = tl.load(tiles + program).to(tl.int64)
    number, row, column, inside = _pixels(tile, height, width, tile_size)
    x = column.to(kind) + tl.full((), pixel_center, kind)
    y = row.to(kind) + tl.full((), pixel_center, kind)
    block = tl.arange(0, channel_block)

    transmittance = tl.full((tile_size * tile_size,), 1, kind)
    alive = inside
    # The upstream gradient's product with what the Gaussians behind the present one add to the image.
    behind = tl.zeros((tile_size * tile_size,), kind)
    if over:
        for first in range(0, channels, channel_block):
            channel = first + block
            offset = ((number * channels + channel[:, None]) * height + row[None]) * width + column[None]
            mask = (channel < channels)[:, None] & inside[None]
            seen = tl.load(image + offset, mask=mask, other=0)
            behind += tl.sum(seen * tl.load(grad_image + offset, mask=mask, other=0), 0)
    for place in range(tl.load(bounds + program), tl.load(bounds + program + 1)):
        gaussian = tl.load(gaussians + place)
        out = by_pair + tl.load(slots + place) * (SUMS + channels)
        dx, dy, u, v = _deviations(centers, whitening, gaussian, x, y)
        shape = tl.exp(-0.5 * (u * u + v * v))
        raw = tl.load(opacities + gaussian) * shape
        alpha = tl.minimum(raw, greatest)
        drawn = alive & (raw >= least) & (alpha >= least)
        weight = alpha
        left = transmittance
        if over:
            left = transmittance * (1 - alpha)
            alive = alive & ((left > least_left) | ~drawn)
            drawn = drawn & alive
            weight = alpha * transmittance
        weight = tl.where(drawn, weight, 0)

        along = tl.zeros((tile_size * tile_size,), kind)
        for first in range(0, channels, channel_block):
            channel = first + block
            offset = ((number * channels + channel[:, None]) * height + row[None]) * width + column[None]
            mask = (channel < channels)[:, None] & inside[None]
            upstream = tl.load(grad_image + offset, mask=mask, other=0)
            feature = tl.load(features + gaussian * channels + channel, mask=channel < channels, other=0)
            along += tl.sum(feature[:, None] * upstream, 0)
            tl.store(out + SUMS + channel, tl.sum(weight[None] * upstream, 1), mask=channel < channels)
        to_alpha = along
        if over:
            behind -= weight * along
            to_alpha = transmittance * along - behind / (1 - alpha)
            transmittance = tl.where(drawn, left, transmittance)

        # Where nothing is drawn, offsets may be infinite.
        active = drawn & (raw <= greatest)
        pull = tl.where(active, -raw * to_alpha, 0)
        dx = tl.where(active, dx, 0)
        dy = tl.where(active, dy, 0)
        u = tl.where(active, u, 0)
        v = tl.where(active, v, 0)
        tl.store(out, tl.sum(tl.where(active, shape * to_alpha, 0), 0))
        tl.store(out + 1, tl.sum(pull * u, 0))
        tl.store(out + 2, tl.sum(pull * v, 0))
        tl.store(out + 3, tl.sum(pull * u * dx, 0))
        tl.store(out + 4, tl.sum(pull * v * dx, 0))
        tl.store(out + 5, tl.sum(pull * v * dy, 0))

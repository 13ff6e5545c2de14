"""The kernels of the compiled CPU backend, forward and backward; imports numba.

Gaussians of all images are numbered in one row; `numba_backend` has what the arguments mean. Numbers taken from
arrays keep their precision where a literal would turn float32 into float64: hence the constants in `limits`.

Shapes: B images, N Gaussians per image, C channels, P pairs of a band and a Gaussian in it, n columns.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from smalti.gaussian.rasterizer.numba_exp import compiled, exp_minus_half

Array = NDArray[Any]

BAND = 16
# Sums over pixels before those of the features: weight, weight dx, weight dx², moment, moment dx, moment dy.
SUMS = 6


@compiled
def plan(
    centers: Array,
    whitening: Array,
    opacities: Array,
    boxes: Array,
    ys: Array,
    limits: Array,
    gaussians: int,
    reach: Array,
    bands: Array,
    bounds: Array,
) -> None:
    """How far each Gaussian reaches, its first band and the one after its last, and the bounds of the pairs."""
    per_image = ys.size // BAND
    for g in range(opacities.size):
        bands[g] = 0
        if opacities[g] < limits[0] or boxes[g, 0] >= boxes[g, 1] or boxes[g, 2] >= boxes[g, 3]:
            continue
        first, last = boxes[g, 2] // BAND, min(boxes[g, 3] // BAND, per_image)
        reach[g] = np.inf
        if limits[0] > 0:
            # The margins cover rounding: a pixel too many costs time, never a value.
            reach[g] = 2 * np.log(np.float64(opacities[g]) / np.float64(limits[0])) + 0.001
            p, q, r = np.float64(whitening[g, 0]), np.float64(whitening[g, 1]), np.float64(whitening[g, 2])
            height = np.sqrt(reach[g]) * np.hypot(p, q) / p / r * 1.01 + 1
            above = np.float64(centers[g, 1]) - np.float64(ys[0]) - height
            below = np.float64(centers[g, 1]) - np.float64(ys[0]) + height
            first = max(first, np.int64(np.floor(min(max(above, 0.0), ys.size) / BAND)))
            last = min(last, np.int64(np.floor(min(max(below, -1.0), ys.size - 1) / BAND)) + 1)
        if first < last:
            bands[g, 0], bands[g, 1] = first, last
            for band in range(first, last):
                bounds[g // gaussians * per_image + band + 1] += 1
    for k in range(1, bounds.size):
        bounds[k] += bounds[k - 1]


@compiled
def fill(bands: Array, bounds: Array, gaussians: int, per_image: int, pairs: Array) -> None:
    """The Gaussians of every band, in order."""
    position = bounds.copy()
    for g in range(len(bands)):
        for band in range(bands[g, 0], bands[g, 1]):
            k = g // gaussians * per_image + band
            pairs[position[k]] = g
            position[k] += 1


@compiled
def _span(center: float, p: float, q: float, vy: float, box: Array, reach: float, start: float) -> tuple[int, int]:
    """The first column of a row of an ellipse and the one after the last, in whole blocks within its box."""
    first, last = box[0], box[1]
    if reach < np.inf:
        # u² + v² ≤ reach, solved for dx.
        p, q, vy = np.float64(p), np.float64(q), np.float64(vy)
        norm = np.sqrt(p * p + q * q)
        sine, offset = q / norm, vy / norm
        rest = reach - (p * offset) ** 2
        if rest < 0:
            return 0, 0
        middle, half = np.float64(center) - np.float64(start) + sine * offset, np.sqrt(rest) / norm + 1
        low, high = min(max(middle - half, first), last), min(max(middle + half, first - 1), last - 1)
        first, last = np.int64(low) // BAND * BAND, (np.int64(high) // BAND + 1) * BAND
    return first, last


@compiled
def _alphas(
    xs: Array, center: float, p: float, q: float, vy: float, opacity: float, limits: Array, shape: Array, alpha: Array
) -> None:
    """exp(-(u² + v²) / 2), and α where it is drawn and otherwise 0, of the columns at `xs`."""
    threshold, limit, zero = limits[0], limits[1], limits[3] - limits[3]
    for j in range(xs.size):
        dx = center - xs[j]
        u, v = p * dx, q * dx + vy
        shape[j] = exp_minus_half(u * u + v * v)
        value = opacity * shape[j]
        value = min(limit, value)
        alpha[j] = value if value >= threshold else zero


@compiled
def _add(target: Array, factor: float, values: Array) -> None:
    for j in range(target.size):
        target[j] += factor * values[j]


@compiled
def _pass_light(alpha: Array, light: Array, limits: Array) -> None:
    """Turn α into α T, and T into what is left of it, 0 where the pixel ends."""
    least, one = limits[2], limits[3]
    for j in range(alpha.size):
        left = light[j] * (one - alpha[j])
        alive = left > least
        alpha[j] = alpha[j] * light[j] if alive else one - one
        light[j] = left if alive else one - one


@compiled
def draw(
    centers: Array,
    whitening: Array,
    features: Array,
    opacities: Array,
    boxes: Array,
    reach: Array,
    bounds: Array,
    pairs: Array,
    xs: Array,
    ys: Array,
    limits: Array,
    over: bool,
    image: Array,
    start: int,
    step: int,
) -> None:
    """Draw the bands start, start + step, ... of [B, C, H, W]."""
    channels, height, width = image.shape[1:]
    per_image = ys.size // BAND
    alpha, shape = np.empty_like(xs), np.empty_like(xs)
    part = np.empty((channels, BAND, xs.size), image.dtype)
    light = np.empty((BAND, xs.size), image.dtype)
    for k in range(start, bounds.size - 1, step):
        top = k % per_image * BAND
        rows = min(BAND, height - top)
        part[:] = 0
        light[:] = 1
        for g in pairs[bounds[k] : bounds[k + 1]]:
            x, y = centers[g, 0], centers[g, 1]
            p, q, r = whitening[g, 0], whitening[g, 1], whitening[g, 2]
            for row in range(rows):
                vy = r * (y - ys[top + row])
                first, last = _span(x, p, q, vy, boxes[g], reach[g], xs[0])
                if first < last:
                    alphas = alpha[: last - first]
                    _alphas(xs[first:last], x, p, q, vy, opacities[g], limits, shape[: last - first], alphas)
                    if over:
                        _pass_light(alphas, light[row, first:last], limits)
                    for c in range(channels):
                        _add(part[c, row, first:last], features[g, c], alphas)
        for c in range(channels):
            image[k // per_image, c, top : top + rows] = part[c, :rows, :width]


@compiled
def differentiate(
    centers: Array,
    whitening: Array,
    features: Array,
    opacities: Array,
    boxes: Array,
    reach: Array,
    bounds: Array,
    pairs: Array,
    xs: Array,
    ys: Array,
    limits: Array,
    over: bool,
    image: Array,
    grad_image: Array,
    sums: Array,
    start: int,
    step: int,
) -> None:
    """Add up the sums [P, SUMS + C] of the pairs of the bands start, start + step, ..."""
    channels, height, width = image.shape[1:]
    per_image = ys.size // BAND
    alpha, shape, slope = np.empty_like(xs), np.empty_like(xs), np.empty_like(xs)
    upstream = np.zeros((channels, BAND, xs.size), image.dtype)
    light = np.empty((BAND, xs.size), image.dtype)
    # Of compositing: the loss of all that is drawn at a pixel, as if linear in it, less what has been passed.
    behind = np.zeros((BAND, xs.size), image.dtype)
    for k in range(start, bounds.size - 1, step):
        b, top = k // per_image, k % per_image * BAND
        rows = min(BAND, height - top)
        for c in range(channels):
            upstream[c, :rows, :width] = grad_image[b, c, top : top + rows]
        if over:
            light[:] = 1
            behind[:] = 0
            for c in range(channels):
                behind[:rows, :width] += grad_image[b, c, top : top + rows] * image[b, c, top : top + rows]
        for i in range(bounds[k], bounds[k + 1]):
            g = pairs[i]
            x, y = centers[g, 0], centers[g, 1]
            p, q, r = whitening[g, 0], whitening[g, 1], whitening[g, 2]
            for row in range(rows):
                dy = y - ys[top + row]
                vy = r * dy
                first, last = _span(x, p, q, vy, boxes[g], reach[g], xs[0])
                if first < last:
                    columns = xs[first:last]
                    alphas, shapes, slopes = alpha[: columns.size], shape[: columns.size], slope[: columns.size]
                    _alphas(columns, x, p, q, vy, opacities[g], limits, shapes, alphas)
                    slopes[:] = 0
                    for c in range(channels):
                        _add(slopes, features[g, c], upstream[c, row, first:last])
                    if over:
                        _slope_over(alphas, light[row, first:last], behind[row, first:last], limits, slopes)
                    for c in range(channels):
                        sums[i, SUMS + c] += _dot(alphas, upstream[c, row, first:last])
                    _add_sums(columns, x, q, vy, dy, opacities[g], limits, shapes, slopes, sums[i])


@compiled
def _slope_over(alpha: Array, light: Array, behind: Array, limits: Array, slope: Array) -> None:
    """As `_pass_light`, and turn the gradient to α T into that to α, which darkens all behind."""
    least, one = limits[2], limits[3]
    for j in range(alpha.size):
        left = light[j] * (one - alpha[j])
        alive = left > least
        drawn = alpha[j] * light[j] if alive else one - one
        behind[j] -= drawn * slope[j]
        slope[j] = light[j] * slope[j] - behind[j] / (one - alpha[j]) if alive else one - one
        alpha[j] = drawn
        light[j] = left if alive else one - one


@compiled
def _dot(a: Array, b: Array) -> Any:
    total = a[0] - a[0]
    for j in range(a.size):
        total += a[j] * b[j]
    return total


@compiled
def _add_sums(
    xs: Array,
    center: float,
    q: float,
    vy: float,
    dy: float,
    opacity: float,
    limits: Array,
    shape: Array,
    slope: Array,
    sums: Array,
) -> None:
    """Add a row to the sums of a pair, with weight = exp(..) ∂L/∂α where α depends on it, moment = v weight."""
    threshold, limit, zero = limits[0], limits[1], limits[3] - limits[3]
    weight_0, weight_x, weight_xx, moment_0, moment_x = zero, zero, zero, zero, zero
    for j in range(xs.size):
        dx = center - xs[j]
        value = opacity * shape[j]
        weight = shape[j] * slope[j] if (value >= threshold) & (value <= limit) else zero
        moment = weight * (q * dx + vy)
        weight_0 += weight
        weight_x += weight * dx
        weight_xx += weight * dx * dx
        moment_0 += moment
        moment_x += moment * dx
    sums[0] += weight_0
    sums[1] += weight_x
    sums[2] += weight_xx
    sums[3] += moment_0
    sums[4] += moment_x
    sums[5] += moment_0 * dy


@compiled
def collect(
    pairs: Array,
    sums: Array,
    whitening: Array,
    opacities: Array,
    grad_centers: Array,
    grad_whitening: Array,
    grad_features: Array,
    grad_opacities: Array,
) -> None:
    """From the sums of the pairs to the gradients; these come as zeros.

    ∂α/∂opacity = exp(..), and for σ = (u² + v²) / 2, u = p dx, v = q dx + r dy: ∂α/∂σ = -opacity exp(..).
    """
    for i in range(pairs.size):
        g = pairs[i]
        weight_0, weight_x, weight_xx = sums[i, 0], sums[i, 1], sums[i, 2]
        moment_0, moment_x, moment_y = sums[i, 3], sums[i, 4], sums[i, 5]
        p, q, r = whitening[g, 0], whitening[g, 1], whitening[g, 2]
        grad_centers[g, 0] -= opacities[g] * (p * p * weight_x + q * moment_0)
        grad_centers[g, 1] -= opacities[g] * r * moment_0
        grad_whitening[g, 0] -= opacities[g] * p * weight_xx
        grad_whitening[g, 1] -= opacities[g] * moment_x
        grad_whitening[g, 2] -= opacities[g] * moment_y
        grad_opacities[g] += weight_0
        for c in range(grad_features.shape[1]):
            grad_features[g, c] += sums[i, SUMS + c]

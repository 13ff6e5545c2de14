"""The compiled CPU backend: bands of 16 rows, in each the span of every row of every ellipse; imports numba.

A band is one image's 16 rows, the height of the blocks that culling works in. Each band goes over the Gaussians
that reach it, in order, row by row over the columns of the ellipse, widened to blocks of 16 columns: so a culled
block is in or out as a whole and all loops have lengths of whole vectors. Bands share nothing that is written, so
threads take them in any order and the same inputs give the same bytes.

Shapes: B images, N Gaussians per image, C channels, H rows, W columns; P pairs of a band and a Gaussian in it,
S sums of a pair.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from smalti.gaussian.rasterizer.backends import MAX_ALPHA_OVER, MIN_TRANSMITTANCE, Gradients, Splats, View
from smalti.gaussian.rasterizer.numba_kernels import BAND, SUMS, collect, differentiate, draw, fill, plan

Array = NDArray[Any]

# A further thread must have this many pairs to be worth its start.
_PAIRS_PER_THREAD = 64


def forward(splats: Splats, view: View) -> torch.Tensor:
    """Draw the image: [B, C, H, W]."""
    scene = _Scene.of(splats, view)
    images, channels = splats.features.shape[0], splats.features.shape[2]
    image = np.zeros((images, channels, view.height, view.width), scene.features.dtype)
    _in_threads(scene, lambda first, step: draw(*scene, view.over, image, first, step))
    return torch.from_numpy(image)


def backward(splats: Splats, view: View, image: torch.Tensor, grad_image: torch.Tensor) -> Gradients:
    """The gradients of forward."""
    scene = _Scene.of(splats, view)
    sums = np.zeros((len(scene.pairs), SUMS + splats.features.shape[2]), scene.features.dtype)
    drawn, upstream = image.detach().numpy(), grad_image.detach().numpy()
    _in_threads(scene, lambda first, step: differentiate(*scene, view.over, drawn, upstream, sums, first, step))
    out = Gradients(*map(torch.zeros_like, splats[:4]))
    collect(scene.pairs, sums, scene.whitening, scene.opacities, *(x.flatten(0, 1).numpy() for x in out))
    return out


class _Scene(NamedTuple):
    """What the kernels read; Gaussians of all images in one row.

    Args:
        centers: [B N, 2].
        whitening: [B N, 3].
        features: [B N, C].
        opacities: [B N].
        boxes: [B N, 4].
        reach: [B N], float64: u² + v² beyond it has α < min_alpha.
        bounds: [B bands + 1]: band k owns the pairs bounds[k] to bounds[k + 1].
        pairs: [P], the Gaussian of each, ascending within a band.
        xs: coordinates of the columns, of whole blocks.
        ys: coordinates of the rows, of whole bands.
        limits: min_alpha, the greatest alpha, the least transmittance and 1, in the dtype of the scene.
    """

    centers: Array
    whitening: Array
    features: Array
    opacities: Array
    boxes: Array
    reach: Array
    bounds: Array
    pairs: Array
    xs: Array
    ys: Array
    limits: Array

    @classmethod
    def of(cls, splats: Splats, view: View) -> _Scene:
        centers, whitening, features, opacities, boxes = (x.detach().flatten(0, 1).numpy() for x in splats)
        dtype = centers.dtype
        xs, ys = (np.arange(-(-size // BAND) * BAND).astype(dtype) for size in (view.width, view.height))
        xs, ys = xs + dtype.type(view.pixel_center), ys + dtype.type(view.pixel_center)
        limits = np.array([view.min_alpha, MAX_ALPHA_OVER if view.over else 1, MIN_TRANSMITTANCE, 1], dtype)
        images, gaussians = splats.opacities.shape
        reach = np.empty(len(opacities))
        bands = np.empty((len(opacities), 2), np.int64)
        bounds = np.zeros(images * (len(ys) // BAND) + 1, np.int64)
        plan(centers, whitening, opacities, boxes, ys, limits, gaussians, reach, bands, bounds)
        pairs = np.empty(bounds[-1], np.int64)
        fill(bands, bounds, gaussians, len(ys) // BAND, pairs)
        return cls(centers, whitening, features, opacities, boxes, reach, bounds, pairs, xs, ys, limits)


def _in_threads(scene: _Scene, work: Callable[[int, int], None]) -> None:
    """Call `work(first, step)` for bands first, first + step, ..., on as many threads as torch uses."""
    threads = max(1, min(torch.get_num_threads(), len(scene.bounds) - 1, len(scene.pairs) // _PAIRS_PER_THREAD))
    if threads == 1:
        work(0, 1)
        return
    list(_pool(os.getpid(), threads).map(work, range(threads), [threads] * threads))


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    # By process, since a fork has none of its parent's threads.
    return ThreadPoolExecutor(threads, "smalti-rasterize")

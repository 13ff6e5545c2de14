"""Rasterizing 2-D Gaussians by accumulated summation: the public operator.

Shapes: B images, N Gaussians per image, C channels.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from smalti.core.errors import UserError
from smalti.gaussian.projection import project
from smalti.gaussian.reference import rasterize_reference
from smalti.gaussian.tiles import rasterize_tiles

Backend = Literal["tiles", "reference"]
_BACKENDS = {"tiles": rasterize_tiles, "reference": rasterize_reference}


def rasterize_gaussians_2d(
    means: Tensor,
    scales: Tensor,
    rotations: Tensor,
    features: Tensor,
    opacities: Tensor,
    height: int,
    width: int,
    *,
    pixel_center: float = 0.0,
    min_alpha: float = 1 / 255,
    cull_sigmas: float = 3.0,
    backend: Backend = "tiles",
) -> Tensor:
    """Draw Gaussians by plain summation: image_c(x, y) = Σ_n α_n(x, y) feature_nc.

    α = min(1, opacity · exp(-½ dᵀ Σ⁻¹ d)) with d the offset from the pixel to the centre in pixels and
    Σ = R diag(sx², sy²) Rᵀ, R = [[cos θ, sin θ], [-sin θ, cos θ]]: the accumulated summation of GaussianImage
    (arXiv 2403.08551) and GaussianToken (arXiv 2501.15619). There is neither order nor background.
    The defaults are those of the authors' kernels; pixels at which a Gaussian has α < `min_alpha`, or that lie
    outside the 16-pixel blocks its culling radius touches, do not see it. Gaussians outside the image, and
    those with a zero scale, draw nothing.

    The gradients to all five tensors are exact for fixed thresholds and culling. (The kernels published with
    GaussianToken count the off-diagonal term of the covariance twice; this does not.) The same inputs give the
    same bytes on the CPU. Autocast does not apply: the sums run in the dtype of the inputs.

    Args:
        means: [B, N, 2], centres (x, y): -1 is the left or upper edge of the image, +1 the right or lower.
        scales: [B, N, 2], standard deviations along the two axes of each ellipse, in pixels, at least 0.
        rotations: [B, N], θ in radians.
        features: [B, N, C], any values.
        opacities: [B, N], usually in [0, 1]; α saturates at 1, and nothing is drawn at 0 or below.
        height: rows of the image, at least 1.
        width: columns of the image, at least 1.
        pixel_center: pixel j is sampled at coordinate j + pixel_center; the original samples at 0, most other
            renderers at 0.5.
        min_alpha: contributions with a smaller α are left out, in [0, 1].
        cull_sigmas: the culling radius in standard deviations, greater than 0; `math.inf` turns culling off.
        backend: "tiles" is fast, lean and differentiable once; "reference" evaluates every Gaussian at every
            pixel and is differentiable any number of times. Both give the same numbers up to rounding.

    Returns:
        [B, C, height, width], in the dtype of the inputs.

    Raises:
        UserError: wrong shapes, dtypes (all five must share float32 or float64) or devices, values that are not
            finite, negative scales, or a size, threshold or backend that does not exist.
    """
    inputs = {
        "means": means,
        "scales": scales,
        "rotations": rotations,
        "features": features,
        "opacities": opacities,
    }
    _check_settings(height, width, pixel_center, min_alpha, cull_sigmas, backend)
    _check_layout(inputs)
    _check_values(inputs)
    with torch.autocast(means.device.type, enabled=False):
        projection = project(means, scales, rotations, height, width, cull_sigmas=cull_sigmas)
        return _BACKENDS[backend](
            projection, features, opacities, height, width, pixel_center=pixel_center, min_alpha=min_alpha
        )


def _check_settings(
    height: int, width: int, pixel_center: float, min_alpha: float, cull_sigmas: float, backend: str
) -> None:
    for name, size in (("height", height), ("width", width)):
        if not isinstance(size, int) or size < 1:
            raise UserError(f"{name} of the image must be a whole number of at least 1, got {size!r}")
    if not math.isfinite(pixel_center):
        raise UserError(f"pixel_center must be finite, got {pixel_center}")
    if not 0 <= min_alpha <= 1:
        raise UserError(f"min_alpha must lie in [0, 1], got {min_alpha}")
    if not cull_sigmas > 0:
        raise UserError(f"cull_sigmas must be greater than 0 (math.inf turns culling off), got {cull_sigmas}")
    if backend not in _BACKENDS:
        raise UserError(f"backend must be one of {', '.join(_BACKENDS)}, got {backend!r}")


def _check_layout(inputs: dict[str, Tensor]) -> None:
    means = inputs["means"]
    if means.ndim != 3 or means.shape[-1] != 2:
        raise UserError(f"means must have the shape [images, gaussians, 2], got {list(means.shape)}")
    images, gaussians = means.shape[:2]
    expected = {
        "scales": (images, gaussians, 2),
        "rotations": (images, gaussians),
        "features": (images, gaussians, "channels"),
        "opacities": (images, gaussians),
    }
    for name, shape in expected.items():
        got = inputs[name].shape
        if len(got) != len(shape) or any(b != a for a, b in zip(shape, got, strict=True) if a != "channels"):
            wanted = ", ".join(map(str, shape))
            raise UserError(f"{name} must have the shape [{wanted}] to go with the means, got {list(got)}")
    for name, tensor in inputs.items():
        if tensor.dtype not in (torch.float32, torch.float64) or tensor.dtype != means.dtype:
            raise UserError(
                f"{name} must be float32 or float64 like the means ({means.dtype}), got {tensor.dtype}"
                if name != "means"
                else f"means must be float32 or float64, got {means.dtype}"
            )
        if tensor.device != means.device:
            raise UserError(f"{name} must be on {means.device} like the means, got {tensor.device}")


def _check_values(inputs: dict[str, Tensor]) -> None:
    flags = [tensor.isfinite().all() for tensor in inputs.values()] + [(inputs["scales"] >= 0).all()]
    *finite, positive = torch.stack(flags).tolist()  # one synchronisation for all of them
    for name, good in zip(inputs, finite, strict=True):
        if not good:
            raise UserError(f"{name} must be finite, but some are NaN or infinite")
    if not positive:
        raise UserError(f"scales must not be negative, got {inputs['scales'].min().item():g}")

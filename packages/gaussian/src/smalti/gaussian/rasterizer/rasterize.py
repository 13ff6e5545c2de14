"""Rasterizing 2-D Gaussians, by accumulated summation or alpha compositing: the public operator.

Shapes: B images, N Gaussians per image, C channels.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from smalti.gaussian.rasterizer import backends, published
from smalti.gaussian.rasterizer.backends import Splats, View
from smalti.gaussian.rasterizer.checks import check_layout, check_settings, check_values
from smalti.gaussian.rasterizer.ellipses import Ellipses, from_cholesky, from_covariances, from_scales
from smalti.gaussian.rasterizer.projection import project
from smalti.gaussian.rasterizer.reference import rasterize_reference

Compositing = Literal["sum", "over"]
Gradient = Literal["exact", "published"]
Backend = Literal["tiles", "numba", "triton", "reference"]


def rasterize_gaussians_2d(
    means: Tensor,
    scales: Tensor | None,
    rotations: Tensor | None,
    features: Tensor,
    opacities: Tensor,
    height: int,
    width: int,
    *,
    cholesky: Tensor | None = None,
    covariances: Tensor | None = None,
    compositing: Compositing = "sum",
    gradient: Gradient = "exact",
    pixel_center: float = 0.0,
    min_alpha: float = 1 / 255,
    cull_sigmas: float = 3.0,
    backend: Backend | None = None,
) -> Tensor:
    """Draw Gaussians, by plain summation or front to back.

    α = opacity · exp(-½ dᵀ Σ⁻¹ d) with d the offset from the pixel to the centre in pixels. The covariance Σ is
    given in one of three ways: scales and rotations, Σ = R diag(sx², sy²) Rᵀ, R = [[cos θ, sin θ], [-sin θ, cos θ]];
    its Cholesky factor, Σ = L Lᵀ; or itself. In the other ways `scales` and `rotations` are None.

    With `compositing` "sum", image_c = Σ_n min(1, α_n) feature_nc: the accumulated summation of GaussianImage
    (arXiv 2403.08551) and GaussianToken (arXiv 2501.15619), without order or background. With "over", the first
    Gaussian is in front: image_c = Σ_n α_n T_n feature_nc with α limited to 0.999 and T_n = Π_{m<n} (1 - α_m); a
    pixel ends before the first Gaussian that would leave T ≤ 1e-4. A feature channel of ones gives the coverage
    A, and image + (1 - A) background puts a background behind.

    The defaults are those of the authors' kernels; pixels at which a Gaussian has α < `min_alpha`, or that lie
    outside the 16-pixel blocks its culling radius touches, do not see it. Gaussians outside the image draw
    nothing, nor do those of which a scale (a diagonal entry of L, the determinant of Σ) is zero or a square
    overflows; they have no gradient.

    Gradients flow to every tensor and are exact for fixed thresholds and culling. The same inputs give the same
    bytes on the CPU. Under autocast half-precision inputs become float32 and everything runs in it; without,
    the sums run in the dtype of the inputs.

    Values are checked on the CPU. On other devices a check would make the host wait, and within `torch.compile`
    it would break the graph: there, a Gaussian whose mean, shape or opacity is not finite draws nothing, and a
    feature that is not finite spoils the pixels around its Gaussian.

    Args:
        means: [B, N, 2], centres (x, y): -1 is the left or upper edge of the image, +1 the right or lower.
        scales: [B, N, 2], standard deviations along the two axes of each ellipse, in pixels, at least 0.
        rotations: [B, N], θ in radians.
        features: [B, N, C], any values.
        opacities: [B, N], usually in [0, 1]; α saturates at 1, and nothing is drawn at 0 or below.
        height: rows of the image, at least 1.
        width: columns of the image, at least 1.
        cholesky: [B, N, 3], the entries (l11, l21, l22) of the lower triangular L, in pixels, of any sign.
        covariances: [B, N, 3], the entries (xx, xy, yy) of Σ, in square pixels, positive definite.
        compositing: "sum" or "over".
        gradient: "exact", or "published" for what the CUDA kernels of GaussianToken return instead of the true
            gradient of the sum: that to the covariance's off-diagonal entry is doubled, and for other than 3
            channels the last Gaussian of each block of 16 × 16 pixels gets none from that block.
        pixel_center: pixel j is sampled at coordinate j + pixel_center; the original samples at 0, most other
            renderers at 0.5.
        min_alpha: contributions with a smaller α are left out, in [0, 1].
        cull_sigmas: the culling radius in standard deviations, greater than 0; `math.inf` turns culling off.
        backend: "numba", compiled for the CPU (the extra `smalti-gaussian[cpu]`), "triton" for CUDA, "tiles" in
            plain torch: all fast, lean and differentiable once; or "reference", which evaluates every Gaussian at
            every pixel and is differentiable any number of times. All give the same numbers up to rounding.
            None takes the first of numba on the CPU and Triton on CUDA that is installed, otherwise tiles.

    Returns:
        [B, C, height, width], in the dtype of the inputs.

    Raises:
        UserError: wrong shapes, dtypes (all must share float32 or float64) or devices, none or several ways of
            giving Σ, values that are not finite, negative scales or covariances that are not positive definite
            (on the CPU), or a setting that does not exist.
    """
    view = View(height, width, float(pixel_center), float(min_alpha), compositing == "over")
    check_settings(view, compositing, gradient, cull_sigmas)
    inputs = {
        "means": means,
        "scales": scales,
        "rotations": rotations,
        "cholesky": cholesky,
        "covariances": covariances,
        "features": features,
        "opacities": opacities,
    }
    given = {name: _full_precision(tensor) for name, tensor in inputs.items() if tensor is not None}
    check_layout(given)
    chosen = backends.choose(backend, means.device)
    if means.device.type == "cpu" and not torch.compiler.is_compiling():
        check_values(given)
    with torch.autocast(means.device.type, enabled=False):
        ellipses = _ellipses(given)
        if gradient == "published":
            ellipses = published.count_off_diagonal_twice(ellipses)
        projection = project(given["means"], ellipses, height, width, cull_sigmas=cull_sigmas)
        drawn = given["opacities"].isfinite()
        splats = Splats(
            projection.centers,
            projection.whitening,
            given["features"],
            torch.where(drawn, given["opacities"], 0),
            projection.boxes * drawn[..., None],
        )
        image = rasterize_reference(splats, view) if chosen == "reference" else backends.rasterize(splats, view, chosen)
        if gradient == "published" and features.shape[2] != 3:
            image = published.forget_last_of_blocks(image, splats, view)
        return image


def _ellipses(given: dict[str, Tensor]) -> Ellipses:
    if "cholesky" in given:
        return from_cholesky(given["cholesky"])
    if "covariances" in given:
        return from_covariances(given["covariances"])
    return from_scales(given["scales"], given["rotations"])


def _full_precision(tensor: Tensor) -> Tensor:
    half = tensor.dtype in (torch.float16, torch.bfloat16)
    return tensor.float() if half and torch.is_autocast_enabled(tensor.device.type) else tensor

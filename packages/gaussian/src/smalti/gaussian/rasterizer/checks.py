"""What `rasterize_gaussians_2d` refuses, each in one sentence."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from smalti.core.errors import UserError
from smalti.gaussian.rasterizer.backends import View
from smalti.gaussian.rasterizer.ellipses import positive_definite

# The ways of giving the covariance, by the names of their tensors.
_SHAPES = (("scales", "rotations"), ("cholesky",), ("covariances",))
_LAYOUT: dict[str, tuple[int | str, ...]] = {
    "means": ("images", "gaussians", 2),
    "scales": ("images", "gaussians", 2),
    "rotations": ("images", "gaussians"),
    "cholesky": ("images", "gaussians", 3),
    "covariances": ("images", "gaussians", 3),
    "features": ("images", "gaussians", "channels"),
    "opacities": ("images", "gaussians"),
}


def check_settings(view: View, compositing: str, gradient: str, cull_sigmas: float) -> None:
    """The size of the image, thresholds and modes."""
    for name, size in (("height", view.height), ("width", view.width)):
        if not isinstance(size, int | torch.SymInt) or size < 1:
            raise UserError(f"{name} of the image must be a whole number of at least 1, got {size!r}")
    if not math.isfinite(view.pixel_center):
        raise UserError(f"pixel_center must be finite, got {view.pixel_center}")
    if not 0 <= view.min_alpha <= 1:
        raise UserError(f"min_alpha must lie in [0, 1], got {view.min_alpha}")
    if not cull_sigmas > 0:
        raise UserError(f"cull_sigmas must be greater than 0 (math.inf turns culling off), got {cull_sigmas}")
    if compositing not in ("sum", "over"):
        raise UserError(f"compositing must be one of sum, over, got {compositing!r}")
    if gradient not in ("exact", "published"):
        raise UserError(f"gradient must be one of exact, published, got {gradient!r}")
    if gradient == "published" and view.over:
        raise UserError("gradient='published' is that of compositing='sum'; with 'over' only 'exact' exists")


def check_layout(given: dict[str, Tensor]) -> None:
    """One way of giving the covariance; shapes, dtypes and devices that fit."""
    ways = [way for way in _SHAPES if any(name in given for name in way)]
    if len(ways) != 1 or any(name not in given for name in ways[0]):
        got = ", ".join(name for way in ways for name in way if name in given) or "none of them"
        raise UserError(
            f"give either scales and rotations, or cholesky, or covariances, and None for others: got {got}"
        )
    means = given["means"]
    if means.ndim != 3 or means.shape[-1] != 2:
        raise UserError(f"means must have the shape [images, gaussians, 2], got {list(means.shape)}")
    known = {"images": means.shape[0], "gaussians": means.shape[1]}
    for name, tensor in given.items():
        wanted = [known.get(size, size) if isinstance(size, str) else size for size in _LAYOUT[name]]
        got_shape = tensor.shape
        if len(got_shape) != len(wanted) or any(
            a != b for a, b in zip(wanted, got_shape, strict=True) if a != "channels"
        ):
            listed = ", ".join(map(str, wanted))
            raise UserError(f"{name} must have the shape [{listed}] to go with the means, got {list(got_shape)}")
        if tensor.dtype not in (torch.float32, torch.float64) or tensor.dtype != means.dtype:
            like = "" if name == "means" else f" like the means ({means.dtype})"
            raise UserError(f"{name} must be float32 or float64{like}, got {tensor.dtype}")
        if tensor.device != means.device:
            raise UserError(f"{name} must be on {means.device} like the means, got {tensor.device}")


@torch.no_grad()
def check_values(given: dict[str, Tensor]) -> None:
    """All finite, scales not negative, covariances positive definite; waits for the device."""
    for name, tensor in given.items():
        # The sum is finite only where all are; it is not always where they are.
        if not math.isfinite(tensor.sum().item()) and not tensor.isfinite().all():
            raise UserError(f"{name} must be finite, but some are NaN or infinite")
    if "scales" in given and given["scales"].numel() and (least := given["scales"].min().item()) < 0:
        raise UserError(f"scales must not be negative, got {least:g}")
    if "covariances" in given:
        definite = positive_definite(given["covariances"])
        if not definite.all():
            worst = given["covariances"][~definite][0].tolist()
            raise UserError(f"covariances must be positive definite, got (xx, xy, yy) = {tuple(worst)}")

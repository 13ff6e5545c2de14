"""How the cases of splatting are run on ours: projection, image, and both gradients to every input, in float64."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from smalti.gaussian import rasterize_gaussians_2d
from smalti.gaussian.rasterizer.ellipses import from_scales
from smalti.gaussian.rasterizer.projection import CULL_BLOCK, project

OPTIONS = {"num_gaussians", "channels", "height", "width", "block", "means_gain", "scale_range", "opacity"}
NAMES = ("means", "scales", "rotations", "features", "opacities")
GRADIENTS = {"grad_exact": "exact", "grad_kernel": "published"}


def rasterize(case: dict[str, Any], parity: ModuleType) -> dict[str, Tensor]:
    """Every stage; those of Cholesky factors where the case has them."""
    config = case["config"]
    assert config.keys() == OPTIONS, f"no runner understands the configuration {sorted(config)}"
    assert config["block"] == CULL_BLOCK
    raw = {name: value.double() for name, value in parity.fill_case_inputs(case).items()}
    gaussians, size = mapped(config, raw), (config["height"], config["width"])
    ellipses = from_scales(gaussians["scales"], gaussians["rotations"])
    projection = project(gaussians["means"], ellipses, *size)
    p, q, r = projection.whitening[0].unbind(-1)
    left, right, top, bottom = projection.boxes[0].unbind(-1)
    stages = {
        "xys": projection.centers[0],
        "conics": torch.stack((p * p + q * q, q * r, r * r), dim=-1),
        "radii": projection.radii[0].long(),
        "tiles_hit": (right - left) * (bottom - top) // CULL_BLOCK**2,
    }
    leaves = [gaussians[name].requires_grad_() for name in NAMES]
    for stage, gradient in GRADIENTS.items():
        image = rasterize_gaussians_2d(*leaves, *size, gradient=gradient)
        stages["image"] = image.detach()[0]
        gradients = torch.autograd.grad(image, leaves, raw["upstream"][None])
        for name, value in zip(NAMES, gradients, strict=True):
            stages[f"{stage}.{name}"] = value[0].reshape(raw[name].shape)
    if any(stage.startswith("cholesky.") for stage in case["outputs"]):
        stages |= _cholesky(gaussians, raw, size)
    return stages


def mapped(config: dict[str, Any], raw: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch of one image of the Gaussians that the normal inputs of a case stand for."""
    assert config["opacity"] in ("sigmoid", "ones"), f"no runner understands the opacity {config['opacity']!r}"
    low, high = config["scale_range"]
    opacities = raw["opacities"].sigmoid() if config["opacity"] == "sigmoid" else torch.ones_like(raw["opacities"])
    values = {
        "means": config["means_gain"] * raw["means"].tanh(),
        "scales": low + (high - low) * (1.5 * raw["scales"]).sigmoid(),
        "rotations": torch.pi * raw["rotations"].sigmoid()[:, 0],
        "features": raw["features"],
        "opacities": opacities[:, 0],
    }
    return {name: value[None] for name, value in values.items()}


def _cholesky(gaussians: dict[str, Tensor], raw: dict[str, Tensor], size: tuple[int, int]) -> dict[str, Tensor]:
    sx, sy = gaussians["scales"].detach().unbind(-1)
    factors = torch.stack((sx, 0.7 * sx * raw["rotations"].tanh()[None, :, 0], sy), dim=-1).requires_grad_()
    means, stages = gaussians["means"], {}
    for stage, gradient in GRADIENTS.items():
        image = rasterize_gaussians_2d(
            means, None, None, gaussians["features"], gaussians["opacities"], *size, cholesky=factors, gradient=gradient
        )
        to_factors, to_means = torch.autograd.grad(image, (factors, means), raw["upstream"][None])
        stages["cholesky.image"] = image.detach()[0]
        stages[f"cholesky.{stage}.L"], stages[f"cholesky.{stage}.means"] = to_factors[0], to_means[0]
    return stages


RUNNERS = {"gaussiantoken-op-rasterize-": rasterize}

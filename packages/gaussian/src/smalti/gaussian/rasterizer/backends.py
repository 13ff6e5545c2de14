"""Backends of the rasterizer: what one is, which there are, and the one custom operator on top of all of them.

A backend is a module with two functions on plain tensors, without autograd:

    forward(splats: Splats, view: View) -> image
    backward(splats: Splats, view: View, image, grad_image) -> Gradients

Both must be exact for fixed boxes and thresholds, and the same inputs must give the same bytes on the CPU. The
operator around them has fake kernels and a gradient, so `torch.compile` captures every backend whole.

Shapes: B images, N Gaussians per image, C channels, H rows, W columns.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from smalti.core.errors import UserError

# Alpha compositing ("over"), as in the original kernels: the greatest alpha, and the transmittance that a
# Gaussian must leave to be drawn; the first that would leave less ends the pixel.
MAX_ALPHA_OVER = 0.999
MIN_TRANSMITTANCE = 1e-4


class Splats(NamedTuple):
    """What is drawn. All values are finite and contiguous; the first four share float32 or float64.

    With (dx, dy) = centre - pixel, u = p dx and v = q dx + r dy, a Gaussian has
    α = min(limit, opacity · exp(-(u² + v²) / 2)), the limit 1 for sums and MAX_ALPHA_OVER for "over".
    It is drawn at the pixels of its box where α ≥ min_alpha.

    Args:
        centers: [B, N, 2], x and y in pixels.
        whitening: [B, N, 3], (p, q, r); p and r are positive.
        features: [B, N, C].
        opacities: [B, N], any sign; at 0 or below nothing is drawn.
        boxes: [B, N, 4], int64: left, right (exclusive), top, bottom (exclusive) in pixels: multiples of 16, so
            possibly past the image; empty (all 0) where the Gaussian is dropped.
    """

    centers: Tensor
    whitening: Tensor
    features: Tensor
    opacities: Tensor
    boxes: Tensor


class View(NamedTuple):
    """How it is drawn.

    Args:
        height: H.
        width: W.
        pixel_center: pixel (row i, column j) is sampled at x = j + pixel_center, y = i + pixel_center.
        min_alpha: contributions with a smaller alpha are left out, in [0, 1].
        over: False: image = Σ_n α_n feature_n. True: front to back in the order of the Gaussians,
            image = Σ_n α_n T_n feature_n with T_n = Π_{m<n} (1 - α_m) over the drawn ones; a pixel ends before
            the first Gaussian that would leave T (1 - α) ≤ MIN_TRANSMITTANCE. No background.
    """

    height: int
    width: int
    pixel_center: float
    min_alpha: float
    over: bool


class Gradients(NamedTuple):
    """The gradients to the first four of `Splats`, in their shapes; 0 where a Gaussian is not drawn.

    Where α is limited, it has no gradient to opacity and geometry. A Gaussian of opacity 0 has a gradient to
    its opacity only where min_alpha is 0.
    """

    centers: Tensor
    whitening: Tensor
    features: Tensor
    opacities: Tensor


class Backend(Protocol):
    """The functions of a backend module."""

    def forward(self, splats: Splats, view: View) -> Tensor:
        """The image: [B, C, H, W]."""

    def backward(self, splats: Splats, view: View, image: Tensor, grad_image: Tensor) -> Gradients:
        """The gradients of a loss with the gradient `grad_image` to `image`, what `forward` gave."""


# name: module, library it needs beside torch
_BACKENDS = {
    "tiles": ("smalti.gaussian.rasterizer.tiles", None),
    "numba": ("smalti.gaussian.rasterizer.numba_backend", "numba"),
    "triton": ("smalti.gaussian.rasterizer.triton_backend", "triton"),
}
_MISSING = {name for name, (_, library) in _BACKENDS.items() if library and find_spec(library) is None}
_EXTRAS = {"numba": "pip install smalti-gaussian[cpu]", "triton": "pip install triton"}
# "reference" is plain torch that autograd differentiates, any number of times: no operator, no backend module.
NAMES = (*_BACKENDS, "reference")


def choose(name: str | None, device: torch.device) -> str:
    """The name of the backend to use: as asked, or the fastest that is installed for the device.

    Raises:
        UserError: there is no such backend, it needs a library that is not installed, or not this device.
    """
    if name is None:
        preferred = {"cpu": "numba", "cuda": "triton"}.get(device.type, "tiles")
        return "tiles" if preferred in _MISSING else preferred
    if name not in NAMES:
        raise UserError(f"backend must be one of {', '.join(NAMES)}, got {name!r}")
    if name in _MISSING:
        raise UserError(f"backend {name!r} needs {_BACKENDS[name][1]}, which is not installed: {_EXTRAS[name]}")
    if name == "numba" and device.type != "cpu":
        raise UserError(f"backend 'numba' runs on the CPU, but the Gaussians are on {device}")
    return name


def rasterize(splats: Splats, view: View, backend: str) -> Tensor:
    """Draw by a backend of `choose` (not the reference), differentiable once: [B, C, H, W]."""
    image: Tensor = _rasterize(*splats, *view, backend)
    return image


def _module(name: str) -> Backend:
    return cast(Backend, import_module(_BACKENDS[name][0]))


@torch.library.custom_op("smalti::rasterize_gaussians", mutates_args=())
def _rasterize(
    centers: Tensor,
    whitening: Tensor,
    features: Tensor,
    opacities: Tensor,
    boxes: Tensor,
    height: int,
    width: int,
    pixel_center: float,
    min_alpha: float,
    over: bool,
    backend: str,
) -> Tensor:
    splats = Splats(*(x.contiguous() for x in (centers, whitening, features, opacities, boxes)))
    with torch.autocast(centers.device.type, enabled=False):
        return _module(backend).forward(splats, View(height, width, pixel_center, min_alpha, over))


@_rasterize.register_fake
def _(centers: Tensor, whitening: Tensor, features: Tensor, *rest: Any) -> Tensor:
    _, _, height, width, *_ = rest
    return features.new_empty(features.shape[0], features.shape[2], height, width)


@torch.library.custom_op("smalti::rasterize_gaussians_backward", mutates_args=())
def _backward(
    centers: Tensor,
    whitening: Tensor,
    features: Tensor,
    opacities: Tensor,
    boxes: Tensor,
    pixel_center: float,
    min_alpha: float,
    over: bool,
    backend: str,
    image: Tensor,
    grad_image: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    splats = Splats(*(x.contiguous() for x in (centers, whitening, features, opacities, boxes)))
    view = View(image.shape[2], image.shape[3], pixel_center, min_alpha, over)
    with torch.autocast(centers.device.type, enabled=False):
        gradients = _module(backend).backward(splats, view, image.contiguous(), grad_image.contiguous())
    return gradients.centers, gradients.whitening, gradients.features, gradients.opacities


@_backward.register_fake
def _(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    centers, whitening, features, opacities = map(torch.empty_like, inputs[:4])
    return centers, whitening, features, opacities


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5], output)
    _, _, *ctx.settings = inputs[5:]


def _gradient(ctx: Any, grad_image: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, image = ctx.saved_tensors
    return *_backward(*tensors, *ctx.settings, image, grad_image), *[None] * 7


def _no_second_derivative(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    raise UserError("the rasterizer is differentiable once; backend='reference' is so any number of times")


_rasterize.register_autograd(_gradient, setup_context=_save)
_backward.register_autograd(_no_second_derivative)
